"""Objectives of distillation: against definitions and TRL, the clock against the published rule, measures against
enumeration, bad input, checkpoints."""
import math, os, random
import pytest, torch
from functools import partial
from pathlib import Path
from conftest import ran
from slmkit.core.settings import KitError
from slmkit.distill.kd_head import divergence, slope
from slmkit.distill.objectives import (WAYS, Clock, chances, distances, distil_loss, entropy, meet, next_t, objective,
    reached, songs, study, unsure)
from slmkit.distill.teacher_hacking import asked, copying, exam, fixed, labelled, next_words, numbers, sample, speaker
from slmkit.toyland.grammar import Grammar
from slmkit.toyland.tokenizer import build_tokenizer

NB = Path(__file__).parents[1]/"nbs/distill/objectives.ipynb"
SHAPE = dict(hidden_size=16, num_hidden_layers=1)
TWO = Grammar({"S": {"A B .": .75, "B A .": .25}, "A": {"dog": .5, "cat": .5}, "B": {"dog": .1, "sees": .9}})

def draw(*shape, seed=0, scale=3.):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)*scale)

def written_out(z, y, way, mix, temperature=1.):
    "From the definitions, with probabilities: shares no line with the kit."
    q, p = (z/temperature).softmax(-1), (y/temperature).softmax(-1)
    kl = lambda a, b: (a*(a/b).log()).sum(-1)
    m = mix*p + (1 - mix)*q
    target = torch.softmax(((1 - mix)*z.detach() + mix*y)/temperature, -1)
    return dict(forward=lambda: kl(p, q), reverse=lambda: kl(q, p), jsd=lambda: mix*kl(p, m) + (1 - mix)*kl(q, m),
                skew=lambda: kl(p, m), taid=lambda: kl(target, q))[way]()

# ---- the divergences

@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mix,temperature", [(.5, 1.), (.1, .5), (.9, 4.)])
def test_equals_the_definition_in_value_and_gradient(way, mix, temperature):
    z, y = draw(6, 11).requires_grad_(), draw(6, 11, seed=1)
    ours, theirs = distances(z, y, way, mix, temperature), written_out(z, y, way, mix, temperature)
    assert torch.allclose(ours, theirs, atol=1e-9) and (ours > 0).all()
    assert torch.allclose(*(torch.autograd.grad(v.sum(), z)[0] for v in (ours, theirs)), atol=1e-9)

@pytest.mark.parametrize("way", WAYS)
def test_gradcheck_and_the_teacher_is_fixed(way):
    y = draw(3, 5, seed=1)
    if way != "taid":  # its target follows the student, so its loss is no function whose slope this is
        assert torch.autograd.gradcheck(lambda z: distances(z, y, way, .3), draw(3, 5).requires_grad_())
    z, y = draw(3, 5).requires_grad_(), y.requires_grad_()
    distances(z, y, way, .3).sum().backward()
    assert y.grad is None and z.grad.abs().sum() > 0

def test_ends_of_the_wandering_target():
    z, y = draw(6, 11).requires_grad_(), draw(6, 11, seed=1)
    assert distances(z, y, "taid", 0.).abs().max() < 1e-9
    assert torch.allclose(distances(z, y, "taid", 1.), distances(z, y, "forward"))
    grad = lambda t: torch.autograd.grad(distances(z, y, "taid", t).sum(), z)[0]
    logs = z.detach().log_softmax(-1), y.log_softmax(-1)
    assert torch.allclose(grad(1e-6)/1e-6, slope(*logs, 1), atol=1e-4)  # reverse KL, t times
    assert torch.allclose(grad(1.), slope(*logs, 0)) and grad(0.).abs().max() < 1e-9

def test_skewed_never_costs_more_than_the_logarithm_of_its_share():
    z, y = draw(50, 9, scale=40.), draw(50, 9, seed=1, scale=40.)
    assert distances(z, y, "forward").max() > 50 and distances(z, y, "skew", .1).max() <= math.log(10) + 1e-9

def test_only_tokens_with_labels_count():
    z, y, labels = draw(2, 5, 7).requires_grad_(), draw(2, 5, 7, seed=1), torch.tensor([[1, -100, 2, 3, -100],
            [0, 0, -100, 4, 5]])
    with torch.no_grad(): z[labels == -100] = math.nan
    loss = distil_loss(z, y, labels, "skew", .2)
    assert torch.allclose(loss, torch.stack([distances(z[i, j], y[i, j], "skew", .2) for i in range(2)
            for j in range(5) if labels[i, j] != -100]).mean())
    loss.backward()
    assert z.grad[labels == -100].abs().max() == 0
    empty = distil_loss(draw(2, 3).requires_grad_(), draw(2, 3), torch.full((2,), -100))
    empty.backward()
    assert empty == 0

