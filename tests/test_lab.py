"Labs: reading the marks, building three notebooks, the proof of labs, nbgrader's format, the command line."
import ast, json, os, re, subprocess, sys
from pathlib import Path
import nbformat, pytest, typer
from typer.testing import CliRunner
from slmkit.cli import lab as lab_verbs
from slmkit.core.settings import KitError
from slmkit.lab import build as building
from slmkit.lab import grade, nbgrader, sandbox
from slmkit.lab import lab as labs

ROOT, HERE = Path(__file__).parents[1], Path(__file__).parent / "fixtures"
SMALL = HERE / "lab_small.ipynb"
LABS = {"fixture": SMALL} | labs.lab_notebooks(ROOT)
linux = pytest.mark.skipif(sys.platform != "linux", reason="grading strangers' code needs Linux")
HEAVY = ["fixture", *(pytest.param(name, marks=pytest.mark.slow) for name in LABS if name != "fixture")]

def write_nb(path, sources, md="# T\n> s."):
    cells = [dict(cell_type="markdown", source=md)] + [dict(cell_type="code", source=s) for s in sources]
    path.write_text(json.dumps(dict(cells=cells)), encoding="utf-8")
    return path

def code_of(path):
    "Sources of a notebook's code cells."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]

def text_of(path): return "".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"])

GOOD = "#| export\n#| exercise: points=1\ndef f(x):\n    ### BEGIN SOLUTION\n    return x\n    ### END SOLUTION"
EXP = "#| default_exp distill.t"

# ---- the proof: a small lab always, every lab of the project in the slow tests

@pytest.fixture(scope="module")
def box():
    with sandbox.Sandbox(grade.imports_of([labs.read(SMALL)])) as s: yield s

@pytest.fixture(scope="module")
def box_for_all():
    with sandbox.Sandbox(grade.imports_of([labs.read(p) for p in LABS.values()])) as s: yield s

def box_of(name, request): return request.getfixturevalue("box" if name == "fixture" else "box_for_all")

@linux
@pytest.mark.parametrize("name", HEAVY)
def test_proof(name, request):
    lab = labs.read(LABS[name])
    wrong, caught = building.prove(lab, box_of(name, request))
    assert not wrong and caught >= 3 * len(lab.exercises), wrong

@linux
@pytest.mark.parametrize("name", HEAVY)
def test_slmkits_own_answer_earns_nothing(name, request):
    lab = labs.read(LABS[name])
    module = f"slmkit.{lab.technique.replace('/', '.')}"
    code = [f"from {module} import {e.name}\n_own_{e.name} = {e.name}\ndef {e.name}(*a, **k):\n"
            f"    from {module} import {e.name} as own\n    return own(*a, **k)" for e in lab.exercises]
    raw = json.dumps(dict(cells=[dict(cell_type="code", source=s) for s in code])).encode()
    r = grade.grade_bytes(box_of(name, request), lab, grade.all_cases(lab, "x"), raw)
    problems = [x["problem"] for x in r["exercises"]]
    assert r["points"] == 0 and all("slmkit's own" in p for p in problems), problems

@pytest.mark.parametrize("name", LABS)
def test_every_lab_has_wrong_answers_that_differ_from_the_solution(name):
    for e in labs.read(LABS[name]).exercises:
        changed = {ast.dump(ast.parse(labs.mutate(e, m))) for m in e.mutants} - {ast.dump(ast.parse(labs.fill(e)))}
        assert e.tests and e.hint and len(e.mutants) >= 3 and len(changed) == len(e.mutants), e.name

@linux
def test_a_mutant_that_passes_fails_the_proof(box, tmp_path):
    hidden = "#| hidden\ndef inputs(rng): return float(rng.random())\nmutants = ['x + 1', 'x * 1.0', '-x']"
    wrong, caught = building.prove(labs.read(write_nb(tmp_path / "a.ipynb", [EXP, GOOD, hidden])), box)
    assert wrong == ["the mutant 'x * 1.0' of f gets full points"] and caught == 2
    few = hidden.replace(", 'x * 1.0', '-x'", "")
    wrong, _ = building.prove(labs.read(write_nb(tmp_path / "b.ipynb", [EXP, GOOD, few])), box)
    assert wrong == ["f has 1 mutants, at least 3 are needed"]
    unfair = hidden.replace("float(rng.random())", "rng.random((2, 2))").replace("'x * 1.0', ", "'x + 2', ")
    bad = GOOD.replace("return x", "return x if x.sum() < 0 else id(object())")
    wrong, _ = building.prove(labs.read(write_nb(tmp_path / "c.ipynb", [EXP, bad, unfair])), box)
    assert any(w.startswith("the solution of f gets 0 of 1") for w in wrong)

