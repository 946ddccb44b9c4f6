"BM25 by its definition, weighted cosine and mutual information as in scikit-learn, pools without the answer."

import math, os, random
import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import mutual_info_score
from sklearn.metrics.pairwise import cosine_similarity
from slmkit.core.score import exact
from slmkit.reason import example_selection as e

HERE = bool(os.environ.get("SLMKIT_DATA"))
LINES = ["what rivers are in texas", "what is the capital of texas", "how long is the ohio river", "texas", "what what"]

def by_definition(query, docs, k1, b):
    "Each document's score, word by word."
    N, mean = len(docs), sum(map(len, docs))/len(docs)
    def part(t, d):
        n, f = sum(t in o for o in docs), d.count(t)
        return math.log(1 + (N - n + .5)/(n + .5))*f*(k1 + 1)/(f + k1*(1 - b + b*len(d)/mean))
    return [sum(part(t, d) for t in set(query)) for d in docs]

@pytest.mark.parametrize("k1, b", [(1.5, .75), (.5, 0.), (2., 1.)])
def test_bm25_follows_its_definition(k1, b):
    docs = [e.words(line) for line in LINES]
    for query in docs: assert np.allclose(e.bm25(query, docs, k1, b), by_definition(query, docs, k1, b))

def test_weighted_cosine_is_scikit_learns():
    docs = [e.words(line) for line in LINES]
    counts = CountVectorizer(binary=True, tokenizer=e.words, token_pattern=None)
    X, weight = counts.fit_transform(LINES), e.information(docs)
    scale = np.array([weight[w] for w in counts.get_feature_names_out()])
    for i, d in enumerate(docs):
        theirs = cosine_similarity(X[[i]].multiply(scale), X.multiply(scale))[0]
        assert np.allclose(e.weighted_cosine(d, docs, weight), theirs)

def test_a_query_of_unknown_words_is_near_to_nothing():
    docs = [e.words(line) for line in LINES]
    assert not e.weighted_cosine(["utah"], docs, e.information(docs)).any() and not e.bm25(["utah"], docs).any()

def test_mutual_information_is_scikit_learns():
    rng = random.Random(0)
    for n in range(2, 30):
        x, y = ([rng.randrange(4) for _ in range(n)] for _ in range(2))
        assert abs(e.mutual_information(x, y) - mutual_info_score(x, y)) < 1e-12

@pytest.mark.parametrize("how", ["random", "length", "bm25"])
def test_the_answer_never_stands_in_the_pool(how):
    rows, rng = e.made_up(), random.Random(0)
    rows += [dict(r, id=r["id"] + "-again", input=r["input"].replace("what is", "tell me")) for r in rows]
    for row in rows[:20]:
        demos = e.demonstrations(row, e.others(row, rows), 3, how, rng)
        assert len(demos) == 3 and row["label"] not in {d["label"] for d in demos}

def test_the_nearest_stands_last():
    assert e.nearest([.1, .9, .5, .9], 3) == [2, 3, 1]

def test_the_rule_takes_the_longest_name_of_the_question():
    near = dict(label="select area from state where state_name = 'texas'")
    assert "'west virginia'" in e.swapped("area of west virginia", near, ["texas", "virginia", "west virginia"])
    assert e.swapped("largest state", near, ["texas"]) == near["label"]

def test_reranking_takes_the_answer_most_like_the_demonstration():
    assert e.token_f1("a b", "b c") == .5 and e.token_f1("", "a") == 0
    assert e.rerank(["x y", "a b z", "a b"], "a b c") == "a b"

def test_types_shown_counts_types_not_entities():
    row = lambda *tags: dict(ner_tags=list(tags))
    assert e.types_shown(row("B-person", "B-person", "B-group"), [row("B-person", "I-group")]) == .5

@pytest.mark.skipif(not HERE, reason="needs GeoQuery: SLMKIT_DATA")
def test_geoquery_rows_are_short_different_and_readable():
    rows = e.sql_rows()
    assert len(rows) == 438 and len({r["id"] for r in rows}) == 438
    assert all(r["label"].startswith("select") and "alias" not in r["label"] and len(r["label"]) <= 72 for r in rows)
    assert all(exact(e.first_line(f" {r['label']}\n\nQuestion: x"), r["label"]) for r in rows)
