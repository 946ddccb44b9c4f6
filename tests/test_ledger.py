"The ledger, claims and the field map: what is kept and refused, and that published figures follow from records."
import json
from pathlib import Path
import pytest
from slmkit.core import claims as core
from slmkit.core.claims import claim, entries, expect, figure, read_entry
from slmkit.core.judge import OUTCOMES
from slmkit.core.settings import KitError, current, hardware
from slmkit.cli.main import main
from slmkit.project.registry import field_rows, import_works, known_from, registry, search, served
from slmkit.verdicts.attest import attest, attest_one, fingerprint, planned, reattest, rerun_all, smoke_run
from slmkit.verdicts import confirm as confirming
from slmkit.verdicts.confirm import Job, confirm
from slmkit.verdicts.external import add
from slmkit.verdicts.entry import dump, file_of, records_of
from slmkit.verdicts.ledger import check_ledger, copy_reasons, evaluate, problems, publish, unexplained
from slmkit.verdicts import table
from slmkit.verdicts.table import rows

ROOT = Path(__file__).parents[1]
PAPER = dict(value=.04, setting="T5", provenance="memory", comparable=[])
SPEC = dict(work=None, says="x beats y.", paper=PAPER, kind="effect", metric="gain", least=.02, was=None, margin=None,
            tolerance=None, nominal=None, draws=False, mean_over_rows=True, scale=None, stands="variant",
            value="lambda a: a['x'] - a['y']", control="lambda a: a['z'] - a['y']")
SHARED = dict(profile="cpu", model="t5-1m", data="facts", commit="abc", date="2026-01-01", versions=dict(torch="2.13"),
              hardware="cpu-x-1t-torch2.13", seconds=3., cpu_seconds=2.9, peak_mb=500., stacked=False, status="ok",
              error=None, notebook="x.ipynb")


def record(seed, gain=.05, spread=.01, code="c1", technique="distill/made_up", **change):
    y, v = .5, gain + spread*((seed*7) % 10 - 4.5)/3
    arms = dict(x=y + v, y=y, z=y)
    one = dict(value=arms["x"] - y, control=0., arms=arms, rows="ab"*8, n_rows=1000, spec=SPEC)
    return SHARED | dict(technique=technique, seed=seed, parameters=dict(seed=seed, alpha=.5), claims=dict(helps=one),
                         hashes=dict(code=code, model="m", data="d")) | change


def ten(**kw): return [record(s, **kw) for s in range(100, 110)]
def unsure(n=20): return [record(s, gain=.02, spread=.04) for s in range(100, 100 + n)]
def load(p): return read_entry(p)
def save(p, e): Path(p).write_text(dump(e), encoding="utf-8")


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    "A ledger of the test's own in place of the shipped one."
    monkeypatch.setenv("SLMKIT_LEDGER", str(tmp_path/"ledger"))
    return tmp_path/"ledger"


# publishing

def test_a_published_entry_follows_from_its_records(shipped):
    path = publish(ten(), "slmkit confirm distill/made_up")
    e = load(path)
    assert path.parent == shipped/"distill" and path == file_of(e) and check_ledger() == []
    assert e["command"] == "slmkit confirm distill/made_up" and len(e["attempts"]) == 1
    assert e["claims"]["helps"]["verdict"]["outcome"] == "holds" and path.stat().st_size < 8000
    assert [r["seed"] for r in records_of(e)] == list(range(100, 110))


def test_attempts_are_counted_and_never_reset(shipped):
    for i, code in enumerate(["c1", "c2", "c3"], 1):
        path = publish(ten(code=code), "confirm")
        assert [a["code"] for a in load(path)["attempts"]] == ["c1", "c2", "c3"][:i]


def test_attempts_on_another_task_are_carried_by_was(shipped):
    publish(ten(), "confirm")
    def moved(spec): return [record(s, code="c2", data="other") | dict(claims=dict(
        helps=record(s)["claims"]["helps"] | dict(spec=spec))) for s in range(100, 110)]
    e = load(publish(moved(SPEC | dict(was="helps")), "confirm"))
    assert e["claims"]["helps"]["verdict"]["attempts"] == 2 and len(e["attempts"]) == 2 and check_ledger() == []


def test_the_same_code_is_judged_once(shipped):
    path = publish(ten(), "confirm"); before = path.read_text(encoding="utf-8")
    with pytest.raises(KitError, match="already ran for this code"): publish(ten(gain=.09), "again")
    assert path.read_text(encoding="utf-8") == before


def test_one_extension_and_only_after_open(shipped):
    rs = unsure()
    path = publish(rs[:10], "confirm")
    assert load(path)["claims"]["helps"]["verdict"]["outcome"] == "open"
    publish(rs[10:], "extended"); e = load(path)
    assert e["claims"]["helps"]["verdict"]["n"] == 20 and e["claims"]["helps"]["verdict"]["level"] == .98
    assert [a["seeds"] for a in e["attempts"]] == ["100-109", "100-119"] and check_ledger() == []
    with pytest.raises(KitError, match="already ran"): publish([record(s) for s in range(110, 120)], "once more")


