"""Speculative decoding: greedy decoding, assisted generation and prompt lookup of transformers as peers, samples
against exact distributions, trees against plain passes, cuts of the cache, bad input."""
import json, math, random
from collections import Counter
import pytest, torch
from pathlib import Path
from transformers import (AutoTokenizer, DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM,
    MistralConfig, MistralForCausalLM)
from transformers import Qwen2Config, Qwen2ForCausalLM
from conftest import ran
from slmkit.core.settings import KitError
from slmkit.core.zoo import load_model
from slmkit.infer.speculative_decoding import (DraftModel, NGrams, PromptLookup, accepted, agreeing, count,
    distribution, grow, inverse_cdf, openings, rejection_sample, replay, same_vocabulary, speculate, until, verify)
from slmkit.toyland.tokenizer import build_tokenizer

FOLDER = Path(__file__).parents[1]/"nbs/infer"
LESSON = FOLDER/"speculative_decoding.ipynb"
def of_lesson(*names):
    "Functions of the lesson that it does not export."
    found, cells = dict(torch=torch, verify=verify, accepted=accepted), json.loads(LESSON.read_text(encoding="utf-8"))
    for source in ("".join(c["source"]) for c in cells["cells"]):
        if any(f"\ndef {n}(" in f"\n{source}" for n in names): exec(source, found)
    return [found[n] for n in names]
tree_mask, verify_tree = of_lesson("tree_mask", "verify_tree")
SHAPE = dict(vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=256)

def tiny(cls=LlamaForCausalLM, config=LlamaConfig, **more):
    "A random decoder in float64: few words, so that it repeats itself, and no ties."
    torch.manual_seed(0)
    m = cls(config(**{**SHAPE, **more})).double().eval()
    m.generation_config.eos_token_id = m.generation_config.pad_token_id = None
    return m
@pytest.fixture(scope="module")
def llama(): return tiny(num_key_value_heads=2)
@pytest.fixture(scope="module")
def zoo(): return load_model("lm-1m", "cpu", kind="causal")

class Dice:
    "A drafter of random trees."
    tree = True
    def __init__(self, seed, words=11): self.rng, self.words = random.Random(seed), words
    def read(self, tokens): pass
    def draft(self, size):
        tokens, parents = [], []
        for i in range(size):
            p = self.rng.randrange(-1, i)
            left = [t for t in range(self.words) if (p, t) not in set(zip(parents, tokens))]
            tokens.append(self.rng.choice(left))
            parents.append(p)
        return tokens, parents

def passes(model):
    "A list to which each pass of the model adds the number of its tokens; call .remove() on what comes with it."
    seen = []
    return seen, model.register_forward_pre_hook(lambda m, args, kw: seen.append(kw["input_ids"].shape[1]),
        with_kwargs=True)

def generate(model, ids, most, **kw):
    out = model.generate(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=most,
        do_sample=False, **kw)
    return out[0, len(ids):].tolist()

# ---- the peer: greedy decoding of transformers

def spoken(model, ids, drafter=None, most=40, draft_length=8, end=None):
    "What `speculate` gives, with the pass that the drafter's drafts need."
    way = verify_tree if getattr(drafter, "tree", False) else verify
    return speculate(model, ids, drafter, most, draft_length, end, verify=way)

@pytest.mark.parametrize("drafter", [lambda: None, lambda: PromptLookup(1), lambda: PromptLookup(3), lambda: NGrams(),
        lambda: NGrams(explore=1.), lambda: Dice(1), lambda: DraftModel(tiny(num_hidden_layers=1))])
def test_every_drafter_says_what_generate_says(llama, drafter):
    for i in range(3):
        ids = random.Random(i).choices(range(11), k=9)
        out = spoken(llama, ids, drafter())
        assert out.tokens == generate(llama, ids, 40) and sum(out.passes) == 40
        if drafter(): assert out.passes == replay(ids, out.tokens, drafter(), 8)

@pytest.mark.parametrize("cls,config,more", [(Qwen2ForCausalLM, Qwen2Config, dict(num_key_value_heads=2)),
        (GPT2LMHeadModel, GPT2Config, dict(n_embd=16, n_layer=2, n_head=4, n_positions=256,
        bos_token_id=0, eos_token_id=0))])
def test_other_architectures(cls, config, more):
    model, ids = tiny(cls, config, **more), [1, 2, 3, 1, 2, 3, 1]
    for drafter in (PromptLookup(2), NGrams(explore=1.), Dice(0)):
        assert spoken(model, ids, drafter, 20).tokens == generate(model, ids, 20)