# ---- building

@pytest.mark.parametrize("name", LABS)
def test_same_source_same_bytes_and_no_solution_in_it(name, tmp_path):
    lab = labs.read(LABS[name])
    a, b = (building.build(labs.read(LABS[name]), tmp_path / d, run=False) for d in "ab")
    assert all(a[k].read_bytes() == b[k].read_bytes() for k in a)
    text = text_of(a["student"])
    cells = ["".join(c["source"]) for c in json.loads(LABS[name].read_text(encoding="utf-8"))["cells"]]
    given = {l.strip() for s in cells if "BEGIN SOLUTION" not in s and "#| hidden" not in s for l in s.splitlines()}
    for e in lab.exercises:
        solution = [l.strip() for l in e.solution.splitlines() if len(l.strip()) > 20 and l.strip() not in given]
        assert labs.stub(e) in text and not any(l in text for l in solution)
    assert "mutants" not in text and "def inputs(" not in text and "SOLUTION" not in text and lab.digest in text

def test_cells_are_valid_notebooks(tmp_path):
    for p in building.build(labs.read(SMALL), tmp_path, run=False).values(): nbformat.validate(nbformat.read(p, 4))

def test_expected_output_is_the_solutions_and_repeats(tmp_path):
    lab = labs.read(SMALL)
    a, b = (building.build(lab, tmp_path / d)["student"].read_bytes() for d in "ab")
    assert a == b
    cells = ["".join(c["source"]) for c in json.loads(a)["cells"]]
    assert any("[[0.186, 0.307, 0.506]]" in c or "0.186" in c for c in cells)
    assert any("![expected output](data:image/png;base64," in c for c in cells) and any("tensor(" in c for c in cells)

def test_solution_notebook_runs_and_the_set_up_runs_twice(tmp_path):
    made = building.build(labs.read(SMALL), tmp_path, run=False)
    code = [c for c in code_of(made["solution"]) if "plt" not in c]
    assert "slmkit" in code[0] and "\n" not in code[0]
    space = {}
    for c in [code[0], code[0], *code[1:]]: exec(c, space)

@pytest.mark.parametrize("kind", ["student", "solution"])
def test_student_tests_fail_before_and_pass_after(kind, tmp_path):
    made = building.build(labs.read(SMALL), tmp_path, run=False)
    space, seen = {}, 0
    for source in code_of(made[kind]):
        if "plt" in source: continue
        if not source.startswith("# test"):
            try: exec(source, space)
            except NotImplementedError: pass
            continue
        seen += 1
        if kind == "solution": exec(source, space)
        else:
            with pytest.raises(NotImplementedError): exec(source, space)
    assert seen == 5  # soften has two cells of tests

def test_links_versions_hints_minutes(tmp_path):
    lab = labs.read(SMALL)
    text = text_of(building.build(lab, tmp_path, "me/course/blob/main/week1", run=False)["student"])
    name = "distill_lab_small.ipynb"
    for link in (f"https://colab.research.google.com/github/me/course/blob/main/week1/{name}",
                 f"https://vscode.dev/github/me/course/blob/main/week1/{name}",
                 f"http://localhost:8888/lab/tree/{name}"):
        assert link in text
    for said in (lab.version, "divide by the temperature first", "20 minutes", "★★"): assert said in text

def test_without_a_place_a_lab_has_no_links_that_lead_nowhere(tmp_path):
    text = text_of(building.build(labs.read(SMALL), tmp_path, run=False)["student"])
    assert "jupyter lab distill_lab_small.ipynb" in text and "Upload notebook" in text
    assert "colab.research" not in text and "vscode.dev" not in text