def test_no_extension_after_a_verdict(shipped):
    publish(ten(), "confirm")
    further = [record(s) for s in range(110, 120)]
    with pytest.raises(KitError, match="only where 100-109 left a claim open"): publish(further, "extended")


def test_a_verdict_at_ten_is_not_rolled_again_by_another_claims_extension(shipped):
    both = lambda s: record(s, gain=.02, spread=.04)["claims"]["helps"]
    rs = [record(s) | dict(claims=dict(sure=record(s)["claims"]["helps"], unsure=both(s))) for s in range(100, 120)]
    e = load(publish(rs, "confirm"))
    n = {k: c["verdict"]["n"] for k, c in e["claims"].items()}
    assert n == dict(sure=10, unsure=20) and problems(e) == []


@pytest.mark.parametrize("bad, said", [
    ([], "no records"),
    (ten()[:9], "too few"),
    ([record(s) for s in range(10)], "no confirm seed"),
    (ten()[:9] + [record(109, code="c2")], "hash"),
    (ten()[:9] + [record(109, hashes=dict(code="c1"))], "lacks its model and data hash"),
    (ten()[:9] + [record(109, hardware="gpu")], "differ in hardware"),
    (ten()[:9] + [record(109, parameters=dict(alpha=.6))], "differ in parameters"),
    (ten()[:9] + [record(109, status="failed")], "failed"),
    ([r | dict(claims={}) for r in ten()], "no claim was recorded"),
])
def test_publish_refuses_and_writes_nothing(shipped, bad, said):
    with pytest.raises(KitError) as e: publish(bad, "confirm")
    assert said in str(e.value) and "\n" not in str(e.value) and not list(shipped.rglob("*"))


def test_models_that_share_a_file_name_are_told_apart(shipped):
    publish(ten(model="a/b"), "confirm")
    with pytest.raises(KitError, match="belongs to a/b"): publish(ten(model="a-b", code="c2"), "confirm")


def test_the_same_records_again_change_nothing_and_count_no_attempt(shipped):
    path = publish(ten(), "confirm"); before = path.read_text(encoding="utf-8")
    assert publish(ten(), "resumed") == path and path.read_text(encoding="utf-8") == before


def test_where_a_model_lies_on_a_disk_is_not_published(shipped):
    path = publish(ten(model="/home/ada/secret/flan", data="/home/ada/rows.jsonl"), "confirm")
    assert "ada" not in path.read_text(encoding="utf-8") and ".flan.rows-jsonl." in path.name and check_ledger() == []


# confirming

def test_the_command_names_what_decides_and_no_place_on_a_disk():
    assert Job("kd_head").command() == "slmkit confirm kd_head --profile cpu"
    given = Job("kd_head", "gpu", "/home/ada/flan", "my rows.csv", "input=q").command()
    assert given == "slmkit confirm kd_head --profile gpu --model flan --data 'my rows.csv' --columns input=q"


@pytest.fixture
def queue(shipped, monkeypatch):
    "A made-up technique whose runs `record` makes: gives the dict that shapes them, and a list of what ran."
    shape, ran = dict(gain=.05, spread=.01), []
    def planned_run(t, model, s):
        r = record(s, technique=f"distill/{t}", hardware=hardware(), model=model)
        named = {k: r[k] for k in ("technique", "profile", "model", "data", "seed", "hashes", "parameters")}
        return named | shape.get("planned", {})
    def run(r):
        ran.append((r["technique"], r["model"], r["seed"]))
        made = record(r["seed"], technique=r["technique"], hardware=hardware(), model=r["model"],
                      gain=shape["gain"], spread=shape["spread"])
        made["claims"]["helps"] |= dict(spec=SPEC | shape.get("spec", {}), n_rows=shape.get("n_rows", 1000))
        return made | dict(status="error" if r["seed"] == shape.get("fails") else "ok")
    monkeypatch.setattr(confirming, "here", hardware)
    monkeypatch.setattr(confirming, "chosen", lambda names, profile: [(n, "x.ipynb") for n in names])
    monkeypatch.setattr(confirming, "find", lambda name: (name, "x.ipynb"))
    monkeypatch.setattr(confirming, "declared_in", lambda path: [{}])
    monkeypatch.setattr(confirming, "plan", lambda wanted, profile, seeds, model="", **places:
                        [planned_run(n, model or "lm-1m", s) for n, _ in wanted for s in seeds])
    monkeypatch.setattr(confirming, "execute", lambda runs, folder, **how: [run(r) for r in runs])
    return shape, ran


