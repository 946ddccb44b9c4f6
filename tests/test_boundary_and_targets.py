"""Bayes' rule by counting every text and by a peer, how often borderline labels are wrong exactly, the loop's rows,
checkpoints, bad input."""
import itertools, json, math
import numpy as np, pytest, torch
from conftest import ROOT, Failed, ran
from scipy.stats import binom, norm
from slmkit.core.zoo import load_model
from slmkit.synth.boundary_and_targets import (NAMES, WORDS, Author, at_random, augmented, between, encoded, held_out,
    labels_figure, posterior, reads, blended, relabelled, says, taught, targets, word_chances)

NB = ROOT/"nbs/synth/boundary_and_targets.ipynb"

@pytest.fixture(scope="module")
def bert(): return load_model("bert-1m", "cpu", kind="classifier", num_labels=len(NAMES))

# ---- Bayes' rule

def test_posterior_is_bayes_rule_over_every_text_there_is():
    rng = np.random.default_rng(0)
    chances = rng.dirichlet(np.ones(4), 3)
    texts = np.array(list(itertools.product(range(4), repeat=3)))
    got = posterior(chances, texts)
    for text, p in zip(texts, got):
        joint = [math.prod(chances[c, w] for w in text)/3 for c in range(3)]
        assert np.allclose(p, [j/sum(joint) for j in joint], atol=1e-12)
    common = np.array([np.mean([math.prod(c[w] for w in t) for c in chances]) for t in texts])
    # what is believed on average is the prior
    assert common.sum() == pytest.approx(1, abs=1e-12) and np.allclose(common @ got, 1/3, atol=1e-12)

def test_posterior_is_a_multinomial_naive_bayes_with_these_chances():
    nb = pytest.importorskip("sklearn.naive_bayes")
    chances = word_chances(np.random.default_rng(1), [.1, .3, .45])
    texts = np.random.default_rng(2).integers(len(WORDS), size=(50, 9))
    peer = nb.MultinomialNB().fit(np.eye(len(WORDS))[:6], np.arange(6))
    peer.feature_log_prob_, peer.class_log_prior_ = np.log(chances), np.log(np.full(6, 1/6))
    counts = np.stack([np.bincount(t, minlength=len(WORDS)) for t in texts])
    assert np.allclose(posterior(chances, texts), peer.predict_proba(counts), atol=1e-10)

def test_authors_have_chances_and_related_topics():
    chances = word_chances(np.random.default_rng(3), [.1, .3, .45])
    assert chances.shape == (6, 72) and np.allclose(chances.sum(1), 1) and (chances > 0).all()
    share = chances.reshape(6, 6, 12).sum(-1)
    assert np.allclose(np.sort(share, 1)[:, :4], .025) and np.allclose(share, share.T)
    assert sorted(np.round(np.diag(share), 9)) == [.45, .45, .6, .6, .8, .8]

def test_natural_rows_speak_for_each_topic_as_often_as_the_posterior_says():
    a = Author([.3]*3, 3, seed=4)
    labels = np.arange(12_000) % 6
    rows = a.rows(a.chances[labels], labels)
    post = np.array([r["post"] for r in rows])
    truth = np.eye(6)[labels]
    for low in np.arange(0, 1, .1):
        here = (post >= low) & (post < low + .1)
        n, share = here.sum(), truth[here].mean()
        assert abs(share - post[here].mean()) < 4.5*math.sqrt(.25/n)

def exactly_wrong(author):
    """Share of borderline rows of two words whose label is not the likeliest class: every text, every pair, the
    weight integrated."""
    texts = np.array(list(itertools.product(range(len(WORDS)), repeat=2)))
    best, at = posterior(author.chances, texts).argmax(1), np.polynomial.legendre.leggauss(3)
    total = 0.
    for a, b in itertools.permutations(range(6), 2):
        for x, w in zip(*at):
            p = between(author.asked[a], author.asked[b], .7 + .2*x)
            total += w/2*(p[texts].prod(1)*(best != a)).sum()/30
    return total

@pytest.mark.parametrize("typical", [1., 2.])
def test_borderline_labels_are_wrong_as_often_as_counting_every_text_says(typical):
    author = Author([.3]*3, 2, typical, seed=5)
    want, n = exactly_wrong(author), 12_000
    rows = author.borderline(n)
    wrong = sum(r["label"] != r["post"].argmax() for r in rows)
    low, high = binom.ppf([1e-5, 1 - 1e-5], n, want)
    assert low <= wrong <= high and .05 < want < .6
    assert sum(r["label"] != r["post"].argmax() for r in author.plain(n)) < wrong
    assert all(r["label"] == r["post"].argmax() for r in relabelled(rows, 0., 0)[:500])