def test_a_lab_of_ones_own_in_any_folder_proves_builds_and_is_never_written_over(tmp_path, monkeypatch, capsys):
    from slmkit.cli.main import main
    monkeypatch.chdir(tmp_path)  # no project
    def said(*argv):
        with pytest.raises(SystemExit) as e: main(["lab", *argv])
        return e.value.code, capsys.readouterr()
    assert said("new", "week 3")[0] == 0 and (tmp_path/"week 3.ipynb").is_file()
    code, out = said("prove", "week 3.ipynb")
    assert code == 0 and "own/week_3: 1 exercises, 3 mutants caught" in out.out
    assert said("build", "week 3.ipynb")[0] == 0
    student = (tmp_path/"labs/student/own_week_3.ipynb").read_text(encoding="utf-8")
    assert "NotImplementedError" in student and "mutants" not in student and "np.mean" not in student
    code, out = said("new", "week 3.ipynb")
    assert code == 2 and "exists already" in out.err

# ---- bad marks are told in one line

@pytest.mark.parametrize("sources,said", [
    ([EXP, GOOD.replace("points=1", "pionts=1")], "did you mean 'points'"),
    ([EXP, GOOD.replace("points=1", "points=two")], "not a number"),
    ([EXP, "#| exercise: points=1\ndef f(x): return x"], "BEGIN SOLUTION"),
    ([EXP, "#| exercise:\n### BEGIN SOLUTION\nx = 1\n### END SOLUTION"], "in no function"),
    ([EXP, GOOD, GOOD], "two exercises ask for f"),
    ([EXP, "#| hidden\nmutants = []", GOOD], "before the first exercise"),
    ([EXP, GOOD, "#| hidden\nmutants = [x for x in 'ab']"], "written-out list"),
    ([EXP, "x = 1"], "no #| exercise"), ([GOOD], "default_exp")])
def test_bad_marks(sources, said, tmp_path):
    with pytest.raises(KitError, match=re.escape(said)) as e: labs.read(write_nb(tmp_path / "x.ipynb", sources))
    assert "\n" not in str(e.value)

JSON = "no JSON with cells"
@pytest.mark.parametrize("text, said", [("", JSON), ("{}", JSON), ("[1]", JSON),
                                        ('{"cells": [{"cell_type": "code", "source": []}]}', "default_exp")])
def test_no_notebook(text, said, tmp_path):
    (tmp_path / "x.ipynb").write_text(text, encoding="utf-8")
    with pytest.raises(KitError, match=f"x.ipynb .*{said}"): labs.read(tmp_path / "x.ipynb")

LAST = "return (x +\n            a)"
@pytest.mark.parametrize("mutant,wanted", [
    ("y", "    a = 1\n    if x: return 1\n    return y"),
    (("a = 1", "a = 2"), f"    a = 2\n    if x: return 1\n    {LAST}"),
    ("return 0", "    return 0"),
    ("b = 2\nreturn b", "    b = 2\n    return b"),
    ("[1,\n 2]", "    a = 1\n    if x: return 1\n    return [1,\n     2]")])
def test_mutants(mutant, wanted):
    solution = f"    a = 1\n    if x: return 1\n    {LAST}\n"
    ex = labs.exercise(f"#| exercise:\ndef f(x):\n    ### BEGIN SOLUTION\n{solution}    ### END SOLUTION", 0, "here")
    assert ast.dump(ast.parse(labs.mutate(ex, mutant))) == ast.dump(ast.parse("def f(x):\n" + wanted))
    with pytest.raises(KitError, match="not in the solution"): labs.mutate(ex, ("zzz", ""))

def test_what_stands_after_the_solution_stays():
    ex = labs.exercise(GOOD + "\n\nf(3)", 0, "here")
    assert labs.fill(ex) == "def f(x):\n    return x\n\nf(3)"
    assert labs.stub(ex).endswith("raise NotImplementedError  # your code here\n\nf(3)")

# ---- nbgrader

