"""Steering written out with probabilities, the loop against full forward passes and transformers' generate, cut
models, bad input, the gpu path."""
from functools import partial
import copy, json, math
import pytest, torch
from conftest import ROOT, ran
from slmkit.adapt.logit_steering import Dynamic, check_pair, cut, matched, plane_figure, shift, steered, together
from slmkit.core.generate import encode_prompts
from slmkit.core.settings import KitError
from slmkit.core.zoo import load_model

NB = ROOT/"nbs/adapt/logit_steering.ipynb"
INPUTS = ["the home of ana is in", "hugo loves to eat", "the job of the friend of yan , who lives in oslo , is"]

@pytest.fixture(scope="module")
def lm(): return load_model("lm-1m", "cpu", kind="causal")

def logs(n=3, rows=5, words=7, seed=0, scale=2.):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, rows, words, generator=g, dtype=torch.float64)*scale).log_softmax(-1)

def test_steered_is_the_product_of_distributions():
    large, tuned, base = logs()
    for alpha in (0., .3, 1., 2.):
        p = large.exp()*(tuned.exp()/base.exp())**alpha
        assert torch.allclose(steered(large, tuned, base, alpha).exp(), p/p.sum(-1, keepdim=True), atol=1e-12)
    per_row = torch.tensor([[0.], [.5], [1.], [1.5], [2.]])
    got = steered(large, tuned, base, per_row)
    for i, a in enumerate(per_row[:, 0].tolist()):
        assert torch.allclose(got[i], steered(large[i:i + 1], tuned[i:i + 1], base[i:i + 1], a)[0])

def test_emulated_tuning_of_the_base_itself_is_the_tuning():
    large, tuned, _ = logs()
    assert torch.allclose(steered(large, tuned, large), tuned, atol=1e-12)
    assert torch.allclose(matched(large, tuned, large), torch.ones(5, 1).double(), atol=1e-5)

def test_shift_is_torchs_kl():
    new, old, _ = logs()
    want = torch.nn.functional.kl_div(old, new, reduction="none", log_target=True).sum(-1)
    assert torch.allclose(shift(new, old), want, atol=1e-12)
    assert (want > 0).all()
    assert shift(new, new).abs().max() < 1e-12

def test_steering_moves_further_with_every_weight_and_its_slope_is_the_variance():
    large, tuned, base = logs(seed=1)
    alpha = torch.full((5, 1), .8, dtype=torch.float64, requires_grad=True)
    moved = shift(steered(large, tuned, base, alpha), large)
    slope = torch.autograd.grad(moved.sum(), alpha)[0][:, 0]
    p, d = steered(large, tuned, base, .8).exp(), tuned - base
    variance = (p*d**2).sum(-1) - (p*d).sum(-1)**2
    assert torch.allclose(slope, .8*variance, atol=1e-9) and (slope > 0).all()

def test_matched_meets_the_shift_or_stops_at_its_ends():
    large, tuned, base = logs(rows=200, seed=2)
    free, capped = matched(large, tuned, base, most=100., rounds=60), matched(large, tuned, base, rounds=60)
    reachable = free[:, 0] < 99
    gap = shift(steered(large, tuned, base, free), large) - shift(tuned, base)
    assert reachable.any() and gap[reachable].abs().max() < 1e-9
    assert torch.allclose(capped, free.clamp(max=2.), atol=1e-9) and (capped > 1.999).any() and (capped < 1.9).any()
    # nothing was tuned
    assert torch.allclose(steered(large, base, base, matched(large, base, base)), large, atol=1e-12)

def test_one_model_in_step_is_transformers_greedy_search(lm):
    model, tok = lm
    ids, mask = encode_prompts(model, tok, INPUTS, 64)
    want = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=7, do_sample=False,
        num_beams=1)[:, ids.shape[1]:]
    assert torch.equal(together([model], lambda x: x, ids, mask, 7), want)

def test_three_models_in_step_are_their_full_forward_passes(lm):
    large, tok = lm
    small = cut(large, [0, -1])
    torch.manual_seed(0)
    tuned = copy.deepcopy(small)
    with torch.no_grad():
        for p in tuned.parameters(): p += torch.randn_like(p)*p.std()/20 if p.ndim > 1 else 0
    dynamic, ids_mask = Dynamic(), encode_prompts(large, tok, INPUTS, 64)
    got = together([large, tuned, small], dynamic, *ids_mask, 5)
    weights = torch.stack(dynamic.weights, 1)
    assert weights.shape == got.shape == (3, 5) and (weights > 0).all() and (weights <= 2).all()
    for i, x in enumerate(INPUTS):
        ids, _ = encode_prompts(large, tok, [x], 64)
        for j in range(5):
            with torch.no_grad():
                three = [m(input_ids=ids).logits[:, -1].log_softmax(-1) for m in (large, tuned, small)]
            weight = matched(*three)
            assert abs(weight.item() - weights[i, j]) < 5e-3
            token = steered(*three, weight).argmax(-1)
            assert token.item() == got[i, j]
            ids = torch.cat([ids, token[None]], 1)
            if token.item() == tok.eos_token_id: break

