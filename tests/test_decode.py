"Tokens and scores of `decode` against transformers' `generate`, over shapes, paddings and kinds of model."
import pytest, torch
from types import SimpleNamespace
from transformers import (BertConfig, BertLMHeadModel, BertModel, EncoderDecoderModel, GPT2Config, GPT2LMHeadModel,
    LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, T5Config, T5ForConditionalGeneration)
from slmkit.core.cuda_graph import CUDAGraphStep
from slmkit.core.decode import STEPS, decode, decode_by_generate, graphed_step, steps_class, stop_tokens
from slmkit.core.settings import KitError
torch.set_num_threads(1)

SHAPE = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             pad_token_id=0, bos_token_id=2, eos_token_id=1)
T5 = dict(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
    pad_token_id=0, eos_token_id=1)
SCALED = dict(rope_type="linear", factor=2., rope_theta=1e4)
GPT2 = dict(n_embd=16, n_layer=1, n_head=2, vocab_size=60, bos_token_id=2, eos_token_id=1, pad_token_id=0)
KINDS = dict(
    llama=lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    llama_shared_heads=lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2, tie_word_embeddings=True)),
    llama_scaled=lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=SCALED)),
    qwen2=lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=2)),
    t5=lambda: T5ForConditionalGeneration(T5Config(**T5)),
    t5_gated=lambda: T5ForConditionalGeneration(
        T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    gpt2=lambda: GPT2LMHeadModel(GPT2Config(**GPT2)))

def prompts(model, rows=5, longest=9, seed=0):
    "Random prompts of unequal lengths, padded on the side that the model needs."
    g, left = torch.Generator().manual_seed(seed), not model.config.is_encoder_decoder
    ids, mask = torch.randint(3, 60, (rows, longest), generator=g), torch.ones(rows, longest, dtype=torch.long)
    for i in range(rows):
        empty = slice(0, i) if left else slice(longest - i, None)
        ids[i, empty], mask[i, empty] = 0, 0
    return ids, mask

def sharp(model):
    "Weights so large that no two tokens are nearly as likely: then equal tokens are due, whatever the rounding."
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.) if p.ndim < 2 else p.copy_(torch.randn(p.shape,
                    generator=torch.Generator().manual_seed(p.numel()))*.3)
    return model.eval()

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [1, 12])
def test_greedy_tokens_and_scores_are_those_of_generate(kind, most):
    model = sharp(KINDS[kind]())
    ids, mask = prompts(model)
    tokens, logs = decode(model, ids, mask, most, scores=True)
    theirs, their_logs = decode_by_generate(model, ids, mask, most, 0., True)
    assert torch.equal(tokens, theirs) and torch.allclose(logs, their_logs, atol=1e-4)
    assert torch.equal(decode(model, ids, mask, most), tokens)

def test_which_kinds_have_a_loop_of_their_own():
    own = {k: steps_class(make()) is not None for k, make in KINDS.items()}
    assert own == dict(llama=True, llama_shared_heads=True, llama_scaled=False, qwen2=True, t5=True,
        t5_gated=True, gpt2=False)

def test_the_padding_of_a_row_changes_nothing():
    for kind in ("llama", "t5"):
        model = sharp(KINDS[kind]())
        ids, mask = prompts(model)
        together = decode(model, ids, mask, 10)
        for i in range(len(ids)):
            alone = decode(model, ids[i:i + 1, mask[i] == 1], mask[i:i + 1, mask[i] == 1], 10)[0]
            assert together[i, :len(alone)].tolist() == alone.tolist() and not together[i, len(alone):].any()

def test_a_stopped_row_is_padded_and_scores_nothing_and_the_loop_ends():
    model = sharp(KINDS["llama"]())
    ids, mask = prompts(model)
    free = decode(model, ids, mask, 12)
    model.generation_config.eos_token_id = [int(free[0, 1]), int(free[1, 2]), *free[2:, 0].tolist()]
    tokens, logs = decode(model, ids, mask, 12, scores=True)
    assert tokens.shape[1] <= 3 and torch.equal(tokens, decode_by_generate(model, ids, mask, 12, 0., False))
    after = torch.isin(tokens, stop_tokens(model)[0]).cumsum(1) - torch.isin(tokens, stop_tokens(model)[0]).long() > 0
    assert (tokens[after] == 0).all() and (logs[after] == 0).all() and (logs[~after] < 0).all()

