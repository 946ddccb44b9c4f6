"""Three ideas: PyTorch's losses and attention, transformers' generate, Liger and single runs as peers; the lesson's lab
names and its reproduction from start to end."""
import math
import pytest, torch
import torch.nn.functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from conftest import ROOT, claims_in, the_record
from slmkit.infer.three_ideas import (Starts, attend_next, dense, draw, in_chunks, prompts, reread, stacked_linear,
                                      started, with_cache)
from slmkit.toyland.tokenizer import build_tokenizer
torch.set_num_threads(1)
REPRO = ROOT/"nbs/infer/three_ideas_repro.ipynb"
SHAPE = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2)

@pytest.mark.parametrize("rows", [1, 3, 10, 64])
@pytest.mark.parametrize("size", [(10, 4, 7), (1, 3, 5), (33, 8, 100)])
def test_chunks_against_cross_entropy_and_autograd(rows, size):
    n, width, vocab = size
    hidden, head, labels = draw(n, vocab, 0, width, torch.float64)
    x, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    want = F.cross_entropy(x @ w.T, labels)
    for way in (dense(hidden, head, labels), in_chunks(hidden, head, labels, rows)):
        for a, b in zip(way, (want, *torch.autograd.grad(want, (x, w), retain_graph=True))):
            assert torch.allclose(a, b, atol=1e-14)

@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="a PyTorch without linear_cross_entropy")
def test_chunks_against_pytorchs_own():
    hidden, head, labels = draw(100, 50, 1, dtype=torch.float64)
    x, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    loss = F.linear_cross_entropy(x, w, labels, options=torch.nn.LinearCrossEntropyOptions())
    loss.backward()
    for a, b in zip(in_chunks(hidden, head, labels, 16), (loss.detach(), x.grad, w.grad)): assert torch.allclose(a, b)

def test_chunks_leave_their_inputs_alone_and_bear_large_logits():
    hidden, head, labels = torch.randn(6, 4)*100, torch.randn(9, 4)*10, torch.arange(6)
    before = hidden.clone(), head.clone()
    loss, *grads = in_chunks(hidden, head, labels, 4)
    assert torch.equal(hidden, before[0])
    assert torch.equal(head, before[1])
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in grads)

def test_attention_with_what_was_kept_against_pytorchs():
    q, k, v = torch.randn(3, 1, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True)[0]
    keys, values = torch.empty(0, 8).double(), torch.empty(0, 8).double()
    for i in range(12):
        out, keys, values = attend_next(q[0, i], k[0, i], v[0, i], keys, values)
        assert torch.allclose(out, want[i]) and len(keys) == len(values) == i + 1

@pytest.mark.parametrize("make", [lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
        lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE))])
def test_writing_against_generate(make):
    torch.manual_seed(0)
    model = make().double().eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    ids = torch.randint(3, 40, (3, 5))
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, min_new_tokens=9,
        do_sample=False)[:, 5:]
    (a, read), (b, less) = reread(model, ids, 9), with_cache(model, ids, 9, DynamicCache(config=model.config))
    assert torch.equal(a, theirs) and torch.equal(b, theirs) and read == 3*sum(range(5, 14)) and less == 3*(5 + 8)

def test_prompts_are_equally_long_and_of_the_seed():
    tok = build_tokenizer()
    one, two, other = (prompts(tok, 3, seed) for seed in (0, 0, 1))
    assert one.shape == (3, 12) and torch.equal(one, two) and not torch.equal(one, other)

def test_one_layer_of_all_against_each_and_in_few_operations():
    x, w, b = torch.randn(7, 4, 3).double(), torch.randn(7, 5, 3).double(), torch.randn(7, 5).double()
    with Starts() as starts: out = stacked_linear(x, w, b)
    assert torch.allclose(out, torch.stack([F.linear(*three) for three in zip(x, w, b)])) and starts.n < 7

def test_starts_grow_with_the_replicas_only_one_by_one():
    alone, stacked = ({n: started(n, how, 0) for n in (1, 3)} for how in (False, True))
    assert alone[3] == 3*alone[1] and stacked[3] < 1.2*stacked[1]

# ---- the reproduction

def test_the_reproduction_at_smoke_twice(tmp_path, torch_pool):
    one, two = (the_record(REPRO, tmp_path, torch_pool, name, profile="smoke", seed=3) for name in ("one", "two"))
    counted = [{k: v for k, v in r["arms"].items() if not k.startswith("seconds")} for r in (one, two)]
    assert counted[0] == counted[1] and set(one["claims"]) == claims_in(REPRO)
    assert all(c["spec"]["stands"] == "construction" for c in one["claims"].values())

@pytest.mark.slow
def test_the_reproduction_on_a_tiny_checkpoint(tmp_path, torch_pool):
    tok = build_tokenizer()
    tok.save_pretrained(tmp_path/"llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE | dict(vocab_size=len(tok)))).save_pretrained(tmp_path/"llama")
    found = the_record(REPRO, tmp_path, torch_pool, profile="cpu", n=64, model=str(tmp_path/"llama"))
    assert all(math.isfinite(v) for v in found["arms"].values()) and found["model"] == str(tmp_path/"llama")
    assert found["claims"]["a-cache-gives-the-same-tokens"]["value"] == 0
