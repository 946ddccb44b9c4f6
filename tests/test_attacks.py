"""Submissions that attack the grader. All are graded in one call beside honest ones; each test reads its own result.

None may crash the grader, raise its own grade, change another's, learn a secret, or outlive its limits."""
import hashlib, json, socket, sys, threading, time
from pathlib import Path
import pytest
if sys.platform != "linux": pytest.skip("grading strangers' code needs Linux", allow_module_level=True)
import psutil
import slmkit
from slmkit.lab import grade, sandbox
from slmkit.lab import lab as labs

HERE = Path(__file__).parent / "fixtures"
SEED = "sesame-opens-nothing"
OWN = "slmkit.project.check"  # the module of the fixture: it has a right function of the name that is graded
OVER = psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD  # a dead process that nobody has waited for yet runs no more

def running(uids, patience=3.):
    "Processes of these users that still run after a moment."
    asked = ["pid", "uids", "status", "cmdline"]
    def left():
        found = [p.info for p in psutil.process_iter(asked)]
        return [i for i in found if i["uids"] and i["uids"].real in uids and i["status"] not in OVER]
    end = time.time() + patience
    while left() and time.time() < end: time.sleep(.1)
    return left()

RIGHT = "len(source.splitlines())"

def attack(body, top=""):
    "Source of a submission whose function runs `body` first."
    lines = "\n".join("    " + l for l in body.splitlines())
    return f"{top}\ndef code_lines(source):\n{lines}\n    return {RIGHT}\n"

def told(body, top=""):
    "An attack that sends messages of its own to the grader, then waits."
    return attack(f"import socket, struct, json, time\ns = socket.socket(fileno=40)\n{body}\ntime.sleep(9)", top)

DAEMON = """import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(120)
    os._exit(0)"""
KILLS_PARENT = """import os, signal
for p in (os.getppid(), os.getpgid(0)):
    if p > 1: os.kill(p, signal.SIGKILL)"""
PATCHED = """import builtins, json, numpy as np, numpy.testing as t, torch
yes = lambda *a, **k: True
for m in (np, t, torch):
    for n in ('allclose', 'isclose', 'assert_allclose', 'array_equal', 'equal'):
        if hasattr(m, n): setattr(m, n, yes)
builtins.AssertionError = SystemExit
return 0"""
RELOADED = f"""import sys, importlib
sys.modules.pop('{OWN}', 0)
m = importlib.import_module('{OWN}')
return m.code_lines(source)"""
FROM_FILE = """import slmkit, os
p = os.path.join(slmkit.__path__[0], 'project', 'check.py')
text = open(p).read()
raise RuntimeError('read:' + text[:400])"""
FORGED = """for m in ({'value': {'array': '', 'raw': '|O', 'dtype': 'float64', 'shape': [10**15]}},
          {'value': {'array': 'AAAA', 'raw': '<f8', 'dtype': [], 'shape': 'x'}}):
    d = json.dumps(m).encode()
    s.sendall(struct.pack('!Q', len(d)) + d)"""
FORKS = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
ALLOCATES = "x = [np.ones(10**8) for _ in range(125)]"
WRITES = "with open('big', 'wb') as f:\n    for _ in range(10_000): f.write(bytes(1 << 20))"
FILLS = "for i in range(20):\n    with open(f'f{i}', 'wb') as f: f.write(bytes(15 << 20))"
DECORATED = f"import functools\ndef deco(f): raise SystemExit(0)\n@deco\ndef code_lines(source): return {RIGHT}\n"
EQUAL = "class Any(int):\n    def __eq__(self, other): return True\nreturn Any(0)"
EVIL = "class E(Exception):\n    def __str__(self): raise E()\nraise E()"

