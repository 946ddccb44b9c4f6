"""Removed units against silenced ones in double precision, scores against loops, LoRA against peft, files,
checkpoints, bad input."""
from functools import partial
import copy, json, math, random
import numpy as np, pytest, torch
from conftest import ROOT, ran
from slmkit.compress.structured import (LoRA, bars_figure, counts, globally, gradients, groups, layers_of, load_smaller,
    magnitude, merge, per_unit, places, scores_of, sizes, smaller, take, taylor, uniform, with_lora)
from slmkit.core.decode import decode
from slmkit.core.fit import batches, collate, fit
from slmkit.core.settings import KitError

NB = ROOT/"nbs/compress/structured.ipynb"
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
    rng, units = np.random.default_rng(seed), sizes(model)[0]
    pick = lambda n: torch.tensor(sorted(rng.choice(n, int(rng.integers(1, n + 1)), replace=False).tolist()))
    return [{kind: pick(n[i]) for kind, n in units.items()} for i in range(len(layers_of(model)))]

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
    with torch.no_grad(): small, want = smaller(model, kept)(**batch).logits, silent(model, kept)(**batch).logits
    here = batch["attention_mask"] == 1
    assert torch.allclose(small[here], want[here], atol=1e-10)
    assert (want[here] - model(**batch).logits[here]).abs().max() > 1e-2
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters()))

@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_really_gone(kind):
    model = tiny(kind)
    kept = choice(model, 5)
    small, (units, weights) = smaller(model, kept), sizes(model)
    assert weights == dict(heads=(2 + 2)*4*16 + (2*4)*16*0 + 2*4*16, channels=3*16)  # a key head, its two query heads
    gone = {kind: sum(units[kind]) - sum(len(k[kind]) for k in kept) for kind in units}
    biases = 16*gone["heads"] if kind == "Qwen2" else 0  # 8 of the queries, 4 of keys, 4 of values
    assert small.num_parameters() == model.num_parameters() - sum(gone[k]*weights[k] for k in gone) - biases
    assert [len(k["heads"]) for k in kept] == sizes(small)[0]["heads"]
    assert small.config.kept[0]["channels"] == len(kept[0]["channels"])
    for layer in small.model.layers:
        for members in groups(layer).values():
            for m, dim, size in members: assert tuple(m.weight.shape) == (m.out_features, m.in_features)

def test_a_smaller_model_decodes_with_its_cache():
    model = tiny("Llama", num_key_value_heads=4).float()
    kept = choice(model, 2)
    small, quiet = smaller(model, kept), silent(model.double(), kept)
    ids = torch.tensor([[3, 7, 9, 11, 20]])
    got = decode(small.float(), ids, torch.ones_like(ids), 8)[0].tolist()
    text = ids[0].tolist()
    for token in got:
        with torch.no_grad(): assert quiet(input_ids=torch.tensor([text])).logits[0, -1].argmax().item() == token
        text.append(token)
        if token == 1: break

def test_take_and_per_unit_by_loops():
    w = torch.tensor(np.random.default_rng(0).normal(size=(6, 9)))
    assert take(w, torch.tensor([0, 2]), 0, 2).tolist() == [w[i].tolist() for i in (0, 1, 4, 5)]
    assert take(w, torch.tensor([2]), 1, 3).tolist() == [[w[i, j].item() for j in (6, 7, 8)] for i in range(6)]
    assert per_unit(w, 0, 3).tolist() == pytest.approx([sum(w[i, j].item() for i in range(u*3, u*3 + 3)
            for j in range(9)) for u in range(2)])
    assert per_unit(w, 1, 3).tolist() == pytest.approx([sum(w[i, j].item() for i in range(6)
            for j in range(u*3, u*3 + 3)) for u in range(3)])

# ---- importance

def test_scores_by_loops():
    model, data = tiny(), [collate(rows(4, s), 0) for s in (0, 1)]
    gradients(model, data)
    want = {}
    for b in data:
        model2 = copy.deepcopy(model)
        model2.zero_grad()
        model2(**b).loss.backward()
        for n, p in model2.named_parameters(): want[n] = want.get(n, 0) + p.grad/2
    for n, p in model.named_parameters(): assert torch.allclose(p.grad, want[n], atol=1e-12), n
    for element, number in ((taylor, lambda w, g: abs(w*g)), (magnitude, lambda w, g: w**2)):
        scores = scores_of(model, element)
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
    gradients(model, data)
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

