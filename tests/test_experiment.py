"Trials, arms and tuning: equal costs, scores row by row, one line where something is refused."
import copy, json, random
from types import SimpleNamespace
import pytest, torch
from slmkit.core import experiment, tuning
from slmkit.core.claims import claim
from slmkit.core.experiment import Arms, Trial, check_equal
from slmkit.core.fit import batches, encode_lm, encode_masked, fit, kind_of, lm_loss
from slmkit.core.generate import choice_scores, class_scores, predict_classes, label_log_probs, nll
from slmkit.core.lora import count_trained, inject
from slmkit.core.score import Share, accuracy, correct
from slmkit.core.settings import KitError, settings
from slmkit.core.zoo import load_model

SMALL = dict(model="lm-0.1m", data="topics", n=40, test=24, batch_size=8, max_new_tokens=3, lr=1e-2, relative_lr=True,
             steps=4)

def made(kind="causal", seed=0, **knobs):
    return Trial(settings("smoke", smoke=SMALL | knobs), seed, kind)

@pytest.fixture(scope="module")
def trial(): return made()

def equal(a, b): return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))

def refused(f, *args, **kw):
    with pytest.raises(KitError) as e: f(*args, **kw)
    assert "\n" not in str(e.value)
    return str(e.value)

# ---- settings

def test_none_is_the_profiles_own_choice_and_zero_is_a_choice():
    cfg = settings("real", dict(model=None, n=0, alpha=None), real=dict(model="lm-1m", n=10), cpu={})
    assert (cfg.model, cfg.n, cfg.alpha, cfg.profile) == ("lm-1m", 0, None, "real")

def test_an_unknown_profile_is_one_line_wherever_it_stands():
    assert "did you mean 'real'" in refused(settings, "reel", real={})
    assert "no profile 'gpus'" in refused(settings, "cpu", cpu={}, gpus={})

# ---- a trial

def test_an_arm_is_a_fresh_copy_and_repeats_itself(trial):
    before = copy.deepcopy(trial.base)
    one, h = trial.fit(trial.rows())
    two, g = trial.fit(trial.rows())
    assert equal(trial.base, before) and equal(one, two) and h.loss == g.loss and h.steps == 4
    assert not equal(one, trial.base) and not one.training

def test_it_is_the_loop_that_notebooks_write_by_hand(trial):
    from slmkit.core.fit import fresh_copy
    model = fresh_copy(trial.base, 0)
    data = batches(trial.rows(), 8, trial.tok.pad_token_id, random.Random(0))
    h = fit(model, lm_loss, data, steps=4, lr=1e-2, relative_lr=True, progress=False)
    theirs, g = trial.fit(trial.rows())
    assert h.loss == g.loss and equal(model, theirs)

def test_equal_tokens(trial):
    _, long = trial.fit(trial.rows(), steps=6)
    _, short = trial.fit(trial.rows()[:8], like=long)
    batch = max(len(r["input_ids"]) for r in trial.rows())*8
    assert long.tokens <= short.tokens < long.tokens + batch

@pytest.mark.parametrize("tokens, steps, fair", [(1010, 60, True), (1030, 60, False), (960, 60, False),
                                                 (1030, 40, True)])
def test_unequal_arms_are_refused(tokens, steps, fair):
    other = SimpleNamespace(tokens=tokens, steps=steps)
    if fair: check_equal(other, SimpleNamespace(tokens=1000, steps=60))
    else: assert "can't be compared" in refused(check_equal, other, SimpleNamespace(tokens=1000, steps=60))

def test_a_prepared_arm_and_another_base(trial):
    model, _ = trial.fit(trial.rows(), prepare=lambda m: inject(m, ["q_proj"], rank=2))
    assert count_trained(model) < 1000 < count_trained(trial.base)
    other = load_model("lm-0.4m", device="cpu", kind="causal")[0]
    assert trial.fit(trial.rows(), base=other, steps=1)[0].num_parameters() == other.num_parameters()

