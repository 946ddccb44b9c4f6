"""Teacher hacking: exact distances against enumeration, texts and their labels, losses, the excess, bad input."""
import itertools, math, random
import pytest, torch
from types import SimpleNamespace
from slmkit.core.settings import KitError
from slmkit.distill.objectives import kl, word_model
from slmkit.distill.teacher_hacking import (HackTrial, copy_loss, distance, encode_sentences, epochs, excess, first,
    in_text, labelled, language, oracle_logs, oracle_texts, say_loss, teacher_texts, watched, word_logs)
from slmkit.toyland import grammar as page
from slmkit.toyland.grammar import Grammar

SHAPE = dict(hidden_size=16, num_hidden_layers=1)
CFG = SimpleNamespace(data="small_grammar", read=40, teacher=SHAPE, student=SHAPE, teach=20, steps=8, marks=[2, 5])
TEN = Grammar({"S": {"A B .": .75, "dog .": .25}, "A": {"dog": .5, "the dog": .5}, "B": {"cat": .4, "sees C": .6},
        "C": {"cat": .2, "the A": .8}})
STOP = TEN.words.index(".") + 1

@pytest.fixture(scope="module")
def two(): return word_model(1, len(TEN.words), **SHAPE), word_model(2, len(TEN.words), **SHAPE)
@pytest.fixture(scope="module")
def trial(): return HackTrial(CFG, 0)

@torch.no_grad()
def alone(model, grammar, sentence):
    "The log-probabilities before each word of one sentence that is asked alone, float64[words of it, words]."
    return word_logs(model, encode_sentences(grammar, [sentence]))[0, :len(sentence)].double()

@torch.no_grad()
def measured(grammar, target, model):
    ids, p = encode_sentences(grammar, grammar.table), torch.tensor(list(grammar.table.values()), dtype=torch.float64)
    return distance(p, target(ids), word_logs(model, ids), in_text(ids, grammar.words.index(".") + 1))

# ---- the two distances

def test_distance_to_the_oracle_is_the_divergence_of_whole_sentences(two):
    brute = 0.
    for s, p in TEN.sequences().items():
        q = sum(row[TEN.words.index(w)].item() for row, w in zip(alone(two[0], TEN, s), s))
        brute += p*(math.log(p) - q)
    assert brute > 1
    assert measured(TEN, lambda ids: oracle_logs(TEN, list(TEN.table)), two[0]) == pytest.approx(brute, rel=1e-5)

def test_distance_to_the_teacher_is_the_mean_over_sentences(two):
    brute = 0.
    for s, p in TEN.sequences().items():
        t, q = (alone(m, TEN, s) for m in two)
        brute += p*sum(math.exp(a)*(a - b) for x, y in zip(t.tolist(), q.tolist()) for a, b in zip(x, y))
    assert brute > .01 and measured(TEN, lambda ids: word_logs(two[0], ids), two[1]) == pytest.approx(brute, rel=1e-4)

def test_distance_agrees_with_the_grammar_page(trial):
    @torch.no_grad()
    def by_prefix(prefixes):
        rows = torch.tensor([[0, *(trial.grammar.words.index(w) + 1 for w in p), 0] for p in prefixes])
        return word_logs(trial.student, rows)[:, -1].double().numpy()
    found = trial.distances(trial.student)["oracle"]
    assert found == pytest.approx(page.kl(trial.grammar, by_prefix), rel=1e-5)

def test_the_teacher_is_no_distance_from_itself(trial):
    assert trial.distances(trial.teacher)["teacher"] == pytest.approx(0, abs=1e-6)
    assert trial.distances(trial.teacher)["oracle"] == pytest.approx(
        distance(trial.p, trial.oracle, trial.taught, trial.mask))
    assert distance(trial.p, trial.oracle, trial.oracle, trial.mask) == pytest.approx(0, abs=1e-9)

def test_oracle_logs_are_the_grammars_next_words():
    s = ("dog", "sees", "the", "dog", ".")
    logs = oracle_logs(TEN, [s])
    for i in range(len(s)):
        right = TEN.next_tokens(s[:i])
        assert {w: p for w, p in zip(TEN.words, logs[0, i].exp().tolist()) if p > 1e-30} == pytest.approx(right)

# ---- languages and texts

def test_languages():
    small = language("small_grammar")
    assert len(small.table) == 2592 and len(language("grammar").table) == 18_960
    assert math.fsum(small.table.values()) == pytest.approx(1) and set(small.words) < set(language("grammar").words)
    with pytest.raises(KitError, match="no language 'small_gramar': did you mean 'small_grammar'"):
        language("small_gramar")

def test_epochs_show_each_text_once_before_any_twice():
    torch.manual_seed(0)
    found = [b["input_ids"][:, 0].tolist() for b in itertools.islice(epochs(4, input_ids=torch.arange(12)[:, None]), 6)]
    for part in (found[:3], found[3:]): assert sorted(sum(part, [])) == list(range(12))
    assert found[:3] != found[3:]

