"""Step templates: a brute-force simulation of coins and swaps, stored chains of the published form, both
reproductions."""
import gzip, json, random
import numpy as np
import pytest
from conftest import ROOT, executed_in
from slmkit.core.data import load, manifest
from slmkit.reason.step_templates import (by_task, checked, coins, held, next_of_task, said, states, swaps, template,
    two_coins)

TRAINED = {"the-right-state-beats-none", "a-wrong-template-is-no-better-than-none", "dots-are-no-better-than-none"}
REAL = {"chains-beat-answers-on-bbh", "right-states-come-with-right-answers"}

# ---- the oracle: coins as parities, swaps as permutation matrices

def test_states_are_parities():
    for i in range(300):
        rng = random.Random(i)
        row = two_coins(rng, longest=9)
        for start, moves in zip(row["starts"], zip(*row["moves"])):
            turned = np.cumsum([m == "turn" for m in moves]) + (start == "down")
            assert states(start, list(moves)) == [("up", "down")[k % 2] for k in turned]

def test_a_template_holds_what_its_question_says():
    "The question is read back from its text alone: nothing but the text decides what is to be written."
    for i in range(300):
        row = two_coins(random.Random(i), longest=9)
        head, *moves, tail = [part.split() for part in row["input"].split(" . ")]
        assert tail == [head[0], "?"]
        assert head[0] != head[2]
        assert [int(m[0]) for m in moves] == list(range(1, len(moves) + 1))
        side = {head[0]: head[1], head[2]: head[3]}
        lines = {way: [] for way in ("state", "other", "none")}
        for k, first, second in moves:
            for who, move in ((head[0], first), (head[2], second)):
                if move == "turn": side[who] = {"up": "down", "down": "up"}[side[who]]
            for way, word in dict(state=side[head[0]], other=side[head[2]], none=".").items():
                lines[way].append(f"{k} {first} {second} {word}")
        end = f"answer : {side[head[0]]}"
        for way, written in lines.items(): assert template(way, row) == " ".join([*written, end])
        assert template("direct", row) == end
        assert len({len(template(way, row).split()) for way in lines}) == 1
        assert said(end) == said(template("other", row)) == end.split()[-1]

def test_the_other_coin_tells_nothing():
    """Over all moves of a length, each state of the other coin goes with both answers equally often; the right state
    decides it."""
    from itertools import product
    count = {}
    for pairs in product(product(["turn", "stay"], repeat=2), repeat=4):
        row = dict(starts=["up", "down"], moves=pairs)
        other = template("other", row).partition("answer")[0].split()[3::4]
        count.setdefault(tuple(other), []).append(said(template("other", row)) == "up")
    assert len(count) == 16 and all(sum(c)/len(c) == .5 for c in count.values())

def test_few_moves_are_drawn_more_often_and_a_length_can_be_asked():
    lengths = [len(two_coins(random.Random(i), longest=5)["moves"]) for i in range(2000)]
    assert set(lengths) == {1, 2, 3, 4, 5} and lengths.count(1) > 1.7*lengths.count(5)
    assert {len(two_coins(random.Random(i), moves=6)["moves"]) for i in range(20)} == {6}

def test_coins_are_split_and_labelled_by_the_first_coin():
    train, test = coins("train", 300, 3, 4), coins("test", 50, 3, 4, 2)
    assert {r["steps"] for r in train} == {1, 2, 3, 4} and {r["steps"] for r in test} == {2}
    assert not {r["input"] for r in train} & {r["input"] for r in test}
    for r in test: assert r["label"] == said(template("none", r))

# ---- chains of the published form, made up here

PEOPLE, BALLS = ["Alice", "Bob", "Claire", "Dave", "Eve"], ["red", "dark blue", "pink", "white", "The Pearl"]
def tracked(rng, wrong=False):
    """A made-up question on shuffled objects and a chain for it, wrong in one state; (question, chain, which states
    are right)."""
    now, place = np.eye(5, dtype=int), rng.randint(1, 5)
    pairs = [rng.sample(range(5), 2) for _ in range(5)]
    lines, right = ["(0) At the start: " + ", ".join(f"{p}: {b}" for p, b in zip(PEOPLE, BALLS)) + "."], []
    for i, (a, b) in enumerate(pairs, 1):
        swap = np.eye(5, dtype=int)
        swap[[a, b]] = swap[[b, a]]
        now = swap @ now
        shown = (now @ np.arange(5)).tolist()
        if wrong and i == place: shown[0], shown[1] = shown[1], shown[0]
        right.append(not (wrong and i == place))
        verb = rng.choice(["swap balls", "switch partners", "trade books"])
        lines.append(f"({i}) {PEOPLE[a]} and {PEOPLE[b]} {verb}: " + ", ".join(f"{p}: {BALLS[k]}"
                for p, k in zip(PEOPLE, shown)) + ".")
    told = " Then, ".join(f"{PEOPLE[a]} and {PEOPLE[b]} {rng.choice(['swap', 'switch', 'trade'])} balls."
        for a, b in pairs)
    return f"Alice, Bob, Claire, Dave, and Eve hold balls. First, {told} At the end, Bob has the", "\n".join([*lines,
            "So the answer is (A)."]), right

