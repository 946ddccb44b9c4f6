"Is the gain real: ROUGE-L, the two bootstraps and the protocols, against brute force, SciPy and the authors' p-values."
import os
from itertools import combinations
import numpy as np
import pytest
from scipy import stats
from slmkit.core.data import read_rows, set_file
from slmkit.judge.is_the_gain_real import (
    compare, interval, paired_p, prompts_chosen, published, rates, rouge_l, simulate)


def is_subsequence(part, text):
    rest = iter(text)
    return all(x in rest for x in part)


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    rng = np.random.default_rng(0)
    for _ in range(30):
        a, b = (list(rng.choice(list("abc"), size=int(rng.integers(1, 7)))) for _ in "ab")
        longest = max(n for n in range(len(a) + 1) for part in combinations(a, n) if is_subsequence(part, b))
        assert np.isclose(rouge_l(" ".join(a), " ".join(b)), 2*longest/(len(a) + len(b)))


def test_the_interval_is_scipys():
    rng = np.random.default_rng(1)
    base = rng.random(300) < .5
    adapted = base ^ (rng.random(300) < .2)
    found = stats.bootstrap((adapted*1., base*1.), lambda x, y, axis: np.mean(x - y, axis=axis), paired=True,
                            method="percentile", n_resamples=4000, rng=2).confidence_interval
    assert np.allclose(interval(base, adapted, rng, 4000), found, atol=.015)


def test_protocols_differ_only_in_prompt_and_interval():
    rng = np.random.default_rng(3)
    valid, test = simulate(rng, gain=3., test=300)
    base, adapted = prompts_chosen(valid)
    assert valid[0, base].mean() == valid[0].mean(1).max() and valid[1, adapted].mean() == valid[1].mean(1).max()
    assert prompts_chosen(valid, own=False) == (adapted, adapted)
    assert all(compare(valid, test, own, test_it, rng) == "win" for own in (0, 1) for test_it in (0, 1))


def test_without_taste_the_honest_protocol_keeps_its_level():
    by = rates(np.random.default_rng(4), 400, taste=0.)["honest"]
    assert by["win"] + by["loss"] < .1 and by["tie"] + by["win"] + by["loss"] == pytest.approx(1)


@pytest.mark.skipif(not os.environ.get("SLMKIT_DATA"), reason="needs the authors' completions: SLMKIT_DATA")
def test_the_paired_bootstrap_gives_the_authors_p_values():
    decided = read_rows(set_file("time-travel-completions", "decisions"))
    said = {(r["model"], r["dataset"], r["split"]): r["rouge_p"] for r in decided}
    cells = {}
    for r in published(): cells.setdefault((r["model"], r["dataset"], r["split"]), []).append(r)
    rng = np.random.default_rng(0)
    ours = {k: paired_p(*([r[f"rouge_{s}"] for r in v] for s in ("guided", "general")), rng, 5000)
            for k, v in cells.items()}
    assert sum(abs(ours[k] - said[k]) < .015 for k in said) >= 25
