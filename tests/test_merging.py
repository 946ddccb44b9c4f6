"""Merging against peft, scikit-learn and weights merged by hand; routed parts in mixed, padded and decoded batches;
bad input; the reproductions from start to end."""
from functools import partial
import copy, json, math
import pytest, torch
from conftest import ROOT, claims_in, the_record, the_same_twice
from slmkit.adapt.merging import (Routed, apply_vector, dare, factors, load_tasks, low_rank_parts, mean_embedding,
    mean_hidden_state, merge, routed_output, task_vector, ties, train_expert, train_router, weights)
from slmkit.core.data import load
from slmkit.core.generate import generate_answers, encode_prompts
from slmkit.core.settings import KitError
from slmkit.core.zoo import linear_layers

REPRO, REAL = (ROOT/f"nbs/adapt/merging_repro{end}.ipynb" for end in ("", "_real"))

@pytest.fixture(scope="module")
def base():
    from slmkit.core.zoo import load_model
    return load_model("lm-1m", "cpu", kind="causal")

@pytest.fixture
def vectors(base):
    "Three random task vectors, a tenth of the weights' size."
    g = torch.Generator().manual_seed(0)
    return [{n: torch.randn(w.shape, generator=g)*w.std()/5 for n, w in weights(base[0]).items()} for _ in range(3)]

def stack(seed=0, tasks=3, shape=(8, 9)):
    return torch.randn(tasks, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

@pytest.mark.parametrize("density", [.05, .2, .5, .77, 1.])
@pytest.mark.parametrize("seed", range(4))
def test_ties_is_pefts_in_value_and_gradient(density, seed):
    utils = pytest.importorskip("peft.utils.merge_utils")
    x, y = (stack(seed, 2 + seed).requires_grad_() for _ in range(2))
    ours, theirs = ties(x, density), utils.ties(list(y), torch.ones(2 + seed, dtype=torch.float64), density)
    assert torch.allclose(ours, theirs, atol=1e-12)
    weight = stack(9)[0]
    (ours*weight).sum().backward()
    (theirs*weight).sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-12) and x.grad.abs().sum() > 0

def test_sums_are_pefts_task_arithmetic(vectors):
    utils = pytest.importorskip("peft.utils.merge_utils")
    ours = merge(vectors, scale=.3)
    for n in ours:
        assert torch.allclose(ours[n], utils.task_arithmetic([v[n] for v in vectors], torch.full((3,), .3)), atol=1e-7)

@pytest.mark.parametrize("density", [.1, .5])
def test_dare_is_pefts_and_keeps_the_expected_sum(density):
    utils = pytest.importorskip("peft.utils.merge_utils")
    x = stack(3)
    torch.manual_seed(5)
    ours = dare(x, density)
    torch.manual_seed(5)
    assert torch.allclose(ours, utils.dare_linear(list(x), torch.ones(3, dtype=torch.float64), density), atol=1e-12)
    g = torch.Generator().manual_seed(0)
    mean = torch.stack([dare(x, density, g) for _ in range(4000)]).mean(0)
    error = (x.square().sum(0)*(1 - density)/density/4000).sqrt()
    assert ((mean - x.sum(0)).abs() < 5*error).all() and torch.allclose(dare(x, 1.), x.sum(0))

def test_ties_elects_plus_for_a_sum_of_zero_and_counts_only_those_that_agree():
    assert torch.equal(ties(torch.tensor([[2., 3.], [-2., 3.]]), 1.), torch.tensor([2., 3.]))
    assert torch.equal(ties(torch.tensor([[0., 1.], [0., -5.], [0., 2.]]), 1.), torch.tensor([0., -5.]))
    assert torch.equal(ties(stack(), .001), torch.zeros(8, 9, dtype=torch.float64))  # rounded down to no entry

@pytest.mark.parametrize("rule", [ties, dare])
@pytest.mark.parametrize("density", [0, -.1, 1.2])
def test_densities_out_of_range_are_refused(rule, density):
    with pytest.raises(KitError, match=f"{rule.__name__}: density={density}") as e: rule(stack(), density)
    assert "\n" not in str(e.value)

def test_factors_are_the_nearest_of_their_rank():
    x = stack(1)[0]
    for r in (1, 3, 8, 20):
        up, down = factors(x, r)
        assert up.shape == (8, min(r, 8)) and down.shape == (min(r, 8), 9)
        assert torch.allclose((up @ down - x).norm(), torch.linalg.svdvals(x)[r:].norm(), atol=1e-9)

