"KV caches of a budget: transformers under the same masks, selections against numpy, one key head, bad input."
import math, random
import numpy as np
import pytest, torch
from conftest import ROOT, ran
from transformers import (GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM,
    Qwen2Config, Qwen2ForCausalLM)
from slmkit.core.settings import KitError
from slmkit.infer.kv_cache import (FullCache, H2O, Reader, RecycledAttention, SnapKV, StreamingLLM, TaskKV,
    masked_attention, records, row_of, top_k_mask, window_sink)
from slmkit.toyland.tokenizer import build_tokenizer

NB = ROOT/"nbs/infer/kv_cache_repro.ipynb"
SHAPE = dict(vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256)
N, MOST = 21, 9

def tiny(cls=LlamaForCausalLM, config=LlamaConfig, seed=0, **more):
    "A random decoder in float64 whose attention is sharp enough to matter."
    torch.manual_seed(seed)
    m = cls(config(**{**SHAPE, **more})).double().eval()
    with torch.no_grad():
        for layer in m.model.layers:
            layer.self_attn.q_proj.weight *= 30
            layer.self_attn.v_proj.weight *= 5
    m.generation_config.eos_token_id = m.generation_config.pad_token_id = None
    m.set_attn_implementation("eager")
    return m
MODELS = dict(llama=lambda: tiny(), qwen=lambda: tiny(Qwen2ForCausalLM, Qwen2Config, seed=1, hidden_size=24,
        num_attention_heads=6, num_key_value_heads=3))
@pytest.fixture(scope="module", params=MODELS)
def model(request): return MODELS[request.param]()
@pytest.fixture(scope="module")
def llama(): return tiny()
def prompts(rows=3, n=N, seed=0): return torch.randint(0, 29, (rows, n), generator=torch.Generator().manual_seed(seed))

POLICIES = dict(full=FullCache, streaming=lambda: StreamingLLM(9, 2), h2o=lambda: H2O(9, 4),
    snapkv=lambda: SnapKV(9, 3, 1), recycled=lambda: RecycledAttention(8, 3), task_kv=lambda: TaskKV(14, 2, 1, 1))

class Logged:
    "Wraps a policy: what was in sight at each pass after the prompt, and what it saw."
    def __init__(self, policy): self.policy, self.sights, self.saws = policy, [], []
    @property
    def visible(self): return self.policy.visible
    def update(self, l, attention, outputs):
        self.saws.append((l, attention.clone(), outputs.clone()))
        self.policy.update(l, attention, outputs)
        kept = self.policy.visible.get(l)
        self.sights.append((l, None if kept is None else kept.clone()))
    def new_query(self): self.policy.new_query()

def run(model, policy, ids=None, cls=Reader, most=MOST):
    "(tokens, logits of every step, reader, log)"
    ids, log = prompts() if ids is None else ids, Logged(policy)
    r = cls(model, ids).under(log)
    logits, tokens = [r.first], []
    for _ in range(most):
        tokens.append(logits[-1].argmax(-1))
        logits.append(r.read(tokens[-1][:, None]))
    return torch.stack(tokens, 1), torch.stack(logits, 1), r, log

def sights(log, l): return [s for k, s in log.sights if k == l]

def by_transformers(model, ids, tokens, log):
    """Logits of transformers' own forward pass over all tokens at once, each layer and head under the mask that the
    policy made."""
    whole, n, layers = torch.cat([ids, tokens], 1), ids.shape[1], len(model.model.layers)
    total, heads = whole.shape[1], model.config.num_attention_heads
    group, hooks = heads//model.config.num_key_value_heads, []
    for l, layer in enumerate(model.model.layers):
        sees = torch.ones(total, total, dtype=torch.bool).tril().expand(len(ids), heads, -1, -1).clone()
        for step, kept in enumerate(sights(log, l)[:tokens.shape[1]]):
            if kept is not None: sees[:, :, n + step, :n + step] = kept.repeat_interleave(group, 1)
        mask = torch.zeros(sees.shape, dtype=torch.float64).masked_fill(~sees, -1e300)
        hooks.append(layer.self_attn.register_forward_pre_hook(lambda m, a, kw, mask=mask: (a,
                {**kw, "attention_mask": mask}), with_kwargs=True))
    with torch.no_grad(): logits = model(input_ids=whole).logits[:, n - 1:]
    for h in hooks: h.remove()
    return logits

