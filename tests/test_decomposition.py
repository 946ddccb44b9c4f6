"Decomposition: pieces, recursion, costs and rules against their definitions."

import random
import numpy as np
import pytest
from slmkit.reason import decomposition as d

def test_words_are_different_and_none_is_shown():
    assert len(d.WORDS) == len(set(d.WORDS)) == 100 and not set(d.WORDS) & set(d.SHOWN)

@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_halves_reverse_any_list(m):
    for n in range(1, 20):
        seen = []
        def piece(x):
            seen.append(len(x))
            return x[::-1]
        assert d.halves(list(range(n)), m, piece, lambda a, b: b + a) == list(range(n))[::-1]
        assert max(seen) <= m

def test_prediction_is_what_independent_pieces_do():
    failed = (np.random.default_rng(0).random((100000, 3)) < .1).any(1).mean()
    assert abs(d.predicted(.1, 6, 2) - failed) < .005

def test_the_quickest_piece_is_n_over_p():
    for n, p in (64, 4), (64, 16), (32, 8):
        times = {m: d.cost(n, m, 60, p)[1] for m in (1, 2, 4, 8, 16, 32, 64)}
        assert min(times, key=times.get) == n//p

def test_odd_one_finds_the_block():
    rng = random.Random(0)
    for row in d.odd_rows(30, rng):
        kind = [next(g for g, words in d.GROUPS.items() if w in words) for w in row["words"]]
        s = np.array([[float(a == b) for a in kind] for b in kind])
        assert d.odd_one(s) == row["odd"] and len(set(row["words"])) == 4

def test_a_list_is_right_only_if_every_word_is(monkeypatch):
    import torch
    perfect = lambda model, tok, prompts, ends: torch.stack([
        torch.eye(len(e))[len(e) - 1 - p.rsplit(":", 1)[1].count(",")] for p, e in zip(prompts, ends)])
    monkeypatch.setattr(d, "scores", perfect)
    assert d.reverse_all("any", [["a", "b", "c"], ["d", "e", "f"]]) == [True, True]
    monkeypatch.setattr(d, "scores", lambda m, t, prompts, ends: torch.stack([torch.eye(len(e))[-1] for e in ends]))
    assert d.reverse_all("any", [["a", "b", "c"]]) == [False] and d.reverse_all("any", [["a"]]) == [True]
