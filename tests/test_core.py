"The world, its tasks and documents, the tokenizer, and the hook that skips cells."
import hashlib, random
import nbformat, pytest
from slmkit.toyland.documents.world import grams, leaks
from slmkit.toyland.documents.sample import document, every_kind, text
from slmkit.core.settings import KitError, directives, nearest, settings, skip_reason
from slmkit.toyland.tasks import SHARES, TASKS, split_of, task
from slmkit.toyland.tasks import corrupt
from slmkit.toyland.tokenizer import build_tokenizer, pieces, unknown_share
from slmkit.toyland.world import PEOPLE, facts, vocabulary

TASKS = list(TASKS)
KNOWN = {p[1:] for p in pieces() if p.startswith("▁")}
HARD = dict(word_problems=dict(steps=4, distractors=4), entailment=dict(distractors=4))
def rows_of(name, split="train", n=400, seed=0):
    "Rows of a task at its default knobs and, where it has them, at harder ones."
    n = 120 if name == "facts" else n
    out = list(task(name, split, n, seed))
    return out + list(task(name, split, n, seed, **HARD[name])) if name in HARD else out

@pytest.fixture(scope="module")
def docs():
    rng = random.Random(11)
    return [document(rng) for _ in range(12_000)]

@pytest.fixture(scope="module")
def asked(): return [r for name in TASKS for seed in (0, 1) for r in rows_of(name, n=1500, seed=seed)]

# ---- documents

def test_no_document_holds_eight_tokens_of_a_task(docs, asked):
    found = leaks(docs, asked)
    assert not found, sorted(found)[:5]

@pytest.mark.parametrize("name", TASKS)
def test_a_planted_leak_is_found(docs, name):
    row = next(r for r in rows_of(name) if len(grams(f"{r['input']} {r['rationale']}")) > 2)
    words = f"{row['input']} {row['rationale']}".split()
    planted = "so it was : " + " ".join(words[-12:]) + " and that was all ."  # a part of the row, in other words
    found = leaks(docs[:500] + [planted], [row])
    assert found and all(g in grams(planted) for g in found)

def test_seven_tokens_are_no_leak():
    row = dict(input="one two three four five six seven eight nine", rationale="ten")
    assert not leaks(["x one two three four five six seven x"], [row])
    assert leaks(["x one two three four five six seven eight x"], [row]) == {"one two three four five six seven eight"}

def test_numbers_count_digit_by_digit():
    assert leaks(["a b c d e f 4 2"], [dict(input="a b c d e f 42", rationale="")])

def test_every_kind_is_drawn_described_and_in_the_vocabulary():
    known = KNOWN
    for name, (make, weight) in every_kind().items():
        rng = random.Random(5)
        made = [make(rng) for _ in range(300)]
        words = {w for text in made for w in text.split() if w.isalpha()}
        assert weight > 0 and make.__doc__ and "\n" not in make.__doc__, name
        assert all(made) and not words - known, (name, sorted(words - known))

def test_text_packs_whole_documents_into_its_room():
    rng = random.Random(3)
    for room in (40, 72):
        for packed in (text(rng, room) for _ in range(200)):
            parts = packed.split(" </s> ")
            tokens = sum(len(w) if w.isdigit() else 1 for w in packed.split())
            assert all(parts) and (len(parts) == 1 or tokens <= room)

def checksum(lines): return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

def test_the_stream_that_the_zoo_has_read():
    "If this changes, the shipped models have read other documents: pretrain them again, then change the sums."
    rng = random.Random(7)
    assert checksum(text(rng) for _ in range(500)) == "44471582c6fa3c41"
    assert checksum(pieces()) == "1db680dbed7a11f7"

def test_equal_seeds_give_equal_texts():
    one, two, other = ([text(random.Random(s)) for _ in range(3)] for s in (1, 1, 2))
    assert one == two != other

# ---- tasks