# name -> (source, points it may get, what the student is told)
ATTACKS = {
    "endless_loop": (attack("while True: pass"), 0, "longer than 2 seconds"),
    "sleeps": (attack("import time; time.sleep(60)"), 0, "longer than 2 seconds"),
    "fork_bomb": (attack(FORKS), 0, None),
    "leaves_a_daemon": (attack(DAEMON), 2, None),
    "allocates_100_gb": (attack(ALLOCATES, "import numpy as np"), 0, "more than 200 MB"),
    "writes_10_gb": (attack(WRITES), 0, "File too large"),
    "fills_the_box": (attack(FILLS), 0, None),
    "os_exit": (attack("import os; os._exit(0)"), 0, "ended the whole process"),
    "exits_as_a_broken_sandbox": (attack("import os; os._exit(70)"), 0, "ended the whole process"),
    "sys_exit": (attack("import sys; sys.exit(0)"), 0, "SystemExit"),
    "segfault": (attack("import ctypes; ctypes.string_at(0)"), 0, "ended the whole process"),
    "kills_everything": (attack("import os, signal\nos.kill(-1, signal.SIGKILL)"), None, None),
    "kills_its_parent": (attack(KILLS_PARENT), None, None),
    "recursion": (attack("return code_lines(source)"), 0, "RecursionError"),
    "patched_tools": (attack(PATCHED), 0, "is expected, not 0"),
    "equal_to_all": (attack(EQUAL), 0, "Any"),
    "own_by_import": (attack(f"from {OWN} import code_lines as own; return own(source)"), 0, "slmkit's own"),
    "own_at_top": (attack("return own.code_lines(source)", f"import {OWN} as own"), 0, "slmkit's own"),
    "own_reloaded": (attack(RELOADED), 0, None),
    "own_by_runpy": (attack(f"import runpy; return runpy.run_module('{OWN}')['code_lines'](source)"), 0, None),
    "own_from_file": (attack(FROM_FILE), 0, None),
    "prints_1_gb": (attack("import sys\nfor _ in range(1000): sys.stdout.write('x' * 10**6)"), 2, None),
    "prints_past_python": (attack("import os\nfor _ in range(200): os.write(1, b'x' * 10**6)"), 2, None),
    "escape_codes": (attack("raise ValueError('\\x1b[2J<script>alert(1)</script>')"), 0, "<script>"),
    "long_error": (attack("raise ValueError('x' * 10**7)"), 0, "xxx"),
    "evil_error": (attack(EVIL), 0, "E"),
    "huge_answer": (attack("return np.ones(2 * 10**7)", "import numpy as np"), 0, "too large"),
    "deep_answer": (attack("x = []\nfor _ in range(10**5): x = [x]\nreturn x"), 0, "RecursionError"),
    "no_answer_at_all": (attack("return None"), 0, "numbers are expected, not None"),
    "function_twice": ("def code_lines(source): return 0\n" + attack("pass"), 2, None),
    "the_wrong_one_last": (attack("pass") + "\ndef code_lines(source): return 0\n", 0, "is expected, not 0"),
    "no_such_function": ("def codelines(source): return 1\n", 0, "no function called code_lines"),
    "decorated": (DECORATED, 0, None),
    "raw_messages": (told(FORGED), 0, None),
    "giant_header": (told("s.sendall(struct.pack('!Q', 1 << 60) + b'x')"), 0, None),
    "nested_message": (told("d = b'[' * 10**6\ns.sendall(struct.pack('!Q', len(d)) + d)"), 0, None),
}

READS = """import os, gc, sys, glob
found = dict(os.environ)
for p in [TARGET, FIXTURE, '/etc/passwd', '/proc/1/environ', *glob.glob('/proc/[0-9]*/cmdline')]:
    try: found[p] = open(p).read()[:3000]
    except OSError: pass
f = sys._getframe()
while f: found[f.f_code.co_name] = repr(f.f_locals)[:20000]; f = f.f_back
word = 'ses' + 'ame'
kept = [str(o) for o in gc.get_objects() if isinstance(o, (dict, list))]
found['gc'] = [t[:300] for t in kept if word in t[:3000]][:5]
found = repr(found)
leak = word + '-' in found or 'numpy.random' in found and 'mutants' in found
raise RuntimeError('LEAK' if leak else 'nothing found')"""
WRITES_OUTSIDE = """ok = []
for p in [OUTSIDE, '/etc/written', '/tmp/written-by-a-student', '/usr/written']:
    try: open(p, 'w').write('x'); ok.append(p)
    except OSError: pass
if ok: raise RuntimeError('wrote ' + str(ok))"""
DELETES = "import os\ntry: os.remove(ITSELF)\nexcept OSError: pass"
CALLS = "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1).send(b'x')\nreturn 0"

def filled(body, **values):
    "An attack with words of its body replaced by values."
    for name, value in values.items(): body = body.replace(name, repr(value))
    return attack(body)

def notebook(sources, **more):
    cells = [dict(cell_type="code", metadata={}, source=s, outputs=[], execution_count=None) for s in sources]
    return json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=4) | more)

