"""The finite grammar: its probabilities, exact divergences against brute force, and the estimate against the exact
value."""
import math, random
import numpy as np, pytest, torch
from transformers import LlamaConfig, LlamaForCausalLM
from slmkit.toyland.grammar import (
    Grammar,
    bigram,
    next_log_probs,
    grammar,
    grammatical_share,
    kl,
    kl_estimate,
    oracle,
    sentence_log_probs,
    strings,
    word_ids,
)
from slmkit.core.settings import KitError
from slmkit.toyland.tokenizer import build_tokenizer
from slmkit.toyland.world import vocabulary

@pytest.fixture(scope="module")
def g(): return grammar()
@pytest.fixture(scope="module")
def small():
    "A language of 14 sentences, one of which can be made in two ways."
    return Grammar({"S": {"A B .": .75, "dog cat .": .25}, "A": {"dog": .5, "the dog": .5},
            "B": {"cat": .4, "sees C": .6}, "C": {"cat": .2, "dog": .3, "the A": .5}})
def noise(words, seed=0, leak=.2):
    "A model of random probabilities, a different one for each prefix, which leaves a share to words outside."
    def logs(prefixes):
        rows = [np.random.default_rng([seed, *(words.index(w) for w in p)]).dirichlet(np.ones(len(words)))
            for p in prefixes]
        return np.log(np.array(rows)*(1 - leak))
    return logs

# ---- the language

def test_size_words_and_sum(g):
    table = g.sequences()
    assert len(table) == 18_960 and len(g.words) == 20 and set(g.words) - {"."} <= set(vocabulary())
    assert math.isclose(math.fsum(table.values()), 1) and min(table.values()) > 0
    assert all(s[-1] == "." and "." not in s[:-1] for s in table)  # no sentence is the beginning of another one

def test_a_sentence_made_in_two_ways_has_the_sum(small):
    assert math.isclose(small.sequences()["dog", "cat", "."], .75*.5*.4 + .25)

def test_verbs_agree_with_their_subjects(g):
    plural = {"dogs", "cats", "farmers", "sleep", "walk", "see", "like"}
    for s in g.sequences():
        subject = next(w for w in s if w in ("dog", "cat", "farmer", "dogs", "cats", "farmers"))
        after = list(s[s.index(subject) + 1:-1])
        verbs = [w for w in after if w in ("sleeps", "walks", "sees", "likes", "sleep", "walk", "see", "like")]
        if "who" in after and after[1] == "the":  # the dog who THE CATS SEE sleeps
            noun = next(w for w in after if w in ("dog", "cat", "farmer", "dogs", "cats", "farmers"))
            assert (noun in plural) == (verbs[0] in plural)
            verbs = verbs[1:]
        assert verbs and all((v in plural) == (subject in plural) for v in verbs), s

def test_next_tokens_are_shares_of_the_sentences(g):
    rng = random.Random(0)
    for _ in range(20):
        s = rng.choice(list(g.sequences()))
        prefix = s[:rng.randrange(len(s))]
        mass = {}
        for t, p in g.sequences().items():
            if t[:len(prefix)] == prefix: mass[t[len(prefix)]] = mass.get(t[len(prefix)], 0) + p
        total = sum(mass.values())
        assert g.next_tokens(" ".join(prefix)) == pytest.approx({w: p/total for w, p in mass.items()})
    assert g.next_tokens(s) == {}

def test_samples_have_the_probabilities(g):
    n, drawn = 20_000, g.sample(random.Random(1), 20_000)
    for s in (("the", "dog", "sleeps", "."), ("the", "dogs", "sleep", "."), ("the", "cat", "walks", ".")):
        p = g.sequences()[s]
        assert abs(drawn.count(s)/n - p) < 4*math.sqrt(p*(1 - p)/n)
    assert g.sample(random.Random(1), 5) == drawn[:5]

@pytest.mark.parametrize("call, words", [
    (lambda g: g.next_tokens("the dgo"), "did you mean 'dog'"),
    (lambda g: g.next_tokens("the dog see"), "no sentence goes on from 'the dog' with 'see'"),
    (lambda g: g.next_tokens("the dog sleeps . the"), "with 'the'"),
    (lambda g: kl(g, oracle(g), "backward"), "forward or reverse"),
    (lambda g: strings({"S": {"the A": 1.}, "A": {"dog": .5, "old A": .5}}), "leads back to itself"),
    (lambda g: word_ids(Grammar({"S": {"quark .": 1.}}), build_tokenizer()), "'quark' is not one token"),
])
def test_errors_are_one_line(g, call, words):
    with pytest.raises(KitError) as e: call(g)
    assert words in str(e.value) and "\n" not in str(e.value)

