"""Conformal and PAC sets: thresholds against mapie and Clopper-Pearson, holes against enumeration and an integer
program, bad input."""
import itertools, math, random
import numpy as np, pytest, torch
from functools import partial
from pathlib import Path
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.stats import binomtest
from conftest import ran
from slmkit.core.fit import collate, encode_seq2seq
from slmkit.core.settings import KitError
from slmkit.core.zoo import load_model
from slmkit.judge.conformal import (alike, class_thresholds, conformal, first_miss, options, pac, parse, path, resample,
    size,
    taken_away, with_holes, word_costs)
from slmkit.toyland.tasks import task

NB = Path(__file__).parents[1]/"nbs/judge/conformal_repro.ipynb"

@pytest.fixture(scope="module")
def programs(): return [r["label"].split() for r in task("programs", "train", 60, 0, steps=3)]
@pytest.fixture(scope="module")
def writer(): return load_model("t5-1m", seed=0)
def random_costs(words, rng): return [float(x) for x in rng.exponential(size=len(words) + 1)]

# ---- thresholds

@pytest.mark.parametrize("alpha,n", [(.1, 99), (.1, 312), (.2, 57), (.05, 40)])
def test_label_sets_are_mapies(alpha, n):
    mapie = pytest.importorskip("mapie.classification")
    from sklearn.base import BaseEstimator, ClassifierMixin
    class Given(ClassifierMixin, BaseEstimator):  # a classifier whose features are its probabilities
        def fit(self, X, y): return self
        def __sklearn_is_fitted__(self): return True
        def predict_proba(self, X): return X
        def predict(self, X): return X.argmax(1)
    rng = np.random.default_rng(n)
    p, y = rng.dirichlet(np.ones(5), size=2*n), rng.integers(5, size=2*n)
    y[:5] = range(5)
    given = Given()
    given.classes_ = np.arange(5)
    peer = mapie.SplitConformalClassifier(given, confidence_level=1 - alpha, conformity_score="lac", prefit=True)
    _, sets = peer.conformalize(p[:n], y[:n]).predict_set(p[n:])
    q = conformal(1 - p[np.arange(n), y[:n]], alpha)
    assert np.allclose(q, peer._mapie_classifier.conformity_score_function_.quantiles_)
    assert ((1 - p[n:] <= q) == sets[:, :, 0]).all() and 0 < sets.mean() < 1

@pytest.mark.parametrize("n,alpha,delta", [(22, .1, .1), (60, .1, .05), (312, .1, .1), (500, .05, .01), (30, .3, .2)])
def test_pac_allows_what_clopper_pearson_allows(n, alpha, delta):
    bound = lambda k: binomtest(k, n, alternative="less").proportion_ci(1 - delta, "exact").high
    allowed = max(k for k in range(n) if bound(k) <= alpha)
    assert pac(np.arange(n), alpha, delta) == n - 1 - allowed
    assert (np.arange(n) > pac(np.arange(n), alpha, delta)).sum() == allowed

def test_too_few_rows_promise_nothing():
    assert pac(np.arange(21), .1, .1) == np.inf and conformal(np.arange(8), .1) == np.inf

def test_coverage_over_many_draws_is_what_theory_says():
    world = np.random.default_rng(0).permutation(20_000)/20_000
    q, covers = resample(world, lambda s: conformal(s, .1), 99, 4000, 1)
    assert covers.mean() == pytest.approx(.9, abs=4*.03/4000**.5)          # 90 of 100 places
    assert covers.std() == pytest.approx(math.sqrt(.9*.1/101), rel=.05)    # Beta(90, 10)
    for n in (22, 312):
        _, covers = resample(world, lambda s: pac(s, .1, .1), n, 4000, 2)
        assert .9 - 4*.3/4000**.5 <= (covers >= .9).mean() <= .93
    thresholds, _ = resample(world, lambda s: pac(s, .1, .1), 312, 4000, 2)
    assert (covers[:50] == [(world <= t).mean() for t in thresholds[:50]]).all()

