"The runner against plain papermill: the same notebooks with equal outputs, memory, and planning of cached runs."
import json, os, platform, re, shutil, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from common import options, show
from slmkit.core.settings import KitError, project_root
from slmkit.files import whole
from slmkit.run.batch import execute
from slmkit.run.executors import STACK, Local, environment
from slmkit.run.plan import chosen, plan
from slmkit.run.records import commit, versions

TINY = ["import torch, transformers, datasets\nimport matplotlib.pyplot as plt",
    "torch.manual_seed(seed)\nx = torch.rand(64, 64)",
    "for _ in range(20): y = torch.tanh(x @ x / 8)\nprint(f'{y.sum().item():.6f}')", "plt.plot(x[0]);"]

def tiny(path): # to write
    "Write the tiny notebook; gives the path."
    from nbformat.v4 import new_code_cell, new_notebook, writes
    cells = [new_code_cell('profile = "smoke"\nseed = 0', metadata=dict(tags=["parameters"])),
        *map(new_code_cell, TINY)]
    spec = dict(kernelspec=dict(name="python3", language="python", display_name="python3"))
    Path(path).write_text(writes(new_notebook(cells=cells, metadata=spec)), encoding="utf-8")
    return Path(path)

def command(
    run,    # of `plan`
    folder, # for the executed notebook
):
    "Papermill's command line for a run."
    given = [a for k in ("seed", "profile") for a in ("-p", k, str(run["given"][k]))]
    return [sys.executable, "-m", "papermill", "--no-progress-bar", "-k", "python3", run["path"],
            str(Path(folder, f"{run['id']}.ipynb")), *given]

def by_papermill(
    runs,   # of `plan`
    folder, # for the executed notebooks
    side=1, # processes side by side
):
    "Seconds that papermill's command line takes for all runs."
    quiet = dict(env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    def one(run):
        done = subprocess.run(command(run, folder), cwd=Path(run["path"]).parent, **quiet)
        if done.returncode: raise KitError(f"bench: papermill failed: {' '.join(done.args[6:8])}")
    begun = time.monotonic()
    with ThreadPoolExecutor(side) as pool: list(pool.map(one, runs))
    return time.monotonic() - begun

def by_slmkit(
    runs,   # of `plan`
    folder, # run folder
    jobs=2, # at once
):
    "Seconds that the runner takes for all runs, its warm-up included; KitError if one failed."
    begun = time.monotonic()
    bad = [r for r in execute(runs, folder, jobs=jobs, force=True) if r["status"] != "ok"]
    if bad: raise KitError(f"bench: {bad[0]['technique']}: {bad[0]['status']}: {bad[0]['error']}")
    return time.monotonic() - begun

def plain(text): "Text without addresses and times."; return re.sub(r"0x[0-9a-f]+|\d+\.\d+ ?m?s\b", "", text)

def texts(path): # of an executed notebook
    "What a notebook printed and gave, without figures, warnings, addresses and times."
    import nbformat
    out = [o for c in nbformat.read(path, 4).cells if c.cell_type == "code" for o in c.get("outputs", [])]
    said = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in out if o.get("name") != "stderr"]
    return [plain(t) for t in said if t]

def executed(folder, run):
    "The executed notebook of a run, in papermill's folder or in a run folder."
    flat = Path(folder, f"{run['id']}.ipynb")
    return flat if flat.exists() else Path(folder, run["id"], "notebook.ipynb")

def compare(
    runs, # of `plan`
    a, b, # folders of executed notebooks
):
    "KitError unless both folders' notebooks say the same."
    for r in runs:
        x, y = (texts(executed(f, r)) for f in (a, b))
        if x != y: raise KitError(f"bench: {r['id']} says other things under papermill: {x} and {y}"[:300])
    return len(runs)

def memory_below(process): # psutil.Process
    "MB that the processes below it take together; pages that they share count once (Linux)."
    import psutil
    total = 0
    for p in process.children(recursive=True):
        try: info = p.memory_full_info()
        except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied): continue
        total += getattr(info, "pss", info.uss)
    return round(total/2**20)

