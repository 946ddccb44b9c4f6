"Benchmarks (tests/benchmarks) compare before they time: what differs, or is missing, is said."
import copy, importlib.util, json, subprocess, sys
import pytest, torch
from conftest import ROOT
from slmkit.core.settings import KitError
sys.path.insert(0, str(ROOT/"tests/benchmarks"))
import common, fit, generate, kd_head, seeds
torch.set_num_threads(1)
SMALL = dict(rows=2, length=8, steps=2, repeats=1)
FOUR = dict(tokens=64, vocab=128, student=8, teacher=12)

def without(monkeypatch, *packages):
    "As if these packages were not installed."
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in packages else real(name, *a))

@pytest.mark.parametrize("model", ["lm-1m", "t5-1m"])
def test_fit_and_the_trainer_make_the_same_updates(model):
    start = common.load(model).double()
    batches = common.draws(start, 4, 12, 6)
    one, two = copy.deepcopy(start), copy.deepcopy(start)
    fit.ours(one, batches, .01)
    fit.trainer(two, batches, .01).train()
    assert common.same(one, two, start, "fit") < .02
    assert common.furthest(one, start) > .005

def test_a_trainer_that_does_something_else_is_not_timed(monkeypatch):
    other = fit.trainer
    monkeypatch.setattr(fit, "trainer", lambda m, batches, lr: other(m, batches[::-1], lr))
    with pytest.raises(KitError, match="not timed"): fit.bench(**SMALL)

def test_replicas_that_differ_are_not_timed(monkeypatch):
    other = seeds.replicas
    wrong = lambda start, n, batches, stacked, lr: other(start, n, batches, stacked, lr*(1 + stacked))
    monkeypatch.setattr(seeds, "replicas", wrong)
    with pytest.raises(KitError, match="not timed"): seeds.bench(n=2, **SMALL)

def test_heads_that_differ_are_not_timed():
    from slmkit.distill.kd_head import kd_head as ours
    wrong = dict(slmkit=ours, peer=lambda *x: ours(*x, temperature=1.001))
    with pytest.raises(KitError, match="peer is off by .*not timed"):
        kd_head.differences(wrong, kd_head.draw(*FOUR.values()))

def test_tokens_that_differ_are_not_timed(monkeypatch):
    other = generate.theirs
    monkeypatch.setattr(generate, "theirs", lambda *a: (other(*a) + 1) % 60)
    with pytest.raises(KitError, match="2 of 2 rows differ"): generate.bench("lm-1m", "2", 8, 4, 1)

def test_a_token_in_doubt_may_differ_and_what_follows_it():
    one, two = torch.tensor([[3, 4, 5], [3, 4, 5]]), torch.tensor([[3, 4, 5], [3, 6, 5]])
    assert generate.disagree(one, two, torch.ones(2, 3)) == 1
    assert generate.disagree(one, one, torch.ones(2, 3)) == 0
    assert generate.disagree(one, two, torch.tensor([[1., 1., 1.], [1., 1e-6, 1.]])) == 0

def test_a_missing_peer_is_named_and_the_own_figure_stays(monkeypatch):
    without(monkeypatch, "accelerate")
    out = fit.bench(**SMALL)
    assert out["missing"] == ["accelerate"]
    assert set(out["seconds"]) == {"slmkit"} and "ratio" not in out

def test_missing_heads_are_named_and_the_rest_is_measured(monkeypatch):
    without(monkeypatch, "trl", "liger_kernel")
    out = json.loads(json.dumps(kd_head.bench(**FOUR, repeats=3, compiled=False)))
    assert out["missing"] == ["trl", "liger_kernel"]
    assert set(out["seconds"]) == {"slmkit", "slmkit_torch", "products"}
    assert {"torch", "python"} <= set(out["versions"])
    assert out["hardware"]
    s = out["seconds"]["slmkit"]
    assert s["least"] <= s["median"] <= s["most"]

def test_figures_of_rounds():
    assert common.spread([3, 1, 2]) == dict(median=2, least=1, most=3)
    assert common.ratio(dict(a=[2, 6], b=[1, 2]), "a", "b")["median"] == 2.5

@pytest.mark.parametrize("module,argv,found", [
    (fit, "--rows 2 --length 8 --steps 2 --repeats 1", {"seconds", "ratio", "difference"}),
    (seeds, "--n 2 --rows 2 --length 8 --steps 2 --repeats 1", {"seconds", "ratio", "times_of_one", "difference"}),
    (generate, "--models lm-1m --rows 2 --length 8 --new 8 --repeats 2", {"runs"}),
    (kd_head, "--tokens 64 --vocab 128 --student 8 --teacher 12 --repeats 1 --eager", {"seconds", "ratio", "peak_mb"})])
def test_each_prints_json_with_versions_and_hardware(module, argv, found, capsys):
    common.show(module.bench, module.parser, argv.split())
    out = json.loads(capsys.readouterr().out)
    assert found | {"versions", "hardware", "cores", "commit"} <= set(out)
    assert out["versions"]["torch"] and out["hardware"]

@pytest.mark.parametrize("module", [fit, seeds, generate, kd_head])
def test_what_can_not_be_measured_is_one_line(module):
    with pytest.raises(SystemExit) as e: common.show(module.bench, module.parser, ["--repeats", "0"])
    assert "--repeats 0 must be at least 1" in e.value.code and "\n" not in e.value.code

def test_a_script_runs_by_itself_and_says_what_it_takes():
    script = ROOT/"tests/benchmarks/kd_head.py"
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0
    assert all(option in done.stdout for option in ("--repeats", "--alone", "--eager"))