def test_a_queue_confirms_all_and_a_verdict_that_stands_is_not_rolled_again(queue):
    shape, ran = queue
    q = confirm(["one", "two"], "cpu", "runs")
    assert [e["technique"] for e in entries()] == ["distill/one", "distill/two"] and check_ledger() == []
    assert {s for _, _, s in ran} == {0, 1, 2, *range(100, 110)} and all("published" in l for l in q.lines)
    ran.clear()
    q = confirm(["one", "two"], "cpu", "runs")
    assert ran == [] and all("the verdict stands" in l for l in q.lines)


def test_what_is_open_is_extended_by_itself(queue):
    shape, ran = queue
    shape.update(gain=.02, spread=.04)
    confirm(["one"], "cpu", "runs", anyway=True)
    [e] = entries()
    assert len(e["runs"]) == 20 and [a["seeds"] for a in e["attempts"]] == ["100-109", "100-119"]
    assert e["claims"]["helps"]["power"][0] != "go" and check_ledger() == []


def test_draws_of_too_few_rows_are_told_before_a_confirm_seed_runs(queue):
    shape, ran = queue
    shape.update(spec=dict(draws=True), n_rows=30)
    q = confirm(["one"], "cpu", "runs", anyway=True)
    assert {s for *_, s in ran} == {0, 1, 2} and q.failed and entries() == []
    assert "helps: draws of 30 rows, 40 needed: nothing is confirmed" in q.lines[0]


def test_the_build_seed_that_failed_is_named(queue):
    shape, ran = queue
    shape.update(fails=1)
    q = confirm(["one"], "cpu", "runs")
    assert {s for *_, s in ran} == {0, 1, 2} and "seed 1 is error: nothing is confirmed" in q.lines[0]


def test_a_notebook_that_names_its_data_only_while_it_runs_is_confirmed(queue):
    shape, ran = queue
    shape.update(planned=dict(data=""))
    q = confirm(["one"], "cpu", "runs")
    assert len(entries()) == 1 and not q.failed


def test_an_entry_that_named_no_maker_is_extended_and_takes_todays_name(shipped):
    rs = unsure()
    publish([r | dict(hardware="cpu-x-1t-torch2.13") for r in rs[:10]], "confirm")
    path = publish([r | dict(hardware="cpu-x-1t-torch2.13-intel-bf16") for r in rs[10:]], "confirm")
    [e] = entries()
    assert len(e["runs"]) == 20 and path == file_of(e) and check_ledger() == []
    assert len(list(shipped.rglob("*.json"))) == 1


def test_what_can_decide_nothing_is_refused_before_it_runs(queue):
    shape, ran = queue
    shape.update(spread=.5)
    q = confirm(["one"], "cpu", "runs")
    assert {s for _, _, s in ran} == {0, 1, 2} and entries() == [] and "helps (± " in q.lines[0]


def test_a_batch_that_is_not_whole_publishes_nothing(queue):
    shape, ran = queue
    shape.update(fails=105)
    q = confirm(["one"], "cpu", "runs")
    assert entries() == [] and "not whole" in q.lines[0]


def test_what_holds_of_a_paper_runs_on_the_second_base_too(queue):
    shape, ran = queue
    shape.update(spec=dict(stands="paper"))
    confirm(["one"], "cpu", "runs")
    assert sorted(e["model"] for e in entries()) == ["lm-1m", "lm-1m-s1"]
    assert {(m, s) for _, m, s in ran if s == 109} == {("lm-1m", 109), ("lm-1m-s1", 109)}


# checking

@pytest.mark.parametrize("spoil, said", [
    (lambda e: e["claims"]["helps"]["verdict"].update(mean=.5), "published mean"),
    (lambda e: e["claims"]["helps"]["verdict"].update(outcome="opposite"), "published outcome"),
    (lambda e: e["claims"]["helps"]["verdict"].update(low=.0001), "published low"),
    (lambda e: e["claims"]["helps"]["spec"].update(least=0.2), "published outcome"),
    (lambda e: e["runs"][3]["claims"]["helps"].update(value=.09), "its arms give"),
    (lambda e: e["runs"][3]["arms"].update(x=.9), "its arms give"),
    (lambda e: e["runs"].pop(), "too few"),
    (lambda e: e["attempts"][0]["outcomes"].update(helps="open"), "last attempt says"),
    (lambda e: e.update(technique="distill/other"), "belongs at"),
])
def test_the_check_finds_every_bent_figure(shipped, spoil, said):
    path = publish(ten(), "confirm"); e = load(path); spoil(e); save(path, e)
    found = check_ledger()
    assert found and any(said in f for f in found), found


def test_a_file_that_is_no_entry_is_named(shipped):
    (shipped/"distill").mkdir(parents=True); (shipped/"distill/x.json").write_text("[]", encoding="utf-8")
    assert "no entry of a ledger" in check_ledger()[0]
    with pytest.raises(KitError, match="not a file of the ledger"): entries()


