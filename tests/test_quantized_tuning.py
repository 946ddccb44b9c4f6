"""Straight through against PyTorch's own fake quantization, gradients of scales written out, arrangements that leave
the rest alone."""
import copy
import pytest, torch
from torch import nn
from slmkit.compress.quantized_tuning import (FakeQuantize, ScaleLinear, finished, quantization_aware, rounded_by_gptq,
                                              rounded_with_lora, scales_only, scrambled)
from slmkit.compress.weight_rounding import affine, round_to_nearest
from slmkit.core import lora
from slmkit.core.zoo import linear_layers, load_model

@pytest.fixture(scope="module")
def lm(): return load_model("lm-1m", "cpu", kind="causal")

@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fake_quantization_is_pytorchs_own(bits):
    w = torch.randn(6, 32, generator=torch.Generator().manual_seed(bits))
    ours, theirs = w.clone().requires_grad_(), w.clone().requires_grad_()
    scale, zero = affine(w, bits)
    by_torch = torch.fake_quantize_per_channel_affine(theirs, scale[:, 0], zero[:, 0].int(), 0, 0, 2**bits - 1)
    mine = FakeQuantize(bits)(ours)
    assert torch.allclose(by_torch, mine, atol=1e-6)
    v = torch.randn(6, 32)
    (by_torch*v).sum().backward()
    (mine*v).sum().backward()
    assert torch.equal(ours.grad, v) and torch.allclose(theirs.grad, v)

def test_values_are_exactly_on_the_grid():
    w = torch.randn(5, 24, requires_grad=True)
    assert torch.equal(FakeQuantize(3, 8)(w), round_to_nearest(w.detach(), 3, 8))

def test_only_scales_learn_and_their_gradient_is_the_one_written_out():
    torch.manual_seed(0)
    layer = ScaleLinear(nn.Linear(16, 6), 3, 4)
    x, v = torch.randn(5, 16), torch.randn(5, 6)
    (layer(x)*v).sum().backward()
    ints = layer.ints.view(6, 4, 4).float() - layer.zero.view(6, 4, 1)
    assert torch.allclose(layer.scale.grad, ((v.T @ x).view(6, 4, 4)*ints).sum(-1), atol=1e-4)

def test_scales_only_leaves_the_original_and_the_head_alone(lm):
    model, _ = lm
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tuned = scales_only(copy.deepcopy(model), 4)
    assert {n.rpartition(".")[2] for n, p in tuned.named_parameters() if p.requires_grad} == {"scale"}
    assert lora.count_trained(tuned) == sum(layer.out_features for layer in linear_layers(model).values())
    assert type(tuned.lm_head) is nn.Linear
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    ids = torch.tensor([[5, 6, 7]])
    plain = copy.deepcopy(model)
    for layer in linear_layers(plain).values(): layer.weight.data = round_to_nearest(layer.weight.data, 4)
    with torch.no_grad(): assert torch.allclose(tuned(ids).logits, plain(ids).logits, atol=1e-3)

def test_scrambling_keeps_the_integers_and_changes_their_places(lm):
    tuned = scales_only(copy.deepcopy(lm[0]), 3)
    mixed = scrambled(copy.deepcopy(tuned), 0)
    for name, layer in tuned.named_modules():
        if not isinstance(layer, ScaleLinear): continue
        other = mixed.get_submodule(name).ints
        assert torch.equal(other.flatten().sort().values, layer.ints.flatten().sort().values)
        assert not torch.equal(other, layer.ints)

def test_quantization_aware_models_train_and_end_on_the_grid(lm):
    model = quantization_aware(copy.deepcopy(lm[0]), 2)
    ids = torch.tensor([[5, 6, 7, 8]])
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=.05)
    model(input_ids=ids, labels=ids).loss.backward()
    name = "model.layers.1.mlp.up_proj"
    hidden = model.get_submodule(name).parametrizations.weight.original
    assert hidden.grad.abs().sum() > 0
    opt.step()
    with torch.no_grad(): logits = model(ids).logits
    done = finished(model)
    with torch.no_grad(): assert torch.equal(done(ids).logits, logits)
    for layer in linear_layers(done).values(): assert all(len(row.unique()) <= 4 for row in layer.weight)

def test_qlora_trains_factors_beside_rounded_weights_and_gptq_rounds_afterwards(lm):
    model, tok = lm
    beside = rounded_with_lora(copy.deepcopy(model), 3, rank=2)
    assert {n.rpartition(".")[2] for n, p in beside.named_parameters() if p.requires_grad} == {"A", "B"}
    name, plain = next(iter(linear_layers(model).items()))
    assert torch.equal(beside.get_submodule(name).linear.weight, round_to_nearest(plain.weight.data, 3))
    rows = [dict(input_ids=tok("the home of ana is in", add_special_tokens=False)["input_ids"])]
    rounded = rounded_by_gptq(model, 3, rows)
    for layer in linear_layers(rounded).values(): assert all(len(row.unique()) <= 8 for row in layer.weight)