# ---- divergences

def by_hand(small, model):
    "Log-probability of each sentence, one prefix at a time."
    return {s: sum(model([s[:i]])[0][small.words.index(w)] for i, w in enumerate(s)) for s in small.sequences()}

@pytest.mark.parametrize("seed", range(3))
def test_divergences_against_brute_force(small, seed):
    model = noise(small.words, seed)
    p, q = small.sequences(), {s: math.exp(l) for s, l in by_hand(small, model).items()}
    z = sum(q.values())
    assert kl(small, model) == pytest.approx(sum(p[s]*math.log(p[s]/q[s]) for s in p))
    assert kl(small, model, "reverse") == pytest.approx(sum(q[s]/z*math.log(q[s]/z/p[s]) for s in p))
    assert grammatical_share(small, model) == pytest.approx(z) and z < .8

def test_the_chain_rule_over_prefixes_gives_the_same(g):
    model, total = bigram(g, g.sample(random.Random(0), 500)), 0.
    for prefix, after in g.tree.items():
        mass, logs = sum(after.values()), model([prefix])[0]
        total += sum(p*(math.log(p/mass) - logs[g.words.index(w)]) for w, p in after.items())
    assert kl(g, model) == pytest.approx(total)

def test_only_the_oracle_is_at_distance_zero(small):
    assert abs(kl(small, oracle(small))) < 1e-12 and abs(kl(small, oracle(small), "reverse")) < 1e-12
    assert kl(small, noise(small.words, leak=0)) > .1 < kl(small, noise(small.words, leak=0), "reverse")

def test_each_prefix_is_asked_for_once(g):
    asked, model = [], bigram(g, [])
    def spy(prefixes):
        asked.extend(prefixes)
        return model(prefixes)
    kl(g, spy)
    assert len(asked) == len(set(asked)) == len(g.tree)

@pytest.mark.parametrize("n", [200, 2000])
def test_the_estimate_agrees_within_its_standard_error(g, n):
    model = bigram(g, g.sample(random.Random(9), 1000))
    exact = kl(g, model)
    z = [(m - exact)/e for m, e in (kl_estimate(g, model, random.Random(s), n) for s in range(25))]
    assert max(map(abs, z)) < 4.5 and sum(abs(v) < 2 for v in z) >= 20 and .4 < np.std(z) < 1.7

def test_more_samples_less_error(g):
    model = bigram(g, g.sample(random.Random(9), 1000))
    few, many = (np.mean([kl_estimate(g, model, random.Random(s), n)[1] for s in range(5)]) for n in (100, 2500))
    assert 3.5 < few/many < 7  # five times, as the square root of 25

# ---- causal models

def llama(n, seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=n, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2))

@pytest.mark.parametrize("tokenizer", [None, "zoo"])
def test_a_causal_model_is_read_right(g, tokenizer):
    tok = build_tokenizer() if tokenizer else None
    model, some = llama(len(tok) if tok else len(g.words) + 1).eval(), g.sample(random.Random(0), 12)
    ids, start = word_ids(g, tok)
    for s, log in zip(some, sentence_log_probs(g, next_log_probs(g, model, tok), some)):
        row = torch.tensor([[start, *(ids[g.words.index(w)] for w in s)]])
        if tok: assert tok.decode(row[0, 1:]) == " ".join(s) and start == tok.bos_token_id
        with torch.no_grad(): loss = model(row, labels=row).loss.item()
        assert log == pytest.approx(-loss*len(s), rel=1e-4)

def test_batches_change_nothing(g):
    model, some = llama(len(g.words) + 1), [s[:3] for s in g.sample(random.Random(0), 30)]
    assert np.allclose(next_log_probs(g, model, size=7)(some), next_log_probs(g, model)(some), atol=1e-5)

def test_training_on_samples_closes_in_on_the_oracle(g):
    model, rng, (ids, start) = llama(len(g.words) + 1), random.Random(0), word_ids(g)
    place, far = dict(zip(g.words, ids)), kl(g, next_log_probs(g, model))
    step = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        rows = [[start, *(place[w] for w in s)] for s in g.sample(rng, 32)]
        longest = max(map(len, rows))
        x = torch.tensor([r + [0]*(longest - len(r)) for r in rows])
        y = torch.tensor([r + [-100]*(longest - len(r)) for r in rows])
        loss = model.train()(x, labels=y).loss
        loss.backward()
        step.step()
        step.zero_grad()
    assert far > 10 and kl(g, next_log_probs(g, model)) < 3 and grammatical_share(g, next_log_probs(g, model)) > .3
