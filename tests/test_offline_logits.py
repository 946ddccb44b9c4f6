"""Offline logits: the store's bytes, its refusals, the losses against torch, ECE against torchmetrics, temperatures,
label smoothing, a tiny checkpoint."""
import math, random
import numpy as np, pytest, torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file
from conftest import ROOT, executed_in
from slmkit.core.fit import batches, encode_causal, fit
from slmkit.core.settings import KitError
from slmkit.distill.offline_logits import (NEVER, all_logits, answer_places, best_temperature, bucket_loss, bucket_nll,
    buckets, ece, epsilon_for, first_layers, first_tokens, judged, load_store, of_answers, question_rows, recalibrated,
    save_store, smoothed_loss, split)

def z(n=7, vocab=11, seed=0, scale=2., dtype=torch.float32):
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64).mul(scale).to(dtype)

# ---- buckets and losses

@pytest.mark.parametrize("k", [1, 3, 10, 11])
def test_buckets_against_sums_of_probabilities(k):
    logits = z(dtype=torch.float64)
    ids = logits.topk(k).indices
    p = logits.softmax(-1)
    got = buckets(logits, ids).exp()
    assert torch.allclose(got[:, :-1], p.gather(-1, ids))
    assert torch.allclose(got.sum(-1), torch.ones(7, dtype=torch.float64))
    assert torch.allclose(got[:, -1], 1 - p.gather(-1, ids).sum(-1), atol=1e-12)

@pytest.mark.parametrize("k", [1, 4, 10])
def test_bucket_loss_is_the_kl_of_summed_distributions_value_and_gradient(k):
    "Written out: the vocabulary mapped onto k + 1 classes by a matrix, KL between the two images."
    s, t = z(seed=1, dtype=torch.float64).requires_grad_(), z(seed=2, dtype=torch.float64)
    ids = t.topk(k).indices
    lump = torch.zeros(7, 11, k + 1, dtype=torch.float64)
    lump[..., k] = 1
    for r in range(7):
        for c, i in enumerate(ids[r].tolist()): lump[r, i] = F.one_hot(torch.tensor(c), k + 1)
    p, q = ((x.softmax(-1)[:, None] @ lump)[:, 0] for x in (t, s))
    want, got = (p*(p/q).log()).sum(-1).mean(), bucket_loss(s, ids, buckets(t, ids))
    assert got.item() == pytest.approx(want.item(), rel=1e-10)
    assert torch.allclose(*(torch.autograd.grad(x, s, retain_graph=True)[0] for x in (got, want)), atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: bucket_loss(x, ids, buckets(t, ids)), [s])

def test_all_tokens_kept_is_torch_kl_div_in_value_and_gradient():
    s, t = z(seed=1, dtype=torch.float64).requires_grad_(), z(seed=2, dtype=torch.float64)
    ids = t.topk(11).indices
    got = bucket_loss(s, ids, buckets(t, ids))
    want = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="batchmean")
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    assert torch.allclose(*(torch.autograd.grad(x, s, retain_graph=True)[0] for x in (got, want)), atol=1e-14)

def test_the_loss_never_exceeds_the_dense_one_and_grows_with_k():
    s, t = z(seed=1), z(seed=2)
    dense = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean").item()
    losses = [bucket_loss(s, i, buckets(t, i)).item() for i in (t.topk(k).indices for k in range(1, 12))]
    assert losses == sorted(losses) and losses[-1] == pytest.approx(dense, rel=1e-5)

def test_a_very_sure_model_has_finite_loss_and_gradient():
    s = torch.tensor([[200., 0., 0., -200.]], requires_grad=True)
    ids = torch.tensor([[0]])
    loss = bucket_loss(s, ids, torch.tensor([[.9, .1]]).log())
    loss.backward()
    assert loss.item() == pytest.approx(.1*(200 - math.log(2)) + .9*math.log(.9) + .1*math.log(.1), rel=1e-4)
    assert s.grad.isfinite().all()
    assert buckets(torch.tensor([[1., 2.]]), torch.tensor([[1, 0]]))[0, 2] < NEVER + 10  # none is left

