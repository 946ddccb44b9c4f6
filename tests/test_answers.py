"Stored answers: a shared beginning changes no number, nobody is asked twice, and what is kept holds no data."
import gzip, json, re, sqlite3
from pathlib import Path
import pytest, torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner
from slmkit.cli import main as cli
from slmkit.core import answers, real
from slmkit.core.answers import (
    answer_key, asked_model, ending_scores, layout, plain_scores, question_ids, scores, shared_prefix, shipped,
    source_of, texts)
from slmkit.core.prompts import endings, prompt, templates
from slmkit.core.settings import KitError, package_folder
from slmkit.core.zoo import load_model
from slmkit.recipes import answers as recipe
from slmkit.toyland.tokenizer import build_tokenizer

PROMPTS = [f"tom has 3 apples and ana has {i} . {text} they have" for i, text in enumerate(["", "now", "in all"]*3)]
ENDINGS = [" 3", " four pears", " no more than four apples", " 3"]
STORE = package_folder()/"answers"

@pytest.fixture(scope="module")
def tok(): return build_tokenizer()

def tiny(tok, dtype=torch.float32, **kw):
    "A small random decoder with one key head."
    torch.manual_seed(0)
    shape = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=3, head_dim=16,
                 num_key_value_heads=1, pad_token_id=0, eos_token_id=1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), **shape | kw)).eval().to(dtype)

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLMKIT_ANSWERS", str(tmp_path/"answers.sqlite"))
    for kept in (shipped, asked_model): kept.cache_clear()
    yield
    for kept in (shipped, asked_model): kept.cache_clear()

# ---- the numbers

@pytest.mark.parametrize("cut", [0, 1], ids=["one prefix", "no prefix"])
def test_a_shared_beginning_and_joined_endings_change_no_number(tok, cut):
    model = tiny(tok, initializer_range=.3)
    asked, said = question_ids(tok, PROMPTS, ENDINGS)
    asked[0] = asked[0][cut:]
    assert (shared_prefix(asked) > 3) == (not cut) and {len(e) for e in said[0]} > {1}
    want = plain_scores(model, asked, said)
    assert want.std() > 1  # the prompts and endings do differ
    assert torch.allclose(ending_scores(model, asked, said), want, atol=1e-3)

def test_the_batch_changes_no_number(tok, monkeypatch):
    model = tiny(tok, initializer_range=.3)
    asked, said = question_ids(tok, PROMPTS, ENDINGS)
    together = ending_scores(model, asked, said)
    monkeypatch.setattr(answers, "batches_of", lambda lengths, most: [[i] for i in range(len(lengths))])
    assert torch.allclose(ending_scores(model, asked, said), together, atol=1e-3)
    assert torch.equal(together[:, 0], together[:, 3])  # equal endings don't see each other

def test_bfloat16_answers_agree_with_float32(tok):
    asked, said = question_ids(tok, PROMPTS, ENDINGS[:3])
    exact, rough = (ending_scores(tiny(tok, dtype), asked, said) for dtype in (torch.float32, torch.bfloat16))
    assert rough.dtype == torch.float32 and not torch.equal(exact, rough)
    assert all(recipe.agree(a, b) for a, b in zip(exact.tolist(), rough.tolist()))

def test_each_prompt_may_have_endings_of_its_own(tok):
    model, own = tiny(tok, initializer_range=.3), [ENDINGS[:2], ENDINGS[2:]]
    both = scores(model, tok, PROMPTS[:2], own)
    for i in range(2): assert torch.allclose(both[i], scores(model, tok, [PROMPTS[i]], own[i])[0], atol=1e-3)

