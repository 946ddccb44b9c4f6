"""Replicas trained together against the same replicas trained one by one, over kinds of model, paddings, lengths and
rates; one record for each seed."""
import copy, json, random
import pytest, torch
from conftest import RECORD
from test_decode import KINDS as DECODE
from test_runner import go
from test_ledger import ten
from transformers import (BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaConfig,
    LlamaForCausalLM, T5Config, T5ForConditionalGeneration)
from slmkit.core.claims import read_entry
from slmkit.core.fit import batches, fit
from slmkit.core.settings import KitError
from slmkit.core.stacked import CAUSAL, fit_many
from slmkit.run.records import reading
from slmkit.verdicts.attest import reattest
from slmkit.verdicts.ledger import publish, verdicts
torch.set_num_threads(1)

T5 = dict(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
    pad_token_id=0, eos_token_id=1, dropout_rate=0.)
BERT = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    num_labels=3, hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
KINDS = {k: DECODE[k]
    for k in ("llama", "llama_shared_heads", "llama_scaled",
        "qwen2")} | dict(t5=lambda: T5ForConditionalGeneration(T5Config(**T5)),
    t5_gated=lambda: T5ForConditionalGeneration(T5Config(**T5, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False)), bert=lambda: BertForSequenceClassification(BertConfig(**BERT)),
    gpt2=lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=60, pad_token_id=0,
        bos_token_id=2, eos_token_id=1, resid_pdrop=0., embd_pdrop=0., attn_pdrop=0.)))
loss = lambda model, batch: model(**batch).loss

def rows(kind, seed, n=24):
    "Rows of unequal lengths."
    rng = random.Random(seed)
    draw = lambda most: [rng.randrange(3, 60) for _ in range(rng.randrange(2, most))]
    if kind == "bert": return [dict(input_ids=draw(9), labels=[rng.randrange(3)]) for _ in range(n)]
    if kind.startswith("t5"): return [dict(input_ids=draw(9), labels=draw(5)) for _ in range(n)]
    return [dict(input_ids=x, labels=[-100] + x[1:]) for x in (draw(9) for _ in range(n))]

def feed(kind, seed):
    for b in batches(rows(kind, seed), 8, 0, random.Random(seed)):
        yield b | (dict(labels=b["labels"][:, 0]) if kind == "bert" else {})

def replicas(kind, n=3, double=False):
    torch.manual_seed(0)
    models = [KINDS[kind]() for _ in range(n)]
    return [m.double() if double else m for m in models]

def both(kind, double=False, n=3, lr=.01, **how):
    "(models, histories) one by one and together, from the same start."
    apart, joint = ([copy.deepcopy(m) for m in replicas(kind, n, double)] for _ in range(2))
    a = fit_many(apart, loss, [feed(kind, i) for i in range(n)], stacked=False, lr=lr, progress=False, **how)
    b = fit_many(joint, loss, [feed(kind, i) for i in range(n)], stacked=True, lr=lr, progress=False, **how)
    return apart, joint, a, b

def off(apart, joint):
    return max((p - q).abs().max().item() for m, w in zip(apart, joint)
        for p, q in zip(m.state_dict().values(), w.state_dict().values()) if p.is_floating_point())

def test_all_kinds_that_can_be_stacked_are_tested():
    assert {KINDS[k]().config.model_type for k in KINDS} == set(CAUSAL)

@pytest.mark.parametrize("kind", KINDS)
def test_in_double_precision_the_weights_are_those_of_single_runs(kind):
    apart, joint, a, b = both(kind, double=True, steps=12, relative_lr=True)
    assert off(apart, joint) < 2e-6  # Adam's first steps are signs: near 0 they enlarge the last digits
    # transformers computes losses in float32
    assert max(abs(x - y) for h, g in zip(a, b) for x, y in zip(h.loss, g.loss)) < 2e-6
    assert a[0].loss != a[1].loss and min(a[0].loss) < a[0].loss[0]
    assert [h.tokens for h in a] == [h.tokens for h in b] and [h.compute for h in a] == [h.compute for h in b]

def reordered(data, seed):
    "The same batches with their rows in another order: the same losses, summed otherwise."
    rng = random.Random(seed)
    for b in data:
        order = torch.tensor(rng.sample(range(len(b["input_ids"])), len(b["input_ids"])))
        yield {k: v[order] for k, v in b.items()}

def furthest(one, two): return max(abs(x - y) for h, g in zip(one, two) for x, y in zip(h.loss, g.loss))

@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_in_single_precision_the_losses_differ_as_by_another_order_of_summation(kind):
    how = dict(steps=12, lr=.003)  # so few that a rounding is not yet a path of its own, as it is after 20 at .01
    _, joint, a, b = both(kind, **how)
    orders = [fit_many(replicas(kind), loss, [reordered(feed(kind, i), seed) for i in range(3)], stacked=False,
        progress=False, **how) for seed in range(3)]
    rounding = max(furthest(a, c) for c in orders)
    assert 0 < rounding and furthest(a, b) < 10*rounding
    assert a[0].loss != a[1].loss and furthest(a[:1], a[1:2]) > 1e3*rounding  # another replica would be seen
    assert joint[0].config._attn_implementation == replicas(kind)[0].config._attn_implementation
    assert not joint[0]._forward_pre_hooks

