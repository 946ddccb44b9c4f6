"""Affine groups against torchao and numpy, packing against numpy's bits, GPTQ against its formula with explicit
inverses, AWQ's search, the rule for group sizes, bad input, smoke runs."""
import random
import numpy as np, pytest, torch

from slmkit.compress.weight_rounding import (
    adaptive_group_size, affine, awq, bits_a_weight, check_unrounded, deal, dequantize, gptq,
    input_grams, inverse_factor,
    mean_range, output_error, pack, permute_inputs, quantize, round_to_nearest, rounded, row_parts, unpack)
from slmkit.core.settings import KitError
from slmkit.core.zoo import linear_layers, load_model

@pytest.fixture(scope="module")
def lm(): return load_model("lm-1m", "cpu", kind="causal")

def matrices():
    "Normal weights, then groups of one sign, of zeros, of one value, with an outlier, and ties at half a step."
    w = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    w[0], w[1], w[2], w[3] = w[0].abs() + 1, -w[1].abs() - 1, 0, .37
    w[4, 5], w[5, :8], w[6] = 60., 0, torch.arange(64)/2
    return w

def inputs(n, seed=0):
    "Σxxᵀ of correlated inputs of unlike sizes."
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(400, n, generator=g)
    x = (x + .7*x[:, :1])*torch.linspace(.2, 3, n)
    return x.T @ x

@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [64, 32, 8])
def test_torchaos_affine_primitives_bit_for_bit(bits, size):
    ao = pytest.importorskip("torchao.quantization.quant_primitives")
    w, top = matrices(), 2**bits - 1
    block, kw = (1, size), dict(quant_min=0, quant_max=top)
    scale, zero = ao.choose_qparams_affine(w, ao.MappingType.ASYMMETRIC, block, torch.uint8, **kw)
    ints = ao.quantize_affine(w, block, scale, zero, torch.uint8, **kw)
    back = ao.dequantize_affine(ints, block, scale, zero, torch.uint8, **kw)
    ours = affine(w, bits, size)
    assert torch.equal(ours[0].flatten(), scale.flatten()) and torch.equal(ours[1].flatten(), zero.float().flatten())
    assert torch.equal(quantize(w, *ours, bits), ints) and torch.equal(round_to_nearest(w, bits, size), back)

