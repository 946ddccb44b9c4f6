"Zero-shot chain of thought: right answers as the authors flag them, exact tests as in SciPy, Holm by its definition."

import itertools, os, random
import pytest
from scipy.stats import binomtest
from slmkit.core.data import read_rows, set_file
from slmkit.reason import zero_shot_cot as z

HERE = bool(os.environ.get("SLMKIT_DATA"))

@pytest.mark.skipif(not HERE, reason="needs the authors' outputs: SLMKIT_DATA")
def test_our_reading_of_right_is_the_authors_flag():
    rows = z.published()
    for part, way in ("cot", "step_by_step"), ("direct", "at_once"):
        theirs = [r["correct"] for r in read_rows(set_file("zero-shot-cot-outputs", part))]
        differ = [r for r, t in zip(rows, theirs) if z.right(r, way) != t]
        assert len(rows) == 9706 and len(differ) <= 20, differ[:3]  # they compare fractions to the last digit

@pytest.mark.parametrize("said, gold, right", [
    ("12", "12.0", True), ("43500", "43,500", True), ("No", "no ", True), ("", "", False), ("", "3", False),
    ("0.6666666666666667", "0.6666666666666666", True), ("13", "12", False), ("B", "C", False),
])
def test_answers_are_equal_as_numbers_or_as_text(said, gold, right):
    assert z.right(dict(at_once=said, gold=gold), "at_once") == right

def test_mcnemar_is_the_exact_sign_test():
    for gained, lost in itertools.product(range(9), repeat=2):
        want = binomtest(gained, gained + lost).pvalue if gained + lost else 1
        assert abs(z.mcnemar(gained, lost) - want) < 1e-12

def by_definition(p):
    "Holm's adjusted values: the largest of (m - i + 1) p_(i) up to one's own place, at most 1."
    order = sorted(p)
    steps = [min(1, (len(p) - i)*x) for i, x in enumerate(order)]
    return [max(steps[:order.index(x) + 1]) for x in p]

def test_holm_follows_its_definition():
    rng = random.Random(0)
    for n in range(1, 8):
        p = [rng.random()*rng.choice([.01, .2, 1]) for _ in range(n)]
        assert z.holm(p) == pytest.approx(by_definition(p))

def test_a_placebo_keeps_length_and_last_mark():
    rng = random.Random(1)
    for s in "Are you sure?", "This is very important to my career.", "word "*40:
        made = z.placebo(s, rng)
        assert len(made.split()) == len(s.split()) and made[-1] == (s[-1] if s[-1] in ".?!" else ".")
        assert sorted(z.shuffled_words(s, rng).split()) == sorted(s.split())

def test_written_sums_are_checked():
    assert z.written_sums("3 + 4 = 7. 10 ÷ 4 = 2.5; 5 x 3 = 16, $1,000 - 1 = $999, 7 / 0 = 1") == \
        [True, True, False, True, False]
