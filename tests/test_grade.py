"Grading: functions by name wherever they stand, partial credit, comparison, results, and the hidden cases' secrecy."
import csv, io, json, sys
from pathlib import Path
import pytest
if sys.platform != "linux": pytest.skip("grading strangers' code needs Linux", allow_module_level=True)
import numpy as np, torch
from slmkit.core.settings import KitError
from slmkit.lab import results
from slmkit.lab import values as answers
from slmkit.lab import student
from slmkit.lab import grade
from slmkit.lab import sandbox
from slmkit.lab import lab as labs
from slmkit.lab.values import pack

HERE = Path(__file__).parent / "fixtures"
LAB = labs.read(HERE / "lab_small.ipynb")

@pytest.fixture(scope="module")
def nursery():
    with sandbox.Nursery(grade.imports_of([LAB])) as n: yield n

@pytest.fixture(scope="module")
def built(tmp_path_factory): return labs.build(LAB, tmp_path_factory.mktemp("lab"), run=False)

def solved(built, *names):
    "The student's notebook with the named exercises solved, as a student would: typing into the stub's cell."
    nb = json.loads(built["student"].read_text())
    for c in nb["cells"]:
        source = "".join(c["source"])
        for e in LAB.exercises:
            if e.name in names and source == labs.stub(e): c["source"] = labs.fill(e, None)
    return nb

def points(nursery, nb, seed="rain"):
    r = grade.grade_bytes(nursery, LAB, grade.all_cases(LAB, seed), json.dumps(nb).encode() if isinstance(nb, dict) else nb)
    return {x["function"]: x["points"] for x in r["exercises"]}

def test_each_exercise_stands_alone(nursery, built):
    assert points(nursery, solved(built)) == dict(soften=0, distill_loss=0, Head=0, reorder=0)
    assert points(nursery, solved(built, "distill_loss")) == dict(soften=0, distill_loss=3, Head=0, reorder=0)
    assert points(nursery, solved(built, "soften", "distill_loss", "Head")) == dict(soften=2, distill_loss=3, Head=1, reorder=0)

def test_cells_reordered_metadata_stripped_helper_added(nursery, built):
    nb = solved(built, "soften", "distill_loss", "Head")
    for c in nb["cells"]:
        c["source"] = "".join(c["source"]).replace("z = np.exp(z - z.max(-1, keepdims=True))", "z = shifted_exp(z)")
    helper = dict(cell_type="code", source="SHIFT = 1.5\ndef shifted_exp(z): return np.exp(z - z.max(-1, keepdims=True) + SHIFT)")
    cells = [dict(cell_type=c["cell_type"], source=c["source"]) for c in reversed(nb["cells"])] + [helper]
    assert points(nursery, dict(cells=cells)) == dict(soften=2, distill_loss=3, Head=1, reorder=0)

def test_only_definitions_run(nursery, built):
    nb = solved(built, "soften", "distill_loss", "Head")
    bad = ["raise SystemExit", "while True: pass", "soften = 3 if True else 4", "print(1/0)", "%%bash\nexit 1", "def broken(:"]
    nb["cells"] = [dict(cell_type="code", source=s) for s in bad[:3]] + nb["cells"] + [dict(cell_type="code", source=s) for s in bad[3:]]
    assert points(nursery, nb) == dict(soften=2, distill_loss=3, Head=1, reorder=0)

def test_partial_credit(nursery):
    lab = labs.read(HERE / "lab_attack.ipynb"); e = lab.exercises[0]; e.cases = 4
    drawn = grade.all_cases(lab, "s")
    sizes = sorted(c["want"] for c in drawn["code_lines"])
    code = f"def code_lines(source):\n    n = len(source.splitlines())\n    return n if n <= {sizes[0]} else -n"
    [r] = grade.grade_bytes(nursery, lab, drawn, json.dumps(dict(cells=[dict(cell_type="code", source=code)])).encode())["exercises"]
    assert (r["right"], r["cases"], r["points"]) == (1, 4, .5) and r["first_wrong"]["got"].startswith("-")

def test_same_seed_same_cases_other_seed_others():
    a, b, c = (json.dumps(grade.all_cases(LAB, s), default=lambda f: None) for s in ("one", "one", "two"))
    assert a == b and a != c

