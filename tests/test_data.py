"`slmkit data`: converting an archive in the authors' layout, fetching it, and every way that goes wrong."
import gzip, hashlib, http.server, json, os, threading, zipfile
from pathlib import Path
import pytest
from slmkit.core import data
from slmkit.core.settings import KitError
from slmkit.project import datasets as dv
from slmkit.cli.main import main

NLI = dict(premise="A man runs .", hypothesis="A man moves .", label=0)
FILES = {
    "svamp/SVAMP.json": [dict(ID="chal-7", Body="Tom has 6 eggs and 8 nuts.", Question="How many?", Answer=14.0,
                              Type="Addition")],
    "svamp/svamp_train.json": [dict(input="Tom has 6 eggs and 8 nuts.\nHow many?", label="( 6.0 + 8.0 )"),
                               dict(input="x\ny", label="( 9.0 - 2.0 )")],
    "svamp/llm/train_CoT_0.json": ["We add. The answer is (8 + 6).\n\nQ: more. The answer is (1)."],
    "svamp/llm/train_CoT_1.json": ["Nobody knows."],
    "svamp/svamp_test.json": [dict(input="p\nq", label="( 3.0 * 2.0 )")],
    "svamp/llm/test_CoT_0.json": ["Twice three. The answer is (2 + 3)."],
    "cqa/cqa_train.json": [dict(id="a1", question="Where?", choices=list("vwxyz"), answer="x",
                                abstractive_explanation="e", extractive_explanation="f")],
    "cqa/llm/train_CoT_0.json": ["It must be there. So the answer is (c) x.\n\nQ: What?"],
    "cqa/cqa_test.json": [dict(id="a2", question="Who?", choices=list("vwxyz"), answer="v")],
    "cqa/llm/test_CoT_0.json": ["So the answer is (b) w."],
    "esnli/esnli_valid.json": [NLI]*4,
    "esnli/esnli_test.json": [NLI | dict(label=2, explanation_1="no")],
    "esnli/llm/valid_CoT_0.json": ["Runs is moves.\nAnswer: entailment\n\nPremise: A"]*4,
    "esnli/llm/test_CoT_0.json": ["Hm.\nAnswer: neutral"],
    "anli1/anli1_valid.json": [NLI | dict(uid="u0", reason="r"), NLI | dict(uid="u1"),
                               NLI | dict(uid="u2", premise="Another .")],
    "anli1/llm/valid_CoT_0.json": ["He runs. So the answer is entailment."]*3,
    "anli1/anli1_test.json": [NLI | dict(uid="u3")],
    "anli1/llm/test_CoT_0.json": ["So the answer is neutral.\nPremise: B"]}

def zipped(path, files=FILES, top="datasets/", lines=True):
    with zipfile.ZipFile(path, "w") as z:
        for name, rows in files.items():
            as_lines = lines and "llm" not in name and "SVAMP" not in name
            z.writestr(top + name, "\n".join(map(json.dumps, rows)) if as_lines else json.dumps(rows))
    return path

@pytest.fixture
def archive(tmp_path): return zipped(tmp_path/"datasets.zip")

@pytest.fixture
def away(tmp_path, monkeypatch):
    "A place without a project, with a data folder and a cache of its own, where nothing is tried twice."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLMKIT_DATA", str(tmp_path/"sets"))
    monkeypatch.setattr(dv, "cache", lambda: tmp_path/"cache")
    monkeypatch.setattr(dv, "RETRIES", 0)
    return tmp_path

@pytest.fixture
def server(tmp_path):
    "A server of what lies in tmp_path/www; `asked` lists the paths, each thing in `broken` breaks one answer off."
    (tmp_path/"www").mkdir()
    asked, broken = [], []
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *a): super().__init__(*a, directory=str(tmp_path/"www"))
        def log_message(self, *a): pass
        def do_GET(self):
            asked.append(self.path)
            if self.path != "/short.zip" and not broken: return super().do_GET()
            if broken: broken.pop()
            self.send_response(200)
            self.send_header("Content-Length", "5000")
            self.end_headers()
            self.wfile.write(b"PK half")
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.asked, s.broken, s.www = asked, broken, tmp_path/"www"
    s.at = f"http://127.0.0.1:{s.server_port}"
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield s
    s.shutdown()
    s.server_close()

