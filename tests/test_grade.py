"Grading: functions by name wherever they stand, partial credit, comparison, results, and the hidden cases' secrecy."
import csv, io, json, os, subprocess, sys
from pathlib import Path
import pytest
if sys.platform != "linux": pytest.skip("grading strangers' code needs Linux", allow_module_level=True)
import numpy as np, torch
from slmkit.core.settings import KitError
from slmkit.lab import build as building
from slmkit.lab import grade, results, sandbox, student, submissions, values
from slmkit.lab import lab as labs
from slmkit.lab.values import pack

ROOT, HERE = Path(__file__).parents[1], Path(__file__).parent / "fixtures"
LAB, EASY = labs.read(HERE / "lab_small.ipynb"), labs.read(HERE / "lab_attack.ipynb")

@pytest.fixture(scope="module")
def box():
    with sandbox.Sandbox(grade.imports_of([LAB])) as s: yield s

@pytest.fixture(scope="module")
def built(tmp_path_factory): return building.build(LAB, tmp_path_factory.mktemp("lab"), run=False)

def cells(*sources): return dict(cells=[dict(cell_type="code", source=s) for s in sources])

def write(path, nb):
    path.write_text(json.dumps(nb), encoding="utf-8")
    return path

def who(paths): return submissions.people([(p.as_posix(), p) for p in paths])

def solved(built, *names):
    "The student's notebook with the named exercises solved, as a student would: typing into the stub's cell."
    nb = json.loads(built["student"].read_text(encoding="utf-8"))
    answers = {labs.stub(LAB[n]): labs.fill(LAB[n]) for n in names}
    for c in nb["cells"]: c["source"] = answers.get("".join(c["source"]), c["source"])
    return nb

def graded(box, *sources, lab=LAB, **options):
    "The result of a notebook of these cells."
    return grade.grade_bytes(box, lab, grade.all_cases(lab, "rain"), json.dumps(cells(*sources)).encode(), **options)

def points(box, nb):
    r = grade.grade_bytes(box, LAB, grade.all_cases(LAB, "rain"), json.dumps(nb).encode())
    return {x["function"]: x["points"] for x in r["exercises"]}

def test_each_exercise_stands_alone(box, built):
    assert points(box, solved(built)) == dict(soften=0, distill_loss=0, Head=0, reorder=0)
    assert points(box, solved(built, "distill_loss")) == dict(soften=0, distill_loss=3, Head=0, reorder=0)
    three = solved(built, "soften", "distill_loss", "Head")
    assert points(box, three) == dict(soften=2, distill_loss=3, Head=1, reorder=0)

def test_cells_reordered_metadata_stripped_helper_added(box, built):
    nb = solved(built, "soften", "distill_loss", "Head")
    for c in nb["cells"]:
        c["source"] = "".join(c["source"]).replace("z = np.exp(z - z.max(-1, keepdims=True))", "z = shifted_exp(z)")
    helper = "SHIFT = 1.5\ndef shifted_exp(z): return np.exp(z - z.max(-1, keepdims=True) + SHIFT)"
    bare = [dict(cell_type=c["cell_type"], source=c["source"]) for c in reversed(nb["cells"])]
    assert any("shifted_exp" in c["source"] for c in bare)
    assert points(box, dict(cells=bare + cells(helper)["cells"])) == dict(soften=2, distill_loss=3, Head=1, reorder=0)

def test_only_definitions_run(box, built):
    nb = solved(built, "soften", "distill_loss", "Head")
    before = cells("raise SystemExit", "while True: pass", "soften = 3 if True else 4")["cells"]
    after = cells("print(1/0)", "%%bash\nexit 1", "def broken(:")["cells"]
    nb["cells"] = before + nb["cells"] + after
    assert points(box, nb) == dict(soften=2, distill_loss=3, Head=1, reorder=0)

def test_partial_credit(box):
    lab = labs.read(HERE / "lab_attack.ipynb")
    lab.exercises[0].cases = 4
    sizes = sorted(c["want"] for c in grade.all_cases(lab, "rain")["code_lines"])
    code = f"def code_lines(source):\n    n = len(source.splitlines())\n    return n if n <= {sizes[0]} else -n"
    [r] = graded(box, code, lab=lab)["exercises"]
    assert (r["right"], r["cases"], r["points"]) == (1, 4, .5) and r["first_wrong"]["got"].startswith("-")

def test_same_seed_same_cases_other_seed_others():
    a, b, c = (json.dumps(grade.all_cases(LAB, s), default=lambda f: None) for s in ("one", "one", "two"))
    assert a == b and a != c

def test_seed_is_nowhere_in_results(box, built, tmp_path):
    paths = [write(tmp_path / f"{n}.ipynb", solved(built, "Head")) for n in "ab"]
    results.save(grade.grade(paths, LAB, "very-private-seed", box), who(paths), LAB, tmp_path / "out")
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert len(files) == 8 and not any("very-private-seed" in p.read_text(encoding="utf-8") for p in files)

