"""Suppression by a peer, n-grams by hand, remote clique by scipy, what a hot writer does, filters and their rounds."""
import numpy as np, pytest, torch
from slmkit.synth.generate_and_filter import (
    Author, agreeing, consistency, distinct, flipped, in_scope, pair_vectors, remote_clique, suppressed, write, wrong)

NEAR, LABELS = [.05, .3, .45], np.arange(120) % 6
words = lambda rows: [r["words"].tolist() for r in rows]
by = lambda *how: write(Author(NEAR, seed=2), LABELS, *how)

def test_suppression_is_a_bias_on_the_logits():
    processors = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(0)
    logits, counts = rng.normal(size=20), rng.integers(1, 9, size=20)
    bias = {(i,): float(-2*c/counts.max()) for i, c in enumerate(counts)}
    ids, scores = torch.zeros(1, 1, dtype=torch.long), torch.tensor(logits[None]).float()
    peer = processors.SequenceBiasLogitsProcessor(bias)(ids, scores)
    assert np.allclose(peer[0], suppressed(logits, counts, 2), atol=1e-5)
    assert np.allclose(suppressed(logits, np.zeros(20), 2), logits)

def test_distinct_counts_n_grams_within_a_text():
    assert distinct([[1, 2], [2, 3]]) == 1 and distinct([[1, 2, 1, 2]]) == 2/3
    assert distinct([[1, 2], [1, 2], [1, 2]]) == 1/3 and distinct([[1], []]) == 0

def test_remote_clique_is_the_mean_distance_of_pairs():
    distance = pytest.importorskip("scipy.spatial.distance")
    x = np.random.default_rng(1).normal(size=(30, 4))
    assert remote_clique(x) == pytest.approx(distance.pdist(x).mean()) and remote_clique(np.ones((3, 2))) == 0

def test_a_hot_or_suppressed_writer_differs_more_and_errs_more():
    cold, warm, hot = by(.3), by(1.), by(2.)
    assert distinct(words(cold)) < distinct(words(warm)) < distinct(words(hot)) and wrong(cold) < wrong(hot)
    assert distinct(words(by(.3, 3.))) > distinct(words(cold))
    assert [r["label"] for r in hot] == LABELS.tolist() and words(by(2.)) == words(hot)

def test_in_scope_keeps_clear_rows_with_their_labels():
    rows = by(2.)
    kept = in_scope(rows, .8)
    assert 0 < len(kept) < len(rows) and all(r["post"].max() >= .8 for r in kept)
    assert in_scope(rows, 0) == rows

class Nearest:
    def __init__(self, rows): self.rows = rows
    def predict(self, xs):
        return np.array([min(self.rows, key=lambda r: abs(r["vector"][0] - x[0]))["label"] for x in xs])

def test_a_later_round_sees_all_rows_again():
    row = lambda x, label: dict(vector=[x], label=label)
    few, rows = [row(0., 0), row(10., 1)], [row(4., 0), row(5.5, 0), row(9., 1), row(1., 1)]
    assert agreeing(few, rows, 1, Nearest) == [rows[0], rows[2]]
    assert agreeing(few, rows, 2, Nearest) == rows[:3] and agreeing(few, rows, 0, Nearest) == []

def test_pairs():
    aim = np.array([1, 1, 0, 0])
    assert flipped(np.array([0, 1, 1, 1]), np.array([1, 1, 1, 0]), aim).tolist() == [True, False, False, True]
    assert consistency(np.array([True, True, False]), np.array([True, False, False])) == 1/3
    a, b = np.array([[1., 2.]]), np.array([[3., 1.]])
    assert pair_vectors(a, b).tolist() == [[1, 2, 3, 1, 2, 1, 3, 2]]