def rows(folder, name): return [json.loads(l) for l in gzip.open(folder/f"{name}.jsonl.gz", "rt", encoding="utf-8")]
def left(folder): return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())

def test_svamp_rows_and_the_loader_that_reads_them(archive, away):
    folder = dv.fetch("svamp", archive)
    train = rows(folder, "svamp_train")
    assert train[0] == dict(id="chal-7", input="Tom has 6 eggs and 8 nuts.\nHow many?", label="( 6.0 + 8.0 )",
        answer=14.0, type="Addition",
        palm_rationale="We add.", palm_label="(8 + 6)", palm_correct=True, palm_parsed=True,
        palm_raw="We add. The answer is (8 + 6).\n\nQ: more. The answer is (1).")
    assert [train[1][k] for k in ("palm_rationale", "palm_label", "palm_parsed", "answer")] == ["", "", False, 7.0]
    assert not rows(folder, "svamp_test")[0]["palm_correct"]
    assert data.load("svamp", "train")[0]["teacher_label"] == "(8 + 6)"  # through the marker: gzip'd bytes differ
    names = "FETCHED", "svamp_test.jsonl.gz", "svamp_train.jsonl.gz"
    assert left(away/"sets") == [f"distilling-step-by-step/{n}" for n in names]

def test_other_sets(archive, away):
    for name in ("cqa", "esnli", "anli1"): folder = dv.fetch(name, archive)
    cqa = rows(folder, "cqa_train")[0]
    assert cqa["input"] == "Where?\nAnswer Choices:\n(a) v\n(b) w\n(c) x\n(d) y\n(e) z"
    assert cqa["palm_label"] == "x" and cqa["palm_correct"]
    esnli = rows(folder, "esnli_valid")
    assert [r["demo_suspect"] for r in esnli] == [True, True, True, False]
    assert esnli[3]["palm_label"] == esnli[3]["label"] == "entailment"
    tested = rows(folder, "esnli_test")[0]
    assert tested["label"] == "contradiction" and not tested["palm_correct"]
    assert [r["id"] for r in data.load("esnli", "train")] == ["valid-3"]  # the rows that PaLM had seen are dropped
    assert [r["id"] for r in data.load("anli1", "train")] == ["u2"]  # as are premises that the test split shares
    assert set(dv.marker(folder)) >= {"cqa_train.jsonl.gz", "anli1_test.jsonl.gz"}

def test_a_json_list_and_a_folder_above_read_the_same(tmp_path):
    made = [dv.convert(zipped(tmp_path/f"{i}.zip", top=top, lines=lines), data.manifest()["svamp"])
            for i, (top, lines) in enumerate([("datasets/", True), ("repo-abc/datasets/", False)])]
    assert made[0] == made[1]

def test_fetching_from_a_server_once_for_all_sets(server, away):
    zipped(server.www/"datasets.zip")
    commit = data.manifest()["svamp"]["commit"]
    (server.www/commit).mkdir()
    os.replace(server.www/"datasets.zip", server.www/commit/"datasets.zip")
    for name in ("svamp", "cqa"): dv.fetch(name, url=server.at + "/{commit}/datasets.zip")
    assert server.asked == [f"/{commit}/datasets.zip"]
    states = dict.fromkeys(data.manifest(), "not here") | dict(svamp="fetched", cqa="fetched")
    assert {r[0]: r[3] for r in dv.table()} == states
    assert len(left(away/"cache")) == 1

def test_a_connection_that_breaks_is_tried_again(server, away, monkeypatch):
    monkeypatch.setattr(dv, "RETRIES", 1)
    zipped(server.www/"datasets.zip")
    server.broken.append("once")
    assert rows(dv.fetch("svamp", url=f"{server.at}/datasets.zip"), "svamp_train")
    assert server.asked == ["/datasets.zip"]*2 and dict((r[0], r[3]) for r in dv.table())["svamp"] == "fetched"