def test_cut_keeps_the_layers_named_and_all_of_them_change_nothing(lm):
    model, tok = lm
    ids, mask = encode_prompts(model, tok, INPUTS, 64)
    with torch.no_grad():
        whole = cut(model, range(5))
        assert torch.equal(whole(input_ids=ids, attention_mask=mask).logits,
            model(input_ids=ids, attention_mask=mask).logits)
        two = cut(model, [0, -1])
        assert two.config.num_hidden_layers == 2 and model.config.num_hidden_layers == 5
        assert torch.equal(two.model.layers[1].mlp.up_proj.weight, model.model.layers[4].mlp.up_proj.weight)
        two.model.layers[0].mlp.up_proj.weight.zero_()
        assert model.model.layers[0].mlp.up_proj.weight.abs().sum() > 0
        twice = cut(model, [0, 0])
        twice.model.layers[0].mlp.up_proj.weight.zero_()
        assert twice.model.layers[1].mlp.up_proj.weight.abs().sum() > 0

def test_other_vocabularies_and_architectures_are_refused(lm):
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    model, tok = lm
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "odd": 1}, unk_token="<s>")))
    check_pair(tok, tok)
    with pytest.raises(KitError, match="different vocabularies") as e: check_pair(tok, other)
    assert "\n" not in str(e.value)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(KitError, match="no support for gpt2"):
        together([model, gpt], lambda a, b: a, torch.ones(1, 2).long(), torch.ones(1, 2).long(), 1)

run = partial(ran, NB)

def qwen(tok, folder, **shape):
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    tok.save_pretrained(folder)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=shape.pop("vocab_size", len(tok)), hidden_size=16, intermediate_size=32,
            num_attention_heads=2, num_key_value_heads=1, eos_token_id=1, pad_token_id=0, bos_token_id=3,
            **shape)).save_pretrained(folder)
    return str(folder)

CLAIMS = {"steering-joins-knowledge-and-behaviour", "dynamic-beats-static", "dynamic-closes-the-gap",
    "facts-come-from-pretraining"}
@pytest.mark.slow
def test_gpu_path_on_a_real_pair_of_tiny_checkpoints_and_a_file(tmp_path, torch_pool, lm):
    tok = lm[1]
    # padded, as larger models of a family are
    large = qwen(tok, tmp_path/"large", num_hidden_layers=3, vocab_size=len(tok) + 8)
    small = qwen(tok, tmp_path/"small", num_hidden_layers=1)
    mine = tmp_path/"mine.jsonl"  # split by the checksums of its inputs
    mine.write_text("\n".join(json.dumps(dict(input=f"after {i} comes", label=f"{i + 1}",
            rationale=f"{i + 1} . good .")) for i in range(100)), encoding="utf-8")
    found = run(tmp_path, torch_pool, profile="gpu", model=large, small=small, data=str(mine), steps=2)
    assert set(found) == CLAIMS and found["dynamic-beats-static"]["n_rows"] == 15
    assert all(math.isfinite(v) for r in found.values() for v in r["arms"].values())

@pytest.mark.slow
def test_gpu_path_cuts_a_checkpoint(tmp_path, torch_pool, lm):
    large = qwen(lm[1], tmp_path/"large", num_hidden_layers=3)
    found = run(tmp_path, torch_pool, profile="gpu", model=large, heal=2, steps=2)
    assert set(found) == CLAIMS and found["dynamic-beats-static"]["model"] == large

@pytest.mark.slow
def test_same_seed_same_record(tmp_path, torch_pool):
    one, two = (run(tmp_path, torch_pool, name, profile="smoke", seed=3) for name in ("one", "two"))
    assert one == two and set(one) == CLAIMS - {"facts-come-from-pretraining"}  # whose arms are slow

def test_figure_needs_no_run():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names = ["large", "small", "small_tuned", "large_tuned", "dynamic", "down", "at_0.5", "at_1.0"]
    fig, ax = plt.subplots()
    plane_figure([dict(arms={f"{n}_{k}": .5 for n in names for k in ("form", "knows")})]*2, ax)
    assert {t.get_text() for t in ax.texts} >= {"large", "small, tuned", "0.5", "1"}
    plt.close(fig)