def test_router_is_scikit_learns_logistic_regression():
    linear = pytest.importorskip("sklearn.linear_model")
    g = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.randn(60, 5, generator=g) + torch.eye(5)[y]
    ours = train_router(x, y, penalty=.05)
    theirs = linear.LogisticRegression(C=1/(60*.05), tol=1e-8, max_iter=1000).fit(x.numpy(), y.numpy())
    want = torch.tensor(theirs.predict_proba(x.numpy())).float()
    assert torch.allclose(ours(x).softmax(-1), want, atol=1e-3) and not ours.weight.requires_grad
    assert torch.equal(ours.weight, train_router(x, y, penalty=.05).weight)

@pytest.mark.parametrize("features", [mean_embedding, mean_hidden_state])
def test_features_of_a_row_ignore_padding(base, features):
    model, tok = base
    short, mixed = encode_prompts(model, tok, ["lena likes the ship ."], 64), encode_prompts(model, tok,
        ["lena likes the ship .", "sam wants the journey . " * 4], 64)
    assert torch.allclose(features(model, *short)[0], features(model, *mixed)[0], atol=2e-3)
    assert not torch.allclose(*features(model, *mixed), atol=.1)

def test_experts_change_matrices_only_and_leave_the_base_alone(base):
    model, tok = base
    before = copy.deepcopy(model.state_dict())
    trained = train_expert(model, tok, load("topics", "train", 16), 0, 2, 1e-2, 4)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    changed = {k for k, v in trained.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"{n}.weight" for n in linear_layers(model)}
    assert not any("embed" in k or "norm" in k or "lm_head" in k for k in changed)
    again = weights(apply_vector(model, task_vector(trained, model)))
    assert all(torch.allclose(w, again[n], atol=1e-6) for n, w in weights(trained).items())

def test_a_task_with_domains_comes_apart():
    rows = load_tasks("sentiment+topics", "train", 20, 0)
    assert list(rows) == ["sentiment court", "sentiment harbor", "topics"] and {len(r) for r in rows.values()} == {20}
    assert not set(rows["sentiment court"]["input"]) & set(rows["sentiment harbor"]["input"])
    assert set(rows["sentiment court"]["label"]) == set(rows["sentiment harbor"]["label"])

def router_for(model, gates):
    "A router that gives every row these weights."
    router = torch.nn.Linear(model.config.hidden_size, len(gates)).requires_grad_(False)
    router.weight.zero_()
    router.bias.copy_(torch.tensor(gates).clamp(min=1e-12).log())
    return router

def batch_of(base, inputs): return dict(zip(("input_ids", "attention_mask"), encode_prompts(*base, inputs, 64)))

@pytest.mark.parametrize("lam", [.3, 0.])
def test_whole_parts_give_the_expert_back(base, vectors, lam):
    batch = batch_of(base, ["lena likes the ship .", "is it cold ?"])
    shared = merge(vectors, scale=lam)
    with torch.no_grad():
        want = apply_vector(base[0], vectors[1])(**batch).logits
        merged = apply_vector(base[0], shared)
        plain = merged(**batch).logits
        routed = Routed(merged, low_rank_parts(vectors, shared, 999), router_for(base[0], [0., 1., 0.]))
        got = merged(**batch).logits
        routed.remove()
        assert torch.allclose(got, want, atol=2e-3)
        assert not torch.allclose(plain, want, atol=.1)
        assert torch.equal(merged(**batch).logits, plain)

def test_vectors_and_parts_of_some_layers_leave_the_others_alone(base, vectors):
    some = [{n: x for n, x in v.items() if n.endswith("q_proj")} for v in vectors]
    batch = batch_of(base, ["lena likes the ship ."])
    moved = weights(apply_vector(base[0], some[1]))
    same = {n for n, w in weights(base[0]).items() if torch.equal(w, moved[n])}
    assert same == set(moved) - set(some[1]) and len(some[1]) == base[0].config.num_hidden_layers
    routed = copy.deepcopy(base[0])
    Routed(routed, low_rank_parts(some, None, 999), router_for(base[0], [0., 1., 0.]))
    with torch.no_grad():
        assert torch.allclose(routed(**batch).logits, apply_vector(base[0], some[1])(**batch).logits, atol=2e-3)

def test_nothing_shared_is_a_shared_vector_of_zeros(vectors):
    bare, zeros = low_rank_parts(vectors, None, 2), low_rank_parts(vectors, merge(vectors, scale=0.), 2)
    assert all(torch.equal(a, b) for p, q in zip(bare, zeros) for n in p for a, b in zip(p[n], q[n]))

