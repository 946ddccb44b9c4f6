"""Adapters change nothing before training, train only their own numbers, and are what their formulas say; budgets,
bad input, the lesson's LoRA against the kit's, the reproductions from start to end."""
import copy, math
import pytest, torch
from torch import nn
from conftest import ROOT, claims_in, the_record, the_same_twice
from slmkit.adapt.low_rank import (ATTENTION, MLP, BottleneckAdapter, NOLALinear, adapted, nola_factors, size_for)
from slmkit.core import lora
from slmkit.core.settings import KitError
from slmkit.core.zoo import load_model
from slmkit.lab import lab

LESSON, REPRO, REAL = (ROOT/f"nbs/adapt/low_rank{end}.ipynb" for end in ("", "_repro", "_repro_banking"))
WAYS = [("series", ["down_proj"]), ("parallel", MLP), ("lora", ATTENTION + MLP), ("nola", None)]
OWN = {"A", "B", "up", "down", "coefficients"}  # names of what an adapter trains

@pytest.fixture(scope="module")
def lm(): return load_model("lm-1m", "cpu", kind="causal")

@pytest.fixture(scope="module")
def ids(lm): return torch.randint(5, 2000, (2, 9), generator=torch.Generator().manual_seed(0))

@pytest.fixture
def fresh(lm): return lambda *how, **more: adapted(copy.deepcopy(lm[0]), *how, **more)

def trained(model): return {n: p for n, p in model.named_parameters() if p.requires_grad}

def logits(model, ids):
    with torch.no_grad(): return model(input_ids=ids).logits

@pytest.mark.parametrize("kind, targets", WAYS)
def test_before_training_no_adapter_changes_anything(kind, targets, lm, fresh, ids):
    assert torch.equal(logits(fresh(kind, 3, targets), ids), logits(lm[0], ids))

@pytest.mark.parametrize("kind, targets", WAYS)
def test_only_the_adapter_is_trained_and_each_number_of_it_has_a_gradient(kind, targets, fresh, ids):
    torch.manual_seed(0)
    model = fresh(kind, 3, targets)
    with torch.no_grad():
        for p in trained(model).values(): p.normal_(std=.1)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        own = name.split(".")[-1] in OWN
        assert p.requires_grad == own and (p.grad is not None) == own, name
        if own: assert (p.grad != 0).all(), name

def test_full_tuning_and_norms_train_what_they_say(lm, fresh):
    norms = trained(fresh("norms"))
    assert norms and all("norm" in n for n in norms)
    assert lora.count_trained(fresh("full")) == lm[0].num_parameters()
    for kind in ("full", "norms", "lora"):
        top = trained(fresh(kind, 2, None, layers=[3, 4]))
        assert top and {n.split("layers.")[1][0] for n in top} == {"3", "4"}

@pytest.mark.parametrize("series", [True, False])
def test_a_bottleneck_written_out(series):
    torch.manual_seed(0)
    linear, x = nn.Linear(4, 6), torch.randn(3, 4)
    adapter = BottleneckAdapter(linear, 2, series)
    nn.init.normal_(adapter.up)
    y = linear(x)
    z = y if series else x
    assert adapter.down.shape == (2, z.shape[1]) and adapter.up.shape == (6, 2)
    for i in range(3):
        inner = [math.tanh(sum((adapter.down[k]*z[i]).tolist())) for k in range(2)]
        want = [y[i, m].item() + sum(adapter.up[m, k].item()*inner[k] for k in range(2)) for m in range(6)]
        assert torch.allclose(adapter(x)[i], torch.tensor(want), atol=1e-5)

def test_nola_is_lora_with_mixed_factors():
    torch.manual_seed(0)
    linear, x = nn.Linear(4, 6), torch.randn(3, 4)
    nola = NOLALinear(linear, 5, seed=3)
    nn.init.normal_(nola.coefficients)
    alpha, beta = nola.coefficients
    A = nola.start + sum(alpha[k]*nola.basis_A[k] for k in range(5))
    B = sum(beta[k]*nola.basis_B[k] for k in range(5))
    assert all(torch.allclose(mine, f, atol=1e-5) for mine, f in zip((A, B), nola.factors()))
    assert torch.allclose(nola(x), linear(x) + x @ A.T @ B.T, atol=1e-5)
    assert set(nola.state_dict()) == {"coefficients", "linear.weight", "linear.bias"}  # random matrices are not stored

def test_each_layer_and_each_seed_draws_its_own_matrices(fresh):
    one, same, other = (fresh("nola", 4, MLP, seed) for seed in (0, 0, 1))
    drawn = lambda model: [m.basis_A for m in model.modules() if isinstance(m, NOLALinear)]
    assert not torch.equal(drawn(one)[0], drawn(one)[1])
    assert torch.equal(drawn(one)[0], drawn(same)[0]) and not torch.equal(drawn(one)[0], drawn(other)[0])

