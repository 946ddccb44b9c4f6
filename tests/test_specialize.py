"""Specializing: the loss against torch and TRL, stored distributions against the model's own, alignment by brute
force, prompts, the gpu and paper paths."""
import copy, itertools, json, math, random, warnings
import pytest, torch
import torch.nn.functional as F
from conftest import ROOT, executed_in
from slmkit.core.fit import fresh_copy, batches, collate, fit, rows_for
from slmkit.core.settings import KitError
from slmkit.distill.specialize import (aligned, at_targets, knows, losses, matched, numbered, plain_loss, right_only,
    solutions, solved, top_k_loss, top_tokens, watched, with_shots)
from slmkit.toyland.tokenizer import build_tokenizer

def z(n=7, vocab=11, seed=0):
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)*2
def top(t, k):
    found = t.log_softmax(-1).topk(k)
    return found.indices, found.values

# ---- the loss

@pytest.mark.parametrize("k", [1, 3, 11])
def test_top_k_loss_is_torch_kl_div_of_the_dense_renormalised_target(k):
    s, t = z(seed=1).requires_grad_(), z(seed=2)
    ids, logs = top(t, k)
    dense = torch.zeros_like(t).scatter(1, ids, logs.exp()/logs.exp().sum(-1, keepdim=True))
    got, want = top_k_loss(s, ids, logs), F.kl_div(s.log_softmax(-1), dense, reduction="batchmean")
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    assert torch.allclose(*(torch.autograd.grad(x, s, retain_graph=True)[0] for x in (got, want)), atol=1e-14)

def test_all_tokens_kept_is_trls_gkd_loss_at_beta_0():
    warnings.filterwarnings("ignore")
    GKD = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    s, t = z(seed=1), z(seed=2)
    # ours is the mean over the 7 tokens
    want = GKD.generalized_jsd_loss(s[None], t[None], beta=0., temperature=1., reduction="sum")
    assert top_k_loss(s, *top(t, 11)).item() == pytest.approx(want.item()/7, rel=1e-9)

def test_one_token_kept_is_cross_entropy():
    s, t = z(seed=1), z(seed=2)
    assert top_k_loss(s, *top(t, 1)).item() == pytest.approx(F.cross_entropy(s, t.argmax(-1)).item(), rel=1e-12)

# ---- alignment

def most_pairs(a, b):
    "Every choice of positions on both sides."
    for n in range(min(len(a), len(b)), 0, -1):
        texts = {tuple(a[i] for i in c) for c in itertools.combinations(range(len(a)), n)}
        if any(tuple(b[j] for j in c) in texts for c in itertools.combinations(range(len(b)), n)): return n
    return 0

def test_aligned_has_as_many_pairs_as_brute_force_finds():
    rng = random.Random(0)
    for _ in range(150):
        a, b = ([rng.choice("xyz") for _ in range(rng.randint(0, 7))] for _ in "ab")
        got = aligned(a, b)
        assert len(got) == most_pairs(a, b) and all(a[i] == b[j] for i, j in got)
        assert all(p[0] < q[0] and p[1] < q[1] for p, q in zip(got, got[1:]))

# ---- with models

SHAPE = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
@pytest.fixture(scope="module")
def tiny():
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
    tok = build_tokenizer()
    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), pad_token_id=0, eos_token_id=1, bos_token_id=3, **SHAPE))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=len(tok), d_model=16, d_kv=8, d_ff=16, num_layers=1,
            num_heads=2, dropout_rate=0., decoder_start_token_id=0, pad_token_id=0, eos_token_id=1))
    return dict(lm=lm.eval(), t5=t5.eval()), tok

Q, A = ["ana has a box . what ?", "ben sleeps . who ?", "the old dog sees a cat and a bird . what ?"], ["a box",
    "ben", "a cat and a bird"]

@pytest.mark.parametrize("kind", ["lm", "t5"])
def test_stored_distributions_meet_their_own_tokens_in_any_batch(tiny, kind):
    models, tok = tiny
    model = models[kind]
    rows = numbered(rows_for(model, tok, Q*3, A*3))
    ids, logs = top_tokens(model, rows, 0, k=len(tok), size=2)
    data = batches(rows, 2, 0, random.Random(0))
    for _ in range(8):
        assert matched(ids, logs)(model, next(data)).abs().item() < 1e-5  # the teacher itself, shuffled and padded
    few = top_tokens(model, rows, 0, 5)
    assert torch.equal(few[0], ids[:, :5]) and torch.allclose(few[1], logs[:, :5], atol=1e-6)
    wrong = matched(ids.roll(1, 0), logs.roll(1, 0))
    assert sum(wrong(model, next(data)).item() for _ in range(8)) > 1e-4

@pytest.mark.parametrize("kind", ["lm", "t5"])
def test_logits_at_targets_give_transformers_own_loss(tiny, kind):
    models, tok = tiny
    model = models[kind]
    rows = numbered(rows_for(model, tok, Q, A))
    batch = collate(rows, 0)
    logits, number = at_targets(model, batch)
    words = torch.tensor([l for r in rows for l in r["labels"] if l != -100])
    assert number.tolist() == list(range(len(words)))
    assert F.cross_entropy(logits, words).item() == pytest.approx(plain_loss(model, batch).item(), rel=1e-5)

