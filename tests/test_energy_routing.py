"""Energy routing: energy against torch, thresholds against the curve, an oracle's gain, FLOPs, bad input."""
import math
import numpy as np, pytest, torch
from functools import partial
from pathlib import Path
from conftest import ran
from slmkit.core.zoo import load_model
from slmkit.infer.cascades import mix
from slmkit.infer.energy_routing import classified, energy, routed, threshold, unsure

NB = Path(__file__).parents[1]/"nbs/infer/energy_routing_repro.ipynb"

def case(seed, n=12):
    "A score without ties, two models' qualities."
    rng = np.random.default_rng(seed)
    return rng.permutation(n).astype(float), (rng.random(n) < .5).astype(float), (rng.random(n) < .7).astype(float)

@pytest.mark.parametrize("seed", range(6))
def test_thresholds_are_those_of_every_cascade_tried(seed):
    score, small, large = case(seed)
    every = [routed(score, small, large, t) for t in [np.inf, *np.sort(score)[::-1]]]
    for budget, goal in ((.5, np.inf), (.8, np.inf), (2., .6), (.6, .7)):
        found = routed(score, small, large, threshold(score, small, large, .25, 1., budget, goal))
        allowed = [e for e in every if .25 + e["deferred"] <= budget]
        enough = [e for e in allowed if e["accuracy"] >= goal - 1e-9]
        want = enough[0] if enough else max(allowed, key=lambda e: round(e["accuracy"], 9))
        assert found["deferred"] == want["deferred"] and found["accuracy"] == pytest.approx(want["accuracy"])

def test_no_rule_gains_more_than_the_oracle_and_random_is_between_the_models():
    for seed in range(9):
        score, small, large = case(seed)
        found = routed(score, small, large, 5.)
        assert found["accuracy"] <= found["oracle"] + 1e-12
        drawn = [np.random.default_rng(i).permutation(12).astype(float) for i in range(400)]
        every = [routed(d, small, large, 5.)["accuracy"] for d in drawn]
        assert np.mean(every) == pytest.approx(found["random"], abs=.03)

@pytest.mark.parametrize("temperature", [.1, .5, 1., 2., 5.])
def test_energy_is_torchs_logsumexp(temperature):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 7, generator=g, dtype=torch.float64)*5
    x.requires_grad_()
    want = -temperature*torch.logsumexp(x/temperature, -1)
    assert torch.allclose(energy(x, temperature), want, atol=1e-12)
    ours, theirs = (torch.autograd.grad(e.sum(), x)[0] for e in (energy(x, temperature), want))
    assert torch.allclose(ours, theirs, atol=1e-12) and torch.allclose(ours, -(x/temperature).softmax(-1), atol=1e-12)

def test_energy_overflows_nowhere_and_sees_what_softmax_does_not():
    huge = torch.tensor([[1e4, -1e4], [-1e4, -2e4]])
    assert torch.allclose(energy(huge, .1), torch.tensor([-1e4, 1e4]))
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one, two = unsure(x, 2.), unsure(x + 3, 2.)
    assert np.allclose(two["energy"], one["energy"] - 3)
    assert all(np.allclose(one[k], two[k]) for k in ("softmax", "entropy"))

def test_unsure_is_scipys_entropy_and_the_largest_probability():
    from scipy.stats import entropy
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(2))*3
    for t in (.5, 1., 3.):
        p, got = (x.double()/t).softmax(-1).numpy(), unsure(x, t)
        assert np.allclose(got["entropy"], entropy(p, axis=1)) and np.allclose(got["softmax"], -p.max(1))

def test_padding_and_neighbours_do_not_matter():
    rows = mix("intents,topics", "test", 3, 0)
    names = sorted({r["label"] for r in rows})
    model, tok = load_model("bert-1m", seed=0, kind="classifier", num_labels=len(names))
    alone = torch.cat([classified(model, tok, [r], names).logits for r in rows])
    assert torch.allclose(classified(model, tok, rows, names).logits, alone, atol=1e-4)

# ---- the notebook

run = partial(ran, NB)

@pytest.mark.slow
def test_same_seed_same_record(tmp_path, torch_pool):
    one, two = (run(tmp_path, torch_pool, name, profile="smoke", seed=3) for name in ("one", "two"))
    assert one == two
    assert set(one) == {"energy-is-not-worse", "cascade-beats-super-at-ratio-ten", "cheaper-at-ratio-ten"}
    assert all(math.isfinite(v) for r in one.values() for v in r["arms"].values())
