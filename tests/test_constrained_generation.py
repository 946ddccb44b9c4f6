"""Masks against brute force and transformers' own; code that is put in; stages that can't be run."""
from itertools import product
import pytest, torch
from slmkit.core.answers import text_ids
from slmkit.core.zoo import load_model
from slmkit.reason.constrained_generation import (allowed_tokens, choose, executed, interrupted, masked, next_tokens,
                                                  one_of)


def test_the_mask_allows_what_brute_force_can_still_complete():
    options, vocabulary = ["ab", "abc", "ca"], ["", "a", "b", "c", " ", " a", "bc", "\n", "ca"]
    whole = {f" {o}\n" for o in options}
    reach = {"".join(x) for n in range(6) for x in product(vocabulary, repeat=n) if "".join(x) in whole} | whole
    for so_far in ("", " ", " a", " ab", " c", " ca", " ca\n"):
        brute = [i for i, p in enumerate(vocabulary) if p and any(w.startswith(so_far + p) for w in reach)]
        assert allowed_tokens(one_of(options), so_far, vocabulary) == brute


def test_choose_is_greedy_generation_with_allowed_tokens():
    model, tok = load_model("lm-1m", kind="causal")
    words, asks = ["good", "bad news", "bad", "oslo"], ["how was the shop ?", "which town ?"]
    tree = text_ids(tok, [f" {w}\n" for w in words], start=False)
    chosen, calls = choose(model, tok, asks, words)
    assert all(0 < c <= 2 for c in calls)
    for ask, word in zip(asks, chosen):
        ids = torch.tensor(text_ids(tok, [ask]))
        allowed = lambda _, seen, n=ids.shape[1]: next_tokens(seen[n:].tolist(), tree) or [tok.eos_token_id]
        out = model.generate(ids, max_new_tokens=max(map(len, tree)), do_sample=False, prefix_allowed_tokens_fn=allowed)
        own = tree[words.index(word)]
        assert out[0, ids.shape[1]:].tolist()[:len(own)] == own


def test_masked_is_normalized_among_the_allowed():
    log_p = masked(torch.tensor([1., 2., 3.]), [0, 1])
    assert log_p.exp().sum() == pytest.approx(1) and log_p[2] == float("-inf")


def test_code_is_put_in_only_where_it_was_asked_for():
    said = {"a": "program : 2 + 3 ; 9 . number is 9 .", "b": "no program . fine ."}
    def write(prompts): return [said.get(p) or "number is " + p.split(" ; ")[1].split()[0] + " ." for p in prompts]
    ran, own = interrupted(write, ["a", "b"])
    assert ran == ["number is 5 .", "fine ."] and own == ["9 . number is 9 .".partition(" . ")[2], "fine ."]


def test_what_cannot_be_run_is_no_answer():
    table = "items : item , price ; balls , 4 ; plums , 5 ."
    assert executed(f"{table} select sum ( price ) from items answer : 1") == "9"
    assert [executed(t) for t in ("", table, "x . select", f"{table} select y from z")] == [""]*4
