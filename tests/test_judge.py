"The judge on simulated records with known truth: 2,000 experiments at ten and at twenty seeds, and every outcome in its order."
import numpy as np
import pytest
from slmkit.core.judge import LEVELS, interval, judge, prediction, verdict
from slmkit.core.settings import KitError

EXPERIMENTS = 2000
EFFECT = dict(kind="effect", least=0, control="c", settles=dict(cpu="yes"))
DRAWS = dict(  # mean zero, standard deviation one
    normal=lambda rng, n: rng.normal(0, 1, (EXPERIMENTS, n)),
    exponential=lambda rng, n: rng.exponential(1, (EXPERIMENTS, n)) - 1,
    lognormal=lambda rng, n: (rng.lognormal(0, 1, (EXPERIMENTS, n)) - np.exp(.5))/np.sqrt((np.e - 1)*np.e))


def covered(x, truth, level):
    _, low, high = interval(x, level)
    return float(np.mean((low <= truth) & (truth <= high)))


def outcomes(x, spec=EFFECT, control=-9.):
    return [judge(spec, row, np.full(len(row), control), "cpu").outcome for row in x]


def holds(x): return outcomes(x).count("holds here")/len(x)


@pytest.mark.parametrize("n", [10, 20])
def test_coverage_of_normal_differences(n):
    x = DRAWS["normal"](np.random.default_rng(n), n) + .7
    assert abs(covered(x, .7, LEVELS[n]) - LEVELS[n]) < .015


@pytest.mark.parametrize("n", [10, 20])
def test_false_holds_without_any_effect(n):
    nominal = (1 - LEVELS[n])/2
    share = holds(DRAWS["normal"](np.random.default_rng(100 + n), n))
    assert abs(share - nominal) < 2*(nominal*(1 - nominal)/EXPERIMENTS)**.5


def test_false_holds_with_the_one_extension():
    "1.5 % at ten and 1 % at twenty: together never more than 2.5 %."
    x = DRAWS["normal"](np.random.default_rng(7), 20)
    first = outcomes(x[:, :10])
    again = outcomes(x[[i for i, o in enumerate(first) if o == "inconclusive"]])
    share = (first.count("holds here") + again.count("holds here"))/EXPERIMENTS
    assert .005 < share < .025 + 2*(.025*.975/EXPERIMENTS)**.5


def test_false_not_reproduced_at_the_least_effect():
    x = DRAWS["normal"](np.random.default_rng(8), 10) + 1.
    share = outcomes(x, EFFECT | dict(least=1.)).count("not reproduced here")/EXPERIMENTS
    assert abs(share - .015) < 2*(.015*.985/EXPERIMENTS)**.5


def test_a_true_effect_is_found():
    x = DRAWS["normal"](np.random.default_rng(9), 10) + 3.
    assert holds(x) > .99


@pytest.mark.parametrize("draw", ["exponential", "lognormal"])
def test_skewed_differences_are_only_reported(draw, capsys):
    "No bound: skewness costs coverage, and the note says how much."
    got = {n: covered(DRAWS[draw](np.random.default_rng(n), n), 0, LEVELS[n]) for n in LEVELS}
    with capsys.disabled(): print(f"\n{draw}: coverage {got[10]:.3f} (97 %, n=10), {got[20]:.3f} (98 %, n=20)")
    assert all(0 < c < 1 for c in got.values())


def test_one_more_run_falls_into_the_prediction_interval():
    rng = np.random.default_rng(3)
    low, high = prediction(rng.normal(0, 1, (20000, 10)))
    one = rng.normal(0, 1, 20000)
    assert abs(np.mean((low <= one) & (one <= high)) - .95) < .005


# every outcome, in the design's order

TEN = [.03, .05, .01, .04, .02, .06, .03, .02, .05, .04]  # mean .035, 97 % interval .022 to .048
REAL = dict(kind="effect", least=.02, control="c", settles=dict(cpu="partly", gpu="yes", paper="yes"))


@pytest.mark.parametrize("outcome, change, values, control, profile", [
    ("never run", {}, [], 0, "cpu"),
    ("mechanics only", {}, TEN, 0, "smoke"),
    ("mechanics only", dict(settles={}), TEN, 0, "cpu"),
    ("inconclusive", dict(least=.04), TEN, 0, "cpu"),
    ("inconclusive", {}, [v - .03 for v in TEN[:9]] + [.3], 0, "cpu"),
    ("not reproduced here", dict(least=.06), TEN, 0, "cpu"),
    ("not reproduced here", {}, [v - .05 for v in TEN], 0, "cpu"),
    ("confounded", {}, TEN, .0175, "cpu"),
    ("confounded", dict(paper=dict(value=.035, comparable=["paper"]), band=.05), TEN, .02, "paper"),
    ("holds here", {}, TEN, .0174, "cpu"),
    ("reproduced", dict(paper=dict(value=.035, comparable=["paper"]), band=.02), TEN, 0, "paper"),
    ("holds here", dict(paper=dict(value=.035, comparable=["paper"]), band=.02), TEN, 0, "gpu"),
    ("holds here", dict(paper=dict(value=.035, comparable=["paper"]), band=.01), TEN, 0, "paper"),
    ("holds here", dict(paper=dict(value=.035, comparable=["paper"]), band=None), TEN, 0, "paper"),
])
def test_outcomes_of_an_effect(outcome, change, values, control, profile):
    v = judge(REAL | change, values, [control]*len(values), profile)
    assert v.outcome == outcome and v.reason and "\n" not in v.reason


