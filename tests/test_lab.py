"Labs: reading the marks, building three notebooks, the proof of every lab, nbgrader's format, the command line."
import json, os, re, subprocess, sys
from pathlib import Path
import pytest
from slmkit.core.settings import KitError
from slmkit.cli import lab as lab_verbs
from slmkit.lab import lab as labs

ROOT, HERE = Path(__file__).parents[1], Path(__file__).parent / "fixtures"
SMALL = HERE / "lab_small.ipynb"
LABS = {"fixture": SMALL} | {k: p for k, p in labs.technique_notebooks(ROOT).items() if "#| exercise" in p.read_text()}
linux = pytest.mark.skipif(sys.platform != "linux", reason="grading strangers' code needs Linux")

def write_nb(path, sources, md="# T\n> s."):
    cells = [dict(cell_type="markdown", source=md)] + [dict(cell_type="code", source=s) for s in sources]
    path.write_text(json.dumps(dict(cells=cells))); return path

GOOD = "#| export\n#| exercise: points=1\ndef f(x):\n    ### BEGIN SOLUTION\n    return x\n    ### END SOLUTION"
EXP = "#| default_exp distill.t"

# ---- the proof: every lab of the project

@pytest.fixture(scope="session")
def nursery():
    from slmkit.lab import grade
    from slmkit.lab import sandbox
    with sandbox.Nursery(grade.imports_of([labs.read(p) for p in LABS.values()])) as n: yield n

@linux
@pytest.mark.parametrize("name", LABS)
def test_proof(name, nursery):
    from slmkit.lab import grade
    lab = labs.read(LABS[name])
    wrong, caught = grade.prove(lab, nursery)
    assert not wrong and caught >= 3 * len(lab.exercises), wrong

@linux
@pytest.mark.parametrize("name", LABS)
def test_slmkits_own_answer_earns_nothing(name, nursery):
    from slmkit.lab import grade
    lab = labs.read(LABS[name])
    module = f"slmkit.{lab.technique.replace('/', '.')}"
    code = [f"from {module} import {e.name}\n_own_{e.name} = {e.name}\ndef {e.name}(*a, **k):\n    from {module} import {e.name} as own\n    return own(*a, **k)"
            for e in lab.exercises]
    raw = json.dumps(dict(cells=[dict(cell_type="code", source=s) for s in code])).encode()
    r = grade.grade_bytes(nursery, lab, grade.all_cases(lab, "x"), raw)
    assert r["points"] == 0 and all("slmkit's own" in x["problem"] for x in r["exercises"]), [x["problem"] for x in r["exercises"]]

@linux
def test_a_mutant_that_passes_fails_the_proof(nursery, tmp_path):
    from slmkit.lab import grade
    hidden = "#| hidden\ndef inputs(rng): return float(rng.random())\nmutants = ['x + 1', 'x * 1.0', '-x']"
    wrong, caught = grade.prove(labs.read(write_nb(tmp_path / "a.ipynb", [EXP, GOOD, hidden])), nursery)
    assert wrong == ["the mutant 'x * 1.0' of f gets full points"] and caught == 2
    few = hidden.replace(", 'x * 1.0', '-x'", "")
    wrong, _ = grade.prove(labs.read(write_nb(tmp_path / "b.ipynb", [EXP, GOOD, few])), nursery)
    assert wrong == ["f has 1 mutants, at least 3 are needed"]
    unfair = hidden.replace("float(rng.random())", "rng.random((2, 2))").replace("'x * 1.0', ", "'x + 2', ")
    bad = GOOD.replace("return x", "return x if x.sum() < 0 else id(object())")
    wrong, _ = grade.prove(labs.read(write_nb(tmp_path / "c.ipynb", [EXP, bad, unfair])), nursery)
    assert any(w.startswith("the solution of f gets 0 of 1") for w in wrong)

# ---- building

