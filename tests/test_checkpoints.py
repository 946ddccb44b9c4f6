"Whatever checkpoint a user brings works, or is refused in one line before data are read or anything is computed."
import json, random, shutil
from importlib.util import find_spec
import pytest, torch
from fixtures.checkpoints import CHECKPOINTS, DECODERS, ENCODERS, TWO, build, llama, sentencepiece_model, tokenizer_into
from slmkit.core.fit import batches, fit, kind_of, lm_loss, rows_for
from slmkit.core.generate import choice_scores, generate_answers, nll
from slmkit.core.settings import KitError
from slmkit.core.checkpoint import needs
from slmkit.core.zoo import load_model, opened

@pytest.fixture(scope="module")
def brought(tmp_path_factory):
    "brought(name) -> the folder of a tiny checkpoint, built once."
    made = {}
    def of(name):
        if name not in made: made[name] = str(build(name, tmp_path_factory.mktemp(name)))
        return made[name]
    return of

ASKED, SAID = ["Ana has 3 apples and", "Who"], ["12", "she"]
def learns(model, tok):
    "Eight updates on two rows leave a smaller loss."
    rows = rows_for(model, tok, ASKED, SAID)
    before = nll(model.eval(), rows, tok.pad_token_id)
    fit(model, lm_loss, batches(rows, 2, tok.pad_token_id, random.Random(0)), steps=8, lr=3e-3, progress=False)
    return nll(model.eval(), rows, tok.pad_token_id) < before

def scores_alone(model, tok):
    "A text's scores are the same alone and in a batch with a longer one."
    together = choice_scores(model, tok, ASKED, SAID)
    alone = torch.cat([choice_scores(model, tok, [a], SAID) for a in ASKED])
    return torch.isfinite(together).all() and torch.allclose(together, alone, atol=1e-3)

def says_alone(model, tok):
    "So are the answers, which for a decoder means that padding on the left is not read."
    how = dict(max_new_tokens=5, progress=False)
    together = generate_answers(model, tok, [*ASKED, ""], **how)
    return len(together) == 3 and together == [generate_answers(model, tok, [a], **how)[0] for a in [*ASKED, ""]]

@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_scores_writes_and_learns(name, brought):
    model, tok = load_model(brought(name), device="cpu", kind="causal")
    assert model.dtype == torch.float32 and tok.pad_token_id is not None and kind_of(model) == "causal"
    assert scores_alone(model, tok) and says_alone(model, tok) and learns(model, tok)

@pytest.mark.parametrize("name", TWO)
def test_an_encoder_decoder_scores_writes_and_learns(name, brought):
    model, tok = load_model(brought(name), device="cpu")
    assert not model.fresh and scores_alone(model, tok) and says_alone(model, tok) and learns(model, tok)

@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_gets_a_decoder_that_learns(name, brought):
    model, tok = load_model(brought(name), device="cpu")
    assert model.fresh and scores_alone(model, tok) and says_alone(model, tok) and learns(model, tok)
    model, _ = load_model(brought(name), device="cpu")
    words, own = model.encoder.get_input_embeddings().weight, model.decoder.bert.embeddings.word_embeddings.weight
    assert torch.equal(words, own) == (name not in ("electra", "albert"))  # whose words are narrower than their layers

@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_fills_masks_and_learns(name, brought):
    model, tok = load_model(brought(name), device="cpu", kind="masked")
    assert scores_alone(model, tok) and learns(model, tok)

@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_a_head_of_classes_is_fresh_and_all_below_it_is_read(name, brought):
    from slmkit.core.fit import encode_texts
    from slmkit.core.generate import class_scores
    model, tok = load_model(brought(name), device="cpu", kind="classifier", num_labels=3)
    rows = encode_texts(tok, ASKED)
    assert all(sum(i in tok.all_special_ids for i in r["input_ids"][:2]) <= 1 for r in rows)  # one start at most
    together = class_scores(model, rows, tok.pad_token_id)
    alone = torch.cat([class_scores(model, [r], tok.pad_token_id) for r in rows])
    assert model.fresh and together.shape == (2, 3) and torch.allclose(together, alone, atol=1e-3)

def test_a_roberta_s_positions_are_moved_to_where_its_decoder_counts_from(brought):
    model, _ = load_model(brought("roberta"), device="cpu")
    theirs, ours = (m.embeddings.position_embeddings.weight for m in (model.encoder, model.decoder.bert))
    assert torch.equal(ours[:100], theirs[2:102]) and not torch.equal(ours[0], theirs[0])

def test_padding_is_named_in_one_place_and_nothing_is_resized(brought):
    for name in ("llama", "gpt2"):
        model, tok = load_model(brought(name), device="cpu", kind="causal")
        assert tok.pad_token == tok.eos_token and model.config.pad_token_id == tok.pad_token_id
        assert model.generation_config.eos_token_id == tok.eos_token_id
        assert len(model.get_input_embeddings().weight) == CHECKPOINTS[name][0]()[0].get_vocab_size()