def memory(side=2): # runs at once
    "MB at most while runs of the tiny notebook go on side by side: the fork server, the runs, what they share once."
    import psutil
    folder, most, pool = Path(tempfile.mkdtemp()), 0, Local(STACK)
    path = tiny(folder/"tiny.ipynb")
    text = path.read_text(encoding="utf-8").replace("plt.plot(x[0]);", "import time; time.sleep(2)")
    path.write_text(text, encoding="utf-8")
    for i in range(side):
        pool.start(dict(id=i, notebook=str(path), output=str(folder/f"{i}.ipynb"), log=str(folder/"log.txt")))
    while pool.live:
        pool.events(.1)
        most = max(most, memory_below(psutil.Process()))
    shutil.rmtree(folder)
    return dict(memory_mb=most)

def one_round(
    runs,   # of `plan`
    folder, # for all that is made
    side,   # processes at once
):
    "Seconds of the three ways, after their outputs were found equal."
    places = [Path(folder, k) for k in ("plain", "side", "slmkit")]
    for p in places: p.mkdir(parents=True)
    t = dict(slmkit=by_slmkit(runs, places[2], side), side=by_papermill(runs, places[1], side))
    t["plain"] = by_papermill(runs, places[0])
    compare(runs, places[0], places[2])
    compare(runs, places[1], places[2])
    return {k: round(v, 2) for k, v in t.items()}

def machine():
    "Where and with what this was measured."
    return dict(load=os.getloadavg()[0], cores=os.cpu_count(), machine=platform.machine(), versions=versions(),
                commit=commit(project_root()))

def bench(
    n=16,     # runs of the tiny notebook
    rounds=1, # of everything, one after the other
    suite=False, # the project's techniques at smoke instead
    side=2,   # processes at once, ours and papermill's
):
    "Times and ratios: plain papermill, `side` of it at once, and slmkit, on the same runs with equal outputs."
    folder = Path(tempfile.mkdtemp(prefix="slmkit-bench-"))
    wanted = chosen([], all=True) if suite else [("tiny", tiny(folder/"tiny.ipynb"))]
    runs = plan(wanted, "smoke", [0] if suite else range(n))
    times = [one_round(runs, folder/str(i), side) for i in range(rounds)]
    ratio = lambda k: [round(t[k]/t["slmkit"], 2) for t in times]
    shutil.rmtree(folder)
    return dict(runs=len(runs), side=side, seconds=times, ratio_to_plain=ratio("plain"), ratio_to_side=ratio("side"),
                equal_outputs=True, **memory(side), **machine())

def planning(n=10_000): # cached runs
    "Seconds to plan and resume so many cached runs."
    folder = Path(tempfile.mkdtemp(prefix="slmkit-bench-"))
    path = tiny(folder/"tiny.ipynb")
    first = plan([("tiny", path)], "smoke", range(n))
    made = dict(versions=versions(), status="ok", date="2026-01-01T00:00:00", hardware=None, claims={}, error=None,
        seconds=1)
    keep = "technique", "profile", "seed", "parameters", "hashes"
    for r in first: whole(folder/r["id"]/"record.json", json.dumps({k: r[k] for k in keep} | made))
    begun = time.monotonic()
    done = execute(plan([("tiny", path)], "smoke", range(n)), folder)
    seconds = round(time.monotonic() - begun, 2)
    shutil.rmtree(folder)
    return dict(cached_runs=len(done), seconds=seconds)

def measure(n, rounds, side, suite):
    "Everything that this script prints."
    return bench(n, rounds, suite, side) | dict(planning=planning())

parser = options(__doc__, n=16, rounds=1, side=2)
parser.add_argument("--suite", action="store_true", help="the project's techniques at smoke instead of n tiny runs")
if __name__ == "__main__": show(measure, parser)
