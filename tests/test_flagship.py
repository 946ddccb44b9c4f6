"""The flagship away from its own profile: a T5 that is brought, real sets' layout, one's own file, bit-equal reruns;
its functions."""
import gzip, json
import pytest
from functools import partial
from pathlib import Path
from conftest import Failed, ran
from slmkit.core.data import manifest
from slmkit.distill.step_by_step import answer_of, one_sequence, shuffled, two_task_loss, two_tasks
from slmkit.toyland.tokenizer import build_tokenizer

NB = Path(__file__).parents[1]/"nbs/distill/step_by_step_repro.ipynb"

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

CLAIMS = {"rationales-help-at-equal-updates", "rationales-help", "two-tasks-beat-one-sequence",
          "one-sequence-beats-labels"}

@pytest.mark.slow
@pytest.mark.parametrize("data", ["svamp", "cqa", "esnli", "anli1"])
def test_real_sets_on_a_tiny_t5(tmp_path, torch_pool, tiny_t5, real_layout, data):
    found = run(tmp_path, torch_pool, profile="smoke", model=str(tiny_t5), data=data)
    assert set(found) == CLAIMS and found["rationales-help"]["n_rows"] == 12

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
    with pytest.raises(Failed, match="give --model NAME"): run(tmp_path, torch_pool, profile="gpu")

@pytest.mark.slow
def test_rows_without_rationales_are_refused(tmp_path, torch_pool):
    rows = "".join(json.dumps(dict(input=f"what is {i} ?", label=str(i))) + "\n" for i in range(90))
    (tmp_path/"mine.jsonl").write_text(rows, encoding="utf-8")
    with pytest.raises(Failed, match="has no rationale column"):
        run(tmp_path, torch_pool, profile="smoke", data=str(tmp_path/"mine.jsonl"))

# ---- the module

def test_both_tasks_of_a_row_have_the_same_question():
    rows = two_tasks(lambda inputs, targets: list(zip(inputs, targets)), ["a", "b"], ["1", "2"], ["why", "how"])
    assert rows == [dict(label=("[label] a", "1"), rationale=("[rationale] a", "why")),
                    dict(label=("[label] b", "2"), rationale=("[rationale] b", "how"))]

@pytest.mark.parametrize("alpha", [0, .3, 1])
def test_the_loss_mixes_two_losses(alpha):
    loss = two_task_loss(alpha, lambda model, batch: batch)
    assert loss(None, dict(label=2., rationale=5.)) == pytest.approx(alpha*2 + (1 - alpha)*5)

def test_an_answer_is_read_from_what_one_sequence_holds():
    assert [answer_of(s).strip() for s in one_sequence(["yes", "no"], ["why .", "so ."])] == ["yes", "no"]
    assert answer_of("no mark at all") == "no mark at all"

@pytest.mark.parametrize("n, seed", [(2, 0), (3, 1), (40, 2)])
def test_no_rationale_stays_in_its_place(n, seed):
    reasons = [str(i) for i in range(n)]
    mixed = shuffled(reasons, seed)
    assert sorted(mixed) == sorted(reasons) and all(a != b for a, b in zip(mixed, reasons))
