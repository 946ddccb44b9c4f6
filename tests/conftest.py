"What every test shares: one thread, no network, two processes, shards of the slow tests, tiny notebooks."
import os
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
if "PYTEST_XDIST_WORKER" in os.environ: os.environ["SLMKIT_TEST_JOBS"] = "1"  # each process runs one notebook at once
import json, textwrap, zlib
from collections import Counter
from pathlib import Path
import psutil, pytest

ROOT = Path(__file__).parents[1]
PARAMETERS = 'profile = "smoke"\nseed = 0\nrate = 0.5  # of wrong labels\nmodel = ""\ndata = ""\ncolumns = ""'
RECORD = '''
import json, os
class Claim:
    def record(self, value):
        line = dict(claim="tiny", seed=seed, value=value, control=None, arms={"x": value}, rows="", n_rows=0, spec={})
        with open(os.environ["SLMKIT_RECORD"], "a", encoding="utf-8") as f: f.write(json.dumps(line) + "\\n")
c = Claim()
'''

# ---- which tests run, and where

def pytest_addoption(parser):
    parser.addoption("--shard", default="0/1", help="K/N: of the chosen tests the K-th part of N, by the checksum of "
        "their names; K is taken modulo N, so the number of commits will do.")
    parser.addoption("--cpu", type=int, default=0, help="Print the test files that took the most seconds of processor.")

def shard(said):
    "(K modulo N, N) of K/N."
    try: k, n = map(int, said.split("/"))
    except ValueError: raise pytest.UsageError(f"--shard {said}: it has the form K/N, as in 3/12") from None
    if n < 1: raise pytest.UsageError(f"--shard {said}: there must be at least one part")
    return k % n, n

def pytest_collection_modifyitems(config, items):
    k, n = shard(config.getoption("--shard"))
    here = lambda item: zlib.crc32(item.nodeid.encode()) % n == k
    config.hook.pytest_deselected(items=[i for i in items if not here(i)])
    items[:] = filter(here, items)

def pytest_xdist_auto_num_workers(config):
    "Two processes for the whole suite (SLMKIT_TEST_JOBS: another number); none for files named on the command line."
    named = all(Path(a.split("::")[0]).is_file() for a in config.args)
    jobs = int(os.environ.get("SLMKIT_TEST_JOBS", min(2, os.cpu_count())))
    return 0 if named or jobs < 2 else jobs

# ---- seconds of processor, by file: --cpu 20

SPENT = Counter()

def cpu_seconds():
    "Of this process and of all below it, ended ones included."
    total, me = 0., psutil.Process()
    for p in [me, *me.children(recursive=True)]:
        try: total += sum(p.cpu_times()[:4])
        except psutil.Error: continue
    return total

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item):
    if item.config.getoption("--cpu"): item.before = cpu_seconds()
    return (yield)

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item):
    result = yield
    if item.config.getoption("--cpu"): item.user_properties.append(("cpu", cpu_seconds() - item.before))
    return result

def pytest_runtest_logreport(report):
    if report.when == "teardown": SPENT[report.location[0]] += dict(report.user_properties).get("cpu", 0)

def pytest_terminal_summary(terminalreporter, config):
    for name, seconds in SPENT.most_common(config.getoption("--cpu")):
        terminalreporter.write_line(f"{seconds:7.1f} s of processor  {name}")

# ---- notebooks

def code_cell(i, source, tags=()):
    return dict(cell_type="code", id=f"c{i}", source=textwrap.dedent(source).strip(), metadata=dict(tags=list(tags)),
        outputs=[], execution_count=None)

def write_notebook(path, *cells, parameters=PARAMETERS):
    "A notebook of code cells; `parameters` (None for no such cell) is tagged. Gives its path."
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    first = [] if parameters is None else [code_cell(0, parameters, ["parameters"])]
    made = first + [code_cell(i, c) for i, c in enumerate(cells, len(first))]
    spec = dict(kernelspec=dict(name="python3", language="python", display_name="python3"))
    path.write_text(json.dumps(dict(cells=made, metadata=spec, nbformat=4, nbformat_minor=5)), encoding="utf-8")
    return path

@pytest.fixture
def tiny(tmp_path):
    "tiny(name, *cells) writes a notebook into the test's folder."
    return lambda name, *cells, **kw: write_notebook(tmp_path/"nbs"/f"{name}.ipynb", *cells, **kw)

@pytest.fixture(scope="session")
def torch_pool():
    "An executor whose warm process has imported torch, for all tests."
    from slmkit.run.executors import Local
    pool = Local(["torch", "numpy"])
    yield pool
    pool.close()

def run_in(pool, path, out, id="x", **job):
    "Run one notebook in a pool; gives its end event and the executed notebook."
    import nbformat
    from slmkit.run.executors import run_all
    out.mkdir(parents=True, exist_ok=True)
    saved = out/f"{id}.ipynb"
    [e] = run_all(pool, [dict(id=id, notebook=str(path), output=str(saved), log=str(out/f"{id}.log"), **job)], 1)
    return e, nbformat.read(saved, 4) if saved.exists() else None

def executed_in(pool, notebook, tmp_path, name="r", **parameters):
    "Execute it in a pool: its end event and the records it wrote, by claim; none where it wrote none."
    e, _ = run_in(pool, notebook, tmp_path/"out", id=name, parameters=parameters, env=told(notebook, tmp_path, name))
    record = tmp_path/f"{name}.jsonl"
    return e, by_claim(record) if record.exists() else {}

def told(notebook, tmp_path, name):
    "What the runner tells a technique's run by its environment."
    return dict(SLMKIT_RECORD=str(tmp_path/f"{name}.jsonl"), SLMKIT_TECHNIQUE=f"{notebook.parent.name}/{notebook.stem}")

class Failed(Exception): "A notebook did not come to its end."

def ran(notebook, tmp_path, pool, name="run", **parameters):
    "The records of a technique's notebook, by claim, run in a pool with the SLMKIT_DATA of now; Failed says why not."
    env = told(notebook, tmp_path, name) | dict(SLMKIT_DATA=os.environ.get("SLMKIT_DATA", ""))
    e, _ = run_in(pool, notebook, tmp_path/"out", id=name, parameters=parameters, env=env)
    if e["status"] != "ok": raise Failed(f"{e['status']}: {e['error']}")
    return by_claim(tmp_path/f"{name}.jsonl")

def the_record(notebook, tmp_path, pool, name="run", **parameters):
    "The one record of a reproduction, all its claims in it, run in a pool; Failed says why not."
    e, _ = run_in(pool, notebook, tmp_path/"out", id=name, parameters=parameters, env=told(notebook, tmp_path, name))
    if e["status"] != "ok": raise Failed(f"{e['status']}: {e['error']}")
    line, = (tmp_path/f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(line)

def claims_in(notebook):
    "Names of the claims that a notebook declares."
    from slmkit.run.notebooks import declared_in
    return {c["name"] for c in declared_in(notebook)}

def the_same_twice(notebook, tmp_path, pool):
    "The record of a reproduction at smoke: a second run has the same arms, and all its declared claims are in it."
    one, two = (the_record(notebook, tmp_path, pool, name, profile="smoke", seed=3) for name in ("one", "two"))
    assert one["arms"] == two["arms"] and set(one["claims"]) == claims_in(notebook)
    return one

def by_claim(record):
    "What a notebook recorded, by claim."
    from slmkit.run.batch import recorded
    lines, torn = recorded(record)
    assert not torn, record
    return {line["claim"]: line for line in lines}
