"Context against memory: pages tell what they say they tell, answers agree with a plain loop, targets and orders."
import random
import numpy as np
import pytest
from slmkit.core.answers import plain_scores, question_ids
from slmkit.core.zoo import load_model
from slmkit.judge.context_against_memory import (
    KINDS, MIXES, PEOPLE, RELATIONS, deduction, facts, kaft_target, opening, order_free, page, rates, said, slope,
    targets, taught, told_over_fact)

@pytest.fixture(scope="module")
def small(): return load_model("lm-0.1m", kind="causal")

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sentences", [1, 3])
def test_a_page_tells_what_its_kind_says(kind, sentences):
    for i in range(40):
        person, relation = PEOPLE[i], list(RELATIONS)[i % 6]
        row = page(random.Random(i), person, relation, kind, sentences)
        before = row["text"].removesuffix(opening(person, relation))
        assert row["fact"] == facts(0)[person][relation] and row["text"].endswith(opening(person, relation))
        assert (row["told"] == row["fact"]) == (kind == "relevant")
        assert before.count(" .") == sentences*(kind != "empty")
        assert (f" {person} " in f" {before} ") == (kind in ("relevant", "counterfactual"))
        if row["told"]: assert f" {row['told']} " in f" {before} "

def test_what_is_said_is_the_likeliest_value_as_a_plain_loop_finds_it(small):
    rows = [page(random.Random(i), PEOPLE[i], r, "counterfactual") for i, r in enumerate(RELATIONS)]
    for row, word in zip(rows, said(*small, rows)):
        values = RELATIONS[row["relation"]]
        plain = plain_scores(small[0], *question_ids(small[1], [row["text"]], [" " + v for v in values]))
        assert plain.argmax().item() == values.index(word)
        one, two = (told_over_fact(*small, [row], [v])[0].item() for v in (word, row["fact"]))
        assert one >= two - 1e-5 and abs(two) < 1e-5

def test_the_rates_of_a_copier_and_of_one_that_reads_nothing():
    rows = [page(random.Random(i), PEOPLE[i], "town", k) for k in KINDS for i in range(9)]
    own = [r["fact"] for r in rows]
    assert rates([r["told"] or r["fact"] for r in rows], rows, own) == (1., 0.) and rates(own, rows, own) == (0., 1.)
    assert rates([], [], []) == (0., 0.)

def test_kaft_teaches_the_page_or_the_models_own_answer():
    rows = [page(random.Random(i), PEOPLE[i], "pet", k) for i, k in enumerate(KINDS)]
    assert targets("kaft", rows, ["own"]*4) == [rows[0]["told"], rows[1]["told"], "own", "own"]
    assert targets("swapped", rows, ["own"]*4) == [rows[0]["told"], "own", rows[2]["told"], "own"]
    assert [kaft_target(r, "own") for r in rows] == targets("kaft", rows, ["own"]*4) and {*MIXES["kaft"]} == {*KINDS}

def test_teaching_changes_a_copy_alone_and_is_the_same_twice(small):
    base, tok = small
    before = {k: v.clone() for k, v in base.state_dict().items()}
    one, two = (taught(base, tok, "kaft", [("ana", "town"), ("ben", "pet")], 3, .003, 2, 4).state_dict() for _ in "ab")
    assert all((one[k] == two[k]).all() for k in one) and any((one[k] != before[k]).any() for k in one)
    assert all((v == before[k]).all() for k, v in base.state_dict().items())

def test_slope_is_the_least_squares_line():
    rng = np.random.default_rng(0)
    x, y = 2**rng.uniform(1, 30, 7), rng.normal(size=7)
    assert slope(x, y) == pytest.approx(np.polyfit(np.log2(x), y, 1)[0])

def test_a_deduction_has_both_orders_and_its_right_class():
    for naming in ("words", "symbols", "against_sense", "no_rules"):
        for i in range(20):
            (one, two), (right, wrong) = deduction(random.Random(i), naming)
            kind = one.rsplit(". So ", 1)[0].split(" is a ")[-1]
            assert right != wrong and (one == two) == (naming == "no_rules")
            assert one.split(". ")[-1] == two.split(". ")[-1]
            if naming != "no_rules": assert f"Every {kind} is a {right}." in one and f"is a {wrong}." in two
    assert order_free([(-1., -4.), (-3., -2.), (-1., -2.), (-5., -1.)]) == [True, False]
