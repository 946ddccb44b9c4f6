"Trimming and extending a table: the same logits, BPE as the tokenizers library applies it, transformers' resize."

import copy, random
from collections import Counter
import pytest
import torch
from slmkit.core.zoo import load_model
from slmkit.pretrain import vocabulary_trimming as v

@pytest.fixture(scope="module")
def pair():
    return load_model("smollm2-random", kind="causal", device="cpu", dtype=torch.float32)

TEXTS = ["the baker sells bread in the old town .", "who owns the 12 red boats ?"]

def test_a_trimmed_model_gives_the_kept_logits(pair):
    model, tok = pair
    keep = v.kept_pieces(tok, Counter(i for ids in tok(TEXTS)["input_ids"] for i in ids))
    assert len(keep) < len(tok) and set(tok.added_tokens_decoder) <= set(keep)
    small, small_tok = v.trimmed(model, tok, keep)
    for text in TEXTS:
        ids, own = (t(text, return_tensors="pt")["input_ids"] for t in (tok, small_tok))
        assert [keep[i] for i in own[0]] == ids[0].tolist() and small_tok.decode(own[0]) == text
        assert torch.allclose(model(ids).logits[..., keep], small(own).logits, atol=1e-5)
    assert small.get_output_embeddings().weight is small.get_input_embeddings().weight
    assert small_tok.eos_token == tok.eos_token and small.config.eos_token_id == small_tok.eos_token_id
    assert model.config.vocab_size == len(model.get_input_embeddings().weight)  # the original is as it was

def test_unforeseen_text_is_spelled_and_comes_back(pair):
    model, tok = pair
    small_tok = v.trimmed_tokenizer(tok, v.kept_pieces(tok, Counter()))
    for text in [*TEXTS, "Žluťoučký kůň, 12 £"]:
        assert small_tok.decode(small_tok(text)["input_ids"]) == text
        assert len(small_tok(text)["input_ids"]) > len(tok(text)["input_ids"]) or "Ž" in text

def test_a_budget_of_pieces_is_kept_and_closed(pair):
    _, tok = pair
    counts, parts = Counter(range(300, 700)), v.merges_of(tok)
    keep = v.kept_pieces(tok, counts, most=500)
    assert len(keep) == 500 and set(v.with_parts(keep, parts)) == set(keep)
    assert v.kept_pieces(tok, counts, most=10**6) == list(range(len(tok)))

def test_an_untied_head_is_trimmed_too(pair):
    model, tok = pair
    untied = copy.deepcopy(model)
    untied.get_output_embeddings().weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    keep = v.kept_pieces(tok, Counter(tok(TEXTS[0])["input_ids"]))
    small, small_tok = v.trimmed(untied, tok, keep)
    ids, own = (t(TEXTS[0], return_tensors="pt")["input_ids"] for t in (tok, small_tok))
    assert torch.allclose(untied(ids).logits[..., keep], small(own).logits, atol=1e-4)

def test_merges_are_those_that_the_tokenizers_library_learns():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    rng = random.Random(0)
    texts = [" ".join("".join(rng.choices("abc", (5, 3, 2), k=4)) for _ in range(30)) for _ in range(8)]
    words, alphabet = Counter(w for t in texts for w in t.split()), ["a", "b", "c"]
    words = {tuple(w): n for w, n in words.items()}
    peer = Tokenizer(models.BPE())
    peer.pre_tokenizer = pre_tokenizers.Whitespace()
    peer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=6, initial_alphabet=alphabet, show_progress=False))
    for place in (3, 4, 5):
        pair = v.frequent_pair(words)
        assert peer.id_to_token(place) == "".join(pair)
        words = {v.merged(w, pair): n for w, n in words.items()}

def test_an_extended_tokenizer_spells_as_before_or_shorter(pair):
    model, tok = pair
    texts = ["карта деньги карта", "деньги фильм"]*3
    merges = v.learn_merges(tok, texts, 15)
    wide, wide_tok = v.extended(model, tok, merges, "pieces")
    old = [tok.convert_ids_to_tokens(ids) for ids in v.old_pieces(tok, merges)]
    assert ["".join(x) for x in old] == ["".join(m) for m in merges]
    for text in texts + TEXTS:
        ids = wide_tok(text)["input_ids"]
        assert wide_tok.decode(ids) == text and len(ids) <= len(tok(text)["input_ids"])
    assert max(wide_tok(texts)["input_ids"][0]) >= len(tok)
    first = wide.get_input_embeddings().weight[len(tok)]
    assert torch.allclose(first, model.get_input_embeddings().weight[v.old_pieces(tok, merges)[0]].mean(0))

def test_the_mean_of_all_is_what_transformers_resizes_to(pair):
    model, tok = pair
    merges = v.learn_merges(tok, ["карта деньги"]*3, 5)
    peer = copy.deepcopy(model)
    peer.resize_token_embeddings(len(tok) + 5, mean_resizing=True)
    rows = v.extended(model, tok, merges, "all")[0].get_input_embeddings().weight
    assert (peer.get_input_embeddings().weight - rows).abs().max() < .01*rows.std()

def test_nats_a_character_are_the_models_own_loss(pair):
    model, tok = pair
    for text, mine in zip(TEXTS, v.nats_a_character(model, tok, TEXTS)):
        ids = torch.tensor([[tok.eos_token_id, *tok(text)["input_ids"]]])
        assert abs(model(ids, labels=ids).loss.item()*(ids.numel() - 1)/len(text) - mine) < 1e-4
