"""The ladder written out layer by layer, pruning against loops, what the forward pass keeps against sums by hand,
bad input, the gpu path."""
from functools import partial
import copy, json, math
import pytest, torch
from torch import nn
from conftest import ROOT, ran
from slmkit.adapt.ladder_side import (Ladder, answer_loss, at_answers, choices, fisher, gated, kept, memory, narrow,
    pruned, saved_bytes, stream)
from slmkit.core.fit import collate, encode_causal
from slmkit.core.settings import KitError
from slmkit.core.zoo import load_model

NB = ROOT/"nbs/adapt/ladder_side.ipynb"

@pytest.fixture(scope="module")
def lm(): return load_model("lm-1m", "cpu", kind="causal")

@pytest.fixture(scope="module")
def rows(lm): return encode_causal(lm[1], ["is it cold in oslo now .", "ana sees a dog ."], ["weather", "animals"])

@pytest.fixture(scope="module")
def batch(lm, rows): return collate(rows, lm[1].pad_token_id)

@pytest.fixture(scope="module")
def scores(lm, rows): return fisher(lm[0], rows, lm[1].pad_token_id)

def test_the_loss_is_transformers_own_on_answers(lm, batch):
    assert torch.allclose(answer_loss(lm[0], batch), lm[0](**batch).loss, atol=1e-5)
    logits, right = at_answers(lm[0], batch)
    assert right.tolist() == [t for row in batch["labels"].tolist() for t in row if t >= 0]
    assert len(logits) == len(right)