@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_zoo_decoder_stops_at_its_end_token(zoo, attention):
    model, tok = zoo
    model.set_attn_implementation(attention)
    for text in ("read apple chair seven . write", "tom has 3 nuts . ana has 4 nuts .", "1 2 3 1 2 3 1 2"):
        ids = [tok.bos_token_id] + tok(text, add_special_tokens=False)["input_ids"]
        want = generate(model, ids, 48, eos_token_id=tok.eos_token_id)
        for drafter in (None, PromptLookup(2), NGrams(explore=1.)):
            out = spoken(model, ids, drafter, 48, end=tok.eos_token_id)
            assert out.tokens == want and sum(out.passes) == len(want), text
    model.set_attn_implementation("eager")

# ---- the peer: transformers' prompt lookup

class Lookup:
    "What transformers' prompt lookup drafts: the first match of two tokens, else of one."
    tree = False
    def __init__(self, most): self.ids, self.most = [], most
    def read(self, tokens): self.ids += tokens
    def draft(self, size):
        for n in (2, 1):
            for i in range(len(self.ids) - n):
                if self.ids[i:i + n] == self.ids[-n:]:
                    return self.ids[i + n:i + n + size], None
        return [], None

def test_prompt_lookup_gives_our_tokens_and_with_its_rule_our_passes(llama):
    saved = 0
    for i in range(4):
        ids = random.Random(i).choices(range(11), k=12)
        seen, hook = passes(llama)
        peer = generate(llama, ids, 60, prompt_lookup_num_tokens=5)
        hook.remove()
        mine, copied = (spoken(llama, ids, drafter, 60, 5) for drafter in (Lookup(60), PromptLookup(2)))
        assert peer == mine.tokens == copied.tokens
        # the peer's last draft is not cut to what is still wanted
        assert len(mine.passes) == len(seen) and 0 <= sum(seen) - mine.read <= 5
        saved += 60 - len(seen)
    assert saved > 20  # else this would compare nothing

# ---- drafts

def test_a_draft_model_gives_the_tokens_and_the_passes_of_assisted_generation(llama):
    small = tiny(num_hidden_layers=1)
    small.generation_config.num_assistant_tokens = 4
    small.generation_config.num_assistant_tokens_schedule = "constant"
    small.generation_config.assistant_confidence_threshold = 0.
    for i in range(4):
        ids = random.Random(i).choices(range(11), k=12)
        seen, hook = passes(llama)
        peer = generate(llama, ids, 41, assistant_model=small)
        hook.remove()
        mine = spoken(llama, ids, DraftModel(small), 41, 4)
        assert peer == mine.tokens and abs(len(seen) - len(mine.passes)) <= 1

# ---- samples against exact distributions

def test_rejection_sampling_gives_the_target_s_distribution_whatever_the_draft_is():
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        p, q = (torch.rand(2, 6, generator=g, dtype=torch.float64)**2 for _ in range(2))
        p, q = (x/x.sum(-1, keepdim=True) for x in (p, q))
        found, n = torch.zeros(6, dtype=torch.float64), 400
        for x in range(6):  # x is drafted with probability q(x); u on a fine grid
            for u in (torch.arange(n) + .5)/n:
                accept = bool(u*q[0, x] < p[0, x])
                if accept: found[x] += q[0, x]/n
                else: found += q[0, x]/n*(p[0] - q[0]).clamp(min=0)/(p[0] - q[0]).clamp(min=0).sum()
                got = rejection_sample(p, q[:1], [x], torch.tensor([u, .5]))
                assert (len(got) == 2 and got[0] == x) == accept
        assert torch.allclose(found, p[0], atol=6/n)

@pytest.mark.parametrize("kind", ["model", "lookup", "none"])
def test_sampled_pairs_come_as_often_as_the_target_says(kind):
    model, small, g = tiny(), tiny(num_hidden_layers=1), torch.Generator().manual_seed(1)
    ids, n = [1, 2, 3, 1, 2], 3000
    with torch.no_grad():
        first = distribution(model(input_ids=torch.tensor([ids])).logits[0, -1])
        after = distribution(model(input_ids=torch.tensor([ids + [x] for x in range(11)])).logits[:, -1])
    exact, found = (first[:, None]*after).flatten(), torch.zeros(121)
    drafter = dict(model=lambda: DraftModel(small, 1., g), lookup=lambda: PromptLookup(1), none=lambda: None)[kind]
    for _ in range(n):
        a, b = speculate(model, ids, drafter(), 2, 1, temperature=1., generator=g).tokens
        found[11*a + b] += 1
    chi2 = ((found - n*exact)**2/(n*exact)).sum()
    assert chi2 < 120 + 4*(2*120)**.5  # four standard deviations above its mean

