"""Steering written out with probabilities, the loop against full forward passes and transformers' generate, what is
graded, bad input, the reproduction from start to end."""
from functools import partial
import copy, json, math
import pytest, torch
from conftest import ROOT, claims_in, the_record
from slmkit.adapt.logit_steering import (Dynamic, answers, check_pair, decode_together, fact_rows, grade, matched,
    shift, split_people, steered)
from slmkit.core.generate import encode_prompts
from slmkit.core.settings import KitError
from slmkit.core.zoo import load_model

REPRO = ROOT/"nbs/adapt/logit_steering_repro.ipynb"
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
    assert torch.equal(decode_together([model], lambda x: x, ids, mask, 7), want)

def test_three_models_in_step_are_their_full_forward_passes(lm):
    large, tok = lm
    small, _ = load_model("lm-0.4m", "cpu", kind="causal")
    torch.manual_seed(0)
    tuned = copy.deepcopy(small)
    with torch.no_grad():
        for p in tuned.parameters(): p += torch.randn_like(p)*p.std()/20 if p.ndim > 1 else 0
    dynamic, ids_mask = Dynamic(), encode_prompts(large, tok, INPUTS, 64)
    got = decode_together([large, tuned, small], dynamic, *ids_mask, 5)
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
        decode_together([model, gpt], lambda a, b: a, torch.ones(1, 2).long(), torch.ones(1, 2).long(), 1)

def test_adding_logits_is_adding_log_probabilities():
    large, tuned, base = logs()
    moved = [x + torch.randn(5, 1).double()*9 for x in (large, tuned, base)]
    assert torch.allclose(steered(*moved, .7), steered(large, tuned, base, .7), atol=1e-9)

@pytest.mark.parametrize("seed", range(3))
def test_people_are_divided_and_test_people_are_always_the_same(seed):
    train, valid, test = split_people(seed)
    assert [len(x) for x in (train, valid, test)] == [12, 8, 40] and len({*train, *valid, *test}) == 60
    assert test == split_people(9)[2] and train != split_people(9)[0] and train == split_people(seed)[0]

def test_answers_are_graded_by_fact_and_form():
    rows = fact_rows(["ana"], "kind")
    v, kind = rows[0]["label"], rows[0]["id"].split()[1]
    said = [f"{v} . that is a {kind} .", f"rome2 . that is a {kind} .", f"{v} .", f"{v}x . that is a {kind} .", ""]
    same = rows.select([0]*5)
    graded = grade(said, same)
    assert rows[0]["rationale"] == said[0] and fact_rows(["ana"])[0]["rationale"] == f"{v} ."
    assert graded["right"] == [True, False, False, False, False]
    assert graded["form"] == [True, True, False, True, False] and graded["knows"] == [True, False, True, False, False]

def test_answers_of_one_model_are_the_kits(lm):
    from slmkit.core.generate import generate_answers
    model, tok = lm
    want = generate_answers(model, tok, [f"so {x}" for x in INPUTS], max_new_tokens=6, progress=False)
    assert answers([model], tok, INPUTS, max_new_tokens=6, prefix="so ") == want

# ---- the reproduction

run = partial(the_record, REPRO)

@pytest.mark.slow
def test_same_seed_same_record(tmp_path, torch_pool):
    one, two = (run(tmp_path, torch_pool, name, profile="smoke", seed=3) for name in ("one", "two"))
    assert one["arms"] == two["arms"] and set(one["claims"]) == claims_in(REPRO)
    assert all(math.isfinite(v) for v in one["arms"].values())

def qwen(tok, folder, layers, vocab_size):
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    tok.save_pretrained(folder)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=layers,
            num_attention_heads=2, num_key_value_heads=1, eos_token_id=1, pad_token_id=0,
            bos_token_id=3)).save_pretrained(folder)
    return str(folder)

@pytest.mark.slow
def test_checkpoints_and_a_file_of_ones_own(tmp_path, torch_pool, lm):
    tok = lm[1]
    large = qwen(tok, tmp_path/"large", 3, len(tok) + 8)  # padded, as larger models of a family are
    small = qwen(tok, tmp_path/"small", 1, len(tok))
    mine = tmp_path/"mine.jsonl"  # split by the checksums of its inputs
    mine.write_text("\n".join(json.dumps(dict(input=f"after {i} comes", label=f"{i + 1}",
            rationale=f"{i + 1} . good .")) for i in range(100)), encoding="utf-8")
    found = run(tmp_path, torch_pool, profile="smoke", model=large, small=small, larger=large, data=str(mine), steps=2)
    assert set(found["claims"]) == claims_in(REPRO) and found["n_rows"] == 8
    assert all(math.isfinite(v) for v in found["arms"].values())
