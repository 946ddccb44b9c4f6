"Prompt compression: greedy dropping against all subsets, the one-step gradient against enumeration and ridge, budgets."
import itertools
import numpy as np
import pytest
from sklearn.linear_model import Ridge
from slmkit.compress.prompt_compression import (described, drop_words, gold_sentence, heaviest, importance, made_up,
    question_prompt, reward_weights, sentence_order, sentences, shuffled, squeezed, within)

class Words:
    "A tokenizer with as many tokens as a word has letters."
    def __call__(self, texts, **kw): return dict(input_ids=[[1]*len(t.strip()) for t in texts])

def letters(texts):
    counts = np.array([[t.count(c) + 1e-3*k for k, c in enumerate("abcdef", 1)] for t in texts], dtype=float)
    return counts/np.linalg.norm(counts, axis=1, keepdims=True)

def test_words_fill_the_budget_and_keep_their_order():
    assert squeezed("aaa b cc dddd", [3, 1, 0, 2], Words(), 6) == "b dddd"
    assert squeezed("aaa b", [0, 1], Words(), 0) == ""
    assert within([1, 0], [2, 2], 3) == [1]

@pytest.mark.parametrize("text", ["aa b c", "ab ba cc d", "f a a a b"])
def test_dropping_one_word_is_the_best_of_all(text):
    words = text.split()
    near = lambda w: letters([" ".join(w)])[0] @ letters([text])[0]
    best = max(itertools.combinations(words, len(words) - 1), key=near)
    assert drop_words(words, letters, len(words) - 1) == list(best)

def test_greedy_dropping_reaches_the_best_subset_where_words_add_up():
    words = "aaaa bbb cc d".split()
    whole = letters([" ".join(words)])[0]
    subsets = itertools.combinations(words, 2)
    assert drop_words(words, letters, 2) == list(max(subsets, key=lambda w: letters([" ".join(w)])[0] @ whole))

def test_importance_is_one_less_cosine_in_the_sentence():
    text = "Aab b. Cc d e."
    found = importance(text, letters)
    assert sentences(text) == ["Aab b.", "Cc d e."] and len(found) == 5
    assert np.isclose(found[1], 1 - letters(["Aab"])[0] @ letters(["Aab b."])[0])
    assert len(importance("alone", letters)) == 1

def test_the_step_is_ridge_without_an_intercept():
    rng = np.random.default_rng(0)
    reward, phi = rng.normal(size=(40, 2)), rng.normal(size=(40, 2, 3))
    theirs = Ridge(alpha=.7, fit_intercept=False).fit(phi[:, 0] - phi[:, 1], reward[:, 0] - reward[:, 1]).coef_
    assert np.allclose(reward_weights(reward, phi, .7), theirs)

def test_pairs_of_samples_give_the_policy_gradient():
    "Half the mean of dr·dPhi over all pairs is the gradient of the expected reward at theta = 0, by enumeration."
    features, reward = np.array([[0., 1], [1, 0], [1, 1]]), np.array([.2, 1.5, -.4])  # of three possible texts
    def expected(theta):
        p = np.exp(features @ theta)
        return (p/p.sum()) @ reward
    step = 1e-5*np.eye(2)
    exact = np.array([(expected(s) - expected(-s))/2e-5 for s in step])
    pairs = itertools.product(range(3), repeat=2)
    ours = np.mean([(reward[i] - reward[j])*(features[i] - features[j])/2 for i, j in pairs], axis=0)
    assert np.allclose(ours, exact, atol=1e-8)

def test_words_are_described_without_the_question():
    found = described("In 1999 Ann built it. She left.")
    assert found.shape == (7, 5) and found[1, 0] == 1 and found[2, 1] == 1 and found[5, 1] == 0
    assert found[0, 2] == 1 and found[0, 4] == 1

def test_the_sentence_near_the_question_comes_first():
    order = sentence_order("Aa bb. Cc dd.", "c d", letters)
    assert order == [2, 3, 0, 1] and heaviest([1, 3, 3]) == [1, 2, 0]

def test_the_gold_sentence_holds_the_answer():
    for row in made_up(3):
        assert row["answer"] in gold_sentence(row) and row["passage"][row["start"]:].startswith(row["answer"])
    assert gold_sentence(dict(passage="One a. Two b.", start=7)) == "Two b."

def test_samples_are_the_same_each_time():
    row = made_up(1)[0]
    assert shuffled(row, 0) == shuffled(row, 0) != shuffled(row, 1)
    assert question_prompt("x", "y?").endswith("y?\nAnswer:")