def test_every_class_keeps_the_promise_with_a_threshold_of_its_own():
    rng = np.random.default_rng(0)
    y = rng.integers(3, size=30_000)
    scores = rng.random(len(y))*(1 + y)**2  # the labels differ in how strange their rows are
    covered = lambda q: [(scores[y == j] <= q[j]).mean() for j in range(3)]
    q = class_thresholds(scores[:3000], y[:3000], 3, .1)
    assert covered(q) == pytest.approx([.9]*3, abs=.02)
    assert min(covered(np.full(3, conformal(scores[:3000], .1)))) < .8
    assert class_thresholds(scores[:3000], y[:3000], 4, .1)[3] == np.inf  # a label without rows is in every set

# ---- programs with holes

def places(node): return [node[0][0], *(x for k in node[1] for x in places(k))]
def below(node, hole):
    if node[0][0] == hole: return node
    return next((found for k in node[1] if (found := below(k, hole))), None)
def own(node): return [*node[0], *(i for k in node[1] for i in own(k))]

def test_tree_owns_every_word_once(programs):
    for words in programs:
        tree = parse(words)
        assert sorted(own(tree)) == list(range(len(words) + 1))
        assert with_holes(tree, [*words, ""], ()) == " ".join(words)
        assert with_holes(tree, [*words, ""], (len(words),)) == "??"

@pytest.mark.parametrize("words", ["( 3 - n", ") ) 3", "[ v ) for (", "", ", ,", "max"])
def test_what_is_no_program_is_a_tree_too(words):
    words = words.split()
    tree = parse(words)
    assert sorted(own(tree)) == list(range(len(words) + 1)) and with_holes(tree, [*words, ""], ()) == " ".join(words)
    assert path(words, [1.]*(len(words) + 1), ["3"], 3)[0][1:4] == (1., True, "??")

def test_options_are_those_of_enumeration(programs):
    rng = np.random.default_rng(0)
    for words in sorted(programs, key=len)[:25]:
        tree, cost = parse(words), random_costs(words, rng)
        best, spots = {}, {p: set(own(below(tree, p))) for p in places(tree)}
        for k in range(3):
            for holes in itertools.combinations(spots, k):
                if any(spots[a] & spots[b] for a, b in itertools.combinations(holes, 2)): continue
                gone = set().union(*(spots[h] for h in holes)) if holes else set()
                key = k, sum(size(below(tree, h)) for h in holes)
                nats = sum(c for i, c in enumerate(cost) if i not in gone)
                best[key] = min(best.get(key, (math.inf,)), (nats, holes))
        found = options(tree, cost, 2)
        assert found.keys() == best.keys() and all(found[k][0] == pytest.approx(best[k][0]) for k in best)
        assert all(set(found[k][1]) == set(best[k][1]) for k in best)

def test_path_is_the_integer_programs(programs):
    rng = np.random.default_rng(1)
    for words in programs[:12]:
        tree, cost = parse(words), random_costs(words, rng)
        spots = places(tree)
        n = len(spots)
        nodes = [below(tree, p) for p in spots]
        for tau in (.3*sum(cost), .7*sum(cost)):
            # one variable a node: it is a hole; a word is left unless its node or one above is a hole
            sizes, nats = np.array([size(x) for x in nodes]), np.array([sum(cost[i] for i in own(x)) for x in nodes])
            above = [[q for q, y in enumerate(nodes) if p in places(y)] for p in spots]  # with the node itself
            once = np.array([[q in a for q in range(n)] for a in above], float)
            rules = [LinearConstraint(once, ub=1), LinearConstraint(np.ones(n), ub=3),
                LinearConstraint(nats, lb=sum(cost) - tau)]
            peer = milp(sizes, constraints=rules, integrality=np.ones(n), bounds=Bounds(0, 1))
            ours = max((nats, share) for nats, share, *_ in path(words, cost, words, 3) if nats < tau)[1]
            assert round(ours*n) == round(peer.fun)

