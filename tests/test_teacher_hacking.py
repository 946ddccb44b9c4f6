"""Teacher hacking: exact distances against enumeration, sampling against its probabilities, checkpoints as teachers,
bad input."""
import itertools, math, random
import pytest, torch
from functools import partial
from pathlib import Path
from conftest import ran
from slmkit.core.settings import KitError
from slmkit.toyland.tokenizer import build_tokenizer
from slmkit.distill.teacher_hacking import (asked, copy_loss, copying, counted, distance, distil, exam, fixed, fresh,
    hacked, labelled, language, next_words, numbers, sample, say_loss, speaker)
from slmkit.toyland.grammar import Grammar, kl

NB = Path(__file__).parents[1]/"nbs/distill/teacher_hacking.ipynb"
SHAPE = dict(hidden_size=16, num_hidden_layers=1)
TEN = Grammar({"S": {"A B .": .75, "dog .": .25}, "A": {"dog": .5, "the dog": .5}, "B": {"cat": .4, "sees C": .6},
        "C": {"cat": .2, "the A": .8}})

@pytest.fixture(scope="module")
def g(): return language("small_grammar")
@pytest.fixture(scope="module")
def two(): return speaker(TEN, 1, **SHAPE), speaker(TEN, 2, **SHAPE)
def alone(model, grammar, sentence):
    "The log-probabilities after each word of one sentence that is asked alone, float64[words of it, words]."
    with torch.no_grad(): return next_words(model, numbers(grammar, [sentence]))[0, :len(sentence)].double()

# ---- the two distances

def test_distance_to_the_oracle_is_the_sum_over_all_sentences(two):
    sheet, brute = exam(TEN), 0.
    for s, p in TEN.sequences().items():
        q = sum(row[TEN.words.index(w)].item() for row, w in zip(alone(two[0], TEN, s), s))
        brute += p*(math.log(p) - q)
    assert brute > 1 and distance(sheet.weights, sheet.truth, asked(two[0], sheet)) == pytest.approx(brute, rel=1e-5)

def test_distance_to_the_teacher_is_the_mean_over_sentences(two):
    sheet, brute = exam(TEN), 0.
    for s, p in TEN.sequences().items():
        t, q = (alone(m, TEN, s) for m in two)
        brute += p*sum(math.exp(a)*(a - b) for x, y in zip(t.tolist(), q.tolist()) for a, b in zip(x, y))
    assert brute > .01
    assert distance(sheet.weights, asked(two[0], sheet), asked(two[1], sheet)) == pytest.approx(brute, rel=1e-4)

def test_distance_agrees_with_the_grammar_page(g):
    model, sheet = speaker(g, 3, **SHAPE), exam(g)
    @torch.no_grad()
    def by_prefix(prefixes):
        rows = torch.tensor([[0, *(g.words.index(w) + 1 for w in p)] for p in prefixes])
        return next_words(model, rows)[:, -1].double().numpy()
    assert distance(sheet.weights, sheet.truth, asked(model, sheet)) == pytest.approx(kl(g, by_prefix), rel=1e-5)

def test_every_beginning_is_in_the_exam_once_with_its_weight(g):
    sheet = exam(g)
    said = [tuple(g.words[i - 1] for i in sheet.ids[r, 1:c + 1].tolist()) for r, c in sheet.at.tolist()]
    assert said == list(g.tree) and len(set(said)) == len(said)
    assert sheet.weights[:40].tolist() == pytest.approx([sum(p for s, p in g.table.items() if s[:len(b)] == b)
            for b in said[:40]])
    assert distance(sheet.weights, sheet.truth, sheet.truth) == pytest.approx(0, abs=1e-9)

def test_the_exam_is_the_same_in_small_parts(two):
    sheet = exam(TEN)
    assert torch.allclose(asked(two[0], sheet, size=1), asked(two[0], sheet), atol=1e-5)

# ---- languages and texts