@pytest.fixture(scope="module")
def course(tmp_path_factory):
    "A course with the assignment released and two submissions graded by nbgrader itself."
    pytest.importorskip("nbgrader", reason="nbgrader is not installed: its exchange is not tested here")
    root, lab = tmp_path_factory.mktemp("course"), labs.read(SMALL)
    path = nbgrader.export(lab, root, "rain")
    env = os.environ | dict(JUPYTER_CONFIG_DIR=str(root / ".jupyter"), JUPYTER_DATA_DIR=str(root / ".data"),
        HOME=str(root), PYTHONPATH=str(ROOT),
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # nbgrader calls alembic by its name
    def run(*args):
        return subprocess.run([sys.executable, "-m", "nbgrader", *args], cwd=root, env=env, capture_output=True,
                              encoding="utf-8", timeout=200)
    done = dict(root=root, path=path, run=run, generate=run("generate_assignment", path.stem, "--create"))
    released = root / "release" / path.stem / path.name
    for who, solve in (("ada", ["soften", "distill_loss", "Head", "reorder"]), ("bob", ["distill_loss"])):
        nb = json.loads(released.read_text(encoding="utf-8"))
        answers = {f"answer-{n}": labs.fill(lab[n]) for n in solve}
        for c in nb["cells"]:
            name = c["metadata"].get("nbgrader", {}).get("grade_id")
            c["source"] = answers.get(name, c["source"])
        to = root / "submitted" / who / path.stem / path.name
        to.parent.mkdir(parents=True)
        to.write_text(json.dumps(nb), encoding="utf-8")
    done["autograde"] = run("autograde", path.stem, "--create")
    done["export"] = run("export", "--to", "grades.csv")
    return done

def test_nbgrader_validates_the_solution(course):
    r = course["run"]("validate", str(course["path"]))
    assert r.returncode == 0 and "Success" in r.stdout + r.stderr, r.stdout + r.stderr

def test_nbgrader_releases_without_solution_or_hidden_tests(course):
    assert course["generate"].returncode == 0, course["generate"].stderr
    source = course["path"].read_text(encoding="utf-8")
    text = (course["root"] / "release" / course["path"].stem / course["path"].name).read_text(encoding="utf-8")
    for secret in ("z.sum(-1, keepdims=True)", "slmkit.lab.student"): assert secret in source and secret not in text
    assert "np.allclose" in text

def test_nbgrader_autogrades_and_its_gradebook_is_read(course):
    assert course["autograde"].returncode == 0, course["autograde"].stderr
    assert course["export"].returncode == 0, course["export"].stderr
    rows = {r["id"]: r for r in nbgrader.gradebook(course["root"] / "grades.csv")}
    assert (rows["ada"]["points"], rows["ada"]["of"], rows["bob"]["points"]) == (7, 7, 3)

def test_what_an_assignment_imports_needs_neither_torch_nor_the_grader():
    code = ("import sys, slmkit.lab.student\n"
            "print(*[m for m in sys.modules if m.startswith(('slmkit', 'torch', 'IPython', 'numpy'))])")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True,
                          env=os.environ | dict(PYTHONPATH=str(ROOT))).stdout
    assert set(said.split()) == {"slmkit", "slmkit.lab", "slmkit.lab.student", "slmkit.lab.values"}

def test_other_csv_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(KitError, match="no gradebook"): nbgrader.gradebook(tmp_path / "x.csv")

# ---- command line

def command(*args):
    app = typer.Typer()
    lab_verbs.verbs(app)
    app.command("other")(lambda: None)
    return CliRunner().invoke(app, ["lab", *map(str, args)])

@linux
def test_command_line(tmp_path):
    built = command("build", SMALL, "--out", tmp_path / "labs", "--no-run")
    assert built.exit_code == 0 and built.output.count("wrote /") == 3, built.output
    (tmp_path / "seed.txt").write_text("rain\n", encoding="utf-8")
    graded = command("grade", tmp_path / "labs/solution", "--lab", SMALL, "--seed", f"@{tmp_path / 'seed.txt'}",
                     "--out", tmp_path / "graded", "--jobs", 1)
    assert graded.exit_code == 0 and "7 of 7" in graded.output, graded.output
    assert "kept apart on this machine" in graded.output
    assert (tmp_path / "graded/grades.csv").exists() and (tmp_path / "graded/index.html").exists()
    assert command("prove", SMALL).exit_code == 0

@pytest.mark.parametrize("args", [["grade", "/nowhere", "--seed", "x"], ["grade", SMALL, "--seed", "@nowhere"],
                                  ["build", "distill/nothing"], ["nbgrader", "distill/nothing", "--seed", "x"]])
def test_bad_input_is_told_in_one_line(args):
    error = command(*args).exception
    assert isinstance(error, KitError) and "\n" not in str(error)

def test_a_gradebook_becomes_a_table_a_lab(tmp_path):
    path = tmp_path / "grades.csv"
    path.write_text("assignment,student_id,score,max_score\na b,ada,1.5,2\nc,ada,1,1\n", encoding="utf-8")
    done = command("gradebook", path, "--out", tmp_path / "out")
    assert done.exit_code == 0 and (tmp_path / "out/a_b.csv").read_text(encoding="utf-8").endswith("\nada,ada,,,,1.5\n")
    assert (tmp_path / "out/c.csv").exists()
