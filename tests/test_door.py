"What stands at the door: other encodings, odd notebooks and machines, mistakes that are told before anything runs."
import json, os, subprocess, sys, tempfile
from pathlib import Path
import pytest
from conftest import ROOT, code_cell, write_notebook
from slmkit.core.settings import KitError
from slmkit.project.sync import sync
from slmkit.run.batch import execute
from slmkit.run.notebooks import read
from slmkit.run.plan import plan
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
    assert "né ? ×".encode("cp1252").decode("utf-8", "replace") in fine(done, 1)
    [made] = (tmp_path/"r").glob("*/notebook.ipynb")
    assert "a → b · café" in whole_text(made) and "né → ×" in whole_text(made.with_name("record.json"))
    fine(slmkit("report", tmp_path/"r", **foreign))
    assert "né → ×" in whole_text(tmp_path/"r/report.html")

def test_check_and_sync_do_not_need_utf8(clone, foreign):
    module = clone/"slmkit/infer/kv_budget.py"
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

# ---- machines

HOMES = dict(missing="/nowhere/at/all", own=None)

@pytest.mark.parametrize("home", HOMES)
def test_a_home_that_cannot_be_written_is_not_needed(home, tmp_path):
    "IPython's own folder is a temporary one, and nothing of it stays."
    where = HOMES[home] or str(tmp_path/"home")
    (tmp_path/"home").mkdir()
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
