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
    "A warm process that has imported torch, for all tests."
    from slmkit.run.warm import WarmPool
    pool = WarmPool(["torch", "numpy"])
    yield pool
    pool.close()

def run_in(pool, path, out, id="x", **job):
    "Run one notebook in a pool; gives its end event and the executed notebook."
    import nbformat
    out.mkdir(parents=True, exist_ok=True)
    pool.start(dict(id=id, notebook=str(path), output=str(out/f"{id}.ipynb"), log=str(out/f"{id}.log"), **job))
    while True:
        for e in pool.events(1):
            if e["event"] == "end" and e["id"] == id:
                saved = out/f"{id}.ipynb"
                return e, nbformat.read(saved, 4) if saved.exists() else None

def executed(notebook, tmp_path, monkeypatch, name="run", **parameters):
    "Execute a technique's notebook; the records it wrote, by claim."
    import papermill
    record, technique = tmp_path/f"{name}.jsonl", f"{notebook.parent.name}/{notebook.stem}"
    monkeypatch.setenv("SLMKIT_RECORD", str(record)); monkeypatch.setenv("SLMKIT_TECHNIQUE", technique)
    papermill.execute_notebook(str(notebook), str(tmp_path/f"{name}.ipynb"), parameters, progress_bar=False)
    return by_claim(record)

def executed_in(pool, notebook, tmp_path, name="r", **parameters):
    "Execute it in a pool: its end event and the records it wrote, by claim; none where it wrote none."
    record, technique = tmp_path/f"{name}.jsonl", f"{notebook.parent.name}/{notebook.stem}"
    env = dict(SLMKIT_RECORD=str(record), SLMKIT_TECHNIQUE=technique)
    e, _ = run_in(pool, notebook, tmp_path/"out", id=name, parameters=parameters, env=env)
    return e, by_claim(record) if record.exists() else {}

def by_claim(record): return {r["claim"]: r for r in map(json.loads, record.read_text().splitlines())}
