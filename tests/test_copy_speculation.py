"""Copy speculation: greedy decoding and transformers' prompt lookup as peers, trees against plain passes, cuts of
the cache, bad input."""
import math, random
from collections import Counter
import pytest, torch
from functools import partial
from pathlib import Path
from transformers import (DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM,
    MistralConfig, MistralForCausalLM)
from transformers import Qwen2Config, Qwen2ForCausalLM
from conftest import ran
from slmkit.core.settings import KitError
from slmkit.core.zoo import load_model
from slmkit.infer.copy_speculation import (Copy, NOTE, Trigrams, accepted, cast, choose, count, fact, grow, keep, look,
    report, speculate, step, visible)
from slmkit.toyland.tokenizer import build_tokenizer

NB = Path(__file__).parents[1]/"nbs/infer/copy_speculation.ipynb"
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

@pytest.mark.parametrize("drafter", [lambda: None, lambda: Copy(1), lambda: Copy(3), lambda: Trigrams(),
        lambda: Trigrams(explore=1.), lambda: Dice(1)])
def test_every_drafter_says_what_generate_says(llama, drafter):
    for i in range(3):
        ids = random.Random(i).choices(range(11), k=9)
        out = speculate(llama, ids, drafter(), most=40)
        assert out.tokens == generate(llama, ids, 40) and sum(out.said) == 40

@pytest.mark.parametrize("cls,config,more", [(Qwen2ForCausalLM, Qwen2Config, dict(num_key_value_heads=2)),
        (GPT2LMHeadModel, GPT2Config, dict(n_embd=16, n_layer=2, n_head=4, n_positions=256,
        bos_token_id=0, eos_token_id=0))])
def test_other_architectures(cls, config, more):
    model, ids = tiny(cls, config, **more), [1, 2, 3, 1, 2, 3, 1]
    for drafter in (Copy(2), Trigrams(explore=1.), Dice(0)):
        assert speculate(model, ids, drafter, most=20).tokens == generate(model, ids, 20)

@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_zoo_decoder_stops_at_its_end_token(zoo, attention):
    model, tok = zoo
    model.set_attn_implementation(attention)
    for text in ("read apple chair seven . write", "tom has 3 nuts . ana has 4 nuts .", "1 2 3 1 2 3 1 2"):
        ids = [tok.bos_token_id] + tok(text, add_special_tokens=False)["input_ids"]
        want = generate(model, ids, 48, eos_token_id=tok.eos_token_id)
        for drafter in (None, Copy(2), Trigrams(explore=1.)):
            out = speculate(model, ids, drafter, most=48, end=tok.eos_token_id)
            assert out.tokens == want and sum(out.said) == len(want), (text, out.margin)
    model.set_attn_implementation("eager")

# ---- the peer: transformers' prompt lookup

class Lookup:
    "What transformers' prompt lookup drafts: the first match of two tokens, else of one."
    def __init__(self, most): self.ids, self.most = [], most
    def read(self, tokens): self.ids += tokens
    def draft(self, size):
        for n in (2, 1):
            for i in range(len(self.ids) - n):
                if self.ids[i:i + n] == self.ids[-n:]:
                    tokens = self.ids[i + n:i + n + size]
                    return tokens, list(range(-1, len(tokens) - 1))
        return [], []

def test_prompt_lookup_gives_our_tokens_and_with_its_rule_our_passes(llama):
    saved = 0
    for i in range(4):
        ids = random.Random(i).choices(range(11), k=12)
        seen, hook = passes(llama)
        peer = generate(llama, ids, 60, prompt_lookup_num_tokens=5)
        hook.remove()
        mine, copied = (speculate(llama, ids, drafter, most=60, size=5) for drafter in (Lookup(60), Copy(2)))
        assert peer == mine.tokens == copied.tokens
        # the peer's last draft is not cut to what is still wanted
        assert len(mine.said) == len(seen) and 0 <= sum(seen) - mine.read <= 5
        saved += 60 - len(seen)
    assert saved > 20  # else this would compare nothing

# ---- drafts

