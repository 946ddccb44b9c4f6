"How the house stands: which room may import which, no circles, no hidden imports, and its budgets."
import ast, json, re, subprocess, sys, tomllib
from collections import Counter
from fnmatch import fnmatch
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
import pytest
from conftest import ROOT
from slmkit.project import check
from slmkit.run.notebooks import TECHNIQUES

LINES = 27050  # of Python in the package, without what git ignores: new techniques raise it; the budget is 16,000

GROUND = {"slmkit", "slmkit.files", "slmkit.core.settings"}  # every room stands on these
BELOW = {  # room -> the rooms that it may import from, apart from itself and the ground
    "toyland": "",
    "core": "toyland",
    "recipes": "core toyland reason",  # the probes run small programs, as reason.interpreter does
    **{family: f"core toyland {' '.join(TECHNIQUES)}" for family in TECHNIQUES},
    "distill": f"core toyland recipes {' '.join(TECHNIQUES)}",  # specialize asks what pretraining taught: the probes
    "run": "core",
    "verdicts": "run core",
    "lab": "verdicts run core",
    "project": "lab verdicts run core",
    "site": "project lab verdicts run core",
    "cli": f"site project lab verdicts run recipes core toyland {' '.join(TECHNIQUES)}",
}
HEAVY = "torch transformers datasets peft matplotlib papermill execnb nbdev nbformat nbclient sphinx ray pandas".split()
INSIDE = {  # (module, what one of its functions imports) -> why, where that spares no heavy library
    ("slmkit.run.executors", "slmkit.run.warm"): "to import it is to warm a fork server",
}

# ---- the graph

def name_of(path):
    "slmkit/run/plan.py -> slmkit.run.plan."
    return ".".join(path.removesuffix(".py").removesuffix("/__init__").split("/"))

SOURCES = check.module_sources(ROOT)
MODULES = {name_of(path): (path, text) for path, text in SOURCES.items()}

def targets(node, path):
    "The modules that an import statement names; of the package's own by their full names."
    if isinstance(node, ast.Import): return [a.name for a in node.names]
    folders = path.split("/")[:-1]
    base = folders[:len(folders) - node.level + 1] if node.level else []
    module = ".".join(base + ([node.module] if node.module else []))
    inner = [f"{module}.{a.name}" for a in node.names]
    return [name if name in MODULES else module for name in inner]