# ---- the peer: transformers

def test_everything_in_sight_is_generate(model):
    ids = prompts()
    want = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=MOST,
        do_sample=False)[:, N:]
    r = Reader(model, ids)
    assert torch.equal(r.greedy(r.first, MOST), want)
    # the prompt, then one more each
    assert torch.stack(r.attended).view(-1, 2, 3)[:, 0, 0].tolist() == [*range(N, N + MOST)]

@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_transformers_under_its_masks(model, name):
    tokens, logits, _, log = run(model, POLICIES[name]())
    # its softmax is of float32
    assert torch.allclose(logits, by_transformers(model, prompts(), tokens, log), atol=1e-4)
    if name != "full":
        assert not torch.allclose(logits[:, 1:], run(model, FullCache())[1][:, 1:], atol=1e-3)  # it does hide something

@pytest.mark.parametrize("name,policy", dict(streaming=lambda: StreamingLLM(40), h2o=lambda: H2O(40, 5),
        snapkv=lambda: SnapKV(40, 2), recycled=lambda: RecycledAttention(40, 3),
        stride_one=lambda: RecycledAttention(2, 1), uniform=lambda: TaskKV(40, 2, 1, 0)).items())
def test_a_budget_as_long_as_the_text_is_the_full_model(model, name, policy):
    (a, x, *_), (b, y, *_) = run(model, FullCache()), run(model, policy())
    assert torch.equal(a, b) and torch.allclose(x, y, atol=1e-12)

def test_masked_attention_is_transformers_attention():
    from transformers.models.llama.modeling_llama import eager_attention_forward
    from types import SimpleNamespace
    g = torch.Generator().manual_seed(0)
    t = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    q, k, v, sees = t(2, 6, 3, 8), t(2, 3, 7, 8), t(2, 3, 7, 8), torch.rand(2, 3, 3, 7, generator=g) < .6
    sees[..., 0] = True
    mask = torch.zeros(2, 6, 3, 7, dtype=torch.float64).masked_fill(~sees.repeat_interleave(2, 1), -1e300)
    out, weights = eager_attention_forward(SimpleNamespace(num_key_value_groups=2, training=False), q, k, v,
        mask, scaling=.3)
    read, attention = masked_attention(q.view(2, 3, 2, 3, 8), k, v, sees, .3)
    assert torch.allclose(read.reshape(2, 6, 3, 8).transpose(1, 2), out, atol=1e-9)
    assert torch.allclose(attention.reshape(2, 6, 3, 7), weights, atol=1e-7)  # its softmax is of float32

# ---- selections against loops in numpy

def test_window_by_hand():
    for places in range(1, 15):
        for budget in range(2, 12):
            for sinks in range(1, budget):
                want = [i < sinks or i >= places - (budget - sinks) for i in range(places)]
                assert window_sink(places, budget, sinks).tolist() == want and sum(want) == min(places, budget)

def test_top_k_is_a_sort_by_score_then_place():
    rng = np.random.default_rng(0)
    for _ in range(50):
        score, k = rng.integers(0, 5, 9), int(rng.integers(0, 10))
        want = set(sorted(range(9), key=lambda i: (-score[i], i))[:k])
        assert set(np.flatnonzero(top_k_mask(torch.tensor(score), k).numpy())) == want

@pytest.mark.parametrize("budget,recent,sinks", [(9, 4, 0), (8, 2, 2), (9, 1, 1)])
def test_heavy_hitters_are_a_loop_over_places(model, budget, recent, sinks):
    *_, log = run(model, H2O(budget, recent, sinks))
    for l in range(2):
        saws, seen = [a.numpy() for k, a, _ in log.saws if k == l], sights(log, l)
        for r in range(3):
            for h in range(model.config.num_key_value_heads):
                total, alive = {}, []
                for step, a in enumerate(saws):
                    places = a.shape[-1]
                    rows = a[r, h]
                    alive += range(N if not step else places - 1, places) if step else range(places)
                    for i in alive: total[i] = total.get(i, 0) + rows[:, i].sum()
                    forced = [i for i in alive if i < sinks or i >= places - recent]
                    rest = sorted((i for i in alive if i not in forced), key=lambda i: (-total[i], i))
                    alive = sorted(forced + rest[:budget - 1 - len(forced)])
                    assert np.flatnonzero(seen[step][r, h].numpy()).tolist() == alive

