"slmkit tune: it runs what tries rates and nothing else, and stores whole tables or nothing."
import json
import pytest
from conftest import ROOT, write_notebook
from slmkit.cli import tune as verb
from slmkit.cli.main import main
from slmkit.core.settings import KitError
from slmkit.core.tuning import complaints, tuning

TRIAL = '''
from slmkit.core.settings import settings
from slmkit.core.tuning import best_rate, tune
cfg = settings(profile, smoke=dict(model="lm-0.1m", data="topics"), cpu=dict(model="lm-1m", data="topics"))
class Trial:
    def __init__(self, cfg, seed, kind="causal", **knobs):
        self.cfg, self.seed, self.kind, self.knobs = cfg, seed, kind, knobs
t = Trial(cfg, seed)
'''
BOTH = 'tune("both", t, lr=[1e-3, 3e-3, 1e-2], score=lambda t, rate: {1e-3: .1, 3e-3: .4, 1e-2: .2}[rate] + t.seed)'
LABEL = 'tune("label", t, lr=[1e-3, 3e-3], score=lambda t, rate: rate)'
NONE = 'tune("untrained", t)'

@pytest.fixture
def project(tmp_path, monkeypatch):
    "project(*cells): a project of one technique with these cells; its tables go to a folder of its own."
    (tmp_path/"settings.ini").write_text("[slmkit]\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verb, "package_folder", lambda: tmp_path)
    monkeypatch.setenv("SLMKIT_TEST_JOBS", "1")
    return lambda *cells, name="idea": write_notebook(tmp_path/f"nbs/distill/{name}.ipynb", TRIAL, *cells)

def test_the_trials_are_made_and_stored(project, tmp_path, capsys):
    project(BOTH, NONE, "assert best_rate('both') == 3e-3\n" + LABEL, "raise ValueError('not to be run')")
    with pytest.raises(SystemExit) as e: main(["tune", "distill/idea", "--profile", "smoke"])
    assert e.value.code == 0
    stored = tuning(tmp_path/"tuning/idea.lm-0.1m.topics.json")
    assert stored.keys() == {"both", "label", "untrained"} and stored["both"]["best"] == 3e-3
    said = capsys.readouterr().out
    assert "both: 0.001: 0.6  0.003: 0.9*  0.01: 0.7  (mean over seeds 0, 1)" in said
    assert "! arms with unequal numbers of trials (both 6, label 4)" in said
    assert "! the best rate of 'label', 0.003, is at the edge" in said and "untrained: no rate" in said

def test_a_second_call_makes_the_table_anew(project, tmp_path):
    project(BOTH, NONE)
    verb.tuned("idea", "smoke", tmp_path/"runs")
    project(NONE)
    path, = verb.tuned("idea", "smoke", tmp_path/"runs")
    assert list(tuning(path)) == ["untrained"]

def test_a_failure_stores_nothing(project, tmp_path):
    project(BOTH, "1/0", LABEL)
    with pytest.raises(KitError, match="ZeroDivisionError.*nothing is stored") as e:
        verb.tuned("idea", "smoke", tmp_path/"runs")
    assert "\n" not in str(e.value) and not (tmp_path/"tuning").exists()

@pytest.mark.parametrize("argv, line", [
    (["tune", "ideo"], "no technique 'ideo': did you mean 'idea'?"),
    (["tune", "idea", "--profile", "cpo"], "no profile 'cpo': did you mean 'cpu'?"),
    (["tune", "idea", "--profile", "smoke"], "idea: no cell of it calls tune(...): there is nothing to try"),
])
def test_what_can_not_be_tuned_is_said_in_a_line(project, capsys, argv, line):
    project(BOTH if "--profile" in argv and argv[-1] == "cpo" else "t.tune('both')")
    with pytest.raises(SystemExit) as e: main(argv)
    assert e.value.code != 0 and capsys.readouterr().err == f"slmkit: {line}\n"

def trials(lr, best, seeds=(0, 1)): return dict(lr=lr, seeds=list(seeds), scores=[[0.]*len(seeds)]*len(lr), best=best)

def test_fair_and_finished_trials_are_not_complained_of():
    grid = [1e-3, 3e-3, 1e-2]
    assert complaints({}) == []
    assert complaints(dict(a=trials(grid, 3e-3), b=trials([.1, .3, 1.], .3), c=trials([], None, ()))) == []

def test_unequal_trials_and_edges_are_complained_of():
    one = trials([1e-3, 3e-3, 1e-2], 3e-3)
    assert "(a 6, b 3)" in complaints(dict(a=one, b=trials([1e-3, 3e-3, 1e-2], 3e-3, [0])))[0]
    for best in (1e-3, 1e-2):
        assert f"{best:g}, is at the edge" in complaints(dict(a=one | dict(best=best)))[0]
    assert "at the edge" in complaints(dict(a=trials([1e-3], 1e-3)))[0]

def test_the_tables_of_the_project_are_fair():
    tables = {p.name: complaints(tuning(p)) for p in sorted((ROOT/"slmkit/tuning").glob("*.json"))}
    assert not {name: said for name, said in tables.items() if said}

def test_check_reports_what_is_unfair(project, tmp_path):
    from slmkit.project.check import check
    folder = tmp_path/"slmkit/tuning"
    folder.mkdir(parents=True)
    (folder/"a.m.d.json").write_text(json.dumps(dict(both=trials([1e-3, 3e-3], 1e-3))), encoding="utf-8")
    (tmp_path/"nbs").mkdir(exist_ok=True)
    found = [line for line in check(tmp_path) if line.startswith("slmkit/tuning/")]
    assert found == ["slmkit/tuning/a.m.d.json: the best rate of 'both', 0.001, is at the edge of its grid: "
                     "widen the grid for all arms"]
