"""Submissions that attack the grader. All are graded in one call beside honest ones; each test then reads its own result.

None may crash the grader, raise its own grade, change another's, learn a secret, or outlive its limits."""
import json, socket, sys, threading, time
from pathlib import Path
import pytest
if sys.platform != "linux": pytest.skip("grading strangers' code needs Linux", allow_module_level=True)
import psutil
from slmkit.lab import grade
from slmkit.lab import sandbox
from slmkit.lab import lab as labs

HERE = Path(__file__).parent / "fixtures"
SEED = "sesame-opens-nothing"

def running(uids, patience=3.):
    "Processes of these users that still run after a moment; a dead one that nobody has waited for yet runs no more."
    def left(): return [p.info for p in psutil.process_iter(["pid", "uids", "status", "cmdline"]) if p.info["uids"]
                        and p.info["uids"].real in uids and p.info["status"] not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)]
    end = time.time() + patience
    while left() and time.time() < end: time.sleep(.1)
    return left()
RIGHT = "len(source.splitlines())"

def attack(body, top=""):
    "Source of a submission whose function runs `body` first."
    lines = "\n".join("    " + l for l in body.splitlines())
    return f"{top}\ndef code_lines(source):\n{lines}\n    return {RIGHT}\n"

# name -> (source, points it may get, what the student is told)
ATTACKS = {
    "endless_loop": (attack("while True: pass"), 0, "longer than 2 seconds"),
    "sleeps": (attack("import time; time.sleep(60)"), 0, "longer than 2 seconds"),
    "fork_bomb": (attack("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"), 0, None),
    "leaves_a_daemon": (attack("import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(120)\n    os._exit(0)"), 2, None),
    "allocates_100_gb": (attack("x = [np.ones(10**8) for _ in range(125)]", "import numpy as np"), 0, "more than 300 MB"),
    "writes_10_gb": (attack("with open('big', 'wb') as f:\n    for _ in range(10_000): f.write(bytes(1 << 20))"), 0, "File too large"),
    "fills_the_box": (attack("for i in range(20):\n    with open(f'f{i}', 'wb') as f: f.write(bytes(15 << 20))"), 0, None),
    "os_exit": (attack("import os; os._exit(0)"), 0, "ended the whole process"),
    "sys_exit": (attack("import sys; sys.exit(0)"), 0, "SystemExit"),
    "segfault": (attack("import ctypes; ctypes.string_at(0)"), 0, "ended the whole process"),
    "kills_everything": (attack("import os, signal\nos.kill(-1, signal.SIGKILL)"), None, None),
    "kills_its_parent": (attack("import os, signal\nfor p in (os.getppid(), os.getpgid(0)):\n    if p > 1: os.kill(p, signal.SIGKILL)"), None, None),
    "recursion": (attack("return code_lines(source)"), 0, "RecursionError"),
    "patched_tools": (attack("import builtins, json, numpy as np, numpy.testing as t, torch\nyes = lambda *a, **k: True\n"
        "for m in (np, t, torch):\n    for n in ('allclose', 'isclose', 'assert_allclose', 'array_equal', 'equal'):\n"
        "        if hasattr(m, n): setattr(m, n, yes)\nbuiltins.AssertionError = SystemExit\nreturn 0"), 0, "is expected, not 0"),
    "equal_to_all": (attack("class Any(int):\n    def __eq__(self, other): return True\nreturn Any(0)"), 0, "Any"),
    "own_by_import": (attack("from slmkit.project.sync import code_lines as own; return own(source)"), 0, "slmkit's own"),
    "own_at_top": (attack("return own.code_lines(source)", "import slmkit.project.sync as own"), 0, "slmkit's own"),
    "own_reloaded": (attack("import sys, importlib\nsys.modules.pop('slmkit.project.sync', 0)\nm = importlib.import_module('slmkit.project.sync')\n"
                            "return m.code_lines(source)"), 0, None),
    "own_by_runpy": (attack("import runpy; return runpy.run_module('slmkit.project.sync')['code_lines'](source)"), 0, None),
    "own_from_file": (attack("import slmkit, os\np = os.path.join(slmkit.__path__[0], 'kit', 'sync.py')\ntext = open(p).read()\n"
                             "raise RuntimeError('read:' + text[:400])"), 0, None),
    "prints_1_gb": (attack("import sys\nfor _ in range(1000): sys.stdout.write('x' * 10**6)"), 2, None),
    "prints_past_python": (attack("import os\nfor _ in range(200): os.write(1, b'x' * 10**6)"), 2, None),
    "escape_codes": (attack("raise ValueError('\\x1b[2J<script>alert(1)</script>')"), 0, "<script>"),
    "long_error": (attack("raise ValueError('x' * 10**7)"), 0, "xxx"),
    "evil_error": (attack("class E(Exception):\n    def __str__(self): raise E()\nraise E()"), 0, "E"),
    "huge_answer": (attack("return np.ones(2 * 10**7)", "import numpy as np"), 0, "too large"),
    "deep_answer": (attack("x = []\nfor _ in range(10**5): x = [x]\nreturn x"), 0, "RecursionError"),
    "no_answer_at_all": (attack("return None"), 0, "numbers are expected, not None"),
    "function_twice": ("def code_lines(source): return 0\n" + attack("pass"), 2, None),
    "the_wrong_one_last": (attack("pass") + "\ndef code_lines(source): return 0\n", 0, "is expected, not 0"),
    "no_such_function": ("def codelines(source): return 1\n", 0, "no function called code_lines"),
    "decorated": (f"import functools\ndef deco(f): raise SystemExit(0)\n@deco\ndef code_lines(source): return {RIGHT}\n", 0, None),
    "raw_messages": (attack("import socket, struct, json\ns = socket.socket(fileno=40)\nfor m in ({'value': {'array': '', 'raw': '|O', 'dtype': 'float64', "
        "'shape': [10**15]}}, {'value': {'array': 'AAAA', 'raw': '<f8', 'dtype': [], 'shape': 'x'}}):\n    d = json.dumps(m).encode()\n"
        "    s.sendall(struct.pack('!Q', len(d)) + d)\nimport time; time.sleep(9)"), 0, None),
    "giant_header": (attack("import socket, struct\ns = socket.socket(fileno=40)\ns.sendall(struct.pack('!Q', 1 << 60) + b'x')\nimport time; time.sleep(9)"), 0, None),
    "nested_message": (attack("import socket, struct\ns = socket.socket(fileno=40)\nd = b'[' * 10**6\ns.sendall(struct.pack('!Q', len(d)) + d)\n"
                              "import time; time.sleep(9)"), 0, None),
}

