"What changes a code hash, and what must not."
import json
import pytest
from conftest import ROOT, write_notebook
from slmkit.run.hashes import Library, hashes, hashes_and_parts, walk_from

FILES = dict(__init__="",
    settings='def settings(p, **k): return k[p]\nLIMIT = 3\nOTHER = 4',
    tasks='TASKS = {}\ndef toytask(name):\n    def register(f): TASKS[name] = f; return f\n    return register\n'
          'def task(name): return TASKS[name]()\nWORDS = "a b".split()\n'
          '@toytask("facts")\ndef facts(): return helper()\n@toytask("sorting")\ndef sorting(): return 1\ndef helper(): return WORDS\n'
          'TASKS["extra"] = lambda: 5',
    fit='from lib.tasks import task\nfrom lib import settings as s\nfrom fastcore.basics import patch\n'
        'class Model:\n    size = 1\n    def go(self): return self.deep()\n'
        '@patch\ndef deep(self: Model): return inner()\n@patch\ndef unused(self: Model): return 9\n'
        'def inner(): return 2\ndef fit(name):\n    from lib.late import later\n    from lib import more\n    return task(name), Model().go(), s.LIMIT, later\ndef other(): return 0',
    more="from lib.tasks import toytask\n@toytask('weaving')\ndef weaving(): return 1",
    late="def later(): return 1\ndef never(): return 2",
    extra="from lib.fit import Model\nfrom fastcore.basics import patch\n@patch\ndef plot(self: Model): return 1")
CELLS = ["# prose\nfrom lib.fit import fit\nfrom lib.settings import settings", "import lib.extra",
    'cfg = settings(profile, smoke=dict(data="facts", n=1), cpu=dict(data="facts", n=10))', "#| test\nassert True", "x = fit(data or cfg['data'])",
    "#| plot\nprint('figure')", "claim.record(seed, x=1)", "expect(claim)", "print('after')"]

@pytest.fixture
def code(tmp_path):
    "code(file=(old, new), cells=..., **parameters) -> hash of the cells and what they reach, after a change."
    def of(cells=CELLS, profile="smoke", given=(), **changes):
        folder = tmp_path/f"lib{len(list(tmp_path.iterdir()))}"; folder.mkdir()
        for name, text in FILES.items():
            old, new = changes.get(name, ("", ""))
            assert old in text
            (folder/f"{name}.py").write_text(text.replace(old, new) if old else text)
        return walk_from(write_notebook(folder/"nb.ipynb", *cells), dict(given, profile=profile), Library(folder, "lib"))[0]
    return of

SAME = dict(comment=dict(fit=("def inner(): return 2", "# why\ndef inner():\n    'Doc.'\n    return 2")), neighbour=dict(fit=("return 0", "return 1")),
    constant=dict(settings=("OTHER = 4", "OTHER = 5")), other_task=dict(tasks=("def sorting(): return 1", "def sorting(): return 2")),
    entry=dict(tasks=("lambda: 5", "lambda: 6")), unused_method=dict(fit=("return 9", "return 8")), unused_plot=dict(extra=("return 1", "return 2")),
    late_neighbour=dict(late=("def never(): return 2", "def never(): return 3")))
OTHER = dict(two_away=dict(tasks=("def task(name): return TASKS[name]()", "def task(name): return TASKS[name]() or 1")), constant=dict(settings=("LIMIT = 3", "LIMIT = 4")),
    registered=dict(tasks=("def facts(): return helper()", "def facts(): return 1")), words=dict(tasks=('"a b"', '"a b c"')),
    through_registered=dict(tasks=("def helper(): return WORDS", "def helper(): return 1")), patched=dict(fit=("return inner()", "return 3")),
    through_patched=dict(fit=("def inner(): return 2", "def inner(): return 3")), late_import=dict(late=("def later(): return 1", "def later(): return 3")),
    decorator=dict(tasks=("TASKS[name] = f; return f", "TASKS[name] = f; return None")), in_class=dict(fit=("size = 1", "size = 2")))
@pytest.mark.parametrize("kind", SAME)
def test_does_not_count(kind, code): assert code(**SAME[kind]) == code()
@pytest.mark.parametrize("kind", OTHER)
def test_counts(kind, code): assert code(**OTHER[kind]) != code()

def edited(i, old, new): return [c.replace(old, new) if j == i else c for j, c in enumerate(CELLS)]
def test_cells_that_do_not_count(code):
    for i, old, new in ((0, "# prose", "# other"), (3, "True", "1 < 2"), (5, "figure", "other"), (7, "claim", "c2"), (8, "after", "later"), (2, "n=10", "n=20")):
        assert code(edited(i, old, new)) == code(), CELLS[i]