def test_a_copy_is_what_followed_the_last_match():
    rng = random.Random(0)
    for _ in range(100):
        gamma, size, ids = rng.randint(1, 3), rng.randint(1, 6), []
        copier = Copy(gamma)
        for _ in range(40):
            part = rng.choices(range(3), k=rng.randint(1, 3))
            ids += part
            copier.read(part)
            ends = [e for e in range(gamma, len(ids)) if ids[e - gamma:e] == ids[-gamma:]]
            want = ids[ends[-1]:ends[-1] + size] if ends else []
            assert copier.draft(size) == (want, list(range(-1, len(want) - 1)))

def test_visible_and_accepted_against_paths():
    for seed in range(60):
        rng = random.Random(seed)
        tokens, parents = Dice(seed, 7).draft(7)
        def path(i): return [] if i < 0 else path(parents[i]) + [i]
        assert visible(parents).tolist() == [[j in path(i) for j in range(7)] for i in range(7)]
        choice = [rng.choice([t for t, p in zip(tokens, parents) if p == at] + [9]) for at in range(-1, 7)]
        good = [path(i) for i in range(7) if all(tokens[j] == choice[parents[j] + 1] for j in path(i))]
        assert accepted(choice, tokens, parents) == max(good, key=len, default=[])

def test_choose_shares_walkers_like_the_weights():
    weights, seats = {"a": .5, "b": .3, "c": .2}, Counter()
    for _ in range(1000): seats[choose(weights, seats, 1)] += 1
    assert all(abs(seats[t]/1000 - w) < .003 for t, w in weights.items())
    assert choose(weights, {"a": 10**6}, 0) == "a"

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
    t = Trigrams()
    t.read(ids[:100])
    t.read(ids[100:])
    for n in (1, 2):
        brute = Counter(tuple(ids[i - n:i + 1]) for i in range(n, 300))
        assert {k + (c,): v for k, f in t.own.items() if len(k) == n for c, v in f.items()} == brute

def test_what_other_texts_say_weighs_as_told():
    base = {}
    for ids in ([1, 2, 3], [1, 2, 3], [1, 2, 4], [5, 2, 6]):
        for i in range(1, 3): count(base, ids[:i], ids[i])
    t = Trigrams(base, strength=3.)
    t.read([1, 2, 4])
    assert t.odds([1, 2]) == {4: 1 + 1., 3: 2.}
    assert t.odds([9, 2]) == {4: 1 + .75, 3: 1.5, 6: .75}
    assert t.odds([9, 9]) == {}
    assert base[(1, 2)] == {3: 2, 4: 1}  # reading leaves the other texts' counts alone

def test_a_draft_that_learns_gets_better(llama):
    ids, drafter = [1, 2, 3, 4], Trigrams()
    first, again = (speculate(llama, ids, drafter, most=40) for _ in range(2))
    assert first.tokens == again.tokens and len(again.said) < len(first.said)

# ---- one pass, and the cache after it

def test_a_tree_in_one_pass_is_each_branch_in_a_pass_of_its_own(llama):
    text, (tokens, parents) = [1, 2, 3, 4, 5], Dice(3).draft(8)
    cache = DynamicCache(config=llama.config)
    with torch.no_grad():
        look(llama, cache, text[:3])
        rows = look(llama, cache, text[3:], tokens, parents)
        assert rows.shape == (9, 11) and cache.get_seq_length() == 13
        for i in range(-1, 8):
            path, at = [], i
            while at >= 0:
                path.insert(0, tokens[at])
                at = parents[at]
            assert torch.allclose(rows[i + 1], llama(input_ids=torch.tensor([text + path])).logits[0, -1], atol=1e-10)

@pytest.mark.parametrize("taken", [[], [0], [0, 1], [1, 4], [2]])
def test_the_cache_forgets_what_was_not_accepted(llama, taken):
    text, tokens, parents = [1, 2, 3], [4, 5, 6, 7, 8], [-1, 0, -1, 0, 1] if taken != [1, 4] else [-1, -1, 0, 0, 1]
    cache = DynamicCache(config=llama.config)
    with torch.no_grad():
        look(llama, cache, text, tokens, parents)
        keep(cache, 5, taken)
        whole = text + [tokens[i] for i in taken]
        assert cache.get_seq_length() == len(whole)
        want = llama(input_ids=torch.tensor([whole + [9]])).logits[0, -1]
        assert torch.allclose(look(llama, cache, [9])[0], want, atol=1e-10)