def test_seed_is_nowhere_in_results(nursery, built, tmp_path):
    paths = [tmp_path / "a.ipynb", tmp_path / "b.ipynb"]
    for p in paths: p.write_text(json.dumps(solved(built, "Head")))
    results.save(grade.grade(paths, LAB, "very-private-seed", nursery), paths, LAB, tmp_path / "out")
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert len(files) == 6 and not any("very-private-seed" in p.read_text() for p in files)

def test_ten_submissions_in_one_call(nursery, built, tmp_path):
    names = {"full": solved(built, "soften", "distill_loss", "Head"), "none": solved(built), "one": solved(built, "soften")}
    texts = {k: json.dumps(v) for k, v in names.items()} | {"broken": "{", "empty": "", "list": "[]"}
    texts |= {f"full {i}": json.dumps(names["full"]) for i in range(3)}
    paths = []
    for name, text in texts.items(): paths.append(tmp_path / f"{name}.ipynb"); paths[-1].write_text(text)
    paths.append(tmp_path / "gone.ipynb")
    done = results.save(grade.grade(paths, LAB, "rain", nursery), paths, LAB, tmp_path / "out")
    assert [r["points"] for r in done] == [6, 0, 2, 0, 0, 0, 6, 6, 6, 0]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out/grades.csv").read_text())))
    assert [r["Student"] for r in rows] == [*texts, "gone"] and [float(r[LAB.technique]) for r in rows] == [r["points"] for r in done]
    page = (tmp_path / "out/pages/none.html").read_text()
    assert "not written yet" in page and "divide by the temperature first" in page and "0 of 7 points" in page
    assert json.loads((tmp_path / "out/json/one.json").read_text())["points"] == 2

def test_page_shows_expected_and_got(nursery):
    code = "import numpy as np\ndef soften(logits, temperature=2):\n    print('<i>', logits.shape)\n    return np.ones(3)"
    raw = json.dumps(dict(cells=[dict(cell_type="code", source=code)])).encode()
    r = grade.grade_bytes(nursery, LAB, grade.all_cases(LAB, "rain"), raw, only=["soften"])
    html = results.page(r | dict(student="<b>", title="t"))
    assert "shape (3, 5) is expected, not (3,)" in html and "[1. 1. 1.]" in html and "&lt;i&gt; (3, 5)" in html and "<b>" not in html.split("<h1>")[1].split("</div>")[0]

def test_exercise_built_on_an_empty_one_is_still_graded(nursery, tmp_path):
    nb = json.loads((HERE / "lab_small.ipynb").read_text())
    for c in nb["cells"]:
        source = "".join(c["source"])
        if "p = torch.softmax(teacher_logits" in source:
            c["source"] = source.replace("torch.softmax(teacher_logits / temperature, -1)", "torch.tensor(soften(teacher_logits.numpy(), temperature))")
    path = tmp_path / "01_x.ipynb"; path.write_text(json.dumps(nb))
    lab = labs.read(path)
    code = [labs.stub(lab["soften"]), labs.fill(lab["distill_loss"], None)]
    raw = json.dumps(dict(cells=[dict(cell_type="code", source=s) for s in code])).encode()
    r = grade.grade_bytes(nursery, lab, grade.all_cases(lab, "rain"), raw)
    assert {x["function"]: x["points"] for x in r["exercises"]} == dict(soften=0, distill_loss=3, Head=0, reorder=0)

def test_result_does_not_depend_on_neighbours_or_order(nursery, built, tmp_path):
    paths = []
    for i, names in enumerate([("soften",), (), ("Head",), ("soften", "Head")]):
        paths.append(tmp_path / f"s{i}.ipynb"); paths[-1].write_text(json.dumps(solved(built, *names)))
    there = [r["points"] for r in grade.grade(paths, LAB, "rain", nursery, jobs=2)]
    back = [r["points"] for r in grade.grade(paths[::-1], LAB, "rain", nursery, jobs=1)]
    assert there == back[::-1] == [2, 0, 1, 3]

ANY_ORDER = "def reorder(items): return items[-1:] + items[:-1]"
CHEATS = ["def sorted(x): return 0\ndef any(x): return False\ndef reorder(items): return ['x']",
          "import builtins\ndef reorder(items):\n    builtins.sorted = lambda x: 0\n    builtins.any = lambda x: False\n    return ['x']",
          "class L(list):\n    def __eq__(self, o): return True\n    def __iter__(self): return iter('abc')\ndef reorder(items): return L(items)",
          "import sys\ndef reorder(items):\n    f = sys._getframe(1)\n    while f: f.f_globals['sorted'] = lambda x: 0; f = f.f_back\n    return ['x']"]