def reading(target):
    "Source of a submission that tells in its error what it could learn about paths, environment, memory and the grader."
    return attack(f"""import os, gc, sys, glob
found = dict(os.environ)
for p in [{str(target)!r}, {str(HERE / 'lab_attack.ipynb')!r}, '/etc/passwd', '/proc/1/environ', *glob.glob('/proc/[0-9]*/cmdline')]:
    try: found[p] = open(p).read()[:3000]
    except OSError: pass
f = sys._getframe()
while f: found[f.f_code.co_name] = repr(f.f_locals)[:20000]; f = f.f_back
found['gc'] = [str(o)[:300] for o in gc.get_objects() if isinstance(o, (dict, list)) and 'ses' + 'ame' in str(o)[:3000]][:5]
found = repr(found)
raise RuntimeError('LEAK' if 'ses' + 'ame-' in found or 'numpy.random' in found and 'mutants' in found else 'nothing found')""")

def notebook(sources, **more):
    cells = [dict(cell_type="code", metadata={}, source=s, outputs=[], execution_count=None) for s in sources]
    return json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=4) | more)

HONEST = attack("pass")
SHAPES = {  # files that are odd but honest, and files that are none
    "colab": (notebook([HONEST, "!pip install x\n%matplotlib inline\ncode_lines?"], metadata=dict(colab=dict(provenance=[]), accelerator="GPU")), 2),
    "vscode": (notebook(["%%time\n" + HONEST], metadata={"vscode": {"interpreter": {"hash": "ab"}}}), 2),
    "nbformat_3": (json.dumps(dict(nbformat=3, metadata=dict(name=""), worksheets=[dict(cells=[
        dict(cell_type="code", input=HONEST.splitlines(True), outputs=[], language="python")])])), 2),
    "byte_order_mark": ("\ufeff" + notebook([HONEST]), 2),
    "syntax_error_elsewhere": (notebook(["def f(:\n", HONEST, "print('x'"]), 2),
    "no_metadata": (json.dumps(dict(cells=[dict(cell_type="code", source=HONEST)])), 2),
    "not_json": ("this is no notebook", 0),
    "empty": ("", 0),
    "no_cells": ('{"cells": []}', 0),
    "wrong_types": ('{"cells": [1, {"cell_type": "code", "source": 5}, {"cell_type": "code"}], "worksheets": 3}', 0),
    "deep_json": ("[" * 200_000, 0),
    "deep_source": (notebook(["x = " + "(" * 5000 + ")" * 5000, "-" * 50_000 + "1"]), 0),
    "null_bytes": (notebook(["x = 1\0", HONEST]), 2),
}

