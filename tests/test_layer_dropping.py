"Layers left out of a decoder: what stands in their place changes nothing, and a shallower model is the same model."
import copy
import pytest, torch
from datasets import Dataset
from transformers import (GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM,
                          T5Config, T5ForConditionalGeneration)
from slmkit.compress.layer_dropping import (block_influence, drop_layers, influence, layers_left_out,
                                            least_influential, random_layers, text_windows)
from slmkit.core.settings import KitError
from slmkit.core.trunk import decoder_layers

SHAPE = dict(vocab_size=40, pad_token_id=0, bos_token_id=2, eos_token_id=1, initializer_range=.3)
WIDE = SHAPE | dict(hidden_size=16, intermediate_size=24, num_hidden_layers=5, num_attention_heads=4)
MODELS = dict(
    llama=lambda: LlamaForCausalLM(LlamaConfig(**WIDE, num_key_value_heads=1)),
    qwen2=lambda: Qwen2ForCausalLM(Qwen2Config(**WIDE, num_key_value_heads=2, use_sliding_window=True,
                                               sliding_window=3, max_window_layers=2)),
    gpt2=lambda: GPT2LMHeadModel(GPT2Config(**SHAPE, n_embd=16, n_layer=5, n_head=4, n_positions=32)))
IDS = torch.randint(3, 40, (3, 12), generator=torch.Generator().manual_seed(0))
ROWS = [dict(input_ids=ids, labels=ids) for ids in IDS.tolist()]

@pytest.fixture(params=MODELS)
def decoder(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()

@torch.no_grad()
def logits(model): return model(IDS).logits

def refused(f, *args):
    with pytest.raises(KitError) as e: f(*args)
    return str(e.value)

def test_a_shallower_model_is_the_one_that_skips(decoder, tmp_path):
    whole = logits(decoder)
    with layers_left_out(decoder, [3, 1]): skipped = logits(decoder)
    assert torch.equal(logits(decoder), whole) and not torch.allclose(skipped, whole, atol=.01)
    shallow = drop_layers(copy.deepcopy(decoder), [3, 1])
    assert torch.allclose(logits(shallow), skipped, atol=1e-5)
    shallow.save_pretrained(tmp_path)
    again = type(shallow).from_pretrained(tmp_path).eval()
    assert len(decoder_layers(again)[1]) == 3 and torch.allclose(logits(again), skipped, atol=1e-5)

def test_a_shallower_model_writes_with_its_cache(decoder):
    shallow = drop_layers(decoder, [0, 2])
    mask, told = torch.ones(3, 4, dtype=torch.long), IDS[:, :4]
    cached = shallow.generate(told, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    for _ in range(6): told = torch.cat([told, shallow(told).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, told)

def test_a_layer_that_adds_nothing_has_no_influence_and_is_not_missed(decoder):
    layer = decoder_layers(decoder)[1][2]
    for m in layer.modules():
        if type(m).__name__ in ("Linear", "Conv1D"): m.requires_grad_(False).weight.zero_()
        if getattr(m, "bias", None) is not None: m.requires_grad_(False).bias.zero_()
    found = block_influence(decoder, ROWS)
    assert found[2] == pytest.approx(0, abs=1e-6) and min(found[:2] + found[3:]) > 1e-3
    assert least_influential(found, 1) == [2] and len(set(least_influential(found, 5))) == 5
    whole = logits(decoder)
    with layers_left_out(decoder, [2]): assert torch.allclose(logits(decoder), whole, atol=1e-5)

def test_influence_is_that_of_the_hidden_states(decoder):
    norm = [m for name, m in decoder.base_model.named_children() if name in ("norm", "ln_f")][0]
    torch.nn.init.normal_(norm.weight)
    with torch.no_grad(): states = decoder(IDS, output_hidden_states=True).hidden_states
    expected = [influence(a, b).item() for a, b in zip(states[:-2], states[1:-1])]
    found = block_influence(decoder, ROWS)
    assert found[:-1] == pytest.approx(expected, abs=1e-6) and len(found) == 5
    assert found[-1] != pytest.approx(influence(states[-2], states[-1]).item(), abs=1e-4)  # after the final norm
    assert block_influence(decoder, ROWS) == found  # no hook is left that notes its layer twice

def test_the_layers_come_back_after_an_error(decoder):
    whole = logits(decoder)
    with pytest.raises(ZeroDivisionError), layers_left_out(decoder, [0]): 1/0
    assert torch.equal(logits(decoder), whole)

def test_what_is_no_layer_is_refused(decoder):
    assert "no layer 5: this model has 5, from 0" in refused(layers_left_out(decoder, [1, 5]).__enter__)
    assert "needs a layer" in refused(drop_layers, decoder, range(5))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    assert "no decoder" in refused(block_influence, t5, ROWS)

def test_random_layers_spare_the_ends():
    import random
    drawn = [random_layers(6, 3, random.Random(s), ends=1) for s in range(40)]
    assert set().union(*drawn) == {1, 2, 3, 4} and all(len(set(d)) == 3 for d in drawn)
    assert set().union(*(random_layers(6, 3, random.Random(s)) for s in range(40))) == set(range(6))

class Letters:
    "A tokenizer of single letters."
    def __call__(self, text, add_special_tokens): return dict(input_ids=[ord(c) for c in text])

def test_windows_hold_the_text_in_order():
    rows = text_windows(Letters(), Dataset.from_dict(dict(text=["abcd", "efgh", "ij"])), 4)
    assert ["".join(map(chr, r["labels"])) for r in rows] == ["abcd", "efgh"]
    rows = text_windows(Letters(), Dataset.from_dict(dict(input=["abc", "ef"])), 3)
    assert ["".join(map(chr, r["input_ids"])) for r in rows] == ["abc", "\nef"]