def test_the_log_likelihood_is_that_of_the_ending_alone(tok):
    model = tiny(tok, initializer_range=.3)
    (prompt_ids,), ((ending,),) = question_ids(tok, PROMPTS[:1], ENDINGS[2:3])
    logs = model(torch.tensor([prompt_ids + ending])).logits[0].log_softmax(-1)
    want = sum(logs[len(prompt_ids) - 1 + i, token] for i, token in enumerate(ending))
    assert torch.allclose(scores(model, tok, PROMPTS[:1], ENDINGS[2:3])[0, 0], want, atol=1e-4)

def test_a_row_asks_for_each_token_of_each_ending_once():
    ids, parts, positions, wanted = layout([7, 8], [[20], [30, 31], [40, 41, 42]])
    assert ids == [7, 8, 30, 40, 41] and parts == [0, 0, 2, 3, 3] and positions == [0, 1, 2, 2, 3]
    assert sorted((j, token) for _, token, j in wanted) == [(0, 20), (1, 30), (1, 31), (2, 40), (2, 41), (2, 42)]

def test_what_has_no_tokens_is_refused(tok):
    for prompts, said in ([], [" a"]), (["a"], []), (["a"], [""]), (["a", "b"], [[" a"], [" a", " b"]]):
        with pytest.raises(KitError): scores(tiny(tok), tok, prompts, said)

def test_only_decoders_are_asked(tok):
    model, tok = load_model("t5-1m", device="cpu")
    with pytest.raises(KitError, match="must be a decoder"): scores(model, tok, ["a"], [" b"])

# ---- what is kept

def spy(monkeypatch):
    "How many prompts the model was asked each time."
    asked, real_one = [], answers.ending_scores
    def count(model, prompts, *rest):
        asked.append(len(prompts))
        return real_one(model, prompts, *rest)
    monkeypatch.setattr(answers, "ending_scores", count)
    return asked

def test_nobody_is_asked_twice(monkeypatch):
    asked = spy(monkeypatch)
    first = scores("lm-1m", None, PROMPTS[:3] + PROMPTS[:1], ENDINGS)
    assert asked == [3] and torch.equal(first[0], first[3])
    asked_model.cache_clear()
    assert torch.equal(scores("lm-1m", None, PROMPTS[:4], ENDINGS)[:3], first[:3]) and asked == [3, 1]
    asked_model.cache_clear()
    scores("lm-1m", None, PROMPTS[:4], ENDINGS)
    assert asked == [3, 1] and asked_model.cache_info().misses == 0  # no model is loaded
    assert torch.allclose(scores(*load_model("lm-1m", kind="causal"), PROMPTS[:3], ENDINGS), first[:3], atol=2e-3)

def test_a_loaded_model_is_asked_itself():
    kept = scores("lm-1m", None, PROMPTS[:1], ENDINGS)
    model, tok = load_model("lm-1m", kind="causal", device="cpu")
    with torch.no_grad(): model.model.layers[0].mlp.down_proj.weight.zero_()
    assert not torch.allclose(scores(model, tok, PROMPTS[:1], ENDINGS), kept, atol=.05)

def test_texts_are_kept_too(monkeypatch):
    model, tok = load_model("lm-1m", kind="causal", device="cpu")
    first = texts("lm-1m", None, PROMPTS[:2], 5)
    assert first == texts(model, tok, PROMPTS[:2], 5) and texts("lm-1m", None, PROMPTS[:2], 1) != first
    asked_model.cache_clear()
    assert texts("lm-1m", None, PROMPTS[:2], 5) == first and asked_model.cache_info().misses == 0

def test_a_key_stands_for_all_that_an_answer_depends_on():
    keys = [answer_key(*given, **how) for given, how in [
        (("f", [1, 2], [[3]]), {}), (("g", [1, 2], [[3]]), {}), (("f", [1, 3], [[3]]), {}), (("f", [1, 2], [[4]]), {}),
        (("f", [1, 2], None), dict(max_new_tokens=4)), (("f", [1, 2], None), dict(max_new_tokens=5))]]
    assert len({*keys}) == len(keys) and all(re.fullmatch("[0-9a-f]{16}", k) for k in keys)
    assert answer_key("f", [1, 2], [[3]]) == keys[0]