@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    "Everything graded once, honest submissions in between; gives results by name and the seconds it took."
    folder = tmp_path_factory.mktemp("attacks")
    secret = folder / "secret.txt"; secret.write_text(SEED + "-in-a-file")
    server = socket.create_server(("127.0.0.1", 0)); seen = []
    def listen():
        try: seen.append(server.accept()[1])
        except OSError: pass
    threading.Thread(target=listen, daemon=True).start()
    port = server.getsockname()[1]
    calls = attack(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1).send(b'x')\nreturn 0")
    outside = folder / "written"
    writes = attack(f"ok = []\nfor p in [{str(outside)!r}, '/etc/written', '/tmp/written-by-a-student', '/usr/written']:\n"
                    "    try: open(p, 'w').write('x'); ok.append(p)\n    except OSError: pass\nif ok: raise RuntimeError('wrote ' + str(ok))")
    itself = attack(f"import os\ntry: os.remove({str(folder / 'deletes_itself.ipynb')!r})\nexcept OSError: pass")
    all_ = {k: notebook([v[0]]) for k, v in ATTACKS.items()} | {k: v[0] for k, v in SHAPES.items()}
    all_ |= dict(reads=notebook([reading(secret)]), network=notebook([calls]), writes=notebook([writes]), deletes_itself=notebook([itself]))
    for i, (name, text) in enumerate(list(all_.items())):
        if i % 6 == 0: all_[f"honest_{i}"] = notebook([HONEST])
    paths = []
    for name, text in sorted(all_.items(), key=lambda p: hash_order(p[0])):
        paths.append(folder / f"{name}.ipynb"); paths[-1].write_text(text)
    lab, start = labs.read(HERE / "lab_attack.ipynb"), time.monotonic()
    with sandbox.Nursery(["numpy", "torch"]) as nursery:
        plan = nursery.plan
        if not (plan["root"] or plan["jail"]): pytest.skip("this machine separates neither user nor files: attacks not run here")
        results = grade.grade(paths, lab, SEED, nursery, jobs=2)
        left = running(range(nursery.uid, nursery.uid + 2)) if plan["root"] else []
    server.close()
    by_name = {p.stem: r for p, r in zip(paths, results)}
    return dict(results=by_name, seconds=time.monotonic() - start, plan=plan, left=left, seen=seen, outside=outside, folder=folder, lab=lab)

def hash_order(name):
    "A fixed mixed order, so that attacks run beside honest submissions."
    import hashlib
    return hashlib.sha256(name.encode()).hexdigest()

