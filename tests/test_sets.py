"The manifest of real sets, against the files where SLMKIT_DATA has them, and how their rows become columns."
import gzip, hashlib, json, os, re
from pathlib import Path
import pytest
from slmkit.core import rows, sets
from slmkit.core.data import load
from slmkit.core.score import METRICS
from slmkit.core.sets import fixed_part, manifest
from slmkit.core.settings import KitError, package_folder
from slmkit.project.datasets import here
from slmkit.toyland.tasks import TASKS

REAL = os.environ.get("SLMKIT_DATA")
real = pytest.mark.skipif(not REAL, reason="SLMKIT_DATA is not set")
ASKED = ["sst2", "trec", "ag-news", "rte", "banking77", "commonsenseqa", "strategyqa", "multiarith", "addsub", "svamp",
         "gsm8k", "last-letters", "coin-flip", "xquad-en", "nq-open-oracle"]

@pytest.fixture(autouse=True)
def said_anew(): rows.say_once.cache_clear()

def parts(m): return ["train", "test"] if "divided" in m else [s for s in ("train", "valid", "test") if s in m["files"]]

@pytest.fixture
def made_up(tmp_path, monkeypatch):
    "Put made-up rows where the file of a set would be."
    monkeypatch.setenv("SLMKIT_DATA", str(tmp_path))
    def make(name, part, found):
        m = manifest()[name]
        (tmp_path/m["folder"]).mkdir(exist_ok=True)
        (tmp_path/m["folder"]/"FETCHED").touch()
        text = "\n".join(map(json.dumps, found))
        (tmp_path/m["folder"]/m["files"][part]["file"]).write_bytes(gzip.compress(text.encode("utf-8")))
    return make

# ---- what the manifest says

@pytest.mark.parametrize("name", manifest())
def test_an_entry_says_where_it_is_from_and_what_is_in_it(name):
    m = manifest()[name]
    github = m["origin"].startswith("github.com/")
    assert re.fullmatch(r"[0-9a-f]{40}" if github else r"\d+(\.\d+)+", m["commit"])
    assert github or m["origin"].startswith("PyPI ")
    assert all(m[k] for k in ("folder", "title", "licence", "metric", "files"))
    for f in m["files"].values():
        assert len(f["sha256"]) == 64 and f["rows"] > 0 and f["fields"] and f["file"].endswith(".jsonl.gz")
    assert m["metric"] in METRICS or not m["columns"] or "text" in m["columns"]
    assert name not in TASKS

def test_55_sets_stand_in_it_and_those_that_pages_use_can_be_read():
    assert len({m["folder"] for m in manifest().values()}) == 55
    assert all(manifest()[n]["columns"] for n in [*ASKED, "wikitext2"])
    assert {n for n, m in manifest().items() if m.get("noncommercial")} == {"ag-news", "alpaca-100", "anli1"}

@pytest.mark.parametrize("name", [n for n, m in manifest().items() if m["columns"]])
def test_the_columns_are_fields_of_the_files(name):
    m = manifest()[name]
    made = {"passage"} if "passages" in m else set()
    for s in parts(m):
        fields = set(m["files"]["all" if "divided" in m else s]["fields"]) | made
        if m.get("prepare") == "first_answer": fields |= {"answer"}
        assert {c for cols in m["columns"].values() for c in cols} - fields == set()

def test_no_row_of_a_set_is_in_the_project():
    here_ = {p.name for p in package_folder().rglob("*.jsonl.gz")}
    assert not here_ & {f["file"] for m in manifest().values() for f in m["files"].values()}

# ---- against the files

@real
@pytest.mark.parametrize("name", manifest())
def test_files_are_those_of_the_manifest(name):
    m = manifest()[name]
    if not Path(REAL, m["folder"]).is_dir(): pytest.skip(f"{name} is not there")
    assert here(m, REAL) == "here"
    for f in m["files"].values():
        found = rows.read_rows(Path(REAL, m["folder"], f["file"]))
        assert len(found) == f["rows"] and set(found[0]) == set(f["fields"])

@real
@pytest.mark.parametrize("name", [n for n, m in manifest().items() if m["columns"]])
def test_a_set_is_read_by_name(name):
    m = manifest()[name]
    if not Path(REAL, m["folder"]).is_dir(): pytest.skip(f"{name} is not there")
    found = {s: load(name, s) for s in parts(m)}
    for s, ds in found.items():
        assert len(ds) and all(x.strip() for x in ds["text" if "text" in m["columns"] else "input"])
        if "choices" in ds.column_names: assert all(r["label"] in r["choices"] for r in ds)
    ids = [i for s in found for i in found[s]["id"]]
    if name not in ("cqa", "bigbench-tasks"): assert len(ids) == len(set(ids))
    if "input" in m["columns"] and "train" in found and name != "clinc150":
        assert not set(found["train"]["input"]) & set(found["test"]["input"])
    assert load(name, "test" if "test" in found else "valid", 5, 1)["id"][:] == \
           load(name, "test" if "test" in found else "valid", 5, 1)["id"][:]

