"Training above a trunk against training the whole model with the same layers frozen: losses, gradients and updates."
import copy, itertools, random
from types import SimpleNamespace
import pytest, torch
from transformers import (BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM,
                          LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, Qwen2Config, Qwen2ForCausalLM,
                          Qwen3Config, Qwen3ForCausalLM)
from slmkit.core.experiment import Trial
from slmkit.core.fit import batches, fit, label_loss, lm_loss
from slmkit.core.lora import adapted_layers, inject
from slmkit.core.settings import KitError, settings
from slmkit.core.trunk import Trunk, decoder_layers, row_keys, trunk_bytes

SHAPE = dict(vocab_size=40, pad_token_id=0, bos_token_id=2, eos_token_id=1, initializer_range=.3)
WIDE = SHAPE | dict(hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4)
STILL = dict(attn_pdrop=0., embd_pdrop=0., resid_pdrop=0.)

def llama(heads=2, **more): return LlamaForCausalLM(LlamaConfig(**WIDE, num_key_value_heads=heads, **more))

MODELS = {
    "llama, grouped heads": llama,
    "llama, one key head": lambda: llama(1),
    "llama, as many key heads": lambda: llama(4),
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "llama, eager": lambda: llama(attn_implementation="eager"),
    "qwen2, sliding above": lambda: Qwen2ForCausalLM(Qwen2Config(**WIDE, num_key_value_heads=2, use_sliding_window=True,
        sliding_window=3, max_window_layers=3)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**WIDE, num_key_value_heads=2, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SHAPE, n_embd=16, n_layer=4, n_head=4, n_positions=32, **STILL)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**WIDE, max_position_embeddings=32)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SHAPE, hidden_size=16, ffn_dim=24, num_hidden_layers=4,
        num_attention_heads=4, word_embed_proj_dim=16, max_position_embeddings=32, dropout=0.)),
}

def made(kind):
    "A decoder of that kind in which only the last layer is trained."
    torch.manual_seed(0)
    model = MODELS[kind]().requires_grad_(False)
    decoder_layers(model)[1][3].requires_grad_(True)
    return model.train()

def batch(left=False, rows=3, length=9):
    "Rows of several lengths, padded at the right or at the left; the labels are each row's last two tokens."
    g = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(3, 40, (rows, length), generator=g), torch.ones(rows, length, dtype=torch.long)
    labels = torch.full((rows, length), -100)
    for i in range(rows):
        read = slice(i, length) if left else slice(0, length - i)
        mask[i] = 0
        mask[i, read] = 1
        labels[i, read.stop - 2:read.stop] = ids[i, read.stop - 2:read.stop]
    return dict(input_ids=ids.where(mask == 1, 0), attention_mask=mask, labels=labels)

def gradients(model, loss, *given):
    "(loss, gradients) of the last layer, over batches."
    model.zero_grad()
    value = sum(loss(model, b) for b in given)
    value.backward()
    return value.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

def assert_close(one, two, atol=2e-5):
    assert torch.allclose(one[0], two[0], atol=atol, rtol=0) and len(one[1]) == len(two[1]) > 0
    for a, b in zip(one[1], two[1]): assert torch.allclose(a, b, atol=atol, rtol=1e-4)

def refused(f, *args, **kw):
    with pytest.raises(KitError) as e: f(*args, **kw)
    assert "\n" not in str(e.value)
    return str(e.value)

# ---- the same numbers

@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_loss_and_gradients_are_those_of_the_whole_model(kind, left):
    model, given = made(kind), [batch(left), batch(left, 5, 12)]
    whole = gradients(model, lm_loss, *given)
    assert_close(gradients(model, label_loss, *given), whole)
    with Trunk(model, 3): assert_close(gradients(model, lm_loss, *given, *given), gradients_twice(whole))
    with Trunk(model, 2): assert_close(gradients(model, label_loss, *given), whole)
    assert_close(gradients(model, lm_loss, *given), whole)  # all layers are back

def gradients_twice(whole): return 2*whole[0], [2*g for g in whole[1]]

def test_positions_and_masks_that_the_batch_gives():
    model, given = made("llama, grouped heads"), batch()
    given["attention_mask"][0, 3] = 0
    far = given | dict(position_ids=torch.arange(9)[None]*3)
    for b in (given, far):
        whole = gradients(model, lm_loss, b)
        with Trunk(model, 3) as trunk:
            assert_close(gradients(model, lm_loss, b), whole)
            assert not torch.allclose(lm_loss(model, b), lm_loss(model, batch()), atol=1e-3)
        assert len(trunk.rows) == (6 if "position_ids" in b else 4)  # two rows have no hole and stay where they were