def problem(graded, name): return graded["results"][name]["exercises"][0]["problem"] or ""

@pytest.mark.parametrize("name", ATTACKS)
def test_attack_gains_nothing(graded, name):
    _, points, told = ATTACKS[name]
    result = graded["results"][name]
    assert "broken" not in result, result.get("broken")
    if points is not None: assert result["points"] == points, problem(graded, name)
    if told: assert told in problem(graded, name)
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
    if not graded["plan"]["jail"]: pytest.skip("this machine gives no jail")
    assert problem(graded, "reads").startswith("RuntimeError: nothing found")

def test_no_secret_in_any_result(graded):
    text = json.dumps(graded["results"])
    assert "sesame" not in text and "read:\\\"\\\"\\\"" not in text

def test_own_source_is_hidden(graded):
    if not graded["plan"]["jail"]: pytest.skip("this machine gives no jail")
    assert "def code_lines" not in problem(graded, "own_from_file") and "sync" not in problem(graded, "own_from_file")

def test_network_is_cut(graded):
    if "network" not in graded["plan"]["kinds"]: pytest.skip("this machine gives no network of its own")
    assert graded["seen"] == [] and "OSError" in problem(graded, "network") or "Connection" in problem(graded, "network")

def test_writes_nothing_outside(graded):
    assert graded["results"]["writes"]["points"] == 2, problem(graded, "writes")
    assert not graded["outside"].exists() and not Path("/tmp/written-by-a-student").exists()

def test_its_notebook_stays(graded):
    assert (graded["folder"] / "deletes_itself.ipynb").exists() and graded["results"]["deletes_itself"]["points"] == 2

def test_memory_and_files_were_small(graded):
    peaks = {k: r["exercises"][0]["peak_mb"] for k, r in graded["results"].items()}
    assert max(peaks.values()) < 2000, peaks

def test_slmkits_own_answer_would_be_right_if_it_could_be_called(graded, monkeypatch):
    "The control of the own_* attacks: with neither poison nor hidden files they would earn everything."
    monkeypatch.setattr(grade, "own_files", lambda lab: [])
    loading = grade.loading
    monkeypatch.setattr(grade, "loading", lambda *a: loading(*a) | dict(poison=[]))
    lab = graded["lab"]
    with sandbox.Nursery(["numpy"]) as nursery:
        got = [grade.grade_bytes(nursery, lab, grade.all_cases(lab, SEED), notebook([ATTACKS[k][0]]).encode())["points"]
               for k in ("own_by_import", "own_at_top", "own_reloaded", "own_by_runpy")]
    assert got == [2, 2, 2, 2]

@pytest.mark.parametrize("without", [("processes",), ("files", "ipc", "network", "processes")])
def test_limits_hold_without_worlds(graded, without):
    "The fall-backs of machines that give no namespaces: limits, own user id and killing by user."
    if not graded["plan"]["root"]: pytest.skip("needs root")
    names = ["endless_loop", "fork_bomb", "leaves_a_daemon", "allocates_100_gb", "os_exit"]
    lab = graded["lab"]
    with sandbox.Nursery(["numpy"], without=without) as nursery:
        assert not set(without) & set(nursery.plan["kinds"])
        paths = [graded["folder"] / f"{n}.ipynb" for n in [*names, "honest_0"]]
        got = {p.stem: r["points"] for p, r in zip(paths, grade.grade(paths, lab, SEED, nursery, jobs=1))}
        left = running([nursery.uid])
    assert left == [] and got["honest_0"] == 2 and [got[n] for n in names if n != "leaves_a_daemon"] == [0, 0, 0, 0]

def test_a_machine_without_worlds_says_so():
    weak = dict(root=False, kinds=[], jail=False)
    good, bad = sandbox.isolation(weak)
    assert not any(g.startswith(("user", "files", "network", "processes")) for g in good)
    assert {b.split(":")[0] for b in bad} == {"user", "files", "network", "processes", "kernel"}