def test_the_shipped_ledger_follows_from_its_records(monkeypatch):
    monkeypatch.delenv("SLMKIT_LEDGER", raising=False)
    assert check_ledger() == []


@pytest.mark.parametrize("source", [
    "lambda a: open('/etc/passwd')", "lambda a: a.clear()", "lambda a: 9**9**9**9", "lambda a: [1]*10**9",
    "lambda a: a['nope']", "lambda a: 1/0", "lambda a: max(*a)", "lambda a: max(a['x'], key=abs)", "lambda a: True",
    "def f(a): pass", "lambda a: " + "-"*5000 + "1", None, "("*300])
def test_only_plain_arithmetic_is_evaluated(source):
    assert evaluate(source, dict(x=1.)) is None


def test_arithmetic_of_arms():
    assert evaluate("lambda arms: max(arms['x'], 2)/abs(-arms['y']) - math.log(1)", dict(x=6., y=3.)) == 2


# attestation

def test_equal_arms_re_attest_changed_code(shipped):
    path = publish(ten(), "confirm")
    lines, bad = attest([record(103, code="c2")])
    e = load(path)
    assert "re-attested" in lines[0] and not bad and e["hashes"]["code"] == "c2" and e["attested"][0]["seed"] == 103
    assert len(e["attempts"]) == 1 and check_ledger() == []


def test_other_arms_make_it_stale_which_is_no_failure(shipped):
    path = publish(ten(), "confirm")
    lines, bad = attest([record(103, gain=.06, code="c2")])
    e = load(path)
    assert "stale: helps" in lines[0] and not bad and e["claims"]["helps"]["verdict"]["stale"] and check_ledger() == []
    assert rows(shipped)[0]["label"] == "holds (stale)"


def test_same_code_and_other_arms_contradict(shipped):
    path = publish(ten(), "confirm"); before = path.read_text(encoding="utf-8")
    lines, bad = attest([record(103, gain=.06)])
    assert bad and "DIFFERS" in lines[0] and path.read_text(encoding="utf-8") == before


def test_another_machine_is_not_compared_bit_by_bit(shipped):
    publish(ten(), "confirm")
    lines, bad = attest([record(103, gain=.06, hardware="other")])
    assert not bad and "on other, the entry on cpu-x-1t-torch2.13: helps inside" in lines[0]


def test_equal_fingerprints_attest_and_every_tenth_is_a_whole_seed(shipped, monkeypatch):
    from slmkit.verdicts import attest as attesting
    small = record(100, profile="smoke", hardware="here")
    path = publish(ten(hardware="here"), "confirm")
    save(path, load(path) | dict(fingerprint=fingerprint(small)))
    monkeypatch.setattr(attesting, "planned", lambda e, seed: record(seed, code="c2", hardware="here"))
    monkeypatch.setattr(attesting, "smoke_run", lambda e: small)
    asked = []
    run = lambda r: asked.append(r["profile"]) or r
    assert attest_one(load(path), run=run) == ("distill/made_up (cpu): re-attested by fingerprint", False)
    e = load(path)
    assert asked == ["smoke"] and e["hashes"]["code"] == "c2" and e["attested"][0]["by"] == "fingerprint"
    assert attest_one(e, run=run) == ("distill/made_up (cpu): current", False)
    save(path, e | dict(attested=e["attested"]*9))
    monkeypatch.setattr(attesting, "planned", lambda e, seed: record(seed, code="c3", hardware="here"))
    assert "re-attested for today's code" in attest_one(load(path), run=run)[0] and asked == ["smoke"]*2 + ["cpu"]
    assert check_ledger() == []


def test_another_fingerprint_takes_a_whole_seed(shipped, monkeypatch):
    from slmkit.verdicts import attest as attesting
    path = publish(ten(hardware="here"), "confirm")
    save(path, load(path) | dict(fingerprint=fingerprint(record(100, gain=.2, hardware="here"))))
    monkeypatch.setattr(attesting, "planned", lambda e, seed: record(seed, code="c2", gain=.06, hardware="here"))
    monkeypatch.setattr(attesting, "smoke_run", lambda e: record(100, profile="smoke", hardware="here"))
    line, bad = attest_one(load(path), run=lambda r: r)
    assert "stale: helps" in line and not bad and load(path)["claims"]["helps"]["verdict"]["stale"]


# reasons

def test_reasons_are_copied_from_the_notebook_and_missing_ones_are_named(shipped, monkeypatch):
    from slmkit.verdicts import ledger
    e = load(publish(ten(gain=-.05), "confirm"))
    assert e["claims"]["helps"]["verdict"]["outcome"] == "opposite" and "needs because('helps'" in unexplained()[0]
    monkeypatch.setattr(ledger, "reasons", lambda technique, root=None: dict(helps=["scale", "Too small."]))
    assert len(copy_reasons()) == 1 and copy_reasons() == [] and unexplained() == [] and check_ledger() == []
    [e] = entries()
    assert e["claims"]["helps"]["verdict"]["because"] == ["scale", "Too small."]