# ---- the store

@pytest.fixture
def path(tmp_path): return save_store(tmp_path/"deep/store.safetensors", z(50, 300), 4)

def test_a_store_reads_back_what_was_written(path):
    logits = z(50, 300)
    ids, target = load_store(path)
    assert torch.equal(ids, logits.topk(4).indices)
    assert ids.dtype == torch.int64 and target.dtype == torch.float32
    want = buckets(logits, ids)
    # 11 bits of float16, and the sum brought back to one
    assert ((target - want).abs() <= 2**-10*want.abs().clamp(min=1)).all()
    assert torch.allclose(target.exp().sum(-1), torch.ones(50), atol=1e-6)

def test_bytes_of_a_store(path):
    kept = load_file(path)
    assert {name: (x.dtype, x.shape) for name, x in kept.items()} == dict(
        ids=(np.dtype("uint16"), (50, 4)), logs=(np.dtype("float16"), (50, 5)))
    assert path.stat().st_size < 50*(4*2 + 5*2) + 300  # and a short header

def test_large_vocabularies_keep_their_ids(tmp_path):
    logits = torch.zeros(2, 70_000)
    logits[0, 69_999] = logits[1, 65_536] = 9.
    path = save_store(tmp_path/"s.safetensors", logits, 1)
    assert load_store(path)[0].tolist() == [[69_999], [65_536]]
    assert load_file(path)["ids"].dtype == np.uint32

def test_all_tokens_stored_err_by_sixteen_bits_only(tmp_path):
    t, s = z(40, 30, 1), z(40, 30, 2)
    ids, target = load_store(save_store(tmp_path/"s.safetensors", t, 30))
    dense = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean").item()
    assert bucket_loss(s, ids, target).item() == pytest.approx(dense, rel=1e-3) and (target[:, -1] < NEVER + 10).all()

def test_a_store_is_whole_or_not_there(tmp_path):
    with pytest.raises(KitError, match="not all finite"): save_store(tmp_path/"s", z(5)*math.nan, 2)
    for k in (0, 12):
        with pytest.raises(KitError, match=f"k={k} is not in 1 to 11"): save_store(tmp_path/"s", z(), k)
    assert list(tmp_path.iterdir()) == []

@pytest.mark.parametrize("harm,said", [
    (lambda p: p.write_bytes(p.read_bytes()[:-3]), "can't be read"),
    (lambda p: p.write_bytes(b""), "can't be read"),
    (lambda p: p.unlink(), "can't be read"),
    (lambda p: save_file(dict(ids=np.zeros((2, 2))), p), "holds no ids and logs")])
def test_damaged_stores_are_refused_in_one_line(path, harm, said):
    harm(path)
    with pytest.raises(KitError) as e: load_store(path)
    assert said in str(e.value) and path.name in str(e.value) and "\n" not in str(e.value)

# ---- calibration

def test_ece_equals_torchmetrics():
    peer = pytest.importorskip("torchmetrics.functional.classification").multiclass_calibration_error
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        n, vocab, bins = 200, 2 + seed % 6, 1 + seed % 20
        p = (torch.randn(n, vocab, generator=g)*4).softmax(-1)
        if seed % 3 == 0: p[:9] = F.one_hot(torch.zeros(9, dtype=torch.long), vocab).float()  # exactly sure
        if seed % 4 == 0: p[20:40] = torch.tensor([.5, .5] + [0.]*(vocab - 2))  # on an edge where bins are even
        labels = torch.randint(vocab, (n,), generator=g)
        confidence, guess = p.max(-1)
        assert ece(confidence, guess == labels, bins) == pytest.approx(peer(p, labels, num_classes=vocab,
                n_bins=bins).item(), abs=1e-6)