def test_snapkv_decides_once_from_the_window_s_pooled_attention(model):
    *_, log = run(model, SnapKV(9, 3, 1))
    for l in range(2):
        seen, first = sights(log, l), next(a for k, a, _ in log.saws if k == l)[:, :, -3:].sum(2).numpy()
        for r in range(3):
            for h in range(first.shape[1]):
                pooled = [first[r, h][max(0, i - 1):i + 2].max() for i in range(N)]
                rest = sorted(range(N - 3), key=lambda i: (-pooled[i], i))[:6]
                want = sorted([*rest, *range(N - 3, N)])
                for step in range(MOST):
                    assert np.flatnonzero(seen[step][r, h]).tolist() == want + [*range(N, N + step)]

@pytest.mark.parametrize("budget,stride", [(8, 3), (5, 2), (6, 6)])
def test_recycled_is_a_loop_over_places(model, budget, stride):
    _, _, r, log = run(model, RecycledAttention(budget, stride))
    for l in range(2):
        saws, seen = [a.numpy() for k, a, _ in log.saws if k == l], sights(log, l)
        for step in range(MOST):  # what is in sight at the pass that comes next
            age = step % stride
            if age == stride - 1:
                assert seen[step] is None
                continue
            full = saws[step - age][:, :, -1]
            for row in range(3):
                for h in range(full.shape[1]):
                    top = sorted(range(full.shape[-1]), key=lambda i: (-full[row, h, i], i))[:budget - 1 - age]
                    want = sorted(top + [*range(N + step - age, N + step)])
                    assert np.flatnonzero(seen[step][row, h].numpy()).tolist() == want
    attended = torch.stack(r.attended).view(MOST, 2, 3)[:, 0, 0].tolist()
    assert attended == [N + i if i % stride == 0 else budget for i in range(1, MOST + 1)]

def test_recycling_one_step_is_exact_top_k_of_the_last_full_step(model):
    """Stride 2 on the prompt's own last token again: the recycled places are its own top k, so nothing better could
    be chosen."""
    ids = prompts()
    r = Reader(model, ids)
    policy = RecycledAttention(7, 2)
    r.under(policy)
    for l, (attention, _) in r.seen.items():
        own = attention[:, :, -1].topk(6).indices.sort(-1).values
        assert torch.equal(policy.visible[l].nonzero()[:, -1].view(*own.shape), own)

# ---- budgets by head

def distances(outputs): return (outputs - outputs.mean(1, keepdim=True)).norm(dim=-1)

def test_what_heads_say_adds_up_to_the_layer(model):
    ids, caught = prompts(), {}
    hooks = [layer.self_attn.register_forward_hook(lambda m, a, out, l=l: caught.update({l: out[0][:, -1]}))
        for l, layer in enumerate(model.model.layers)]
    with torch.no_grad(): model(input_ids=ids)
    for h in hooks: h.remove()
    for l, (_, said) in Reader(model, ids).seen.items(): assert torch.allclose(said.sum(1), caught[l], atol=1e-5)

@pytest.mark.parametrize("far", [0, 1, 2])
def test_budgets_by_head_sum_to_the_uniform_total(far):
    model = tiny(Qwen2ForCausalLM, Qwen2Config, num_attention_heads=4, num_key_value_heads=4)
    budget = {0: 9, 1: 12, 2: 15}[far]
    *_, log = run(model, TaskKV(budget, 2, 1, far))
    for l in range(2):
        said = next(s for k, _, s in log.saws if k == l)
        first = {tuple(x) for x in distances(said).topk(far).indices.sort(-1).values.tolist()} if far else None
        for step, seen in enumerate(sights(log, l)):
            count = seen.sum(-1) + 1  # with the token that comes
            assert (4*budget - 4 < count.sum(1)).all() and (count.sum(1) <= 4*budget).all()  # whole places only
            assert (count == min(N, N + step)).sum(1).tolist() == [far]*3
            if far and not step: assert {tuple(x.nonzero()[:, 0].tolist()) for x in count == N} == first

