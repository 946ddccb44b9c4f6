"""Offline logits: the store's bytes, its refusals, the losses against torch, ECE against torchmetrics, temperatures,
a tiny checkpoint."""
import json, math
import numpy as np, pytest, torch
import torch.nn.functional as F
from conftest import ROOT, executed_in
from slmkit.core.fit import batches, fit
from slmkit.core.settings import KitError
from slmkit.distill.offline_logits import (NEVER, Store, answered, asked, best_temperature, bucket_loss, bucket_nll,
    buckets, ece, fingerprint, id_type, packed, recalibrated, store_loss, write_store)

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
def store(tmp_path): return write_store(tmp_path/"deep/store", z(50, 300).split(16), 4, "abc")

def test_a_store_reads_back_what_was_written(store):
    logits = z(50, 300)
    ids, target = store[:]
    assert len(store) == 50
    assert torch.equal(ids, logits.topk(4).indices)
    assert ids.dtype == torch.int64
    assert target.dtype == torch.float32
    want = buckets(logits, ids)
    # 11 bits of float16, and the sum brought back to one
    assert ((target - want).abs() <= 2**-10*want.abs().clamp(min=1)).all()
    assert torch.allclose(target.exp().sum(-1), torch.ones(50), atol=1e-6)
    at = torch.tensor([[3, 49], [3, 0]])
    assert torch.equal(store[at][0], ids[at]) and torch.equal(store[at][1], target[at])

def test_bytes_and_header(store):
    sizes = {p.name: p.stat().st_size for p in store.folder.iterdir()}
    assert sizes["ids.bin"] == 50*4*2
    assert sizes["logs.bin"] == 50*5*2
    assert set(sizes) == {"ids.bin", "logs.bin", "header.json"}
    header = json.loads((store.folder/"header.json").read_text(encoding="utf-8"))
    assert header == dict(tokens=50, k=4, vocab=300, teacher="abc")
    assert isinstance(store.ids, np.memmap) and isinstance(store.logs, np.memmap)  # on disk, not in memory
    assert (id_type(2**16), id_type(2**16 + 1)) == ("<u2", "<u4")

def test_large_vocabularies_keep_their_ids(tmp_path):
    logits = torch.zeros(2, 70_000)
    logits[0, 69_999] = logits[1, 65_536] = 9.
    s = write_store(tmp_path/"s", [logits], 1)
    assert s[:][0].tolist() == [[69_999], [65_536]] and (s.folder/"ids.bin").stat().st_size == 8

def test_all_tokens_stored_err_by_sixteen_bits_only(tmp_path):
    t, s = z(40, 30, 1), z(40, 30, 2)
    ids, target = write_store(tmp_path/"s", [t], 30)[:]
    dense = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean").item()
    assert bucket_loss(s, ids, target).item() == pytest.approx(dense, rel=1e-3) and (target[:, -1] < NEVER + 10).all()

def test_a_store_is_whole_or_not_there(tmp_path):
    def broken():
        yield z(5)
        raise RuntimeError("the power went")
    with pytest.raises(RuntimeError): write_store(tmp_path/"s", broken(), 2)
    with pytest.raises(KitError, match="not all finite"): write_store(tmp_path/"s", [z(5), z(5)*math.nan], 2)
    with pytest.raises(KitError, match="no logits came"): write_store(tmp_path/"s", [], 2)
    assert list(tmp_path.iterdir()) == []
    write_store(tmp_path/"s", [z(5)], 2)
    with pytest.raises(KitError, match="is there already"): write_store(tmp_path/"s", [z(5)], 2)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]

@pytest.mark.parametrize("k", [0, 12])
def test_k_out_of_range(k):
    with pytest.raises(KitError, match=f"k={k} is not in 1 to 11"): packed(z(), k)

def cut(p): p.write_bytes(p.read_bytes()[:-3])
@pytest.mark.parametrize("harm,said", [
    (lambda f: cut(f/"ids.bin"), "ids.bin has 397 bytes where its header says 400"),
    (lambda f: cut(f/"logs.bin"), "logs.bin has 497 bytes where its header says 500"),
    (lambda f: (f/"logs.bin").unlink(), "logs.bin has 0 bytes"),
    (lambda f: (f/"header.json").unlink(), "no store at"),
    (lambda f: cut(f/"header.json"), "header.json is damaged"),
    (lambda f: (f/"header.json").write_text('{"tokens": 50}', encoding="utf-8"), "header.json is damaged"),
    (lambda f: (f/"header.json").write_text("[]", encoding="utf-8"), "header.json is damaged")])
def test_damaged_stores_are_refused_in_one_line(store, harm, said):
    harm(store.folder)
    with pytest.raises(KitError) as e: Store(store.folder)
    assert said in str(e.value) and "\n" not in str(e.value)

def test_a_store_of_another_teacher_or_vocabulary_is_refused(store):
    assert len(Store(store.folder, "abc", 300)) == 50
    with pytest.raises(KitError, match="has teacher abc, not xyz"): Store(store.folder, "xyz")
    with pytest.raises(KitError, match="has vocab 300, not 301"): Store(store.folder, vocab=301)
    with pytest.raises(KitError, match="has 50 rows, not row"): store[[3, 50]]

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
    for b in range(15):
        here = (confidence >= b/15) & (confidence < (b + 1)/15)
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

