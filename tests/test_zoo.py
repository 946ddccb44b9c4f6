"The zoo's verbs and its door, on a copy of the zoo: whole, damaged, missing."
import json, shutil
import pytest
from slmkit.core import zoo
from slmkit.core.settings import KitError
from slmkit.cli.main import main

@pytest.fixture
def copy(tmp_path, monkeypatch):
    shutil.copytree(zoo.zoo_folder(), tmp_path/"zoo")
    monkeypatch.setattr(zoo, "zoo_folder", lambda: tmp_path/"zoo")
    return tmp_path/"zoo"

def said(capsys, *argv):
    "Exit code, stdout, stderr of a command."
    with pytest.raises(SystemExit) as e: main(list(argv))
    out = capsys.readouterr()
    return e.value.code, out.out.strip(), out.err.strip()

def corrupt(path):
    "Turn one bit of a file."
    data = bytearray(path.read_bytes())
    data[len(data)//2] ^= 1
    path.write_bytes(data)

def test_shipped_weights_are_whole(capsys):
    code, out, _ = said(capsys, "zoo", "verify")
    assert code == 0 and "t5-1m" in out and out.endswith("whole")

def test_list_and_card(capsys, copy):
    card = copy/"t5-1m/card.json"
    card.write_text(json.dumps(json.loads(card.read_text(encoding="utf-8")) | dict(parameters=1234567)),
        encoding="utf-8")
    assert "1.23 M" in said(capsys, "zoo", "list")[1]
    assert "parameters: 1,234,567" in said(capsys, "zoo", "card", "t5-1m")[1]
    assert json.loads(said(capsys, "zoo", "card", "t5-1m", "--json")[1])["parameters"] == 1234567

@pytest.mark.parametrize("argv", [["zoo", "verify"], ["zoo", "verify", "t5-1m"]])
def test_one_changed_bit_is_told_with_what_to_do(capsys, copy, argv):
    corrupt(copy/"t5-1m/model.safetensors")
    code, _, err = said(capsys, *argv)
    assert code == 2 and "corrupted" in err and "git checkout -- slmkit/zoo" in err and "\n" not in err

def test_loading_corrupted_or_missing_weights_is_one_line(copy):
    corrupt(copy/"t5-1m/model.safetensors")
    with pytest.raises(KitError, match="corrupted.*git checkout"): zoo.load_model("t5-1m")
    (copy/"t5-1m/model.safetensors").unlink()
    with pytest.raises(KitError, match="missing.*git checkout"): zoo.load_model("t5-1m")

@pytest.mark.parametrize("card", [None, "{", "{}", "[3]"])
def test_a_missing_or_damaged_card_is_one_line(capsys, copy, card):
    path = copy/"t5-1m/card.json"
    path.unlink() if card is None else path.write_text(card, encoding="utf-8")
    code, _, err = said(capsys, "zoo", "verify")
    assert code == 2 and "git checkout -- slmkit/zoo" in err and "\n" not in err
    assert said(capsys, "zoo", "list")[0] == 0  # the list of the others still works

def test_unknown_name_and_empty_zoo(capsys, copy):
    code, _, err = said(capsys, "zoo", "card", "t5-1n")
    assert code == 2 and "did you mean 't5-1m'" in err and "\n" not in err
    for folder in copy.iterdir(): shutil.rmtree(folder)
    code, _, err = said(capsys, "zoo", "verify")
    assert code == 2 and "empty" in err and "\n" not in err

def test_warming_up_trains_the_fresh_decoder_and_leaves_the_encoder(tmp_path):
    from transformers import BertConfig, BertModel
    from slmkit.toyland.tokenizer import build_tokenizer
    tok = build_tokenizer()
    tok.cls_token_id, tok.sep_token_id = tok.bos_token_id, tok.eos_token_id
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(BertConfig(vocab_size=len(tok), **shape)).save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    model, tok = zoo.load_model(str(tmp_path), device="cpu")
    state = lambda part: {k: v.clone() for k, v in part.state_dict().items()}
    encoder, decoder = state(model.encoder), state(model.decoder)
    zoo.warm_up(model, tok, ["ana has 3 apples ."]*16, 2)
    assert all((v == encoder[k]).all() for k, v in state(model.encoder).items())
    assert any((v != decoder[k]).any() for k, v in state(model.decoder).items())
    assert all(p.requires_grad for p in model.parameters())

MINE = """[model]
family = "Llama"
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
intermediate_size = 32
[stage]
steps = 3
peak = 7e-2
size = 4
"""
def test_a_model_of_ones_own_is_built_from_a_file_and_loaded(capsys, tmp_path):
    (tmp_path/"mine.toml").write_text(MINE, encoding="utf-8")
    words = "--config", str(tmp_path/"mine.toml"), "--out", str(tmp_path/"mine")
    code, out, err = said(capsys, "zoo", "build", *words)
    assert code == 0 and "loss" in out, err
    model, tok = zoo.load_model(str(tmp_path/"mine"), device="cpu", kind="causal")
    assert model.config.hidden_size == 16 and len(tok) == model.config.vocab_size

@pytest.mark.parametrize("text, told", [
    (None, "can't be read"),
    ("[model", "can't be read"),
    ("[model]\nfamily = 'GPT'", "family"),
    (MINE.replace("peak", "top"), "'peak'"),
    (MINE.replace("num_attention_heads = 2", "num_attention_heads = 3"), "no Llama of this shape"),
])
def test_a_file_that_says_no_model_is_one_line(capsys, tmp_path, text, told):
    if text is not None: (tmp_path/"mine.toml").write_text(text, encoding="utf-8")
    code, _, err = said(capsys, "zoo", "build", "--config", str(tmp_path/"mine.toml"), "--out", str(tmp_path/"out"))
    assert code == 2 and told in err and "\n" not in err and not list(tmp_path.glob("out*"))

def test_a_twin_is_its_base_and_its_factors(copy):
    import torch
    from safetensors.torch import load_file
    from slmkit.recipes.instruct import save_tuned, with_lora
    base, _ = zoo.load_model("lm-1m", device="cpu", kind="causal")
    changed, _ = zoo.load_model("lm-1m", device="cpu", kind="causal")
    layers = with_lora(changed, 2)
    for c in layers.values(): torch.nn.init.normal_(c.B, std=.1)
    save_tuned(copy/"lm-1m-mine", "lm-1m", layers)
    (copy / "lm-1m-mine/card.json").write_text(
        json.dumps(dict(base="lm-1m", sha256=zoo.sha256(copy / "lm-1m-mine/model.safetensors"))), encoding="utf-8"
    )
    for kind, prefix in (("causal", "model."), ("encoder", "")):  # with its head and without it
        twin, _ = zoo.load_model("lm-1m-mine", device="cpu", kind=kind)
        factors = load_file(copy/"lm-1m-mine/model.safetensors")
        for layer in layers:
            want = (
                base.model.get_submodule(layer).weight
                + factors[f"{layer}.B"].float() @ factors[f"{layer}.A"].float()
            )
            assert torch.equal(twin.get_submodule(prefix + layer).weight, want)
    corrupt(copy/"lm-1m/model.safetensors")  # a twin of a damaged base is damaged
    with pytest.raises(KitError, match="corrupted"): zoo.load_model("lm-1m-mine")

def test_a_twin_of_another_base_is_one_line(capsys, copy):
    made = copy/"lm-1m-it/base_config.json"
    made.write_text(json.dumps(json.loads(made.read_text(encoding="utf-8")) | dict(sha256="0"*64)), encoding="utf-8")
    with pytest.raises(KitError, match="tuned from another lm-1m"): zoo.load_model("lm-1m-it", kind="causal")
    code, _, err = said(capsys, "zoo", "verify")
    assert code == 2 and "lm-1m-it" in err and "git checkout" in err and "\n" not in err
