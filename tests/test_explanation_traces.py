"""Traces against arithmetic and the world's facts, orders of tokens by brute force, TRL's batch."""
import random
import pytest
import torch
from itertools import islice
from slmkit.core.fit import batches, collate, lm_loss
from slmkit.core.settings import settings
from slmkit.distill.explanation_traces import (KINDS, MARK, SYSTEM, Mixture, answer_of, best_strategy,
                                               curriculum, dealt,
    erased, intermediate, judged, others_traces, questions, taught)
from slmkit.toyland.world import facts

ALL = dict.fromkeys(KINDS, "steps")
def mixture():
    zoo = dict(model="lm-1m", batch_size=4, max_new_tokens=8, relative_lr=True, lr=.005)
    cfg = settings("smoke", smoke=zoo | dict(n=8, test=4, steps=2))
    return Mixture(cfg, 0)

def test_traces_are_right():
    "Sums are computed again from the question, facts are looked up again from the trace."
    sign = dict(sum=1, difference=-1)
    for row in questions("train", 60, 3):
        words = row["rationale"].replace(" .", "").split()
        if row["kind"] == "sums":
            first, second = (part.split() for part in row["input"].removesuffix(" ?").split(" , then "))
            middle = int(first[3]) + sign[first[1]]*int(first[5])
            assert int(row["label"]) == middle + sign[second[1]]*int(second[5])
            assert words.count(str(middle)) >= 2
        if row["kind"] in ("two_hops", "whose"):
            told = [(w, words[i - 1], words[i + 1], words[i + 3]) for i, w in enumerate(words) if w == "of"]
            assert told and all(facts()[p][r] == v for _, r, p, v in told)
        if row["kind"] == "two_hops": assert row["rationale"].split(" . ")[0] in row["input"]
        if row["kind"] == "whose": assert f"of {row['label']} is {row['input'].split()[-2]} ." in row["rationale"]

def test_no_row_stands_in_two_splits():
    parts = [{r["input"] for r in questions(s, 40, 0)} for s in ("train", "valid", "test")]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])

def test_the_best_strategy_by_brute_force():
    rng = random.Random(0)
    for _ in range(200):
        draw = lambda top: {w: {k: rng.randrange(1, top) for k in "abc"} for w in ("direct", "steps", "recall")}
        scores, tokens, margin = draw(9), draw(50), rng.choice([0, 1, 3])
        for task, way in best_strategy(scores, tokens, margin).items():
            good = {w for w in scores if all(scores[w][task] + margin >= scores[v][task] for v in scores)}
            assert way in good
            assert all(tokens[way][task] <= tokens[w][task] for w in good)

def test_the_message_is_erased_and_nothing_else():
    rows = questions("train", 5, 0)
    mixed = dict(zip(KINDS, ("steps", "direct", "steps", "direct")))
    kept, said = taught(rows, mixed, keep=True)
    assert {p.startswith(SYSTEM["steps"]) for p, s in zip(kept, said) if MARK in s} == {True}
    assert ([erased(p) for p in kept], said) == taught(rows, mixed)
    assert [answer_of(s).strip() for s in said] == [r["label"] for r in rows]

def test_controls_keep_the_texts():
    rows = questions("train", 40, 0)
    other = others_traces(rows, 1)
    assert [r["label"] for r in other] == [r["label"] for r in rows]
    for kind in KINDS:
        of = lambda rows: [r["rationale"] for r in rows if r["kind"] == kind]
        assert sorted(of(other)) == sorted(of(rows)) and of(other) != of(rows)
    wrong = [a["label"] != b["label"] for a, b in zip(intermediate(rows, 1), rows)]
    assert .08 < sum(wrong)/len(wrong) < .3
    given = dict(zip(KINDS, ("steps", "steps", "direct", "direct")))
    for seed in range(20):
        assert dealt(given, seed) != given and sorted(dealt(given, seed).values()) == sorted(given.values())

def test_a_curriculum_is_exact_in_tokens():
    t = mixture()
    two = [t.rows(*taught(rows, ALL)) for rows in (intermediate(t.train, 0), t.train)]
    draw = lambda rows: batches(rows, 4, t.tok.pad_token_id, random.Random(0))
    sizes = [b["input_ids"].numel() for b in islice(draw(two[0]), 9)]
    for budget in (0, 1, sizes[0], sizes[0] + 1, sum(sizes[:4])):
        n = next(k for k in range(9) if sum(sizes[:k]) >= budget)
        mixed = islice(curriculum(*map(draw, two), budget), n + 2)
        plain = [*islice(draw(two[0]), n), *islice(draw(two[1]), 2)]
        assert all((a["input_ids"] == b["input_ids"]).all() for a, b in zip(mixed, plain, strict=True))

def test_arms_have_equal_tokens():
    t = mixture()
    _, steps = t.fit(t.rows(*taught(t.train, ALL)), steps=60)
    _, direct = t.fit(t.rows(*taught(t.train, dict.fromkeys(KINDS, "direct"))), like=steps)
    assert abs(direct.tokens/steps.tokens - 1) < .02 and direct.steps > steps.steps
    share, by_kind, written = judged(t, t.base)
    assert list(by_kind) == list(written) == list(KINDS) and len(share.right) == len(t.test)

def test_trl_has_the_same_loss():
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    t = mixture()
    rows = t.rows(*taught(t.train, ALL))[::3]
    theirs, ours = sft.DataCollatorForLanguageModeling(t.tok.pad_token_id)(rows), collate(rows, t.tok.pad_token_id)
    with torch.no_grad(): assert torch.isclose(lm_loss(t.base.eval(), dict(theirs)), lm_loss(t.base, ours))
