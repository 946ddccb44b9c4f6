"`slmkit start` on a tiny project: how many seeds, which cells, what it says; and bad input at the door."

import json, os, re, shutil
import pytest
from conftest import ROOT, write_notebook
from slmkit.core import zoo
from slmkit.core.sets import manifest
from slmkit.core.settings import KitError
from slmkit.run import start as s
from slmkit.cli.main import main
from slmkit.run.records import reading

CLAIM = '''
from slmkit.core.settings import settings
from slmkit.core.claims import claim
zoo = dict(model="t5-1m", data="word_problems")
cfg = settings(profile, dict(model=model or None, data=data or None), smoke=zoo, cpu=zoo)
gain = claim("tiny-gain", work="w", says="A is more than B.", kind="effect", metric="points",
    value=lambda a: a["a"] - a["b"], control=lambda a: a["c"] - a["b"], least=.02)
more = claim("slow-gain", work="w", says="Slowly.", kind="effect", metric="points", value=lambda a: a["a"],
    control=lambda a: 0., least=.02)
'''
RECORD = 'gain.record(seed, rows=["r"], a=.5 + .01*seed, b=.4, c=.4)'
SLOW = '#| slow\nmore.record(seed, rows=["r"], a=.9)'

@pytest.fixture
def project(tmp_path, monkeypatch):
    "project(*cells) makes a project whose flagship has these cells, and goes there."
    def make(*cells):
        (tmp_path/"settings.ini").write_text("[slmkit]\nstart = step_by_step\n", encoding="utf-8")
        write_notebook(tmp_path/"nbs/distill/step_by_step.ipynb", CLAIM, *cells)
        monkeypatch.chdir(tmp_path); return tmp_path
    return make

def said(capfd, *argv):
    "Exit code, stdout, stderr of a command."
    with pytest.raises(SystemExit) as e: main(list(map(str, argv)))
    out = capfd.readouterr()
    return e.value.code, out.out.strip(), out.err.strip()

def one_line(capfd, *argv):
    "What a command says to a mistake, after checking that it says it properly."
    code, _, err = said(capfd, *argv)
    assert code == 2 and err.startswith("slmkit: ") and "\n" not in err and "Traceback" not in err, err
    return err

def test_at_least_three_seeds_the_report_and_the_ledger_beside_it(project, capfd):
    root = project(RECORD, SLOW)
    code, out, err = said(capfd, "start", "--budget", "0.1s", "-j", 1)
    assert code == 0, err
    records, _ = reading(root/"runs/start")
    assert sorted(r["seed"] for r in records) == [0, 1, 2] and all(r["status"] == "ok" for r in records)
    assert all(set(r["claims"]) == {"tiny-gain"} for r in records)
    report = re.search(r"report +(\S+)", out)[1]
    assert "tiny-gain" in open(report, encoding="utf-8").read()
    assert (
        "for the first 3" in out
        and re.search(r"this machine +0\.11 \[", out)
        and "control 0;" in out
        and "no verdict" in out
    )
    assert re.search(r"shipped ledger +nothing published", out) and len(re.findall(r"slmkit (run|verdicts)", out)) == 2
    assert os.environ.get("SLMKIT_SKIP_SLOW") is None

def test_build_seeds_only_as_far_as_the_budget_reaches_and_none_twice(project):
    root, lines = project(RECORD), []
    records, folder = s.start("10m", jobs=2, kind="quiet", say=lines.append)
    assert [r["seed"] for r in records] == list(range(10))
    again, _ = s.start("10m", jobs=2, kind="quiet", say=lines.append)
    assert again == records and len(reading(folder)[0]) == 10 and "10 runs have their answer already." in lines

def test_failed_seeds_are_told_and_the_exit_code_says_so(project, capfd):
    project('if seed == 1: raise ValueError("no luck")', RECORD)
    code, out, err = said(capfd, "start", "--budget", "0.1s")
    assert code == 1 and "no luck" in err and re.search(r"this machine +0\.11 \[", out)

def test_settings_say_what_is_run(project, capfd):
    root = project(RECORD)
    write_notebook(root/"nbs/adapt/other.ipynb", CLAIM, RECORD)
    (root/"settings.ini").write_text("[slmkit]\nstart = other\n", encoding="utf-8")
    code, out, err = said(capfd, "start", "--budget", "0.1s")
    assert code == 0 and "adapt/other at profile cpu" in out and "run other " in out
    (root/"settings.ini").write_text("[slmkit]\nstart =\n", encoding="utf-8")
    assert "write `start = NAME`" in one_line(capfd, "start")
    (root/"settings.ini").write_text("[slmkit]\nstart = other, other@gpu\n", encoding="utf-8")
    assert "names 'other@gpu': write NAME or NAME@real" in one_line(capfd, "start")


def test_a_tour_runs_each_technique_once_before_any_a_second_time(project, capfd):
    root = project(RECORD)
    for name in "abcd": write_notebook(root/f"nbs/adapt/{name}.ipynb", CLAIM, RECORD)
    (root/"settings.ini").write_text("[slmkit]\nstart = step_by_step a b c d\n", encoding="utf-8")
    code, out, err = said(capfd, "start", "--budget", "0.1s", "-j", 1)
    assert code == 0, err
    done = [(r["technique"], r["seed"]) for r in reading(root/"runs/start")[0]]
    assert done == [("distill/step_by_step", 0), *((f"adapt/{n}", 0) for n in "abcd")]
    assert "for the first 5" in out and [l.split()[1] for l in out.splitlines() if l.startswith("technique ")] == \
        [name for name, _ in done]
    assert "run step_by_step " in out