def test_the_ladder_written_out(lm, batch):
    torch.manual_seed(0)
    ladder = Ladder(copy.deepcopy(lm[0]), 4)
    with torch.no_grad():
        ladder.alphas.copy_(torch.linspace(-.2, .2, 5))
        seen = lm[0].model(batch["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states
        n = batch["input_ids"].shape[1]
        look = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)[None, None].expand(2, 1, n, n).clone()
        look.masked_fill_(batch["attention_mask"][:, None, None] == 0, torch.finfo(torch.float32).min)
        x, place = ladder.down[0](seen[0]), torch.arange(n)[None]
        turn = ladder.side.rotary_emb(x, place)
        for i, layer in enumerate(ladder.side.layers):
            mu = 1/(1 + math.exp(-ladder.alphas[i].item()/.1))
            x = mu*x + (1 - mu)*ladder.down[i + 1](seen[i + 1])
            hooks = layer._forward_pre_hooks
            layer._forward_pre_hooks = type(hooks)()  # the bare layer
            x = layer(x, attention_mask=look, position_ids=place, position_embeddings=turn)
            layer._forward_pre_hooks = hooks
        want = ladder.up(ladder.side.norm(x))
        got = ladder(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    here = batch["attention_mask"].bool()
    assert torch.allclose(got[here], want[here], atol=1e-4)

def test_without_rungs_only_the_embeddings_are_read(lm, batch):
    torch.manual_seed(0)
    alone, base = Ladder(copy.deepcopy(lm[0]), 4, rungs=False), copy.deepcopy(lm[0])
    changed = copy.deepcopy(alone)
    with torch.no_grad():
        for p in changed.base.model.layers.parameters(): p.add_(1.)
        assert torch.equal(at_answers(alone, batch)[0], at_answers(changed, batch)[0]) and len(alone.down) == 1
        ladder = Ladder(base, 4)
        before = at_answers(ladder, batch)[0]
        for p in ladder.base.model.layers.parameters(): p.add_(1.)
        assert not torch.allclose(at_answers(ladder, batch)[0], before)

def test_no_gradient_enters_the_backbone_and_all_of_the_rest_gets_one(lm, batch, scores):
    ladder = pruned(Ladder(copy.deepcopy(lm[0]), 4), scores)
    answer_loss(ladder, batch).backward()
    for name, p in ladder.named_parameters():
        assert p.requires_grad == (p.grad is not None) == (not name.startswith("base.")), name
        if p.requires_grad: assert p.grad.abs().sum() > 0, name

def test_nothing_cut_is_the_large_network(lm, batch, scores):
    whole = pruned(Ladder(copy.deepcopy(lm[0]), 1, rungs=False), scores)
    with torch.no_grad(): assert torch.allclose(at_answers(whole, batch)[0], at_answers(lm[0], batch)[0], atol=1e-2)

def test_fisher_is_the_sum_of_squared_gradients_row_by_row(lm, rows, scores):
    model, name = copy.deepcopy(lm[0]), "model.layers.1.mlp.up_proj.weight"
    want = 0
    for row in rows:
        loss = model(**collate([row], lm[1].pad_token_id)).loss
        want = want + torch.autograd.grad(loss, model.get_parameter(name))[0]**2
    assert torch.allclose(scores[name], want, rtol=1e-3, atol=1e-9) and (want > 0).any()
    assert set(scores) == {n for n, _ in model.named_parameters()}
    assert all(p.grad is None for p in lm[0].parameters())  # the model itself is left alone

def test_pruning_keeps_the_pieces_that_loops_would(lm, scores):
    base = lm[0]
    c, thin = base.config, narrow(base.config, 4)
    ladder = pruned(Ladder(copy.deepcopy(base), 4), scores)
    by_dim = [0.]*128
    for n, v in scores.items():
        if n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            for j, x in enumerate(v.sum(0).tolist()): by_dim[j] += x
        if n.endswith(("o_proj.weight", "down_proj.weight")):
            for j, x in enumerate(v.sum(1).tolist()): by_dim[j] += x
    dims = sorted(sorted(range(128), key=lambda j: -by_dim[j])[:32])
    assert kept(stream(scores), 32).tolist() == dims
    old, new, i = base.model.layers[2], ladder.side.layers[2], 2
    s = {k: scores[f"model.layers.2.{p}.{k}_proj.weight"]
        for p, ks in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))) for k in ks}
    neuron = [s["gate"][j].sum() + s["up"][j].sum() + s["down"][:, j].sum() for j in range(336)]
    neurons = sorted(sorted(range(336), key=lambda j: -neuron[j])[:84])
    head = [sum(s[k][32*h:32*h + 32].sum() for k in "qkv") + s["o"][:, 32*h:32*h + 32].sum() for h in range(4)]
    h = max(range(4), key=lambda h: head[h])
    places = list(range(32*h, 32*h + 32))
    assert choices(scores, c, thin)[i]["keys"].tolist() == places
    assert choices(scores, c, thin)[i]["neurons"].tolist() == neurons
    assert torch.equal(new.mlp.up_proj.weight, old.mlp.up_proj.weight[neurons][:, dims])
    assert torch.equal(new.mlp.down_proj.weight, old.mlp.down_proj.weight[dims][:, neurons])
    assert torch.equal(new.self_attn.k_proj.weight, old.self_attn.k_proj.weight[places][:, dims])
    assert torch.equal(new.self_attn.o_proj.weight, old.self_attn.o_proj.weight[dims][:, places])
    assert torch.equal(new.input_layernorm.weight, old.input_layernorm.weight[dims])
    x = torch.randn(3, 128)
    assert torch.equal(ladder.down[3](x), x[:, dims]) and torch.equal(ladder.up(x[:, :32])[:, dims], x[:, :32])

