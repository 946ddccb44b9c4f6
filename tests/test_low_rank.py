"""LoRA against peft with the same A and B, peft's format both ways, NOLA written out, equal budgets, files, bad
input, the gpu path."""
from functools import partial
import copy, json, math
import pytest, torch
from safetensors.torch import save_file
from torch import nn
from conftest import ROOT, ran
from slmkit.adapt.low_rank import (ATTENTION, MLP, LoRA, NOLA, Parallel, Series, adapted, count, found,
    from_peft, loras, mixture, read_back, size_for, to_peft, trained, write)
from slmkit.core.settings import KitError
from slmkit.core.zoo import load_model

NB = ROOT/"nbs/adapt/low_rank.ipynb"
EVERY = ATTENTION + MLP

@pytest.fixture(scope="module")
def lm(): return load_model("lm-1m", "cpu", kind="causal")

@pytest.fixture(scope="module")
def ids(lm): return torch.randint(5, 2000, (2, 9), generator=torch.Generator().manual_seed(0))

def stirred(model, seed=0):
    "Trained numbers that are no longer zero."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trained(model): p.copy_(torch.randn(p.shape, generator=g)*.1)
    return model.eval()

def logits(model, ids):
    with torch.no_grad(): return model(input_ids=ids).logits

def test_before_training_no_adapter_changes_anything(lm, ids):
    for kind, places in (("series", ["down_proj"]), ("parallel", MLP), ("lora", EVERY), ("nola", EVERY)):
        assert torch.equal(logits(adapted(copy.deepcopy(lm[0]), kind, 3, places), ids), logits(lm[0], ids))

def test_only_the_adapter_is_trained_and_each_number_of_it_has_a_gradient(lm, ids):
    for kind, places in (("series", ["down_proj"]), ("parallel", MLP), ("lora", EVERY), ("nola", EVERY)):
        model = stirred(adapted(copy.deepcopy(lm[0]), kind, 3, places))
        model(input_ids=ids, labels=ids).loss.backward()
        for name, p in model.named_parameters():
            own = name.split(".")[-1] in ("A", "B", "up", "down", "coefficients")
            assert p.requires_grad == own and (p.grad is not None) == own, name
            if own: assert (p.grad != 0).all(), name

def test_delta_is_pefts_given_the_same_A_and_B():
    peft = pytest.importorskip("peft")
    from peft.tuners.lora import Linear
    torch.manual_seed(0)
    layer, x = nn.Linear(7, 5), torch.randn(3, 7)
    ours = LoRA(copy.deepcopy(layer), 2)
    for alpha in (2, 6):  # ours has scale 1; another scale goes into B, as in from_peft
        theirs = Linear(copy.deepcopy(layer), "default", config=peft.LoraConfig(r=2, lora_alpha=alpha), r=2,
            lora_alpha=alpha)
        with torch.no_grad():
            theirs.lora_B["default"].weight.normal_()
            ours.A.copy_(theirs.lora_A["default"].weight)
            ours.B.copy_(theirs.lora_B["default"].weight*alpha/2)
            assert torch.allclose(ours.B @ ours.A, theirs.get_delta_weight("default"), atol=1e-6)
            assert torch.allclose(ours(x), theirs(x), atol=1e-6) and not torch.allclose(ours(x), layer(x), atol=1e-2)
            theirs.merge()
            assert torch.allclose(ours.merged()(x), theirs(x), atol=1e-6)

def test_a_saved_lora_loads_in_peft_with_the_same_logits(tmp_path, lm, ids):
    peft = pytest.importorskip("peft")
    model = stirred(adapted(copy.deepcopy(lm[0]), "lora", 3, EVERY))
    to_peft(model, tmp_path/"out")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(lm[0]), str(tmp_path/"out"))
    assert torch.allclose(logits(theirs.eval(), ids), logits(model, ids), atol=1e-4)
    assert torch.equal(logits(from_peft(lm[0], tmp_path/"out"), ids), logits(model, ids))

def test_pefts_own_folder_loads_here_whatever_its_alpha(tmp_path, lm, ids):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(lm[0]), config)
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_B" in n: p.normal_()
    theirs.save_pretrained(str(tmp_path/"theirs"))
    ours = from_peft(lm[0], tmp_path/"theirs")
    assert torch.allclose(logits(ours, ids), logits(theirs.eval(), ids), atol=1e-4) and len(loras(ours)) == 10

def test_bottlenecks_written_out():
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 6), torch.randn(3, 4)
    for cls, width in ((Series, 6), (Parallel, 4)):
        a = cls(layer, 2)
        with torch.no_grad(): a.up.normal_()
        y = layer(x)
        read = y if cls is Series else x
        assert a.down.shape == (2, width) and a.up.shape == (6, 2)
        for i in range(3):
            inner = [math.tanh(sum(a.down[k, j].item()*read[i, j].item() for j in range(width))) for k in range(2)]
            want = [y[i, m].item() + sum(a.up[m, k].item()*inner[k] for k in range(2)) for m in range(6)]
            assert torch.allclose(a(x)[i], torch.tensor(want), atol=1e-5)

def test_mixture_is_its_sum_and_nola_is_lora_with_mixed_factors():
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 6), torch.randn(3, 4)
    nola = NOLA(layer, 5, seed=3)
    with torch.no_grad(): nola.coefficients.normal_()
    a, b = nola.coefficients
    A = nola.start + sum(a[k]*nola.for_A[k] for k in range(5))
    B = sum(b[k]*nola.for_B[k] for k in range(5))
    assert torch.allclose(nola(x), layer(x) + x @ A.T @ B.T, atol=1e-5)
    assert torch.allclose(mixture(nola.start, nola.for_A, a), A, atol=1e-6)
    assert not [n for n in nola.state_dict() if "for_" in n or n == "start"]  # random matrices are not stored