def test_languages(g):
    assert len(g.table) == 2592 and len(language("grammar").table) == 18_960
    assert math.fsum(g.table.values()) == pytest.approx(1) and set(g.words) < set(language("grammar").words)
    with pytest.raises(KitError, match="no language 'small_gramar': did you mean 'small_grammar'"):
        language("small_gramar")

def test_sampling_with_a_cache_has_the_probabilities(two):
    torch.manual_seed(0)
    n, drawn = 20_000, sample(two[0], 20_000, 4)
    sheet = exam(TEN)
    assert drawn.shape == (n, 5)
    assert (drawn[:, 0] == 0).all()
    assert drawn[:, 1:].min() >= 1
    assert drawn.max() == len(TEN.words)
    for words in (["dog"], ["dog", "cat"], ["dog", "cat", "."], ["the", "dog", "sees"]):
        ids = torch.tensor([TEN.words.index(w) + 1 for w in words])
        p = math.exp(sum(row[i - 1].item() for row, i in zip(alone(two[0], TEN, tuple(words)), ids)))
        share = (drawn[:, 1:len(ids) + 1] == ids).all(1).float().mean().item()
        assert abs(share - p) < 5*math.sqrt(p*(1 - p)/n), words

def test_a_low_temperature_says_fewer_different_texts(two):
    torch.manual_seed(0)
    def words(t): return len(sample(two[0], 500, 3, temperature=t).unique(dim=0))
    assert words(.02) < .5*words(1.)  # new weights are nearly flat: cool enough to show

def test_fixed_repeats_and_fresh_does_not(two):
    torch.manual_seed(0)
    rows = labelled(sample(two[0], 5, 6), two[0])
    known = {tuple(r) for r in rows["input_ids"].tolist()}
    seen = [tuple(r) for b in itertools.islice(fixed(4, **rows), 30) for r in b["input_ids"].tolist()]
    assert set(seen) == known
    new = [tuple(r) for b in itertools.islice(fresh(4, 6, *two, ahead=2), 30) for r in b["input_ids"].tolist()]
    assert len(new) == 120 and len(set(new)) > 60
    batch = next(fresh(4, 6, *two))
    with torch.no_grad(): by_teacher, by_speaker = (next_words(m, batch["input_ids"]) for m in (two[1], two[0]))
    assert torch.allclose(batch["labels"], by_teacher, atol=1e-5)
    assert not torch.allclose(batch["labels"], by_speaker, atol=1e-2)

# ---- losses

def test_copy_loss_is_torch_kl_in_value_and_gradient():
    torch.manual_seed(0)
    target, z = torch.randn(3, 5, 7).log_softmax(-1), torch.randn(3, 5, 7, requires_grad=True)
    mask = torch.rand(3, 5) < .5
    peer = torch.nn.functional.kl_div(z.log_softmax(-1), target, log_target=True, reduction="none").sum(-1)
    peer = (peer*mask).sum()/mask.sum()
    mine = copy_loss(target, z.log_softmax(-1), mask)
    assert mine.item() == pytest.approx(peer.item(), rel=1e-5)
    assert torch.allclose(*(torch.autograd.grad(x, z, retain_graph=True)[0] for x in (mine, peer)), atol=1e-6)

def test_losses_ignore_what_comes_after_the_full_stop(two):
    stop = TEN.words.index(".") + 1
    ids = numbers(TEN, [("dog", "."), ("dog", "cat", ".")])
    other = ids.clone()
    other[0, 3:] = 2
    other[1, 4:] = 3
    for loss, batch in ((say_loss(stop), lambda x: dict(input_ids=x)), (copying(stop), lambda x: labelled(x, two[1]))):
        with torch.no_grad():
            assert loss(two[0], batch(ids)).item() == pytest.approx(loss(two[0], batch(other)).item(), rel=1e-5)
    assert counted(ids, stop).sum(1).tolist() == [2, 3]

def test_say_loss_is_the_log_probability_of_the_words(two):
    s, stop = ("dog", "cat", "."), TEN.words.index(".") + 1
    by_hand = -sum(row[TEN.words.index(w)].item() for row, w in zip(alone(two[0], TEN, s), s))/3
    with torch.no_grad():
        assert say_loss(stop)(two[0], dict(input_ids=numbers(TEN, [s]))).item() == pytest.approx(by_hand, rel=1e-5)