def test_ten_submissions_in_one_call(box, built, tmp_path):
    full, none, one = (solved(built, *n) for n in (("soften", "distill_loss", "Head"), (), ("soften",)))
    texts = dict(full=json.dumps(full), none=json.dumps(none), one=json.dumps(one), broken="{", empty="", list="[]")
    texts |= {f"full {i}": json.dumps(full) for i in range(3)}
    paths = [tmp_path / f"{name}.ipynb" for name in [*texts, "gone"]]
    for p, text in zip(paths, texts.values()): p.write_text(text, encoding="utf-8")
    done = results.save(grade.grade(paths, LAB, "rain", box), who(paths), LAB, tmp_path / "out")
    assert [r["points"] for r in done] == [6, 0, 2, 0, 0, 0, 6, 6, 6, 0]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out/grades.csv").read_text(encoding="utf-8-sig"))))
    assert [r["Student"] for r in rows] == [*texts, "gone"]
    assert [float(r[LAB.technique]) for r in rows] == [r["points"] for r in done]
    page = (tmp_path / "out/pages/none.html").read_text(encoding="utf-8")
    for said in ("not written yet", "divide by the temperature first", "0 of 7 points"): assert said in page
    assert json.loads((tmp_path / "out/json/one.json").read_text(encoding="utf-8"))["points"] == 2

def test_page_shows_expected_and_got(box):
    code = ("import numpy as np\ndef soften(logits, temperature=2):\n"
            "    print('<i>', logits.shape)\n    return np.ones(3)")
    html = results.page(graded(box, code, only=["soften"]) | dict(student="<b>", title="t"))
    assert "shape (3, 5) is expected, not (3,)" in html and "[1. 1. 1.]" in html and "&lt;i&gt; (3, 5)" in html
    assert "&lt;b&gt;</div>" in html and "<b>" not in html.split("<h1>")[1].split("</div>")[0] and "<i>" not in html

def test_exercise_built_on_an_empty_one_is_still_graded(box, tmp_path):
    nb = json.loads((HERE / "lab_small.ipynb").read_text(encoding="utf-8"))
    old = "torch.softmax(teacher_logits / temperature, -1)"
    for c in nb["cells"]:
        c["source"] = "".join(c["source"]).replace(old, "torch.tensor(soften(teacher_logits.numpy(), temperature))")
    lab = labs.read(write(tmp_path / "x.ipynb", nb))
    assert "soften(" in lab["distill_loss"].solution
    r = graded(box, labs.stub(lab["soften"]), labs.fill(lab["distill_loss"]), lab=lab)
    assert {x["function"]: x["points"] for x in r["exercises"]} == dict(soften=0, distill_loss=3, Head=0, reorder=0)

def test_result_does_not_depend_on_neighbours_or_order(box, built, tmp_path):
    wanted = [("soften",), (), ("Head",), ("soften", "Head")]
    paths = [write(tmp_path / f"s{i}.ipynb", solved(built, *names)) for i, names in enumerate(wanted)]
    there = [r["points"] for r in grade.grade(paths, LAB, "rain", box, jobs=2)]
    back = [r["points"] for r in grade.grade(paths[::-1], LAB, "rain", box, jobs=1)]
    assert there == back[::-1] == [2, 0, 1, 3]

ANY_ORDER = "def reorder(items): return items[-1:] + items[:-1]"
CHEATS = [
    "def sorted(x): return 0\ndef any(x): return False\ndef reorder(items): return ['x']",
    "import builtins\ndef reorder(items):\n    builtins.sorted = lambda x: 0\n    builtins.any = lambda x: False\n"
    "    return ['x']",
    "class L(list):\n    def __eq__(self, o): return True\n    def __iter__(self): return iter('abc')\n"
    "def reorder(items): return L(items)",
    "import sys\ndef reorder(items):\n    f = sys._getframe(1)\n"
    "    while f: f.f_globals['sorted'] = lambda x: 0; f = f.f_back\n    return ['x']"]

@pytest.mark.parametrize("source,wanted", [(ANY_ORDER, 1), *((c, 0) for c in CHEATS)])
def test_a_check_is_judged_in_the_parent(box, source, wanted):
    r = graded(box, source, only=["reorder"])
    assert r["points"] == wanted, r

# ---- what the student wrote is read as Python first

QUESTION = "def code_lines(source):\n    # does an empty last line count?\n    return len(source.splitlines())"
CONTINUED = "def code_lines(source):\n    n = (len(source.splitlines())\n         % 10**9)\n    return n"
MAGIC = "%matplotlib inline\nfiles = !ls\ncode_lines?\n" + QUESTION
INSIDE = QUESTION.replace("    return", "    %time 1\n    !ls\n    return")

