"Every notebook is a test: run at smoke by the kit's own executor, two at a time, each with a limit of its own."
import os
import pytest
from conftest import ROOT
from slmkit.run.executors import STACK, Local, run_all
from slmkit.run.notebooks import parameters, read, sources

NOTEBOOKS = sorted(
    p for p in ROOT.glob("nbs/**/*.ipynb") if not any(part[0] in "._" for part in p.relative_to(ROOT).parts)
)
AT_ONCE, LIMIT = int(os.environ.get("SLMKIT_TEST_JOBS", 2)), float(os.environ.get("SLMKIT_TEST_LIMIT", 180))
name = lambda p: p.relative_to(ROOT).as_posix()

def smoke(path):
    "The profile for a notebook that has one."
    tagged = any("parameters" in tags for _, tags in sources(read(path)))
    return dict(profile="smoke") if tagged and "profile" in parameters(read(path)) else {}

def job(path, folder):
    "What the executor is told of a notebook."
    out = folder/name(path).replace("/", ".")
    env = dict(SLMKIT_RECORD=f"{out}.claims", IN_TEST="1")
    return dict(
        id=name(path),
        notebook=str(path),
        output=str(out),
        log=f"{out}.log",
        parameters=smoke(path),
        cwd=str(path.parent),
        env=env,
        timeout=LIMIT,
    )

class Notebooks:
    "Executes the notebooks in the order of their tests, some ahead, while the tests ask for their results one by one."
    def __init__(self, wanted, folder):
        self.folder, self.done, self.pool = folder, {}, Local(STACK)
        self.ends = run_all(self.pool, [job(p, folder) for p in wanted], AT_ONCE)
    def result(self, path):
        while name(path) not in self.done:
            e = next(self.ends)
            self.done[e["id"]] = e
        return self.done[name(path)]

@pytest.fixture(scope="session")
def notebooks(request, tmp_path_factory):
    tests = [i for i in request.session.items if i.originalname == "test_notebook"]
    n = Notebooks([i.callspec.params["path"] for i in tests], tmp_path_factory.mktemp("notebooks"))
    yield n
    n.pool.close()

@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook(path, notebooks):
    e = notebooks.result(path)
    assert (
        e["status"] == "ok"
    ), f"{name(path)}: {e['status']}: {e['error']}; executed notebook and log in {notebooks.folder}"

def test_smoke_is_passed_to_every_notebook_that_has_a_profile(tmp_path):
    "Whatever executes notebooks here says smoke: the profile that a page shows is never run by a test."
    with_profile = [
        p for p in NOTEBOOKS if any("parameters" in tags and "profile" in s for s, tags in sources(read(p)))
    ]
    assert len(with_profile) > 20 and all(job(p, tmp_path)["parameters"] == dict(profile="smoke") for p in with_profile)
    assert not job(ROOT/"nbs/run/plan.ipynb", tmp_path)["parameters"]