@pytest.mark.parametrize("kind", ["lm", "t5"])
def test_losses_are_those_of_one_row_at_a_time_without_its_end(tiny, kind):
    models, tok = tiny
    model = models[kind]
    got = losses(model, tok, Q, A, size=2)
    for i, (q, a) in enumerate(zip(Q, A)):
        row = rows_for(model, tok, [q], [a])[0]
        row["labels"] = row["labels"][:-1] + [-100]
        with torch.no_grad(): assert got[i].item() == pytest.approx(model(**collate([row], 0)).loss.item(), rel=1e-4)

def test_knows_counts_the_questions_whose_first_ending_is_likeliest(tiny):
    models, tok = tiny
    model = models["lm"]
    endings = ["box", "cat", "dog", "bird"]
    order = losses(model, tok, ["ana has a"]*4, endings).argsort().tolist()
    best, worst = [endings[i] for i in order], [endings[i] for i in order[::-1]]
    assert knows(model, tok, [("ana has a", best)]) == 1 and knows(model, tok, [("ana has a", worst)]) == 0
    assert knows(model, tok, [("ana has a", best), ("ana has a", worst), ("ana has a", best[:2])]) == pytest.approx(2/3)

def test_matching_teaches_what_the_teacher_thinks(tiny):
    models, tok = tiny
    student = copy.deepcopy(models["lm"])
    with torch.no_grad():
        for p in student.parameters(): p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1))*.3)
    rows = numbered(rows_for(student, tok, Q, A))
    h = fit(student, matched(*top_tokens(models["lm"], rows, 0, 5)), batches(rows, 3, 0, random.Random(0)), steps=60,
        lr=1e-2, progress=False)
    assert h.loss[-1] < .5*h.loss[0]

def test_watching_changes_nothing(tiny):
    models, tok = tiny
    rows, seen = rows_for(models["lm"], tok, Q, A), {}
    def look(number, model): seen[number] = (model.training, solved(model, tok, Q, A, most=3))
    plain, looked = (fit(fresh_copy(models["lm"], 0), loss, batches(rows, 2, 0, random.Random(0)), steps=6, bf16=True,
            progress=False).loss for loss in (plain_loss, watched(plain_loss, {0, 3}, look)))
    assert plain == looked and set(seen) == {0, 3} and not any(t for t, _ in seen.values())

def test_solutions_are_drawn_the_same_from_the_same_seed(tiny):
    models, tok = tiny
    for kind in ("lm", "t5"):
        one, two, other = (solutions(models[kind], tok, Q, 5, 1., seed) for seed in (3, 3, 4))
        assert one == two != other and len(one) == 3
    assert solutions(models["lm"], tok, Q, 5, 0., 1) == solutions(models["lm"], tok, Q, 5, 0., 2)

def test_only_right_answers_are_kept():
    said = ["a . answer : 3", "answer : 3 answer : 4", "3", "b . answer : ( 1 + 2 )"]
    assert right_only(list("pqrs"), said, ["3"]*4) == (["p", "r"], [said[0], said[2]])
    assert right_only(list("pqrs"), said, ["3"]*4, "equation")[0] == ["p", "r", "s"]
    assert right_only(["p"], ["no"], ["3"]) == ([], [])

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

# ---- the notebook

MAIN = {"gains-steps-loses-the-rest", "the-loss-is-its-own", "chains-beat-answers", "chains-reach-further",
    "in-context-training-keeps-both", "chains-forget-less-than-answers"}
SLOW = {"room-has-to-be-made", "distributions-beat-samples"}
def run(tmp_path, pool, name="r", **given):
    return executed_in(pool, ROOT/"nbs/distill/specialize.ipynb", tmp_path, name, **given)

@pytest.fixture
def given(tmp_path, tiny):
    models, tok = tiny
    for name, model in models.items():
        model.save_pretrained(tmp_path/name)
        tok.save_pretrained(tmp_path/name)
    def make(**fields):
        rows = [dict(q=f"ana has {i} pears and {i} plums . how many ?", a=str(2*i), r=f"{i} + {i} is {2*i} .")
            for i in range(60)]
        (tmp_path/"rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return dict(data=str(tmp_path/"rows.jsonl"), columns="input=q,label=a,rationale=r", steps=2) | fields
    return make

@pytest.mark.slow
@pytest.mark.parametrize("profile,kind", [("gpu", "lm"), ("paper", "t5")])
def test_gpu_and_paper_paths_on_tiny_checkpoints_and_a_file(tmp_path, torch_pool, given, profile, kind):
    e, found = run(tmp_path, torch_pool, profile=profile, model=str(tmp_path/kind), **given())
    assert e["status"] == "ok", e["error"]
    assert set(found) == MAIN | SLOW
    assert found["distributions-beat-samples"]["n_rows"] == 9  # split by the checksums of the questions
    assert all(math.isfinite(v) for r in found.values() for v in r["arms"].values())

def test_what_cannot_work_is_said_in_one_line(tmp_path, torch_pool, given):
    e, found = run(tmp_path, torch_pool, "folder", profile="gpu")
    assert e["status"] != "ok" and "needs --model FOLDER" in str(e["error"]) and not found
    e, _ = run(tmp_path, torch_pool, "chains", profile="gpu", model=str(tmp_path/"lm"),
        **given(columns="input=q,label=a"))
    assert e["status"] != "ok" and "has no rationale column" in str(e["error"])

@pytest.mark.slow
def test_same_seed_same_record(tmp_path, torch_pool):
    one, two = (run(tmp_path, torch_pool, name, profile="smoke", seed=3)[1] for name in ("one", "two"))
    assert set(one) == MAIN and {c: r["arms"] for c, r in one.items()} == {c: r["arms"] for c, r in two.items()}
