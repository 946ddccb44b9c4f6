"""Divergences for distillation: against definitions, TRL and the kit's other divergence, the schedule against the
published rule, measures against enumeration, bad input."""
import math, os, random
import pytest, torch
from types import SimpleNamespace
from slmkit.core.settings import KitError
from slmkit.distill.kd_head import divergence
from slmkit.distill.objectives import (OBJECTIVES, SongTrial, TAIDSchedule, adaptive_step, coverage, distil,
    interpolated_teacher, jensen_shannon, kl, next_word_logits, random_batches, sample_texts, skew_kl, song_book,
    text_probs, token_divergence, word_model, word_nll)

TINY = dict(hidden_size=8, num_hidden_layers=1)
CFG = SimpleNamespace(songs=2, teacher=TINY, student=TINY, teach=20, warm=10, heard=200, warm_texts=40, texts=60,
    steps=12)

def draw(*shape, seed=0, scale=3.):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)*scale

def written_out(z, y, objective, mix):
    "From the definitions, with probabilities: shares no line with the kit."
    q, p = z.softmax(-1), y.softmax(-1)
    kl = lambda a, b: (a*(a/b).log()).sum(-1)
    m, flat = mix*p + (1 - mix)*q, mix/p.shape[-1] + (1 - mix)*q
    target = torch.softmax((1 - mix)*z.detach() + mix*y, -1)
    return dict(forward=lambda: kl(p, q), reverse=lambda: kl(q, p), jsd=lambda: mix*kl(p, m) + (1 - mix)*kl(q, m),
        skew=lambda: kl(p, m), taid=lambda: kl(target, q), floor=lambda: kl(p, flat))[objective]()

# ---- the divergences

@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("mix", [.5, .1, .9])
def test_equals_the_definition_in_value_and_gradient(objective, mix):
    z, y = draw(6, 11).requires_grad_(), draw(6, 11, seed=1)
    ours, theirs = token_divergence(z, y, objective, mix), written_out(z, y, objective, mix)
    assert torch.allclose(ours, theirs, atol=1e-9) and (ours > 0).all()
    assert torch.allclose(*(torch.autograd.grad(v.sum(), z)[0] for v in (ours, theirs)), atol=1e-9)

@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradcheck_and_the_teacher_is_a_constant(objective):
    y = draw(3, 5, seed=1)
    if objective != "taid":  # its target follows the student, so its loss is no function whose slope this is
        assert torch.autograd.gradcheck(lambda z: token_divergence(z, y, objective, .3), draw(3, 5).requires_grad_())
    z, y = draw(3, 5).requires_grad_(), y.requires_grad_()
    token_divergence(z, y, objective, .3).sum().backward()
    assert y.grad is None and z.grad.abs().sum() > 0

def test_taid_begins_as_reverse_kl_and_ends_as_forward_kl():
    z, y = draw(6, 11).requires_grad_(), draw(6, 11, seed=1)
    grad = lambda objective, t: torch.autograd.grad(token_divergence(z, y, objective, t).sum(), z)[0]
    assert torch.allclose(grad("taid", 1e-6)/1e-6, grad("reverse", .5), atol=1e-4)
    assert torch.allclose(grad("taid", 1.), grad("forward", .5)) and grad("taid", 0.).abs().max() < 1e-9
    assert torch.allclose(interpolated_teacher(z + 5, y - 2, .3), interpolated_teacher(z, y, .3))

def test_mixtures_are_bounded():
    p, q = (draw(50, 9, scale=40., seed=s).log_softmax(-1) for s in (0, 1))
    assert kl(p, q).max() > 50 and skew_kl(p, q, .1).max() <= math.log(10) + 1e-9
    assert jensen_shannon(p, q, .5).max() <= math.log(2) + 1e-9

@pytest.mark.parametrize("beta", [.1, .5, .8])
def test_equals_the_distillation_heads_divergence(beta):
    p, q = draw(6, 11).log_softmax(-1), draw(6, 11, seed=1).log_softmax(-1)
    assert torch.allclose(jensen_shannon(p, q, beta), divergence(q, p, beta))

@pytest.mark.parametrize("beta", [0., .1, .5, .9, 1.])
def test_equals_trl_in_value_and_gradient(beta):
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    z, y = draw(2, 7, 13).float().requires_grad_(), draw(2, 7, 13, seed=1).float()
    theirs = gkd.GKDTrainer.generalized_jsd_loss(z, y, torch.ones(2, 7, dtype=torch.long), beta)
    ours = token_divergence(z, y, {0.: "forward", 1.: "reverse"}.get(beta, "jsd"), beta).mean()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert torch.allclose(*(torch.autograd.grad(v, z)[0] for v in (ours, theirs)), atol=1e-6)

BAD = [(("forwards", .5), "no objective 'forwards': did you mean 'forward'"), (("jsd", 1.), "mix=1.0 of 'jsd'"),
    (("skew", 0), "mix=0 of 'skew'"), (("taid", 1.2), "mix=1.2 of 'taid'")]
@pytest.mark.parametrize("given,said", BAD)
def test_bad_numbers(given, said):
    with pytest.raises(KitError) as e: token_divergence(draw(3, 5), draw(3, 5), *given)
    assert said in str(e.value) and "\n" not in str(e.value)

# ---- the schedule