def test_batches_of_ones_own(trial):
    drawn = []
    def stream():
        for batch in batches(trial.rows(), 4, 0, random.Random(5)):
            drawn.append(len(batch["input_ids"]))
            yield batch
    trial.fit(stream(), steps=3)
    assert drawn == [4]*3

@pytest.mark.parametrize("kind, model", [("causal", "lm-0.1m"), ("seq2seq", "t5-1m"), ("masked", "bert-1m"),
                                         ("classifier", "bert-1m")])
def test_every_kind_trains_and_is_scored(kind, model):
    t = made(kind, model=model, n=16, test=10, steps=2)
    student, h = t.fit(t.rows())
    assert kind_of(student) == kind and h.steps == 2
    share, scores = t.accuracy(student), t.scores(student)
    assert share == accuracy(t.answers(student), list(t.test["label"])) and len(share.right) == 10
    assert scores.shape == (10, len(t.labels)) and (scores <= 0).all()
    if kind in ("masked", "classifier"): assert t.answers(student) == [t.labels[i] for i in scores.argmax(1)]

def test_a_trained_classifier_is_better_than_chance():
    t = made("classifier", model="bert-1m", n=200, test=60, steps=40, batch_size=16)
    assert t.accuracy(t.fit(t.rows())[0]) > 2/len(t.labels)

def test_the_answer_is_read_out_of_a_longer_text(trial, monkeypatch):
    monkeypatch.setattr(trial, "answers", lambda *a: [f"since so ; answer : {l}" for l in trial.test["label"]])
    assert trial.accuracy(None) == 0 and trial.accuracy(None, read=lambda s: s.split("answer : ")[1]) == 1

def test_a_prefix_stands_before_each_input(trial, monkeypatch):
    seen = []
    written = lambda model, tok, asked, **how: seen.extend(asked) or asked
    monkeypatch.setattr(experiment.generate, "generate_answers", written)
    trial.answers(None, prefix="[label] ")
    assert seen == ["[label] " + text for text in trial.test["input"]]

@pytest.mark.parametrize("knobs, words", [(dict(model=""), "--model"), (dict(data=""), "--data"),
                                          (dict(model="lm-0.2m"), "did you mean"), (dict(data="topic"), "topics")])
def test_what_a_trial_cannot_use_is_one_line(knobs, words):
    assert words in refused(made, **knobs)

def test_a_wrong_model_is_refused_before_data_are_read(monkeypatch):
    monkeypatch.setattr(experiment, "load", lambda *a, **kw: 1/0)
    assert "no model 'lm-2m'" in refused(made, model="lm-2m")

