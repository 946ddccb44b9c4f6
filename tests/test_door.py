"What stands at the door: other encodings, odd notebooks and machines, mistakes that are told before anything runs."
import csv, json, os, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path
from types import SimpleNamespace
import pytest, typer
from conftest import ROOT, code_cell, write_notebook
from slmkit.cli.main import build, main
from slmkit.core.settings import KitError
from slmkit.project.registry import bibtex, registry
from slmkit.project.sync import sync
from slmkit.run.batch import execute
from slmkit.run.notebooks import read
from slmkit.run.plan import chosen, plan
from slmkit.run.progress import Console, table
from test_sync import copy_project

MAIN = "from slmkit.cli.main import main; main()"

def python(code, *words, cwd=ROOT, **env):
    "A process of Python; slmkit is that of `cwd` where it has one, else of this checkout."
    path = os.pathsep.join([*filter(None, [env.pop("PYTHONPATH", "")]), str(cwd), str(ROOT)])
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=cwd, capture_output=True,
                          encoding="utf-8", errors="replace", timeout=300, env=os.environ | dict(env, PYTHONPATH=path))

def slmkit(*words, **how): return python(MAIN, *words, **how)

# ---- encodings

STRICT = '''import warnings
warnings.filterwarnings("error", category=EncodingWarning, module=r"slmkit\\b")  # the kit's own modules alone
'''
PROBE = "import os; exec('open(os.devnull)', dict(__name__='slmkit.probe', os=os))"

@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    "Environment of a machine whose encoding is not UTF-8, where a file opened without an encoding is an error."
    folder = tmp_path_factory.mktemp("strict")
    (folder/"sitecustomize.py").write_text(STRICT, encoding="utf-8")
    return dict(PYTHONPATH=str(folder), PYTHONWARNDEFAULTENCODING="1", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0",
                PYTHONIOENCODING="cp1252", LC_ALL="C")

@pytest.fixture(scope="module")
def clone(tmp_path_factory): return copy_project(ROOT, tmp_path_factory.mktemp("clone")/"project")

def fine(done, *codes):
    "What a command said, where it neither broke nor met a file without an encoding."
    assert done.returncode in (codes or (0,)), done.stderr
    kit = [l for l in done.stderr.splitlines() if "EncodingWarning" in l and f"{os.sep}site-packages{os.sep}" not in l]
    assert "Traceback" not in done.stderr and kit == []
    return done.stdout

def whole_text(path):
    "The text of a file in UTF-8, without the signs of one that was read in another encoding."
    text = path.read_text(encoding="utf-8")
    assert not any(sign in text for sign in ("Â·", "â€", "â†", "Ã—", "\ufffd")), path
    return text

def test_a_file_without_an_encoding_would_be_found(foreign):
    "The other tests of this part would see it."
    assert "EncodingWarning" in python(PROBE, **foreign).stderr

def test_runs_and_reports_do_not_need_utf8(foreign, tmp_path):
    path = write_notebook(tmp_path/"tiny.ipynb", "print('a → b · café')", "raise ValueError('né → ×')")
    done = slmkit("run", path, "--seeds", "0", "--out", tmp_path/"r", **foreign)
    fine(done, 1)
    assert "né ? ×".encode("cp1252").decode("utf-8", "replace") in done.stderr
    [made] = (tmp_path/"r").glob("*/notebook.ipynb")
    assert "a → b · café" in whole_text(made) and "né → ×" in whole_text(made.with_name("record.json"))
    fine(slmkit("report", tmp_path/"r", **foreign))
    assert "né → ×" in whole_text(tmp_path/"r/report.html")

def test_check_and_sync_do_not_need_utf8(clone, foreign):
    module = clone/"slmkit/infer/kv_cache.py"
    made = whole_text(module)
    assert not made.isascii()
    module.unlink()
    fine(slmkit("sync", cwd=clone, **foreign))
    assert whole_text(module) == made
    said = [fine(slmkit("check", cwd=clone, **how), 0, 1) for how in (foreign, {})]
    assert len(said[0].splitlines()) == len(said[1].splitlines())

