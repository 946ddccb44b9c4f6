"""The flagship away from Toyland: every profile's path on tiny checkpoints of the same classes, real sets' layout,
bit-equal reruns."""
import gzip, json
import pytest
from functools import partial
from pathlib import Path
from conftest import Failed, ran
from slmkit.core.data import manifest
from slmkit.toyland.tokenizer import build_tokenizer

NB = Path(__file__).parents[1]/"nbs/distill/step_by_step.ipynb"

run = partial(ran, NB)

@pytest.fixture
def tiny_t5(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration
    tok = build_tokenizer()
    tok.save_pretrained(tmp_path/"t5")
    shape = dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu",
        decoder_start_token_id=0)
    T5ForConditionalGeneration(T5Config(vocab_size=len(tok), **shape)).save_pretrained(tmp_path/"t5")
    return tmp_path/"t5"

@pytest.fixture
def tiny_bert(tmp_path):
    from transformers import BertConfig, BertModel
    tok = build_tokenizer()
    tok.add_special_tokens(dict(cls_token="<s>", sep_token="</s>"))
    tok.save_pretrained(tmp_path/"bert")
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(BertConfig(vocab_size=len(tok), **shape)).save_pretrained(tmp_path/"bert")
    return tmp_path/"bert"

@pytest.fixture
def real_layout(tmp_path, monkeypatch):
    "A folder laid out as SLMKIT_DATA says, with made-up rows in the fields of the real files."
    for name, m in manifest().items():
        folder = tmp_path/"data"/m["folder"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder/"FETCHED").touch()
        for split, f in m["files"].items():
            rows = [dict(id=f"{name}-{split}-{i}", input=f"{i} and {i} ?", premise=f"{split} {i} is even",
                    hypothesis=f"{i} is odd", label=f"( {i} + {i} )", palm_label=f"( {i} + 1 )",
                    palm_rationale=f"we add {i} and {i}") for i in range(24)]
            (folder/f["file"]).write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    monkeypatch.setenv("SLMKIT_DATA", str(tmp_path/"data"))

@pytest.mark.slow
@pytest.mark.parametrize("data", ["svamp", "cqa", "esnli", "anli1"])
def test_paper_path_on_a_tiny_t5(tmp_path, torch_pool, tiny_t5, real_layout, data):
    found = run(tmp_path, torch_pool, profile="paper", model=str(tiny_t5), data=data, steps=2)
    assert set(found) == {"rationales-help", "two-tasks-beat-one-sequence", "fewer-labels"}
    assert found["fewer-labels"]["n_rows"] == 24 and "teacher" in found["fewer-labels"]["arms"]

@pytest.mark.slow
def test_gpu_path_on_a_tiny_encoder(tmp_path, torch_pool, tiny_bert, real_layout):
    assert set(run(tmp_path, torch_pool, profile="gpu", model=str(tiny_bert), data="esnli", steps=2,
            n=20)) >= {"rationales-help", "fewer-labels"}

@pytest.mark.slow
def test_same_seed_same_record(tmp_path, torch_pool):
    one, two = (run(tmp_path, torch_pool, name, profile="smoke", seed=3) for name in ("one", "two"))
    assert one == two

@pytest.mark.slow
def test_own_file(tmp_path, torch_pool):
    rows = [dict(q=f"what is {i} ?", a=str(i), why=f"it is {i}") for i in range(90)]
    (tmp_path/"mine.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = run(tmp_path, torch_pool, profile="smoke", data=str(tmp_path/"mine.jsonl"),
        columns="input=q,label=a,rationale=why")
    assert found["rationales-help"]["n_rows"] > 5

def test_gpu_needs_a_model(tmp_path, torch_pool):
    with pytest.raises(Failed, match="needs --model FOLDER"): run(tmp_path, torch_pool, profile="gpu")