def test_replicas_end_when_their_own_tokens_are_used_up():
    apart, joint, a, b = both("llama", double=True, tokens=700)
    assert len({h.steps for h in a}) > 1 and [h.steps for h in a] == [h.steps for h in b] and off(apart, joint) < 2e-6

def test_every_replica_has_its_own_rate_and_frozen_weights_stay():
    models = replicas("llama", 2, True)
    for m in models: m.model.embed_tokens.weight.requires_grad_(False)
    apart, joint = ([copy.deepcopy(m) for m in models] for _ in range(2))
    how = dict(lr=[.01, 0.], steps=6, clip=.1, progress=False)
    fit_many(apart, loss, [feed("llama", i) for i in range(2)], stacked=False, **how)
    fit_many(joint, loss, [feed("llama", i) for i in range(2)], stacked=True, **how)
    assert off(apart, joint) < 2e-6 and off(joint[1:], models[1:]) == 0 < off(joint[:1], models[:1])
    assert torch.equal(joint[0].model.embed_tokens.weight, models[0].model.embed_tokens.weight)

def test_nested_batches_of_two_tasks():
    two = lambda model, batch: loss(model, batch["a"]) + .5*loss(model, batch["b"])
    def feeds():
        for x, y in zip(feed("t5", 0), feed("t5", 1)): yield dict(a=x, b=y)
    apart, joint = (replicas("t5", 2, True) for _ in range(2))
    a = fit_many(apart, two, [feeds(), feeds()], stacked=False, steps=3, progress=False)
    b = fit_many(joint, two, [feeds(), feeds()], stacked=True, steps=3, progress=False)
    assert off(apart, joint) < 2e-6 and [h.tokens for h in a] == [h.tokens for h in b]

def test_bfloat16_trains():
    _, _, a, b = both("llama", steps=30, bf16=True)
    assert b[0].loss[-1] < b[0].loss[0] and abs(a[0].loss[-1] - b[0].loss[-1]) < .3

def refused(match, models, data, loss=loss, **how):
    with pytest.raises(KitError, match=match) as e:
        fit_many(models, loss, data, stacked=True, progress=False, **{"steps": 2} | how)
    assert "\n" not in str(e.value)

def test_what_can_not_be_stacked_is_one_clear_line():
    feeds = lambda kind="llama": [feed(kind, i) for i in range(2)]
    refused("say how long", replicas("llama", 2), feeds(), steps=0)
    refused("2 models and 3 streams", replicas("llama", 2), [*feeds(), feed("llama", 2)])
    refused("asks for a tensor's value", replicas("llama", 2), feeds(),
        lambda m, b: loss(m, b)*(2 if b["labels"].max() > 5 else 1))
    shapes = [LlamaForCausalLM(LlamaConfig(vocab_size=60, hidden_size=h, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2)) for h in (16, 32)]
    refused("the models differ", shapes, feeds())
    refused("random numbers \\(dropout", [T5ForConditionalGeneration(T5Config(**T5 | dict(dropout_rate=.1)))
            for _ in range(2)], feeds("t5"))
    few = batches(rows("llama", 1, 5), 8, 0, random.Random(0))
    refused("batches of 5 and 8 rows", replicas("llama", 2), [feed("llama", 0), few])
    other = DECODE["gpt2"]()
    other.config.model_type = "unheard"
    refused("kind 'unheard'", [other, other], feeds())
    refused("NaN or infinite", replicas("llama", 2), feeds(), lambda m, b: loss(m, b)*float("nan"))

def test_on_a_cpu_they_go_one_by_one_unless_told():
    hs = fit_many(replicas("llama", 2), loss, [feed("llama", i) for i in range(2)], steps=1, progress=False)
    assert [h.stacked for h in hs] == [False, False]

MANY = RECORD.replace("def record(self, value):", "def record(self, value, seed):")
def test_one_run_leaves_a_record_for_each_seed_marked_stacked(tiny, tmp_path):
    path = tiny("s", MANY, "for s in range(seed, seed + 3): c.record(s*.5, s)")
    first, second = go(path, tmp_path/"r")[0], go(path, tmp_path/"r", seeds=(2,))[0]
    lines = reading(tmp_path/"r")[0]
    assert [(r["seed"], r["claims"]["tiny"]["value"], r["stacked"]) for r in lines] == [(0, 0., True),
        (1, .5, True), (2, 1., True)]
    # answered by the first run
    assert second == lines[2] and first == lines[0] and lines[0]["notebook"] == lines[2]["notebook"]
    assert lines[0]["seconds"] == lines[1]["seconds"] > 0

def test_build_seeds_and_confirm_seeds_do_not_share_a_run(tiny, tmp_path):
    go(tiny("s", MANY, "for s in (seed, seed + 1): c.record(1., s)"), tmp_path/"r", seeds=(99,))
    assert [r["seed"] for r in reading(tmp_path/"r")[0]] == [99]

def test_no_verdict_mixes_stacked_and_single_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("SLMKIT_LEDGER", str(tmp_path))
    mixed = ten()
    mixed[3]["stacked"] = True
    with pytest.raises(KitError, match="one verdict holds one kind"): publish(mixed, "confirm")
    entry = read_entry(publish(ten(stacked=True), "confirm"))
    assert all(r["stacked"] for r in entry["runs"])
    with pytest.raises(KitError, match="nothing is attested"): reattest(entry, ten()[0])
