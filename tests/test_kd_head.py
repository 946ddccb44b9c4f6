"The chunked distillation head against the loss written out, autograd, TRL and Liger; its edges."
import math, os
import pytest, torch
from conftest import ROOT, executed_in
from torch.nn.functional import log_softmax
from slmkit.core.measure import peak_memory_mb
from slmkit.core.settings import KitError
from slmkit.distill.kd_head import block, divergence, headless, kd_head, sizes, slope

BETAS = 0., .1, .5, .9, 1.

def draw(n=37, vocab=50, student=8, teacher=12, seed=0, dtype=torch.float32, scale=1.):
    g = torch.Generator().manual_seed(seed)
    x = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    return [t.to(dtype) for t in (x(n, student), x(vocab, student)*scale, x(n, teacher), x(vocab, teacher)*scale)]

def written_out(hs, ws, ht, wt, beta, temperature=1., keep=slice(None)):
    "From the definitions, with probabilities: shares no line with the kit."
    p, q = ((h[keep] @ w.T/temperature).softmax(-1) for h, w in ((hs, ws), (ht, wt)))
    kl = lambda a, b: (a*(a/b).log()).sum(-1)
    m = beta*q + (1 - beta)*p
    return (kl(q, p) if beta == 0 else kl(p, q) if beta == 1 else beta*kl(q, m) + (1 - beta)*kl(p, m)).mean()

def with_gradients(loss, four):
    hidden, head = (t.detach().clone().requires_grad_() for t in four[:2])
    value = loss(hidden, head, *four[2:])
    return value.detach(), *torch.autograd.grad(value, (hidden, head))

def worst(got, want):
    "Largest error of value and both gradients, relative to the largest entry."
    return max(((g.double() - w.double()).abs().max()/w.double().abs().max()).item() for g, w in zip(got, want))

@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1., .5, 4.])
def test_equals_the_loss_written_out(beta, temperature):
    four = draw(dtype=torch.float64)
    want = with_gradients(lambda *x: written_out(*x, beta, temperature), four)
    for rows in (0, 1, 5, 37, 100):
        ours = with_gradients(lambda *x: kd_head(*x, beta=beta, temperature=temperature, rows=rows), four)
        assert worst(ours, want) < 1e-12
    single = with_gradients(lambda *x: kd_head(*x, beta=beta, temperature=temperature), [t.float() for t in four])
    assert worst(single, want) < 1e-5 and single[0].dtype == torch.float32

@pytest.mark.parametrize("beta", BETAS)
def test_gradcheck(beta):
    four = draw(5, 7, 2, 3, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in four[:2]]
    assert torch.autograd.gradcheck(lambda h, w: kd_head(h, w, *four[2:], beta=beta, temperature=1.5, rows=2), leaves)

def test_many_strips():
    "A vocabulary so large that a part is swept in strips, the last of them shorter."
    four = draw(43, 20_000, 4, 6, scale=.5)
    assert sizes(43, 20_000) == (43, 13)
    want = with_gradients(lambda *x: written_out(*x, .5), [t.double() for t in four])
    assert worst(with_gradients(lambda *x: kd_head(*x), four), want) < 1e-5

def test_ignored_tokens_count_nothing_even_if_they_hold_nan():
    four = draw(dtype=torch.float64)
    keep = torch.arange(37) % 4 > 0
    want = with_gradients(lambda *x: written_out(*x, .5, keep=keep), four)
    four[0][~keep] = four[2][~keep] = math.nan
    got = with_gradients(lambda *x: kd_head(*x, labels=torch.where(keep, 3, -100), rows=4), four)
    assert worst(got, want) < 1e-12 and got[1][~keep].abs().max() == 0

def test_no_token_left_gives_zero():
    got = with_gradients(lambda *x: kd_head(*x, labels=torch.full((37,), -100)), draw())
    assert got[0] == 0 and all(g.abs().max() == 0 for g in got[1:])

def test_leading_sizes_are_kept_apart():
    hs, ws, ht, wt = draw(24)
    flat = with_gradients(lambda *x: kd_head(*x), (hs, ws, ht, wt))
    deep = with_gradients(lambda *x: kd_head(*x), (hs.view(2, 3, 4, 8), ws, ht.view(2, 3, 4, 12), wt))
    assert deep[0] == flat[0] and torch.equal(deep[1].flatten(0, 2), flat[1]) and torch.equal(deep[2], flat[2])

