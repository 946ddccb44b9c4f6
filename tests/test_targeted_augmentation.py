"Held-out judging beside a peer, the loop's rows, rivals at equal rows, variations and their drift, bad input."
from collections import Counter
import math
import numpy as np, pytest
from conftest import ROOT, Failed, the_record, the_same_twice
from slmkit.core.settings import KitError
from slmkit.core.zoo import load_model
from slmkit.synth.boundary_examples import Author, Pool, posterior
from slmkit.synth.targeted_augmentation import by_author, by_pool, held_out, llm2llm, rivals, taken, turns, varied

NB = ROOT/"nbs/synth/targeted_augmentation_repro.ipynb"

def spread(n, rng, noise=1.):
    "Rows of three classes, in turn."
    return [dict(vector=noise*rng.normal(size=3) + 1.2*np.eye(3)[i % 3], label=i % 3) for i in range(n)]

# ---- judging

def test_held_out_is_cross_validation():
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import PredefinedSplit, cross_val_predict
    rows, parts = spread(60, np.random.default_rng(0)), np.arange(60)//3 % 4
    x, y = np.array([r["vector"] for r in rows]), np.array([r["label"] for r in rows])
    for C in (.1, 30.):
        said = cross_val_predict(LogisticRegression(C=C, max_iter=3000), x, y, cv=PredefinedSplit(parts))
        assert held_out(rows, [], parts, C).tolist() == (said == y).tolist()

def test_a_row_is_judged_by_a_head_that_has_not_learned_it(monkeypatch):
    import slmkit.synth.targeted_augmentation as module
    seeds, written, learned = [dict(of=i) for i in range(14)], [dict(of=99)], []
    monkeypatch.setattr(module, "taught", lambda rows, C: learned.append(rows) or rows)
    def right(head, rows):
        assert not {r["of"] for r in rows} & {r["of"] for r in head} and written[0] in head
        return np.array([r["of"] % 5 > 0 for r in rows])
    monkeypatch.setattr(module, "right", right)
    parts = np.arange(14) % 4
    assert held_out(seeds, written, parts).tolist() == [i % 5 > 0 for i in range(14)] and len(learned) == 4
    assert sorted(r["of"] for rows in learned for r in rows if r["of"] < 99) == sorted([*range(14)]*3)

# ---- rounds

def test_rounds_write_one_row_for_each_wrong_seed_row_and_vary_no_other(monkeypatch):
    import slmkit.synth.targeted_augmentation as module
    seeds = [dict(of=i) for i in range(4)]  # seed row i needs i rows before it is right
    def judged(seeds, written, parts, C):
        assert all(r["copy"] for r in written)
        return np.array([sum(r["of"] == s["of"] for r in written) >= s["of"] for s in seeds])
    monkeypatch.setattr(module, "held_out", judged)
    variants = [[dict(of=i, copy=True, k=k) for k in range(4)] for i in range(4)]
    found = llm2llm(seeds, variants, 4, None)
    assert [f.tolist() for f in found] == [[1, 2, 3], [2, 3], [3], []]
    assert llm2llm(seeds, variants, 0, None) == []

def test_variants_are_taken_in_order_and_again_from_the_first():
    variants = [[f"{i}{k}" for k in range(2)] for i in range(3)]
    assert taken(variants, [1, 0, 1, 1]) == ["10", "00", "11", "10"] and taken(variants, []) == []

def test_rivals_write_as_many_rows_each_from_its_own_places():
    rng = np.random.default_rng(1)
    seeds = spread(30, rng)
    found = [np.array([0, 3, 4, 8]), np.array([3, 8]), np.array([3])]
    ways = rivals(seeds, found, rng)
    assert {len(places) for places in ways.values()} == {7}
    label = lambda places: Counter(seeds[i]["label"] for i in places)
    assert label(ways["same_classes"]) == label(ways["targeted"]) and set(ways["one_round"]) <= {0, 3, 4, 8}
    assert not set(ways["right_rows"][:4]) & {0, 3, 4, 8} and not set(ways["right_rows"][4:6]) & {3, 8}
    assert len(set(ways["uniform"])) == 7
    none = rivals(seeds, [np.zeros(0, int)], rng)
    assert all(len(places) == 0 for places in none.values())

def test_turns_come_to_each_equally_often():
    got = Counter(turns(np.array([2, 5, 9]), 8, np.random.default_rng(2)).tolist())
    assert set(got) == {2, 5, 9} and sorted(got.values()) == [2, 3, 3]
    with pytest.raises(KitError, match="no rows to take turns"): turns([], 3, np.random.default_rng(2))

# ---- the writers

def test_varied_rows_keep_their_label_and_drift_with_every_copy():
    author = Author([.3]*3, 5, 1., seed=10)
    rows, wrong = author.natural(600), []
    for _ in range(4):
        rows = [varied(author, r, .2) for r in rows]
        assert all(np.allclose(r["post"], posterior(author.chances, r["words"][None])[0]) for r in rows[:50])
        wrong.append(np.mean([r["label"] != r["post"].argmax() for r in rows]))
    assert 0 < wrong[0] < wrong[1] < wrong[3]
    same = varied(author, rows[0], keep=1.)
    assert (same["words"] == rows[0]["words"]).all() and same["label"] == rows[0]["label"]

def test_an_author_varies_each_seed_row_as_often():
    model, tok = load_model("bert-1m", "cpu", kind="encoder")
    author = Author([.3]*3, 5, seed=3)
    seeds = author.natural(5)
    variants = by_author(author, seeds, 3, model, tok)
    assert [len(v) for v in variants] == [3]*5
    assert all(r["label"] == s["label"] and len(r["vector"]) == 128 for s, v in zip(seeds, variants) for r in v)

def test_a_pool_gives_each_row_to_one_seed_row_nearest_first():
    rng = np.random.default_rng(4)
    rows = [r | dict(text=str(i)) for i, r in enumerate(spread(60, rng))]
    pool, seeds = Pool(rows, np.eye(3)[[r["label"] for r in rows]]), spread(6, rng)
    variants = by_pool(pool, seeds, 4)
    places = [r["place"] for v in variants for r in v]
    assert len(set(places)) == len(places) == 24
    assert all(r["label"] == s["label"] for s, v in zip(seeds, variants) for r in v)
    for s, v in zip(seeds, variants):
        near = [r["vector"] @ s["vector"] for r in v]
        assert near == sorted(near, reverse=True)
    best = max((r for r in rows if r["label"] == 0), key=lambda r: r["vector"] @ seeds[0]["vector"])
    assert variants[0][0]["text"] == best["text"]
    with pytest.raises(KitError, match="too few rows of a class"):
        by_pool(Pool([r for r in rows if r["label"]], np.eye(3)[[r["label"] for r in rows if r["label"]]]), seeds, 1)

# ---- the notebooks

@pytest.mark.slow
def test_same_seed_same_record(tmp_path, torch_pool):
    the_same_twice(NB, tmp_path, torch_pool)

@pytest.mark.slow
def test_a_labelled_set_is_the_pool_and_one_that_is_too_small_is_one_line(tmp_path, torch_pool):
    nb = ROOT/"nbs/synth/targeted_augmentation_repro_trec.ipynb"
    found = the_record(nb, tmp_path, torch_pool, profile="smoke", seed=3)
    assert all(map(math.isfinite, found["arms"].values())) and found["arms"]["written"] > 0
    with pytest.raises(Failed, match="too few rows of a class"):
        the_record(nb, tmp_path, torch_pool, "many", profile="smoke", n=199)