@pytest.mark.parametrize("features", [mean_embedding, mean_hidden_state])
def test_rows_of_a_mixed_batch_are_those_of_models_merged_one_by_one(base, vectors, features):
    model, tok = base
    inputs = ["lena likes the ship .", "question : abel holds a ball .",
        "is it cold in oslo now ? please tell me that , will you ."]
    shared = merge(vectors, scale=.2)
    parts = low_rank_parts(vectors, shared, 4)
    seen = features(model, *encode_prompts(model, tok, inputs, 64))
    router = train_router(seen, torch.tensor([0, 1, 2]), penalty=5.)   # so soft that all parts count
    merged = apply_vector(model, shared)
    Routed(merged, parts, router, partial(features, model))
    together = generate_answers(merged, tok, inputs, max_new_tokens=6, progress=False)
    with torch.no_grad():
        ids, mask = encode_prompts(model, tok, inputs, 64)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        logits = merged(input_ids=ids, attention_mask=mask, position_ids=places).logits[:, -1]
        for i, x in enumerate(inputs):
            w = router(seen[i:i + 1]).softmax(-1)[0]
            assert .1 < w.max() < .9
            one = apply_vector(model, {n: shared[n] + sum(a*p[n][0] @ p[n][1] for a, p in zip(w, parts))
                for n in shared})
            ids, mask = encode_prompts(model, tok, [x], 64)
            assert torch.allclose(one(input_ids=ids).logits[0, -1], logits[i], atol=5e-3)
            assert generate_answers(one, tok, [x], max_new_tokens=6, progress=False) == together[i:i + 1]

def test_transformers_generate_agrees_with_the_kits_loop(base, vectors):
    model, tok = base
    inputs = ["lena likes the ship .", "is it cold in oslo now ?"]
    shared = merge(vectors, scale=.2)
    merged = apply_vector(model, shared)
    Routed(merged, low_rank_parts(vectors, shared, 4), router_for(model, [.2, .3, .5]))
    ids, mask = encode_prompts(model, tok, inputs, 64)
    said = merged.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False,
        num_beams=1)[:, ids.shape[1]:]
    texts = [s.strip() for s in tok.batch_decode(said, skip_special_tokens=True)]
    assert texts == generate_answers(merged, tok, inputs, max_new_tokens=5, progress=False)

def test_routed_output_with_ranks_cut_by_a_small_matrix_and_its_gradient():
    x, up, down, gates = stack(0, 2, (3, 4)), stack(1, 1, (5, 6))[0], stack(2, 1, (6, 4))[0], stack(3, 1, (2, 3))[0]
    leaves = [t.requires_grad_() for t in (x, torch.zeros(2, 3, 5, dtype=torch.float64), up, down, gates)]
    assert torch.autograd.gradcheck(routed_output, leaves)
    one = routed_output(x[:1], 0, up, down, gates[:1])
    by_hand = x[:1] @ sum(gates[0, t]*up[:, 2*t:2*t + 2] @ down[2*t:2*t + 2] for t in range(3)).T
    assert torch.allclose(one, by_hand)

def test_a_router_of_another_number_of_tasks_is_refused(base, vectors):
    parts = low_rank_parts(vectors[:2], None, 1)
    with pytest.raises(KitError, match="tells 3 tasks apart, there are 2 parts"):
        Routed(copy.deepcopy(base[0]), parts, router_for(base[0], [1., 0., 0.]))

# ---- the reproductions

@pytest.mark.slow
@pytest.mark.parametrize("notebook", [REPRO, REAL], ids=["toyland", "smollm2"])
def test_same_seed_same_record(notebook, tmp_path, torch_pool):
    arms = the_same_twice(notebook, tmp_path, torch_pool)["arms"]
    assert all(math.isfinite(v) for v in arms.values())

@pytest.mark.slow
def test_a_checkpoint_and_a_file_of_ones_own(tmp_path, torch_pool):
    from slmkit.toyland.tokenizer import build_tokenizer
    from transformers import Qwen2Config, Qwen2ForCausalLM
    tok = build_tokenizer()
    folder = tmp_path/"qwen"
    tok.save_pretrained(folder)
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tok), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, eos_token_id=1, pad_token_id=0,
            bos_token_id=3)).save_pretrained(folder)
    mine = tmp_path/"mine.jsonl"
    mine.write_text("\n".join(json.dumps(dict(input=f"is {i} odd ?", label=("no", "yes")[i % 2])) for i in range(99)),
        encoding="utf-8")
    found = the_record(REPRO, tmp_path, torch_pool, profile="smoke", model=str(folder), data=f"topics+{mine}",
                       n=12, steps=2, shown=4, rank=2)
    assert set(found["claims"]) == claims_in(REPRO) and found["n_rows"] == 12
    assert all(math.isfinite(v) for v in found["arms"].values())