def test_an_archive_is_held_to_the_sha256_of_the_manifest(server, away, tmp_path):
    made = zipped(server.www/"datasets.zip")
    digest, url = hashlib.sha256(made.read_bytes()).hexdigest(), f"{server.at}/datasets.zip"
    assert dv.download(url, tmp_path/"cache/right.zip", digest).read_bytes() == made.read_bytes()
    with pytest.raises(KitError, match="can't be had") as e: dv.download(url, tmp_path/"cache/wrong.zip", "0"*64)
    assert "\n" not in str(e.value) and left(tmp_path/"cache") == ["right.zip"]

def test_sets_lie_in_the_users_cache_where_nothing_is_said(away, monkeypatch):
    monkeypatch.delenv("SLMKIT_DATA")
    assert dv.target() == away/"cache/data"

def test_what_is_here_is_not_fetched_again_and_damage_is_seen(server, archive, away):
    folder = dv.fetch("svamp", archive)
    archive.unlink()
    assert dv.fetch("svamp") == folder and not server.asked
    (folder/"svamp_test.jsonl.gz").write_bytes(b"cut")
    assert dict((r[0], r[3]) for r in dv.table())["svamp"] == "damaged"

@pytest.mark.parametrize("name", ["missing.zip", "short.zip", "text.zip"])
def test_a_bad_download_is_one_line_and_leaves_nothing(server, away, capsys, name):
    (server.www/"text.zip").write_text("<html>not a zip", encoding="utf-8")
    with pytest.raises(SystemExit) as e: main(["data", "fetch", "svamp", "--url", f"{server.at}/{name}"])
    said = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and len(said) == 1 and said[0].startswith("slmkit: ")
    assert left(away/"sets") == [] and left(away/"cache") == []

def test_an_unreachable_host_is_one_line(away, capsys):
    with pytest.raises(SystemExit) as e: main(["data", "fetch", "svamp", "--url", "http://127.0.0.1:9/x.zip"])
    out = capsys.readouterr().err.strip()
    assert e.value.code == 2 and out.startswith("slmkit: fetch: http://127.0.0.1:9/x.zip") and "\n" not in out
    assert left(away) == []

@pytest.mark.parametrize("change, word", [
    ({"svamp/llm/test_CoT_0.json": None}, "1 rows but 0 teacher outputs"),
    ({"svamp/svamp_test.json": None}, "no datasets/svamp/svamp_test.json"),
    ({"svamp/svamp_test.json": [dict(other=1)]}, "can't be read"),
    ({"svamp/llm/test_CoT_0.json": [3]}, "can't be read"),
])
def test_an_archive_that_is_not_the_authors_is_one_line_and_writes_nothing(tmp_path, away, change, word):
    path = zipped(tmp_path/"odd.zip", {k: v for k, v in (FILES | change).items() if v is not None})
    with pytest.raises(KitError, match=word) as e: dv.fetch("svamp", path)
    assert "\n" not in str(e.value) and left(away/"sets") == []

def test_a_folder_that_cannot_be_written_is_one_line(archive, away, monkeypatch):
    (away/"file").touch()
    monkeypatch.setenv("SLMKIT_DATA", str(away/"file"/"sets"))
    with pytest.raises(KitError, match="can't be written"): dv.fetch("svamp", archive)

@pytest.mark.parametrize("argv, words", [
    (["svmp"], "did you mean 'svamp'"),
    (["svamp", "--archive", "/nope.zip"], "no file /nope.zip"),
    (["svamp", "--url", "ftp://x/y"], "--archive FILE"),
    (["bbh"], "bbh is not fetched: put the file there"),
])
def test_bad_words_are_one_line(away, capsys, argv, words):
    with pytest.raises(SystemExit) as e: main(["data", "fetch", *argv])
    out = capsys.readouterr().err.strip()
    assert e.value.code == 2 and words in out and "\n" not in out

