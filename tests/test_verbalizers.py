"Verbalizers: class scores by their definition, margins, and precision at a recall as in scikit-learn."

import random
import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_curve
from slmkit.core.zoo import load_model
from slmkit.reason import verbalizers as v

NAMES = ["cooking", "music", "sport"]

@pytest.fixture(scope="module")
def bert(): return load_model("bert-1m", kind="masked")

def test_a_class_has_the_mean_log_probability_of_its_words():
    logits, words = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)), [[1], [2, 3], [4, 5, 6]]
    log_p = logits.log_softmax(-1)
    want = torch.stack([log_p[:, 1], log_p[:, 2:4].mean(1), log_p[:, 4:7].mean(1)], 1)
    assert torch.allclose(v.verbalized(logits, words), want - want.logsumexp(1, keepdim=True), atol=1e-6)

def test_every_template_ends_in_one_blank_and_every_name_is_one_word(bert):
    _, tok = bert
    assert all(len(ids) == 1 for ids in v.word_ids(tok, NAMES))
    assert all("{input}" in t for t in v.TEMPLATES)

def test_cloze_scores_do_not_depend_on_the_company_of_a_text(bert):
    texts = ["tina brings the flute .", "emil likes the ship . emil likes the ticket . lena sees the hotel .", "no ."]
    together = v.cloze_scores(*bert, texts, v.TEMPLATES[0], NAMES)
    alone = torch.cat([v.cloze_scores(*bert, [t], v.TEMPLATES[0], NAMES) for t in texts])
    assert torch.allclose(together, alone, atol=1e-4) and torch.allclose(together.exp().sum(1), torch.ones(3))

def test_calibration_leaves_no_class_ahead():
    log_p = torch.randn(20, 4).log_softmax(-1)
    centred = v.batch_calibrated(log_p) - v.batch_calibrated(log_p).mean(1, keepdim=True)
    assert torch.allclose(centred.mean(0), torch.zeros(4), atol=1e-5)

def test_a_cloze_learns_its_rows_with_any_words(bert):
    base, tok = bert
    rows = [dict(input=f"{w} {w} .", label=l) for w, l in zip("flute ship oven".split(), NAMES)]*4
    for words in (NAMES, NAMES[1:] + NAMES[:1]):
        model = v.fine_tuned_cloze(base, tok, rows, v.TEMPLATES[0], NAMES, words, .03, 40, 0)
        said = v.cloze_scores(model, tok, [r["input"] for r in rows], v.TEMPLATES[0], words).argmax(1)
        assert [NAMES[i] for i in said] == [r["label"] for r in rows]

def test_precision_at_recall_is_scikit_learns():
    rng = random.Random(0)
    for n in range(4, 40):
        scores, labels = [rng.choice([.1, .2, .5, .7, .9]) for _ in range(n)], [i % 3 == 0 for i in range(n)]
        precision, recall, _ = precision_recall_curve(labels, scores)
        assert abs(v.precision_at_recall(scores, labels, .8) - precision[recall >= .8].max()) < 1e-9

def test_margins_are_those_of_the_two_best():
    p = torch.tensor([[.5, .3, .2], [.34, .33, .33], [.9, .05, .05]])
    assert v.uncertain(p.log(), 3) == [1, 0, 2]

def test_the_opinion_stands_behind_the_text():
    told = v.with_opinion("sst2", dict(input="dull ."), "negative", .94)
    assert told.splitlines() == ["Review: dull .", "A small model says: Negative (0.9)", "Sentiment:"]

def test_overrides_are_counted_by_confidence():
    found = v.overridden(["a", "b", "a"], [("a", .95), ("a", .95), ("b", .5)])
    assert found == {"0.5 to 0.7": 1., "0.9 to 1": .5}