def test_a_failed_canary_attests_nothing(shipped):
    e = load(publish(ten(), "confirm"))
    with pytest.raises(KitError, match="nothing is attested"): reattest(e, record(103, status="timeout"))


def test_a_cost_is_compared_within_its_tolerance(shipped):
    cost = SPEC | dict(kind="cost", least=None, tolerance=.2, control=None, value="lambda a: a['x']/a['y']")
    def timed(s, ratio, code):
        fast = dict(value=ratio, control=None, arms=dict(x=ratio, y=1.), rows="", n_rows=0, spec=cost)
        return record(s, code=code) | dict(claims=dict(fast=fast))
    e = load(publish([timed(100 + i, 2 + i/100, "c1") for i in range(10)], "confirm"))
    assert not reattest(e, timed(100, 2.3, "c2"))["claims"]["fast"]["verdict"]["stale"]
    assert reattest(e, timed(100, 2.6, "c2"))["claims"]["fast"]["verdict"]["stale"]


def test_the_canary_reruns_what_changed_and_says_what_is_current(shipped):
    publish(ten(hardware=hardware()), "confirm")
    plan = lambda code: lambda e, seed: record(seed, code=code, hardware=hardware())
    assert rerun_all(plan=plan("c1"), run=None) == (["distill/made_up (cpu): current"], False)
    lines, bad = rerun_all(plan=plan("c2"), run=lambda r: r)
    assert lines == ["distill/made_up (cpu, seed 100): re-attested for today's code"] and not bad
    other = lambda r: r | record(101, .07, code="c2", hardware=hardware())
    assert rerun_all("distill/made_up", plan=plan("c2"), run=other)[1]


def test_a_canary_is_planned_like_the_confirmed_run(monkeypatch):
    from slmkit.run.notebooks import techniques
    monkeypatch.chdir(ROOT)
    if not (names := list(techniques(ROOT))): pytest.skip("no technique yet")
    from slmkit.run.plan import chosen, plan
    [run] = plan(chosen(names[:1])[:1], "smoke", [103])
    again = planned(dict(technique=names[0], profile="smoke", model=run["model"], data=run["data"]), 103)
    assert (again["hashes"], again["parameters"]) == (run["hashes"], run["parameters"])


def test_a_notebook_that_names_its_data_only_while_it_runs_is_rerun(monkeypatch):
    from slmkit.run.notebooks import find
    from slmkit.run.plan import plan
    monkeypatch.chdir(ROOT)
    name = "judge/context_against_memory"
    [run] = plan([find(name)], "smoke", [103])
    entry = dict(technique=name, profile="cpu", model="lm-1m", data="facts", runs=[dict(seed=103)])
    assert run["data"] != "facts" and planned(entry, 103)["profile"] == "cpu"
    small = smoke_run(entry)
    assert (small["hashes"], small["parameters"]) == (run["hashes"], run["parameters"])


# batches from elsewhere