def test_training_nears_the_teacher_and_history_has_every_mark():
    teacher, student, sheet = speaker(TEN, 1, **SHAPE), speaker(TEN, 2, **SHAPE), exam(TEN)
    stop, taught = TEN.words.index(".") + 1, asked(teacher, sheet)
    h = distil(student, fresh(8, 6, teacher, teacher), copying(stop), sheet, taught, [1, 10, 60], 1e-2)
    assert len(h.oracle) == len(h.teacher) == 3 and h.steps == 60 and h.teacher[-1] < .5*h.teacher[0]
    assert h.teacher[-1] == distance(sheet.weights, taught, asked(student, sheet))
    assert h.oracle[-1] == distance(sheet.weights, sheet.truth, asked(student, sheet))

def test_hacked_against_its_definition():
    rng = random.Random(0)
    for _ in range(50):
        proxy, golden = [[rng.random() for _ in range(6)] for _ in range(2)]
        chosen = proxy.index(min(proxy))
        assert hacked(proxy, golden) == max(golden[chosen] - golden[i] for i in range(chosen + 1)) >= 0

# ---- checkpoints and the notebook

@pytest.fixture
def tiny(tmp_path):
    "A decoder's checkpoint with the zoo's tokenizer."
    from transformers import LlamaConfig, LlamaForCausalLM
    tok = build_tokenizer()
    tok.save_pretrained(tmp_path/"llama")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tok), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path/"llama")
    return str(tmp_path/"llama")

run = partial(ran, NB)

def test_a_checkpoint_speaks_the_grammars_words(tiny, g):
    model, tok = speaker(g, 0, tiny), build_tokenizer()
    assert tok.convert_ids_to_tokens(model.table[1:].tolist()) == ["▁" + w for w in g.words]
    s = ("the", "dog", "sleeps", ".")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[model.table[0],
                *tok(" ".join(s), add_special_tokens=False)["input_ids"]]])).logits[0, :, model.table[1:]]
    assert torch.allclose(next_words(model, numbers(g, [s]))[0, :5], logits.log_softmax(-1), atol=1e-5)
    assert sample(model, 3, 5).max() <= len(g.words)

@pytest.mark.slow
def test_gpu_path_on_a_tiny_checkpoint(tmp_path, torch_pool, tiny):
    found = run(tmp_path, torch_pool, profile="gpu", model=tiny, data="small_grammar", read=40, texts=24,
        teach=4, steps=4)
    assert set(found) == {"few-fixed-texts-are-hacked", "diversity-prevents-hacking"}
    arms = found["diversity-prevents-hacking"]["arms"]
    assert found["diversity-prevents-hacking"]["n_rows"] == 3671
    assert {"fixed_hacked", "diverse_hacked", "cool_hacked", "perfect_rise"} <= set(arms)
    assert all(math.isfinite(v) for v in arms.values()) and found["diversity-prevents-hacking"]["model"] == tiny

@pytest.mark.slow
def test_same_seed_same_record(tmp_path, torch_pool):
    one, two = (run(tmp_path, torch_pool, name, profile="smoke", seed=3) for name in ("one", "two"))
    assert one == two and len(one) == 1  # the second claim's arms are slow

def test_what_is_no_decoder_is_refused(g):
    with pytest.raises(KitError, match="no causal model"): speaker(g, 0, "t5-1m")

def test_a_tokenizer_that_breaks_words_is_refused(tmp_path, g, tiny):
    from transformers import PreTrainedTokenizerFast
    from tokenizers import Tokenizer, models, pre_tokenizers
    letters = {c: i for i, c in enumerate(["<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz."])}
    t = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=t, unk_token="<unk>", eos_token="</s>").save_pretrained(tiny)
    with pytest.raises(KitError, match="is not one token"): speaker(g, 0, tiny)
