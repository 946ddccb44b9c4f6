"""Affine groups against torchao and numpy, packing against numpy's bits, layers, files, the rule for group sizes,
bad input, the gpu path."""
from functools import partial
import json, math
import numpy as np, pytest, torch
from safetensors.torch import load_file, save_file
from torch import nn
from conftest import ROOT, ran
from slmkit.compress.weight_only import (
    QuantLinear, affine, bits_figure, dequantize, effective_bits, granularity, own_tensors, pack, quantize,
    quantized, quantized_layers, read_back, round_trip, save, scales_only, spread, unpack)
from slmkit.core.zoo import linear_layers
from slmkit.core.settings import KitError
from slmkit.core.zoo import load_model

NB = ROOT/"nbs/compress/weight_only.ipynb"

@pytest.fixture(scope="module")
def lm(): return load_model("lm-1m", "cpu", kind="causal")

def matrices():
    "Normal weights, then groups of one sign, of zeros, of one value, with an outlier, and ties at half a step."
    g = torch.Generator().manual_seed(0)
    w = torch.randn(24, 64, generator=g)
    w[0], w[1], w[2], w[3] = w[0].abs() + 1, -w[1].abs() - 1, 0, .37
    w[4, 5], w[5, :8], w[6] = 60., 0, torch.arange(64)/2
    return w

