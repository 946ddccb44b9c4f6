"Removed units against silenced ones in double precision, scores against loops, LoRA after a cut, files, bad input."
import copy, random
import numpy as np, pytest, torch
from slmkit.compress.structured import (best_units, coupled_groups, even_shares, global_ranking, gradients, importance,
    load_pruned, magnitude, on_other_layers, plain_texts, prunable_layers, prune_units, slice_units, split_budget,
    sum_per_unit, taylor, unit_sizes)
from slmkit.core.decode import decode
from slmkit.core.fit import batches, collate, fit
from slmkit.core.lora import inject, merge
from slmkit.core.settings import KitError

SHAPE = dict(vocab_size=40, hidden_size=16, intermediate_size=12, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, pad_token_id=0, bos_token_id=3, eos_token_id=1, attn_implementation="eager",
    initializer_range=.3)
KINDS = ["Llama", "Qwen2", "Mistral"]

def tiny(kind="Llama", seed=0, **more):
    import transformers
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**{**SHAPE, **more}))
    for n, p in model.named_parameters():
        if n.endswith("bias"): torch.nn.init.normal_(p)  # else a wrong cut of them would not show
    return model.double().eval()

def rows(n=6, seed=0):
    rng = random.Random(seed)
    ids = [[3] + [rng.randrange(5, 40) for _ in range(rng.randint(4, 9))] for _ in range(n)]
    return [dict(input_ids=i, labels=i) for i in ids]

def choice(model, seed=0):
    "Some units of each layer, other numbers in every layer."
    rng, units = np.random.default_rng(seed), unit_sizes(model)[0]
    pick = lambda n: torch.tensor(sorted(rng.choice(n, int(rng.integers(1, n + 1)), replace=False).tolist()))
    return [{kind: pick(n[i]) for kind, n in units.items()} for i in range(len(prunable_layers(model)))]

