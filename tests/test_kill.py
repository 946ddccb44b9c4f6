"SIGKILL at thirty random moments, of the runner, its fork server or a run: none that finished is lost."

import collections, json, os, random, signal, subprocess, sys, time
import nbformat, psutil
from conftest import RECORD
from slmkit.run import records
from test_runner import RIGHT, right

RUNS, KILLS = 24, 30

def check(folder, before):
    "Every record of the folder: the earlier ones unchanged, each with its right number and a whole notebook."
    found, torn = records.reading(folder)
    assert torn == 0 and found[:len(before)] == before
    for r in found:
        if r["status"] != "ok": continue
        assert r["claims"]["tiny"]["value"] == right(r["seed"], .5)
        nb = nbformat.read(folder/r["notebook"], 4); nbformat.validate(nb)
        assert [c.metadata.papermill.status for c in nb.cells] == ["completed"]*len(nb.cells)
    return found

def wait_for_a_run(folder, runner):
    "Until a notebook is being executed."
    old = {p.parent.name for p in folder.glob("running/*/notebook.ipynb")}
    end = time.time() + 20
    while (
        time.time() < end
        and runner.poll() is None
        and not {p.parent.name for p in folder.glob("running/*/notebook.ipynb")} - old
    ):
        time.sleep(0.01)

def victim(runner, rng):
    "The runner itself, or one of its processes."
    family = runner.children(recursive=True)
    return rng.choice([runner, rng.choice(family)]) if family else runner

def test_kill_and_resume(tiny, tmp_path):
    path, folder, rng = tiny("t", *RIGHT, "import time; time.sleep(.05)"), tmp_path/"r", random.Random(0)
    cmd = [
        sys.executable,
        "-c",
        "from slmkit.cli.main import main; main()",
        "run",
        str(path),
        "--profile",
        "smoke",
        "--seeds",
        f"0-{RUNS - 1}",
        "--out",
        str(folder),
        "--jobs",
        "2",
        "--quiet",
        "--force",
    ]
    found, killed, alive = [], collections.Counter(), None
    for _ in range(KILLS):
        if alive is None or alive.poll() is not None:
            alive = subprocess.Popen(cmd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if rng.random() < .7: wait_for_a_run(folder, alive)  # the others die while they plan or warm up
        time.sleep(rng.random())
        try:
            p = victim(psutil.Process(alive.pid), rng); name = "runner" if p.pid == alive.pid else "below"
            p.kill(); killed[name] += 1
            if name == "runner": alive.wait()
        except psutil.NoSuchProcess:
            pass
        found = check(folder, found)
    if alive.poll() is None: alive.kill(); alive.wait()
    found = check(folder, found)
    # without --force: finish the rest
    done = subprocess.run(cmd[:-1], capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    found = check(folder, found)
    assert {r["seed"] for r in found if r["status"] == "ok"} == set(range(RUNS)) and not list(
        (folder / "running").iterdir()
    )
    statuses = collections.Counter(r["status"] for r in found)
    print(f"killed: {dict(killed)}; records: {dict(statuses)}")
    assert (
        killed["runner"] >= 5
        and killed["below"] >= 5
        and statuses["ok"] > RUNS
        and set(statuses) <= {"ok", "memory"}
    )
