"""Step templates: a brute-force simulation of coins and swaps, numpy's line, stored chains of the published form,
the gpu and paper paths."""
import gzip, json, math, random
from functools import partial
import numpy as np
import pytest
from conftest import ROOT, Failed, ran
from slmkit.core.data import load, manifest
from slmkit.core.settings import KitError
from slmkit.reason.step_templates import (THINK, answers_alone, by_task, checked, final, held, next_of_task, said,
    sizes_figure, slope, states, steps_figure, swaps, tasks_figure, template, two_coins)

NB = ROOT/"nbs/reason/step_templates.ipynb"
notebook = partial(ran, NB)
TRAINED = {"the-right-state-beats-none", "a-wrong-template-is-no-better-than-none"}
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

def test_slope_is_numpys():
    rng = np.random.default_rng(0)
    for n in (2, 5, 9):
        x, y = rng.random(n), rng.random(n)
        assert slope(x.tolist(), y.tolist()) == pytest.approx(np.polyfit(x, y, 1)[0])
    with pytest.raises(KitError, match="two different x"): slope([1, 1], [0, 1])

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
    assert final("the answer is 3.5.") == "3.5"
    assert final("so it goes") == ""
    assert final("the answer is A. No, the answer is (B).") == "(B)"

def test_answers_alone_keeps_questions_and_answers():
    prompt = "About.\n\n" + "\n\n".join(
        f"Q: what is {i} ?\nOptions:\n(A) x\nA: {THINK}\nSo. The answer is near.\nSo the answer is {i}.5."
        for i in range(3))
    assert answers_alone(prompt) == "About.\n\n" + "\n\n".join(f"Q: what is {i} ?\nOptions:\n(A) x\nA: {i}.5"
        for i in range(3))

def test_tasks_of_three_sizes_count_once():
    rows = [dict(task=f"move_{n}_objects", target="x") for n in ("three", "five", "seven")
        for _ in range(2)] + [dict(task="one", target="y")]
    shares = by_task(rows, ["x", "x", "x", "-", "-", "-", "y"])
    assert shares == {"move": .5, "one": 1.}
    assert next_of_task(rows, list("abcdefg")) == list("badcfeg")

# ---- the notebook

def tiny_llama(folder, width=16):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from slmkit.toyland.tokenizer import build_tokenizer
    tok = build_tokenizer()
    tok.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=width, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=1024, pad_token_id=0, bos_token_id=3,
            eos_token_id=1)).save_pretrained(folder)
    return str(folder)

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
    prompts = [dict(task=t, prompt=f"About.\n\nQ: {t} ?\nA: {THINK}\nIt is. So the answer is (A).", shots=1)
        for t in {q["task"] for q in questions}]
    for name, split, rows in (("bbh", "test", questions), ("bbh", "prompts", prompts), ("bbh-codex", "test", outputs)):
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

@pytest.mark.slow
def test_stored_outputs_and_the_same_seed(tmp_path, torch_pool, bbh):
    one, two = (notebook(tmp_path, torch_pool, name, profile="smoke", seed=3) for name in ("one", "two"))
    assert one == two and set(one) == TRAINED | REAL
    real = one["chains-beat-answers-on-bbh"]
    assert real["n_rows"] == 8 and real["arms"]["chain"] + real["arms"]["direct"] == 1
    assert one["right-states-come-with-right-answers"]["arms"]["right states"] == 1

@pytest.mark.slow
def test_gpu_path_on_a_tiny_checkpoint(tmp_path, monkeypatch, torch_pool):
    monkeypatch.delenv("SLMKIT_DATA", raising=False)
    one, two = tiny_llama(tmp_path/"lm"), tiny_llama(tmp_path/"wide", 32)
    found = notebook(tmp_path, torch_pool, profile="gpu", model=one, steps=2, n=60, sizes=f"{one} {two}")
    assert set(found) == TRAINED | {"the-gain-grows-with-the-size"}  # without data there are no real rows
    assert {f"state, {one}", f"size, {two}"} <= set(found["the-gain-grows-with-the-size"]["arms"])
    assert all(math.isfinite(v) for r in found.values() for v in r["arms"].values())

@pytest.mark.slow
def test_paper_path_prompts_a_tiny_checkpoint(tmp_path, torch_pool, bbh):
    found = notebook(tmp_path, torch_pool, profile="paper", model=tiny_llama(tmp_path/"lm"))
    # it writes no state
    assert set(found) == {"chains-beat-answers-on-bbh"} and found["chains-beat-answers-on-bbh"]["n_rows"] == 80

@pytest.mark.parametrize("given,said_", [(dict(data="dice"), "no data 'dice'"),
        (dict(data="bbh"), "data bbh is not here")])
def test_what_can_not_be_run_is_said(tmp_path, monkeypatch, torch_pool, given, said_):
    monkeypatch.delenv("SLMKIT_DATA", raising=False)
    with pytest.raises(Failed, match=said_):
        notebook(tmp_path, torch_pool, profile="smoke", **given)

def test_the_sets_are_in_the_manifest():
    for name in ("bbh", "bbh-codex"):
        m = manifest()[name]
        assert len(m["commit"]) == 40
        assert "MIT" in m["licence"]
        assert all(len(f["sha256"]) == 64 for f in m["files"].values())

def test_figures_need_no_run():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    ways = ("state", "other", "none", "direct")
    for draw, arms, lines in ((steps_figure, {f"{w}_{k}": .5 for w in ways for k in (1, 3, 5)}, 5),
            (sizes_figure, {f"{w}, {s}": .5 for w in ways for s in "ab"} | {"size, a": 5., "size, b": 6.,
                "slope, gain": 1., "slope, direct": 0.}, 2), (tasks_figure, {f"{w}, {t}": x
                for w, x in (("direct", .2), ("chain", .9)) for t in "ab"} | dict(direct=.2, chain=.9, others=.1), 3)):
        fig, ax = plt.subplots()
        draw([dict(arms=arms)]*2, ax)
        assert len(ax.lines) == lines and ax.get_xlabel()
        plt.close(fig)