def test_ece_by_hand():
    confidence, right = torch.rand(500, generator=torch.Generator().manual_seed(0)), torch.arange(500) % 3 > 0
    brute = 0.
    for b in range(10):
        here = (confidence >= b/10) & (confidence < (b + 1)/10)
        if here.any(): brute += here.float().mean()*(right[here].float().mean() - confidence[here].mean()).abs()
    assert ece(confidence, right) == pytest.approx(brute.item(), abs=1e-5)

def test_recalibrated_is_a_temperature_over_the_buckets():
    target = buckets(z(), z().topk(3).indices)
    assert torch.allclose(recalibrated(target, 1.), target, atol=1e-6)
    for t in (.5, 3.):
        want = target.exp()**(1/t)
        assert torch.allclose(recalibrated(target, t).exp(), want/want.sum(-1, keepdim=True), atol=1e-6)
    assert recalibrated(torch.tensor([[0., NEVER]]), 1/16).min() == NEVER  # nothing runs off to -inf

def test_with_all_tokens_the_best_temperature_is_that_of_dense_logits():
    logits, words = z(300, 6, scale=3.), torch.randint(6, (300,), generator=torch.Generator().manual_seed(3))
    ids = logits.topk(6).indices
    grid = np.geomspace(1/16, 16, 97)
    dense = grid[int(np.argmin([F.cross_entropy(logits/t, words).item() for t in grid]))]
    assert best_temperature(ids, buckets(logits, ids), words) == pytest.approx(dense)
    assert bucket_nll(ids, buckets(logits, ids), words).item() == pytest.approx(F.cross_entropy(logits, words).item(),
        rel=1e-5)

def test_judged_is_accuracy_confidence_and_their_gap():
    log_p = torch.tensor([[.8, .2, 0.], [.6, .4, 0.]]).log()
    found = judged(log_p, torch.tensor([0, 1]))
    assert found == pytest.approx(dict(accuracy=.5, confidence=.7, ECE=.4, trust=.1), abs=1e-6)

# ---- label smoothing

def test_smoothing_is_torchs_where_the_labels_are_the_vocabulary():
    logits, words = z(dtype=torch.float64), torch.randint(11, (7,), generator=torch.Generator().manual_seed(0))
    for e in (0., .1, .7, 1.):
        want = F.cross_entropy(logits, words, label_smoothing=e)
        assert torch.allclose(smoothed_loss(logits, words, torch.arange(11), e), want)

def test_smoothing_among_labels_is_cross_entropy_with_that_target():
    logits, labels = z(dtype=torch.float64), torch.tensor([2, 5, 9])
    words = labels[torch.tensor([0, 1, 2, 0, 1, 2, 0])]
    target = torch.zeros_like(logits)
    target[:, labels] = .3/3
    target[torch.arange(7), words] += .7
    assert torch.allclose(smoothed_loss(logits, words, labels, .3), F.cross_entropy(logits, target))

@pytest.mark.parametrize("share,K,want", [(1., 3, 0.), (1/3, 3, 1.), (.65, 3, .525), (.1, 3, 1.)])
def test_epsilon_leaves_the_label_its_share(share, K, want):
    e = epsilon_for(share, K)
    assert e == pytest.approx(want)
    if share > 1/K: assert 1 - e + e/K == pytest.approx(share)

# ---- with models

@pytest.fixture(scope="module")
def tiny():
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    from slmkit.toyland.tokenizer import build_tokenizer
    tok = build_tokenizer()
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), **shape)), tok

TEXTS = ["ana has a box .", "ben sleeps .", "the old dog sees a cat ."]
def test_questions_have_their_numbers_through_all_rows(tiny):
    _, tok = tiny
    every, last = question_rows(tok, TEXTS[:2], every=True), question_rows(tok, TEXTS[:2])
    numbers = [l for r in every for l in r["labels"] if l != -100]
    assert numbers == list(range(len(numbers))) and all(r["labels"][-1] == -100 for r in every)
    assert [[l for l in r["labels"] if l != -100] for r in last] == [[0], [1]]
    assert all(r["labels"][-1] != -100 for r in last)
    assert len(question_rows(tok, ["ana "*50], max_length=9)[0]["input_ids"]) == 9