def test_inverse_cdf_draws_in_proportion_and_never_what_has_no_weight():
    weights = torch.tensor([0., .5, 0., .25, 0.])
    drawn = Counter(inverse_cdf(weights, u) for u in (torch.arange(300) + .5)/300)
    assert drawn == {1: 200, 3: 100}
    assert inverse_cdf(weights, torch.tensor(0.)) == 1 and inverse_cdf(weights, torch.tensor(1 - 1e-8)) == 3
    assert distribution(torch.tensor([1., 3., 2.]), 0).tolist() == [0, 1, 0]

# ---- drafts

def test_openings_need_no_word_of_one_tokenizer():
    "Texts and counts hold for any tokenizer: nothing is looked up that only Toyland's own has."
    from slmkit.core.smollm2_random import smollm2_random
    other = AutoTokenizer.from_pretrained(smollm2_random())
    texts, counts = openings(other, 3, 0), {}
    for ids in texts: count(counts, ids)
    drafter = NGrams(counts)
    assert len(texts) == 3 and drafter.draft(4) == ([], []) and drafter.weights([10**6, 10**6 + 1]) == {}
    with pytest.raises(KitError, match="same tokenizer"): same_vocabulary(other, build_tokenizer())

def test_a_copy_is_what_followed_the_last_match():
    rng = random.Random(0)
    for _ in range(100):
        gamma, size, ids = rng.randint(1, 3), rng.randint(1, 6), []
        copier = PromptLookup(gamma)
        for _ in range(40):
            part = rng.choices(range(3), k=rng.randint(1, 3))
            ids += part
            copier.read(part)
            ends = [e for e in range(gamma, len(ids)) if ids[e - gamma:e] == ids[-gamma:]]
            want = ids[ends[-1]:ends[-1] + size] if ends else []
            assert copier.draft(size) == (want, None)

def test_tree_masks_and_accepted_against_paths():
    for seed in range(60):
        rng = random.Random(seed)
        tokens, parents = Dice(seed, 7).draft(7)
        def path(i): return [] if i < 0 else path(parents[i]) + [i]
        assert tree_mask(parents).tolist() == [[j in path(i) for j in range(7)] for i in range(7)]
        choice = [rng.choice([t for t, p in zip(tokens, parents) if p == at] + [9]) for at in range(-1, 7)]
        good = [path(i) for i in range(7) if all(tokens[j] == choice[parents[j] + 1] for j in path(i))]
        says = lambda path: choice[(path or [-1])[-1] + 1]
        assert accepted(says, tokens, parents) == max(good, key=len, default=[])
    assert agreeing([1, 2, 9], [1, 2, 3, 4]) == 2 and agreeing([1, 2], [1, 2]) == 2 and until([4, 0, 5], 0) == [4, 0]

def test_walks_are_shared_like_the_weights():
    tokens, parents = grow(lambda path: {1: .6, 2: .4} if len(path) < 4 else {}, [0], 9, 0)
    assert (tokens, parents) == ([1, 1, 1], [-1, 0, 1])  # a chain, until nothing is known
    assert grow(lambda path: {1: .6, 2: .4}, [0], 3, 1) == ([1, 2, 1], [-1, -1, 0])  # the second goes the other way

def test_a_grown_tree_is_one_and_a_greedy_one_is_the_likeliest_chain():
    odds = lambda path: {t: (7*path[-1] + 3*t) % 5 + 1 for t in range(5)}
    for size in range(1, 12):
        for explore in (.5, 1, 2):
            tokens, parents = grow(odds, [3], size, explore)
            assert len(tokens) == len(parents) == size and all(-1 <= p < i for i, p in enumerate(parents))
            assert len(set(zip(parents, tokens))) == size  # no token twice behind the same place
        tokens, parents = grow(odds, [3], size, 0)
        assert parents == list(range(-1, size - 1))
        assert all(odds([a])[b] == max(odds([a]).values()) for a, b in zip([3] + tokens, tokens))
    assert grow(lambda path: {}, [3], 4, 1) == ([], [])

def test_counts():
    ids = random.Random(0).choices(range(4), k=300)
    t = NGrams()
    t.read(ids[:100])
    t.read(ids[100:101])
    t.read(ids[101:])
    for n in (1, 2):
        brute = Counter(tuple(ids[i - n:i + 1]) for i in range(n, 300))
        assert {k + (c,): v for k, f in t.own.items() if len(k) == n for c, v in f.items()} == brute