@pytest.mark.parametrize("temperature", [.5, 1., 3.])
@pytest.mark.parametrize("beta", [0., .1, .5, .9, 1.])
def test_equals_trl_in_value_and_gradient(beta, temperature):
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    z, y = draw(2, 7, 13).float().requires_grad_(), draw(2, 7, 13, seed=1).float()
    labels = torch.where(torch.arange(14).view(2, 7) % 4 > 0, 1, -100)
    theirs = gkd.GKDTrainer.generalized_jsd_loss(z, y, labels, beta, temperature)
    way = {0.: "forward", 1.: "reverse"}.get(beta, "jsd")
    ours = distil_loss(z, y, labels, way, beta, temperature)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert torch.allclose(*(torch.autograd.grad(v, z)[0] for v in (ours, theirs)), atol=1e-6)

BAD = [
    (dict(way="forwards"), "no way 'forwards': did you mean 'forward'"),
    (dict(way="jsd", mix=1.), "mix=1.0 of 'jsd'"),
    (dict(way="skew", mix=0), "mix=0 of 'skew'"),
    (dict(way="taid", mix=1.2), "mix=1.2 of 'taid'"),
    (dict(temperature=0), "temperature=0"),
    (dict(labels=torch.zeros(5)), "labels are (5,)")]
@pytest.mark.parametrize("given,said", BAD)
def test_bad_numbers(given, said):
    with pytest.raises(KitError) as e: distil_loss(draw(3, 5), draw(3, 5), **given)
    assert said in str(e.value) and "\n" not in str(e.value)

def test_bad_shapes():
    with pytest.raises(KitError, match="cut a padded vocabulary"): distil_loss(draw(3, 5), draw(3, 6))

# ---- the clock

def test_clock_is_the_published_rule():
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
    clock = Clock(n, t_start, alpha, beta)
    for loss in losses: clock.tick(loss)
    assert clock.trace == pytest.approx(expected) and sorted(clock.trace) == clock.trace
    line = [t_start + (t_end - t_start)*i/n for i in range(n)]
    assert max(a - b for a, b in zip(clock.trace, line)) > .05  # faster than the line, so this saw the rule

def test_clocks_line_deaf_and_script():
    def trace(clock):
        for i in range(100): clock.tick(2. if i < 50 else .1)
        return clock.trace
    assert trace(Clock(100, .4, 0.)) == pytest.approx([.4, *(.4 + .6*i/100 for i in range(1, 100))], abs=.02)
    loud, deaf = trace(Clock(100, .1, .05, .5)), trace(Clock(100, .1, .05, 1.))
    assert loud[:51] == deaf[:51] and loud[52] > deaf[52]  # where the loss fell the one that hears is ahead
    assert trace(Clock(100, script=[1., .5])) == [1.] + [.5]*99

def test_next_t_stays_in_its_bounds():
    rng = random.Random(1)
    for _ in range(200):
        t, share = rng.random(), rng.random()
        new, _ = next_t(t, rng.gauss(0, 5), rng.gauss(0, 5), share, start=.2, alpha=rng.random())
        assert .2 + .8*share - 1e-12 <= new <= 1 and new >= t - 1e-12

# ---- songs and measures

def test_songs_are_a_language_whose_texts_all_have_six_words():
    g = songs(random.Random(3), 5)
    assert math.fsum(g.table.values()) == pytest.approx(1)
    assert {len(s) for s in g.table} == {6}
    assert 900 < len(g.table) <= 5*3**5
    first = sum(p for s, p in g.table.items() if all(w in g.rules[f"Place1.{i}"] for i, w in enumerate(s[:-1])))
    assert first == pytest.approx(1/sum(1/k for k in range(1, 6)), rel=.05)  # a few texts belong to two songs
    assert songs(random.Random(3), 5).table == g.table != songs(random.Random(4), 5).table

def test_chances_are_the_products_of_the_words():
    model, sheet = speaker(TWO, 1, **SHAPE), exam(TWO)
    found = chances(TWO, asked(model, sheet))
    for s, q in zip(TWO.table, found.tolist()):
        with torch.no_grad(): row = next_words(model, numbers(TWO, [s]))[0].double()
        assert q == pytest.approx(math.exp(sum(row[i, TWO.words.index(w)].item() for i, w in enumerate(s))), rel=1e-4)
    assert torch.allclose(chances(TWO, sheet.truth), torch.tensor(list(TWO.table.values())).double())

def test_reach_against_a_loop():
    rng = random.Random(0)
    p = torch.tensor([rng.random() for _ in range(40)]).double()
    p /= p.sum()
    q = torch.tensor([rng.random()**4 for _ in range(40)]).double()
    q *= .7/q.sum()
    assert reached(p, q, .3) == pytest.approx(sum(a for a, b in zip(p.tolist(), q.tolist()) if b >= .3*a))

