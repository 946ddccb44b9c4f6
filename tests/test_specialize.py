"""Specializing: examples before questions, generic questions against one row at a time, stored distributions against
the model's own, right solutions, watching."""
import copy, random
import pytest, torch
import torch.nn.functional as F
from conftest import ROOT, executed_in
from slmkit.core.fit import batches, collate, encode_causal, fit, fresh_copy, lm_loss
from slmkit.core.generate import generate_answers
from slmkit.core.settings import KitError
from slmkit.distill.offline_logits import bucket_loss, of_answers
from slmkit.distill.specialize import generic_questions, knows, matching, right_only, sampled, watched, with_shots
from slmkit.toyland.tokenizer import build_tokenizer

@pytest.fixture(scope="module")
def tiny():
    from transformers import LlamaConfig, LlamaForCausalLM
    tok = build_tokenizer()
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), pad_token_id=0, eos_token_id=1, bos_token_id=3,
                                        **shape)).eval(), tok

Q, A = ["ana has a box . what ?", "ben sleeps . who ?", "the old dog sees a cat and a bird . what ?"], ["a box",
    "ben", "a cat and a bird"]

# ---- prompts

def test_examples_are_drawn_anew_never_the_questions_own():
    examples = [(f"q{i} ?", f"{i}") for i in range(12)]
    out = with_shots([q for q, _ in examples]*5, examples, 3, 0)
    assert len(set(out)) == 60 and out == with_shots([q for q, _ in examples]*5, examples, 3, 0)
    for o, (q, a) in zip(out, examples*5):
        parts = o.removesuffix(q).split(" .")[:-1]
        assert o.endswith(q) and len(parts) == 3 == len(set(parts)) and f"{q} {a}" not in [p.strip() for p in parts]
        assert all(tuple(p.strip().rsplit(" ", 1)) in examples for p in parts)

def test_too_few_examples_are_refused():
    with pytest.raises(KitError, match="2 shots of 2 examples") as e: with_shots(["x"], [("a", "b")]*2, 2, 0)
    assert "\n" not in str(e.value)

# ---- what is lost

def mean_loss(model, tok, question, ending):
    "Of one row alone, by transformers' own loss, without the end token."
    row, = encode_causal(tok, [question], [ending])
    ids, labels = torch.tensor([row["input_ids"][:-1]]), torch.tensor([row["labels"][:-1]])
    with torch.no_grad(): return model(input_ids=ids, labels=labels).loss.item()

def test_knows_counts_the_questions_whose_first_ending_is_likeliest(tiny):
    model, tok = tiny
    endings = ["box", "a small cat", "old dog", "bird"]
    best = sorted(endings, key=lambda e: mean_loss(model, tok, "ana has a", e))
    assert knows(model, tok, [("ana has a", best)]) == 1 and knows(model, tok, [("ana has a", best[::-1])]) == 0
    mixed = [("ana has a", best), ("ana has a", best[::-1]), ("ana has a", best[:2])]
    assert knows(model, tok, mixed) == pytest.approx(2/3)

def test_generic_questions_have_four_endings_and_depend_on_the_seed_alone():
    one, two, other = generic_questions(3, 0), generic_questions(3, 0), generic_questions(3, 1)
    assert one == two != other and len(one) == 12 and all(len(set(ends)) == 4 for _, ends in one)

# ---- a teacher's solutions

def test_solutions_are_drawn_the_same_from_the_same_seed(tiny):
    model, tok = tiny
    one, two, other = (sampled(model, tok, Q, 5, 1., seed) for seed in (3, 3, 4))
    assert one == two != other and len(one) == 3
    assert sampled(model, tok, Q, 5, 0., 1) == generate_answers(model, tok, Q, 5, progress=False)

def test_only_right_answers_are_kept():
    said = ["( 1 + 2 )", "3", "( 2 + 1 )", "no"]
    assert right_only(list("pqrs"), said, ["( 1 + 2 )"]*4) == (["p"], ["( 1 + 2 )"])
    assert right_only(["p"], ["no"], ["3"]) == ([], [])

def test_the_teacher_itself_has_no_loss_in_any_batch(tiny):
    model, tok = tiny
    rows, tokens, ids, target = matching(model, tok, Q*3, A*3, 5)
    assert tokens.tolist() == [l for r in encode_causal(tok, Q*3, A*3) for l in r["labels"] if l != -100]
    data, loss = batches(rows, 2, 0, random.Random(0)), of_answers(bucket_loss, ids, target)
    for _ in range(8): assert loss(model, next(data)).abs().item() < 1e-5
    hard = of_answers(F.cross_entropy, tokens)(model, collate(rows, 0)).item()
    plain = model(**collate(encode_causal(tok, Q*3, A*3), 0)).loss.item()
    assert hard == pytest.approx(plain, rel=1e-5)

def test_matching_teaches_what_the_teacher_thinks(tiny):
    model, tok = tiny
    student = copy.deepcopy(model)
    with torch.no_grad():
        for p in student.parameters(): p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1))*.3)
    rows, _, ids, target = matching(model, tok, Q, A, 5)
    data = batches(rows, 3, 0, random.Random(0))
    h = fit(student, of_answers(bucket_loss, ids, target), data, steps=60, lr=1e-2, progress=False)
    assert h.loss[-1] < .5*h.loss[0]

def test_watching_changes_nothing(tiny):
    model, tok = tiny
    rows, seen = encode_causal(tok, Q, A), {}
    def look(number, model): seen[number] = (model.training, generate_answers(model, tok, Q, 3, progress=False))
    plain, looked = (fit(fresh_copy(model, 0), loss, batches(rows, 2, 0, random.Random(0)),
        steps=6, progress=False).loss
                     for loss in (lm_loss, watched(lm_loss, {0, 3}, look)))
    assert plain == looked and set(seen) == {0, 3} and not any(t for t, _ in seen.values())

# ---- the reproduction

CLAIMS = {"gains-the-task-loses-the-rest", "in-context-rows-keep-both-uses",
          "a-larger-teachers-distributions-beat-samples"}
def run(tmp_path, pool, name="r", **given):
    return executed_in(pool, ROOT/"nbs/distill/specialize_repro.ipynb", tmp_path, name, profile="smoke", **given)

@pytest.mark.slow
def test_same_seed_same_record(tmp_path, torch_pool):
    one, two = (run(tmp_path, torch_pool, name, seed=3)[1] for name in ("one", "two"))
    assert set(one) == CLAIMS and {c: r["arms"] for c, r in one.items()} == {c: r["arms"] for c, r in two.items()}