def test_labs_do_not_need_utf8(foreign, tmp_path):
    fine(slmkit("lab", "build", "distill/step_by_step", "--no-run", "--out", tmp_path/"a", **foreign))
    fine(slmkit("lab", "build", "distill/step_by_step", "--no-run", "--out", tmp_path/"b"))
    built = {p.relative_to(tmp_path/"a"): whole_text(p) for p in (tmp_path/"a").rglob("*.ipynb")}
    assert len(built) == 3 and not all(t.isascii() for t in built.values())
    assert {p: t for p, t in built.items() if (tmp_path/"b"/p).read_text(encoding="utf-8") != t} == {}

# ---- notebooks

def test_two_notebooks_of_one_module_are_refused_before_anything_is_written(tmp_path):
    for name in ("a", "b"):
        write_notebook(tmp_path/f"nbs/infer/{name}.ipynb", "#| default_exp infer.a", parameters=None)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(KitError, match=r"nbs/infer/a.ipynb and nbs/infer/b.ipynb both say #\| default_exp infer.a"):
        sync(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before

CELL = code_cell(1, "print(1)")
ODD = dict(
    bom=(b"\xef\xbb\xbf" + json.dumps(dict(cells=[])).encode(), "begins with a byte-order mark"),
    bare=(dict(cells=[CELL, {k: v for k, v in CELL.items() if k != "source"}]), "has no source in cell 2"),
    old=(dict(nbformat=3, nbformat_minor=0, metadata={}, worksheets=[dict(cells=[])]), "has format 3"),
    julia=(dict(cells=[CELL], metadata=dict(kernelspec=dict(name="j", language="julia"))), "is written in julia"),
    r=(dict(cells=[CELL], metadata=dict(language_info=dict(name="R"))), "is written in R"),
    torn=(b'{"cells": [', "is no notebook"), list=(b"[1]", "is no notebook"))

@pytest.mark.parametrize("kind", ODD)
def test_an_odd_notebook_is_told_in_one_line(kind, tmp_path):
    content, said = ODD[kind]
    path = tmp_path/"odd.ipynb"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(KitError) as e: plan([("odd", path)], "smoke", [0])
    assert str(e.value).startswith(f"{path} {said}") and "\n" not in str(e.value)

@pytest.mark.parametrize("name", ["python", "ipython", "Python 3"])
def test_python_by_any_name_is_read(name, tmp_path):
    path = tmp_path/"n.ipynb"
    path.write_text(json.dumps(dict(cells=[CELL], metadata=dict(language_info=dict(name=name)))), encoding="utf-8")
    assert read(path)["cells"]

SURROGATES = "print('\\ud800 kept')", "{'a': '\\udc80'}", "raise ValueError('why \\ud800')"

def test_output_that_no_file_can_hold_loses_nothing(tiny, tmp_path):
    [r] = execute(plan([("t", tiny("t", *SURROGATES))], "smoke", [0]), tmp_path/"r")
    assert r["status"] == "error" and r["error"].endswith("ValueError: why ?")
    told = json.dumps(read(tmp_path/"r"/r["notebook"])["cells"])
    assert "? kept" in told and "why ?" in told

def test_a_run_folder_may_be_named_from_where_one_stands(tmp_path):
    write_notebook(tmp_path/"tiny.ipynb", "print(1)")
    fine(slmkit("run", "tiny.ipynb", "--seeds", "0", "--out", "mine", cwd=tmp_path))
    assert len(list(tmp_path.glob("mine/tiny*/notebook.ipynb"))) == 1

# ---- machines

@pytest.mark.parametrize("home", ["home", "file/missing"])
def test_a_home_that_cannot_be_written_is_not_needed(home, tmp_path):
    "IPython's own folder is a temporary one, and nothing of it stays."
    where = str(tmp_path/home)
    (tmp_path/"home").mkdir()
    (tmp_path/"file").write_text("", encoding="utf-8")  # below it no folder can be made, by nobody
    temp = tempfile.mkdtemp()  # a short path: sockets lie in it
    path = write_notebook(tmp_path/"tiny.ipynb", "print(1)")
    fine(slmkit("run", path, "--seeds", "0", "--out", tmp_path/"r", HOME=where, TMPDIR=temp))
    assert not (tmp_path/"home/.ipython").exists() and not list(Path(temp).glob("slmkit-*"))
    [made] = (tmp_path/"r").glob("*/notebook.ipynb")
    assert ["".join(o["text"]) for c in read(made)["cells"] for o in c["outputs"]] == ["1\n"]

@pytest.mark.parametrize("words", ["verdicts --csv", "field --json", "--help"])
def test_a_pipe_that_closes_ends_it_quietly(words):
    command = f"{sys.executable} -c '{MAIN}' {words} | true"
    done = subprocess.run(command, shell=True, capture_output=True, encoding="utf-8", cwd=ROOT)
    assert done.stderr == ""

@pytest.mark.parametrize("level", "12")
def test_python_without_assertions_is_refused(level, tmp_path):
    done = slmkit("run", "step_by_step", "--out", tmp_path/"r", PYTHONOPTIMIZE=level)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "unset PYTHONOPTIMIZE" in done.stderr
    assert not (tmp_path/"r").exists()

READ_ONLY = """
import builtins, errno, os
from pathlib import Path
def refuse(self, *a, **k): raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
Path.write_bytes = refuse
"""

def test_a_clone_that_cannot_be_written_gets_a_sentence(clone):
    (clone/"nbs/sidebar.yml").unlink(missing_ok=True)
    done = python(READ_ONLY + MAIN, "sync", cwd=clone)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "Read-only file system: work in a copy that you may write to" in done.stderr

# ---- what no run could use, before any is started

def refused(name, **places):
    "The one line that a plan of the technique ends with, and that it came within a second of processor."
    wanted, begun = chosen([name], root=ROOT)[:1], time.process_time()
    with pytest.raises(KitError) as e: plan(wanted, "cpu", [0], **places)
    assert time.process_time() - begun < 1 and "\n" not in str(e.value)
    return str(e.value)

@pytest.fixture
def brought(tmp_path):
    "A folder with a file of rows whose columns have other names, and one that lacks a cell."
    rows = "".join(f"how many are {i} ?,{i}\n" for i in range(60))
    (tmp_path/"mine.csv").write_text("question,answer\n" + rows, encoding="utf-8")
    (tmp_path/"gap.csv").write_text("input,label\n" + rows + "and now ?,\n", encoding="utf-8")
    return tmp_path

def test_unknown_data_are_told_whole():
    said = refused("step_by_step", data="entailmnt")
    assert said.startswith("no data 'entailmnt': did you mean 'entailment'?")
    assert all(s in refused("step_by_step", data="qqqq") for s in ("arithmetic", "word_problems", "xquad", ".parquet"))
    assert refused("merging", data="topics+sentimen").startswith("no data 'sentimen': did you mean 'sentiment'?")
    assert refused("step_by_step", data="./no.csv") == "data: no file ./no.csv: check the path"

def test_a_set_that_is_not_here_is_told(monkeypatch):
    monkeypatch.delenv("SLMKIT_DATA", raising=False)
    assert "SLMKIT_DATA is not set" in refused("step_by_step", data="esnli")

def test_a_missing_column_or_cell_is_told_with_its_file(brought):
    said = refused("step_by_step", data=str(brought/"mine.csv"))
    assert said.startswith(f"{brought}/mine.csv: no column 'input' for input") and "--columns input=NAME" in said
    said = refused("step_by_step", data=str(brought/"mine.csv"), columns="input=question,label=anser")
    assert "no column 'anser' for label: did you mean 'answer'?" in said
    assert "gap.csv: line 62: column 'label' is missing" in refused("judge/conformal", data=str(brought/"gap.csv"))
    assert "is a folder" in refused("judge/conformal", data=str(brought))

@pytest.mark.parametrize("name, model, told", [
    ("step_by_step", "t5-1n", "no model 't5-1n': did you mean 't5-1m'?"),
    ("step_by_step", "lm-1m", "which is no seq2seq model: in the zoo t5-1m is one"),
    ("adapt/low_rank", "t5-1m", "which is no causal model: in the zoo lm-1m is one"),
    ("attention_relations", "lm-1m", "which is no masked model: in the zoo bert-1m is one")])
def test_an_unfit_model_is_told(name, model, told): assert told in refused(name, model=model)

def test_an_architecture_that_a_technique_cannot_do_is_told(tmp_path):
    from slmkit.core.zoo import zoo_folder
    made = tmp_path/"mine"
    shutil.copytree(zoo_folder()/"lm-1m", made)
    config = json.loads((made/"config.json").read_text(encoding="utf-8"))
    (made/"config.json").write_text(json.dumps(config | dict(model_type="mistral")), encoding="utf-8")
    assert "kv_cache can't work on a mistral" in refused("kv_cache", model=str(made))

def test_others_run_where_a_model_fits_some(tmp_path):
    runs = plan(chosen(["ladder_side", "step_by_step"], root=ROOT), "smoke", [0], model="lm-1m")
    assert {r["technique"] for r in runs} >= {"distill/step_by_step"} and len(runs) > 1

@pytest.mark.parametrize("comment, value, fits", [
    ("in (0, 1]", "3", False), ("in (0, 1]", "0", False), ("in (0, 1]", "1", True), ("[1, 100000]", "0", False),
    ("[1, 100000]", "100000", True), ("[-1, 1)", "1", False), ("[-1, 1)", "-1", True), ("[0, inf)", "nan", False),
    ("no range", "7", True), ("[0, 1]; 0.5: the profile's choice", "0.5", True), ("(1, 2); .5 chooses", "0.5", True)])
def test_a_parameter_keeps_to_its_documented_range(comment, value, fits, tmp_path):
    known = 'profile = "smoke"\nseed = 0\nrate = 0.5  # ' + comment
    wanted = [("t", write_notebook(tmp_path/"t.ipynb", parameters=known))]
    for how in (dict(given=dict(rate=value)), dict(sweeps=dict(rate=f"0.5,{value}"))):
        if fits: assert plan(wanted, "smoke", [0], **how)
        else:
            with pytest.raises(KitError, match=r"parameter rate=\S+ is outside of [\[(].*, which the notebook"):
                plan(wanted, "smoke", [0], **how)

def test_paths_are_alike_by_whichever_option(brought, monkeypatch):
    monkeypatch.chdir(brought)
    monkeypatch.setenv("HOME", str(brought))
    known = 'profile = "smoke"\nseed = 0\nmodel = ""\ndata = ""\ncolumns = ""\nother = ""'
    wanted = [("t", write_notebook(brought/"nbs/t.ipynb", "cfg.columns", parameters=known))]
    columns = dict(columns="input=question,label=answer")
    for path in ("mine.csv", "./mine.csv", "~/mine.csv", "nbs/../mine.csv", str(brought/"mine.csv")):
        hows = [dict(data=path, **columns), dict(given=dict(data=path, **columns)),
                dict(given=columns, sweeps=dict(data=path)), dict(given=dict(other=path))]
        found = [(r["data"], r["parameters"]["other"]) for how in hows for r in plan(wanted, "smoke", [0], **how)]
        assert {str(brought/"mine.csv")} == {x or y for x, y in found}
    [r] = plan(wanted, "smoke", [0], given=dict(other="nbs"))
    assert r["parameters"]["other"] == "nbs"  # a word may be the name of a folder here

@pytest.mark.parametrize("where", ["there", "./there", "~/there"])
def test_the_folder_of_data_may_be_relative(where, tmp_path):
    code = "from slmkit.cli import main as m; m.ready(); from slmkit.core.sets import data_folder; print(data_folder())"
    done = python(code, HOME=str(tmp_path), SLMKIT_DATA=where, cwd=tmp_path)
    assert done.stdout.strip() == str(tmp_path/"there"), done.stderr

LONG = "raise ValueError('" + "a long reason, "*12 + "and its end')"

def test_an_error_is_told_whole_and_once(tmp_path):
    path = write_notebook(tmp_path/"t.ipynb", LONG)
    for quiet in ([], ["--quiet"]):
        folder = tmp_path/f"r{len(quiet)}"
        done = slmkit("run", path, "--seeds", "0-2", "--out", folder, "-j", "1", *quiet)
        [line] = done.stderr.splitlines()
        assert done.returncode == 1 and line.endswith("and its end") and "its end" not in done.stdout
        assert re.split("  +", line)[:3] == ["t", "seeds 0, 1, 2", "error"]
    assert slmkit("status", folder).stdout.count("and its end") == 1

def test_at_a_terminal_the_first_of_equal_errors_is_told_at_once():
    console = Console("rich")
    console.bar = SimpleNamespace(console=SimpleNamespace(is_terminal=True))
    record = dict(status="error", error="why "*60 + "[end]", seconds=1., notebook="n", technique="t", seed=0)
    lines = [console.line(dict(technique="t", seed=0, parameters={}), record) for _ in range(2)]
    assert lines[0].endswith("why \\[end]") and lines[1].endswith("as before")
    assert "why" not in table([record], "runs", console.told) and "why" in table([record], "runs")

# ---- the papers at the door

def words_of(text): return [c.split("#")[0].split() for c in re.findall(r"(?:^|`)(slmkit [^`\n]+)", text, re.M)]

@pytest.mark.parametrize("name", [".github/CONTRIBUTING.md", "CHANGELOG.md"])
def test_what_a_page_at_the_door_names_is_there(name):
    "Commands that the command line has, and files that the clone has."
    text, known = (ROOT/name).read_text(encoding="utf-8"), typer.main.get_command(build()).commands
    for _, verb, *more in words_of(text):
        if verb.startswith("--"): continue
        assert verb in known, verb
        if hasattr(known[verb], "commands") and more: assert more[0] in known[verb].commands, (verb, more)
    paths = re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r"(tests/\w+\.py)", text)
    assert all((ROOT/name).parent.joinpath(p).exists() or (ROOT/p).exists() for p in paths)
    assert all(len(line) <= 140 for line in text.splitlines())