def test_what_other_texts_say_weighs_as_told():
    base = {}
    for ids in ([1, 2, 3], [1, 2, 3], [1, 2, 4], [5, 2, 6]): count(base, ids, 2)
    t = NGrams(base, strength=3.)
    t.read([1, 2, 4])
    assert t.weights([1, 2]) == {4: 1 + 1., 3: 2.}
    assert t.weights([9, 2]) == {4: 1 + .75, 3: 1.5, 6: .75}
    assert t.weights([9, 9]) == {}
    assert base[(1, 2)] == {3: 2, 4: 1}  # reading leaves the other texts' counts alone

def test_a_draft_that_learns_gets_better(llama):
    ids, drafter = [1, 2, 3, 4], NGrams()
    first, again = (spoken(llama, ids, drafter) for _ in range(2))
    assert first.tokens == again.tokens and len(again.passes) < len(first.passes)

# ---- one pass, and the cache after it

@pytest.mark.parametrize("seed", range(6))
def test_a_tree_in_one_pass_is_greedy_decoding_and_leaves_its_cache(llama, seed):
    text, (tokens, parents) = [1, 2, 3, 4, 5], Dice(seed).draft(8)
    want = generate(llama, text, 9)
    for i, p in enumerate(parents):  # make one branch right
        depth = tree_mask(parents)[i].sum().item()
        if p < 0 or tokens[p] == want[depth - 2]: tokens[i] = want[depth - 1] if i % 2 == 0 else tokens[i]
    cache = DynamicCache(config=llama.config)
    with torch.no_grad():
        new, read = verify_tree(llama, cache, text, tokens, parents)
        assert new == want[:len(new)] and read == 13 and cache.get_seq_length() == 5 + len(new) - 1
        whole = text + new
        more, _ = verify_tree(llama, cache, whole, [], [])
        plain = DynamicCache(config=llama.config)
        llama(input_ids=torch.tensor([whole]), past_key_values=plain)
    assert more == want[len(new):len(new) + 1]
    for a, b in zip(cache.layers, plain.layers): assert torch.allclose(a.keys, b.keys, atol=1e-9)

def test_a_draft_model_s_cache_is_what_the_text_gives(llama):
    drafter, text = DraftModel(llama), [1, 2, 3]
    drafter.read(text)
    first, q = drafter.draft(4)
    assert first == generate(llama, text, 4) and q.shape == (4, 11)
    drafter.read([(first[0] + 1) % 11])  # the target wants another token
    assert drafter.draft(3)[0] == generate(llama, text + [(first[0] + 1) % 11], 3)
    assert drafter.draft(3)[0] == generate(llama, text + [(first[0] + 1) % 11], 3)  # asked again

def test_passes_are_passes_of_the_model(llama):
    seen, hook = passes(llama)
    out = spoken(llama, [1, 2, 1, 2, 1], PromptLookup(1), 30)
    hook.remove()
    assert len(seen) == len(out.passes) and sum(seen) == out.read and len(out.tokens) == 30

def test_limits(llama):
    for most in (1, 2, 7): assert len(spoken(llama, [1, 2, 1, 2], PromptLookup(1), most).tokens) == most
    whole = spoken(llama, [1, 2, 1, 2], None, 30).tokens
    stop = whole[12]
    for drafter in (None, PromptLookup(1), Dice(2)):
        out = spoken(llama, [1, 2, 1, 2], drafter, 30, end=stop)
        assert out.tokens == whole[:whole.index(stop) + 1] and sum(out.passes) == len(out.tokens)

def test_bad_input(llama):
    with pytest.raises(KitError, match="the prompt is empty"): speculate(llama, [])
    forgets = tiny(MistralForCausalLM, MistralConfig, sliding_window=4, num_key_value_heads=4)
    with pytest.raises(KitError, match="no support for mistral"): speculate(forgets, [1, 2])
    whole = tiny(MistralForCausalLM, MistralConfig, sliding_window=None, num_key_value_heads=4)
    assert spoken(whole, [1, 2, 1], PromptLookup(1), 9).tokens == generate(whole, [1, 2, 1], 9)

# ---- the notebooks

CLAIMS = {"": {"fewer-passes", "more-redundant-more-tokens", "copy-beside-draft", "longer-more-tokens",
    "learning-draft",
    "exploring-draft"}, "_real": {"lookup-saves-passes-real", "text-at-hand-real", "learning-draft-real",
    "exploring-draft-real"}}

@pytest.mark.slow
@pytest.mark.parametrize("short", CLAIMS)
def test_same_seed_same_record(tmp_path, torch_pool, short):
    nb = FOLDER/f"speculative_decoding_repro{short}.ipynb"
    one, two = (ran(nb, tmp_path, torch_pool, name, profile="smoke", seed=3) for name in ("one", "two"))
    assert one == two and set(one) == CLAIMS[short]
