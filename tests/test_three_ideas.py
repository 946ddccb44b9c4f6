"""Three ideas: PyTorch's cross-entropy and attention, transformers' generate and single runs as peers; the page at
other profiles, twice."""
import math
from functools import partial
from pathlib import Path
import pytest, torch
import torch.nn.functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from conftest import ran
from slmkit.infer.three_ideas import Starts, again, in_parts, linear_all, onward, read_on
from slmkit.toyland.tokenizer import build_tokenizer
torch.set_num_threads(1)
NB = Path(__file__).parents[1]/"nbs/infer/three_ideas.ipynb"
SHAPE = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2)

@pytest.mark.parametrize("rows", [1, 3, 10, 64])
@pytest.mark.parametrize("size", [(10, 4, 7), (1, 3, 5), (33, 8, 100)])
def test_parts_against_cross_entropy_and_autograd(rows, size):
    g = torch.Generator().manual_seed(0)
    n, width, vocab = size
    hidden, head = (torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_()
        for s in ((n, width), (vocab, width)))
    labels = torch.randint(vocab, (n,), generator=g)
    want = F.cross_entropy(hidden @ head.T, labels)
    for a, b in zip(in_parts(hidden.detach(), head.detach(), labels, rows),
            (want, *torch.autograd.grad(want, (hidden, head)))):
        assert torch.allclose(a, b, atol=1e-14)

def test_parts_leave_their_inputs_alone_and_bear_large_logits():
    hidden, head, labels = torch.randn(6, 4)*100, torch.randn(9, 4)*10, torch.arange(6)
    before = hidden.clone(), head.clone()
    loss, *grads = in_parts(hidden, head, labels, 4)
    assert torch.equal(hidden, before[0])
    assert torch.equal(head, before[1])
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in grads)

def test_reading_on_against_pytorch_attention():
    q, k, v = torch.randn(3, 1, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True)[0]
    keys, values = torch.empty(0, 8).double(), torch.empty(0, 8).double()
    for i in range(12):
        out, keys, values = read_on(q[0, i], k[0, i], v[0, i], keys, values)
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
    (a, read), (b, less) = again(model, ids, 9), onward(model, ids, 9, DynamicCache(config=model.config))
    assert torch.equal(a, theirs) and torch.equal(b, theirs) and read == 3*sum(range(5, 14)) and less == 3*(5 + 8)

def test_one_layer_of_all_against_each_and_in_few_operations():
    x, w, b = torch.randn(7, 4, 3).double(), torch.randn(7, 5, 3).double(), torch.randn(7, 5).double()
    with Starts() as starts: out = linear_all(x, w, b)
    assert torch.allclose(out, torch.stack([F.linear(*three) for three in zip(x, w, b)])) and starts.n < 7

run = partial(ran, NB)

CLAIMS = {"parts-give-the-same-gradients", "a-cache-gives-the-same-tokens", "stacked-seeds-train-the-same",
    "parts-need-less-memory", "a-cache-is-faster", "stacked-seeds-start-less", "stacked-seeds-are-faster"}

@pytest.mark.slow
def test_gpu_path_on_a_tiny_checkpoint(tmp_path, torch_pool):
    tok = build_tokenizer()
    tok.save_pretrained(tmp_path/"llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE | dict(vocab_size=len(tok)))).save_pretrained(tmp_path/"llama")
    found = run(tmp_path, torch_pool, profile="gpu", model=str(tmp_path/"llama"), shrink=64)
    assert set(found) == CLAIMS and all(math.isfinite(v) for r in found.values() for v in r["arms"].values())
    assert found["a-cache-is-faster"]["model"] == str(tmp_path/"llama")
    assert found["stacked-seeds-train-the-same"]["value"] < 1e-3

@pytest.mark.slow
def test_same_seed_same_record(tmp_path, torch_pool):
    one, two = (run(tmp_path, torch_pool, name, profile="smoke", seed=3) for name in ("one", "two"))
    clocked = {"a-cache-is-faster", "stacked-seeds-are-faster"}
    assert set(one) == CLAIMS and all(one[c] == two[c] for c in CLAIMS - clocked)