@pytest.mark.parametrize("name, start", [("llama", "<s>"), ("opt", "</s>"), ("gpt2", None), ("qwen2", None)])
def test_a_start_token_is_one_only_where_the_tokenizer_adds_it(name, start, brought):
    from slmkit.core.generate import encode_prompts
    model, tok = load_model(brought(name), device="cpu", kind="causal")
    assert tok.bos_token == start
    ids, mask = encode_prompts(model, tok, ["Ana has 3", "Ana"], 50)
    assert ids[0].tolist() == tok("Ana has 3")["input_ids"] and mask[1].tolist() == sorted(mask[1].tolist())

def test_rows_without_a_token_and_bfloat16_and_shards_are_read(tmp_path):
    build("llama", tmp_path, extra=56, dtype=torch.bfloat16, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model, tok = load_model(str(tmp_path), device="cpu", kind="causal")
    rows = len(model.get_input_embeddings().weight)
    assert rows == len(tok) + 56 and model.dtype == torch.float32
    assert tok.batch_decode([[rows - 1, 300]], skip_special_tokens=True) == [tok.decode([300])]
    assert says_alone(model, tok) and learns(model, tok)

def test_padding_that_was_added_without_a_row_is_left_out(brought, tmp_path):
    shutil.copytree(brought("gpt2"), tmp_path/"padded")
    tok = opened(brought("gpt2"), "causal")[2]
    tok.add_special_tokens(dict(pad_token="[PAD]"))
    tok.save_pretrained(tmp_path/"padded")
    model, tok = load_model(str(tmp_path/"padded"), device="cpu", kind="causal")
    assert tok.pad_token == "<|endoftext|>" and says_alone(model, tok)

def test_a_sentencepiece_model_alone_is_read_or_the_package_is_named(brought, tmp_path):
    folder = tmp_path/"mine"
    shutil.copytree(brought("llama"), folder)
    (folder/"tokenizer.json").unlink()
    (folder/"tokenizer.model").write_bytes(sentencepiece_model(llama()[0]))
    if find_spec("sentencepiece"):
        tok = load_model(str(folder), device="cpu", kind="causal")[1]
        assert tok("Ana has 37 apples.")["input_ids"] == llama()[0].encode("Ana has 37 apples.").ids
    else:
        told = "has its tokenizer as tokenizer.model alone: install sentencepiece, or add its tokenizer.json"
        with pytest.raises(KitError, match=told): load_model(str(folder), kind="causal")

def only(folder, *names):
    for p in folder.iterdir():
        if p.name not in names: p.unlink()
def put(folder, name, content): (folder/name).write_bytes(content if isinstance(content, bytes) else content.encode())
def change(folder, name, **new):
    put(folder, name, json.dumps(json.loads((folder/name).read_text(encoding="utf-8")) | new))
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"

def cut(folder): put(folder, "model.safetensors", (folder/"model.safetensors").read_bytes()[:-10])
def without_tokenizer(folder): only(folder, "config.json", "model.safetensors", "tokenizer_config.json")
def pickled(folder):
    (folder/"model.safetensors").unlink()
    put(folder, "pytorch_model.bin", b"x")
def gguf(folder):
    only(folder)
    put(folder, "tiny.gguf", b"GGUF")
def adapter(folder):
    only(folder)
    put(folder, "adapter_config.json", "{}")
    put(folder, "adapter_model.safetensors", b"x")
def one_shard_less(folder):
    index = dict(weight_map=dict(a="model-00001-of-00002.safetensors", b="model-00002-of-00002.safetensors"))
    (folder/"model.safetensors").rename(folder/"model-00001-of-00002.safetensors")
    put(folder, "model.safetensors.index.json", json.dumps(index))
def blank(folder):
    from tokenizers import Tokenizer, models
    words = Tokenizer(models.WordLevel(dict(zip(["<unk>", "<s>", "</s>", "cat"], range(4))), unk_token="<unk>"))
    tokenizer_into(folder, lambda: (words, dict(unk_token="<unk>", eos_token="</s>")))
def silent(folder):
    from tokenizers import Tokenizer, models
    tokenizer_into(folder, lambda: (Tokenizer(models.BPE(dict(q=0, z=1), [])), dict(eos_token="z")))
def endless(folder): tokenizer_into(folder, lambda: (llama()[0], {}))
def more_tokens(folder):
    tok = opened(str(folder), "causal")[2]
    tok.add_tokens([f"[new{i}]" for i in range(5)])
    tok.save_pretrained(folder)
def headless(folder):
    from safetensors.torch import load_file, save_file
    weights = load_file(folder/"model.safetensors")
    save_file({k: v for k, v in weights.items() if "lm_head" not in k}, folder/"model.safetensors", dict(format="pt"))

FAULTS = {
    "no tokenizer": (without_tokenizer, "it has no tokenizer: .*save_pretrained"),
    "blank tokenizer": (blank, "its tokenizer makes .* tokens unknown of a plain English sentence"),
    "silent tokenizer": (silent, "its tokenizer makes no token at all of a plain English sentence"),
    "nothing to pad with": (endless, "names no padding, end or unknown token"),
    "damaged tokenizer": (lambda f: put(f, "tokenizer.json", "{"), "can't be loaded"),
    "more tokens than rows": (more_tokens, "5 tokens of its tokenizer have no row in its embedding"),
    "pointer": (lambda f: put(f, "model.safetensors", POINTER), "model.safetensors is a Git LFS pointer .*lfs pull"),
    "tokenizer's pointer": (lambda f: put(f, "tokenizer.json", POINTER), "tokenizer.json is a Git LFS pointer"),
    "cut": (cut, "model.safetensors is cut, .* of .* bytes are there: download it again"),
    "no header": (lambda f: put(f, "model.safetensors", "hello"), "model.safetensors has no safetensors header"),
    "a shard less": (one_shard_less, "model-00002-of-00002.safetensors is missing"),
    "gptq": (lambda f: change(f, "config.json", quantization_config=dict(quant_method="gptq")), "quantized .gptq."),
    "adapter alone": (adapter, "holds an adapter alone: add it to its base"),
    "gguf in a folder": (gguf, "holds tiny.gguf: convert it"),
    "pickle": (pickled, "keeps its weights as pickle .pytorch_model.bin., which may run any code"),
    "no configuration": (lambda f: (f/"config.json").unlink(), "has no config.json"),
    "configuration is no JSON": (lambda f: put(f, "config.json", "{"), "config.json that is no JSON object"),
    "unknown architecture": (lambda f: change(f, "config.json", model_type="tapir"), "can't be loaded"),
    "other shapes": (lambda f: change(f, "config.json", intermediate_size=64), "its weights have other shapes than"),
    "a head less": (headless, "lack 1 tensors of a causal model .lm_head.weight."),
    "empty": (only, "holds no weights"),
}
@pytest.mark.parametrize("fault", FAULTS)
def test_what_can_t_work_is_one_line(fault, brought, tmp_path):
    spoil, told = FAULTS[fault]
    folder = tmp_path/"mine"
    shutil.copytree(brought("llama"), folder)
    spoil(folder)
    with pytest.raises(KitError, match=told) as e: load_model(str(folder), device="cpu", kind="causal")
    assert "\n" not in str(e.value) and len(str(e.value)) < 500

def test_a_file_and_a_folder_that_is_not_there_are_never_looked_up_on_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "tiny.gguf", b"GGUF")
    with pytest.raises(KitError, match="is a file: give a checkpoint's folder"): load_model("tiny.gguf")
    for name in ("./mine", "/nowhere/mine", "a/b/c"):
        with pytest.raises(KitError, match="no model"): load_model(name)