def test_entropy_of_a_speaker_is_that_of_its_texts():
    model, stop = speaker(TWO, 1, **SHAPE), TWO.words.index(".") + 1
    def exact(words=()):
        "By recursion over all texts of at most three words."
        with torch.no_grad(): logs = next_words(model, torch.tensor([[0, *words]]))[0, -1].double()
        rest = sum(p*exact((*words, i + 1)) for i, p in enumerate(logs.exp().tolist())
            if i + 1 != stop) if len(words) < 2 else 0.
        return unsure(logs).item() + rest
    torch.manual_seed(0)
    assert entropy(model, stop, 3, n=20_000) == pytest.approx(exact(), rel=.01)

# ---- training

def test_objective_is_the_loss_over_the_words_of_the_texts():
    teacher, student, stop = speaker(TWO, 1, **SHAPE), speaker(TWO, 2, **SHAPE), TWO.words.index(".") + 1
    batch = labelled(numbers(TWO, [("dog", "sees", "."), ("sees", "cat", ".")]), teacher)
    assert batch["input_ids"].shape == (2, 3)
    with torch.no_grad():
        assert torch.allclose(objective(stop, "forward")(student, batch), copying(stop)(student, batch), atol=1e-6)
        for way in WAYS:
            rows = distances(next_words(student, batch["input_ids"]), batch["labels"], way, .4)
            assert objective(stop, way, .4)(student, batch).item() == pytest.approx(rows.mean().item(), rel=1e-4)
        short = labelled(torch.cat([numbers(TWO, [("dog", "sees", ".")]), torch.tensor([[2]])], 1), teacher)
        assert objective(stop, "jsd")(student, short).item() == pytest.approx(
            distances(next_words(student, short["input_ids"]), short["labels"], "jsd")[:, :3].mean().item(), rel=1e-4)

def test_a_clock_hears_the_cross_entropy_and_sets_t():
    teacher, student, stop = speaker(TWO, 1, **SHAPE), speaker(TWO, 2, **SHAPE), TWO.words.index(".") + 1
    batch, clock = labelled(numbers(TWO, [("dog", "sees", ".")]), teacher), Clock(10, .3)
    with torch.no_grad():
        logs = next_words(student, batch["input_ids"])
        objective(stop, "taid", clock=clock)(student, batch)
        assert clock.trace == [.3]
        assert clock.before == pytest.approx(-(meet(logs, batch["labels"], .3).exp()*logs).sum(-1).mean().item(),
            rel=1e-4)

@pytest.mark.parametrize("way", WAYS)
def test_training_nears_the_teacher_and_every_mark_is_seen(way):
    teacher, student, stop = speaker(TWO, 1, **SHAPE), speaker(TWO, 2, **SHAPE), TWO.words.index(".") + 1
    sheet = exam(TWO)
    taught = asked(teacher, sheet)
    torch.manual_seed(0)
    rows = labelled(sample(teacher, 200, 3), teacher)
    look = lambda m: divergence(asked(m, sheet), taught, .5).mean().item()
    h = study(student, objective(stop, way, .5, Clock(60) if way == "taid" else None), fixed(16, **rows), look,
        [1, 20, 60], 1e-2)
    assert len(h.seen) == 3 and h.steps == 60 and h.seen[-1] == look(student) and h.seen[-1] < .5*h.seen[0]

# ---- checkpoints and the notebook

@pytest.fixture
def tiny(tmp_path):
    "A decoder's checkpoint with the zoo's tokenizer."
    from transformers import LlamaConfig, LlamaForCausalLM
    tok = build_tokenizer()
    tok.save_pretrained(tmp_path/"llama")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tok), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path/"llama")
    return str(tmp_path/"llama")

run = partial(ran, NB)

@pytest.mark.slow
def test_gpu_path_on_a_tiny_checkpoint(tmp_path, torch_pool, tiny):
    found = run(tmp_path, torch_pool, profile="gpu", model=tiny, songs_sung=3, teach=4, steps=4, hidden=8)
    assert set(found) == {"wandering-target-lowers-loss", "wandering-target-balances", "forward-blurs-reverse-drops",
        "listening-beats-the-line", "cover-first-then-pick"}
    r = found["cover-first-then-pick"]
    assert {f"{k}_overlap" for k in ("forward", "reverse", "jsd", "skew", "taid", "backwards", "linear", "deaf",
            "constant", "large_forward", "teacher")} <= set(r["arms"])
    assert all(math.isfinite(v) for v in r["arms"].values()) and r["model"] == tiny and 600 < r["n_rows"] <= 729

@pytest.mark.slow
def test_same_seed_same_record(tmp_path, torch_pool):
    one, two = (run(tmp_path, torch_pool, name, profile="smoke", seed=3) for name in ("one", "two"))
    assert one == two and len(one) == 2  # the other claims' arms are slow