def test_cells_that_count(code):
    assert code(edited(4, "fit(", "1 + fit(")) != code() and code(edited(2, "n=1", "n=2"), "smoke") != code()
    assert code(edited(2, "n=10", "n=20"), "cpu") != code(profile="cpu")
def test_solution_marks_do_not_count(code):
    plain = ["def f():\n    return 1", *CELLS]
    marked = ["#| export\n#| exercise: points=2\ndef f():\n    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION", *CELLS]
    assert code(plain) == code(marked)
def test_a_task_named_by_a_parameter_is_reached(code):
    sorting = dict(tasks=("def sorting(): return 1", "def sorting(): return 2"))
    assert code(given=dict(data="sorting"), **sorting) != code(given=dict(data="sorting"))
def test_a_task_of_a_module_that_is_imported_inside_a_function_is_reached(code):
    weaving = dict(more=("def weaving(): return 1", "def weaving(): return 2"))
    assert code(given=dict(data="weaving"), **weaving) != code(given=dict(data="weaving"))
    assert code(given=dict(data="facts"), **weaving) == code(given=dict(data="facts"))
def test_changed_default_of_a_knob_counts(tmp_path):
    a, b, c = (write_notebook(tmp_path/f"{i}.ipynb", "1", parameters=f"profile = 'cpu'\nseed = {s}\nrate = {r}") for i, s, r in ((0, 0, .1), (1, 0, .2), (2, 1, .1)))
    assert hashes(a, {})["code"] == hashes(c, {})["code"] != hashes(b, {})["code"]

def test_a_full_stop_is_no_model(tmp_path):
    model = lambda name: hashes(write_notebook(tmp_path/"n.ipynb", f"x = {name!r}"), {})["model"]
    assert model(".") == model("..") == model("no model") != model("lm-1m")

def test_no_import_and_broken_cells(tmp_path):
    "Magics are understood; a cell that is no Python counts by its text."
    one, two = (write_notebook(tmp_path/f"{i}.ipynb", "%time x = 1", f"!ls {i}", "def broken(:" + "x"*i) for i in (1, 2))
    assert hashes(one, {})["code"] != hashes(two, {})["code"]

# ---- model and data

def test_model_folder_and_data_file(tmp_path):
    nb, m, d = write_notebook(tmp_path/"n.ipynb", "1"), tmp_path/"m", tmp_path/"d.jsonl"
    m.mkdir(); (m/"model.safetensors").write_bytes(b"w"); (m/"config.json").write_text("{}"); d.write_text("{}\n")
    of = lambda **k: hashes(nb, dict(model=str(m), data=str(d)) | k)
    first = of()
    assert of() == first and of(columns="input=q")["data"] != first["data"]
    (m/"README.md").write_text("read me"); assert of() == first
    (m/"config.json").write_text('{"a": 1}'); second = of(); assert second["model"] != first["model"] and second["data"] == first["data"]
    d.write_text('{"b": 1}\n'); assert of()["data"] != second["data"] and of()["model"] == second["model"]
def test_hub_id_stands_for_itself(tmp_path):
    nb = write_notebook(tmp_path/"n.ipynb", "1")
    assert hashes(nb, dict(model="a/b")) == hashes(nb, dict(model="a/b")) != hashes(nb, dict(model="a/c"))
def test_given_data_counts_by_its_files(tmp_path, monkeypatch):
    from slmkit.run import hashes as codehash
    if not codehash.manifest(): pytest.skip("no manifest")
    name, m = next(iter(codehash.manifest().items()))
    for f in m["files"].values():
        p = tmp_path/m["folder"]/f["file"]; p.parent.mkdir(parents=True, exist_ok=True); p.write_bytes(b"mine")
    shipped = codehash.data_hash(name)
    monkeypatch.setenv("SLMKIT_DATA", str(tmp_path))
    assert codehash.data_hash(name) != shipped

# ---- the project's own notebooks

def test_flagship_reaches_its_task_and_not_the_others():
    flagship = ROOT/"nbs/distill/step_by_step.ipynb"
    if not flagship.exists(): pytest.skip("no flagship")
    _, parts = hashes_and_parts(flagship, dict(profile="cpu"))
    assert {"slmkit.toyland.registry.entailment", "slmkit.core.fit.fit", "slmkit.core.claims.Claim.record"} <= set(parts)
    assert not {"slmkit.core.claims.Claim.plot", "slmkit.toyland.registry.fact_questions", "slmkit.toyland.registry.word_problems"} & set(parts)
