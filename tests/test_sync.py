"Regeneration changes nothing, a new technique keeps the contract, and what a check says is clear. Works on copies."
import json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest
from slmkit.core.settings import KitError
from slmkit.files import write
from slmkit.project import check, sync
from slmkit.project.template import new
from slmkit.run.notebooks import TECHNIQUES, notebooks, strip_markers

ROOT = Path(__file__).parents[1]
ENV = dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
PARTS = "nbs", "slmkit", "settings.ini", "pyproject.toml", "_quarto.yml", "README.md"

def sources_of(root):
    "The files that make a fresh clone: what git tracks and new notebooks, without weights."
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PARTS]
    given = subprocess.run(listing, cwd=root, capture_output=True, encoding="utf-8").stdout.split("\0")
    found = [f for f in given if f and not f.startswith("slmkit/zoo/")]
    return [f for f in found if (root/f).is_file()]

def copy_project(root, to):
    "A copy of the project's sources at `to`. Skips where this is no git checkout."
    found = sources_of(root)
    if not found: pytest.skip("not a git checkout")
    for f in found:
        (to/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/f, to/f)
    return to

def python(root, code):
    "Output of Python code that stands in a project and imports its slmkit."
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, encoding="utf-8", timeout=120,
                          env=os.environ | ENV | dict(PYTHONPATH=f"{root}{os.pathsep}{ROOT}"))
    assert done.returncode in (0, 1, 2), done.stderr
    return done.stdout + done.stderr

def slmkit(root, *words): return python(root, f"from slmkit.cli.main import main; main({list(words)!r})")
def state(root):
    "Every file of a project and what is in it."
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.suffix != ".pyc"}

MADE = "slmkit/_modidx.py", "nbs/sidebar.yml"  # what git ignores and sync makes

@pytest.fixture(scope="module")
def synced(tmp_path_factory):
    "A copy of the checkout after one sync: its folder, its files before, and what sync said."
    root = copy_project(ROOT, tmp_path_factory.mktemp("synced")/"project")
    before = state(root)
    return root, before, slmkit(root, "sync")

@pytest.fixture
def fresh(synced, tmp_path): return Path(shutil.copytree(synced[0], tmp_path/"project"))

# ---- sync

