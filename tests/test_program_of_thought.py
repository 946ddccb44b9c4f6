"Program-of-thought: three ways of writing one solution, which errors are mended, both reproductions."
import json, os, random, re, sqlite3
import pytest
from conftest import ROOT, executed_in, run_in, told
from slmkit.core.real import is_fetched
from slmkit.core.score import arithmetic, numbers
from slmkit.core.sets import data_folder
from slmkit.core.settings import KitError, package_folder
from slmkit.reason.interpreter import as_text, run
from slmkit.reason.program_of_thought import (as_program, as_rationale, pal_prompt, ran, recomputed, said, solved,
    spoiled, steps_of)
from slmkit.toyland.tasks import task

def test_the_label_of_a_word_problem_and_its_two_solutions_have_the_same_value():
    for digits in (1, 2, 3, 4):
        for r in task("word_problems", "train", 60, seed=digits, digits=digits, steps=4):
            steps = steps_of(r["label"])
            program, why = as_program("nuts", *steps), as_rationale("nuts", *steps)
            assert as_text(run(program)) == why.rpartition("answer : ")[2] == r["answer"]
            assert arithmetic(r["label"]) == run(program)
            assert as_text(run(recomputed(why))) == r["answer"]

def test_recomputing_mends_sums_and_nothing_else():
    assert run(recomputed("nuts start at 36 . 36 + 4 is 99 . 99 * 2 is 5 . answer : 5")) == 80
    for broken in ("", "nuts start at", "answer : 4", "36 + is is 4", "a b is c . answer : 3"):
        try: assert isinstance(run(recomputed(broken)), (int, float))
        except KitError: pass

def test_the_three_ways_say_one_answer():
    for r in task("word_problems", "train", 40, seed=1):
        ways = solved(r)
        assert {said(text) for text in ways.values()} == {r["answer"]} and ran([ways["program"]]) == [r["answer"]]
    assert said("no answer") == "" and ran(["import os ; answer : 3", ""]) == ["", ""]

def test_a_spoiled_program_differs_in_one_sign():
    rng = random.Random(0)
    for r in task("word_problems", "train", 40, seed=2):
        right = solved(r)["program"].partition(" ; answer")[0]
        wrong = spoiled(right, rng)
        assert [a == b for a, b in zip(right.split(), wrong.split())].count(False) == 1
    with pytest.raises(KitError, match="no sign"): spoiled("nuts = 4", rng)

def test_a_prompt_shows_programs_without_answers():
    rows = list(task("word_problems", "train", 3, seed=3))
    text = pal_prompt(rows[:2], rows[2]["input"])
    assert text.count("# solution in Python") == 3 and "answer :" not in text and text.endswith("in Python\n")

CLAIMS = {"": {"programs-beat-rationales", "recomputed-rationales-are-as-good", "programs-are-better-lessons"},
          "_verified": {"verified-programs-are-better"},
          "_prompted": {"prompted-programs-beat-chains", "prompted-programs-need-the-interpreter",
                        "sums-fail-more-than-copies", "prompted-programs-beat-a-rule"}}
@pytest.mark.parametrize("short", CLAIMS)
def test_reproductions_at_smoke(tmp_path, torch_pool, short):
    notebook = ROOT/f"nbs/reason/program_of_thought_repro{short}.ipynb"
    e, found = executed_in(torch_pool, notebook, tmp_path, profile="smoke", seed=3)
    assert e["status"] == "ok", e["error"]
    assert set(found) == CLAIMS[short]

def test_worked_examples_say_one_answer_in_three_ways():
    for d in json.loads((package_folder()/"data/worked.json").read_text(encoding="utf-8")):
        program, _, stated = d["program"].partition(" # ")
        assert d["ask"] == stated + "." and as_text(run(program)) == stated
        assert d["chain"].rpartition("is ")[2] == d["ask"]
        assert {*numbers(program)} <= {*numbers(d["input"])}
        for left, right in re.findall(r"((?:\d+ [-+*/] )+\d+) = (\d+)", d["chain"]): assert run(left) == float(right)

def test_the_prompted_page_asks_nobody(tmp_path, torch_pool):
    "All its prompts are those of the store: what the model is asked anew would lie in the user's cache."
    if not is_fetched("smollm2-135m") or data_folder() is None: pytest.skip("no smollm2-135m or no data here")
    page, own = ROOT/"nbs/reason/program_of_thought_repro_prompted.ipynb", tmp_path/"answers.sqlite"
    env = told(page, tmp_path, "r") | {k: os.environ[k] for k in ("SLMKIT_DATA", "SLMKIT_MODELS") if k in os.environ}
    job = dict(parameters=dict(profile="real", seed=7), env=env | dict(SLMKIT_ANSWERS=str(own)))
    e, _ = run_in(torch_pool, page, tmp_path/"out", **job)
    assert e["status"] == "ok", e["error"]
    with sqlite3.connect(own) as db: assert db.execute("select count(*) from answers").fetchone() == (0,)