def test_two_ways_to_be_between():
    first, second = np.random.default_rng(13).dirichlet(np.ones(5), (2, 3))
    for w in (0., .3, 1.):
        want = np.exp(w*np.log(first) + (1 - w)*np.log(second))
        assert np.allclose(blended(first, second, w), want/want.sum(1, keepdims=True))
        assert np.allclose(between(first, second, w).sum(1), 1)
    assert np.allclose(between(first, second, 1.), first) and np.allclose(blended(first, second, 0.), second)

# ---- labels

def test_a_doubting_teacher_errs_as_two_normal_errors_do():
    p, doubt, n = .8, 1.5, 20_000
    rows = [dict(post=np.array([p, 1 - p]), label=0)]*n
    wrong = sum(r["label"] for r in relabelled(rows, doubt, 7))
    low, high = binom.ppf([1e-5, 1 - 1e-5], n, norm.cdf(-math.log(p/(1 - p))/(doubt*math.sqrt(2))))
    assert low <= wrong <= high
    assert reads(np.array([[.2, .5, .3]]), np.zeros((1, 3))).tolist() == [1]
    assert reads(np.array([[1., 0.]]), np.array([[-3., 3.]])).tolist() == [0]   # what is impossible stays unlikely

def test_the_control_changes_as_many_labels_to_other_classes():
    rows = Author([.3]*3, 4, seed=6).borderline(300)
    looked = relabelled(rows, 0., 0)
    changed = at_random(rows, looked, 8)
    many = sum(a["label"] != b["label"] for a, b in zip(rows, looked))
    assert many > 30 and sum(a["label"] != b["label"] for a, b in zip(rows, changed)) == many
    assert all(0 <= r["label"] < 6 for r in changed) and [r["text"] for r in changed] == [r["text"] for r in rows]
    assert changed == at_random(rows, looked, 8) != at_random(rows, looked, 9)

# ---- rounds

def test_targets_are_the_wrong_rows_each_so_often():
    rng = np.random.default_rng(9)
    for each in (1, 2, 5):
        right = rng.random(8) < .6
        assert np.bincount(targets(right, each), minlength=8).tolist() == [0 if r else each for r in right]

def test_rounds_write_only_from_wrong_seed_rows():
    seeds, asked = [dict(of=i, need=i, copy=False) for i in range(4)], []
    # seed i needs i copies
    judge = lambda written: [sum(r["of"] == s["of"] for r in written) >= s["need"] for s in seeds]
    def vary(row):
        asked.append(row)
        return row | dict(copy=True)
    written, found = augmented(judge, vary, seeds, 4, lambda hits: targets(hits, 1))
    assert [(~f).sum() for f in found] == [3, 2, 1, 0]
    assert [r["of"] for r in written] == [1, 2, 3, 2, 3, 3]
    assert all(r["copy"] for r in written)
    assert not any(r["copy"] for r in asked)
    assert not any(r["copy"] for r in seeds)
    assert augmented(judge, vary, seeds, 0)[0] == []

def test_each_seed_row_is_judged_by_a_student_who_has_not_learnt_it():
    seeds, written, learnt = [dict(of=i, label=i % 3) for i in range(14)], [dict(of=99, label=0)], []
    def learn(rows, share):
        learnt.append((rows, share))
        return rows
    def right(student, rows):
        assert not {r["of"] for r in rows} & {r["of"] for r in student} and written[0] in student
        assert {r["label"] for r in student} == {0, 1, 2}
        return np.array([r["of"] % 5 > 0 for r in rows])
    hits = held_out(learn, right, seeds, written, 3)
    assert hits.tolist() == [i % 5 > 0 for i in range(14)] and [s for _, s in learnt] == [.5, .5]
    assert sorted(r["of"] for rows, _ in learnt for r in rows) == [*range(14), 99, 99]

def test_varied_rows_keep_their_label_and_drift_with_every_copy():
    author = Author([.3]*3, 5, seed=10)
    rows, wrong = author.natural(600), []
    for _ in range(4):
        rows = [author.similar(r, .2) for r in rows]
        assert all(np.allclose(r["post"], posterior(author.chances, r["words"][None])[0]) for r in rows[:50])
        wrong.append(np.mean([r["label"] != r["post"].argmax() for r in rows]))
    assert 0 < wrong[0] < wrong[1] < wrong[3]
    same = author.similar(rows[0], keep=1.)
    assert (same["words"] == rows[0]["words"]).all() and same["label"] == rows[0]["label"]

# ---- the student

