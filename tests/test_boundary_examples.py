"""Bayes' rule by counting every text and by a peer, requests, how often borderline labels are wrong exactly, the pool,
students, bad input."""
import itertools, math
import numpy as np, pytest, torch
from conftest import ROOT, Failed, the_record, the_same_twice
from scipy.stats import binom, norm
from slmkit.core.settings import KitError
from slmkit.core.zoo import load_model
from slmkit.synth.boundary_examples import (
    NAMES, WORDS, Author, Pool, any_class, at_random, embedded, fine_tuned, hits,
    mix, nearest_free, one_class, posterior, relabelled, right, shots, taught, two_classes, word_chances, wrong)

NB = ROOT/"nbs/synth/boundary_examples_repro.ipynb"

@pytest.fixture(scope="module")
def bert(): return load_model("bert-1m", "cpu", kind="classifier", num_labels=len(NAMES))

# ---- Bayes' rule

def test_posterior_is_bayes_rule_over_every_text_there_is():
    chances = np.random.default_rng(0).dirichlet(np.ones(4), 3)
    texts = np.array(list(itertools.product(range(4), repeat=3)))
    got = posterior(chances, texts)
    for text, p in zip(texts, got):
        joint = [math.prod(chances[c, w] for w in text)/3 for c in range(3)]
        assert np.allclose(p, [j/sum(joint) for j in joint], atol=1e-12)
    common = np.array([np.mean([math.prod(c[w] for w in t) for c in chances]) for t in texts])
    # what is believed on average is the prior
    assert common.sum() == pytest.approx(1, abs=1e-12) and np.allclose(common @ got, 1/3, atol=1e-12)

def test_posterior_is_a_multinomial_naive_bayes_with_these_chances():
    nb = pytest.importorskip("sklearn.naive_bayes")
    chances = word_chances(np.random.default_rng(1), [.1, .3, .45])
    texts = np.random.default_rng(2).integers(len(WORDS), size=(50, 9))
    peer = nb.MultinomialNB().fit(np.eye(len(WORDS))[:6], np.arange(6))
    peer.feature_log_prob_, peer.class_log_prior_ = np.log(chances), np.log(np.full(6, 1/6))
    counts = np.stack([np.bincount(t, minlength=len(WORDS)) for t in texts])
    assert np.allclose(posterior(chances, texts), peer.predict_proba(counts), atol=1e-10)

def test_authors_have_chances_and_related_topics():
    chances = word_chances(np.random.default_rng(3), [.1, .3, .45])
    assert chances.shape == (6, 72) and np.allclose(chances.sum(1), 1) and (chances > 0).all()
    share = chances.reshape(6, 6, 12).sum(-1)
    assert np.allclose(np.sort(share, 1)[:, :4], .025) and np.allclose(share, share.T)
    assert sorted(np.round(np.diag(share), 9)) == [.45, .45, .6, .6, .8, .8]

def test_natural_rows_speak_for_each_topic_as_often_as_the_posterior_says():
    a = Author([.3]*3, 3, seed=4)
    labels = np.arange(12_000) % 6
    rows = a.rows(a.chances[labels], labels)
    post = np.array([r["post"] for r in rows])
    truth = np.eye(6)[labels]
    for low in np.arange(0, 1, .1):
        here = (post >= low) & (post < low + .1)
        assert abs(truth[here].mean() - post[here].mean()) < 4.5*math.sqrt(.25/here.sum())

# ---- requests

def test_requests_are_shares_of_the_class_asked_for_and_one_other():
    labels, rng = np.arange(6000) % 4, np.random.default_rng(5)
    shares = two_classes(labels, 4, rng)
    assert np.allclose(shares.sum(1), 1) and ((shares > 0).sum(1) <= 2).all()
    alpha = shares[np.arange(6000), labels]
    assert (alpha >= .5).all() and abs(alpha.mean() - (.5 + .5*5/7)) < .005       # .5 + .5·Beta(5, 2)
    assert abs(two_classes(labels, 4, rng, (2, 5))[np.arange(6000), labels].mean() - (.5 + .5*2/7)) < .005
    others = np.where(np.eye(4, dtype=bool)[labels], 0, shares) > 0
    assert abs(others[labels == 0].mean(0)[1:] - 1/3).max() < .05                 # each other class as often
    spread = any_class(labels, 4, rng)
    assert np.allclose(spread.sum(1), 1) and (spread > 0).all() and (spread.argmax(1) == labels).all()
    assert np.array_equal(one_class(labels, 4, rng), np.eye(4)[labels])
    assert np.allclose(mix(np.array([0]), np.array([2]), np.array([.6]), 3), [[.6, 0, .4]])

def exactly_wrong(author, alpha):
    "Share of rows of two words whose label is not the likeliest class: every text, every pair of classes."
    texts = np.array(list(itertools.product(range(len(WORDS)), repeat=2)))
    best, total = posterior(author.chances, texts).argmax(1), 0.
    for a, b in itertools.permutations(range(6), 2):
        p = alpha*author.asked[a] + (1 - alpha)*author.asked[b]
        total += (p[texts].prod(1)*(best != a)).sum()/30
    return total

@pytest.mark.parametrize("typical", [1., 2.])
def test_borderline_labels_are_wrong_as_often_as_counting_every_text_says(typical):
    author = Author([.3]*3, 2, typical, seed=5)
    want, n = exactly_wrong(author, .7), 12_000
    labels = np.arange(n) % 6
    others = (labels + author.rng.integers(1, 6, n)) % 6
    rows = author.write(mix(labels, others, np.full(n, .7), 6), labels)
    low, high = binom.ppf([1e-5, 1 - 1e-5], n, want)
    assert low <= wrong(rows)*n <= high and .05 < want < .6
    assert wrong(author.write(one_class(labels, 6, None), labels)) < wrong(rows)
    assert wrong(relabelled(rows)[:500]) == 0

