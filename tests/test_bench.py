"Benchmarks compare before they time: what differs, or is missing, is said."
import copy, importlib.util, json
import pytest, torch
from slmkit.core.settings import KitError
from slmkit.cli import bench_fit
from slmkit.cli.main import main
torch.set_num_threads(1)
SMALL = dict(rows=2, length=8, steps=2, repeats=1)

@pytest.mark.parametrize("model", ["lm-1m", "t5-1m"])
def test_fit_and_the_trainer_make_the_same_updates(model):
    start = bench_fit.load(model); batches = bench_fit.draws(start, 4, 12, 6)
    one, two = copy.deepcopy(start), copy.deepcopy(start)
    bench_fit.ours(one, batches, .01); bench_fit.trainer(two, batches, .01).train()
    assert bench_fit.same(one, two, start, "fit") < .02 and bench_fit.furthest(one, start) > .005

def test_a_trainer_that_does_something_else_is_not_timed(monkeypatch):
    other = bench_fit.trainer
    monkeypatch.setattr(bench_fit, "trainer", lambda m, batches, lr: other(m, batches[::-1], lr))
    with pytest.raises(KitError, match="not timed"): bench_fit.bench_fit(**SMALL)

def test_replicas_that_differ_are_not_timed(monkeypatch):
    other = bench_fit.replicas
    monkeypatch.setattr(bench_fit, "replicas", lambda start, n, batches, stacked, lr: other(start, n, batches, stacked, lr*(1 + stacked)))
    with pytest.raises(KitError, match="not timed"): bench_fit.bench_seeds(n=2, **SMALL)

def test_a_missing_peer_is_named_and_the_own_figure_stays(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "accelerate" else real(name, *a))
    out = bench_fit.bench_fit(**SMALL)
    assert out["missing"] == ["accelerate"] and set(out["seconds"]) == {"slmkit"} and "ratio" not in out

def test_the_verbs_print_json_with_versions_and_hardware(capsys):
    with pytest.raises(SystemExit) as e: main(["bench", "seeds", "--n", "2", "--rows", "2", "--length", "8", "--steps", "2", "--repeats", "1"])
    assert not e.value.code
    out = json.loads(capsys.readouterr().out)
    assert out["replicas"] == 2 and out["versions"]["torch"] and out["hardware"] and out["difference"] < .1
    for verb in ("fit", "seeds"):
        with pytest.raises(SystemExit) as e: main(["bench", verb, "--rows", "0"])
        assert e.value.code and "--rows 0 must be at least 1" in capsys.readouterr().err
