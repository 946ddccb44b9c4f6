"""Caches of a budget: transformers under the same masks, selections against numpy loops, a cache that really drops,
bad input, the gpu path."""
from functools import partial
import json, math
import numpy as np
import pytest, torch
from conftest import ROOT, ran
from transformers import (GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM,
    Qwen2Config, Qwen2ForCausalLM)
from slmkit.core.data import read_rows
from slmkit.core.settings import KitError
from slmkit.infer.kv_budget import (Full, Heavy, Packed, PerHead, Reader, Recycled, Window, best, distances,
    greedy, look, window_sink)
from slmkit.toyland.tokenizer import build_tokenizer

NB = ROOT/"nbs/infer/kv_budget.ipynb"
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

POLICIES = dict(full=Full, window=lambda: Window(9, 2), heavy=lambda: Heavy(9, 4),
    observed=lambda: Heavy(9, 2, 1, watch=3), recycled=lambda: Recycled(8, 3), per_head=lambda: PerHead(14, 2, 1, 1))

class Logged:
    "Wraps a policy: what was in sight at each pass after the prompt, and what it saw."
    def __init__(self, policy): self.policy, self.drops, self.sights, self.saws = policy, policy.drops, [], []
    @property
    def sees(self): return self.policy.sees
    def saw(self, l, attention, said):
        self.saws.append((l, attention.clone(), said.clone()))
        self.policy.saw(l, attention, said)
        kept = self.policy.sees.get(l)
        self.sights.append((l, None if kept is None else kept.clone()))
    def renew(self): self.policy.renew()

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
    assert torch.equal(greedy(r, r.first, MOST), want)
    # the prompt, then one more each
    assert torch.stack(r.attended).view(-1, 2, 3)[:, 0, 0].tolist() == [*range(N, N + MOST)]

@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_transformers_under_its_masks(model, name):
    tokens, logits, _, log = run(model, POLICIES[name]())
    # its softmax is of float32
    assert torch.allclose(logits, by_transformers(model, prompts(), tokens, log), atol=1e-4)
    if name != "full":
        assert not torch.allclose(logits[:, 1:], run(model, Full())[1][:, 1:], atol=1e-3)  # it does hide something

@pytest.mark.parametrize("name,policy", dict(window=lambda: Window(40), heavy=lambda: Heavy(40, 5),
        observed=lambda: Heavy(40, 2, watch=2), recycled=lambda: Recycled(40, 3), stride_one=lambda: Recycled(2, 1),
        uniform=lambda: PerHead(40, 2, 1, 0)).items())
def test_a_budget_as_long_as_the_text_is_the_full_model(model, name, policy):
    (a, x, *_), (b, y, *_) = run(model, Full()), run(model, policy())
    assert torch.equal(a, b) and torch.allclose(x, y, atol=1e-12)

def test_look_is_transformers_attention():
    from transformers.models.llama.modeling_llama import eager_attention_forward
    from types import SimpleNamespace
    g = torch.Generator().manual_seed(0)
    t = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    q, k, v, sees = t(2, 6, 3, 8), t(2, 3, 7, 8), t(2, 3, 7, 8), torch.rand(2, 3, 3, 7, generator=g) < .6
    sees[..., 0] = True
    mask = torch.zeros(2, 6, 3, 7, dtype=torch.float64).masked_fill(~sees.repeat_interleave(2, 1), -1e300)
    out, weights = eager_attention_forward(SimpleNamespace(num_key_value_groups=2, training=False), q, k, v,
        mask, scaling=.3)
    read, attention = look(q.view(2, 3, 2, 3, 8), k, v, sees, .3)
    assert torch.allclose(read.reshape(2, 6, 3, 8).transpose(1, 2), out, atol=1e-9)
    assert torch.allclose(attention.reshape(2, 6, 3, 7), weights, atol=1e-7)  # its softmax is of float32

# ---- selections against loops in numpy

def test_window_by_hand():
    for places in range(1, 15):
        for budget in range(2, 12):
            for sinks in range(1, budget):
                want = [i < sinks or i >= places - (budget - sinks) for i in range(places)]
                assert window_sink(places, budget, sinks).tolist() == want and sum(want) == min(places, budget)

def test_best_is_a_sort_by_score_then_place():
    rng = np.random.default_rng(0)
    for _ in range(50):
        score, k = rng.integers(0, 5, 9), int(rng.integers(0, 10))
        want = set(sorted(range(9), key=lambda i: (-score[i], i))[:k])
        assert set(np.flatnonzero(best(torch.tensor(score), k).numpy())) == want

@pytest.mark.parametrize("budget,recent,sinks,watch", [(9, 4, 0, 0), (8, 2, 2, 0), (9, 1, 1, 3)])
def test_heavy_hitters_are_a_loop_over_places(model, budget, recent, sinks, watch):
    *_, log = run(model, Heavy(budget, recent, sinks, watch))
    for l in range(2):
        saws, seen = [a.numpy() for k, a, _ in log.saws if k == l], sights(log, l)
        for r in range(3):
            for h in range(model.config.num_key_value_heads):
                total, alive = {}, []
                for step, a in enumerate(saws):
                    places = a.shape[-1]
                    rows = a[r, h][-watch:] if watch and not step else a[r, h]
                    alive += range(N if not step else places - 1, places) if step else range(places)
                    for i in alive: total[i] = total.get(i, 0) + rows[:, i].sum()
                    forced = [i for i in alive if i < sinks or i >= places - recent]
                    rest = sorted((i for i in alive if i not in forced), key=lambda i: (-total[i], i))
                    alive = sorted(forced + rest[:budget - 1 - len(forced)])
                    assert np.flatnonzero(seen[step][r, h].numpy()).tolist() == alive