@pytest.mark.parametrize("source,wanted", [(ANY_ORDER, 1), *((c, 0) for c in CHEATS)])
def test_a_check_is_judged_in_the_parent(nursery, source, wanted):
    raw = json.dumps(dict(cells=[dict(cell_type="code", source=source)])).encode()
    r = grade.grade_bytes(nursery, LAB, grade.all_cases(LAB, "rain"), raw, only=["reorder"])
    assert r["points"] == wanted, r

# ---- comparing

@pytest.mark.parametrize("want,got", [
    (1.0, 1), (1, 1.0), (np.float64(1), torch.tensor(1.)), ([1., 2.], np.array([1, 2])), ((1, 2), [1, 2]), (float("nan"), np.nan),
    (np.ones(3, "float32"), np.ones(3) + 5e-5), (np.ones(2), torch.ones(2) + 5e-5), (torch.ones(2, dtype=torch.bfloat16), np.full(2, 1.01)),
    ({"a": 1, "b": [np.ones(2)]}, {"b": [torch.ones(2)], "a": 1}), ("x", "x"), (None, None), ({1, 2}, {2, 1}), (np.array([]), []),
    ([[1, 2], [3, 4]], torch.tensor([[1, 2], [3, 4]])), ((np.ones(2), "a"), [torch.ones(2), "a"]), ([], ())])
def test_equal(want, got): assert answers.compare(pack(want), pack(got)) is None

@pytest.mark.parametrize("want,got", [
    (1.0, 1.001), (1, 2), (True, False), ("x", "y"), ("1", 1), (None, 0), (0, None), (np.ones(3), np.ones((3, 1))), (np.ones(1), 1.0),
    (np.ones(3), np.ones(3) + 5e-5), (np.ones(3), np.full(3, 1.001, "float16")), ([1, 2], [1, 2, 3]), ({"a": 1}, {"b": 1}), ({"a": 1}, [1]),
    (np.array([np.nan, 1]), np.array([1, 1])), (float("inf"), 1e308), ([1, "a"], [1, 2]), ({1}, {2}), (np.ones(2, int), np.array([1, 2]))])
def test_different(want, got): assert answers.compare(pack(want), pack(got))

@pytest.mark.parametrize("got", [{}, {"array": ""}, {"array": "!", "raw": "<f8", "dtype": "float64", "shape": [1]}, {"tuple": 3}, {"dict": [1]}, {"x": 1},
    {"tensor": "AAAA", "raw": "|O", "dtype": "object", "shape": []}, {"array": "", "raw": "<f8", "dtype": "float64", "shape": [10**15]}, [[[]]], 10**400])
def test_nonsense_from_a_child_is_a_wrong_answer(got):
    for want in (1.0, "x", None, pack(np.ones(2)), [1, 2], pack({"a": 1})):
        v = grade.verdict(dict(want=want, given=1), dict(value=got))
        assert v["right"] is False and v["problem"]
    assert grade.verdict(dict(want=1, given=1), got)["right"] is False

# ---- finding files, labs, people

def test_lab_is_found_by_its_functions_not_by_metadata(tmp_path):
    other = labs.read(HERE / "lab_attack.ipynb")
    p = tmp_path / "a.ipynb"; p.write_text(json.dumps(dict(metadata=dict(slmkit=dict(lab=other.technique)), cells=[dict(cell_type="code", source="def soften(x): 0")])))
    assert results.which_lab([p], [other, LAB]) is LAB
    p.write_text("{}")
    with pytest.raises(KitError, match="--lab"): results.which_lab([p], [other, LAB])

def test_no_submission_is_told(tmp_path):
    with pytest.raises(KitError, match="no such file"): results.submissions([tmp_path / "x"])
    with pytest.raises(KitError, match="no notebook"): results.submissions([tmp_path])

def test_same_file_names_in_folders_stay_apart(tmp_path):
    files = [tmp_path / s / "lab.ipynb" for s in ("ada", "bob", "Ada")]
    assert len({w["key"].lower() for w in results.people(files)}) == 3

def test_magics_anywhere_do_not_hide_a_function():
    cell = "%load_ext autoreload\n!pip list\nx = 1\nx?\ndef f(a):\n    return a % 2\n"
    found, notes = student.definitions([cell, "%%writefile f.py\ndef g(): pass", "%%time\ndef h(): pass"])
    assert [getattr(n, "name", "x") for _, n in found] == ["x", "f", "h"] and not notes
