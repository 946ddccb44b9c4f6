"Real models by name: where they are, what stands for them in a run's hashes, and what stands in for them in tests."
import json, subprocess, sys
import pytest, torch
from conftest import write_notebook
from slmkit.core import real, settings as setting, zoo
from slmkit.core.settings import KitError, hardware, same_class, settings
from slmkit.run import hashes as hashing, places
from slmkit.run.places import check_model
from slmkit.run.plan import one

@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    "A machine without real models, and a package without answers of theirs; gives the folder for models."
    monkeypatch.setenv("SLMKIT_MODELS", str(tmp_path/"models"))
    monkeypatch.setattr(places, "package_folder", lambda: tmp_path)
    return tmp_path/"models"

@pytest.fixture
def at_cpu():
    yield
    settings("cpu", cpu={})

PARAMETERS = '# %% [parameters]\nprofile = "real"\nseed = 0\nmodel = None'
TABLE = "cfg = settings(profile, dict(model=model), smoke=dict(n=1), real=dict(n=2))"
def run_of(tmp_path, profile, **given):
    path = write_notebook(tmp_path/"t.ipynb", PARAMETERS, "from slmkit.core.settings import settings", TABLE)
    return one("f/t", path, dict(profile=profile, seed=0, model=None) | given)

@pytest.mark.parametrize("name", ["smollm2-135m", "minilm-l6"])
def test_a_model_that_was_not_fetched_is_one_line(name, nowhere):
    told = f"model '{name}' is not on this machine: fetch it once with `slmkit zoo fetch {name}`"
    for call in (zoo.model_path, zoo.load_model, check_model):
        with pytest.raises(KitError) as e: call(name)
        assert str(e.value) == told

def test_a_plan_at_real_says_that_its_model_is_missing(nowhere, tmp_path):
    with pytest.raises(KitError, match="slmkit zoo fetch smollm2-135m"): run_of(tmp_path, "real")
    assert run_of(tmp_path, "smoke")["model"] == "smollm2-random"

def test_stored_answers_serve_in_its_place(nowhere, tmp_path):
    (tmp_path/"answers/smollm2-135m").mkdir(parents=True)
    (tmp_path/"answers/smollm2-135m/a.jsonl.gz").write_bytes(b"")
    assert check_model("smollm2-135m") is None

def test_the_hash_of_a_real_model_is_that_of_its_source_file(nowhere, tmp_path):
    hashes = {m: hashing.weights_hash(m) for m in real.real_models()}
    for name, made in real.real_models().items():
        assert hashes[name] == next(iter(made["files"].values()))["sha256"][:16]
        (nowhere/name).mkdir(parents=True)
        (nowhere/name/"source.json").write_text("{}", encoding="utf-8")  # fetched or not: the same hash
    assert {m: hashing.weights_hash(m) for m in hashes} == hashes and len(set(hashes.values())) == len(hashes)
    assert run_of(tmp_path, "real")["hashes"]["model"] != run_of(tmp_path, "real", model="minilm-l6")["hashes"]["model"]

@pytest.mark.parametrize("profiles, at, model", [
    ("smoke real", "smoke", "smollm2-random"),
    ("smoke real", "real", "smollm2-135m"),
    ("smoke cpu real gpu", "smoke", ""),
    ("smoke cpu real gpu", "cpu", ""),
    ("smoke cpu real gpu", "gpu", "smollm2-135m"),
    ("smoke cpu gpu", "gpu", ""),
])
def test_the_model_that_a_profile_chooses(profiles, at, model, at_cpu):
    table = {p: {} for p in profiles.split()}
    assert settings(at, **table).model == model
    assert settings(at, dict(model="lm-1m"), **table).model == "lm-1m"
    assert settings(at, **table | {at: dict(model="t5-1m")}).model == "t5-1m"

def test_bfloat16_is_read_at_real_alone_and_only_where_the_processor_has_it(monkeypatch, at_cpu):
    published = type("Config", (), dict(dtype=torch.bfloat16))
    for has, profile, name, wanted in [
        (True, "real", "smollm2-135m", torch.bfloat16),
        (False, "real", "smollm2-135m", torch.float32),
        (True, "cpu", "smollm2-135m", torch.float32),
        (True, "real", "lm-1m", torch.float32),
    ]:
        settings(profile, cpu={}, real={})
        monkeypatch.setattr(zoo, "has_bfloat16", lambda: has)
        assert zoo.usual_dtype(name, published) == wanted