# ---- labels

def test_a_doubting_teacher_errs_as_two_normal_errors_do():
    p, doubt, n = .8, 1.5, 20_000
    rows = [dict(post=np.array([p, 1 - p]), label=0)]*n
    low, high = binom.ppf([1e-5, 1 - 1e-5], n, norm.cdf(-math.log(p/(1 - p))/(doubt*math.sqrt(2))))
    assert low <= sum(r["label"] for r in relabelled(rows, doubt, 7)) <= high
    assert wrong([dict(post=np.array([1., 0]), label=l) for l in (0, 1, 1, 0)]) == .5

def test_the_control_changes_as_many_labels_to_other_classes():
    author, labels = Author([.3]*3, 4, seed=6), np.arange(300) % 6
    rows = author.write(two_classes(labels, 6, author.rng, (2, 5)), labels)
    looked = relabelled(rows)
    changed = at_random(rows, looked, 8)
    many = sum(a["label"] != b["label"] for a, b in zip(rows, looked))
    assert many > 30 and sum(a["label"] != b["label"] for a, b in zip(rows, changed)) == many
    assert all(0 <= r["label"] < 6 for r in changed) and [r["text"] for r in changed] == [r["text"] for r in rows]
    told = lambda rows: [r["label"] for r in rows]
    assert told(changed) == told(at_random(rows, looked, 8)) != told(at_random(rows, looked, 9))

# ---- the pool

def test_the_pool_gives_what_is_nearest_and_no_row_twice():
    rng = np.random.default_rng(7)
    have, wanted = rng.dirichlet(np.ones(3), 40), rng.dirichlet(np.ones(3), 25)
    got = nearest_free(wanted, have)
    assert len(set(got)) == 25
    for k, w in enumerate(wanted):
        free = [i for i in range(40) if i not in got[:k]]
        assert got[k] == min(free, key=lambda i: ((have[i] - w)**2).sum())

def test_a_pool_hands_out_rows_under_the_labels_asked_for_and_knows_what_they_are():
    rows = [dict(text=str(i), label=i % 2, vector=[0.]) for i in range(40)]
    p = np.random.default_rng(8).dirichlet(np.ones(2), 40)
    pool = Pool(rows, p, 1)
    labels = np.arange(10) % 2
    given = pool.write(one_class(labels, 2, None), labels)
    assert [r["label"] for r in given] == labels.tolist() and len({r["place"] for r in given}) == 10
    assert [r["label"] for r in relabelled(given)] == [int(r["text"]) % 2 for r in given]
    assert all(r["label"] == int(r["text"]) % 2 for r in pool.natural(20))
    with pytest.raises(KitError, match="a pool of 40 rows can't give 21"): pool.natural(21)
    assert [r["place"] for r in Pool(rows, p, 1).natural(5)] == [r["place"] for r in Pool(rows, p, 1).natural(5)]

# ---- students

def test_shots_are_the_first_of_each_label():
    rows = [dict(label=l, i=i) for i, l in enumerate([0, 0, 1, 0, 1, 1, 2])]
    assert [r["i"] for r in shots(rows, 2)] == [0, 1, 2, 4, 6]

def test_rows_are_told_in_words_of_the_zoo(bert):
    tok = bert[1]
    rows = Author([.3]*3, 5, seed=11).natural(12)
    ids = [tok(r["text"])["input_ids"] for r in rows]
    assert all(tok.unk_token_id not in i for i in ids)
    assert all(WORDS[w] in r["text"].split() for r in rows for w in r["words"])

def test_a_linear_head_learns_and_an_embedding_is_of_length_one():
    encoder, tok = load_model("bert-1m", "cpu", kind="encoder")
    author = Author([.05]*3, 5, seed=12)
    rows, test = embedded(author.natural(90), encoder, tok), embedded(author.natural(200), encoder, tok)
    assert all(abs(np.linalg.norm(r["vector"]) - 1) < 1e-5 for r in rows)
    turned = [r | dict(label=(r["label"] + 1) % 6) for r in rows]
    assert right(taught(rows), test).mean() > .9 and right(taught(turned), test).mean() < .1

def test_fine_tuned_students_start_alike_and_learn(bert):
    base, tok = bert
    before = [p.clone() for p in base.parameters()]
    rows = Author([.3]*3, 5, seed=12).natural(48)
    one, two = (fine_tuned(base, tok, rows, .01, 30, 0) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), before))
    assert hits(one, tok, rows).mean() > .9 > hits(base, tok, rows).mean()

# ---- the notebooks

@pytest.mark.slow
def test_same_seed_same_record(tmp_path, torch_pool):
    the_same_twice(NB, tmp_path, torch_pool)

@pytest.mark.slow
def test_a_labelled_set_is_the_pool_and_asking_for_too_much_is_one_line(tmp_path, torch_pool):
    nb = ROOT/"nbs/synth/boundary_examples_repro_trec.ipynb"
    found = the_record(nb, tmp_path, torch_pool, profile="smoke", seed=3)
    assert all(map(math.isfinite, found["arms"].values())) and found["arms"]["wrong_own_labels"] > 0
    with pytest.raises(Failed, match="a pool of [0-9]+ rows can't give 90"):
        the_record(nb, tmp_path, torch_pool, "many", profile="smoke", n=90)