def test_a_step_counts_and_leads(llama):
    cache, text = DynamicCache(config=llama.config), [1, 2, 3]
    with torch.no_grad(): top = llama(input_ids=torch.tensor([text])).logits[0, -1].topk(2)
    new, read, lead = step(llama, cache, text, [(top.indices[0].item() + 1) % 11], [-1])
    assert (new, read) == ([top.indices[0].item()], 4) and lead == pytest.approx((top.values[0] - top.values[1]).item())

def test_passes_are_passes_of_the_model(llama):
    seen, hook = passes(llama)
    out = speculate(llama, [1, 2, 1, 2, 1], Copy(1), most=30)
    hook.remove()
    assert len(seen) == len(out.said) and sum(seen) == out.read and len(out.tokens) == 30

def test_limits(llama):
    for most in (1, 2, 7): assert len(speculate(llama, [1, 2, 1, 2], Copy(1), most=most).tokens) == most
    whole = speculate(llama, [1, 2, 1, 2], None, most=30).tokens
    stop = whole[12]
    for drafter in (None, Copy(1), Dice(2)):
        out = speculate(llama, [1, 2, 1, 2], drafter, most=30, end=stop)
        assert out.tokens == whole[:whole.index(stop) + 1] and sum(out.said) == len(out.tokens)

def test_bad_input(llama):
    with pytest.raises(KitError, match="the prompt is empty"): speculate(llama, [])
    forgets = tiny(MistralForCausalLM, MistralConfig, sliding_window=4, num_key_value_heads=4)
    with pytest.raises(KitError, match="no support for mistral"): speculate(forgets, [1, 2])
    whole = tiny(MistralForCausalLM, MistralConfig, sliding_window=None, num_key_value_heads=4)
    assert speculate(whole, [1, 2, 1], Copy(1), most=9).tokens == generate(whole, [1, 2, 1], 9)

# ---- prompts

def test_a_report_has_one_answer_whatever_its_prompt_holds():
    rng = random.Random(5)
    facts, same, other = [[fact(rng, c) for _ in range(4)] for c in [cast(rng)]*2 + [cast(rng)]]
    forms = [report(random.Random(k), facts, *more) for k, more in enumerate([
        (0,),
        (.5,),
        (1,),
        (0, same),
        (0, other)])]
    answer = forms[0][1]
    assert {a for _, a in forms} == {answer} and answer in forms[2][0]
    assert [p.count(" ;") for p, _ in forms] == [4, 2, 0, 4, 4]
    assert [p.count("</s>") for p, _ in forms] == [0, 0, 0, 1, 1]
    lines = [line.rstrip(" .") for line in answer.split(" . ")]
    assert len(lines) == 4 and [sum(line in p for line in lines) for p, _ in forms] == [0, 2, 4, 0, 0]
    tok = build_tokenizer()
    assert NOTE.count("{}") == 6 and tok.unk_token_id not in tok(" ".join(p for p, _ in forms))["input_ids"]

# ---- the notebook

run = partial(ran, NB)

CLAIMS = {"same-tokens", "fewer-passes", "more-redundant-more-tokens", "longer-more-tokens", "faster-where-redundant",
    "learning-draft", "learning-draft-nothing-comes-back", "exploring-draft"}

@pytest.mark.slow
def test_gpu_path_on_a_tiny_checkpoint(tmp_path, torch_pool):
    tok = build_tokenizer()
    tok.save_pretrained(tmp_path/"llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": len(tok), "max_position_embeddings": 1024})).save_pretrained(
        tmp_path/"llama")
    found = run(tmp_path, torch_pool, profile="gpu", model=str(tmp_path/"llama"), rows=1, teach=0)
    assert set(found) == CLAIMS and found["same-tokens"]["value"] == 0
    assert all(math.isfinite(v) for r in found.values() for v in r["arms"].values())
    assert found["fewer-passes"]["model"] == str(tmp_path/"llama") and found["same-tokens"]["n_rows"] == 13

@pytest.mark.slow
def test_same_seed_same_record(tmp_path, torch_pool):
    one, two = (run(tmp_path, torch_pool, name, profile="smoke", seed=3) for name in ("one", "two"))
    assert set(one) == CLAIMS
    assert all(one[c] == two[c] for c in CLAIMS - {"faster-where-redundant"})  # seconds differ
