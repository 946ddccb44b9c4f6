"Tune or prompt: crossings, balanced accuracy as in scikit-learn, choosing among a set's own labels."

import random
import numpy as np
from sklearn.metrics import balanced_accuracy_score
from slmkit.adapt import tune_or_prompt as t

def test_crossing_is_where_the_interpolated_line_meets_the_prompt():
    sizes, tuned = [8, 16, 64, 256], [.3, .5, .6, .9]
    for asked in (.35, .5, .55, .75, .9):
        n = t.crossing(sizes, tuned, asked)
        assert abs(np.interp(np.log(n), np.log(sizes), tuned) - asked) < 1e-9
    assert t.crossing(sizes, tuned, .2) == 8 and t.crossing(sizes, tuned, .95) == float("inf")

def test_balanced_accuracy_as_in_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(20):
        gold, said = rng.choice(4, 60, p=[.6, .2, .15, .05]), rng.choice(4, 60)
        if set(said) <= set(gold):
            assert np.isclose(t.balanced_accuracy(gold == said, gold), balanced_accuracy_score(gold, said))

def test_only_allowed_classes_are_chosen():
    p = np.random.default_rng(1).dirichlet(np.ones(5), size=50)
    said = t.choose_among(p, list("abcde"), "bd")
    assert set(said) <= set("bd") and said == [("b", "d")[int(r[3] > r[1])] for r in p]

def points(label, where, n, rng):
    return [dict(label=label, vector=rng.normal(where, .1)) for _ in range(n)]

def test_one_head_for_all_is_right_where_tasks_lie_apart():
    rng = np.random.default_rng(2)
    draw = lambda: dict(a=points("x", [5, 0, 0], 9, rng) + points("y", [0, 5, 0], 9, rng),
                        b=points("x", [0, 0, 5], 9, rng) + points("z", [5, 5, 0], 9, rng))
    train, test = draw(), draw()
    assert all(right.all() for right in t.joint_right(train, test).values())
    assert all(t.head_right(train[name], test[name]).all() for name in "ab")

def test_dealt_labels_keep_their_counts_and_their_vectors():
    rows = [dict(label=i % 3, vector=i) for i in range(30)]
    other = t.dealt(rows, random.Random(0))
    assert sorted(r["label"] for r in other) == sorted(r["label"] for r in rows)
    assert [r["vector"] for r in other] == list(range(30)) and other != rows

def test_training_rows_begin_with_the_demonstrations(tmp_path, monkeypatch):
    demos = [dict(input=f"d{i}", label="x") for i in range(4)]
    monkeypatch.setattr(t, "draws", lambda name: [([], demos)]*10)
    monkeypatch.setattr(t, "load", lambda name, split: demos + [dict(input=f"r{i}", label="y") for i in range(40)])
    _, _, train = t.parts("any", 3, 20)
    assert train[:4] == demos and len(train) == 20 == len({r["input"] for r in train})