def test_regenerating_changes_no_committed_file(synced):
    "What CI asks of every commit: run slmkit sync before committing. A fresh clone lacks only what git ignores."
    root, before, said = synced
    after = state(root)
    changed = sorted(p.as_posix() for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    assert changed == sorted(MADE), f"run slmkit sync and commit: {changed}"
    assert sorted(said.splitlines()) == sorted(f"wrote {p}" for p in MADE)

def test_git_ignores_what_is_made():
    if not sources_of(ROOT): pytest.skip("not a git checkout")
    ignored = subprocess.run(["git", "check-ignore", *MADE], cwd=ROOT, capture_output=True,
                             encoding="utf-8").stdout.split()
    tracked = subprocess.run(["git", "ls-files", *MADE], cwd=ROOT, capture_output=True, encoding="utf-8").stdout.split()
    assert ignored == list(MADE) and tracked == []

def test_a_fresh_clone_works_before_sync(tmp_path):
    "Neither the command line nor nbdev's lookup of names needs the files that git ignores."
    root = copy_project(ROOT, tmp_path/"project")
    assert not any((root/p).exists() for p in MADE)
    assert "Regenerate" in slmkit(root, "sync", "--help")
    code = "from nbdev.doclinks import NbdevLookup; print(NbdevLookup().linkify('`read_text` and words'))"
    assert "and words" in python(root, code)

def test_syncing_twice_changes_nothing(fresh):
    before = state(fresh)
    assert "everything is up to date" in slmkit(fresh, "sync") and state(fresh) == before

def test_the_sidebar_lists_every_notebook_once(synced):
    root = synced[0]
    listed = re.findall(r"- (\S+\.ipynb)", (root/"nbs/sidebar.yml").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(p.relative_to(root/"nbs").as_posix() for p in notebooks(root))
    import yaml
    assert yaml.safe_load((root/"nbs/sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]

def test_hand_edits_of_generated_files_are_undone(fresh):
    before = state(fresh)
    for name in ("slmkit/toyland/world.py", "nbs/sidebar.yml"): (fresh/name).write_text("x = 1\n", encoding="utf-8")
    said = slmkit(fresh, "sync")
    assert state(fresh) == before and "wrote slmkit/toyland/world.py" in said and "wrote nbs/sidebar.yml" in said

def test_no_exported_module_holds_a_mark_of_labs(synced):
    for p in (synced[0]/"slmkit").rglob("*.py"):
        text = p.read_text(encoding="utf-8")
        assert not re.search(r"^[ \t]*(### (BEGIN|END) SOLUTION|#\| (exercise|hint))", text, re.M), p

def test_sync_outside_a_project_is_told_in_one_line(tmp_path):
    said = slmkit(tmp_path, "sync")  # this checkout's slmkit: there is none in that folder
    assert said.count("\n") == 1 and "no slmkit project here" in said

def test_markers_are_stripped_and_the_solution_stays():
    from types import SimpleNamespace
    source = ("#| export\n#| exercise: points=2\n#| hint: look\ndef f():\n    ### BEGIN SOLUTION\n"
              "    x = '### BEGIN'\n    ### END SOLUTION (mine)\n    return x")
    cell = SimpleNamespace(cell_type="code", source=source)
    strip_markers(cell)
    assert cell.source == "#| export\ndef f():\n    x = '### BEGIN'\n    return x"
    words = SimpleNamespace(cell_type="markdown", source=source)
    strip_markers(words)
    assert words.source == source

# ---- tags survive cleaning

def messy(path):
    "A notebook with outputs, a tag and an editor's metadata."
    out = [dict(output_type="stream", name="stdout", text="1\n")]
    cell = dict(cell_type="code", id="a", source="seed = 0", execution_count=7, outputs=out,
                metadata=dict(tags=["parameters"], scrolled=True))
    kernel = dict(kernelspec=dict(name="python3"))
    path.write_text(json.dumps(dict(cells=[cell], metadata=kernel, nbformat=4, nbformat_minor=5)), encoding="utf-8")
    return path

def metadata(path): return json.loads(path.read_text(encoding="utf-8"))["cells"][0]["metadata"]

def test_the_parameters_tag_survives_our_clean(tmp_path):
    path = messy(tmp_path/"a.ipynb")
    assert sync.clean(path) == path and sync.clean(path) is None
    cell = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    assert cell["metadata"] == dict(tags=["parameters"]) and cell["outputs"] == [] and cell["execution_count"] is None

def test_the_parameters_tag_survives_nbdev_clean(fresh):
    path = messy(fresh/"nbs/a.ipynb")
    code = "from nbdev.clean import nbdev_clean; nbdev_clean(fname='nbs/a.ipynb')"
    python(fresh, code)
    assert metadata(path) == dict(tags=["parameters"])
    settings = fresh/"pyproject.toml"  # the trap itself: without the setting the tag is lost
    without = re.sub(r"^allowed_cell_metadata_keys.*$", "", settings.read_text(encoding="utf-8"), flags=re.M)
    settings.write_text(without, encoding="utf-8")
    messy(path)
    python(fresh, code)
    assert metadata(path) == {}

# ---- new

def test_a_new_technique_keeps_the_contract_and_runs(fresh):
    lesson, measured = (fresh/f"nbs/distill/{name}.ipynb" for name in ("my_idea", "my_idea_repro"))
    said = slmkit(fresh, "new", "distill/my_idea")
    assert "wrote nbs/distill/my_idea.ipynb, nbs/distill/my_idea_repro.ipynb" in said
    assert "not made yet: run slmkit sync" in slmkit(fresh, "check")
    first = slmkit(fresh, "sync")
    assert "wrote slmkit/distill/my_idea.py" in first and lesson.name not in first  # clean as it comes
    assert not (fresh/"slmkit/distill/my_idea_repro.py").exists()
    said = [l for l in slmkit(fresh, "check").splitlines() if "my_idea" in l]
    assert said and all(l.startswith("note: ") for l in said), said
    listed = (fresh/"nbs/sidebar.yml").read_text(encoding="utf-8")
    assert listed.index(f"distill/{lesson.name}") < listed.index(f"distill/{measured.name}")
    code = "import slmkit.distill.my_idea as m; print(m.__file__, m.vote(['a', 'b', 'b']))"
    assert str(fresh) in python(fresh, code) and python(fresh, code).strip().endswith(" b")
    assert runs(fresh, lesson) is None
    line = runs(fresh, measured)
    assert list(line["claims"]) == ["voting-helps"] and line["profile"] == "smoke" and line["n_rows"] == 40
    assert line["arms"]["voted"] > line["arms"]["first"] == line["arms"]["copied"]  # a vote of copies is one answer

def runs(root, path):
    "Run all cells at smoke; gives the line that they recorded, or None."
    code = f"""
import json, os, pathlib
os.environ['SLMKIT_RECORD'] = 'record.jsonl'
from execnb.shell import CaptureShell
from fastcore.nbio import read_nb
shell, nb = CaptureShell(), read_nb({str(path)!r})
for c in nb.cells: c.source = c.source.replace('profile = "cpu"', 'profile = "smoke"')
shell.run_all(nb, exc_stop=True)
assert not shell.exc, shell.exc
record = pathlib.Path('record.jsonl')
print(record.read_text() if record.exists() else 'null')"""
    return json.loads(python(root, code).strip().splitlines()[-1])

def test_a_new_family_becomes_a_package(fresh):
    slmkit(fresh, "new", "senses/tiny_eye")
    slmkit(fresh, "sync")
    assert (fresh/"nbs/senses/tiny_eye.ipynb").exists() and (fresh/"slmkit/senses/__init__.py").exists()

def template(to, name="distill/my_idea"):
    "The lesson and the reproduction of a new technique."
    (to/"nbs").mkdir(parents=True, exist_ok=True)
    return new(name, to)

def test_the_template_has_wrong_solutions_that_are_wrong(tmp_path):
    import numpy
    from slmkit.lab.lab import mutate, read
    lab = read(template(tmp_path)[0])
    given = {}
    exec(lab.exercises[0].hidden, given)
    cases = [given["inputs"](numpy.random.default_rng(s)) for s in range(20)]
    def answers(source):
        space = {}
        exec("from collections import Counter\n" + source, space)
        return [space[lab.exercises[0].name](*case) for case in cases]
    right = answers(lab.exercises[0].source)
    assert len(lab.exercises[0].mutants) >= 3
    for m in lab.exercises[0].mutants: assert answers(mutate(lab.exercises[0], m)) != right

@pytest.mark.parametrize("name, words", [
    ("distil/my_idea", "the families are distill"),
    ("distill/my-idea", "letters, digits"),
    ("distill/class", "letters, digits"),
    ("core/my_idea", "not family/name"),
    ("distill/my_repro", "not family/name"),
    ("idea", "not family/name"),
])
def test_new_refuses_bad_names_in_one_line(tmp_path, name, words):
    with pytest.raises(KitError) as e: template(tmp_path, name)
    assert words in str(e.value) and "\n" not in str(e.value) and not list(tmp_path.rglob("*.ipynb"))

def test_new_refuses_to_overwrite(tmp_path):
    made = template(tmp_path)
    texts = [p.read_text(encoding="utf-8") for p in made]
    with pytest.raises(KitError, match="exists already"): template(tmp_path)
    made[0].unlink()  # neither of the two is written over
    with pytest.raises(KitError, match="my_idea_repro.ipynb exists already"): template(tmp_path)
    assert made[1].read_text(encoding="utf-8") == texts[1] and not made[0].exists()
    assert [p.name for p in template(tmp_path, "distill/other")] == ["other.ipynb", "other_repro.ipynb"]

# ---- check

def broken(tmp_path, change, part=0):
    "What check says of a new lab's lesson (part 0) or reproduction after `change(source) -> source` of every cell."
    path = template(tmp_path)[part]
    nb = json.loads(path.read_text(encoding="utf-8"))
    marked = lambda s: s.replace("#| default_exp", "#| lab\n#| default_exp")
    for c in nb["cells"]: c["source"] = change(marked("".join(c["source"]))).splitlines(True)
    path.write_text(json.dumps(nb), encoding="utf-8")
    return check.notebook_problems(path)

@pytest.mark.parametrize("part, old, new, line", [
    (1, "settings(profile", "dict(profile", "no profile table"),
    (1, ".record(", ".keep(", "nothing is recorded"),
    (1, "expect(voting", "repr(voting", "no expect(claim"),
    (0, '"answers[0]", ', "", "exercise vote: 2 mutants in its #| hidden cell (at least 3)"),
    (0, "#| hint: ", "#| note: ", "exercise vote: no #| hint"),
    (0, "#| test", "#| tried", "exercise vote: no #| test cell"),
    (0, "### END SOLUTION", "", "has no ### BEGIN SOLUTION ... ### END SOLUTION"),
    (0, "distill.my_idea", "distill.my_idee", "no `#| default_exp distill.my_idea`"),
    (0, "seed = 0 ", "sead = 0 ", "the parameters cell sets no seed"),
    (1, "cpu=dict(", "gpu=dict(", "the profile table has no cpu"),
    (0, "> One sentence", "One sentence", "the first cell needs a title"),
    (0, "#| headline", "#| heading", "0 cells `#| headline"),
])
def test_check_names_each_breach(tmp_path, part, old, new, line):
    found = broken(tmp_path, lambda s: s.replace(old, new), part)
    assert any(line in f for f in found), found
    assert all("\n" not in f for f in found) and len(found) <= 2

def test_a_new_technique_breaks_nothing(tmp_path):
    for part in 0, 1: assert broken(tmp_path/str(part), lambda s: s, part) == []

def test_a_long_line_is_named(tmp_path):
    path = template(tmp_path)[0]
    nb = json.loads(path.read_text(encoding="utf-8"))
    code = next(c for c in nb["cells"] if c["cell_type"] == "code" and "def vote" in "".join(c["source"]))
    code["source"] = [*code["source"], "\nrng = " + "9"*120]
    path.write_text(json.dumps(nb), encoding="utf-8")
    assert "a line of 126 characters (at most 120): `" in check.notebook_problems(path)[0]

def test_check_finds_a_claim_after_its_experiment(tmp_path):
    path = template(tmp_path)[1]
    nb = json.loads(path.read_text(encoding="utf-8"))
    code = [(i, "".join(c["source"])) for i, c in enumerate(nb["cells"]) if c["cell_type"] == "code"]
    at = lambda word: next(i for i, source in code if word in source)
    i, j = at("= claim("), at(".record(")
    nb["cells"][i], nb["cells"][j] = nb["cells"][j], nb["cells"][i]
    path.write_text(json.dumps(nb), encoding="utf-8")
    assert check.notebook_problems(path) == ["a result is recorded before the claim is declared: declare it first"]

def test_check_finds_a_claim_in_a_lesson(tmp_path):
    lesson, repro = template(tmp_path)
    nb, claims = (json.loads(p.read_text(encoding="utf-8"))["cells"] for p in (lesson, repro))
    whole = json.loads(lesson.read_text(encoding="utf-8"))
    whole["cells"].append(next(c for c in claims if "= claim(" in "".join(c["source"])))
    lesson.write_text(json.dumps(whole), encoding="utf-8")
    assert "a lesson declares no claim: that belongs into its reproduction" in check.notebook_problems(lesson)

def test_check_finds_outputs_of_a_kit_notebook_and_the_missing_tag(tmp_path):
    kit = tmp_path/"nbs/core/x.ipynb"
    cell = dict(cell_type="code", source="1", outputs=[dict(output_type="stream", name="stdout", text="1")])
    write(kit, json.dumps(dict(cells=[dict(cell_type="markdown", source="# X\n> Y"), cell])))
    assert check.notebook_problems(kit) == ["outputs are committed: run slmkit sync"]
    path = template(tmp_path)[0]
    nb = json.loads(path.read_text(encoding="utf-8"))
    for c in nb["cells"]: c["metadata"] = {}
    path.write_text(json.dumps(nb), encoding="utf-8")
    assert any("tagged `parameters`" in f for f in check.notebook_problems(path))

def test_check_finds_stray_modules(fresh):
    path = fresh/"nbs/distill/step_by_step.ipynb"
    path.rename(path.with_name("renamed.ipynb"))
    found = check.stray_problems(fresh)
    assert "slmkit/distill/step_by_step.py: its notebook step_by_step.ipynb is gone: delete this" in found
    assert "slmkit/distill/renamed.py: not made yet: run slmkit sync" in found

def test_check_finds_a_work_that_the_registry_lacks(fresh):
    assert check.work_problems(fresh) == []
    path = fresh/"nbs/distill/step_by_step_repro.ipynb"
    text = path.read_text(encoding="utf-8").replace("distilling-step-by-step", "distilling-step-by-stap")
    path.write_text(text, encoding="utf-8")
    found = check.work_problems(fresh)
    assert found and all("did you mean 'distilling-step-by-step'" in line for line in found)

def test_long_modules_are_found(tmp_path):
    write(tmp_path/"slmkit/distill/long.py", "x = 1\n"*151)
    write(tmp_path/"slmkit/core/long.py", "x = 1\n"*300 + "# why\n\n'doc'\n")
    assert check.module_problems(tmp_path) == ["slmkit/distill/long.py: 151 lines of code (at most 150)"]
    write(tmp_path/"slmkit/toyland/many.py", "# why\n"*5501)
    assert "toyland: 5501 lines of Python together (at most 5500)" in check.module_problems(tmp_path)

def test_a_broken_notebook_is_named(tmp_path):
    path = tmp_path/"a.ipynb"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(KitError, match="a.ipynb is no notebook"): check.notebook_problems(path)

PAGES = [p for p in notebooks(ROOT) if p.parent.name not in TECHNIQUES]
@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(ROOT/"nbs").as_posix())
def test_no_page_of_the_kit_breaks_the_contract(path): assert check.notebook_problems(path) == []