def silent(model, kept):
    "The whole model, with the output of every removed unit multiplied by zero on its way: shares no line with the kit."
    model = copy.deepcopy(model)
    for layer, keep in zip(model.model.layers, kept):
        a, m = layer.self_attn, layer.mlp
        per = a.o_proj.in_features//(a.k_proj.out_features//a.head_dim)
        on_heads = torch.tensor([float(j//per in keep["heads"].tolist()) for j in range(a.o_proj.in_features)]).double()
        on_channels = torch.tensor([float(j in keep["channels"].tolist())
                for j in range(m.down_proj.in_features)]).double()
        a.o_proj.register_forward_pre_hook(lambda mod, args, on=on_heads: (args[0]*on,))
        m.down_proj.register_forward_pre_hook(lambda mod, args, on=on_channels: (args[0]*on,))
    return model

# ---- what is removed is what was silenced

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_smaller_gives_the_logits_of_the_silenced_model(kind, seed):
    model, batch = tiny(kind, seed), collate(rows(), 0)
    before, kept = copy.deepcopy(model), choice(model, seed)
    with torch.no_grad(): small, want = prune_units(model, kept)(**batch).logits, silent(model, kept)(**batch).logits
    here = batch["attention_mask"] == 1
    assert torch.allclose(small[here], want[here], atol=1e-10)
    assert (want[here] - model(**batch).logits[here]).abs().max() > 1e-2
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters()))

@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_really_gone(kind):
    model = tiny(kind)
    kept = choice(model, 5)
    small, (units, weights) = prune_units(model, kept), unit_sizes(model)
    assert weights == dict(heads=(2 + 2)*4*16 + (2*4)*16*0 + 2*4*16, channels=3*16)  # a key head, its two query heads
    gone = {kind: sum(units[kind]) - sum(len(k[kind]) for k in kept) for kind in units}
    biases = 16*gone["heads"] if kind == "Qwen2" else 0  # 8 of the queries, 4 of keys, 4 of values
    assert small.num_parameters() == model.num_parameters() - sum(gone[k]*weights[k] for k in gone) - biases
    assert [len(k["heads"]) for k in kept] == unit_sizes(small)[0]["heads"]
    assert small.config.kept[0]["channels"] == len(kept[0]["channels"])
    for layer in small.model.layers:
        for members in coupled_groups(layer).values():
            for m, dim, size in members: assert tuple(m.weight.shape) == (m.out_features, m.in_features)

def test_a_smaller_model_decodes_with_its_cache():
    model = tiny("Llama", num_key_value_heads=4).float()
    kept = choice(model, 2)
    small, quiet = prune_units(model, kept), silent(model.double(), kept)
    ids = torch.tensor([[3, 7, 9, 11, 20]])
    got = decode(small.float(), ids, torch.ones_like(ids), 8)[0].tolist()
    text = ids[0].tolist()
    for token in got:
        with torch.no_grad(): assert quiet(input_ids=torch.tensor([text])).logits[0, -1].argmax().item() == token
        text.append(token)
        if token == 1: break

def test_take_and_per_unit_by_loops():
    w = torch.tensor(np.random.default_rng(0).normal(size=(6, 9)))
    assert slice_units(w, torch.tensor([0, 2]), 0, 2).tolist() == [w[i].tolist() for i in (0, 1, 4, 5)]
    assert slice_units(w, torch.tensor([2]), 1, 3).tolist() == [[w[i, j].item() for j in (6, 7, 8)] for i in range(6)]
    assert sum_per_unit(w, 0, 3).tolist() == pytest.approx([sum(w[i, j].item() for i in range(u*3, u*3 + 3)
            for j in range(9)) for u in range(2)])
    assert sum_per_unit(w, 1, 3).tolist() == pytest.approx([sum(w[i, j].item() for i in range(6)
            for j in range(u*3, u*3 + 3)) for u in range(3)])

# ---- importance

def test_scores_by_loops():
    model, data = tiny(), [collate(rows(4, s), 0) for s in (0, 1)]
    gradients(model, rows(4, 0) + rows(4, 1), 0, batch_size=4)
    want = {}
    for b in data:
        model2 = copy.deepcopy(model)
        model2.zero_grad()
        model2(**b).loss.backward()
        for n, p in model2.named_parameters(): want[n] = want.get(n, 0) + p.grad/2
    for n, p in model.named_parameters(): assert torch.allclose(p.grad, want[n], atol=1e-12), n
    for element, number in ((taylor, lambda w, g: abs(w*g)), (magnitude, lambda w, g: w**2)):
        scores = importance(model, element)
        for i, layer in enumerate(model.model.layers):
            a, m = layer.self_attn, layer.mlp
            for head in range(2):
                total = 0.
                for lin, size, rows_ in ((a.q_proj, 8, True), (a.k_proj, 4, True), (a.v_proj, 4, True),
                        (a.o_proj, 8, False)):
                    for j in range(head*size, (head + 1)*size):
                        w, g = (lin.weight[j], lin.weight.grad[j]) if rows_ else (lin.weight[:, j],
                            lin.weight.grad[:, j])
                        total += sum(number(x.item(), y.item()) for x, y in zip(w, g))
                assert scores[i]["heads"][head].item() == pytest.approx(total, rel=1e-5)
            for c in (0, 7, 11):
                pairs = [
                    (m.gate_proj.weight[c], m.gate_proj.weight.grad[c]),
                    (m.up_proj.weight[c], m.up_proj.weight.grad[c]),
                    (m.down_proj.weight[:, c], m.down_proj.weight.grad[:, c])]
                total = sum(number(x.item(), y.item()) for w, g in pairs for x, y in zip(w, g))
                assert scores[i]["channels"][c].item() == pytest.approx(total, rel=1e-5)

def test_first_order_change_is_what_the_loss_does():
    "Shrink one channel's writing column a little: the loss moves by the sum of w·∂L/∂w, as importance assumes."
    model, data = tiny(), [collate(rows(), 0)]
    gradients(model, rows(), 0)
    down = model.model.layers[1].mlp.down_proj.weight
    promised = (down*down.grad).sum(0)
    at = promised.abs().argmax()
    def loss(scale):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            moved.model.layers[1].mlp.down_proj.weight[:, at] *= scale
            return moved(**data[0]).loss.item()
    # the loss itself is in single precision
    assert (loss(1.02) - loss(.98))/.04 == pytest.approx(promised[at].item(), rel=.02)

# ---- which units stay

def drawn(seed, layers=4, heads=4, channels=30):
    g = torch.Generator().manual_seed(seed)
    return [dict(heads=torch.rand(heads, generator=g), channels=torch.rand(channels, generator=g)*(i + 1))
        for i in range(layers)]

@pytest.mark.parametrize("seed", range(3))
def test_one_ranking_by_brute_force(seed):
    scores = drawn(seed)
    gone = dict(heads=7, channels=70)
    kept = global_ranking(scores, gone)
    for kind, many in gone.items():
        best = [max(range(len(s[kind])), key=lambda j: s[kind][j]) for s in scores]
        all_ = sorted((s[kind][j].item(), i, j) for i, s in enumerate(scores)
            for j in range(len(s[kind])) if j != best[i])
        lost = {(i, j) for _, i, j in all_[:many]}
        assert [{*k[kind].tolist()} for k in kept] == [{j for j in range(len(s[kind])) if (i, j) not in lost}
            for i, s in enumerate(scores)]

def test_even_shares():
    kept = even_shares(drawn(0), dict(heads=4, channels=31))
    assert [len(k["heads"]) for k in kept] == [3]*4 and sum(len(k["channels"]) for k in kept) == 4*30 - 31
    assert {len(k["channels"]) for k in kept} == {22, 23}
    for s, k in zip(drawn(0), kept):
        assert set(k["heads"].tolist()) == set(s["heads"].argsort(descending=True)[:3].tolist())

def test_spared_layers_lose_nothing_and_the_others_all():
    for spare, per in (((1, 0), 3), ((1, 2), 1), ((0, 1), 3)):
        kept = even_shares(drawn(1), dict(heads=3, channels=9), spare)
        lost = [4 - len(k["heads"]) for k in kept]
        assert sum(lost) == 3 and sum(30 - len(k["channels"]) for k in kept) == 9
        assert all(lost[i] == 0 for i in [*range(spare[0]), *range(4 - spare[1], 4)])
        assert sum(n > 0 for n in lost) == per
    with pytest.raises(KitError, match="can't go from 1 layers"):
        even_shares(drawn(1), dict(heads=4, channels=1), (1, 2))

def test_the_control_moves_the_numbers_by_a_layer():
    kept = global_ranking(drawn(2), dict(heads=7, channels=70))
    moved = on_other_layers(drawn(2), kept)
    for kind in ("heads", "channels"):
        assert [len(k[kind]) for k in moved] == [len(kept[i - 1][kind]) for i in range(4)]
    assert all(set(m["channels"].tolist()) == set(best_units(s["channels"], len(m["channels"])).tolist())
               for m, s in zip(moved, drawn(2)))

@pytest.mark.parametrize("share", [.1, .25, .5])
@pytest.mark.parametrize("gamma", [.25, 1., 4.])
def test_as_many_weights_for_every_balance(share, gamma):
    units, weights = dict(heads=20, channels=1680), dict(heads=16384, channels=384)
    gone = split_budget(units, weights, share, gamma)
    whole = sum(units[k]*weights[k] for k in units)
    assert abs(sum(gone[k]*weights[k] for k in units) - share*whole) <= 192
    part = {k: gone[k]/units[k] for k in units}
    assert part["channels"] == pytest.approx(gamma*part["heads"], abs=.5*(gamma + 1)/20)  # heads come in twentieths

# ---- repair

def test_lora_after_a_cut_begins_as_nothing_and_leaves_nothing_behind():
    model, batch = prune_units(tiny().float(), choice(tiny(), 3)), collate(rows(), 0)
    names = [n for n, _ in model.named_parameters()]
    with torch.no_grad(): want = model(**batch).logits
    tuned = copy.deepcopy(model)
    inject(tuned, rank=2, alpha=4)
    with torch.no_grad(): assert torch.equal(tuned(**batch).logits, want)
    stream = batches(rows(20), 5, 0, random.Random(0))
    h = fit(tuned, lambda m, b: m(**b).loss, stream, steps=20, lr=2e-2, progress=False)
    assert h.loss[-1] < h.loss[0]
    merged = merge(tuned)
    assert [n for n, _ in merged.named_parameters()] == names and merged.num_parameters() == model.num_parameters()

# ---- files and bad input

@pytest.mark.parametrize("tied", [True, False])
def test_a_smaller_model_comes_back_from_its_folder(tmp_path, tied):
    model = tiny("Qwen2", tie_word_embeddings=tied).float()
    batch = collate(rows(), 0)
    small = prune_units(model, choice(model, 4))
    small.save_pretrained(tmp_path/"small")
    back = load_pruned(tmp_path/"small")
    with torch.no_grad(): assert torch.allclose(back(**batch).logits, small(**batch).logits, atol=1e-5)
    assert back.num_parameters() == small.num_parameters()
    again = prune_units(back, choice(back, 5))
    again.save_pretrained(tmp_path/"again")  # cut once more
    with torch.no_grad():
        assert torch.allclose(load_pruned(tmp_path/"again")(**batch).logits, again(**batch).logits, atol=1e-5)

def test_bad_input(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(KitError, match="heads and channels of a gpt2 are not known") as e: prunable_layers(gpt)
    assert "\n" not in str(e.value)
    with pytest.raises(KitError, match="13 heads can't go: one stays in each layer"):
        global_ranking(drawn(0), dict(heads=13, channels=1))
    with pytest.raises(KitError, match="no model in"): load_pruned(tmp_path/"nothing")
    tiny().save_pretrained(tmp_path/"whole")
    with pytest.raises(KitError, match="was not made by `prune_units`"): load_pruned(tmp_path/"whole")

def test_texts_of_a_part_are_its_own():
    one, two = plain_texts("toyland", 3, "tune", 0), plain_texts("toyland", 3, "test", 0)
    assert one == plain_texts("toyland", 4, "tune", 0)[:3] and not set(one) & set(two)
    assert plain_texts("topics", 2, "test", 0) != plain_texts("topics", 2, "tune", 0)
