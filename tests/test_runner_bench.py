"The benchmark compares before it times: what differs is said, and what can't be measured is no figure."
import json
import sys
import nbformat, pytest
from conftest import ROOT
from slmkit.cli.main import main
from slmkit.core.settings import KitError
from slmkit.run.plan import plan
sys.path.insert(0, str(ROOT/"tests/benchmarks"))
import common, runner as bench

@pytest.fixture
def runs(tmp_path): return plan([("tiny", bench.tiny(tmp_path/"tiny.ipynb"))], "smoke", [0, 1])

def test_both_ways_say_the_same_and_are_timed(runs, tmp_path):
    times = bench.one_round(runs, tmp_path/"round", 2)
    assert set(times) == {"slmkit", "side", "plain"} and min(times.values()) > 0
    said = bench.texts(bench.executed(tmp_path/"round/slmkit", runs[0]))
    other = bench.texts(bench.executed(tmp_path/"round/slmkit", runs[1]))
    assert float(said[0]) != float(other[0]) and said[1:] == other[1:]

def test_runs_that_say_other_things_are_not_timed(runs, tmp_path):
    for folder, said in (("a", "1.5"), ("b", "2.5")):
        nb = nbformat.read(runs[0]["path"], 4)
        nb.cells[-1].outputs = [nbformat.v4.new_output("stream", text=said)]
        (tmp_path/folder).mkdir()
        nbformat.write(nb, tmp_path/folder/f"{runs[0]['id']}.ipynb")
    with pytest.raises(KitError, match="says other things"): bench.compare(runs[:1], tmp_path/"a", tmp_path/"b")

def test_a_failed_run_is_no_time(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "execute", lambda *a, **kw: [dict(technique="tiny", status="memory", error="killed")])
    with pytest.raises(KitError, match="tiny: memory: killed"): bench.by_slmkit(runs, tmp_path)
    with pytest.raises(KitError, match="papermill failed"):
        bench.by_papermill([dict(runs[0], path="/nowhere.ipynb")], tmp_path)

def test_planning_counts_every_cached_run(): assert bench.planning(50)["cached_runs"] == 50

def test_the_script_prints_json(monkeypatch, capsys):
    monkeypatch.setattr(bench, "bench", lambda n, rounds, suite, side: dict(runs=n, side=side) | bench.machine())
    monkeypatch.setattr(bench, "planning", lambda: dict(seconds=1))
    common.show(bench.measure, bench.parser, ["--n", "3"])
    out = json.loads(capsys.readouterr().out)
    assert out["runs"] == 3 and out["versions"]["torch"] and out["planning"] == dict(seconds=1)
    with pytest.raises(SystemExit) as e: common.show(bench.measure, bench.parser, ["--n", "0"])
    assert "--n 0 must be at least 1" in e.value.code

def test_the_verb_runs_the_script(capfd):
    with pytest.raises(SystemExit) as e: main(["bench", "--help"])
    assert not e.value.code and "--suite" in capfd.readouterr().out