@pytest.mark.parametrize("rank", [1, 8, 32])
@pytest.mark.parametrize("width", [4, 64])
def test_nolas_count_depends_on_neither_rank_nor_width(rank, width):
    nola = NOLALinear(nn.Linear(width, width), 6, rank=rank)
    assert nola.factors()[0].shape == (rank, width)
    assert lora.count_trained(nola) == 12

def test_mixtures_with_more_of_one_basis_than_of_the_other():
    draw = torch.Generator().manual_seed(0)
    start, A, B = (torch.randn(s, generator=draw) for s in ((2, 3), (5, 2, 3), (1, 4, 2)))
    mixed = nola_factors(start, A, B, torch.tensor([0., 0., 2., 0., 0.]), torch.tensor([3.]))
    assert torch.allclose(mixed[0], start + 2*A[2]) and torch.allclose(mixed[1], 3*B[0])

@pytest.mark.parametrize("kind, targets", WAYS)
def test_sizes_meet_their_budget(kind, targets, lm, fresh):
    shapes = [(m.in_features, m.out_features) for m in lora.targeted(lm[0], targets).values()]
    counts = {s: lora.count_trained(fresh(kind, s, targets)) for s in (4, 5, 6)}
    assert [size_for(c, kind, shapes) for c in counts.values()] == [4, 5, 6]
    assert size_for(1, kind, shapes) == 1

@pytest.mark.parametrize("kind, targets", WAYS)
def test_a_model_of_16_bits_is_trained_in_32(kind, targets, lm, ids):
    base = copy.deepcopy(lm[0]).bfloat16()
    model = adapted(copy.deepcopy(base), kind, 3, targets)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert torch.equal(logits(model, ids), logits(base, ids)) and logits(model, ids).dtype == torch.bfloat16

@pytest.mark.parametrize("match, how", {"no kind 'lorra'": ("lorra", 1), "at least 1": ("nola", 0),
    "is 'wq'": ("lora", 1, ["wq"])}.items())
def test_bad_input_is_one_line_and_changes_nothing(match, how, lm):
    model = copy.deepcopy(lm[0])
    with pytest.raises(KitError, match=match) as e: adapted(model, *how)
    assert "\n" not in str(e.value) and all(p.requires_grad for p in model.parameters())

# ---- the lesson's own LoRA

@pytest.fixture(scope="module")
def written():
    "Names of the exercises as the lesson solves them."
    space = dict(torch=torch, nn=nn, math=math)
    for e in lab.read(LESSON).exercises: exec(lab.fill(e), space)
    return space

@pytest.mark.parametrize("rank, alpha", [(1, 1), (4, 8), (3, 1)])
def test_the_lessons_lora_is_the_kits(written, lm, ids, rank, alpha):
    mine, kits = copy.deepcopy(lm[0]), copy.deepcopy(lm[0])
    layers, others = written["inject"](mine, ATTENTION, rank, alpha), lora.inject(kits, ATTENTION, rank, alpha)
    assert list(layers) == list(others) and set(trained(mine)) == set(trained(kits))
    for a, b in zip(layers.values(), others.values()):
        assert a.A.abs().max() <= 1/math.sqrt(a.A.shape[1])  # both are drawn as nn.Linear draws its weight
        nn.init.normal_(a.B, std=.1)
        with torch.no_grad(): [q.copy_(p) for p, q in ((a.A, b.A), (a.B, b.B))]
    assert torch.allclose(logits(mine, ids), logits(kits, ids), atol=1e-5)
    assert not torch.allclose(logits(mine, ids), logits(lm[0], ids), atol=1e-2)

# ---- the reproductions

@pytest.mark.slow
@pytest.mark.parametrize("notebook", [REPRO, REAL], ids=["toyland", "banking"])
def test_same_seed_same_record(notebook, tmp_path, torch_pool):
    arms = the_same_twice(notebook, tmp_path, torch_pool)["arms"]
    assert all(math.isfinite(v) for v in arms.values())

@pytest.mark.slow
def test_a_checkpoint_of_ones_own(tmp_path, torch_pool, lm):
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    lm[1].save_pretrained(tmp_path/"qwen")
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(lm[1]), hidden_size=16, intermediate_size=32, num_attention_heads=2,
            num_hidden_layers=2, num_key_value_heads=1, eos_token_id=1, pad_token_id=0,
            bos_token_id=3)).save_pretrained(tmp_path/"qwen")
    found = the_record(REPRO, tmp_path, torch_pool, profile="smoke", model=str(tmp_path/"qwen"), steps=2)
    assert set(found["claims"]) == claims_in(REPRO)