def test_grouped_heads_and_biases_are_cut_together():
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(Qwen2Config(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=8, num_key_value_heads=4, pad_token_id=0)).eval()
    for layer in base.model.layers:
        for k in "qkv": nn.init.normal_(getattr(layer.self_attn, f"{k}_proj").bias)
    scores = {n: torch.rand(p.shape) for n, p in base.named_parameters()}
    whole, half = (pruned(Ladder(copy.deepcopy(base), r, rungs=False), scores) for r in (1, 2))
    batch = dict(input_ids=torch.randint(1, 50, (2, 7)), attention_mask=torch.ones(2, 7).long(),
        labels=torch.randint(1, 50, (2, 7)))
    with torch.no_grad(): assert torch.allclose(at_answers(whole, batch)[0], at_answers(base, batch)[0], atol=1e-5)
    old, new = base.model.layers[0].self_attn, half.side.layers[0].self_attn
    at = choices(scores, base.config, half.side.config)[0]
    assert len(at["keys"]) == 8 and len(at["queries"]) == 16  # two groups of two heads of four
    assert [q//8 for q in at["queries"].tolist()][::2] == [k//4 for k in at["keys"].tolist()]
    assert torch.equal(new.q_proj.bias, old.q_proj.bias[at["queries"]])
    assert torch.equal(new.k_proj.bias, old.k_proj.bias[at["keys"]])

def test_what_is_kept_equals_sums_by_hand():
    x, y = torch.randn(6, 8), nn.Linear(8, 4)
    own = list(y.parameters())
    assert saved_bytes(lambda: y(x).sum(), own) == 4*6*8
    assert saved_bytes(lambda: y(x).sum(), [*own, x]) == 0
    assert saved_bytes(lambda: torch.tanh(y(x)).sum(), own) == 4*(6*8 + 6*4)
    assert saved_bytes(lambda: (torch.tanh(y(x))*torch.tanh(y(x))).sum(), own) == 4*(6*8 + 2*6*4)  # x is counted once
    frozen = nn.Linear(8, 4).requires_grad_(False)
    assert saved_bytes(lambda: torch.tanh(frozen(x)).sum(), list(frozen.parameters())) == 0
    with torch.no_grad(): h = frozen(x)
    z = nn.Linear(4, 2)
    assert saved_bytes(lambda: z(h).sum(), list(z.parameters())) == 4*6*4  # only what the trained layer read

def test_memory_is_exact_and_ordered_as_the_structure_says(lm, batch, scores):
    from slmkit.adapt.low_rank import ATTENTION, MLP, adapted
    from slmkit.core.lora import count_trained as count
    full, lora = copy.deepcopy(lm[0]).requires_grad_(True), adapted(copy.deepcopy(lm[0]), "lora", 7, ATTENTION + MLP)
    ladder = pruned(Ladder(copy.deepcopy(lm[0]), 4), scores)
    a, b, c = (memory(m, batch) for m in (full, lora, ladder))
    assert a == memory(full, batch)
    n = lm[0].num_parameters()
    assert a["gradients"] == 4*n
    assert a["optimizer"] == 8*n
    assert b["gradients"] == 4*count(lora)
    assert c["optimizer"] == 8*count(ladder)
    assert a["activations"] > b["activations"] > 2*c["activations"]

def test_gate_and_pieces():
    a, b = torch.randn(3), torch.randn(3)
    for alpha, t in ((.05, .1), (-2., 1.)):
        mu = 1/(1 + math.exp(-alpha/t))
        assert torch.allclose(gated(a, b, torch.tensor(alpha), t), mu*a + (1 - mu)*b, atol=1e-6)
    assert kept(torch.tensor([3., 9., 1., 5.]), 2, 3).tolist() == [3, 4, 5, 9, 10, 11]

def test_a_side_network_of_nothing_is_refused(lm):
    for r in (0, 65, 1000):
        with pytest.raises(KitError, match=f"can't be divided by {r}") as e: narrow(lm[0].config, r)
        assert "\n" not in str(e.value)

run = partial(ran, NB)

CLAIMS = {"less-memory-than-adapters", "as-accurate-at-equal-parameters", "more-accurate-at-equal-memory",
    "pruned-start-helps"}
@pytest.mark.slow
def test_gpu_path_on_a_tiny_checkpoint_and_a_file(tmp_path, torch_pool, lm):
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    lm[1].save_pretrained(tmp_path/"qwen")
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(lm[1]), hidden_size=32, intermediate_size=64, num_attention_heads=4,
            num_hidden_layers=2, num_key_value_heads=2, eos_token_id=1, pad_token_id=0,
            bos_token_id=3)).save_pretrained(tmp_path/"qwen")
    mine = tmp_path/"mine.jsonl"
    mine.write_text("\n".join(json.dumps(dict(input=f"after {i} comes", label=f"{i + 1}")) for i in range(100)),
        encoding="utf-8")
    found = run(tmp_path, torch_pool, profile="gpu", model=str(tmp_path/"qwen"), data=str(mine), steps=2)
    assert set(found) == CLAIMS and all(math.isfinite(v) for r in found.values() for v in r["arms"].values())

@pytest.mark.slow
def test_same_seed_same_record(tmp_path, torch_pool):
    one, two = (run(tmp_path, torch_pool, name, profile="smoke", seed=3) for name in ("one", "two"))
    assert one == two and set(one) == CLAIMS - {"pruned-start-helps"}  # whose arms are slow