# ---- with models

@pytest.fixture(scope="module")
def tiny():
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    from slmkit.toyland.tokenizer import build_tokenizer
    tok = build_tokenizer()
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), **shape)), tok

def test_questions_have_their_numbers_through_all_rows(tiny):
    _, tok = tiny
    every, last = asked(tok, ["ana has a box .", "ben sleeps ."], every=True), asked(tok,
        ["ana has a box .", "ben sleeps ."])
    numbers = [l for r in every for l in r["labels"] if l != -100]
    assert numbers == list(range(len(numbers))) and all(r["labels"][-1] == -100 for r in every)
    assert [[l for l in r["labels"] if l != -100] for r in last] == [[0], [1]]
    assert all(r["labels"][-1] != -100 for r in last)
    assert len(asked(tok, ["ana "*50], longest=9)[0]["input_ids"]) == 9

def test_answers_are_the_models_logits_whatever_the_batch(tiny):
    model, tok = tiny
    rows = asked(tok, ["ana has a box .", "ben sleeps .", "the old dog sees a cat ."], every=True)
    apart = torch.cat([model.eval()(input_ids=torch.tensor([r["input_ids"]])).logits[0, :-1] for r in rows])
    for size in (1, 2, 64): assert torch.allclose(torch.cat(list(answered(model, rows, 0, size))), apart, atol=1e-5)

def test_batches_in_any_order_meet_their_own_targets(tiny, tmp_path):
    import copy, random
    model, tok = tiny
    rows = asked(tok, ["ana has a box .", "ben sleeps .", "the old dog sees a cat ."], every=True)
    store = write_store(tmp_path/"s", answered(model, rows, 0), 5, fingerprint(model))
    loss, data = store_loss(store), batches(rows, 2, 0, random.Random(0))
    for _ in range(6): assert loss(model, next(data)).item() < 1e-5  # the teacher itself
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters(): p.add_(torch.randn_like(p)*.3)
    assert fingerprint(other) != fingerprint(model) == store.header["teacher"]
    h = fit(other, loss, data, steps=60, lr=1e-2, progress=False)
    assert np.mean(h.loss[-6:]) < .3*np.mean(h.loss[:6])

# ---- the notebook

def run(tmp_path, pool, name="r", **given):
    return executed_in(pool, ROOT/"nbs/distill/offline_logits.ipynb", tmp_path, name, **given)

@pytest.fixture
def given(tmp_path, tiny):
    "Parameters of a run at gpu with a tiny checkpoint and rows of one's own."
    model, tok = tiny
    for x in (model, tok): x.save_pretrained(tmp_path/"llama")
    def make(kinds):
        rows = [dict(text=f"ana has {i} pears .", kind=kinds[i % 2], split="test" if i % 4 == 0 else "train")
            for i in range(1400)]
        (tmp_path/"rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return dict(profile="gpu", model=str(tmp_path/"llama"), data=str(tmp_path/"rows.jsonl"),
            columns="input=text,label=kind", taught=16, teach=2, n=16, steps=2, k=3, layers=1)
    return make

@pytest.mark.slow
def test_gpu_path_on_a_tiny_checkpoint_and_a_file(tmp_path, torch_pool, given):
    e, found = run(tmp_path, torch_pool, **given(("dog", "cat")))
    assert e["status"] == "ok", e["error"]
    assert set(found) == {"recalibrated-targets-teach-calibration", "five-tokens-hold-the-mass",
        "one-token-and-its-tail-suffice", "better-than-cures-without-a-teacher"}
    r = found["recalibrated-targets-teach-calibration"]
    assert r["model"].endswith("llama") and r["n_rows"] > 400 and all(math.isfinite(v) for v in r["arms"].values())

def test_labels_that_begin_alike_and_too_few_rows_are_refused(tmp_path, torch_pool, given):
    e, _ = run(tmp_path, torch_pool, "alike", **given(("old dog", "old cat")))
    assert e["status"] != "ok" and "begin with the same token" in str(e["error"])
    e, _ = run(tmp_path, torch_pool, "few", **given(("dog", "cat")) | dict(taught=500))
    assert e["status"] != "ok" and "of 1516 training rows" in str(e["error"])

def test_gpu_needs_a_folder(tmp_path, torch_pool):
    e, found = run(tmp_path, torch_pool, profile="gpu")
    assert e["status"] != "ok" and "needs --model FOLDER" in str(e["error"]) and not found

@pytest.mark.slow
def test_same_seed_same_record(tmp_path, torch_pool):
    one, two = (run(tmp_path, torch_pool, name, profile="smoke", seed=3)[1] for name in ("one", "two"))
    assert set(one) == {"recalibrated-targets-teach-calibration", "five-tokens-hold-the-mass"}
    assert {c: r["arms"] for c, r in one.items()} == {c: r["arms"] for c, r in two.items()}