def test_a_set_holds_what_differs_only_under_a_hole(programs):
    rng = random.Random(0)
    for words in programs:
        tree, full = parse(words), [*words, ""]
        for hole in places(tree):
            assert alike(tree, tree, full, full, (hole,))
            i = rng.choice([i for i in range(len(words)) if words[i].isalnum()] or [0])
            other = [*words[:i], "7" if words[i] == "8" else "8", *words[i + 1:]]
            inside = i in own(below(tree, hole))
            if words[i].isdigit() or words[i] in "nmx" and words[i + 1:i + 2] != ["["]:
                assert alike(tree, parse(other), full, [*other, ""], (hole,)) == inside
        longer = "( 1 + 2 )".split()
        assert not alike(tree, parse(longer), full, [*longer, ""], ()) or words == longer

def test_a_hole_stands_for_any_program():
    said, right = "max ( n , m )".split(), "max ( n , ( x [ 0 ] * 2 ) )".split()
    holds = lambda hole: alike(parse(said), parse(right), [*said, ""], [*right, ""], (hole,))
    assert holds(4) and holds(0) and holds(6) and not holds(2)

def test_thresholds_cover_as_their_sets_do(programs):
    rng = np.random.default_rng(2)
    rights = [programs[(i + (i % 3 == 0)) % len(programs)] for i in range(len(programs))]
    rows = [path(w, random_costs(w, rng), r, 3) for w, r in zip(programs, rights)]
    scores, away = first_miss(rows), taken_away(rows)
    for q in sorted({*scores[np.isfinite(scores)], -.5, -3., -1e9}):
        chosen = [[p for p in row if p[0] < -q or p[0] == 0][-1] for row in rows]
        assert away(-q) == pytest.approx(np.mean([c[1] for c in chosen]))
        assert all(c[2] for c, s in zip(chosen, scores) if s <= q)  # what the score promises, the set keeps
    assert all(a[0] < b[0] and a[1] > b[1] for row in rows for a, b in itertools.pairwise(row))

# ---- what models give

def test_word_costs_add_up_to_the_loss(writer):
    model, tok = writer
    inputs, said = ["compute the sum of x .", "compute n ."], ["( 36 - 12 )", "sum ( x )"]
    costs = word_costs(model, tok, inputs, said)
    assert [len(c) for c in costs] == [6, 5]
    for i, s, c in zip(inputs, said, costs):
        batch = collate(encode_seq2seq(tok, [i], [s]), tok.pad_token_id)
        with torch.no_grad(): whole = model(**batch).loss.item()*batch["labels"].numel()
        assert c.sum() == pytest.approx(whole, rel=1e-4)

def test_words_that_are_no_tokens_are_refused(writer):
    model, tok = writer
    class Odd:
        pad_token_id = tok.pad_token_id
        def __call__(self, text, add_special_tokens=True, **kw):
            ids = tok(text, add_special_tokens=add_special_tokens, **kw)["input_ids"]
            return dict(input_ids=[[5, *i] for i in ids] if add_special_tokens else ids)
    with pytest.raises(KitError, match="don't fit the words"): word_costs(model, Odd(), ["compute n ."], ["n"])

# ---- the notebook

@pytest.fixture
def tiny(tmp_path):
    "A writer's random checkpoint with the zoo's tokenizer."
    from transformers import T5Config, T5ForConditionalGeneration
    _, t5 = load_model("t5-1m", seed=0)
    torch.manual_seed(0)
    shape = dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=t5.pad_token_id)
    T5ForConditionalGeneration(T5Config(vocab_size=len(t5), pad_token_id=t5.pad_token_id, eos_token_id=t5.eos_token_id,
            **shape)).save_pretrained(tmp_path/"t5")
    t5.save_pretrained(tmp_path/"t5")
    return str(tmp_path/"t5")

run = partial(ran, NB)

@pytest.mark.slow
def test_a_checkpoint_of_ones_own(tmp_path, torch_pool, tiny):
    found = run(tmp_path, torch_pool, profile="smoke", model=tiny)
    assert set(found) == {"hole-sets-keep-the-promise", "holes-take-less-away"}
    assert {r["n_rows"] for r in found.values()} == {40}
    assert all(math.isfinite(v) for r in found.values() for v in r["arms"].values())
    assert found["holes-take-less-away"]["model"] == tiny

@pytest.mark.slow
def test_same_seed_same_record(tmp_path, torch_pool):
    one, two = (run(tmp_path, torch_pool, name, profile="smoke", seed=3) for name in ("one", "two"))
    assert one == two and one