def test_logits_are_the_models_whatever_the_batch(tiny):
    model, tok = tiny
    rows = question_rows(tok, TEXTS, every=True)
    apart = torch.cat([model.eval()(input_ids=torch.tensor([r["input_ids"]])).logits[0, :-1] for r in rows])
    for size in (1, 2, 64): assert torch.allclose(all_logits(model, tok, rows, size), apart, atol=1e-5)

def test_answer_places_predict_the_answer_and_its_end(tiny):
    model, tok = tiny
    rows, plain = answer_places(tok, TEXTS, ["a", "a box", "a cat"]), encode_causal(tok, TEXTS, ["a", "a box", "a cat"])
    logits, words = all_logits(model, tok, rows, 2), [l for r in plain for l in r["labels"] if l != -100]
    lost = [model(input_ids=torch.tensor([r["input_ids"]]), labels=torch.tensor([r["labels"]])).loss for r in plain]
    mean = sum(x.item()*sum(l != -100 for l in r["labels"]) for x, r in zip(lost, plain))/len(words)
    assert F.cross_entropy(logits, torch.tensor(words)).item() == pytest.approx(mean, rel=1e-5)

def test_batches_in_any_order_meet_their_own_targets(tiny):
    import copy
    model, tok = tiny
    rows = question_rows(tok, TEXTS, every=True)
    logits = all_logits(model, tok, rows)
    ids = logits.topk(5).indices
    loss, data = of_answers(bucket_loss, ids, buckets(logits, ids)), batches(rows, 2, 0, random.Random(0))
    for _ in range(6): assert loss(model, next(data)).item() < 1e-5  # the teacher itself
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters(): p.add_(torch.randn_like(p)*.3)
    h = fit(other, loss, data, steps=60, lr=1e-2, progress=False)
    assert np.mean(h.loss[-6:]) < .3*np.mean(h.loss[:6])

def test_first_layers_are_those_of_the_model(tiny):
    import copy
    model, ids = tiny[0], torch.tensor([[5, 6, 7]])
    want = model(input_ids=ids, output_hidden_states=True).hidden_states[1]
    cut = first_layers(copy.deepcopy(model), 1)
    assert cut.config.num_hidden_layers == 1
    assert torch.allclose(cut(input_ids=ids, output_hidden_states=True).hidden_states[-1], cut.model.norm(want))

def test_labels_that_begin_alike_and_too_few_rows_are_refused(tiny):
    from datasets import Dataset
    _, tok = tiny
    assert first_tokens(tok, ["dog", "cat", "dog"])[[0, 2]].unique().numel() == 1
    with pytest.raises(KitError, match="begin with the same token"): first_tokens(tok, ["old dog", "old cat"])
    rows = Dataset.from_list([dict(input="ana", label=x) for x in ("dog", "cat", "dog")])
    (a, _), (b, words) = split(tok, rows, 2, 1)
    assert len(a) == 2 and b[0]["labels"][-1] == 0 and len(words) == 1
    with pytest.raises(KitError, match="3 of 4 rows"): split(tok, rows, 3, 1)

# ---- the reproductions

CLAIMS = {"recalibrated-targets-teach-calibration", "recalibration-beats-more-labels", "label-smoothing-is-as-good",
          "temperature-scaling-is-as-good"}
@pytest.mark.slow
def test_same_seed_same_record(tmp_path, torch_pool):
    path = ROOT/"nbs/distill/offline_logits_repro.ipynb"
    one, two = (executed_in(torch_pool, path, tmp_path, name, profile="smoke", seed=3)[1] for name in ("one", "two"))
    assert set(one) == CLAIMS and {c: r["arms"] for c, r in one.items()} == {c: r["arms"] for c, r in two.items()}