def test_each_layer_and_each_seed_draws_its_own_matrices(lm):
    one, same, other = (adapted(copy.deepcopy(lm[0]), "nola", 4, MLP, seed) for seed in (0, 0, 1))
    (_, a), (_, b) = loras(one)[:2]
    assert not torch.equal(a.for_A, b.for_A)
    assert torch.equal(a.for_A, loras(same)[0][1].for_A) and not torch.equal(a.for_A, loras(other)[0][1].for_A)

def test_nolas_count_depends_on_neither_rank_nor_width(monkeypatch):
    counts = set()
    for rank in (1, 8, 32):
        monkeypatch.setattr("slmkit.adapt.low_rank.RANK", rank)
        for n in (4, 64):
            nola = NOLA(nn.Linear(n, n), 6)
            assert nola.factors()[0].shape == (rank, n)
            counts.add(count(nola) - n*n - n)
    assert counts == {12}

def test_sizes_meet_their_budget(lm):
    for kind, places in (("series", ["down_proj"]), ("parallel", MLP), ("lora", EVERY), ("nola", EVERY)):
        shapes = [(m.in_features, m.out_features) for m in found(lm[0], places).values()]
        counts = {s: count(adapted(copy.deepcopy(lm[0]), kind, s, places)) for s in (4, 5, 6)}
        assert [size_for(c, kind, shapes) for c in counts.values()] == [4, 5, 6], kind

def test_files_hold_what_was_trained_and_little_else(tmp_path, lm, ids):
    for kind, size, places in (("series", 3, ["down_proj"]), ("parallel", 3, MLP), ("lora", 1, EVERY),
            ("nola", 5, EVERY), ("norms", 0, [])):
        model = stirred(adapted(copy.deepcopy(lm[0]), kind, size, places, seed=7))
        bytes_ = write(model, tmp_path/"f.safetensors")
        assert 4*count(model) < bytes_ < 4*count(model) + 400
        back = read_back(lm[0], tmp_path/"f.safetensors")
        assert torch.equal(logits(back, ids), logits(model, ids)) and back.recipe == model.recipe

def one_line(match): return pytest.raises(KitError, match=match)
def test_bad_input_is_one_line(tmp_path, lm):
    base = lm[0]
    for match, f in {"no kind 'lorra'": lambda: adapted(copy.deepcopy(base), "lorra", 1, EVERY),
            "at least 1": lambda: adapted(copy.deepcopy(base), "lora", 0, EVERY),
            "no linear layer is called wq": lambda: adapted(copy.deepcopy(base), "lora", 1, ["wq"]),
            "not an adapter": lambda: read_back(base, tmp_path/"none.safetensors"),
            "no adapter of peft": lambda: from_peft(base, tmp_path),
            "format for lora": lambda: to_peft(adapted(copy.deepcopy(base), "nola", 1, MLP), tmp_path/"x")}.items():
        with one_line(match) as e: f()
        assert "\n" not in str(e.value)
    save_file({"x": torch.zeros(1)}, tmp_path/"plain.safetensors")
    (tmp_path/"text.safetensors").write_text("no tensors here", encoding="utf-8")
    for name in ("plain", "text"):
        with one_line("not an adapter"): read_back(base, tmp_path/f"{name}.safetensors")
    write(adapted(copy.deepcopy(base), "lora", 1, EVERY), tmp_path/"small.safetensors")
    with one_line("made for another model"): read_back(base, tmp_path/"small.safetensors", size=2)

def test_an_unusual_lora_is_refused_by_the_name_of_what_is_unusual(tmp_path, lm):
    to_peft(adapted(copy.deepcopy(lm[0]), "lora", 1, MLP), tmp_path)
    config = json.loads((tmp_path/"adapter_config.json").read_text(encoding="utf-8"))
    for odd in (dict(use_dora=True), dict(rank_pattern={"q_proj": 3}), dict(modules_to_save=["lm_head"]),
            dict(peft_type="IA3")):
        (tmp_path/"adapter_config.json").write_text(json.dumps(config | odd), encoding="utf-8")
        with one_line(f"no support for its {list(odd)[0]}"): from_peft(lm[0], tmp_path)

run = partial(ran, NB)

CLAIMS = {"adapters-reach-full-tuning", "the-best-place-differs", "half-of-rank-one",
    "as-good-as-equal-counts", "half-the-bytes"}
@pytest.mark.slow
def test_gpu_path_on_a_tiny_checkpoint_and_a_file(tmp_path, torch_pool, lm):
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    lm[1].save_pretrained(tmp_path/"qwen")
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(lm[1]), hidden_size=16, intermediate_size=32, num_attention_heads=2,
            num_hidden_layers=2, num_key_value_heads=1, eos_token_id=1, pad_token_id=0,
            bos_token_id=3)).save_pretrained(tmp_path/"qwen")
    mine = tmp_path/"mine.jsonl"
    mine.write_text("\n".join(json.dumps(dict(input=f"after {i} comes", label=f"{i + 1}")) for i in range(100)),
        encoding="utf-8")
    found_ = run(tmp_path, torch_pool, profile="gpu", model=str(tmp_path/"qwen"), data=str(mine), steps=2)
    assert set(found_) == CLAIMS and all(math.isfinite(v) for r in found_.values() for v in r["arms"].values())

@pytest.mark.slow
def test_same_seed_same_record(tmp_path, torch_pool):
    one, two = (run(tmp_path, torch_pool, name, profile="smoke", seed=3) for name in ("one", "two"))
    assert one == two and set(one) == CLAIMS - {"the-best-place-differs"}  # whose arms are slow