@cache
def imports(name):
    "(what a module imports, whether that stands inside a function) of each of its imports."
    path, text = MODULES[name]
    tree, found = ast.parse(text), []
    functions = [f for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = {id(n) for f in functions for n in ast.walk(f)}
    for n in ast.walk(tree):
        if isinstance(n, (ast.Import, ast.ImportFrom)): found += [(t, id(n) in inside) for t in targets(n, path)]
    return found

def own(name): return name == "slmkit" or name.startswith("slmkit.")
def room(name): return check.room(MODULES[name][0])

@cache
def heavy(name):
    "Whether importing the module imports one of the heavy libraries."
    todo, seen = [name], set()
    while todo:
        seen.add(m := todo.pop())
        at_top = {t for t, inside in imports(m) if not inside}
        if any(t.split(".")[0] in HEAVY for t in at_top): return True
        todo += [t for t in at_top if t in MODULES and t not in seen]
    return False

def test_every_import_of_our_own_exists():
    lost = {(m, t) for m in MODULES for t, _ in imports(m) if own(t) and t not in MODULES}
    assert not lost

def test_no_module_imports_itself_by_way_of_others():
    graph = {m: {t for t, _ in imports(m) if own(t)} for m in MODULES}
    try: TopologicalSorter(graph).prepare()
    except CycleError as e: pytest.fail(f"a circle: {' <- '.join(e.args[1])}")

def test_arrows_point_down():
    wrong = set()
    for m in MODULES.keys() - GROUND:
        allowed = {room(m), *BELOW[room(m)].split()}
        wrong |= {f"{m} -> {t}" for t, _ in imports(m) if t in MODULES.keys() - GROUND and room(t) not in allowed}
    assert sorted(wrong) == []

def test_the_ground_stands_on_nothing():
    assert not [(m, t) for m in GROUND & set(MODULES) for t, _ in imports(m) if own(t) and t not in GROUND]

def test_an_import_inside_a_function_spares_a_heavy_library():
    "`slmkit --help` stays quick by them. Elsewhere they would only hide a circle; below a verb no circle can be."
    hidden = {(m, t) for m in MODULES for t, inside in imports(m) if inside and own(t) and room(m) != "cli"}
    hidden = {(m, t) for m, t in hidden if heavy(m) or not heavy(t)}
    assert sorted(hidden - set(INSIDE)) == [], "put these imports at the top"

@pytest.mark.parametrize("library, rooms", [("typer", ["cli"]), ("pickle", [])])
def test_a_library_has_its_rooms(library, rooms):
    users = {m for m in MODULES for t, _ in imports(m) if t.split(".")[0] == library}
    assert {room(m) for m in users} <= set(rooms), users

# ---- budgets

def test_the_package_does_not_grow():
    n = sum(len(t.splitlines()) for t in SOURCES.values())
    assert n <= LINES, f"{n} lines of Python in slmkit: at most {LINES}"

def test_modules_and_rooms_keep_their_budgets(): assert check.module_problems(ROOT) == []

def test_every_module_comes_from_a_notebook():
    made = {p for p, t in SOURCES.items() if "AUTOGENERATED" in t}
    assert {p for p in set(SOURCES) - made if not p.endswith("__init__.py")} == set()
    assert check.stray_problems(ROOT) == []

def long_lines(lines): return [(i, len(l)) for i, l in enumerate(lines, 1) if len(l) > check.LINE]

def test_lines_of_tests_fit():
    long = {p.name: long_lines(p.read_text(encoding="utf-8").splitlines()) for p in ROOT.glob("tests/**/*.py")}
    assert {name: found for name, found in long.items() if found} == {}

def code_of(path):
    "The lines of the code cells of a notebook."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [l for c in cells if c["cell_type"] == "code" for l in "".join(c["source"]).splitlines()]

def test_lines_of_notebooks_fit():
    pages = [p for p in ROOT.glob("nbs/**/*.ipynb") if not re.search(r"/[._]", p.relative_to(ROOT).as_posix())]
    long = {p.relative_to(ROOT).as_posix(): long_lines(code_of(p)) for p in pages}
    assert {name: found for name, found in long.items() if found} == {}

# ---- the wheel

SETTINGS = tomllib.loads((ROOT/"pyproject.toml").read_text(encoding="utf-8"))
UNSEEN = {  # dependencies that no line of the package or of a notebook imports -> why they are there
    "jupyterlab": "opens the notebooks",
    "ipykernel": "runs their cells; brings IPython and traitlets",
    "peft": "what a reader compares our adapters with",
    "gguf": "transformers reads llama.cpp's format with it",
}

def dist(requirement):
    "The name of a distribution, as a requirement has it."
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()

def imported_by_notebooks():
    "The libraries that code cells import."
    found = set()
    for path in ROOT.glob("nbs/**/[!._]*.ipynb"):
        for c in (c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"):
            code = re.sub(r"^[ \t]*[%!].*", "", "".join(c["source"]), flags=re.M)
            for n in ast.walk(ast.parse(code)):
                if isinstance(n, ast.Import): found |= {a.name for a in n.names}
                if isinstance(n, ast.ImportFrom): found.add(n.module)
    return found

def test_dependencies_are_what_is_imported():
    provided = packages_distributions()
    roots = {t.split(".")[0] for t in imported_by_notebooks() | {t for m in MODULES for t, _ in imports(m)}}
    foreign = roots - set(sys.stdlib_module_names) - {"slmkit"}
    come_along = {"ipython", "traitlets", "docutils"}  # with ipykernel and Sphinx
    used = {dist(d) for r in foreign for d in provided.get(r, [r])} - come_along
    asked = {dist(d) for d in SETTINGS["project"]["dependencies"]}
    extra = {dist(d) for names in SETTINGS["project"]["optional-dependencies"].values() for d in names}
    assert used - asked - extra == set(), "import what pyproject.toml names, or name it there"
    assert asked - used - set(UNSEEN) == set(), "nothing imports these: take them out of pyproject.toml"

def test_the_wheel_holds_every_file_that_is_no_module():
    done = subprocess.run(["git", "ls-files", "slmkit"], cwd=ROOT, capture_output=True, encoding="utf-8")
    listed = done.stdout.split()
    if not listed: pytest.skip("not a git checkout")
    globs = SETTINGS["tool"]["setuptools"]["package-data"]["slmkit"]
    names = [p.removeprefix("slmkit/") for p in listed if not p.endswith(".py")]
    assert names and [n for n in names if not any(fnmatch(n, g) for g in globs)] == []

# ---- pages

def test_no_two_pages_have_one_title():
    titles = Counter()
    for path in sorted(ROOT.glob("nbs/**/*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"] if ".ipynb_checkpoints" not in path.parts else []
        titles.update(m[0] for c in cells if (m := re.match("# .*", "".join(c["source"]))))
    assert titles.total() > 100 and [t for t, n in titles.items() if n > 1] == []