@pytest.mark.parametrize("source", [QUESTION, CONTINUED, MAGIC, INSIDE, *(f"%%{m}\n{QUESTION}" for m in
                                    ("time", "timeit", "capture out", "prun -q", "time\n%%capture"))])
def test_a_right_solution_keeps_all_its_lines(box, source):
    r = graded(box, source, lab=EASY)
    assert r["points"] == 2 and not r["exercises"][0]["notes"], r

def test_magics_anywhere_do_not_hide_a_function():
    cell = "%load_ext autoreload\n!pip list\nx = 1\nx?\ndef f(a):\n    return a % 2\n"
    found, notes = student.definitions([cell, "%%writefile f.py\ndef g(): pass", "%%time\ndef h(): pass"])
    assert [getattr(n, "name", "x") for _, n in found] == ["x", "f", "h"] and not notes

RIGHT = "def code_lines(source): return len(source.splitlines())"
@pytest.mark.parametrize("sources, said", [
    (["x = 1", "def code_lines(source):\n    return (len(source"],
     "code cell 2, line 2: SyntaxError: '(' was never closed: return (len(source"),
    (["def code_lines(source):\n    raise NotImplementedError", "def code_lines(source)\n    return 1"],
     "code cell 2, line 1: SyntaxError: expected ':': def code_lines(source)"),
    (["def code_lines(source):\n    return 1\n  return 2"], "code cell 1, line 3: IndentationError: "),
    (["@cached\n" + RIGHT], "code cell 1, line 2: NameError: name 'cached' is not defined"),
    (["def code_lines(source, most=MOST): return 1"], "code cell 1, line 1: NameError: name 'MOST' is not defined"),
    (["x = 1\n\ncode_lines = lambda source: 1"], "code cell 1, line 3: code_lines is no plain `def`"),
    (["if True:\n    " + RIGHT], "code cell 1, line 2: code_lines stands inside something else"),
    (["def lines(s): return 1"], "no function called code_lines in this notebook, which defines lines"),
    (["def code_lines(source):\n    return source.lines"], "(code cell 1, line 2: return source.lines)")])
def test_what_can_not_be_graded_is_told_with_cell_line_and_reason(box, sources, said):
    r = graded(box, *sources, lab=EASY)
    assert r["points"] == 0 and said in r["exercises"][0]["problem"], r["exercises"][0]["problem"]

# ---- our own failure is nobody's zero

def grade_in_a_shell(limit, folder):
    "`slmkit lab grade` of one right submission, under a limit of open files."
    write(folder / "ada.ipynb", cells(RIGHT))
    code = (f"import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit})); "
            "from slmkit.cli.main import main; main(sys.argv[1:])")
    args = ["lab", "grade", folder / "ada.ipynb", "--lab", HERE / "lab_attack.ipynb", "--seed", "x",
            "--out", folder / "out"]
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, encoding="utf-8",
                          timeout=120,
                          env=os.environ | dict(PYTHONPATH=str(ROOT)))

@pytest.mark.parametrize("limit", [30, 256])
def test_a_sandbox_that_can_not_start_grades_nobody(limit, tmp_path):
    done = grade_in_a_shell(limit, tmp_path)
    if limit == 256:
        assert done.returncode == 0 and "2 of 2  ada" in done.stdout, done.stderr
        return
    assert done.returncode and not (tmp_path / "out").exists() and " of 2" not in done.stdout
    said = [l for l in done.stderr.splitlines() if l.startswith("slmkit: ")]
    assert len(said) == 1 and said[0].startswith("slmkit: lab: the sandbox can't"), done.stderr

def test_a_solution_that_loses_points_stops_the_grading(box, tmp_path):
    lab = labs.read(HERE / "lab_attack.ipynb")
    lab["code_lines"].solution = "    raise KeyError('ours') if __name__ == 'student' else None\n"
    drawn = grade.all_cases(EASY, "x")
    with pytest.raises(sandbox.SandboxFailed, match="own code_lines gets 0 of 2 here: KeyError: 'ours'"):
        grade.check_sandbox(box, lab, drawn)
    grade.check_sandbox(box, EASY, drawn)

def test_a_child_that_can_not_be_locked_in_stops_the_grading(box, tmp_path, monkeypatch):
    if not box.given["jail"]: pytest.skip("this machine gives no jail")
    monkeypatch.setattr(grade, "own_files", lambda lab: ["/no/such/file"])
    with pytest.raises(sandbox.SandboxFailed, match="can't lock a process in: FileNotFoundError"):
        grade.grade([write(tmp_path / "ada.ipynb", cells(RIGHT))], EASY, "x", box)