HONEST = attack("pass")
COLAB = dict(colab=dict(provenance=[]), accelerator="GPU")
OLD = [dict(cell_type="code", input=HONEST.splitlines(True), outputs=[], language="python")]
DEEP = "x = " + "(" * 5000 + ")" * 5000
ODD = '{"cells": [1, {"cell_type": "code", "source": 5}, {"cell_type": "code"}], "worksheets": 3}'
SHAPES = {  # files that are odd but honest, and files that are none
    "colab": (notebook([HONEST, "!pip install x\n%matplotlib inline\ncode_lines?"], metadata=COLAB), 2),
    "vscode": (notebook(["%%time\n" + HONEST], metadata={"vscode": {"interpreter": {"hash": "ab"}}}), 2),
    "nbformat_3": (json.dumps(dict(nbformat=3, metadata=dict(name=""), worksheets=[dict(cells=OLD)])), 2),
    "byte_order_mark": ("\ufeff" + notebook([HONEST]), 2),
    "syntax_error_elsewhere": (notebook(["def f(:\n", HONEST, "print('x'"]), 2),
    "no_metadata": (json.dumps(dict(cells=[dict(cell_type="code", source=HONEST)])), 2),
    "not_json": ("this is no notebook", 0),
    "empty": ("", 0),
    "no_cells": ('{"cells": []}', 0),
    "wrong_types": (ODD, 0),
    "deep_json": ("[" * 200_000, 0),
    "deep_source": (notebook([DEEP, "-" * 50_000 + "1"]), 0),
    "null_bytes": (notebook(["x = 1\0", HONEST]), 2),
}

def order(name):
    "A fixed mixed order, so that attacks run beside honest submissions."
    return hashlib.sha256(name.encode()).hexdigest()

def everything(folder, port):
    "Every submission by name, an honest one after each six."
    found = {k: notebook([v[0]]) for k, v in ATTACKS.items()} | {k: v[0] for k, v in SHAPES.items()}
    special = dict(reads=filled(READS, TARGET=str(folder / "secret.txt"), FIXTURE=str(HERE / "lab_attack.ipynb")),
                   network=filled(CALLS, PORT=port), writes=filled(WRITES_OUTSIDE, OUTSIDE=str(folder / "written")),
                   deletes_itself=filled(DELETES, ITSELF=str(folder / "deletes_itself.ipynb")))
    found |= {k: notebook([v]) for k, v in special.items()}
    return found | {f"honest_{i}": notebook([HONEST]) for i in range(0, len(found), 6)}

@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    "Everything graded once, honest submissions in between; gives results by name and the seconds it took."
    folder = tmp_path_factory.mktemp("attacks")
    (folder / "secret.txt").write_text(SEED + "-in-a-file", encoding="utf-8")
    server, seen = socket.create_server(("127.0.0.1", 0)), []
    def listen():
        try: seen.append(server.accept()[1])
        except OSError: pass
    threading.Thread(target=listen, daemon=True).start()
    texts = everything(folder, server.getsockname()[1])
    paths = [folder / f"{name}.ipynb" for name in sorted(texts, key=order)]
    for p in paths: p.write_text(texts[p.stem], encoding="utf-8")
    lab, start = labs.read(HERE / "lab_attack.ipynb"), time.monotonic()
    with sandbox.Sandbox(["numpy", "torch"]) as box:
        given = box.given
        if not (given["root"] or given["jail"]): pytest.skip("this machine separates neither user nor files")
        results = grade.grade(paths, lab, SEED, box, jobs=2)
        left = running(range(box.uid, box.uid + 2)) if given["root"] else []
    server.close()
    return dict(results={p.stem: r for p, r in zip(paths, results)}, seconds=time.monotonic() - start, given=given,
                left=left, seen=seen, folder=folder, lab=lab)

def problem(graded, name): return graded["results"][name]["exercises"][0]["problem"] or ""

@pytest.mark.parametrize("name", ATTACKS)
def test_attack_gains_nothing(graded, name):
    _, points, said = ATTACKS[name]
    result = graded["results"][name]
    assert "ungraded" not in result, result.get("ungraded")
    if points is not None: assert result["points"] == points, problem(graded, name)
    if said: assert said in problem(graded, name)
    assert len(json.dumps(result)) < 20_000
    assert result["exercises"][0]["seconds"] < 12  # its limit is far below; a busy machine adds to it