def test_unknown_words_are_said(tmp_path, capsys):
    rows = [dict(input=f"quantum flux {i}", label="yes") for i in range(40)]
    (tmp_path/"own.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    made(data=str(tmp_path/"own.jsonl"), n=0, test=0)
    assert "of the words are unknown to lm-0.1m" in capsys.readouterr().out

# ---- likelihoods

@pytest.mark.parametrize("kind, name", [("causal", "lm-0.1m"), ("seq2seq", "t5-1m"), ("masked", "bert-1m")])
def test_likelihoods_are_the_models_own_loss(kind, name):
    model, tok = load_model(name, device="cpu", kind=kind)
    t = SimpleNamespace(inputs=["ana has 3 apples .", "tom has 12 pears and sings ."], labels=["3", "pears ."])
    rows = experiment.rows_for(model, tok, t.inputs, t.labels)
    ones = []
    for r in rows:
        batch = {k: torch.tensor([v]) for k, v in r.items()}
        with torch.no_grad(): ones.append(-model(**batch).loss.item()*sum(label >= 0 for label in r["labels"]))
    assert label_log_probs(model, rows, tok.pad_token_id).tolist() == pytest.approx(ones, abs=1e-3)
    assert label_log_probs(model, rows, tok.pad_token_id, 1).tolist() == pytest.approx(ones, abs=1e-3)
    count = sum(label >= 0 for r in rows for label in r["labels"])
    assert nll(model, rows, tok.pad_token_id) == pytest.approx(-sum(ones)/count, abs=1e-4)
    assert choice_scores(model, tok, t.inputs, t.labels).diagonal().tolist() == pytest.approx(ones, abs=1e-3)

def test_the_first_token_of_a_text_is_not_predicted():
    model, tok = load_model("lm-0.1m", device="cpu", kind="causal")
    rows = encode_lm(tok, ["ana has 3 apples ."])
    batch = {k: torch.tensor(v) for k, v in dict(input_ids=[rows[0]["input_ids"]], labels=[rows[0]["labels"]]).items()}
    with torch.no_grad(): loss = model(**batch).loss.item()
    assert nll(model, rows, tok.pad_token_id) == pytest.approx(loss, abs=1e-5)

def test_masks_hide_the_answer():
    model, tok = load_model("bert-1m", device="cpu", kind="masked")
    row = encode_masked(tok, ["a robin is a"], ["bird"])[0]
    answer = [label for label in row["labels"] if label >= 0]
    assert tok.decode(answer).strip() == "bird" and not set(answer) & set(row["input_ids"])

def test_classes_come_back_in_order():
    t = made("classifier", model="bert-1m", n=16, test=10)
    rows = t.rows()
    assert torch.allclose(class_scores(t.base, rows, 0, 1), class_scores(t.base, rows, 0, 7), atol=1e-5)
    assert predict_classes(t.base, rows, 0) == class_scores(t.base, rows, 0).argmax(1).tolist()

# ---- arms

def test_a_share_remembers_its_rows():
    share = Share(correct(["a", "b", "c"], ["a", "x", "c"]))
    assert share == 2/3 and share.right == [True, False, True]
    assert copy.deepcopy(share).right == share.right and json.dumps(share) == json.dumps(2/3)

def test_arms_keep_masks_only_of_what_has_rows():
    arms = Arms(3, rows="abcd")
    arms["one"] = Share([1, 0, 1, 1])
    arms |= dict(two=Share([1]*4), size=7)
    arms.update(three=torch.tensor(.5))
    assert dict(arms) == dict(one=.75, two=1., size=7., three=.5) and arms.masks.keys() == {"one", "two"}
    arms["one"] = .1
    assert arms.masks.keys() == {"two"}

@pytest.mark.parametrize("value, words", [(float("inf"), "not a finite"), ("x", "str is no number"),
                                          (None, "no number"),
                                          (Share([1, 0]), "scored on 2 rows, the run has 4")])
def test_no_arm_is_kept_that_is_no_number(value, words):
    arms = Arms(0, rows=range(4))
    assert words in refused(arms.__setitem__, "x", value) and not arms and not arms.masks

def test_curves_and_tables():
    arms = Arms(0)
    arms.curve("loss", x=range(2), both=torch.tensor([1., .5]))
    arms.table("map", torch.eye(2), rows=["a", "b"], columns=["c", "d"])
    assert arms.curves["loss"] == dict(x=[0., 1.], both=[1., .5])
    assert arms.curves["map"] == dict(rows=["a", "b"], columns=["c", "d"], values=[[1., 0.], [0., 1.]])
    assert not arms and "1 values of 'both' for 2" in refused(arms.curve, "loss", range(2), both=[1])
    assert "not 1 rows of 2 columns" in refused(arms.table, "map", torch.eye(2), ["a"], ["c", "d"])

def gain(name="gain", least=.01):
    return claim(name, says="More is better.", metric="accuracy gained", value=lambda a: a["more"] - a["less"],
                 control=lambda a: 0., least=least)

def test_one_record_for_all_claims(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLMKIT_RECORD", str(tmp_path/"record.jsonl"))
    settings("smoke", smoke=SMALL)
    arms = Arms(0, rows=range(4))
    arms |= dict(more=Share([1]*4), less=Share([1, 0, 1, 1]))
    runs = arms.record(gain(), gain("again"))
    assert [r.value for r in runs] == [.25, .25] and runs[0].n_rows == 4
    assert "again" in (tmp_path/"record.jsonl").read_text(encoding="utf-8")
    assert capsys.readouterr().out == "arm 'more': exactly 1 on 4 rows\n"
    assert "name the claims" in refused(arms.record)

# ---- tuning

def test_the_code_hash_counts_the_file_that_tune_writes(tmp_path, monkeypatch):
    from slmkit.run import hashes
    monkeypatch.setattr(hashes, "package_folder", lambda: tmp_path)
    monkeypatch.setattr(tuning, "package_folder", lambda: tmp_path)
    monkeypatch.setenv("SLMKIT_TECHNIQUE", "distill/some")
    cfg = settings("smoke", smoke=SMALL | dict(model="owner/small-2.5", data="folder/own.jsonl"))
    at = dict(model=cfg.model, data=cfg.data)
    assert not hashes.tuning_hash("nbs/distill/some_repro.ipynb", at)
    tuning.tuning_file().parent.mkdir()
    tuning.tuning_file().write_text("{}", encoding="utf-8")
    assert hashes.tuning_hash("nbs/distill/some_repro.ipynb", at)

@pytest.fixture
def notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("SLMKIT_TUNING", str(tmp_path))
    monkeypatch.setenv("SLMKIT_TECHNIQUE", "distill/some-short")
    settings("smoke", smoke=SMALL)
    return tmp_path/"some-short.lm-0.1m.topics.json"

def test_trials_are_made_only_when_asked_for(notebook, trial, monkeypatch, capsys):
    calls = []
    score = lambda t, rate: calls.append((t.seed, rate)) or {1e-3: .2, 3e-3: .6, 1e-2: .5}[rate] + t.seed
    assert tuning.tune("both", trial, lr=[1e-3, 3e-3, 1e-2], score=score).empty and not calls
    assert "no trials of 'both' are stored: slmkit tune distill/some-short" in capsys.readouterr().out
    assert not notebook.exists()
    monkeypatch.setenv("SLMKIT_TUNE", "1")
    table = tuning.tune("both", trial, lr=[1e-3, 3e-3, 1e-2], score=score)
    assert sorted(calls) == [(s, r) for s in (0, 1) for r in (1e-3, 3e-3, 1e-2)]
    monkeypatch.delenv("SLMKIT_TUNE")
    assert tuning.tune("both", trial, lr=[1.]).equals(table) and len(calls) == 6
    assert tuning.best_rate("both") == 3e-3 and capsys.readouterr().out == ""

def test_an_edge_is_said_and_an_arm_without_a_rate_is_stored(notebook, trial, monkeypatch, capsys):
    monkeypatch.setenv("SLMKIT_TUNE", "1")
    tuning.tune("label", trial, lr=[1e-3, 3e-3], score=lambda t, rate: rate)
    assert "at the edge" in capsys.readouterr().out
    tuning.tune("untrained", trial)
    stored = json.loads(notebook.read_text(encoding="utf-8"))
    assert stored["label"] == dict(lr=[1e-3, 3e-3], seeds=[0, 1], scores=[[1e-3]*2, [3e-3]*2], best=3e-3)
    assert stored["untrained"] == dict(lr=[], seeds=[], scores=[], best=None)

def test_rates_that_are_not_there(notebook, trial):
    assert tuning.best_rate("both", otherwise=.5) == .5
    assert "no trials of 'both'" in refused(tuning.best_rate, "both")
    notebook.write_text("{", encoding="utf-8")
    assert "slmkit tune" in refused(tuning.best_rate, "both")

def test_a_notebook_without_a_name_stores_nothing(notebook, trial, monkeypatch):
    monkeypatch.setenv("SLMKIT_TUNE", "1")
    monkeypatch.delenv("SLMKIT_TECHNIQUE")
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert "no name" in refused(tuning.tune, "both", trial, lr=[1e-3], score=lambda t, r: 0.)