def test_another_objective():
    model, data = tiny(), [collate(rows(4), 0)]
    gradients(model, data, lambda out, batch: out.logits.amax(1).mean())
    want = torch.autograd.grad(model(**data[0]).logits.max(dim=1)[0].mean(),
        model.model.layers[0].mlp.up_proj.weight)[0]
    assert torch.allclose(model.model.layers[0].mlp.up_proj.weight.grad, want)

# ---- which units stay

def drawn(seed, layers=4, heads=4, channels=30):
    g = torch.Generator().manual_seed(seed)
    return [dict(heads=torch.rand(heads, generator=g), channels=torch.rand(channels, generator=g)*(i + 1))
        for i in range(layers)]

@pytest.mark.parametrize("seed", range(3))
def test_one_ranking_by_brute_force(seed):
    scores = drawn(seed)
    gone = dict(heads=7, channels=70)
    kept = globally(scores, gone)
    for kind, many in gone.items():
        best = [max(range(len(s[kind])), key=lambda j: s[kind][j]) for s in scores]
        all_ = sorted((s[kind][j].item(), i, j) for i, s in enumerate(scores)
            for j in range(len(s[kind])) if j != best[i])
        lost = {(i, j) for _, i, j in all_[:many]}
        assert [{*k[kind].tolist()} for k in kept] == [{j for j in range(len(s[kind])) if (i, j) not in lost}
            for i, s in enumerate(scores)]

def test_even_shares():
    kept = uniform(drawn(0), .25)
    for s, k in zip(drawn(0), kept):
        assert {n: len(k[n]) for n in k} == dict(heads=3, channels=22)  # 7.5 rounds to 8
        assert set(k["heads"].tolist()) == set(s["heads"].argsort(descending=True)[:3].tolist())
    assert all(len(k["heads"]) == 1 for k in uniform(drawn(0), .99))

@pytest.mark.parametrize("share", [.1, .25, .5])
@pytest.mark.parametrize("gamma", [.25, 1., 4.])
def test_as_many_weights_for_every_balance(share, gamma):
    units, weights = dict(heads=20, channels=1680), dict(heads=16384, channels=384)
    gone = counts(units, weights, share, gamma)
    whole = sum(units[k]*weights[k] for k in units)
    assert abs(sum(gone[k]*weights[k] for k in units) - share*whole) <= 192
    part = {k: gone[k]/units[k] for k in units}
    assert part["channels"] == pytest.approx(gamma*part["heads"], abs=.5*(gamma + 1)/20)  # heads come in twentieths

# ---- LoRA

def test_lora_equals_pefts_given_the_same_matrices():
    from peft import LoraConfig, get_peft_model
    ours, theirs, batch = tiny("Qwen2"), tiny("Qwen2"), collate(rows(), 0)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peer = get_peft_model(theirs, LoraConfig(r=3, lora_alpha=6, target_modules=names)).double()
    with_lora(ours, 3, 6.).double()
    g = torch.Generator().manual_seed(1)
    pairs = list(zip(places(ours, LoRA), [m for n, m in peer.named_modules() if n.rpartition(".")[2] in names]))
    assert len(pairs) == 21
    with torch.no_grad():
        for (_, _, o), p in pairs:
            o.A.copy_(torch.randn(o.A.shape, generator=g)/4)
            o.B.copy_(torch.randn(o.B.shape, generator=g)/4)
            p.lora_A["default"].weight.copy_(o.A)
            p.lora_B["default"].weight.copy_(o.B)
        assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == peer.get_nb_trainable_parameters()[0]
        assert torch.allclose(ours(**batch).logits, peer(**batch).logits, atol=1e-10)
        before = ours(**batch).logits
        assert (before - tiny("Qwen2")(**batch).logits).abs().max() > .1
        merged, peer = merge(ours), peer.merge_and_unload()
    assert torch.allclose(merged(**batch).logits, before, atol=1e-10)
    for (n, p), (m, q) in zip(merged.named_parameters(), peer.named_parameters()):
        assert n == m and torch.allclose(p, q, atol=1e-12)

