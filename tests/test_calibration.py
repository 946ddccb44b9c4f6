"""Calibration of a prompted classifier: ECE against torchmetrics, temperature against a grid, priors that are known,
and what ensembles can't do."""
import random
import pytest, torch
from slmkit.core import answers
from slmkit.core.answers import ending_scores, question_ids
from slmkit.core.prompts import draws, endings, prompt
from slmkit.core.real import is_fetched
from slmkit.core.settings import KitError
from slmkit.core.zoo import load_model
from slmkit.judge.calibration import (batch_calibrated, calibrated, content_free_prior, demonstration_sets, divide_out,
    ece, ensemble, fit_temperature, judged, label_scores, made_up, nll, right_labels, temper)

def drawn(seed, n=400, labels=5, sure=1.):
    "(log-probabilities, labels drawn from them): calibrated at `sure` 1, too sure above."
    g = torch.Generator().manual_seed(seed)
    log_p = (2*torch.randn(n, labels, generator=g)).log_softmax(-1)
    return temper(log_p, 1/sure), torch.multinomial(log_p.exp(), 1, generator=g)[:, 0]

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv("SLMKIT_ANSWERS", str(tmp_path/"answers.sqlite"))

# ---- ECE

@pytest.mark.parametrize("M", [1, 7, 10, 15])
def test_ece_is_torchmetrics(M):
    theirs = pytest.importorskip("torchmetrics.functional.classification").multiclass_calibration_error
    for seed in range(5):
        log_p, y = drawn(seed, sure=1 + seed/2)
        assert ece(log_p, y, M) == pytest.approx(float(theirs(log_p.exp(), y, 5, n_bins=M)), abs=1e-5)

def test_ece_knows_sure_from_calibrated():
    fair, sure = (ece(*drawn(0, n=20000, sure=s)) for s in (1, 3))
    assert fair < .02 < .1 < sure

def test_ece_of_few_rows_is_too_large():
    "The bias that the lesson's table of bins is about."
    assert ece(*drawn(0, n=50), 50) > ece(*drawn(0, n=50), 5) > ece(*drawn(0, n=20000), 5)

# ---- temperature

@pytest.mark.parametrize("T", [.3, 1., 4.])
def test_the_temperature_that_was_put_in_is_found(T):
    log_p, y = drawn(1, n=4000, sure=T)
    assert fit_temperature(log_p, y) == pytest.approx(T, rel=.1)

def test_no_temperature_of_a_grid_is_better():
    log_p, y = drawn(2, n=60, sure=2.5)
    best = nll(temper(log_p, fit_temperature(log_p, y)), y)
    assert best <= min(nll(temper(log_p, T), y) for T in torch.logspace(-1.5, 1.47, 200).tolist()) + 1e-4

def test_a_temperature_changes_no_answer():
    log_p, y = drawn(3)
    assert torch.equal(temper(log_p, 7.).argmax(-1), log_p.argmax(-1))

# ---- priors

def test_a_preference_that_was_put_in_is_taken_out():
    log_p, _ = drawn(4)
    bias = torch.tensor([3., 0, -1, 0, 2]).log_softmax(-1)
    assert torch.allclose(divide_out((log_p + bias).log_softmax(-1), bias), log_p, atol=1e-5)

def test_batch_calibration_takes_out_any_preference_and_is_done_once():
    log_p, _ = drawn(5)
    once = batch_calibrated(log_p)
    other = batch_calibrated((log_p + torch.tensor([5., 0, 0, -5, 1])).log_softmax(-1))
    assert torch.allclose(once, other, atol=1e-5) and torch.allclose(batch_calibrated(once), once, atol=1e-5)

def test_a_skewed_batch_spoils_the_prior():
    log_p, y = drawn(6, n=4000)
    only = y == 0
    found = batch_calibrated(log_p[only]), batch_calibrated(log_p)[only]
    wrong, right = (judged(p, y[only])["accuracy"] for p in found)
    assert wrong < right - .1

# ---- ensembles

def test_a_mean_of_probabilities_never_costs_more_nats_than_its_members():
    members, y = [drawn(seed, sure=3)[0] for seed in range(4)], drawn(0)[1]
    assert nll(ensemble(members), y) <= sum(nll(p, y) for p in members)/4
    for how in ("mean", "max"):
        together = ensemble(members, how)
        assert torch.allclose(together.exp().sum(-1), torch.ones(400), atol=1e-5)
        assert torch.allclose(ensemble(members[:1], how), members[0], atol=1e-5)

def test_demonstrations_of_an_ensemble():
    train = [dict(input=str(i)) for i in range(100)]
    sets = demonstration_sets(train[:4], train, 5, random.Random(0))
    orders = demonstration_sets(train[:4], train, 5, random.Random(0), same=True)
    names = lambda rows: sorted(int(r["input"]) for r in rows)
    assert [len(s) for s in sets] == [4]*5 and sets[0] == orders[0] == train[:4]
    assert all(names(s) == [0, 1, 2, 3] for s in orders) and len({tuple(names(s)) for s in sets}) == 5

# ---- asking a model

@pytest.mark.parametrize("name", ["sst2", "trec", "ag-news", "banking77-10"])
def test_made_up_rows_can_be_asked(name):
    for rows, demos in made_up(name):
        labels = rows[0]["choices"]
        assert set(right_labels(rows).tolist()) == set(range(len(labels))) and all(d in rows for d in demos)
        assert all(word in prompt(name, rows[0], demos) for word in endings(name, dict(choices=[demos[0]["label"]])))

def test_label_scores_are_the_models():
    rows, demos = made_up("trec")[0]
    model, tok = load_model("smollm2-random", kind="causal", dtype=torch.float32)
    asked = question_ids(tok, [prompt("trec", r, demos) for r in rows[:3]], endings("trec", rows[0]))
    found = label_scores("smollm2-random", "trec", rows[:3], demos)
    assert torch.allclose(found, ending_scores(model, *asked).log_softmax(-1), atol=1e-2)

def test_contextual_calibration_makes_the_model_indifferent_to_nothing():
    rows, demos = made_up("sst2")[0]
    empty = [rows[0] | dict(input="N/A")]
    prior = content_free_prior("smollm2-random", "sst2", rows[0], demos, inputs=["N/A"])
    asked = divide_out(label_scores("smollm2-random", "sst2", empty, demos), prior)
    assert torch.allclose(asked.exp(), torch.tensor([[.5, .5]]), atol=1e-5)
    assert set(calibrated("smollm2-random", "sst2", rows, demos)) == {"as it is", "contextual", "batch"}

def test_the_figures_of_the_lesson_come_from_the_store(monkeypatch):
    if not is_fetched("smollm2-135m"): pytest.skip("smollm2-135m is not on this machine")
    try: rows = [r for part, _ in draws("trec") for r in part]
    except KitError as e: pytest.skip(str(e))
    monkeypatch.setattr(answers, "asked_model", lambda name: pytest.fail("the model is asked"))
    log_p, y = label_scores("smollm2-135m", "trec", rows), right_labels(rows)
    plain, batch = judged(log_p, y), judged(batch_calibrated(log_p), y)
    assert plain["accuracy"] == pytest.approx(.244) and batch["accuracy"] == pytest.approx(.482, abs=.0021)
    assert plain["ECE"] > .5 > .1 > batch["ECE"]