@pytest.mark.parametrize("bits,size", [(2, 64), (3, 16), (4, 8), (8, 32)])
def test_affine_written_out_group_by_group(bits, size):
    w, top = matrices(), 2**bits - 1
    scale, zero = affine(w, bits, size)
    ints, back = quantize(w, scale, zero, bits), round_to_nearest(w, bits, size)
    for i, row in enumerate(w.numpy()):
        for j in range(64//size):
            group = row[j*size:(j + 1)*size]
            low, high = np.float32(min(group.min(), 0)), np.float32(max(group.max(), 0))
            s = max((high - low)/np.float32(top), np.finfo(np.float32).tiny)
            z = min(max(-np.round(low/s), 0), top)
            q = np.clip(np.round(group*(np.float32(1)/s)) + z, 0, top)  # numpy rounds halves to even, too
            assert scale[i, j] == s and zero[i, j] == z and (ints[i, j*size:(j + 1)*size].numpy() == q).all()
            assert np.abs(back[i, j*size:(j + 1)*size].numpy() - group).max() <= s*.5001

def test_zero_stays_zero_and_bytes_do_not_wrap_around():
    w = matrices()
    w[torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < .3] = 0
    for bits in (2, 3, 4): assert (round_to_nearest(w, bits, 16)[w == 0] == 0).all()
    scale, zero = affine(w, 4, 32)
    ints = quantize(w, scale, zero, 4)
    assert torch.equal(dequantize(ints, scale, zero.to(torch.uint8)), dequantize(ints, scale, zero))

@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_numpys_little_endian_line_of_bits(bits):
    for many in (1, 7, 8, 24, 101):
        ints = torch.randint(2**bits, (many,), generator=torch.Generator().manual_seed(many)).to(torch.uint8)
        line = np.unpackbits(ints.numpy()[:, None], axis=1, bitorder="little")[:, :bits].reshape(-1)
        assert (pack(ints, bits).numpy() == np.packbits(line, bitorder="little")).all()
        assert torch.equal(unpack(pack(ints, bits), bits, many), ints)

def test_bits_a_weight_are_those_of_packed_layers(lm):
    model, _ = lm
    sizes = {n: layer.in_features//(8 if "down" in n else 2) for n, layer in linear_layers(model).items()}
    stored = weights = 0
    for n, layer in linear_layers(model).items():
        scale, zero = affine(layer.weight.data, 4, sizes[n])
        stored += pack(quantize(layer.weight.data, scale, zero, 4), 4).nbytes + 2*scale.numel() + zero.numel()/2
        weights += layer.weight.numel()
    assert bits_a_weight(model, 4, sizes) == pytest.approx(8*stored/weights)
    assert bits_a_weight(model, 4, sizes, 16) > bits_a_weight(model, 4, sizes)
    assert row_parts(model, 2)["model.layers.0.self_attn.q_proj"] == 64

def by_formula(w, H, bits, size, damping=.01):
    "GPTQ with the inverse of what is left of H worked out anew at each column."
    H = H.double() + damping*H.double().diagonal().mean()*torch.eye(len(H))
    w, out = w.double().clone(), torch.zeros_like(w)
    for j in range(w.shape[1]):
        if j % size == 0: grid = affine(w[:, j:j + size].float(), bits)
        out[:, j] = dequantize(quantize(w[:, j:j + 1].float(), *grid, bits), *grid)[:, 0]
        inverse = torch.linalg.inv(H[j:, j:])
        w[:, j:] -= ((w[:, j] - out[:, j])/inverse[0, 0])[:, None]*inverse[0]
    return out

@pytest.mark.parametrize("size,block", [(32, 8), (8, 8), (16, 8), (8, 16)])
def test_gptq_is_its_formula(size, block):
    w, H = torch.randn(12, 32, generator=torch.Generator().manual_seed(3)), inputs(32)
    ours, want = gptq(w, H, 4, size, block=block), by_formula(w, H, 4, size)
    assert ((ours - want).abs() < 1e-4).float().mean() > .97  # a tie may turn
    assert output_error(w, ours, H) < output_error(w, round_to_nearest(w, 4, size), H)

def test_gptq_with_uncorrelated_inputs_is_rounding_to_nearest():
    w = torch.randn(6, 32, generator=torch.Generator().manual_seed(4))
    assert torch.equal(gptq(w, torch.diag(torch.rand(32) + .1), 3, 8), round_to_nearest(w, 3, 8))
    dead = inputs(32)
    dead[:, 3] = dead[3] = 0  # an input that is never there
    assert gptq(w, dead, 3, 8).isfinite().all()
    U, H = inverse_factor(inputs(16)), inputs(16).double()
    H += .01*H.diagonal().mean()*torch.eye(16)
    assert torch.allclose((U.T @ U).double(), torch.linalg.inv(H), rtol=1e-3, atol=1e-7)

def test_awq_is_never_worse_on_its_own_inputs():
    w, H = torch.randn(12, 32, generator=torch.Generator().manual_seed(5)), inputs(32)
    H[4] *= 20
    H[:, 4] *= 20  # one large input
    nearest, found = (output_error(w, f, H) for f in (round_to_nearest(w, 3, 16), awq(w, H, 3, 16)))
    assert found < .8*nearest
    assert torch.allclose(awq(w, H, 3, 16, tries=1), round_to_nearest(w, 3, 16), atol=1e-6)  # alpha 0

def test_output_error_and_grams_are_what_layers_do(lm):
    model, tok = lm
    rows = [dict(input_ids=tok(s, add_special_tokens=False)["input_ids"]) for s in ("the home of ana is in", "1 2 3")]
    grams, seen = input_grams(model, rows), []
    name, layer = list(linear_layers(model).items())[6]
    hook = layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0][0]))
    with torch.no_grad():
        for row in rows: model(input_ids=torch.tensor([row["input_ids"]]))
        hook.remove()
        x = torch.cat(seen)
        assert grams.keys() == linear_layers(model).keys()
        assert torch.allclose(grams[name], x.T @ x, rtol=1e-4, atol=1e-3)
        changed = round_to_nearest(layer.weight, 3, 16)
        want = (x @ (changed - layer.weight).T).pow(2).sum().item()
        assert output_error(layer.weight, changed, grams[name]) == pytest.approx(want, rel=1e-3)
    mixed = permute_inputs(grams[name], random.Random(0))
    assert torch.allclose(mixed.diagonal().sort().values, grams[name].diagonal().sort().values)
    assert not torch.equal(mixed, grams[name])

def test_the_rule_against_all_halvings():
    rng = np.random.default_rng(0)
    for _ in range(50):
        w = torch.tensor(rng.normal(size=(6, 96)), dtype=torch.float32)
        w[:, rng.integers(96)] *= float(rng.choice([1, 3, 30]))
        threshold = float(rng.choice([.8, .88, .92]))
        brute = lambda p: np.mean([max(g.max(), 0) - min(g.min(), 0) for g in w.numpy().reshape(-1, 96//p)])
        assert mean_range(w, 24) == pytest.approx(brute(4), rel=1e-5)
        pays = [brute(2*p)/brute(p) <= threshold for p in (1, 2, 4, 8, 16)]
        parts = 2**next((i for i, yes in enumerate(pays) if not yes), 5)
        assert adaptive_group_size(w, threshold, most=32) == 96//parts
        assert adaptive_group_size(w, threshold, most=4) >= 24

def test_models_are_rounded_and_left_alone(lm):
    model, _ = lm
    before = {k: v.clone() for k, v in model.state_dict().items()}
    small = rounded(model, lambda name, w: round_to_nearest(w, 4, 16))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(small.lm_head.weight, model.lm_head.weight)
    for n, layer in linear_layers(model).items():
        assert torch.equal(small.get_submodule(n).weight, round_to_nearest(layer.weight, 4, 16))
    sizes = {n: 16 + i for i, n in enumerate(linear_layers(model))}
    mixed = deal(model, sizes, random.Random(0))
    assert sorted(mixed.values()) == sorted(sizes.values()) and mixed != sizes

def test_a_checkpoint_that_was_rounded_before_is_refused():
    with pytest.raises(KitError, match="was rounded to q4_1/32 before") as e: check_unrounded("smollm2-135m")
    assert "\n" not in str(e.value)
    for name in ("minilm-l6", "lm-5m", "somebody/model"): check_unrounded(name)
