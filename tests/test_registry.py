"The registry of works: what it holds, how it is made, and who serves a work where there are no notebooks."
import json, re
import pytest
from conftest import ROOT
from slmkit.cli.main import main
from slmkit.core.settings import KitError
from slmkit.project import registry as kit

SHIPPED = ROOT/"slmkit/registry.json"
WORKS = json.loads(SHIPPED.read_text(encoding="utf-8"))
BY_SLUG = {w["slug"]: w for w in WORKS}

def lines(path, *objects):
    path.write_text("\n".join(map(json.dumps, objects)), encoding="utf-8")
    return path

def said(capsys, *argv):
    "Exit code, stdout, stderr of a command."
    with pytest.raises(SystemExit) as e: main(list(argv))
    out = capsys.readouterr()
    return e.value.code, out.out.strip(), out.err.strip()

# ---- what ships

def test_works_alone_are_kept():
    "Which notebook serves a work is no part of the file: no branch that adds a notebook changes it."
    assert len(WORKS) == 369 == len(BY_SLUG) and not any("claims" in w for w in WORKS)

def test_every_work_but_one_has_its_citation():
    lacking = [w["slug"] for w in WORKS if not w["authors"]]
    assert lacking == ["visual-ai-steerability"] and not BY_SLUG[lacking[0]]["citation"]
    for w in (w for w in WORKS if w["slug"] not in lacking):
        assert w["citation"]["source"] == "search" and w["authors"] and 2015 <= w["year"] <= 2026, w["slug"]
        assert re.fullmatch(r"\d{4}\.\d{4,5}", w["arxiv"]), w["slug"]

def test_code_is_a_repository_and_says_how_it_was_tied_to_the_work():
    coded = [w for w in WORKS if w["code"]]
    assert len(coded) == 237 and all(re.fullmatch(r"[\w.-]+/[\w.-]+", w["code"]) for w in coded)
    checks = {w["citation"].get("code_check") for w in WORKS}
    assert checks == {None, "linked", "exists", "memory"}
    memory = [w for w in WORKS if w["citation"].get("code_check") == "memory"]
    assert memory and all("code" in w["citation"]["from_memory"] for w in memory)

def test_one_work_a_line():
    text = SHIPPED.read_text(encoding="utf-8").splitlines()
    assert text[0] == "[" and text[-1] == "]" and len(text) == len(WORKS) + 2
    assert [json.loads(l.rstrip(",")) for l in text[1:-1]] == WORKS

# ---- making it

WORK = dict(slug="two-losses", title="Two Losses", folder="distill", family="distill-logits", kind="method", tier="A")
CITED = dict(slug="two-losses", authors=["Gauss"], more=False, year=2024, arxiv="2401.00001", venue=None, code=None,
             source="search", from_memory=["authors"])

def test_works_and_citations_become_one_file(tmp_path):
    works, cited, path = lines(tmp_path/"w.jsonl", WORK), lines(tmp_path/"c.jsonl", CITED), tmp_path/"r.json"
    assert kit.import_works(works, path, cited) == path and kit.import_works(works, path, cited) is None
    [made] = json.loads(path.read_text(encoding="utf-8"))
    assert made["authors"] == ["Gauss"] and made["citation"] == dict(source="search", from_memory=["authors"])
    assert kit.reference(made) == ("Gauss (2024), https://arxiv.org/abs/2401.00001 "
                                   "(authors from memory, unchecked)")

@pytest.mark.parametrize("cited, words", [
    ([CITED | dict(slug="two-loses")], "no work 'two-loses'"),
    ([CITED, CITED], "'two-losses' stands twice"),
    (["{"], "not a JSON object"),
])
def test_bad_citations_are_one_line_and_write_nothing(tmp_path, cited, words):
    works, path = lines(tmp_path/"w.jsonl", WORK), tmp_path/"r.json"
    (tmp_path/"c.jsonl").write_text("\n".join(c if isinstance(c, str) else json.dumps(c) for c in cited),
        encoding="utf-8")
    with pytest.raises(KitError, match=words) as e: kit.import_works(works, path, tmp_path/"c.jsonl")
    assert "\n" not in str(e.value) and not path.exists()

def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(KitError, match="can't be read"): kit.import_works(tmp_path/"none.jsonl", tmp_path/"r.json")

# ---- who serves a work

def test_without_notebooks_the_ledger_says_it(tmp_path, monkeypatch):
    "An installed package serves what a clone does, as far as it was measured."
    clone = {w["slug"] for w in kit.registry(ROOT) if w["claims"]}
    monkeypatch.chdir(tmp_path)
    installed = kit.registry()
    assert {w["slug"] for w in installed if w["claims"]} <= clone and len(installed) == len(WORKS)
    [flagship] = [w for w in installed if w["slug"] == "distilling-step-by-step"]
    ties = {(c["technique"], c["claim"]) for c in flagship["claims"]}
    assert ("distill/step_by_step", "rationales-help") in ties
    names = {"nbs/distill/step_by_step.ipynb", "nbs/distill/step_by_step_repro_sizes.ipynb"}
    assert {c["notebook"] for c in flagship["claims"]} <= names

def test_field_shows_who_wrote_a_work_and_where_its_code_is(capsys):
    code, out, _ = said(capsys, "field", "distilling-step-by-step")
    assert code == 0 and "Hsieh, Li" in out and "(2023)" in out and "https://arxiv.org/abs/2305.02301" in out
    assert "https://github.com/google-research/distilling-step-by-step" in out

def test_field_imports_and_filters(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(kit, "registry_path", lambda root=None: tmp_path/"r.json")
    works, cited = lines(tmp_path/"w.jsonl", WORK), lines(tmp_path/"c.jsonl", CITED)
    code, out, err = said(capsys, "field", "--import", str(works), "--citations", str(cited))
    assert code == 0 and out == f"registry: {tmp_path/'r.json'}", err
    assert said(capsys, "field", "--import", str(works), "--citations", str(cited))[1] == "registry: unchanged"
    code, _, err = said(capsys, "field", "--citations", str(cited))
    assert code == 2 and "goes with --import" in err and "\n" not in err

def test_authors_are_searched(capsys):
    found = json.loads(said(capsys, "field", "hsieh", "--family", "distill", "--json")[1])
    assert "distilling-step-by-step" in [w["slug"] for w in found]