@pytest.mark.parametrize("name", TASKS)
def test_splits_are_disjoint_over_seeds(name):
    n = 60 if name == "facts" else 300
    sizes = dict(train=n, valid=n//6, test=n)
    drawn = {s: {r["input"] for seed in range(4) for r in task(name, s, sizes[s], seed)} for s in SHARES}
    for s, inputs in drawn.items():
        assert inputs and {split_of(i) for i in inputs} == {s}
    assert len(set().union(*drawn.values())) == sum(map(len, drawn.values()))

@pytest.mark.parametrize("name", TASKS)
def test_equal_seeds_give_equal_rows(name):
    one, two = (task(name, n=40, seed=s).to_list() for s in (3, 3))
    assert one == two and one != task(name, n=40, seed=4).to_list()
    assert len({r["input"] for r in one}) == 40 == len({r["id"] for r in one})

@pytest.mark.parametrize("name", TASKS)
def test_tasks_stay_in_the_vocabulary(name):
    rows, known = rows_of(name), KNOWN
    for column in ("input", "label", "rationale"):
        words = {w for r in rows for w in r[column].split() if w.isalpha()}
        assert not words - known, (column, sorted(words - known))

@pytest.mark.parametrize("name", TASKS)
def test_labels_are_among_the_choices(name):
    rows = [r for r in rows_of(name) if "choices" in r]
    assert all(r["label"] in r["choices"] and len(set(r["choices"])) == len(r["choices"]) for r in rows)

def test_labels_of_word_problems_evaluate_to_their_answers():
    from slmkit.core.score import arithmetic
    rows = [*task("word_problems", n=400, steps=4), *task("word_problems", n=400, change=0.)]
    assert all(arithmetic(r["label"]) == int(r["answer"]) >= 0 for r in rows)
    assert {c for r in rows for c in r["label"] if c in "+-*/"} == set("+-*/")
    numbers = task("word_problems", n=50, number=True)
    assert numbers["label"][:] == numbers["answer"][:]

def test_a_right_answer_is_right_however_a_tokenizer_spaces_it():
    from slmkit.core.score import accuracy
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    pieces = ["[UNK]", *"().-+*/'", *"0123456789", *(f"##{c}" for c in "0123456789"), *"abcdefghijklmnopqrstuvwxyz",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
    like_bert = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    like_bert.normalizer = normalizers.BertNormalizer(lowercase=True)
    like_bert.pre_tokenizer, like_bert.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tok = PreTrainedTokenizerFast(tokenizer_object=like_bert, unk_token="[UNK]")
    equations = ["( 84.0 / 2.0 )", "( ( 7.25 + 3.0 ) * 10.0 )", "84.5"]
    words = ["entailment", "don't know", "New York", "x-ray"]
    for labels, metric in ((equations, "equation"), (equations, "exact"), (words, "exact")):
        assert accuracy(tok.batch_decode(tok(labels)["input_ids"]), labels, metric) == 1
    assert accuracy(["( 84. 0 / 3. 0 )"], equations[:1], "equation") == 0

def test_steps_and_distractors_are_what_is_asked_for():
    assert max(task("word_problems", n=300, steps=1, distractors=0)["difficulty"]) == 1
    assert max(r["label"].count("(") for r in task("word_problems", n=300, steps=4)) == 4

def test_facts_are_true_of_their_world():
    for row in task("facts", n=80, world=2):
        p = next(w for w in row["rationale"].split() if w in PEOPLE)
        known = facts(2)[p]
        assert row["label"] in (*known.values(), facts(2)["region"][known["town"]])

def test_entailment_by_number_is_right():
    for row in task("entailment", n=600, distractors=0):
        if " has more than " not in row["input"]: continue
        premise, hypothesis = row["input"].split(" question : ")
        n, m = (int(next(w for w in t.split() if w.isdigit())) for t in (premise, hypothesis))
        exact = "more than" not in premise
        assert row["label"] == ("neutral" if not exact else "entail" if n > m else "contradict")

def test_corrupt_hits_its_share_and_keeps_the_rest():
    ds = task("entailment", n=600)
    bad = corrupt(ds, .3, seed=1, into="teacher_label")
    wrong = sum(x != y for x, y in zip(bad["teacher_label"], ds["label"]))
    assert 140 < wrong < 220 and bad["label"][:] == ds["label"][:]
    assert corrupt(ds, .3, 1)["label"][:] == corrupt(ds, .3, 1)["label"][:] != corrupt(ds, .3, 2)["label"][:]

# ---- errors

def said(f, *args, **kw):
    with pytest.raises(KitError) as e: f(*args, **kw)
    return str(e.value)

@pytest.mark.parametrize("call, words", [
    (lambda: settings("smok", smoke={}), "did you mean 'smoke'"),
    (lambda: settings("gpu", smoke={}, cpu={}), "no profile 'gpu'"),
    (lambda: task("word_problem"), "did you mean 'word_problems'"),
    (lambda: task("topics", "tests"), "train, valid or test"),
    (lambda: task("facts", "valid", n=100), "ask for fewer"),
])
def test_errors_are_one_line(call, words):
    line = said(call)
    assert words in line and "\n" not in line and len(line) < 250

def test_nearest_lists_the_choices_where_nothing_is_near():
    assert nearest("zzz", ["b", "a"]) == ": there is a, b" and nearest("x", []) == ": there is nothing yet"

# ---- tokenizer

@pytest.fixture(scope="module")
def tok(): return build_tokenizer()

def test_round_trip(tok):
    rng = random.Random(1)
    ours = [text(rng).replace("</s> ", "") for _ in range(50)]
    for s in ours + ["naïve 日本 x_1 = f(2.5);", "a\tb", "🦊 [ 7 ]"]:
        assert tok.decode(tok(s)["input_ids"], skip_special_tokens=True) == s.lower()

def test_digits_are_single_tokens(tok):
    for n in range(1000):
        first, *rest = str(n)
        assert tok.tokenize(f"ana has {n}")[2:] == ["▁" + first, *rest]

def test_unknown_words_are_spelled_in_bytes(tok):
    spelled = tok.tokenize("quantum")
    assert len(spelled) >= len("quantum") and all(t == "▁" or t.startswith("<0x") for t in spelled)
    assert tok.unk_token_id not in tok("Übermut 漢字")["input_ids"]

def test_words_and_special_tokens_are_one_token_each(tok):
    assert all(len(tok.tokenize(w)) == 1 for w in vocabulary())
    assert tok.tokenize("[label] ana")[0] == "[label]" and tok("ana")["input_ids"][-1] == tok.eos_token_id
    assert tok.pad_token_id == 0 and tok.convert_tokens_to_ids("<extra_id_0>") == 4

def test_unknown_share(tok):
    assert unknown_share(tok, ["ana has 7 eggs ."]) == 0 and unknown_share(tok, []) == 0
    assert unknown_share(tok, ["ana sees a quasar"]) == .25

# ---- cells that are skipped

CELLS = ["#| slow\nslow_ran = True", "#| cuda\ncuda_ran = True", "plain = '#| slow'", "#| export\n#| slow\nboth = True"]
def expected(profile):
    import torch
    ran = {"plain"} | ({"slow_ran", "both"} if profile != "smoke" else set())
    return ran | ({"cuda_ran"} if torch.cuda.is_available() else set())
NAMES = "slow_ran", "cuda_ran", "plain", "both"

@pytest.mark.parametrize("profile", ["smoke", "cpu"])
def test_the_hook_skips_under_execnb(profile):
    from execnb.shell import CaptureShell
    shell = CaptureShell()
    shell.run(f"profile = {profile!r}")
    shell.run("import slmkit.core")
    shell.run("from slmkit.core.settings import install_hook; install_hook()")
    outputs = [shell.run(c) for c in CELLS]
    assert {n for n in NAMES if n in shell.user_ns} == expected(profile) and not shell.exc
    assert ("slow: skipped at smoke" in str(outputs[0])) == (profile == "smoke")

def test_the_hook_skips_under_papermill(tmp_path):
    "A real ipykernel, papermill's own engine, and a parameter that papermill changes."
    import papermill
    v4 = nbformat.v4
    sources = ["profile = 'cpu'", "import slmkit.core", *CELLS, f"print(sorted(n for n in {NAMES} if n in globals()))"]
    cells = [v4.new_code_cell(s, metadata=dict(tags=["parameters"] if i == 0 else [])) for i, s in enumerate(sources)]
    kernel = dict(kernelspec=dict(name="python3", language="python", display_name="python3"))
    nbformat.write(v4.new_notebook(cells=cells, metadata=kernel), tmp_path/"in.ipynb")
    done = papermill.execute_notebook(tmp_path/"in.ipynb", tmp_path/"out.ipynb", dict(profile="smoke"),
                                      engine_name="nbclient", kernel_name="python3", progress_bar=False)
    assert done.cells[-1].outputs[0].text.strip() == str(sorted(expected("smoke")))

def test_directives_are_read_at_the_head_of_lines():
    assert directives("#| export\n#|slow\nx = 1  #| cuda") == {"export": "", "slow": ""}
    assert skip_reason("#| slow", "smoke") and not skip_reason("#| slower", "smoke")