def test_rows_are_told_in_words_of_the_zoo_and_begin_with_one_mark(bert):
    model, tok = bert
    rows = Author([.3]*3, 5, seed=11).natural(12)
    ids = [r["input_ids"] for r in encoded(tok, rows)]
    assert all(i[0] == tok.bos_token_id and i.count(tok.bos_token_id) == 1 and tok.unk_token_id not in i for i in ids)
    assert all(WORDS[w] in r["text"].split() for r in rows for w in r["words"])
    with torch.no_grad(): alone = [model(input_ids=torch.tensor([i])).logits.argmax(-1).item() for i in ids]
    assert says(model, tok, rows, 5).tolist() == alone
    short = encoded(tok, rows, 5)
    assert {len(r["input_ids"]) for r in short} == {5}

def test_a_tokenizer_that_begins_by_itself_is_left_alone():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    t = Tokenizer(models.WordLevel({"[CLS]": 0, "a": 1, "[PAD]": 2}, unk_token="a"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 0)])
    tok = PreTrainedTokenizerFast(tokenizer_object=t, cls_token="[CLS]", pad_token="[PAD]")
    assert encoded(tok, [dict(text="a a", label=1)]) == [dict(input_ids=[0, 1, 1], labels=[1])]

def test_arms_start_alike_and_learn(bert):
    from types import SimpleNamespace
    base, tok = bert
    cfg, rows = SimpleNamespace(size=16, lr=1e-2, relative=True, half=False), Author([.3]*3, 5, seed=12).natural(48)
    (one, h), (two, _) = (taught(base, tok, rows, cfg, 0, steps=30) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters())) and h.steps == 30
    right = (says(one, tok, rows) == [r["label"] for r in rows]).mean()
    assert right > .9 > (says(base, tok, rows) == [r["label"] for r in rows]).mean()

# ---- the notebook

def tiny_bert(folder):
    from transformers import BertConfig, BertModel
    tok = load_model("bert-1m", "cpu", kind="encoder")[1]
    torch.manual_seed(0)
    tok.save_pretrained(folder)
    BertModel(BertConfig(vocab_size=len(tok), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=128, pad_token_id=0)).save_pretrained(folder)
    return str(folder)

FAST = {"borderline-beats-plain", "relabelling-is-crucial", "wrong-rows-beat-random-rows", "rounds-beat-all-at-once"}
@pytest.mark.slow
def test_gpu_path_on_a_tiny_checkpoint_and_a_file_as_the_pool(tmp_path, torch_pool):
    model, mine = tiny_bert(tmp_path/"bert"), tmp_path/"mine.jsonl"
    from slmkit.toyland.tasks import task
    mine.write_text("\n".join(json.dumps(dict(text=r["input"], label=r["label"]))
            for split, k in (("train", 400), ("test", 60)) for r in task("topics", split, k)), encoding="utf-8")
    found = ran(NB, tmp_path, torch_pool, profile="gpu", model=model, data=str(mine), columns="input=text", n=24,
        steps=3, short=3)
    assert set(found) == FAST | {"a-doubting-teacher-will-do", "blended-rows-beat-plain"}
    assert all(r["model"] == model for r in found.values())
    arms = found["a-doubting-teacher-will-do"]["arms"]
    # the pool's labels are right
    assert arms["wrong_relabelled"] == 0 < arms["wrong_own_labels"] and arms["wrong_targeted"] == 0
    assert not any(k.endswith("_near") for k in arms) and all(map(math.isfinite, arms.values()))

def test_bad_input_is_one_clear_line(tmp_path, torch_pool):
    with pytest.raises(Failed, match="profile gpu needs --model FOLDER"):
        ran(NB, tmp_path, torch_pool, profile="gpu")
    few = tmp_path/"few.jsonl"
    few.write_text("\n".join(json.dumps(dict(input=f"{w} {i}", label=w)) for w in ("goal", "oven") for i in range(50)),
        encoding="utf-8")
    with pytest.raises(Failed,
            match="Pool: no more rows for '(goal|oven)': give a larger set, or a smaller n"):
        ran(NB, tmp_path, torch_pool, profile="smoke", data=str(few), n=60)

@pytest.mark.slow
def test_same_seed_same_record(tmp_path, torch_pool):
    one, two = (ran(NB, tmp_path, torch_pool, name, profile="smoke", seed=3) for name in ("one", "two"))
    assert one == two and set(one) == FAST

def test_figure_needs_no_run():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names = "relabelled doubting doubt_1.0 own_labels at_random".split()
    arms = {k: .8 - i/20 for i, k in enumerate(names)} | {f"wrong_{k}": i/10
        for i, k in enumerate(names)} | {"plain": .8, "natural": .9, "doubt_1.0_near": .5}
    fig, ax = plt.subplots()
    labels_figure([dict(arms=arms)]*2, ax)
    assert ax.lines[0].get_xdata().tolist() == [0, .1, .2] and len(ax.lines) == 5
    plt.close(fig)