def test_states_of_a_chain_are_checked_against_permutation_matrices():
    for i in range(100):
        question, chain, right = tracked(random.Random(i), wrong=i % 2 == 1)
        assert len(held(chain)) == 6 and held(chain)[0] == dict(zip(PEOPLE, BALLS))
        assert checked(swaps(question), held(chain)) == right
        assert checked(swaps(question), held(chain.partition("(4)")[0])) == right[:3] + [False, False]

def test_chains_that_are_none():
    assert held("no idea") == [] and checked([("a", "b")], []) == [False] and checked([], [dict(a="x")]) == []

def test_tasks_of_three_sizes_count_once():
    rows = [dict(task=f"move_{n}_objects", target="x") for n in ("three", "five", "seven")
        for _ in range(2)] + [dict(task="one", target="y")]
    shares = by_task(rows, ["x", "x", "x", "-", "-", "-", "y"])
    assert shares == {"move": .5, "one": 1.}
    assert next_of_task(rows, list("abcdefg")) == list("badcfeg")

# ---- the reproductions

@pytest.fixture
def bbh(tmp_path, monkeypatch):
    "A folder laid out as SLMKIT_DATA says, with made-up rows in the fields of the real files."
    questions, outputs = [], []
    for task in ("tracking_shuffled_objects_five_objects", "other_task"):
        for i in range(40):
            q, chain, right = tracked(random.Random(i), wrong=i % 3 == 0)
            target = "(A)" if all(right) or i % 4 == 0 else "(B)"
            questions.append(dict(task=task, id=f"{task}-{i}", input=q, target=target))
            outputs.append(dict(task=task, id=f"{task}-{i}", target=target, cot=chain, cot_answer="(A)",
                    direct_answer="(B)"))
    for name, split, rows in (("bbh", "test", questions), ("bbh-codex", "test", outputs)):
        folder = tmp_path/"data"/manifest()[name]["folder"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder/"FETCHED").touch()
        (folder/manifest()[name]["files"][split]["file"]).write_bytes(
            gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    monkeypatch.setenv("SLMKIT_DATA", str(tmp_path/"data"))

def test_real_rows_are_an_evaluation_set(bbh):
    rows = load("bbh", "test")
    assert len(rows) == 80 and set(rows.column_names) == {"id", "input", "label"} and rows[0]["label"] in ("(A)", "(B)")
    assert load("bbh-codex", "test")[0]["teacher_label"] == "(A)"

def reproduction(pool, folder, name, short="", **given):
    e, found = executed_in(pool, ROOT/f"nbs/reason/step_templates_repro{short}.ipynb", folder, name, **given)
    assert e["status"] == "ok", e["error"]
    return found

def test_published_outputs_are_recounted_a_tenth_a_seed(tmp_path, torch_pool, bbh):
    one, two = (reproduction(torch_pool, tmp_path, n, "_bbh", profile="cpu", seed=3) for n in ("one", "two"))
    assert one == two and set(one) == REAL
    real = one["chains-beat-answers-on-bbh"]
    assert real["n_rows"] == 8 and real["arms"]["chain"] + real["arms"]["direct"] == 1
    assert one["right-states-come-with-right-answers"]["arms"]["right states"] == 1

def test_made_up_rows_stand_in_at_smoke(tmp_path, monkeypatch, torch_pool):
    monkeypatch.delenv("SLMKIT_DATA", raising=False)
    found = reproduction(torch_pool, tmp_path, "made_up", "_bbh", profile="smoke", seed=0)
    assert set(found) == REAL and found["right-states-come-with-right-answers"]["arms"]["right states"] == 1

def test_runs_that_learned_are_counted(tmp_path, torch_pool):
    found = reproduction(torch_pool, tmp_path, "coins", profile="smoke", seed=1, n=40, steps=2)
    assert set(found) == TRAINED
    a = found["the-right-state-beats-none"]["arms"]
    assert found["the-right-state-beats-none"]["value"] == (a["state"] >= .9) - max(a["none"] >= .9, a["direct"] >= .9)

def test_the_sets_are_in_the_manifest():
    for name in ("bbh", "bbh-codex"):
        m = manifest()[name]
        assert len(m["commit"]) == 40
        assert "MIT" in m["licence"]
        assert all(len(f["sha256"]) == 64 for f in m["files"].values())