def test_texts_are_labelled_by_whoever_says_them(trial):
    rows, right = teacher_texts(trial, 20), oracle_texts(trial, 20)
    assert torch.equal(first(teacher_texts(trial, 20), 5)["input_ids"], rows["input_ids"][:5])
    with torch.no_grad(): assert torch.allclose(rows["labels"], word_logs(trial.teacher, rows["input_ids"]))
    mask, table = in_text(right["input_ids"], trial.stop), list(trial.grammar.table)
    known = {tuple(r): i for i, r in enumerate(trial.ids.tolist())}
    for ids, labels, here in zip(right["input_ids"].tolist(), right["labels"], mask):
        assert torch.allclose(labels[here], trial.oracle[known[tuple(ids)]][here])
    assert len(teacher_texts(trial, 300, .05)["input_ids"].unique(dim=0)) < len(
        teacher_texts(trial, 300)["input_ids"].unique(dim=0)) and len(table) == 2592

# ---- losses

def test_copy_loss_is_torch_kl_in_value_and_gradient():
    torch.manual_seed(0)
    target, z = torch.randn(3, 5, 7).log_softmax(-1), torch.randn(3, 5, 7, requires_grad=True)
    mask = torch.rand(3, 5) < .5
    peer = (kl(target, z.log_softmax(-1))*mask).sum()/mask.sum()
    mine = copy_loss(target, z.log_softmax(-1), mask)
    assert mine.item() == pytest.approx(peer.item(), rel=1e-5)
    assert torch.allclose(*(torch.autograd.grad(x, z, retain_graph=True)[0] for x in (mine, peer)), atol=1e-6)

def test_what_comes_after_the_full_stop_does_not_count(two):
    ids = encode_sentences(TEN, [("dog", "."), ("dog", "cat", ".")])
    other = ids.clone()
    other[0, 3:], other[1, 4:] = 2, 3
    for x in (ids, other): assert in_text(x, STOP).sum(1).tolist() == [2, 3]
    with torch.no_grad():
        one, same = (say_loss(STOP)(two[0], dict(input_ids=x)).item() for x in (ids, other))
    assert one == pytest.approx(same, rel=1e-5)

def test_say_loss_is_the_log_probability_of_the_words(two):
    s = ("dog", "cat", ".")
    by_hand = -sum(row[TEN.words.index(w)].item() for row, w in zip(alone(two[0], TEN, s), s))/3
    with torch.no_grad():
        mean = say_loss(STOP)(two[0], dict(input_ids=encode_sentences(TEN, [s]))).item()
    assert mean == pytest.approx(by_hand, rel=1e-5)

# ---- the student

@pytest.fixture
def longer(trial, monkeypatch):
    monkeypatch.setattr(trial, "cfg", SimpleNamespace(**vars(CFG) | dict(steps=40)))
    return trial

def test_a_student_of_hard_labels_learns_the_words_that_were_said(longer):
    rows, loss = first(teacher_texts(longer, 64), 32), say_loss(longer.stop)
    trained, _ = watched(longer, rows, lr=1e-2, hard=True)
    before, after = (loss(m, rows).item() for m in (longer.student, trained))
    assert after < before - .1

def test_a_student_is_watched_and_nears_the_teacher(longer):
    trial, before = longer, {k: v.clone() for k, v in longer.student.state_dict().items()}
    model, path = watched(trial, teacher_texts(trial, 100), lr=1e-2)
    assert [step for step, *_ in path] == [2, 5, 40] and path[-1][1:] == tuple(trial.distances(model).values())
    assert path[-1][2] < .8*path[0][2]
    assert all(torch.equal(v, before[k]) for k, v in trial.student.state_dict().items())

def test_excess_is_a_difference_at_equal_distance_to_the_teacher():
    rng = random.Random(0)
    reference = [(i, rng.random(), 5. - i) for i in range(6)]
    for near, (a, b) in zip((4.25, 2.75), ((0, 1), (2, 3))):
        between = reference[a][1]*(near - reference[b][2]) + reference[b][1]*(reference[a][2] - near)
        assert excess([(0, 9., 9.), (1, 2., near)], reference) == pytest.approx(2. - between)
    assert excess([(1, 2., .0)], reference) == pytest.approx(2. - reference[-1][1])
    assert excess([(1, 2., -1.)], reference) == pytest.approx(2. - reference[-1][1])
    assert excess([(1, 2., 7.)], reference) == pytest.approx(2. - reference[0][1])

def test_a_trial_is_decided_by_its_seed(trial):
    other = HackTrial(CFG, 0)
    assert torch.equal(other.taught, trial.taught) and not torch.equal(HackTrial(CFG, 1).taught, trial.taught)