def test_the_class_of_a_machine_names_the_maker_and_agrees_with_older_records():
    parts = hardware().split("-")
    assert torch.cuda.is_available() or setting.maker() in parts
    old = hardware()[:hardware().index("-torch")] + "-torch2.99"
    assert same_class(old, f"{old}-amd") and same_class(f"{old}-amd-bf16", old) and same_class(None, None)
    assert not same_class(f"{old}-amd", f"{old}-intel") and not same_class(old, f"{old}9-amd")
    assert not same_class(None, old) and not same_class("cpu-avx2", "cpu-avx2-1t-torch2.13")

HABITS = """import hashlib, pathlib
from slmkit.core.smollm2_random import save
import tempfile
folder = pathlib.Path(save(tempfile.mkdtemp()))
print(hashlib.sha256(b"".join(p.read_bytes() for p in sorted(folder.iterdir()))).hexdigest())"""
def test_the_stand_in_is_built_alike_in_every_process():
    command = [sys.executable, "-c", HABITS]
    run = lambda: subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
    assert run() == run() != ""

def test_the_stand_in_has_smollm2_s_habits():
    model, tok = zoo.load_model("smollm2-random", device="cpu", kind="causal")
    c = model.config
    assert (c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.num_key_value_heads) == (4, 96, 3, 1)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tok.pad_token == tok.eos_token == "<|im_end|>" and tok.bos_token is None
    assert tok.tokenize("has 377")[-3:] == ["3", "7", "7"] and tok.unk_token_id not in tok("Ünïted ½")["input_ids"]
    talk = tok.apply_chat_template([dict(role="user", content="hi")], tokenize=False, add_generation_prompt=True)
    assert talk.startswith("<|im_start|>system\n") and talk.endswith("<|im_start|>assistant\n")

def test_building_it_leaves_the_random_state_of_a_run_as_it_was():
    from slmkit.core.smollm2_random import random_llama
    torch.manual_seed(5)
    state, weights = torch.get_rng_state(), random_llama(9).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, weights[k]) for k, v in random_llama(9).state_dict().items())

def test_it_is_built_elsewhere_where_the_cache_can_t_be_written(tmp_path, monkeypatch):
    from slmkit.core import smollm2_random as made
    (tmp_path/"file").write_text("x", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"file"))
    made.smollm2_random.cache_clear()
    folder = made.smollm2_random()
    made.smollm2_random.cache_clear()
    assert str(tmp_path) not in folder
    assert json.loads(open(f"{folder}/config.json", encoding="utf-8").read())["hidden_size"] == 96

fetched = lambda name: pytest.mark.skipif(not real.is_fetched(name), reason=f"{name} is not fetched")
@fetched("smollm2-135m")
def test_smollm2_continues_english_and_adds_no_start(at_cpu):
    from slmkit.core.generate import choice_scores, encode_prompts, generate_answers
    settings("real", real={})
    model, tok = zoo.load_model("smollm2-135m", device="cpu", kind="causal")
    assert model.dtype == (torch.bfloat16 if zoo.has_bfloat16() else torch.float32)
    ids, _ = encode_prompts(model, tok, ["The capital of France is"], 50)
    assert ids[0].tolist() == tok("The capital of France is")["input_ids"]
    said = generate_answers(model, tok, ["The capital of France is", "Two and two is four. Three"], 4, progress=False)
    assert "Paris" in said[0]
    scores = choice_scores(model, tok, ["The capital of France is"], [" Paris", " London", " cheese"])
    assert scores.argmax() == 0

@fetched("minilm-l6")
def test_minilm_puts_like_sentences_side_by_side():
    from slmkit.core.fit import collate, encode_texts
    model, tok = zoo.load_model("minilm-l6", device="cpu", kind="encoder")
    texts = ["A cat sleeps on the sofa.", "A kitten naps on a couch.", "Interest rates rose in March."]
    batch = collate(encode_texts(tok, texts), tok.pad_token_id)
    with torch.no_grad(): hidden = model(**batch).last_hidden_state
    weight = batch["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((hidden*weight).sum(1)/weight.sum(1), dim=-1)
    assert mean[0] @ mean[1] > .5 > mean[0] @ mean[2]