@pytest.mark.parametrize("name", LABS)
def test_same_source_same_bytes_and_no_solution_in_it(name, tmp_path):
    lab = labs.read(LABS[name])
    a, b = (labs.build(labs.read(LABS[name]), tmp_path / d, run=False) for d in "ab")
    assert all(a[k].read_bytes() == b[k].read_bytes() for k in a)
    text = "".join("".join(c["source"]) for c in json.loads(a["student"].read_text())["cells"])
    for e in lab.exercises:
        solution = [l.strip() for l in e.solution.splitlines() if len(l.strip()) > 20]
        assert labs.stub(e) in text and not any(l in text for l in solution)
    assert "mutants" not in text and "def inputs" not in text and "SOLUTION" not in text and lab.digest in text

def test_cells_are_valid_notebooks(tmp_path):
    import nbformat
    for p in labs.build(labs.read(SMALL), tmp_path, run=False).values(): nbformat.validate(nbformat.read(p, 4))

def test_expected_output_is_the_solutions_and_repeats(tmp_path):
    lab = labs.read(SMALL)
    a, b = (labs.build(lab, tmp_path / d)["student"].read_bytes() for d in "ab")
    assert a == b
    cells = ["".join(c["source"]) for c in json.loads(a)["cells"]]
    assert any("[[0.186, 0.307, 0.506]]" in c or "0.186" in c for c in cells)
    assert any("![expected output](data:image/png;base64," in c for c in cells) and any("tensor(" in c for c in cells)

def test_solution_notebook_runs_and_the_set_up_runs_twice(tmp_path):
    made = labs.build(labs.read(SMALL), tmp_path, run=False)
    code = ["".join(c["source"]) for c in json.loads(made["solution"].read_text())["cells"] if c["cell_type"] == "code"]
    code = [c for c in code if "plt" not in c]
    assert "slmkit" in code[0] and "\n" not in code[0]
    space = {}
    for c in [code[0], code[0], *code[1:]]: exec(c, space)

def test_student_tests_fail_before_and_pass_after(tmp_path):
    made, lab = labs.build(labs.read(SMALL), tmp_path, run=False), labs.read(SMALL)
    for kind, fails in (("student", True), ("solution", False)):
        space, seen = {}, 0
        for c in json.loads(made[kind].read_text())["cells"]:
            source = "".join(c["source"])
            if c["cell_type"] != "code" or "plt" in source: continue
            if not source.startswith("# test"):
                try: exec(source, space)
                except NotImplementedError: pass
                continue
            seen += 1
            if fails:
                with pytest.raises(NotImplementedError): exec(source, space)
            else: exec(source, space)
        assert seen == 5  # soften has two cells of tests

def test_links_versions_hints_minutes(tmp_path):
    lab = labs.read(SMALL)
    text = labs.build(lab, tmp_path, "me/course/blob/main/week1", run=False)["student"].read_text()
    name = "distill_lab_small.ipynb"
    for link in (f"https://colab.research.google.com/github/me/course/blob/main/week1/{name}", f"https://vscode.dev/github/me/course/blob/main/week1/{name}",
                 f"http://localhost:8888/lab/tree/{name}"): assert link in text
    assert lab.version in text and "divide by the temperature first" in text and "20 minutes" in text and "★★" in text

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

@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"cells": [{}]}'])
def test_no_notebook(text, tmp_path):
    (tmp_path / "x.ipynb").write_text(text)
    with pytest.raises(KitError, match="lab: .*x.ipynb"): labs.read(tmp_path / "x.ipynb")

@pytest.mark.parametrize("mutant,wanted", [("y", "    a = 1\n    if x: return 1\n    return y"), (("a = 1", "a = 2"), "    a = 2\n    if x: return 1\n    return (x +\n            a)"),
                                            ("return 0", "    return 0"), ("b = 2\nreturn b", "    b = 2\n    return b"), ("[1,\n 2]", "    a = 1\n    if x: return 1\n    return [1,\n     2]")])
def test_mutants(mutant, wanted):
    source = "#| exercise:\ndef f(x):\n    ### BEGIN SOLUTION\n    a = 1\n    if x: return 1\n    return (x +\n            a)\n    ### END SOLUTION"
    ex = labs.exercise(source, 0, "here")
    assert labs.mutate(ex, mutant) == "def f(x):\n" + wanted
    with pytest.raises(KitError, match="not in the solution"): labs.mutate(ex, ("zzz", ""))

# ---- nbgrader