@pytest.mark.parametrize("beta", BETAS)
def test_logits_far_beyond_the_range_of_exp(beta):
    four = draw(scale=60.)
    def logs(hs, ws, ht, wt):  # in log space: probabilities of 1e-300 would underflow
        s, t = log_softmax(hs @ ws.T, -1), log_softmax(ht @ wt.T, -1)
        kl = lambda a, b: (a.exp()*(a - b)).sum(-1)
        m = torch.logsumexp(torch.stack([s + math.log1p(-beta), t + math.log(beta)]), 0) if 0 < beta < 1 else None
        return (kl(t, s) if beta == 0 else kl(s, t) if beta == 1 else beta*kl(t, m) + (1 - beta)*kl(s, m)).mean()
    got, usual = with_gradients(lambda *x: kd_head(*x, beta=beta), four), with_gradients(logs, four)
    want = with_gradients(logs, [t.double() for t in four])
    # logits of 500 have four digits behind the point: no worse than the usual loss
    for g, u, w in zip(got, usual, want):
        off = lambda x: (x.double() - w).abs().max().item()
        assert g.isfinite().all() and off(g) <= 3*off(u) + 1e-5, (off(g), off(u))

def test_only_what_is_asked_for():
    hs, ws, ht, wt = draw()
    for h, w in ((True, False), (False, True)):
        hidden, head = hs.clone().requires_grad_(h), ws.clone().requires_grad_(w)
        kd_head(hidden, head, ht.clone().requires_grad_(), wt).backward()
        assert (hidden.grad is not None) == h and (head.grad is not None) == w
    with torch.no_grad(): assert not kd_head(hs.requires_grad_(), ws, ht, wt).requires_grad

def test_teacher_gets_no_gradient_and_graph_may_be_walked_twice():
    hs, ws, ht, wt = draw()
    ws.requires_grad_()
    wt.requires_grad_()
    loss = 3*kd_head(hs, ws, ht, wt)
    loss.backward(retain_graph=True)
    once = ws.grad.clone()
    loss.backward()
    assert wt.grad is None and torch.allclose(ws.grad, 2*once)

def test_memory_stays_below_one_matrix_of_logits_and_does_not_grow_with_tokens():
    used = {
        n: peak_memory_mb(lambda: with_gradients(lambda *x: kd_head(*x, rows=16), draw(n, 2000)))
        for n in (512, 1024)
    }
    assert used[1024] < 1024*2000*4/2**20 and used[1024] - used[512] < .2*512*2000*4/2**20

@pytest.mark.parametrize("beta", BETAS)
def test_readable_and_fast_gradient_are_one(beta):
    s, t = (torch.randn(6, 11, dtype=torch.float64) for _ in range(2))
    logs = s.log_softmax(-1), t.log_softmax(-1)
    total = block(s, t, torch.empty(3, 8, 11, dtype=torch.float64), beta)
    assert torch.allclose(total, divergence(*logs, beta).sum())
    assert torch.allclose(t*(1 if beta == 1 else 1 - beta), slope(*logs, beta), atol=1e-12)

BAD = [
    (dict(beta=1.5), "beta=1.5"),
    (dict(temperature=0), "temperature=0"),
    (dict(labels=torch.zeros(5)), "labels are for (5,)")]
@pytest.mark.parametrize("given,said", BAD)
def test_bad_numbers(given, said):
    with pytest.raises(KitError) as e: kd_head(*draw(), **given)
    assert said in str(e.value) and "\n" not in str(e.value)

def test_bad_shapes():
    hs, ws, ht, wt = draw()
    for four, said in (((hs, ws, ht, wt[:40]), "vocabularies of 50 and 40"),
            ((hs, wt, ht, wt), "student's hidden states are (37, 8)"), ((hs, ws, ht[:9], wt), "for (9,) tokens")):
        with pytest.raises(KitError, match="kd_head") as e: kd_head(*four)
        assert said in str(e.value)

