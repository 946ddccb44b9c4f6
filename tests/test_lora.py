"LoRA against peft, before and after training, on disk and merged."
import copy, json, math, random
import pytest, torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM
from transformers import T5Config, T5ForConditionalGeneration
from slmkit.core.fit import batches, fit, lm_loss
from slmkit.core.lora import LoRALinear, adapted_layers, count_trained, inject, load_peft, merge, save_peft, targeted
from slmkit.core.settings import KitError

SHAPE = dict(vocab_size=40, pad_token_id=0, bos_token_id=2, eos_token_id=1)
LLAMA = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             initializer_range=.3)  # so that a change is seen in the logits
ROWS = [dict(input_ids=[2, 5 + i, 6, 7], labels=[-100, 5 + i, 6, 7]) for i in range(8)]

@pytest.fixture
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **LLAMA, tie_word_embeddings=True)).eval()

@pytest.fixture
def t5():
    torch.manual_seed(0)
    shape = dict(d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(T5Config(vocab_size=40, **shape)).eval()

def data(): return batches(ROWS, 4, 0, random.Random(0))

def logits(model):
    ids = torch.tensor([[2, 5, 6, 7], [2, 9, 6, 7]])
    more = dict(decoder_input_ids=ids) if model.config.is_encoder_decoder else {}
    with torch.no_grad(): return model(input_ids=ids, **more).logits

def shaken(model):
    "The model with factors B that are no longer zero."
    torch.manual_seed(1)
    for layer in adapted_layers(model).values(): torch.nn.init.normal_(layer.B, std=.3)
    return model

@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "down_proj"], None, ["layers.1.mlp.up_proj"]])
@pytest.mark.parametrize("rank, alpha", [(1, 1), (4, 8), (3, 1)])
def test_it_is_peft_to_six_places(llama, tmp_path, targets, rank, alpha):
    from peft import PeftModel
    ours = copy.deepcopy(llama)
    inject(ours, targets, rank, alpha)
    assert torch.equal(logits(ours), logits(llama))
    save_peft(shaken(ours), tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(llama), str(tmp_path)).eval()
    assert not torch.allclose(logits(ours), logits(llama), atol=1e-2)
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-6, rtol=0)
    assert torch.allclose(logits(merge(ours)), logits(theirs.merge_and_unload()), atol=1e-6, rtol=0)

def test_an_encoder_decoder_is_peft_too(t5, tmp_path):
    from peft import LoraConfig, get_peft_model
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q", "v"], init_lora_weights=False)
    theirs = get_peft_model(copy.deepcopy(t5), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_peft(copy.deepcopy(t5), tmp_path)
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-6, rtol=0)
    assert not torch.allclose(logits(ours), logits(t5), atol=1e-3)

def test_the_same_updates_as_peft(llama):
    from peft import LoraConfig, get_peft_model
    ours, theirs = copy.deepcopy(llama), copy.deepcopy(llama)
    layers = inject(ours, ["q_proj", "v_proj"], rank=2, alpha=4)
    theirs = get_peft_model(theirs, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
    for name, layer in layers.items():
        theirs.base_model.model.get_submodule(name).lora_A["default"].weight.data.copy_(layer.A.data)
    losses = [fit(m, lm_loss, data(), steps=40, lr=1e-2, progress=False).loss for m in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert sum(losses[0][-4:]) < .8*sum(losses[0][:4])

def test_only_the_factors_are_trained(llama):
    before = {n: p.clone() for n, p in llama.named_parameters()}
    layers = inject(llama, ["q_proj", "o_proj"], rank=2)
    assert count_trained(llama) == sum(2*(m.linear.in_features + m.linear.out_features) for m in layers.values())
    fit(llama, lm_loss, data(), steps=3, lr=1e-2, progress=False)
    frozen = {n.replace(".linear.", "."): p for n, p in llama.named_parameters() if n[-2:] not in (".A", ".B")}
    assert frozen.keys() == before.keys() and all(torch.equal(p, before[n]) for n, p in frozen.items())
    assert all(m.B.abs().max() > 0 for m in layers.values())

def test_fresh_factors_are_drawn_like_a_linear_layer():
    torch.manual_seed(0)
    A = LoRALinear(torch.nn.Linear(400, 10), rank=50, alpha=1).A
    assert A.abs().max() <= 1/math.sqrt(400) and A.std().item() == pytest.approx(1/math.sqrt(3*400), rel=.02)

def test_a_merged_model_is_a_plain_one(llama):
    names = set(llama.state_dict())
    inject(llama, None, rank=2, alpha=6)
    want = logits(shaken(llama))
    merge(llama)
    assert set(llama.state_dict()) == names and torch.allclose(logits(llama), want, atol=1e-5)

def test_the_head_is_no_target_of_all(llama):
    assert "lm_head" not in targeted(llama, None) and len(targeted(llama, None)) == 14

def test_written_and_read_again(llama, tmp_path):
    ours = copy.deepcopy(llama)
    inject(ours, ["v_proj"], rank=3, alpha=5)
    size = save_peft(shaken(ours), tmp_path)
    assert size == (tmp_path/"adapter_model.safetensors").stat().st_size
    assert torch.equal(logits(load_peft(copy.deepcopy(llama), tmp_path)), logits(ours))
    config = json.loads((tmp_path/"adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (3, 5, "CAUSAL_LM")

def changed(folder, **fields):
    path = folder/"adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")

@pytest.mark.parametrize("fields, words", [
    (dict(use_dora=True), "use_dora"), (dict(bias="all"), "bias"), (dict(modules_to_save=["lm_head"]), "to_save"),
    (dict(target_modules="all-linear"), "pattern"), (dict(target_modules=["w_proj"]), "'w_proj'"),
    (dict(target_modules=["q_proj"]), "made for another model"), (dict(r=4), "made for another model"),
])
def test_what_cannot_be_read_is_one_line(llama, tmp_path, fields, words):
    ours = copy.deepcopy(llama)
    inject(ours, ["v_proj"], rank=3)
    save_peft(ours, tmp_path)
    changed(tmp_path, **fields)
    with pytest.raises(KitError) as e: load_peft(llama, tmp_path)
    assert words in str(e.value) and "\n" not in str(e.value)

def test_wrong_use_is_one_line(llama, tmp_path):
    with pytest.raises(KitError, match="'query'"): inject(llama, ["q_proj", "query"])
    with pytest.raises(KitError, match="rank=0"): inject(llama, ["q_proj"], rank=0)
    with pytest.raises(KitError, match="no LoRALinear"): save_peft(llama, tmp_path)
    with pytest.raises(KitError, match="no adapter of peft"): load_peft(llama, tmp_path)
    assert not any(tmp_path.iterdir()) and not adapted_layers(llama)

def test_a_masked_model_is_adapted(tmp_path):
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertForMaskedLM(BertConfig(vocab_size=40, **shape))
    inject(model, ["query", "value"], rank=2)
    save_peft(model, tmp_path)
    assert json.loads((tmp_path/"adapter_config.json").read_text(encoding="utf-8"))["task_type"] is None