@pytest.mark.parametrize("outcome, spec, values", [
    ("holds here", dict(kind="equality"), [0.]*10),
    ("not reproduced here", dict(kind="equality"), [0.]*9 + [1e-12]),
    ("holds here", dict(kind="equality", tolerance=1e-6, nominal=2.), [2 + 1e-7]*10),
    ("holds here", dict(kind="coverage", nominal=.9, tolerance=.03), [.89, .91]*5),
    ("not reproduced here", dict(kind="coverage", nominal=.9, tolerance=.03), [.79, .81]*5),
    ("inconclusive", dict(kind="coverage", nominal=.9, tolerance=.03), [.80, .99]*5),
    ("holds here", dict(kind="cost"), [1.9, 2.1]*5),
    ("not reproduced here", dict(kind="cost"), [.4, .5]*5),
    ("inconclusive", dict(kind="cost"), [.5, 2.]*5),
    ("not reproduced here", dict(kind="cost", least=3), [1.9, 2.1]*5),
])
def test_outcomes_of_the_other_kinds(outcome, spec, values):
    assert judge(spec | dict(settles=dict(cpu="yes")), values).outcome == outcome


def test_a_cost_is_averaged_as_a_ratio():
    assert judge(dict(kind="cost", settles=dict(cpu="yes")), [.5, 2.]*5).mean == pytest.approx(1)


def test_stale_is_only_a_flag():
    a, b = judge(REAL, TEN, [0]*10, stale=True), judge(REAL, TEN, [0]*10)
    assert a.stale and not b.stale and a.outcome == b.outcome and a.mean == b.mean


# bad input: one clear line that names notebook and claim, and no verdict

def records(values=TEN, first=100, **change):
    one = lambda v: dict(value=v, control=0., spec=REAL)
    base = dict(technique="distill/idea", profile="cpu", hashes=dict(code="c", model="m", data="d"), status="ok")
    return [base | dict(seed=first + i, claims=dict(helps=one(v))) | change for i, v in enumerate(values)]


def broken(**at): # the ninth record is spoiled
    rs = records(); rs[8] = rs[8] | at
    return rs


@pytest.mark.parametrize("bad, said", [
    (records(TEN[:9]), "too few"),
    (records(TEN + TEN[:4]), "too few"),
    (records(first=0), "no confirm seed"),
    (records()[:9] + [records()[3]], "more than once"),
    (records(TEN[:9] + [float("nan")]), "is nan"),
    (records(TEN[:9] + [float("inf")]), "is inf"),
    (records(TEN[:9] + [None]), "never recorded"),
    (broken(claims={}), "never recorded at seed 108"),
    (broken(status="failed"), "seed 108 failed"),
    (broken(hashes=dict(code="other", model="m", data="d")), "different code"),
    (broken(hashes=dict(code="c", model="other", data="d")), "different model"),
    (broken(hashes=dict(code="c", model="m")), "lacks its data hash"),
    (broken(hashes=dict(code="", model="m", data="d")), "lacks its code hash"),
    (broken(hashes=None), "code and model and data hash"),
    (broken(profile="gpu"), "different profiles"),
    (broken(claims=dict(helps=dict(value=.1, control=None, spec=REAL))), "control 9 of 10 was never recorded"),
    (broken(claims=dict(helps=dict(value=.1, control=0., spec=REAL | dict(least=.01)))), "declared differently"),
    ([r | dict(claims=dict(helps=dict(value=.1, control=None, spec=REAL))) for r in records()], "no control was recorded"),
    ([r | dict(claims=dict(helps=dict(value=.1, control=0., spec=REAL | dict(control=None)))) for r in records()], "needs control="),
    ([r | dict(claims=dict(helps=dict(value=.1, spec={}))) for r in records()], "no kind None"),
])
def test_bad_input_gives_one_line_and_no_verdict(bad, said):
    with pytest.raises(KitError) as e: verdict("helps", bad)
    line = str(e.value)
    assert said in line and line.startswith("distill/idea: claim 'helps': ") and "\n" not in line


def test_a_ratio_must_be_above_zero():
    with pytest.raises(KitError, match="ratio above 0"): judge(dict(kind="cost", settles=dict(cpu="yes")), [1.]*9 + [0.])