def test_list_names_every_set_and_fits_100_columns(away, capsys):
    with pytest.raises(SystemExit): main(["data", "list"])
    out = capsys.readouterr().out
    assert all(n in out for n in data.manifest())
    assert max(map(len, out.splitlines()[1:])) <= 100  # the first line names a folder
    line = next(l for l in out.splitlines() if l.startswith("gsm8k"))
    assert line.split()[:5] == ["gsm8k", "14,068", "MIT", "not", "here"]

# ---- sets that lie at their origin file by file

TREC = {"data/raw/TREC.train": "NUM:dist How far is it ?\nHUM:ind Who 's that \xe9 ?\nLOC:city Where, then ?\n",
        "data/raw/TREC.test": "LOC:city where then !\n"}

@pytest.fixture
def trec(monkeypatch, tmp_path):
    "A folder like the authors' repository; the manifest has the checksums of its files."
    entry = json.loads(json.dumps(data.manifest()["trec"]))
    for part in ("train", "test"):
        path = tmp_path/"www"/entry["commit"]/entry["sources"][part]["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(TREC[entry["sources"][part]["path"]].encode("latin-1"))
        entry["sources"][part]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(dv, "manifest", lambda: data.manifest() | dict(trec=entry))
    return tmp_path/"www"/entry["commit"]

def test_files_of_an_origin_become_rows_without_those_of_the_test_part(server, trec, away):
    folder = dv.fetch("trec", url=server.at + "/{commit}/{path}")
    assert rows(folder, "train") == [dict(text="How far is it ?", label="number", fine="NUM:dist"),
                                     dict(text="Who 's that \xe9 ?", label="human", fine="HUM:ind")]
    assert data.load("trec", "test")["label"][:] == ["location"] and len(server.asked) == 2
    assert dict((r[0], r[3]) for r in dv.table())["trec"] == "fetched"

def test_a_copy_of_the_authors_repository_serves_offline(server, trec, away):
    assert len(rows(dv.fetch("trec", str(trec)), "train")) == 2 and not server.asked
    source = json.loads((away/"sets/trec/FETCHED").read_text(encoding="utf-8"))["train.jsonl.gz"]["source"]
    assert source == str(trec)

def test_a_file_of_another_commit_is_refused(server, trec, away):
    (trec/"data/raw/TREC.test").write_text("NUM:dist Another ?\n", encoding="utf-8")
    with pytest.raises(KitError, match="is not the file of commit d61ded09c99c"): dv.fetch("trec", str(trec))
    with pytest.raises(KitError, match="can't be had"): dv.fetch("trec", url=server.at + "/{commit}/{path}")
    with pytest.raises(KitError, match="--archive names a copy of github.com/harvardnlp"): dv.fetch("trec", "/nope")
    assert left(away/"sets") == []

def test_what_a_source_lacks_is_no_damage(away):
    "sst2's phrases are from elsewhere: a fetched set is whole without them."
    optional = {n for n, m in data.manifest().items() if any("optional" in f for f in m["files"].values())}
    assert optional == {"sst2", "gsm8k"}
    m = data.manifest()["sst2"]
    for f in (f for f in m["files"].values() if "optional" not in f):
        path = away/"sets/sst2"/f["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    sums = {f["file"]: dict(sha256=hashlib.sha256(b"").hexdigest()) for f in m["files"].values()}
    (away/"sets/sst2/FETCHED").write_text(json.dumps(sums), encoding="utf-8")
    assert dv.here(m, away/"sets") == "fetched"
    (away/"sets/sst2"/m["files"]["phrases"]["file"]).write_bytes(b"other")
    assert dv.here(m, away/"sets") == "damaged"

@pytest.mark.parametrize("name", [n for n, m in data.manifest().items() if "sources" in m])
def test_sources_name_a_commit_and_a_checksum(name):
    m = data.manifest()[name]
    assert set(m["sources"]) == {p for p, f in m["files"].items() if "optional" not in f}
    for s in m["sources"].values():
        assert len(s["sha256"]) == 64 and len(s.get("commit", m["commit"])) == 40
        assert dv.url_of(m | s) == (f"https://{s.get('origin', m['origin'])}/raw/{s.get('commit', m['commit'])}/"
                                    f"{s['path']}")