def test_other_rankings_choose_other_heads():
    model = tiny(Qwen2ForCausalLM, Qwen2Config, num_attention_heads=4, num_key_value_heads=4)
    r, far, near = Reader(model, prompts()), TaskKV(12, 2), TaskKV(12, 2, rank=lambda l, said: -distances(said))
    r.under(far)
    r.under(near)
    for l, (_, said) in r.seen.items():
        whole = [(p.share[l] == N)[..., 0].int().argmax(-1) for p in (far, near)]
        assert torch.equal(whole[0], distances(said).argmax(-1)) and torch.equal(whole[1], distances(said).argmin(-1))

def test_one_key_head_shares_an_even_budget():
    model = tiny(num_key_value_heads=1)
    (a, x, *_), (b, y, *_) = run(model, TaskKV(9, 2, 1, 1)), run(model, H2O(9, 2, 1))
    assert torch.equal(a, b) and torch.equal(x, y)
    for policy in POLICIES.values(): assert run(model, policy())[0].shape == (3, MOST)

# ---- more than one question

def test_recycling_reads_the_next_question_with_everything_in_sight(llama):
    more = prompts(n=4, seed=3)
    full, recycled = (Reader(llama, prompts()).under(p) for p in (FullCache(), RecycledAttention(6, 2)))
    for r in (full, recycled): r.policy.new_query()
    assert torch.allclose(full.read(more), recycled.read(more), atol=1e-12)
    assert recycled.policy.visible[0].sum(-1).unique().tolist() == [5]  # and recycles from its last token

# ---- bad input

def test_bad_input(llama):
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1))
    mistral = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4))
    for m, name in ((gpt, "gpt2"), (mistral, "mistral")):
        with pytest.raises(KitError, match=f"no support for {name}"): Reader(m, prompts())
    with pytest.raises(KitError, match="stride 5 needs as many"): RecycledAttention(4, 5)
    r = Reader(llama, prompts())
    for policy in (TaskKV(11, 2, 1, 1), TaskKV(14, 2, 1, 2)):
        with pytest.raises(KitError, match="TaskKV: . of 2 heads") as e: r.under(policy)
        assert "\n" not in str(e.value)

# ---- texts, and the notebook

def test_records_are_asked_by_name_and_by_the_name_before():
    tok = build_tokenizer()
    for seed in range(20):
        text, questions = records(random.Random(seed), 6, 4, ["of", "after"], 4)
        names = [r.split()[0] for r in text.split(" . ")]
        assert len(names) == 6 and len({a for _, a in questions}) == 4
        for question, answer in questions:
            if question.startswith("after"):
                before, name = question.split()[1], answer.split()[0]
                assert names.index(name) == (names.index(before) + 1 if before in names else 0)
                assert f"{answer} ." in text
            else: assert f"{question} {answer} ." in text
        row = row_of(tok, text, questions[:2])
        assert tok.unk_token_id not in row["prompt"] + row["answer"] and row["prompt"][0] == tok.bos_token_id

CLAIMS = {"recycled-places", "recycled-neighbourhoods", "shorter-stride", "far-heads",
    "heads-chosen-anew", "second-question"}
def saved(folder, heads):
    tok = build_tokenizer()
    tok.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=24, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=heads, bos_token_id=tok.bos_token_id, eos_token_id=1,
            pad_token_id=0)).save_pretrained(folder)
    return str(folder)

@pytest.mark.slow
@pytest.mark.parametrize("heads", [1, 2])
def test_a_tiny_checkpoint_that_shares_keys(tmp_path, torch_pool, heads):
    found = ran(NB, tmp_path, torch_pool, profile="smoke", model=saved(tmp_path/"llama", heads))
    assert set(found) == CLAIMS and all(math.isfinite(v) for r in found.values() for v in r["arms"].values())

@pytest.mark.slow
def test_same_seed_same_record(tmp_path, torch_pool):
    one, two = (ran(NB, tmp_path, torch_pool, name, profile="smoke", seed=3) for name in ("one", "two"))
    assert one == two and set(one) == CLAIMS
