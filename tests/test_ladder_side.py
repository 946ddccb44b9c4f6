"""The ladder written out layer by layer, pruning against loops, what the forward pass keeps against sums by hand,
checkpointing as a rival, bad input, the reproductions."""
import copy, json, math
import pytest, torch
from torch import nn
from conftest import ROOT, the_record, the_same_twice
from slmkit.adapt.ladder_side import (
    Ladder, accuracy, apart, choices, fisher, most_important, saved_bytes, side_config,
    start_pruned, stream, update_mb)
from slmkit.core import lora
from slmkit.core.data import load
from slmkit.core.fit import collate, encode_causal, label_loss
from slmkit.core.settings import KitError
from slmkit.core.zoo import load_model

REPRO, MEMORY = (ROOT/f"nbs/adapt/ladder_side_repro{end}.ipynb" for end in ("", "_memory"))

@pytest.fixture(scope="module")
def lm(): return load_model("lm-1m", "cpu", kind="causal")

@pytest.fixture(scope="module")
def rows(lm): return encode_causal(lm[1], ["is it cold in oslo now .", "ana sees a dog ."], ["weather", "animals"])

@pytest.fixture(scope="module")
def batch(lm, rows): return collate(rows, lm[1].pad_token_id)

@pytest.fixture(scope="module")
def scores(lm, rows): return fisher(lm[0], rows, lm[1].pad_token_id)

def logits_of(model, batch): return model(batch["input_ids"], batch["attention_mask"]).logits

@torch.no_grad()
def same(a, b, batch, atol=1e-2):
    here = batch["attention_mask"].bool()
    return torch.allclose(logits_of(a, batch)[here], logits_of(b, batch)[here], atol=atol)

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
        want = lm[0].get_output_embeddings()(ladder.up(ladder.side.norm(x)))
        got = logits_of(ladder, batch)
    here = batch["attention_mask"].bool()
    assert torch.allclose(got[here], want[here], atol=1e-4)

def test_without_rungs_only_the_embeddings_are_read(lm, batch):
    torch.manual_seed(0)
    alone, base = Ladder(copy.deepcopy(lm[0]), 4, rungs=False), copy.deepcopy(lm[0])
    changed = copy.deepcopy(alone)
    with torch.no_grad():
        for p in changed.base.model.layers.parameters(): p.add_(1.)
        assert torch.equal(logits_of(alone, batch), logits_of(changed, batch)) and len(alone.down) == 1
        ladder = Ladder(base, 4)
        before = logits_of(ladder, batch)
        for p in ladder.base.model.layers.parameters(): p.add_(1.)
        assert not torch.allclose(logits_of(ladder, batch), before)

def test_no_gradient_enters_the_backbone_and_all_of_the_rest_gets_one(lm, batch, scores):
    ladder = start_pruned(Ladder(copy.deepcopy(lm[0]), 4), scores)
    label_loss(ladder, batch).backward()
    for name, p in ladder.named_parameters():
        assert p.requires_grad == (p.grad is not None) == (not name.startswith("base.")), name
        if p.requires_grad: assert p.grad.abs().sum() > 0, name

def test_nothing_cut_is_the_large_network(lm, batch, scores):
    whole = start_pruned(Ladder(copy.deepcopy(lm[0]), 1, rungs=False), scores)
    assert same(whole, lm[0], batch)

def test_gates_and_rungs_begin_where_they_are_told(lm, scores):
    for gate in (.5, .9): assert torch.allclose(torch.sigmoid(Ladder(copy.deepcopy(lm[0]), gate=gate).alphas/.1),
                                                torch.full((5,), gate))
    small, picks = (start_pruned(Ladder(copy.deepcopy(lm[0])), scores, rungs) for rungs in (False, True))
    assert all(.008 < r.weight.std() < .012 for r in small.down[1:])
    assert all(torch.equal(r.weight, picks.down[0].weight) for r in picks.down[1:])

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
    c, thin = base.config, side_config(base.config, 4)
    ladder = start_pruned(Ladder(copy.deepcopy(base), 4), scores, rungs=True)
    by_dim = [0.]*128
    for n, v in scores.items():
        if n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            for j, x in enumerate(v.sum(0).tolist()): by_dim[j] += x
        if n.endswith(("o_proj.weight", "down_proj.weight")):
            for j, x in enumerate(v.sum(1).tolist()): by_dim[j] += x
    dims = sorted(sorted(range(128), key=lambda j: -by_dim[j])[:32])
    assert most_important(stream(scores), 32).tolist() == dims
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
    whole, half = (start_pruned(Ladder(copy.deepcopy(base), r, rungs=False), scores) for r in (1, 2))
    batch = dict(input_ids=torch.randint(1, 50, (2, 7)), attention_mask=torch.ones(2, 7).long(),
        labels=torch.randint(1, 50, (2, 7)))
    assert same(whole, base, batch, 1e-4)
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