@pytest.fixture
def models():
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=60, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2))
    shape = dict(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    t5s = [T5ForConditionalGeneration(T5Config(**shape, tie_word_embeddings=tied)) for tied in (True, False)]
    ids = torch.randint(1, 60, (2, 7))
    return [(llama, dict(input_ids=ids))] + [(m, dict(input_ids=ids, decoder_input_ids=ids)) for m in t5s]

def test_headless_models_give_what_their_heads_read(models):
    for model, batch in models:
        model.eval()
        with torch.no_grad():
            logits = model(**batch).logits
            with headless(model) as head: hidden = model(**batch).logits
            assert hidden.shape[-1] == 16 and torch.allclose(hidden @ head.T, logits, atol=1e-6)
            assert torch.equal(model(**batch).logits, logits)  # the head is back

def test_headless_refuses_what_it_cannot_do(models):
    model = models[0][0]
    model.config.final_logit_softcapping = 30.
    with pytest.raises(KitError, match="softcapping"), headless(model): pass
    model.config.final_logit_softcapping, model.lm_head.bias = None, torch.nn.Parameter(torch.zeros(60))
    with pytest.raises(KitError, match="bias"), headless(model): pass

@pytest.fixture
def peers():
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    try:
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss
        from trl.experimental.gkd.gkd_trainer import GKDTrainer
        from trl.trainer.distillation_trainer import _chunked_divergence_loss as fused
    except ImportError as e: pytest.skip(f"parity with TRL and Liger needs the dev extra ({e})")
    def trl(hs, ws, ht, wt, labels, beta, temperature):
        return GKDTrainer.generalized_jsd_loss((hs @ ws.T)[None], (ht @ wt.T)[None], labels[None], beta, temperature)
    def liger(hs, ws, ht, wt, labels, beta, temperature):
        kw = dict(weight_hard_loss=0., weight_soft_loss=1., compiled=False, chunk_size=64)
        return LigerFusedLinearJSDLoss(beta=beta, temperature=temperature, **kw)(hs, ws, ht, wt, labels)
    def trl_fused(hs, ws, ht, wt, labels, beta, temperature):
        return fused(hs[None], ht[None], ws, wt, labels[None] != -100, beta, temperature=temperature)[0]
    return dict(trl=trl, liger=liger, trl_fused=trl_fused)

def test_equals_trl_and_liger(peers):
    for seed, (beta, temperature) in enumerate([(0., 1.), (.5, 1.), (1., 1.), (.1, 2.), (.5, .7), (.9, 1.)]):
        four = draw(150, 400, 24, 40, seed, scale=.6)
        labels = torch.where(torch.arange(150) % 5 > 0, 1, -100)
        ours = with_gradients(lambda *x: kd_head(*x, labels=labels, beta=beta, temperature=temperature), four)
        for name, peer in peers.items():
            theirs = with_gradients(lambda *x: peer(*x, labels, beta, temperature), four)
            assert worst(ours, theirs) < 1e-5, (name, beta, temperature)

def test_bfloat16_errs_no_more_than_trl_and_liger(peers):
    "Summed over draws and divergences: a single largest error is one rounding, which another processor does otherwise."
    labels, ours, theirs = torch.zeros(150, dtype=torch.long), torch.zeros(3), {name: torch.zeros(3) for name in peers}
    for seed, beta in enumerate([0., .5, 1.]*3):
        four = draw(150, 400, 24, 40, seed, torch.bfloat16, scale=.6)
        exact = with_gradients(lambda *x: written_out(*x, beta), [t.double() for t in four])
        error = lambda f: torch.tensor([worst([g], [w]) for g, w in zip(with_gradients(f, four), exact)])
        ours += error(lambda *x: kd_head(*x, labels=labels, beta=beta))
        for name, peer in peers.items(): theirs[name] += error(lambda *x: peer(*x, labels, beta, 1.))
    for name, t in theirs.items():
        # below 1e-6 a loss has float32's own rounding; what bfloat16 costs is a thousand times that
        assert (ours <= t.clamp(min=9e-6)).all(), (name, ours, t)

@pytest.mark.slow
def test_the_reproduction_with_another_divergence_and_a_temperature(tmp_path, torch_pool):
    given = dict(profile="smoke", beta=1., temperature=2.)
    e, found = executed_in(torch_pool, ROOT/"nbs/distill/kd_head_repro.ipynb", tmp_path, **given)
    assert e["status"] == "ok", e["error"]
    assert set(found) == {"same-as-dense", "distils-the-same", "smaller-than-dense", "smaller-than-chunked-peers",
                          "faster-than-chunked-peers"}
    assert found["same-as-dense"]["value"] < 1e-5 and found["smaller-than-dense"]["arms"]["head_mb"] > 0