def test_the_changelog_has_the_version_of_the_package():
    from slmkit import __version__
    assert f"\n## {__version__}" in (ROOT/"CHANGELOG.md").read_text(encoding="utf-8")

WORK = "distilling-step-by-step"

def test_a_work_is_cited(capsys):
    with pytest.raises(SystemExit): main(["cite", WORK])
    said = capsys.readouterr().out
    assert said.startswith("Distilling Step-by-Step!") and "Hsieh, Li" in said and "(2023)" in said
    assert "https://arxiv.org/abs/2305.02301" in said
    with pytest.raises(SystemExit): main(["cite", WORK, "nola", "--bibtex"])
    first, second = capsys.readouterr().out.split("\n@")
    assert first.startswith(f"@misc{{{WORK},\n  title = {{{{Distilling Step-by-Step! Outperforming")
    assert "author = {Hsieh and Li and" in first and "year = {2023}" in first and "eprint = {2305.02301}" in first
    assert second.startswith("misc{nola,")
    with pytest.raises(SystemExit) as e: main(["cite", "nolla"])
    assert e.value.code == 2 and "did you mean 'nola'?" in capsys.readouterr().err

def test_every_work_makes_an_entry():
    "Braces are balanced, no sign of TeX stands bare, keys are unique, and an open list of authors says so."
    works = registry()
    for w in works:
        text = bibtex(w)
        assert text.count("{") == text.count("}") and text.endswith("\n}")
        body = "".join(re.findall(r"^  (?!url).*", text, re.M))
        assert not re.search(r"(?<!\\)[&%#$]", body), text
        assert (" and others}" in text) == bool(w["more"]) and ("arXiv" in text) == bool(w["arxiv"])
    assert len({w["slug"] for w in works}) == len(works)

def test_verdicts_by_seed_give_back_their_means(capsys):
    with pytest.raises(SystemExit): main(["verdicts", "adapt/merging", "--csv", "--seeds"])
    seeds = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    with pytest.raises(SystemExit): main(["verdicts", "adapt/merging", "--json"])
    rows = [r for r in json.loads(capsys.readouterr().out) if r["n"]]
    assert len(rows) > 2 and len(seeds) == sum(r["n"] for r in rows) and {int(s["seed"]) for s in seeds} >= {100, 109}
    for r in rows:
        mine = [s for s in seeds if (s["claim"], s["model"], s["data"]) == (r["claim"], r["model"], r["data"])]
        mean = sum(float(s["value"]) for s in mine)/len(mine)
        assert len(mine) == r["n"] and (r["kind"] == "cost" or mean == pytest.approx(r["mean"], abs=1e-9))
    with pytest.raises(SystemExit) as e: main(["verdicts", "--seeds"])
    assert e.value.code == 2