def test_positions_that_the_batch_gives_are_another_row():
    one, far = batch(), batch() | dict(position_ids=torch.arange(9)[None]*3)
    keys = [row_keys(b["input_ids"], b["attention_mask"], b.get("position_ids")) for b in (one, far)]
    assert not set(keys[0]) & set(keys[1])

def test_a_row_is_known_again_in_a_batch_of_another_length():
    short, long = batch(rows=2, length=7), batch(rows=2, length=7)
    long = {k: torch.nn.functional.pad(v, (0, 4), value=-100 if k == "labels" else 0) for k, v in long.items()}
    model = made("gpt2")
    with Trunk(model, 3) as trunk:
        first = lm_loss(model, short)
        assert torch.allclose(first, lm_loss(model, long), atol=1e-5) and len(trunk.rows) == 2
    left = row_keys(*(batch(left=True)[k] for k in ("input_ids", "attention_mask")))
    assert [k[0] for k in left] == [0, 1, 2] and [len(k[1]) for k in left] == [9, 8, 7]
    assert row_keys(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3)) == [(0, (), (), ())]

@pytest.mark.parametrize("kind", ["gpt2", "llama, grouped heads"])
def test_a_call_by_position_is_read_as_the_model_reads_it(kind):
    model, given = made(kind), batch()
    order = ("input_ids", "attention_mask") if kind != "gpt2" else ("input_ids", "past_key_values", "attention_mask")
    with torch.no_grad():
        whole = model.base_model(*map(given.get, order)).last_hidden_state
        with Trunk(model, 3): top = model.base_model(*map(given.get, order)).last_hidden_state
    here = given["attention_mask"] == 1
    assert torch.allclose(whole[here], top[here], atol=1e-5)

def test_each_row_passes_the_trunk_once():
    model, passes = made("llama, one key head"), []
    decoder_layers(model)[1][0].register_forward_hook(lambda m, args, out: passes.append(len(out)))
    with Trunk(model, 3):
        for _ in range(3): lm_loss(model, batch())
        lm_loss(model, batch(rows=4, length=9))
    assert sum(passes) <= 3 + 4 and passes[0] == 3 and len(passes) == 2

# ---- inside fit

ROWS = [dict(input_ids=[2, *range(5, 7 + i), 9 + i], labels=[-100]*(3 + i) + [9 + i]) for i in range(12)]
def data(): return batches(ROWS, 4, 0, random.Random(0))

def trained(loss=lm_loss, **how):
    torch.manual_seed(0)
    model = llama(1, tie_word_embeddings=True)
    inject(model, ["q_proj", "v_proj"], rank=2, layers=range(2, 4))
    return model, fit(model, loss, data(), steps=8, lr=1e-2, progress=False, **how)

def test_training_above_a_trunk_makes_the_same_updates():
    (whole, h), (top, h2) = trained(), trained(trunk=2)
    assert h2.tokens == h.tokens and h2.compute < h.compute
    assert h2.loss == pytest.approx(h.loss, abs=2e-5) and h.loss[-1] != pytest.approx(h.loss[0], abs=1e-3)
    for a, b in zip(whole.parameters(), top.parameters()): assert torch.allclose(a, b, atol=1e-5)
    assert adapted_layers(top)["model.layers.3.self_attn.q_proj"].B.abs().sum() > 0
    probe = batch()
    assert torch.allclose(whole.eval()(**probe).logits, top.eval()(**probe).logits, atol=1e-4)

def test_a_loss_of_nested_batches_is_served():
    rows = [dict(a=r, b=r) for r in ROWS]
    loss = lambda m, b: lm_loss(m, b["a"]) + lm_loss(m, b["b"])
    made = []
    for trunk in (None, 2):
        torch.manual_seed(0)
        model = llama(1)
        inject(model, ["q_proj"], rank=2, layers=[3])
        made.append(fit(model, loss, batches(rows, 4, 0, random.Random(0)), steps=3, progress=False, trunk=trunk).loss)
    assert made[1] == pytest.approx(made[0], abs=2e-5)

