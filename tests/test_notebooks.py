"Every notebook is a test: run at smoke in a fork of one warm process, two at a time, each with a limit of its own."
import os, time
import pytest
from conftest import ROOT
from slmkit.run.notebooks import parameters, read, sources
from slmkit.run.warm import STACK, WarmPool

NOTEBOOKS = sorted(p for p in ROOT.glob("nbs/**/*.ipynb") if not any(part[0] in "._" for part in p.relative_to(ROOT).parts))
AT_ONCE, LIMIT = int(os.environ.get("SLMKIT_TEST_JOBS", 2)), float(os.environ.get("SLMKIT_TEST_LIMIT", 180))
name = lambda p: p.relative_to(ROOT).as_posix()

class Notebooks:
    "Keeps two notebooks running while the tests ask for their results one by one."
    def __init__(self, wanted, folder): self.todo, self.folder, self.done, self.pool = list(wanted), folder, {}, WarmPool(STACK)
    def start(self, p):
        tagged = any("parameters" in tags for _, tags in sources(read(p)))
        smoke = dict(profile="smoke") if tagged and "profile" in parameters(read(p)) else {}
        out = self.folder/name(p).replace("/", "."); env = dict(SLMKIT_RECORD=str(out) + ".claims", IN_TEST="1")
        self.pool.start(dict(id=name(p), notebook=str(p), output=str(out), log=f"{out}.log", parameters=smoke, cwd=str(p.parent), env=env, timeout=LIMIT))
    def result(self, p):
        if p in self.todo: self.todo.remove(p); self.todo.insert(0, p)
        while name(p) not in self.done:
            while self.todo and len(self.pool.live) < AT_ONCE: self.start(self.todo.pop(0))
            self.done |= {e["id"]: e for e in self.pool.events(1) if e["event"] == "end"}
        return self.done[name(p)]

@pytest.fixture(scope="session")
def notebooks(request, tmp_path_factory):
    wanted = [i.callspec.params["path"] for i in request.session.items if "path" in getattr(getattr(i, "callspec", None), "params", {})]
    n = Notebooks(wanted, tmp_path_factory.mktemp("notebooks"))
    yield n
    n.pool.close()

@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook(path, notebooks):
    e = notebooks.result(path)
    assert e["status"] == "ok", f"{name(path)}: {e['status']}: {e['error']}; executed notebook and log in {notebooks.folder}"