@pytest.mark.parametrize("budget,stride", [(8, 3), (5, 2), (6, 6)])
def test_recycled_is_a_loop_over_places(model, budget, stride):
    _, _, r, log = run(model, Recycled(budget, stride))
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
    policy = Recycled(7, 2)
    r.under(policy)
    for l, (attention, _) in r.seen.items():
        own = attention[:, :, -1].topk(6).indices.sort(-1).values
        assert torch.equal(policy.sees[l].nonzero()[:, -1].view(*own.shape), own)

# ---- budgets by head

def test_distances_in_numpy():
    said = np.random.default_rng(0).normal(size=(4, 5, 6))
    want = np.sqrt(((said - said.mean(1)[:, None])**2).sum(-1))
    assert np.allclose(distances(torch.tensor(said)).numpy(), want)

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
    *_, log = run(model, PerHead(budget, 2, 1, far))
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
    r, far, near = Reader(model, prompts()), PerHead(12, 2), PerHead(12, 2, rank=lambda l, said: -distances(said))
    r.under(far)
    r.under(near)
    for l, (_, said) in r.seen.items():
        whole = [(p.share[l] == N)[..., 0].int().argmax(-1) for p in (far, near)]
        assert torch.equal(whole[0], distances(said).argmax(-1)) and torch.equal(whole[1], distances(said).argmin(-1))

# ---- a cache that drops

@pytest.mark.parametrize("name", POLICIES)
def test_a_dropping_cache_says_the_same_with_the_bytes_that_are_in_sight(llama, name):
    (a, x, masked, log), (b, y, packed, _) = (run(llama, POLICIES[name](), cls=cls) for cls in (Reader, Packed))
    assert torch.equal(a, b) and torch.allclose(x, y, atol=1e-12)
    assert torch.equal(torch.stack(masked.attended), torch.stack(packed.attended))
    place = 2*4*8  # keys and values, d, bytes of a float64
    whole = 2*3*2*(N + MOST)*place  # layers, rows, key heads
    seen = sum(x.sum().item() for x in masked.attended[-2:])*2*place if masked.policy.drops else whole
    assert packed.bytes() == seen and (seen < whole) == masked.policy.drops

def test_recycling_reads_the_next_question_with_everything_in_sight(llama):
    more = prompts(n=4, seed=3)
    full, recycled = (Reader(llama, prompts()).under(p) for p in (Full(), Recycled(6, 2)))
    for r in (full, recycled): r.policy.renew()
    assert torch.allclose(full.read(more), recycled.read(more), atol=1e-12)
    assert recycled.policy.sees[0].sum(-1).unique().tolist() == [5]  # and recycles from its last token

# ---- bad input

def test_bad_input(llama):
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1))
    mistral = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4))
    for m, name in ((gpt, "gpt2"), (mistral, "mistral")):
        with pytest.raises(KitError, match=f"no support for {name}"): Reader(m, prompts())
    with pytest.raises(KitError, match="stride 5 needs a budget"): Recycled(4, 5)
    r = Reader(llama, prompts())
    for policy in (PerHead(11, 2, 1, 1), PerHead(14, 2, 1, 2)):
        with pytest.raises(KitError, match="PerHead: . of 2 heads") as e: r.under(policy)
        assert "\n" not in str(e.value)

# ---- the notebook

notebook = partial(ran, NB)

CLAIMS = {"recycled-places", "recycled-neighbourhoods", "shorter-stride", "far-heads",
    "heads-chosen-anew", "second-question"}
def saved(folder, heads=4):
    tok = build_tokenizer()
    tok.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=24, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=heads, bos_token_id=tok.bos_token_id, eos_token_id=1,
            pad_token_id=0)).save_pretrained(folder)
    return str(folder)

@pytest.mark.slow
def test_gpu_path_on_a_tiny_checkpoint_that_shares_keys_and_records_of_ones_own(tmp_path, torch_pool):
    mine, model = tmp_path/"mine.jsonl", saved(tmp_path/"llama", heads=2)
    row = lambda i: dict(records=[[f"key{i}{j}", " ".join(["red", "blue", "9", "tom"][:1 + j % 4])]
            for j in range(12)], key=f"key{i}3")
    mine.write_text("\n".join(json.dumps(row(i)) for i in range(5)), encoding="utf-8")
    found = notebook(tmp_path, torch_pool, profile="gpu", model=model, data=str(mine), places=12, teach=2)
    assert set(found) == CLAIMS and found["far-heads"]["n_rows"] == 5 and found["far-heads"]["model"] == model
    assert all(math.isfinite(v) for r in found.values() for v in r["arms"].values())  # answers have one to four words

def test_a_file_without_records_is_refused(tmp_path):
    cell = next("".join(c["source"]) for c in json.loads(NB.read_text(encoding="utf-8"))["cells"]
        if "def from_file" in "".join(c["source"]))
    exec(cell, names := dict(read_rows=read_rows, KitError=KitError))
    mine = tmp_path/"mine.jsonl"
    mine.write_text('{"input": "a", "label": "b"}\n', encoding="utf-8")
    with pytest.raises(KitError, match="rows need the columns records") as e: names["from_file"](str(mine), None)
    assert "\n" not in str(e.value)

@pytest.mark.slow
def test_same_seed_same_record(tmp_path, torch_pool):
    one, two = (notebook(tmp_path, torch_pool, name, profile="smoke", seed=3) for name in ("one", "two"))
    assert one == two and set(one) == CLAIMS - {"second-question"}  # whose curves are slow