def test_a_failure_between_submissions_leaves_that_grade_empty(box, tmp_path, monkeypatch):
    paths = [write(tmp_path / f"{n}.ipynb", cells(RIGHT)) for n in ("ada", "bob")]
    def job(sandbox_, slot=0, **limits):
        if asked and asked.pop(0): raise sandbox.SandboxFailed("lab: the sandbox can't start a process: no room")
        return sandbox.Job(sandbox_, slot, **limits)
    asked = [False, False, True]  # our own solution, ada, bob
    monkeypatch.setattr(grade, "Job", job)
    done = results.save(grade.grade(paths, EASY, "x", box, jobs=1), who(paths), EASY, tmp_path / "out")
    assert [r["points"] for r in done] == [2, None] and "no room" in done[1]["ungraded"]
    lines = (tmp_path / "out/canvas.csv").read_text(encoding="utf-8").splitlines()
    assert lines[1:] == ["    Points Possible,,,,,2", "ada,,,,,2", "bob,,,,,"]
    assert (tmp_path / "out/grades.csv").read_text(encoding="utf-8").splitlines()[2].startswith("bob,,,,,2,not graded:")
    assert "not graded" in (tmp_path / "out/pages/bob.html").read_text(encoding="utf-8")
    assert "mean 2.00" in (tmp_path / "out/index.html").read_text(encoding="utf-8")

# ---- comparing

@pytest.mark.parametrize("want,got", [
    (1.0, 1), (1, 1.0), (np.float64(1), torch.tensor(1.)), ([1., 2.], np.array([1, 2])), ((1, 2), [1, 2]),
    (float("nan"), np.nan), (np.ones(3, "float32"), np.ones(3) + 5e-5), (np.ones(2), torch.ones(2) + 5e-5),
    (torch.ones(2, dtype=torch.bfloat16), np.full(2, 1.01)),
    ({"a": 1, "b": [np.ones(2)]}, {"b": [torch.ones(2)], "a": 1}),
    ("x", "x"), (None, None), ({1, 2}, {2, 1}), (np.array([]), []), ([[1, 2], [3, 4]], torch.tensor([[1, 2], [3, 4]])),
    ((np.ones(2), "a"), [torch.ones(2), "a"]), ([], ())])
def test_equal(want, got): assert values.compare(pack(want), pack(got)) is None

@pytest.mark.parametrize("want,got", [
    (1.0, 1.001), (1, 2), (True, False), ("x", "y"), ("1", 1), (None, 0), (0, None), (np.ones(3), np.ones((3, 1))),
    (np.ones(1), 1.0), (np.ones(3), np.ones(3) + 5e-5), (np.ones(3), np.full(3, 1.001, "float16")), ([1, 2], [1, 2, 3]),
    ({"a": 1}, {"b": 1}), ({"a": 1}, [1]), (np.array([np.nan, 1]), np.array([1, 1])), (float("inf"), 1e308),
    ([1, "a"], [1, 2]), ({1}, {2}), (np.ones(2, int), np.array([1, 2]))])
def test_different(want, got): assert values.compare(pack(want), pack(got))

@pytest.mark.parametrize("got", [
    {}, {"array": ""}, {"array": "!", "raw": "<f8", "dtype": "float64", "shape": [1]}, {"tuple": 3}, {"dict": [1]},
    {"x": 1}, {"tensor": "AAAA", "raw": "|O", "dtype": "object", "shape": []},
    {"array": "", "raw": "<f8", "dtype": "float64", "shape": [10**15]}, [[[]]], 10**400])
def test_nonsense_from_a_child_is_a_wrong_answer(got):
    for want in (1.0, "x", None, pack(np.ones(2)), [1, 2], pack({"a": 1})):
        v = grade.judge(dict(want=want, given=1), dict(value=got))
        assert v["right"] is False and v["problem"]
    assert grade.judge(dict(want=1, given=1), got)["right"] is False

# ---- finding files, labs, people

def test_lab_is_found_by_its_functions_not_by_metadata(tmp_path):
    claimed = cells("def soften(x): 0") | dict(metadata=dict(slmkit=dict(lab=EASY.technique)))
    path = write(tmp_path / "a.ipynb", claimed)
    assert submissions.which_lab([path], [EASY, LAB]) is LAB
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(KitError, match="--lab"): submissions.which_lab([path], [EASY, LAB])

def test_no_submission_is_told(tmp_path):
    with pytest.raises(KitError, match="no such file"): submissions.submissions([tmp_path / "x"], tmp_path)
    with pytest.raises(KitError, match="no notebook"): submissions.submissions([tmp_path], tmp_path)

def test_same_file_names_in_folders_stay_apart(tmp_path):
    files = [tmp_path / s / "lab.ipynb" for s in ("ada", "bob", "Ada")]
    assert len({w["key"].lower() for w in who(files)}) == 3