@real
def test_the_first_rows_of_some_sets():
    first = lambda name, split="test": load(name, split)[0]
    assert first("sst2")["choices"] == ["negative", "positive"]
    assert first("trec")["label"] == "number" and "person" in first("trec")["choices"]
    assert set(load("ag-news", "test")["label"]) == {"world", "sports", "business", "technology"}
    assert first("rte")["input"].startswith("premise: ") and "\nhypothesis: " in first("rte")["input"]
    assert first("banking77")["label"] == "card arrival" and len(set(load("banking77-10")["label"])) == 10
    assert first("multiarith")["label"] == "8"
    assert "0.5" in load("addsub", "test")["label"][:] + load("addsub")["label"][:]
    assert first("gsm8k")["label"] == "18" and "<<" not in first("gsm8k")["rationale"]
    assert first("nq-open-oracle")["answers"] == ["Wilhelm Conrad Röntgen"]
    assert "\nquestion: How many points did" in first("xquad-en")["input"]

@real
def test_the_windows_of_a_text_give_the_text_back():
    source = rows.read_rows(sets.set_file("wikitext2", "test"))
    found = load("wikitext2", "test")
    assert "".join(found["text"]) == "".join(r["text"] for r in source)
    assert max(len(t.split()) for t in found["text"]) == sets.WORDS and found.column_names == ["id", "text"]

# ---- with made-up rows

def test_where_there_is_no_train_part_rows_are_divided_once_and_it_is_said(made_up, capsys):
    made_up("multiarith", "all", [dict(id=i, question=f"{i} and 1 ?", answer=i + 1.) for i in range(400)])
    train, test = load("multiarith", "train"), load("multiarith", "test")
    assert len(train) + len(test) == 400 and 70 < len(train) < 130 and not set(train["input"]) & set(test["input"])
    assert {fixed_part(q) for q in train["input"]} == {"train"} and train["label"][0] == str(int(train["id"][0]) + 1)
    assert capsys.readouterr().out == ("data multiarith has no train part of its own: one row in four is train, "
                                       "by a checksum of its question\n")
    with pytest.raises(KitError, match="no split 'valid': there is train, test"): load("multiarith", "valid")

def test_the_division_is_the_same_everywhere():
    assert [i for i in range(12) if fixed_part(f"{i} ?") == "train"] == [0, 2, 3, 9, 10]

def test_a_non_commercial_licence_is_said_once(made_up, capsys):
    made_up("ag-news", "train", [dict(text="Oil is up .", label="Business")])
    assert load("ag-news")["label"][:] == load("ag-news")["label"][:] == ["business"]
    assert capsys.readouterr().out == "data ag-news is not for commercial use (non-commercial research)\n"

def test_questions_about_one_passage_stay_together(made_up):
    made_up("xquad-en", "contexts", [dict(id=i, text=f"Text {i} .") for i in range(40)])
    made_up("xquad-en", "all", [dict(id=f"{i}-{j}", context_id=i, question=f"{j} ?", answer="a", answer_start=0)
                                for i in range(40) for j in range(3)])
    passages = [{t.split("\n")[0] for t in load("xquad-en", s)["input"]} for s in ("train", "test")]
    assert all(passages) and not passages[0] & passages[1] and sum(map(len, passages)) == 40

def test_a_file_that_is_not_the_manifests_is_refused(made_up, tmp_path):
    made_up("trec", "train", [dict(text="who ?", label="human", fine="x")])
    assert load("trec")["label"][:] == ["person"]
    (tmp_path/"trec/FETCHED").unlink()
    with pytest.raises(KitError, match="is not the file of the manifest"): load("trec")

def test_a_set_without_one_input_and_label_says_how_it_is_read(made_up):
    with pytest.raises(KitError, match=r"read_rows\(set_file\('wnut17', '"): load("wnut17")

@pytest.mark.parametrize("name, words", [("trec", "slmkit data fetch trec"), ("bbh", "put the file there, from git")])
def test_a_missing_file_says_what_helps(tmp_path, monkeypatch, name, words):
    for folder in (None, tmp_path):
        if folder: monkeypatch.setenv("SLMKIT_DATA", str(folder))
        else: monkeypatch.delenv("SLMKIT_DATA", raising=False)
        with pytest.raises(KitError, match=words) as e: load(name, "test")
        assert f"{name}/test.jsonl.gz" in str(e.value) and "\n" not in str(e.value)