@pytest.mark.parametrize("name, kind", [("llama", "seq2seq"), ("gpt2", "masked"), ("t5", "causal"), ("bert", "causal")])
def test_the_wrong_kind_names_one_of_the_zoo_that_is_of_that_kind(name, kind, brought):
    told = f"which is no {kind} model: in the zoo"
    with pytest.raises(KitError, match=told) as e: load_model(brought(name), kind=kind)
    assert load_model(str(e.value).split("in the zoo ")[1].split()[0], device="cpu", kind=kind)

def test_what_is_wrong_with_a_model_is_said_before_data_are_read(brought, tmp_path):
    from slmkit.core.experiment import Trial
    from slmkit.core.settings import settings
    folder = tmp_path/"mine"
    shutil.copytree(brought("llama"), folder)
    blank(folder)
    cfg = settings("cpu", cpu=dict(model=str(folder), data=str(tmp_path/"no-data.csv")))
    with pytest.raises(KitError, match="plain English"): Trial(cfg, 0)

def test_a_technique_says_which_architectures_and_how_many_key_heads_it_needs(brought):
    model = load_model(brought("llama"), device="cpu", kind="causal")[0]
    assert needs(model, "t", ["llama"]) is model
    told = "t needs 2 key heads a layer, this llama has 1: give a decoder with at least 2 key heads, as lm-1m"
    with pytest.raises(KitError, match=told): needs(model, "t", key_heads=2)
    with pytest.raises(KitError, match="t can.t work on a llama: give a gpt2$"): needs(model, "t", ["gpt2"])
    assert needs(load_model("lm-1m", device="cpu", kind="causal")[0], "t", ["llama"], key_heads=2)