def ship(folder, monkeypatch, found, name="lm-1m"):
    monkeypatch.setattr(answers, "package_folder", lambda: folder)
    path = folder/"answers"/name/"a.jsonl.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(recipe.pack(dict(model=name), found))
    return path

def test_what_ships_comes_first(tmp_path, monkeypatch, tok):
    asked, said = question_ids(answers.tokenizer_of("lm-1m"), PROMPTS[:1], ENDINGS)
    key = answer_key(source_of("lm-1m"), asked[0], said[0])
    scores("lm-1m", None, PROMPTS[:1], ENDINGS)  # another number is in the user's cache
    ship(tmp_path/"package", monkeypatch, {key: [-1., -2., -3., -4.]})
    shipped.cache_clear()
    assert scores("lm-1m", None, PROMPTS[:1], ENDINGS).tolist() == [[-1., -2., -3., -4.]]

def test_damage_is_told_in_one_line(tmp_path, monkeypatch):
    path = ship(tmp_path/"package", monkeypatch, dict(a=[1.]))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(KitError, match="is damaged"): scores("lm-1m", None, PROMPTS[:1], ENDINGS)
    path.unlink()
    shipped.cache_clear()
    (tmp_path/"other.sqlite").write_text("no database, but long enough to be looked at " * 40, encoding="utf-8")
    monkeypatch.setenv("SLMKIT_ANSWERS", str(tmp_path/"other.sqlite"))
    with pytest.raises(KitError, match="can't be used") as e: scores("lm-1m", None, PROMPTS[:1], ENDINGS)
    assert "\n" not in str(e.value)

def test_neither_answer_nor_model(tmp_path, monkeypatch, tok):
    monkeypatch.setenv("SLMKIT_MODELS", str(tmp_path/"models"))
    with pytest.raises(KitError, match="1 of 1 answers .* `slmkit zoo fetch smollm2-135m`"):
        scores("smollm2-135m", tok, PROMPTS[:1], ENDINGS)  # the tokenizer is at hand
    answers.tokenizer_of.cache_clear()
    with pytest.raises(KitError, match="slmkit zoo fetch smollm2-135m"):
        scores("smollm2-135m", None, PROMPTS[:1], ENDINGS)  # its tokenizer ships with its answers
    assert not (tmp_path/"models").exists()

def test_stored_answers_need_no_model_only_the_tokenizer_that_ships_with_them(tmp_path, monkeypatch):
    "A tokenizer of one's own that reads other ids would find none of them."
    monkeypatch.setenv("SLMKIT_MODELS", str(tmp_path/"models"))
    monkeypatch.setenv("SLMKIT_ANSWERS", str(tmp_path/"none.sqlite"))
    answers.tokenizer_of.cache_clear()
    tok = answers.tokenizer_of("smollm2-135m")
    assert len(tok) == 49152
    known = [4239, 506, 1510, 1833, 411, 1833, 42, 216, 33, 34, 1232, 216, 39]
    assert tok("Let's think step by step: 12 + 7")["input_ids"] == known

# ---- the shipped store

FILES = sorted(STORE.glob("*/*.jsonl.gz"))

def test_the_store_is_small(): assert sum(p.stat().st_size for p in FILES) <= 4e6

@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_the_store_holds_keys_numbers_and_short_texts(path):
    header, *lines = map(json.loads, gzip.decompress(path.read_bytes()).decode("utf-8").splitlines())
    assert header["source"] == source_of(path.parent.name) and header["answers"] == len(lines) > 0
    assert {"dtype", "hardware", "torch", "date"} <= {*header}
    for key, found in lines:
        assert re.fullmatch("[0-9a-f]{16}", key)
        if isinstance(found, str): assert len(found) < 1000
        else: assert found and all(isinstance(v, float) and v <= 0 for v in found)
    assert path.read_bytes() == recipe.pack(header, dict(lines))  # written again, not a byte differs