def test_schedule_is_the_published_rule():
    "The rule as a copy of the authors' code has it, written out with its names."
    rng, n = random.Random(0), 400
    losses = [3 - 2*i/n + .3*rng.random() for i in range(n)]
    t_start, t_end, alpha, beta = .4, 1., .01, .9
    t, prev, momentum, expected = t_start, None, 0., []
    for step, loss in enumerate(losses, 1):
        expected.append(t)
        if prev is not None:
            momentum = beta*momentum + (1 - beta)*(prev - loss)/(prev + 1e-15)
            t = min(t_end, max(t_start + (t_end - t_start)*step/n, t + alpha*(1/(1 + math.exp(-momentum)))*(1 - t)))
        prev = loss
    schedule = TAIDSchedule(n, t_start, alpha, beta)
    for loss in losses: schedule.update(loss)
    assert schedule.trace == pytest.approx(expected) and sorted(schedule.trace) == schedule.trace
    line = [t_start + (t_end - t_start)*i/n for i in range(n)]
    assert max(a - b for a, b in zip(schedule.trace, line)) > .05  # faster than the line, so this saw the rule

def test_adaptive_step_stays_in_its_bounds():
    rng = random.Random(1)
    for _ in range(200):
        t, done = rng.random(), rng.random()
        new, _ = adaptive_step(t, rng.gauss(0, 5), rng.gauss(0, 5), done, start=.2, alpha=rng.random())
        assert .2 + .8*done - 1e-12 <= new <= 1 and new >= t - 1e-12

# ---- songs and measures

def test_the_song_book_is_a_distribution_over_texts():
    texts, p = song_book(random.Random(3), 5)
    assert p.sum().item() == pytest.approx(1) and len(set(map(tuple, texts.tolist()))) == len(texts) <= 5*3**5
    assert texts.shape[1] == 6 and (texts[:, 0] == 0).all() and texts[:, 1:].min() >= 1
    assert torch.equal(song_book(random.Random(3), 5)[0], texts)
    assert p.max() > .3*.6**5  # the usual words of the first song, which is sung 1/(1 + 1/2 + ... + 1/5) of the time

def test_text_probs_are_the_products_of_the_words():
    texts, model = song_book(random.Random(0), 1)[0][:7], word_model(1, **TINY)
    with torch.no_grad(): probs = next_word_logits(model, texts).softmax(-1).double()
    for text, q, row in zip(texts.tolist(), text_probs(model, texts).tolist(), probs):
        assert q == pytest.approx(math.prod(row[i, w - 1].item() for i, w in enumerate(text[1:])), rel=1e-4)
    assert word_nll(model, dict(input_ids=texts)).item() == pytest.approx(
        -text_probs(model, texts).log().mean().item()/5, rel=1e-4)

def test_sampling_has_the_probabilities():
    model, n = word_model(1, words=3, **TINY), 20_000
    torch.manual_seed(0)
    drawn = sample_texts(model, n, places=2)
    every = torch.tensor([[0, i, j] for i in (1, 2, 3) for j in (1, 2, 3)])
    q = text_probs(model, every)
    assert q.sum().item() == pytest.approx(1, rel=1e-4)
    for text, p in zip(every, q.tolist()):
        assert abs((drawn == text).all(1).double().mean().item() - p) < 5*math.sqrt(p*(1 - p)/n)
    assert len(sample_texts(model, 200, 2, temperature=.01).unique(dim=0)) < len(drawn[:200].unique(dim=0))

def test_coverage_against_a_loop():
    rng = random.Random(0)
    p, q = (torch.tensor([rng.random()**k for _ in range(40)], dtype=torch.float64) for k in (1, 4))
    p, q = p/p.sum(), .7*q/q.sum()
    pairs = list(zip(p.tolist(), q.tolist()))
    assert coverage(p, q) == pytest.approx(dict(valid=.7, reached=sum(a for a, b in pairs if b >= .1*a),
        overlap=sum(min(a, b) for a, b in pairs)))
    assert coverage(p, p) == pytest.approx(dict(valid=1., reached=1., overlap=1.))

# ---- training

def test_batches_are_rows_of_the_texts():
    torch.manual_seed(0)
    batch = next(random_batches(5, input_ids=torch.arange(9)[:, None], labels=torch.arange(9)))
    assert torch.equal(batch["input_ids"][:, 0], batch["labels"])

@pytest.mark.parametrize("objective,mix", [("forward", .5), ("jsd", .5), ("taid", None), ("floor", .1)])
def test_a_student_is_warm_and_training_nears_the_teacher(objective, mix):
    trial = SongTrial(SimpleNamespace(**vars(CFG) | dict(steps=60)), 0)
    before = {k: v.clone() for k, v in trial.student.state_dict().items()}
    gap = lambda m: kl(next_word_logits(trial.teacher, trial.said).log_softmax(-1),
        next_word_logits(m, trial.said).log_softmax(-1)).mean().item()
    cold = word_model(1, **TINY)
    assert word_nll(trial.student, dict(input_ids=trial.heard)) < word_nll(cold, dict(input_ids=trial.heard))
    assert gap(distil(trial, objective, mix, lr=.03)) < gap(trial.student)
    assert all(torch.equal(v, before[k]) for k, v in trial.student.state_dict().items())

def test_a_trial_is_decided_by_its_seed():
    one, two, other = SongTrial(CFG, 3), SongTrial(CFG, 3), SongTrial(CFG, 4)
    assert torch.equal(one.said, two.said) and torch.equal(one.labels, two.labels)
    assert not torch.equal(one.texts, other.texts)
    same = [distil(t, "jsd", .5).state_dict() for t in (one, two)]
    assert all(torch.equal(v, same[1][k]) for k, v in same[0].items())