def batch(tmp_path, records, name="theirs"):
    (tmp_path/name).mkdir(exist_ok=True)
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    (tmp_path/name/"records.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return tmp_path/name


def test_a_foreign_batch_is_marked_and_stands_beside_our_own(shipped, tmp_path):
    ours = publish(ten(), "confirm")
    [theirs] = add(batch(tmp_path, ten(gain=.07) + [record(0)]), root=tmp_path)
    assert theirs != ours and load(theirs)["external"]["source"] == "theirs" and check_ledger() == []
    assert [r["external"] for r in rows(tmp_path)] == [False, True]


def spoiled(**spec):
    return [record(s) | dict(claims=dict(helps=record(s)["claims"]["helps"] | spec)) for s in range(100, 110)]


@pytest.mark.parametrize("bad, said", [
    (["{"], "not a record"),
    ([json.dumps([1])], "not a record"),
    ([], "no records"),
    ([record(3)], "building seeds"),
    (ten()[:9], "too few"),
    (ten()[:9] + [record(109, hashes=dict(code="c1", model="m"))], "lacks its data hash"),
    (ten()[:9] + [record(109, hashes={})], "lacks its code and model and data hash"),
    (ten()[:9] + [{k: v for k, v in record(109).items() if k != "versions"}], "lacks versions"),
    (ten()[:9] + [record(109, seconds="fast")], "seconds is str"),
    (spoiled(value=.4), "its arms give"),
    (spoiled(value=float("nan")), "not a finite number"),
    (spoiled(arms=dict(x=float("inf"))), "not a finite number"),
    (spoiled(spec=SPEC | dict(least="0")), "least is not a finite number"),
    (spoiled(spec={k: v for k, v in SPEC.items() if k != "stands"}), "lacks stands"),
    (spoiled(spec=SPEC | dict(stands="partly")), "none of paper, variant, construction"),
    (spoiled(spec=SPEC | dict(paper="big")), "no number"),
    (spoiled(spec=SPEC | dict(control=None)), "needs control="),
    (spoiled(spec=None), "needs spec and arms"),
    (ten() + [record(s, technique="reason/other", hashes={}) for s in range(100, 110)], "reason/other"),
])
def test_a_bad_foreign_batch_is_refused_whole(shipped, tmp_path, bad, said):
    with pytest.raises(KitError) as e: add(batch(tmp_path, bad), root=tmp_path)
    assert said in str(e.value) and "\n" not in str(e.value) and not list(shipped.rglob("*.json"))


def test_a_foreign_claim_must_be_declared_as_in_our_notebook(shipped, tmp_path):
    cell = """c = claim('helps', says='x beats y.', kind='effect', least=.05,
        value=lambda a: a['x'] - a['y'], control=lambda a: 0)"""
    nb = dict(cells=[dict(cell_type="code", metadata={}, source=[cell])], metadata={}, nbformat=4, nbformat_minor=5)
    (tmp_path/"nbs/distill").mkdir(parents=True)
    (tmp_path/"nbs/distill/made_up.ipynb").write_text(json.dumps(nb), encoding="utf-8")
    with pytest.raises(KitError, match="least=0.02, our notebook says 0.05"):
        add(batch(tmp_path, ten()), root=tmp_path)


# claims in a notebook

@pytest.fixture
def gain(monkeypatch):
    "A claim of a technique that nobody has, at profile cpu."
    monkeypatch.setenv("SLMKIT_TECHNIQUE", "distill/made_up")
    for k in ("CI", "SLMKIT_RECORD", "SLMKIT_HASHES"): monkeypatch.delenv(k, raising=False)
    monkeypatch.setattr(current, "profile", "cpu"); monkeypatch.setattr(current, "cfg", None)
    return claim("helps", says="x beats y.", metric="gain", value=lambda a: a["x"] - a["y"],
                 control=lambda a: a["z"] - a["y"], least=.02)


def test_a_run_is_appended_as_one_line(gain, tmp_path, monkeypatch):
    monkeypatch.setenv("SLMKIT_RECORD", str(tmp_path/"r.jsonl"))
    gain.record(3, rows=[1, 2], x=.8, y=.7, z=.7); gain.record(4, rows=[1, 2], x=.9, y=.7, z=.7)
    lines = [json.loads(l) for l in (tmp_path/"r.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [l["seed"] for l in lines] == [3, 4] and lines[0]["n_rows"] == 2 and len(lines[0]["rows"]) == 16
    assert lines[0]["spec"]["value"] == "lambda a: a['x'] - a['y']" and lines[0]["spec"]["least"] == .02
    assert set(lines[0]) == {"claim", "seed", "value", "control", "arms", "rows", "n_rows", "spec", "profile", "model",
                             "data"}


@pytest.mark.parametrize("arms, said", [
    (dict(x=1., z=1.), "needs the arm 'y'"), (dict(x=float("nan"), y=0., z=0.), "arm 'x' is nan"),
    (dict(x=1., y="a", z=0.), "arm 'y' is str"), (dict(x=1., y=None, z=0.), "arm 'y' is NoneType"),
    (dict(x=1., y=0.), "its control needs the arm 'z'")])
def test_record_refuses_and_keeps_nothing(gain, tmp_path, monkeypatch, arms, said):
    monkeypatch.setenv("SLMKIT_RECORD", str(tmp_path/"r.jsonl"))
    with pytest.raises(KitError) as e: gain.record(0, [], **arms)
    assert said in str(e.value) and str(e.value).startswith("distill/made_up: claim 'helps': ")
    assert gain.runs == [] and not (tmp_path/"r.jsonl").exists()


@pytest.mark.parametrize("change, said", [
    (dict(control=None), "needs control="), (dict(least=None), "needs least="), (dict(least=-1), "at least 0"),
    (dict(kind="efect"), "no kind"), (dict(stands="varient"), "did you mean 'variant'"),
    (dict(kind="coverage"), "needs nominal="), (dict(value=None), "must be a function"),
    (dict(says=""), "needs a name and says=")])
def test_a_claim_lacking_something_is_not_declared(gain, change, said):
    good = dict(says="x", value=lambda a: a["x"], control=lambda a: 0, least=.1)
    with pytest.raises(KitError) as e: claim("c", **(good | change))
    assert said in str(e.value) and str(e.value).startswith("distill/made_up: claim 'c': ")


def test_a_figure_says_how_we_know_it():
    assert figure(.04, "T5-base", "memory")["comparable"] == []
    for bad in (dict(value=float("nan"), provenance="code"), dict(value=1, provenance="rumour")):
        with pytest.raises(KitError): figure(setting="s", **bad)


def test_expect_without_a_ledger_smoke_and_before_record(gain, shipped, monkeypatch):
    with pytest.raises(KitError, match="nothing is recorded"): expect(gain)
    gain.record(0, [], x=.8, y=.7, z=.7)
    assert "nothing is published at cpu" in repr(expect(gain)) and "\n" not in repr(expect(gain))
    monkeypatch.setattr(current, "profile", "smoke")
    assert "mechanics only" in repr(expect(gain))


def test_expect_shows_this_run_beside_the_published_ones(gain, shipped):
    publish(ten(), "confirm"); publish(ten(hardware=hardware(), gain=.03), "confirm")
    gain.record(7, [], x=.53, y=.5, z=.5)
    e = expect(gain)
    assert e.text.splitlines()[1].startswith("inside") and hardware() in e.text and "<td>inside" in e._repr_html_()
    gain.record(8, [], x=.9, y=.5, z=.5)
    assert expect(gain).text.splitlines()[1].startswith("OUTSIDE")


def test_expect_beside_an_entry_without_an_interval(gain, shipped):
    few = dict(spec=SPEC | dict(draws=True), n_rows=8)
    asked = lambda s: record(s) | dict(claims=dict(helps=record(s)["claims"]["helps"] | few))
    publish([asked(s) for s in range(100, 110)], "confirm")
    gain.record(7, [], x=.53, y=.5, z=.5)
    assert "published at cpu as open (draws of 8 rows, 40 needed" in expect(gain).text
    publish(ten(hardware="another"), "confirm")
    assert core.shown(gain)[1].startswith("holds") and "inside" in expect(gain).text


def test_expect_raises_only_in_ci_on_a_differing_rerun(gain, shipped, monkeypatch):
    e = load(publish(ten(hardware=hardware()), "confirm"))
    arms = dict(e["runs"][3]["arms"])
    def run(ci, hashes, **a):
        monkeypatch.setenv("CI", ci); monkeypatch.setenv("SLMKIT_HASHES", json.dumps(hashes))
        gain.record(103, ["r"], **a); monkeypatch.setattr(gain.runs[-1], "rows", "ab"*8)
        return expect(gain)
    other = arms | dict(x=arms["x"] + 1e-9)
    run("true", e["hashes"], **arms); run("", e["hashes"], **other); run("true", dict(code="new"), **other)
    with pytest.raises(KitError, match="seed 103 gave"): run("true", e["hashes"], **other)


def test_plot_draws_the_ledger_or_this_run(gain, shipped):
    import matplotlib.pyplot as plt
    plt.close("all"); gain.record(0, [], x=.8, y=.7, z=.7)
    drawn = []
    draw = lambda records, ax: drawn.append(len(records))
    gain.plot(draw); publish(ten(), "confirm"); gain.plot(draw); gain.plot()
    assert drawn == [1, 10] and core.shown(gain)[1].startswith("holds (10 seeds, cpu")
    assert len(plt.get_fignums()) == 3
    plt.close("all")


# the field map

def test_the_registry_holds_every_work():
    works = registry(ROOT)
    assert len(works) == 369 == len({w["slug"] for w in works})
    assert all(w["title"] and w["family"] and w["type"] and w["tier"] in "ABCD" for w in works)
    assert all(set(w["provenance"].values()) <= {"abstract", "memory"} for w in works)
    marked = [w for w in works if w["provenance"]["mechanism"] == "memory"]
    assert len(marked) == 250 and not any(w["mechanism"].rstrip(".").endswith("(from memory)") for w in works)


def test_claims_name_works_that_exist_and_no_claim_twice():
    assert len(field_rows(ROOT, "/nowhere")) == 369  # raises where a claim names an unknown work


def test_an_unknown_work_is_told_with_its_nearest():
    with pytest.raises(KitError, match="did you mean 'graphix-t5'"):
        served(registry(ROOT), [dict(technique="a/b", name="c", work="graphix-t6", notebook="n")])


@pytest.mark.parametrize("text, want", [
    ("It works. (from memory)", ("It works.", "memory")), ("It works (from memory).", ("It works.", "memory")),
    ("by score (from memory: its log) alone", ("by score (from memory: its log) alone", "memory")),
    ("", ("", "abstract"))])
def test_provenance_comes_from_the_end_of_a_text(text, want): assert known_from(text) == want


def test_search_and_filters():
    works = field_rows(ROOT, "/nowhere")
    assert 0 < len(search(works, "rationale", family="distill")) < len(search(works, family="distill")) < 369
    with pytest.raises(KitError, match="did you mean 'distill'"): search(works, family="distil")


@pytest.mark.parametrize("line, said", [("{", "works.jsonl:1: not a JSON object"), ('{"title": "x"}', "lacks slug")])
def test_a_bad_file_of_works(tmp_path, line, said):
    (tmp_path/"works.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(KitError, match=said): import_works(tmp_path/"works.jsonl", tmp_path/"r.json")


# the command line

def run_cli(capsys, *args):
    with pytest.raises(SystemExit) as e: main(list(args))
    return (e.value.code, *capsys.readouterr())


def test_verdicts_on_the_command_line(shipped, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80"); publish(ten(), "confirm")
    code, out, _ = run_cli(capsys, "verdicts", "made_up")
    assert code == 0 and "helps: holds · our variant · 10 seeds · one base" in out
    assert "our variant, counted apart\n  1 holds" in out and max(map(len, out.splitlines())) <= 80
    assert json.loads(run_cli(capsys, "verdicts", "--outcome", "holds", "--json")[1])[0]["attempts"] == 1
    assert run_cli(capsys, "verdicts", "made_up", "--csv")[1].splitlines()[1].startswith("distill/made_up,cpu")
    code, _, err = run_cli(capsys, "verdicts", "--profile", "cup")
    assert code == 2 and "did you mean 'cpu'" in err and len(err.splitlines()) == 1


def test_a_verdict_comes_with_its_scale_share_reason_bases_and_attempts(shipped, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    paper = SPEC | dict(work="distilling-step-by-step", stands="paper")
    one = lambda r: r | dict(claims=dict(helps=r["claims"]["helps"] | dict(spec=paper)))
    publish([one(record(s, code="c0")) for s in range(100, 110)], "confirm")
    path = publish([one(record(s, gain=-.05)) for s in range(100, 110)], "confirm")
    publish([one(record(s, model="t5-1m-s1")) for s in range(100, 110)], "confirm")
    e = load(path); e["claims"]["helps"]["verdict"] |= dict(because=["floor", "All arms guess [a] word."], attempts=2)
    save(path, e)
    out = run_cli(capsys, "verdicts", "made_up")[1]
    assert "distill/made_up · in Toyland · cpu · t5-1m · facts\n" in out
    assert "helps: opposite · 10 seeds · t5-1m: opposite; t5-1m-s1: holds · 2 attempts\n" in out
    numbers = "least that counts 0.02, control 0 (0% of the value), paper 0.04 (from memory, unchecked)"
    assert numbers in " ".join(out.split())
    assert "floor: All arms guess [a] word." in out
    assert "claims of papers, in Toyland\n  1 holds, 1 opposite\n" in out and max(map(len, out.splitlines())) <= 100
    [row] = [r for r in rows(shipped) if r["outcome"] == "opposite"]
    assert (row["because"], row["attempts"], row["scale"]) == ("floor: All arms guess [a] word.", 2, "in Toyland")


@pytest.mark.parametrize("verdict, label, notes", [
    (dict(draws=True), "holds (one model, ten draws)", []),
    (dict(n=5), "holds (5 seeds)", ["one base"]),
    (dict(n=5, outcome="open"), "open", ["5 seeds", "one base"]),
    (dict(n=20), "holds", ["20 seeds", "one base"])])
def test_seeds_or_draws_are_said_once(shipped, verdict, label, notes):
    path = publish(ten(), "confirm")
    e = load(path); e["claims"]["helps"]["spec"]["stands"] = "paper"
    e["claims"]["helps"]["verdict"] |= verdict; save(path, e)
    [row] = [r for r in rows(shipped) if r["claim"] == "helps"]
    assert (row["label"], table.notes(row)) == (label, notes)


def test_every_outcome_has_a_meaning_and_red_is_for_what_speaks_against():
    assert set(OUTCOMES) - set(table.MEANING) <= {"never run", "mechanics only"}
    assert {o for o in OUTCOMES if table.tone(o) == "bad"} == {"opposite", "fails"}


def test_the_ledger_on_the_command_line(shipped, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # outside the project, whose notebooks don't know this claim
    assert run_cli(capsys, "ledger", "add", str(batch(tmp_path, ten())))[0] == 0
    path = publish(ten(), "confirm")
    assert run_cli(capsys, "ledger", "check")[0] == 0
    code, out, _ = run_cli(capsys, "ledger", "canary", "--commits", "7")
    assert code == 0 and "can't be rerun here" in out  # the technique is made up
    assert run_cli(capsys, "ledger", "canary", "distill/nothing")[0] == 2
    e = load(path); e["claims"]["helps"]["verdict"]["mean"] = 1.; save(path, e)
    code, out, _ = run_cli(capsys, "ledger", "check")
    assert code == 1 and "published mean 1.0" in out


def test_the_field_on_the_command_line(capsys):
    assert len(json.loads(run_cli(capsys, "field", "--json")[1])) == 369
    one = run_cli(capsys, "field", "graphix-t5")[1]
    assert "mechanism" not in one and "Graphix" in one
    assert run_cli(capsys, "field", "--type", "metod")[0] == 2
