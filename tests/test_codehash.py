"What changes a code hash, and what must not."
import pytest
from conftest import ROOT, write_notebook
from slmkit.run import hashes as hashing
from slmkit.run.hashes import Library, code_parts, hashes, hashes_and_parts

FILES = dict(
    __init__="",
    settings="def settings(p, **k): return k[p]",
    tasks="TASKS = {}\ndef task(name): return TASKS[name]()\nTASKS['facts'] = lambda: helper()\ndef helper(): return 1",
    fit="from lib.tasks import task\nfrom lib import more\n"
        "def fit(name):\n    from lib.late import later\n    return task(name), later",
    more="from .deep import x",
    late="def later(): return 1",
    other="def other(): return 0",
)
DEEP = dict(__init__="from lib.deep.x import y", x="y = 1")
CELLS = [
    "# prose\nfrom lib.fit import fit\nfrom lib.settings import settings",
    "from lib.run import plan",
    'cfg = settings(profile, smoke=dict(data="facts", n=1), cpu=dict(data="facts", n=10))',
    "#| test\nassert True",
    "x = fit(data or cfg['data'])",
    "#| plot\nprint('figure')",
    "because(claim, 'scale', 'too small')",
    "claim.record(seed, x=1)",
    "expect(claim)",
    "print('after')"]

@pytest.fixture
def code(tmp_path):
    "code(file=(old, new), cells=..., **parameters) -> hashes of the cells and of what they import, after a change."
    def of(cells=CELLS, profile="smoke", given=(), **changes):
        folder = tmp_path/f"lib{len(list(tmp_path.iterdir()))}"
        for sub in ("deep", "run"): (folder/sub).mkdir(parents=True)
        files = FILES | {f"deep/{k}": v for k, v in DEEP.items()} | {"run/__init__": "", "run/plan": "a = 1"}
        for name, text in files.items():
            old, new = changes.get(name.replace("/", "_"), ("", ""))
            assert old in text
            (folder/f"{name}.py").write_text(text.replace(old, new) if old else text, encoding="utf-8")
        return code_parts(
            write_notebook(folder / "nb.ipynb", *cells), dict(given, profile=profile), Library(folder, "lib")
        )[0]
    return of

SAME = dict(
    comment=dict(late=("def later(): return 1", "# why\ndef later():\n    'Doc.'\n    return 1")),
    not_imported=dict(other=("return 0", "return 1")),
    runner=dict(run_plan=("a = 1", "a = 2")))
OTHER = dict(
    direct=dict(fit=("return task(name), later", "return task(name), 1")),
    two_away=dict(tasks=("def task(name): return TASKS[name]()", "def task(name): return TASKS[name]() or 1")),
    registered=dict(tasks=("lambda: helper()", "lambda: 1")),
    late_import=dict(late=("return 1", "return 3")),
    relative=dict(deep_x=("y = 1", "y = 2")),
    package=dict(deep___init__=("from lib.deep.x import y", "y = 3")))

@pytest.mark.parametrize("kind", SAME)
def test_does_not_count(kind, code): assert code(**SAME[kind]) == code()

@pytest.mark.parametrize("kind", OTHER)
def test_counts(kind, code): assert code(**OTHER[kind]) != code()

def edited(i, old, new): return [c.replace(old, new) if j == i else c for j, c in enumerate(CELLS)]

def test_cells_that_do_not_count(code):
    changes = (
        (0, "# prose", "# other"),
        (3, "True", "1 < 2"),
        (5, "figure", "other"),
        (6, "small", "weak"),
        (8, "claim", "c2"),
        (9, "after", "later"),
        (2, "n=10", "n=20"),
    )
    for i, old, new in changes: assert code(edited(i, old, new)) == code(), CELLS[i]

def test_cells_that_count(code):
    assert code(edited(4, "fit(", "1 + fit(")) != code() and code(edited(2, "n=1", "n=2"), "smoke") != code()
    assert code(edited(2, "n=10", "n=20"), "cpu") != code(profile="cpu")

def test_solution_marks_do_not_count(code):
    plain = ["def f():\n    return 1", *CELLS]
    marks = "#| export\n#| exercise: points=2\ndef f():\n    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION"
    assert code(plain) == code([marks, *CELLS])