def test_drawn_tokens_follow_the_softmax():
    model = KINDS["llama"]().eval()
    ids, mask = prompts(model, rows=1)
    with torch.no_grad(): p = (model(ids).logits[0, -1]/.2).softmax(-1)
    torch.manual_seed(0)
    drawn = decode(model, ids.repeat(4000, 1), mask.repeat(4000, 1), 1, temperature=.2)[:, 0].bincount(minlength=60)
    error = (drawn/4000 - p).abs()/(p*(1 - p)/4000).sqrt()
    assert error.max() < 4.5 and (drawn > 0).sum() > 10

def test_scores_of_drawn_tokens_are_at_their_temperature():
    model = KINDS["llama"]().eval()
    ids, mask = prompts(model, rows=2)
    tokens, logs = decode(model, ids, mask, 1, temperature=.5, scores=True)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        want = (model(input_ids=ids, attention_mask=mask, position_ids=position).logits[:, -1]/.5).log_softmax(-1)
    assert torch.allclose(logs, want.gather(1, tokens), atol=1e-5)

def test_an_encoder_with_a_fresh_decoder_goes_by_way_of_generate():
    shape = dict(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = EncoderDecoderModel(encoder=BertModel(BertConfig(**shape)),
                                decoder=BertLMHeadModel(BertConfig(**shape, is_decoder=True, add_cross_attention=True)))
    model.generation_config.decoder_start_token_id, model.generation_config.pad_token_id = 2, 0
    model.config.decoder_start_token_id, model.config.pad_token_id = 2, 0
    assert decode(model.eval(), *prompts(model), 4).shape == (5, 4)

def test_no_new_token_is_refused():
    with pytest.raises(KitError, match="max_new_tokens=0"): decode(KINDS["llama"](), *prompts(KINDS["llama"]()), 0)

def as_replayed(model, ids, mask, most, record, monkeypatch, **how):
    "`decode` as on a GPU, with `record` in the place of CUDA's."
    kind = steps_class(model)
    def steps(*given):
        inner = kind(*given)
        return SimpleNamespace(first=inner.first, step=graphed_step(inner))
    monkeypatch.setattr(CUDAGraphStep, "record", record)
    monkeypatch.setitem(STEPS, model.config.model_type, steps)
    return decode(model, ids, mask, most, **how)

def stand_in(self, batch):
    "What a CUDA graph is to `CUDAGraphStep`: replayed, it reads its arguments, does the step and writes its result."
    held, out = {k: v.clone() for k, v in batch.items()}, []
    def replay():
        logits = self.step(held)
        out.append(logits) if not out else out[0].copy_(logits)
    return SimpleNamespace(replay=replay), held, SimpleNamespace(clone=lambda: out[0].clone())

@pytest.mark.parametrize("kind", ["llama", "llama_shared_heads", "qwen2", "t5", "t5_gated"])
@pytest.mark.parametrize("record", [stand_in, lambda self, batch: None], ids=["recorded", "not recordable"])
def test_replayed_steps_write_the_same_tokens(kind, record, monkeypatch):
    model = sharp(KINDS[kind]())
    for ids, mask in (prompts(model), [x[:1] for x in prompts(model)]):
        tokens, logs = decode(model, ids, mask, 12, scores=True)
        with monkeypatch.context() as m: again, their_logs = as_replayed(model, ids, mask, 12, record, m, scores=True)
        assert torch.equal(tokens, again) and torch.allclose(logs, their_logs, atol=1e-4)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", ["llama", "llama_shared_heads", "qwen2", "t5", "t5_gated"])
def test_a_gpu_writes_the_tokens_of_generate(kind):
    model = sharp(KINDS[kind]()).cuda()
    ids, mask = (x.cuda() for x in prompts(model))
    assert torch.equal(decode(model, ids, mask, 12), decode_by_generate(model, ids, mask, 12, 0., False))

@pytest.mark.parametrize("name", ["q_proj", "o_proj", "gate_proj", "down_proj", "mlp", "lm_head"])
def test_a_part_that_someone_changed_is_called_as_it_is(name):
    model = sharp(KINDS["llama"]())
    ids, mask = prompts(model, rows=20)
    before = decode(model, ids, mask, 6)
    part = next(m for n, m in model.named_modules() if n.endswith(name))
    part.register_forward_hook(lambda module, x, y: y*-3)
    after = decode(model, ids, mask, 6)
    assert torch.equal(after, decode_by_generate(model, ids, mask, 6, 0., False)) and not torch.equal(after, before)
    assert all("forward" not in vars(m) for m in model.modules())