@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("parts", [1, 2, 8])
def test_torchaos_affine_primitives_bit_for_bit(bits, parts):
    ao = pytest.importorskip("torchao.quantization.quant_primitives")
    w, top = matrices(), 2**bits - 1
    block, kw = (1, w.shape[1]//parts), dict(quant_min=0, quant_max=top)
    scale, zero = ao.choose_qparams_affine(w, ao.MappingType.ASYMMETRIC, block, torch.uint8, **kw)
    ints = ao.quantize_affine(w, block, scale, zero, torch.uint8, **kw)
    back = ao.dequantize_affine(ints, block, scale, zero, torch.uint8, **kw)
    ours = affine(w, bits, parts)
    assert torch.equal(ours[0].flatten(), scale.flatten()) and torch.equal(ours[1].flatten(), zero.float().flatten())
    assert torch.equal(quantize(w, *ours, bits), ints) and torch.equal(round_trip(w, bits, parts), back)

@pytest.mark.parametrize("bits,parts", [(2, 1), (3, 4), (4, 8), (8, 2)])
def test_affine_written_out_group_by_group(bits, parts):
    w, top = matrices(), 2**bits - 1
    scale, zero = affine(w, bits, parts)
    ints, back, size = quantize(w, scale, zero, bits), round_trip(w, bits, parts), w.shape[1]//parts
    for i, row in enumerate(w.numpy()):
        for j in range(parts):
            group = row[j*size:(j + 1)*size]
            low, high = np.float32(min(group.min(), 0)), np.float32(max(group.max(), 0))
            s = max((high - low)/np.float32(top), np.finfo(np.float32).tiny)
            z = min(max(-np.round(low/s), 0), top)
            q = np.clip(np.round(group*(np.float32(1)/s)) + z, 0, top)  # numpy rounds halves to even, too
            assert scale[i, j] == s and zero[i, j] == z and (ints[i, j*size:(j + 1)*size].numpy() == q).all()
            assert np.abs(back[i, j*size:(j + 1)*size].numpy() - group).max() <= s*.5001

def test_zero_stays_zero_and_eight_bits_of_whole_numbers_are_exact():
    w = matrices()
    w[torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < .3] = 0
    for bits in (2, 3, 4): assert (round_trip(w, bits, 4)[w == 0] == 0).all()
    whole = torch.arange(-100, 156).float()[None]
    assert torch.equal(round_trip(whole, 8), whole)

def test_whole_bytes_do_not_wrap_around_below_zero():
    w = matrices()
    scale, zero = affine(w, 4, 2)
    ints = quantize(w, scale, zero, 4)
    assert torch.equal(dequantize(ints, scale, zero.to(torch.uint8)), dequantize(ints, scale, zero))

@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_numpys_little_endian_line_of_bits(bits):
    for many in (1, 7, 8, 24, 101):
        ints = torch.randint(2**bits, (many,), generator=torch.Generator().manual_seed(many)).to(torch.uint8)
        line = np.unpackbits(ints.numpy()[:, None], axis=1, bitorder="little")[:, :bits].reshape(-1)
        assert (pack(ints, bits).numpy() == np.packbits(line, bitorder="little")).all()
        assert torch.equal(unpack(pack(ints, bits), bits, many), ints)

def test_a_row_of_any_shape_packs_in_the_order_of_its_memory():
    ints = torch.randint(8, (6, 8)).to(torch.uint8)
    assert torch.equal(pack(ints, 3), torch.cat([pack(r, 3) for r in ints])) and len(pack(ints, 3)) == 18

def test_only_scales_learn_and_their_gradient_is_the_one_written_out():
    torch.manual_seed(0)
    layer = QuantLinear(nn.Linear(16, 6), 3, 4)
    x, v = torch.randn(5, 16), torch.randn(5, 6)
    box = scales_only(nn.Sequential(layer))
    assert [n for n, p in box.named_parameters() if p.requires_grad] == ["0.scale"]
    (box(x)*v).sum().backward()
    ints = unpack(layer.packed, 3, 96).view(6, 4, 4).float() - unpack(layer.zero, 3, 24).view(6, 4, 1).float()
    assert torch.allclose(layer.scale.grad, ((v.T @ x).view(6, 4, 4)*ints).sum(-1), atol=1e-5)

def test_layers_leave_the_head_and_the_original_alone(lm):
    model, _ = lm
    before = {k: v.clone() for k, v in model.state_dict().items()}
    q = quantized(model, 4, {n: 8 if "down" in n else 1 for n in linear_layers(model)})
    assert set(quantized_layers(q)) == set(linear_layers(model))
    assert type(q.lm_head) is nn.Linear
    assert q.lm_head.weight is q.model.embed_tokens.weight
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert q.model.layers[0].mlp.down_proj.scale.shape == (128, 8)
    assert q.model.layers[0].self_attn.q_proj.scale.shape == (128, 1)

def test_bits_a_weight_are_what_lies_on_the_disk(lm, tmp_path):
    model, _ = lm
    for bits, parts in ((4, 1), (3, 8), (2, 4), (8, 2)):
        q = quantized(model, bits, parts)
        size = save(q, tmp_path/"m.safetensors")
        assert size == (tmp_path/"m.safetensors").stat().st_size
        on_disk = load_file(tmp_path/"m.safetensors")
        ours = sum(t.nbytes for n, t in on_disk.items() if n.rpartition(".")[0] in linear_layers(model))
        weights = sum(x.weight.numel() for x in linear_layers(model).values())
        assert effective_bits(q) == pytest.approx(8*ours/weights)
        want = sum(x.weight.numel()*(bits + (16 + bits)*parts/x.weight.shape[1])
            for x in linear_layers(model).values())/weights
        assert effective_bits(q) == pytest.approx(want, rel=1e-3)
        rest = 2 * sum(
            t.numel() for n, t in own_tensors(model).items() if n.rpartition(".")[0] not in linear_layers(model)
        )
        assert 0 < size - ours - rest < 20_000  # the header

def test_a_model_read_back_gives_the_same_logits(lm, tmp_path):
    model, tok = lm
    ids = torch.tensor([tok("the home of ana is in", add_special_tokens=False)["input_ids"]])
    for bits, parts in ((3, 1), (4, {n: 1 + ("k_proj" in n) for n in linear_layers(model)})):
        q = quantized(model, bits, parts)
        save(q, tmp_path/"m.safetensors")
        back = read_back(tmp_path/"m.safetensors", model)
        with torch.no_grad(): assert torch.equal(back(input_ids=ids).logits, q.eval()(input_ids=ids).logits)
        assert back.lm_head.weight is back.model.embed_tokens.weight

def qwen(tok, folder=None, **more):
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    shape = dict(vocab_size=len(tok), hidden_size=16, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=1, num_hidden_layers=2, eos_token_id=1, pad_token_id=0, bos_token_id=3)
    model = Qwen2ForCausalLM(Qwen2Config(**{**shape, **more})).eval()
    if folder:
        tok.save_pretrained(folder)
        model.save_pretrained(folder)
    return model

def test_another_architecture_with_biases_and_a_head_of_its_own(lm, tmp_path):
    model = qwen(lm[1])
    with torch.no_grad():
        for x in linear_layers(model).values():
            if x.bias is not None: x.bias.normal_()
    q, ids = quantized(model, 4, 2), torch.tensor([[5, 6, 7]])
    assert "lm_head" not in linear_layers(model) and not model.config.tie_word_embeddings
    save(q, tmp_path/"m.safetensors")
    with torch.no_grad():
        assert torch.equal(read_back(tmp_path/"m.safetensors", model)(input_ids=ids).logits, q(input_ids=ids).logits)

def test_tuned_scales_survive_the_file_up_to_half_precision(lm, tmp_path):
    q = quantized(lm[0], 4)
    with torch.no_grad():
        for m in quantized_layers(q).values(): m.scale *= 1.0123
    save(q, tmp_path/"m.safetensors")
    back = read_back(tmp_path/"m.safetensors", lm[0])
    for n, m in quantized_layers(q).items(): assert torch.equal(back.get_submodule(n).scale, m.scale.half().float())

def test_granularity_against_all_halvings():
    rng = np.random.default_rng(0)
    for _ in range(50):
        w = torch.tensor(rng.normal(size=(6, 96)), dtype=torch.float32)
        w[:, rng.integers(96)] *= float(rng.choice([1, 3, 30]))
        threshold = float(rng.choice([.8, .88, .92]))
        brute = lambda p: np.mean([max(g.max(), 0) - min(g.min(), 0) for g in w.numpy().reshape(-1, 96//p)])
        assert spread(w, 4) == pytest.approx(brute(4), rel=1e-5)
        pays = [brute(2*p)/brute(p) <= threshold for p in (1, 2, 4, 8, 16)]
        assert granularity(w, threshold, most=32) == 2**next((i for i, yes in enumerate(pays) if not yes), 5)
        assert granularity(w, threshold, most=4) <= 4

def test_bad_input(lm, tmp_path):
    model, _ = lm
    with pytest.raises(KitError, match="9 bits a weight: there are 1 to 8"): quantized(model, 9)
    with pytest.raises(KitError, match="128 columns don't divide into 7 groups"): quantized(model, 4, 7)
    with pytest.raises(KitError, match="not a file of `save`"): read_back(tmp_path/"none.safetensors", model)
    save_file({"a": torch.zeros(2)}, tmp_path/"other.safetensors")
    with pytest.raises(KitError, match="not a file of `save`"): read_back(tmp_path/"other.safetensors", model)
    save(quantized(model, 4), tmp_path/"m.safetensors")
    with pytest.raises(KitError, match="does not fit the model") as e: read_back(tmp_path/"m.safetensors", qwen(lm[1]))
    assert "\n" not in str(e.value)

# ---- the notebook

CLAIMS = {"fine-where-needed-with-outliers", "fine-where-needed", "better-than-even-spending",
    "scales-beat-lora-then-rounding-3", "scales-beat-lora-then-rounding-4", "scales-beat-lora-then-rounding-2",
    "scales-restore-language-modeling"}
run = partial(ran, NB)

@pytest.mark.slow
def test_gpu_path_on_a_tiny_checkpoint_and_a_file(tmp_path, torch_pool, lm):
    qwen(lm[1], tmp_path/"qwen")
    mine = tmp_path/"mine.jsonl"  # split by the checksums of its inputs
    mine.write_text("\n".join(json.dumps(dict(input=f"after {i} comes", label=f"{i + 1}")) for i in range(100)),
        encoding="utf-8")
    found = run(tmp_path, torch_pool, profile="gpu", model=str(tmp_path/"qwen"), data=str(mine), steps=2)
    assert set(found) == CLAIMS | {"scales-come-near-qat"}
    assert found["fine-where-needed"]["model"] == str(tmp_path/"qwen")
    assert all(math.isfinite(v) for r in found.values() for v in r["arms"].values())

@pytest.mark.slow
def test_same_seed_same_record(tmp_path, torch_pool):
    one, two = (run(tmp_path, torch_pool, name, profile="smoke", seed=3) for name in ("one", "two"))
    assert one == two and set(one) == CLAIMS

def test_figure_needs_no_run():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    arms = dict(as_it_is=1.) | {f"{w}{k}_{b}_{p}": 2. for w in ("", "bits_") for k in ("plain", "outliers")
        for b in (3, 4) for p in (1, 2, 4, 8, "chosen", "dealt")}
    fig, ax = plt.subplots()
    bits_figure([dict(arms=arms)]*2, ax)
    assert len(ax.lines) == 12 and len(ax.get_legend().texts) == 6
    plt.close(fig)