def test_changed_default_of_a_knob_counts(tmp_path):
    text = "profile = 'cpu'\nseed = {}\nrate = {}"
    a, b, c = (write_notebook(tmp_path/f"{i}.ipynb", "1", parameters=text.format(s, r))
               for i, s, r in ((0, 0, .1), (1, 0, .2), (2, 1, .1)))
    assert hashes(a, {})["code"] == hashes(c, {})["code"] != hashes(b, {})["code"]

def test_a_full_stop_is_no_model(tmp_path):
    model = lambda name: hashes(write_notebook(tmp_path/"n.ipynb", f"x = {name!r}"), {})["model"]
    assert model(".") == model("..") == model("no model") != model("lm-1m")

def test_no_import_and_broken_cells(tmp_path):
    "Magics are understood; a cell that is no Python counts by its text."
    one, two = (
        write_notebook(tmp_path / f"{i}.ipynb", "%time x = 1", f"!ls {i}", "def broken(:" + "x" * i) for i in (1, 2)
    )
    assert hashes(one, {})["code"] != hashes(two, {})["code"]

# ---- model, data and tuning

def test_model_folder_and_data_file(tmp_path):
    nb, m, d = write_notebook(tmp_path/"n.ipynb", "1"), tmp_path/"m", tmp_path/"d.jsonl"
    m.mkdir()
    (m/"model.safetensors").write_bytes(b"w")
    (m/"config.json").write_text("{}", encoding="utf-8")
    d.write_text("{}\n", encoding="utf-8")
    of = lambda **k: hashes(nb, dict(model=str(m), data=str(d)) | k)
    first = of()
    assert of() == first and of(columns="input=q")["data"] != first["data"]
    (m/"README.md").write_text("read me", encoding="utf-8")
    assert of() == first
    (m/"config.json").write_text('{"a": 1}', encoding="utf-8")
    second = of()
    assert second["model"] != first["model"] and second["data"] == first["data"]
    d.write_text('{"b": 1}\n', encoding="utf-8")
    assert of()["data"] != second["data"] and of()["model"] == second["model"]

def test_hub_id_stands_for_itself(tmp_path):
    nb = write_notebook(tmp_path/"n.ipynb", "1")
    assert hashes(nb, dict(model="a/b")) == hashes(nb, dict(model="a/b")) != hashes(nb, dict(model="a/c"))

def test_given_data_counts_by_its_files(tmp_path, monkeypatch):
    name, m = next(iter(hashing.manifest().items()))
    for f in m["files"].values():
        p = tmp_path/m["folder"]/f["file"]
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_bytes(b"mine")
    shipped = hashing.data_hash(name)
    monkeypatch.setenv("SLMKIT_DATA", str(tmp_path))
    assert hashing.data_hash(name) != shipped

def test_the_tuning_file_of_this_model_and_data_counts(tmp_path, monkeypatch):
    (tmp_path/"tuning").mkdir()
    (tmp_path/"data").mkdir()
    (tmp_path/"data/sets.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(hashing, "package_folder", lambda: tmp_path)
    nb = write_notebook(tmp_path/"idea_repro_long.ipynb", "1")
    of = lambda: hashes_and_parts(nb, dict(model="m", data="d"), Library(tmp_path, "lib"))[0]
    first = of()
    (tmp_path/"tuning/idea-long.m.e.json").write_text("{}", encoding="utf-8")
    assert of() == first
    (tmp_path/"tuning/idea-long.m.d.json").write_text("{}", encoding="utf-8")
    assert of()["code"] != first["code"] and of()["model"] == first["model"]

# ---- the project's own notebooks

def test_flagship_s_closure():
    _, parts = hashes_and_parts(ROOT/"nbs/distill/step_by_step_repro.ipynb", dict(profile="cpu"))
    assert {"slmkit.toyland.tasks.stories", "slmkit.core.fit"} <= set(parts)
    rooms = {p.split(".")[1] for p in parts if p.startswith("slmkit.")}
    assert not rooms & {"run", "verdicts", "cli", "site", "lab", "project", "reason"}
    assert not {"slmkit.core.figures", "slmkit.core.claims", "slmkit.core.judge"} & set(parts)