@pytest.mark.parametrize(
    "argv, words",
    [
        (["--budget", "soon"], "write 8m"),
        (["--model", "/nowhere"], "no such folder"),
        (["--out", "file/x"], "--out"),
    ],
)
def test_bad_options(project, capfd, argv, words):
    root = project(RECORD); (root/"file").write_text("", encoding="utf-8")
    assert words in one_line(capfd, "start", *argv)
    assert not (root/"runs").exists()

def test_outside_a_clone(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert "inside a clone" in one_line(capfd, "start")

def test_damaged_weights_stop_it_before_anything_runs(project, tmp_path, monkeypatch, capfd):
    shutil.copytree(zoo.zoo_folder(), tmp_path/"zoo"); (tmp_path/"zoo/t5-1m/model.safetensors").write_bytes(b"half")
    project(RECORD); monkeypatch.setattr(zoo, "zoo_folder", lambda: tmp_path/"zoo")
    assert "git checkout -- slmkit/zoo" in one_line(capfd, "start")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["run", "step_by_stp"], "did you mean 'step_by_step'"),
        (["run", "step_by_step", "-p", "ratee=1"], "did you mean 'rate'"),
        (["run", "step_by_step", "-p", "rate=much"], "float wanted"),
        (["run", "step_by_step", "--profile", "cpuu"], "did you mean 'cpu'"),
        (["run", "step_by_step", "--seeds", "100"], "slmkit confirm"),
        (["run", "step_by_step", "--out", "file/x"], "--out"),
        (["confirm", "step_by_stp"], "did you mean 'step_by_step'"),
        (["report", "nowhere"], "nowhere"),
        (["status", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_at_the_door_are_one_line(project, capfd, argv, words):
    root = project(RECORD); (root/"file").write_text("", encoding="utf-8")
    assert words in one_line(capfd, *argv)

MISTAKES = {
    'load(DATA, "train", columns="input=question,label=answr")': "no column 'answr'",
    'load(DATA, "train", columns="inputt=question")': "no part 'inputt'",
    'load("svamp", "train")': "SLMKIT_DATA",
    'load("svmp", "train")': "did you mean 'svamp'",
}
def test_mistakes_that_only_a_run_can_see_are_one_line_each(project, capfd, monkeypatch):
    monkeypatch.delenv("SLMKIT_DATA", raising=False)
    root = project(RECORD)
    own = root / "own.jsonl"
    own.write_text("".join(json.dumps(dict(question=f"{i} ?", answer="y")) + "\n" for i in range(40)), encoding="utf-8")
    for i, cell in enumerate(MISTAKES):
        write_notebook(
            root / f"nbs/adapt/0{i}_mistake{i}.ipynb",
            f"from slmkit.core.data import load\nDATA = '../../own.jsonl'",
            cell,
        )
    code, _, err = said(capfd, "run", "--family", "adapt", "--seeds", "0", "-q")
    assert code == 1 and "Traceback" not in err and len(err.splitlines()) == len(MISTAKES), err
    for words in MISTAKES.values(): assert words in err

def test_missing_set_stops_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("SLMKIT_DATA", str(tmp_path/"none"))
    with pytest.raises(KitError, match="slmkit data fetch svamp"): s.ready(dict(model="x", data="svamp"))

ASKED = '''
from slmkit.core.settings import settings
from slmkit.core.claims import claim
cfg = settings(profile, smoke=dict(model="t5-1m"), real=dict(model="smollm2-135m", sets=["svamp"]))
asked = claim("asked-gain", work="w", says="It is asked.", kind="effect", metric="points", least=.02, draws=True,
    value=lambda a: a["a"] - a["b"], control=lambda a: a["c"] - a["b"])
asked.record(seed, rows=["r"], a=.5 + .01*seed, b=.4, c=.4)
'''

def real_tour(root, monkeypatch, sets):
    "A tour whose first technique asks a real model's stored answers about rows of `sets`, a folder."
    (root/"settings.ini").write_text("[slmkit]\nstart = judge/asked@real step_by_step\n", encoding="utf-8")
    write_notebook(root/"nbs/judge/asked.ipynb", ASKED, parameters='profile = "real"\nseed = 0')
    monkeypatch.setenv("SLMKIT_DATA", str(sets))

def told_fetch(monkeypatch, fault):
    "The names that are fetched, where fetching fails with `fault`, if there is one."
    from slmkit.cli import start as verb
    names = []
    def fetch(name):
        names.append(name)
        if fault: raise KitError(fault)
        for file in manifest()[name]["files"].values():
            path = verb.target()/manifest()[name]["folder"]/file["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
            (path.parent/"FETCHED").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(verb, "fetch", fetch)
    return names

def test_a_real_models_stored_answers_come_first_and_their_rows_are_fetched_once(project, capfd, monkeypatch):
    root, names = project(RECORD), told_fetch(monkeypatch, "")
    real_tour(root, monkeypatch, root/"sets")
    code, out, err = said(capfd, "start", "--budget", "0.1s", "-j", 1)
    assert code == 0, err
    done = [(r["technique"], r["profile"]) for r in reading(root/"runs/start")[0]]
    assert done[:2] == [("judge/asked", "real"), ("distill/step_by_step", "cpu")] and names == ["svamp"]
    assert "judge/asked at profile real; distill/step_by_step at profile cpu" in out and "run step_by_step" in out

def test_without_a_network_the_real_model_is_left_out_in_a_sentence(project, capfd, monkeypatch):
    root, names = project(RECORD), told_fetch(monkeypatch, "no way there")
    real_tour(root, monkeypatch, root/"none")
    code, out, err = said(capfd, "start", "--budget", "0.1s", "-j", 1)
    assert code == 0, err
    assert {r["technique"] for r in reading(root/"runs/start")[0]} == {"distill/step_by_step"}
    assert "not fetched: no way there" in out and "judge/asked at profile real is left out" in out