@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_the_store_answers_the_questions_of_today(path):
    "A set that is divided or asked otherwise than when its answers were stored would find none of them."
    model, name = path.parent.name, path.name.removesuffix(".jsonl.gz")
    if not real.is_fetched(model): pytest.skip(f"{model} is not on this machine")
    try: asked = recipe.questions(name, answers.tokenizer_of(model))
    except KitError as e: pytest.skip(str(e))
    _, *lines = map(json.loads, gzip.decompress(path.read_bytes()).decode("utf-8").splitlines())
    assert {key for q in asked for key in recipe.keys_of(model, q)} == {key for key, _ in lines}

def test_a_question_has_a_template():
    assert {*recipe.SETS} - {"wikitext2"} <= {*templates()}
    row, demo = dict(input="a {b} c", choices=["yes"]), dict(input="d", label="yes")
    for name in templates(): assert "a {b} c" in prompt(name, row, [demo]) and endings(name, row) == [" yes"]

def test_an_answer_is_right_where_its_number_or_its_words_are():
    right = recipe.written_right
    for said, way, want in (("1,200 dollars", "ask", True), ("12, then 1200", "ask", False),
                            ("12, then 1200.", "chain", True), ("none", "ask", False)):
        assert right(dict(label="1200"), said, way) == want
    assert right(dict(label="x", answers=["May 18, 2018"]), "on may 18 2018.\nand more", "ask")
    assert not right(dict(label="no"), "I don't know", "ask")

def test_cards_say_what_was_measured_and_what_was_published():
    for name in real.real_models():
        card = recipe.card_of(name)
        assert card["licence"] and "unchecked" in card["published"]["source"] and "files" not in card

def test_a_check_without_a_store_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(recipe, "package_folder", lambda: tmp_path)
    said = CliRunner().invoke(cli.build(), ["answers", "check", "smollm2-135m"])
    assert isinstance(said.exception, KitError) and "nothing of smollm2-135m is stored" in str(said.exception)

def test_a_page_packs_its_own_answers_and_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setattr(recipe, "package_folder", lambda: tmp_path)
    (tmp_path/"answers"/"smollm2-135m").mkdir(parents=True)
    pack = lambda file: CliRunner().invoke(cli.build(), ["answers", "pack", "my_page", str(file)])
    assert "no file" in str(pack(tmp_path/"none.sqlite").exception)
    def cache(name, rows):
        db = sqlite3.connect(tmp_path/name)
        with db: db.execute("create table answers (key text primary key, answer text)")
        with db: db.executemany("insert into answers values (?, ?)", [(k, json.dumps(v)) for k, v in rows.items()])
        return tmp_path/name
    rows = {"0"*16: [-1.5, -0.25], "1"*16: "Paris."}
    said = pack(cache("a.sqlite", rows))
    assert said.exit_code == 0 and "2 answers" in said.output
    _, *lines = gzip.decompress(recipe.store_file("smollm2-135m", "my_page").read_bytes()).decode().splitlines()
    assert dict(map(json.loads, lines)) == rows
    for wrong in ({"2"*16: [.5]}, {"2"*16: [float("nan")]}, {"2"*16: "x"*1000}, {}):
        failed = pack(cache(f"{len(list(tmp_path.glob('*')))}.sqlite", wrong))
        assert isinstance(failed.exception, KitError) and "no answers" in str(failed.exception)

def test_the_real_model_still_says_so(monkeypatch):
    "Three answers of a set are asked again; only where the model and the data are on this machine."
    if not real.is_fetched("smollm2-135m") or not FILES: pytest.skip("smollm2-135m is not on this machine")
    try: same, asked = recipe.recheck("smollm2-135m", "sst2", 3)
    except KitError as e: pytest.skip(str(e))
    assert same == asked == 3
