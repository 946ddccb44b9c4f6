"A metric calls right what a tokenizer gives back of a right answer, for every set with labels; wrong stays wrong."
import os
from pathlib import Path
import pytest
from slmkit.core.score import METRICS, correct, number, numbers, short_answer
from slmkit.core.sets import known_set, manifest

LABELLED = [n for n, m in manifest().items() if "label" in m["columns"]]
HARD = ["Crème brûlée", "Bạch Đằng", "Texas A&M", '"Ménage à Troi"', "U.S.A.", "don't know", "20–18", "entailment",
        "card arrival", "( 84.0 / 2.0 )", "-5", "1,234.5", ".625", "05/01/2021", "y;y;s", "(A)",
        "565 °C", "Hydro\xadgen"]
NUMBERS = ["-5", "1,234.5", "0.625", "39", "192000000", "87"]
MARKED = ["हिन्दी", "कुल", "ภาษาไทย"]  # their marks are letters; an uncased BERT drops them and can't be right

def texts(): return [*HARD, *NUMBERS, *MARKED]*3  # to train on

def byte_bpe():
    "A byte-level BPE as SmolLM2's is: digits apart, no prefix space."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                               pre_tokenizers.ByteLevel(add_prefix_space=False)])
    t.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(texts(), trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    return t

def wordpiece():
    "A WordPiece as BERT's is: small letters, no accents, every character of its own."
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    t = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    t.normalizer, t.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    t.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    t.train_from_iterator(texts(), trainer)
    return t

@pytest.fixture(scope="module", params=["byte_bpe", "wordpiece", "smollm2-135m", "minilm-l6"])
def tokenizer(request):
    "One of our own two, or that of a real model where SLMKIT_MODELS has it."
    if request.param in globals(): return globals()[request.param]()
    path = Path(os.environ.get("SLMKIT_MODELS") or "/nowhere", request.param, "tokenizer.json")
    if not path.is_file(): pytest.skip(f"no {request.param} in SLMKIT_MODELS")
    from tokenizers import Tokenizer
    return Tokenizer.from_file(str(path))

def bare(tokenizer, text):
    "What the tokenizer gives back, without [CLS] and the like; None where it does not know a character."
    ids = tokenizer.encode(text, add_special_tokens=False)
    return None if "[UNK]" in ids.tokens else tokenizer.decode(ids.ids)

@pytest.mark.parametrize("metric", METRICS)
def test_hard_labels_come_back_right(tokenizer, metric):
    known = {"exact": HARD, "short_answer": HARD, "equation": ["( 84.0 / 2.0 )", "( 3.0 - 1.5 )"],
             "number": NUMBERS}[metric]
    said = [(bare(tokenizer, x), x) for x in known]
    assert [p for p in said if p[0] is not None and not METRICS[metric](*p)] == []
    assert len([p for p in said if p[0]]) >= len(known)*2/3

def test_words_that_differ_in_a_vowel_sign_are_different():
    bpe = byte_bpe()
    assert all(METRICS["exact"](bare(bpe, x), x) for x in MARKED) and not METRICS["exact"]("कल", "कुल")

def labels_of(name):
    "All right answers of a published set."
    m = manifest()[name]
    parts = [s for s in ("train", "valid", "test") if s in m["files"] or "divided" in m and s != "valid"]
    return sorted({x for p in parts for r in known_set(name, p) for x in r.get("answers", [r["label"]])})

@pytest.mark.skipif(not os.environ.get("SLMKIT_DATA"), reason="SLMKIT_DATA is not set")
@pytest.mark.parametrize("name", LABELLED)
def test_labels_of_published_sets_come_back_right(tokenizer, name):
    metric, labels = METRICS[manifest()[name]["metric"]], labels_of(name)
    said = [(b, x) for x in labels if (b := bare(tokenizer, x)) is not None]
    assert [p for p in said if not metric(*p)] == []
    assert said or len(labels) < 30

def test_labels_of_a_set_are_told_apart():
    "Two labels that a metric takes for one would make a wrong answer right."
    for name in LABELLED:
        m = manifest()[name]
        words = m.get("choices", []) + list(m.get("labels", {}).values())
        metric = METRICS[m["metric"]]
        assert not [(a, b) for a in words for b in words if a != b and metric(a, b)], name

@pytest.mark.parametrize("said, right", [("She has 18 left.", "18"), ("$1,234.50 in all", "1234.5"),
    ("it is - 3", "-3"), ("84 / 2 = 42 .", "42"), ("1, 234. 5", "1234.5"), ("The answer is .25", "0.25"),
    ("10-4=6", "6"), ("18 eggs", "18")])
def test_a_right_number_is_right(said, right): assert number(said, right)

@pytest.mark.parametrize("said, right", [("18 or 19", "18"), ("none", "18"), ("", "18"), ("118", "18"), ("3", "-3"),
    ("1.8", "18"), ("10 - 4", "-4")])
def test_a_wrong_number_is_wrong(said, right): assert not number(said, right)

def test_numbers_of_a_text(): assert numbers("48/2 = 24, 1,000 and -3") == [48, 2, 24, 1000, -3]

def test_short_answers_and_several_right_ones():
    assert short_answer("The Beatles.", "beatles") and not short_answer("the", "a")
    assert correct(["rontgen", "x"], [["Wilhelm", "Röntgen"], ["y", "z"]], "short_answer") == [True, False]