def adapted(model):
    lora.inject(model, rank=7)
    return model

def test_memory_is_ordered_as_the_structure_says(lm, batch):
    full, ladder = copy.deepcopy(lm[0]).requires_grad_(True), Ladder(copy.deepcopy(lm[0]), 4)
    models = full, adapted(copy.deepcopy(lm[0])), ladder
    activations = [saved_bytes(lambda m=m: label_loss(m, batch), [*m.parameters(), *m.buffers()]) for m in models]
    assert activations[0] > activations[1] > 2*activations[2]
    mb = [update_mb(m, batch) for m in models]
    assert mb[0] > mb[1] > mb[2] and mb[0] == update_mb(full, batch)
    assert mb[0] > 4*4*lm[0].num_parameters()/2**20  # weights, gradients and two averages
    assert all(p.grad is None for m in models for p in m.parameters())

def test_checkpointing_keeps_less_and_gives_the_same_gradient(lm, batch):
    one = adapted(copy.deepcopy(lm[0]))
    for m in one.modules():
        if isinstance(m, lora.LoRALinear): nn.init.normal_(m.B, std=.02)
    two, grads = copy.deepcopy(one), []
    two.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    for m in (one, two):
        label_loss(m.train(), batch).backward()
        grads.append(torch.cat([p.grad.flatten() for p in m.parameters() if p.requires_grad]))
    assert torch.allclose(*grads, atol=1e-5) and grads[0].abs().max() > 0
    assert update_mb(two, batch) < update_mb(one, batch)

@torch.no_grad()
def test_accuracy_is_what_greedy_decoding_gets_right(lm):
    model, tok = lm
    rows = encode_causal(tok, load("intents", "test", 6, 0)["input"], ["a"]*6)
    told = []
    for k, row in enumerate(rows):
        ids = [i for i, label in zip(row["input_ids"], row["labels"]) if label < 0]
        asked = len(ids)
        for _ in range(3): ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if k % 2: ids[asked + k//2] = (ids[asked + k//2] + 1) % len(tok)  # a wrong token: first, second or third
        told.append(dict(input_ids=ids, labels=[-100]*asked + ids[asked:]))
    assert accuracy(model, told, tok.pad_token_id).right == [True, False]*3

def test_rows_with_an_answer_of_the_test_are_left_out():
    train, test = load("facts", "train", 900, 0), load("facts", "test", 228, 0)
    left = apart(train, test)
    assert 300 < len(left) < len(train) and not set(left["rationale"]) & set(test["rationale"])
    assert set(left["rationale"]) | set(test["rationale"]) >= set(train["rationale"])

def test_pieces_stay_in_their_order():
    assert most_important(torch.tensor([3., 9., 1., 5.]), 2, 3).tolist() == [3, 4, 5, 9, 10, 11]

def test_a_side_network_of_nothing_is_refused(lm):
    for r in (0, 65, 1000):
        with pytest.raises(KitError, match=f"can't be divided by {r}") as e: side_config(lm[0].config, r)
        assert "\n" not in str(e.value)

@pytest.mark.slow
def test_the_reproduction_runs_with_a_checkpoint_of_ones_own(tmp_path, torch_pool, lm):
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    lm[1].save_pretrained(tmp_path/"qwen")
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(lm[1]), hidden_size=32, intermediate_size=64, num_attention_heads=4,
            num_hidden_layers=2, num_key_value_heads=2, eos_token_id=1, pad_token_id=0,
            bos_token_id=3)).save_pretrained(tmp_path/"qwen")
    found = the_record(REPRO, tmp_path, torch_pool, profile="smoke", model=str(tmp_path/"qwen"))
    assert all(math.isfinite(v) for v in found["arms"].values())

@pytest.mark.slow
@pytest.mark.parametrize("notebook", [REPRO, MEMORY])
def test_same_seed_same_record(notebook, tmp_path, torch_pool):
    assert len(the_same_twice(notebook, tmp_path, torch_pool)["claims"]) in (2, 5)