@pytest.fixture(scope="module")
def course(tmp_path_factory):
    "A course with the assignment released and two submissions graded by nbgrader itself."
    pytest.importorskip("nbgrader", reason="nbgrader is not installed: its exchange is not tested here")
    from slmkit.lab import nbgrader
    root = tmp_path_factory.mktemp("course"); lab = labs.read(SMALL)
    path = nbgrader.export(lab, root, "rain")
    env = os.environ | dict(JUPYTER_CONFIG_DIR=str(root / ".jupyter"), JUPYTER_DATA_DIR=str(root / ".data"), HOME=str(root), PYTHONPATH=str(ROOT),
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # nbgrader calls alembic by its name
    def run(*args): return subprocess.run([sys.executable, "-m", "nbgrader", *args], cwd=root, env=env, capture_output=True, text=True, timeout=200)
    done = dict(root=root, path=path, run=run, generate=run("generate_assignment", path.stem, "--create"))
    release = json.loads((root / "release" / path.stem / path.name).read_text())
    for who, solve in (("ada", ["soften", "distill_loss", "Head", "reorder"]), ("bob", ["distill_loss"])):
        for c, e in ((c, e) for c in release["cells"] for e in lab.exercises):
            if e.name in solve and c["metadata"].get("nbgrader", {}).get("grade_id") == f"answer-{e.name}": c["source"] = labs.fill(e, None)
        to = root / "submitted" / who / path.stem / path.name; to.parent.mkdir(parents=True); to.write_text(json.dumps(release))
        release = json.loads((root / "release" / path.stem / path.name).read_text())
    done["autograde"] = run("autograde", path.stem, "--create")
    done["export"] = run("export", "--to", "grades.csv")
    return done

def test_nbgrader_validates_the_solution(course):
    r = course["run"]("validate", str(course["path"]))
    assert r.returncode == 0 and "Success" in r.stdout + r.stderr, r.stdout + r.stderr

def test_nbgrader_releases_without_solution_or_hidden_tests(course):
    assert course["generate"].returncode == 0, course["generate"].stderr
    text = (course["root"] / "release" / course["path"].stem / course["path"].name).read_text()
    assert "z.sum(-1, keepdims=True)" not in text and "kit.nbgrader" not in text and "np.allclose" in text

def test_nbgrader_autogrades_and_its_gradebook_is_read(course):
    from slmkit.lab import nbgrader
    assert course["autograde"].returncode == 0, course["autograde"].stderr
    assert course["export"].returncode == 0, course["export"].stderr
    rows = {r["id"]: r for r in nbgrader.gradebook(course["root"] / "grades.csv")}
    assert (rows["ada"]["points"], rows["ada"]["of"], rows["bob"]["points"]) == (7, 7, 3)

def test_other_csv_is_refused(tmp_path):
    from slmkit.lab import nbgrader
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(KitError, match="no gradebook"): nbgrader.gradebook(tmp_path / "x.csv")

# ---- command line

@linux
def test_command_line(tmp_path):
    from typer.testing import CliRunner
    import typer
    app = typer.Typer(); lab_verbs.verbs(app); app.command("other")(lambda: None)
    run = lambda *a: CliRunner().invoke(app, ["lab", *map(str, a)])
    built = run("build", SMALL, "--out", tmp_path / "labs", "--no-run")
    assert built.exit_code == 0 and built.output.count("wrote") == 3, built.output
    (tmp_path / "seed.txt").write_text("rain\n")
    graded = run("grade", tmp_path / "labs/solution", "--lab", SMALL, "--seed", f"@{tmp_path / 'seed.txt'}", "--out", tmp_path / "graded", "--jobs", 1)
    assert graded.exit_code == 0 and "7 of 7" in graded.output and "kept apart on this machine" in graded.output, graded.output
    assert (tmp_path / "graded/grades.csv").exists() and (tmp_path / "graded/index.html").exists()
    assert run("prove", SMALL).exit_code == 0
    for wrong in (["grade", tmp_path / "none", "--seed", "x"], ["grade", tmp_path, "--seed", "@nowhere"], ["build", "distill/nothing"]):
        assert isinstance(run(*wrong).exception, KitError)
