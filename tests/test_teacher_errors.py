"""The matrix of errors by a peer and by counting, its limit by simulation, habits and slips of equal rate, crossings,
heads chosen on their own labels, what is left to minorities, bad input."""
import numpy as np, pytest
from slmkit.synth.boundary_examples import Author, at_random, posterior, shots, taught
from slmkit.synth.teacher_errors import (
    augmented, bag, by_matrix, in_the_limit, inherited, labels_needed, minority, misread, nats, one_person, read, skew,
    student, transition)

NEAR = [.05, .3, .45]
labels = lambda rows: np.array([r["label"] for r in rows])

@pytest.fixture(scope="module")
def author(): return Author(NEAR, seed=3)

@pytest.fixture(scope="module")
def pool(author): return author.natural(600)

def test_transition_is_scikit_learns_confusion_matrix():
    metrics, rng = pytest.importorskip("sklearn.metrics"), np.random.default_rng(0)
    for _ in range(20):
        truth, said = rng.integers(4, size=(2, 50))
        peer = metrics.confusion_matrix(truth, said, labels=range(4), normalize="true")
        assert np.allclose(transition(truth, said, 4), peer)

def test_limit_is_the_most_frequent_label_of_many():
    rng = np.random.default_rng(1)
    post, T = rng.dirichlet(np.ones(3), 8), rng.dirichlet(np.ones(3), 3)
    for p, answer in zip(post, in_the_limit(post, T)):
        truth = rng.choice(3, 20000, p=p)
        said = np.array([rng.choice(3, p=T[c]) for c in truth])
        share = np.bincount(said, minlength=3)/len(said)
        assert share[answer] > share.max() - .02

def test_uniform_noise_does_no_harm_below_one_less_one_over_k():
    for K in (2, 3, 6):
        for rate, unharmed in ((1 - 1/K - .02, True), (1 - 1/K + .02, False)):
            T = np.full((K, K), rate/(K - 1))
            np.fill_diagonal(T, 1 - rate)
            assert (in_the_limit(np.eye(K), T) == np.arange(K)).all() == unharmed

def test_a_habit_is_of_the_rate_asked_for_and_depends_on_the_text(author, pool):
    believed = misread(author.chances, pool, .25, np.random.default_rng(0))
    assert np.allclose(believed.sum(1), 1)
    habit = read(pool, believed)
    rate = (labels(habit) != labels(pool)).mean()
    assert .25 <= rate < .33 and labels(habit).tolist() == labels(read(pool, believed)).tolist()
    assert (labels(at_random(pool, habit, 0)) != labels(pool)).mean() == rate
    perfect = misread(author.chances, pool, 0, np.random.default_rng(0))
    assert np.allclose(perfect, author.chances) and labels(read(pool, perfect)).tolist() == labels(pool).tolist()

def test_by_matrix_draws_the_matrix():
    rows, T = [dict(label=i % 2) for i in range(8000)], np.array([[.8, .2], [.3, .7]])
    drawn = by_matrix(rows, T, np.random.default_rng(0))
    assert np.allclose(transition(labels(rows), labels(drawn), 2), T, atol=.03)

def test_inherited_counts_the_teachers_errors_only():
    truth, teacher = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    assert inherited(teacher, teacher, truth) == 1 and inherited(truth, teacher, truth) == 0
    assert inherited(np.array([1, 1, 1, 1]), teacher, truth) == .5 and np.isnan(inherited(truth, truth, truth))

def test_crossings_are_those_of_interpolation():
    sizes, curve = [10, 30, 90, 270], [.2, .4, .5, .8]
    for goal in (.25, .41, .5, .75):
        assert labels_needed(sizes, curve, goal) == pytest.approx(np.exp(np.interp(goal, curve, np.log(sizes))))
    assert labels_needed(sizes, curve, .1) == 10 and labels_needed(sizes, curve, .9) == np.inf

def test_a_student_takes_the_penalty_at_which_held_out_labels_are_likeliest(author):
    rows = bag(author.natural(120), author.chances.shape[1])
    part = np.random.default_rng(0).permutation(120) % 3
    pick = lambda keep: [r for r, k in zip(rows, keep) if k]
    score = lambda C: sum(nats(taught(pick(part != f), C), pick(part == f)) for f in range(3))
    best = max((1, 100), key=score)
    assert np.allclose(student(rows, (1, 100)).coef_, taught(rows, best).coef_)

def test_a_label_that_a_head_never_saw_costs_a_fixed_amount(author):
    rows = bag(author.natural(60), author.chances.shape[1])
    head = taught([r for r in rows if r["label"] != 2])
    assert nats(head, [r for r in rows if r["label"] == 2]) == pytest.approx(np.log(1e-6))

def test_people_and_minorities(author):
    rows = author.natural(1200)*4
    post = np.array([r["post"] for r in rows])
    drawn = labels(one_person(rows, np.random.default_rng(0)))
    assert (drawn != post.argmax(-1)).mean() == pytest.approx(minority(post, post), abs=.01)
    assert minority(np.eye(6)[post.argmax(-1)], post) == 0
    assert skew(np.array([0, 0, 0, 0]), np.array([0, 1, 2, 0])) == .5 and skew(drawn, drawn) == 0

def test_written_rows_keep_labels_and_words(author, pool):
    few = shots(pool, 2)
    believed = misread(author.chances, pool, .25, np.random.default_rng(0))
    chances = author.chances.copy()
    for beliefs in (believed, None):
        rows = augmented(author, few, 240, beliefs)
        kept = np.mean([(r["words"] == few[i % len(few)]["words"]).mean() for i, r in enumerate(rows)])
        assert labels(rows).tolist() == [few[i % len(few)]["label"] for i in range(240)] and kept > .45
    assert (author.chances == chances).all()  # the author stays as it was