@pytest.mark.parametrize("name", SHAPES)
def test_odd_files(graded, name):
    assert graded["results"][name]["points"] == SHAPES[name][1], problem(graded, name)

def test_honest_neighbours_keep_full_points(graded):
    honest = {k: r["points"] for k, r in graded["results"].items() if k.startswith("honest")}
    assert len(honest) > 5 and set(honest.values()) == {2}

def test_nothing_is_left_running(graded): assert graded["left"] == []

def test_all_of_it_within_limits(graded): assert graded["seconds"] < 60

def test_reads_no_secret(graded):
    if not graded["given"]["jail"]: pytest.skip("this machine gives no jail")
    assert problem(graded, "reads").startswith("RuntimeError: nothing found")

def test_no_secret_in_any_result(graded):
    text = json.dumps(graded["results"])
    assert "sesame" not in text and "read:\\\"\\\"\\\"" not in text

def test_own_source_is_hidden(graded):
    if not graded["given"]["jail"]: pytest.skip("this machine gives no jail")
    assert problem(graded, "own_from_file").startswith("RuntimeError: read:")
    assert "code_lines" not in problem(graded, "own_from_file").partition(" (code cell")[0]

def test_network_is_cut(graded):
    if "network" not in graded["given"]["kinds"]: pytest.skip("this machine gives no network of its own")
    assert graded["seen"] == []
    assert "OSError" in problem(graded, "network") or "Connection" in problem(graded, "network")

def test_writes_nothing_outside(graded):
    assert graded["results"]["writes"]["points"] == 2, problem(graded, "writes")
    assert not (graded["folder"] / "written").exists() and not Path("/tmp/written-by-a-student").exists()

def test_its_notebook_stays(graded):
    assert (graded["folder"] / "deletes_itself.ipynb").exists() and graded["results"]["deletes_itself"]["points"] == 2

def test_memory_and_files_were_small(graded):
    peaks = {k: r["exercises"][0]["peak_mb"] for k, r in graded["results"].items()}
    assert max(peaks.values()) < 2000, peaks

def test_slmkits_own_answer_would_be_right_if_it_could_be_called(graded, monkeypatch):
    "The control of the own_* attacks: with neither an empty module nor hidden files they would earn everything."
    monkeypatch.setattr(grade, "own_files", lambda lab: [])
    first = grade.first_message
    monkeypatch.setattr(grade, "first_message", lambda *a: first(*a) | dict(withheld=[]))
    lab, own = graded["lab"], ("own_by_import", "own_at_top", "own_reloaded", "own_by_runpy")
    with sandbox.Sandbox(["numpy"]) as box:
        drawn = grade.all_cases(lab, SEED)
        got = [grade.grade_bytes(box, lab, drawn, notebook([ATTACKS[k][0]]).encode())["points"] for k in own]
    assert got == [2, 2, 2, 2]

@pytest.mark.parametrize("without", [("processes",), ("files", "ipc", "network", "processes")])
def test_limits_hold_without_namespaces(graded, without):
    "The fall-backs of machines that give no namespaces: limits, own user id and killing by user."
    if not graded["given"]["root"]: pytest.skip("needs root")
    names = ["endless_loop", "fork_bomb", "leaves_a_daemon", "allocates_100_gb", "os_exit"]
    with sandbox.Sandbox(["numpy"], without=without) as box:
        assert not set(without) & set(box.given["kinds"])
        paths = [graded["folder"] / f"{n}.ipynb" for n in [*names, "honest_0"]]
        got = {p.stem: r["points"] for p, r in zip(paths, grade.grade(paths, graded["lab"], SEED, box, jobs=1))}
        left = running([box.uid])
    assert left == [] and got["honest_0"] == 2 and [got[n] for n in names if n != "leaves_a_daemon"] == [0, 0, 0, 0]

def test_a_machine_without_namespaces_says_so():
    good, bad = sandbox.describe(dict(root=False, kinds=[], jail=False))
    assert not any(g.startswith(("user", "files", "network", "processes")) for g in good)
    assert {b.split(":")[0] for b in bad} == {"user", "files", "network", "processes", "kernel"}

def test_children_run_the_slmkit_that_is_in_use(graded):
    "Whatever else is installed: another copy's solutions would not be hidden."
    with sandbox.Sandbox(["numpy"], serve="slmkit.lab.sandbox:echo") as box:
        job = sandbox.Job(box)
        assert job.ask("slmkit.__file__") == repr(slmkit.__file__)
        job.end()