def test_autocast_keeps_bfloat16():
    torch.manual_seed(0)
    model = made("llama, one key head")
    with torch.autocast("cpu", torch.bfloat16), Trunk(model, 3) as trunk:
        rough = lm_loss(model, batch())
    assert {r.dtype for r in trunk.rows.values()} == {torch.bfloat16} and trunk.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16): whole = lm_loss(model, batch())
    assert rough.item() == pytest.approx(whole.item(), abs=.05)

def test_a_model_in_bfloat16_is_trained_in_float32_and_given_back():
    torch.manual_seed(0)
    model = llama(1).bfloat16().requires_grad_(False)
    model.model.layers[3].requires_grad_(True)
    before, seen = copy.deepcopy(model.state_dict()), set()
    def loss(m, b):
        seen.update(p.dtype for p in m.parameters() if p.requires_grad)
        return lm_loss(m, b)
    fit(model, loss, data(), steps=20, lr=1e-3, progress=False, trunk=3)
    assert seen == {torch.float32} and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith("model.layers.3.") for k in moved)
    model.eval()(**batch())

def test_dropout_is_off_in_the_trunk_and_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SHAPE, n_embd=16, n_layer=4, n_head=4, n_positions=32)).requires_grad_(False)
    model.transformer.h[3].requires_grad_(True)
    kept = []
    for _ in range(2):
        with Trunk(model.train(), 3) as trunk: lm_loss(model, batch())
        kept.append(trunk.rows)
    assert kept[0].keys() == kept[1].keys() and all(torch.equal(kept[0][k], kept[1][k]) for k in kept[0])
    with pytest.raises(ZeroDivisionError), Trunk(model, 3): 1/0
    assert [type(m).__name__ for m in model.transformer.h] == ["GPT2Block"]*4
    assert not model.transformer._forward_pre_hooks

# ---- refusals

def test_what_can_not_be_kept_is_refused_in_a_line():
    model = made("llama, grouped heads")
    assert "has 4 layers: give 1 to 3" in refused(Trunk, model, 4)
    assert "has 4 layers: give 1 to 3" in refused(fit, model, lm_loss, data(), steps=1, trunk=0)
    model.model.layers[1].requires_grad_(True)
    line = refused(fit, model, lm_loss, data(), steps=1, trunk=3)
    assert "model.layers.1.self_attn.q_proj.weight is trained" in line and "range(3, 4)" in line
    assert "embed_tokens.weight is trained" in refused(Trunk, llama(tie_word_embeddings=True), 1)
    bert = BertForMaskedLM(BertConfig(vocab_size=40, hidden_size=8, num_hidden_layers=2, num_attention_heads=1))
    assert "no decoder" in refused(Trunk, bert, 1) and "no decoder" in refused(decoder_layers, torch.nn.Linear(1, 1))

def test_a_loss_that_does_not_give_whole_rows_is_refused():
    model, given = made("llama, grouped heads"), batch()
    words = model.get_input_embeddings()(given["input_ids"])
    with Trunk(model, 3):
        assert "input_ids" in refused(model, inputs_embeds=words)
        assert "mask of tokens" in refused(model, given["input_ids"], attention_mask=torch.ones(3, 1, 9, 9))
        past = model(given["input_ids"]).past_key_values
        assert "whole rows" in refused(model, given["input_ids"][:, :1], past_key_values=past)
        assert torch.isfinite(lm_loss(model, given))

# ---- a trial

def test_a_trial_says_how_much_it_will_keep(monkeypatch, capsys):
    monkeypatch.setattr("slmkit.core.experiment.MUCH", 1000)
    t = object.__new__(Trial)
    t.base, t.seed, t.tok = llama(1), 0, SimpleNamespace(pad_token_id=0)
    t.cfg = settings("smoke", smoke=dict(batch_size=4, lr=1e-2))
    prepare = lambda m: inject(m, ["q_proj"], rank=2, layers=[3])
    model, h = t.fit(ROWS, steps=2, trunk=3, prepare=prepare)
    needed = sum(len(r["input_ids"]) for r in ROWS)*16*4
    assert trunk_bytes(t.base, ROWS) == needed and trunk_bytes(t.base.bfloat16(), ROWS) == needed/2
    said = f"trunk=3: {needed/1e9:.1f} GB of memory for the hidden states of {len(ROWS)} rows\n"
    assert capsys.readouterr().out == said
    t.base = llama(1)
    t.fit(itertools.cycle([batch()]), steps=1, trunk=3, prepare=prepare)
    assert capsys.readouterr().out == "" and h.steps == 2