def test_lora_begins_as_nothing_trains_alone_and_leaves_nothing_behind():
    model, batch = smaller(tiny().float(), choice(tiny(), 3)), collate(rows(), 0)
    names = [n for n, _ in model.named_parameters()]
    with torch.no_grad(): want = model(**batch).logits
    tuned = with_lora(copy.deepcopy(model), 2)
    with torch.no_grad(): assert torch.equal(tuned(**batch).logits, want)
    h = fit(
        tuned,
        lambda m, b: m(**b).loss,
        batches(rows(20), 5, 0, random.Random(0)),
        steps=20,
        lr=2e-2,
        progress=False,
    )
    assert h.loss[-1] < h.loss[0] and all(torch.equal(p, dict(model.named_parameters())[n.replace(".linear", "")])
                                          for n, p in tuned.named_parameters() if not n.endswith((".A", ".B")))
    merged = merge(tuned)
    assert [n for n, _ in merged.named_parameters()] == names and merged.num_parameters() == model.num_parameters()
    assert all(p.requires_grad for p in merged.parameters())

# ---- files and bad input

@pytest.mark.parametrize("tied", [True, False])
def test_a_smaller_model_comes_back_from_its_folder(tmp_path, tied):
    model = tiny("Qwen2", tie_word_embeddings=tied).float()
    batch = collate(rows(), 0)
    small = smaller(model, choice(model, 4))
    small.save_pretrained(tmp_path/"small")
    back = load_smaller(tmp_path/"small")
    with torch.no_grad(): assert torch.allclose(back(**batch).logits, small(**batch).logits, atol=1e-5)
    assert back.num_parameters() == small.num_parameters()
    again = smaller(back, choice(back, 5))
    again.save_pretrained(tmp_path/"again")  # cut once more
    with torch.no_grad():
        assert torch.allclose(load_smaller(tmp_path/"again")(**batch).logits, again(**batch).logits, atol=1e-5)

def test_bad_input(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(KitError, match="heads and channels of a gpt2 are not known") as e: layers_of(gpt)
    assert "\n" not in str(e.value)
    with pytest.raises(KitError, match="13 heads can't go: one stays in each layer"):
        globally(drawn(0), dict(heads=13, channels=1))
    with pytest.raises(KitError, match="no model in"): load_smaller(tmp_path/"nothing")
    tiny().save_pretrained(tmp_path/"whole")
    with pytest.raises(KitError, match="was not made by `smaller`"): load_smaller(tmp_path/"whole")

# ---- the notebook

CLAIMS = {"loss-knows-better", "lora-recovers-most", "one-ranking-beats-even", "the-gain-is-in-the-layers",
    "balance-helps-when-half-goes", "really-faster", "ahead-after-recovery"}
run = partial(ran, NB)

@pytest.mark.slow
def test_gpu_path_on_a_tiny_checkpoint_and_a_file(tmp_path, torch_pool):
    from slmkit.toyland.tokenizer import build_tokenizer
    tok = build_tokenizer()
    tok.save_pretrained(tmp_path/"qwen")
    tiny("Qwen2", vocab_size=len(tok)).float().save_pretrained(tmp_path/"qwen")
    mine = tmp_path/"mine.jsonl"  # split by the checksums of its inputs
    mine.write_text("\n".join(json.dumps(dict(input=f"after {i} comes {i + 1} and then {i + 2} .", label="-"))
            for i in range(900)), encoding="utf-8")
    found = run(tmp_path, torch_pool, profile="gpu", model=str(tmp_path/"qwen"), data=str(mine), steps=2, share=.5)
    assert set(found) == CLAIMS and all(math.isfinite(v) for r in found.values() for v in r["arms"].values())
    assert found["really-faster"]["arms"]["parameters_small"] < found["really-faster"]["arms"]["parameters_dense"]

@pytest.mark.slow
def test_same_seed_same_record(tmp_path, torch_pool):
    one, two = (run(tmp_path, torch_pool, name, profile="smoke", seed=3) for name in ("one", "two"))
    assert set(one) == CLAIMS - {"ahead-after-recovery"}  # whose arms are slow
    timeless = lambda r: {k: v for k, v in r["arms"].items() if not k.startswith("seconds")}
    assert all(timeless(one[c]) == timeless(two[c]) and one[c]["rows"] == two[c]["rows"] for c in one)

def test_figure_needs_no_run():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    keys = ("random", "magnitude", "taylor", "moved", "global")
    arms = {f"{k}{end}": 2. for k in keys for end in ("", "_recovered")} | dict(dense=1.5)
    fig, ax = plt.subplots()
    bars_figure([dict(arms=arms)]*2, ax)
    assert len(ax.get_yticklabels()) == 5 and ax.get_xlabel() == "nats a token"
    plt.close(fig)
