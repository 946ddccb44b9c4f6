"What every test shares: one thread, no network, and tiny notebooks written on the spot."
import os
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
import json, textwrap
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
PARAMETERS = 'profile = "smoke"\nseed = 0\nrate = 0.5  # of wrong labels\nmodel = ""\ndata = ""\ncolumns = ""'
RECORD = '''
import json, os
class Claim:
    def record(self, value):
        line = dict(claim="tiny", seed=seed, value=value, control=None, arms={"x": value}, rows="", n_rows=0, spec={})
        with open(os.environ["SLMKIT_RECORD"], "a") as f: f.write(json.dumps(line) + "\\n")
c = Claim()
'''

def write_notebook(path, *cells, parameters=PARAMETERS):
    "A notebook of code cells; `parameters` (None for no such cell) is tagged. Gives its path."
    path = Path(path); path.parent.mkdir(parents=True, exist_ok=True)
    made = [dict(cell_type="code", id=f"c{i}", source=textwrap.dedent(c).strip(), metadata=dict(tags=["parameters"] if tagged else []),
        outputs=[], execution_count=None) for i, (c, tagged) in enumerate([(parameters, True)]*(parameters is not None) + [(c, False) for c in cells])]
    spec = dict(kernelspec=dict(name="python3", language="python", display_name="python3"))
    path.write_text(json.dumps(dict(cells=made, metadata=spec, nbformat=4, nbformat_minor=5)))
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

def executed(notebook, tmp_path, monkeypatch, name="run", **parameters):
    "Execute a technique's notebook; the records it wrote, by claim. Its failure is papermill's."
    from papermill import PapermillExecutionError
    from slmkit.run.executors import Local
    pool = Local(["torch", "numpy"])
    e, nb = run_in(pool, notebook, tmp_path, id=name, parameters=parameters, env=told(notebook, tmp_path, name))
    for c in nb.cells:
        for o in c.get("outputs", []):
            if e["status"] != "ok" and o.output_type == "error":
                raise PapermillExecutionError(0, c.execution_count, c.source, o.ename, o.evalue, o.traceback)
    assert e["status"] == "ok", e
    return by_claim(tmp_path/f"{name}.jsonl")

def executed_in(pool, notebook, tmp_path, name="r", **parameters):
    "Execute it in a pool: its end event and the records it wrote, by claim; none where it wrote none."
    e, _ = run_in(pool, notebook, tmp_path/"out", id=name, parameters=parameters, env=told(notebook, tmp_path, name))
    record = tmp_path/f"{name}.jsonl"
    return e, by_claim(record) if record.exists() else {}

def told(notebook, tmp_path, name):
    "What the runner tells a technique's run by its environment."
    return dict(SLMKIT_RECORD=str(tmp_path/f"{name}.jsonl"), SLMKIT_TECHNIQUE=f"{notebook.parent.name}/{notebook.stem}")

def by_claim(record): return {r["claim"]: r for r in map(json.loads, record.read_text().splitlines())}
