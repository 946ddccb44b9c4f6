"The executor and its fork server: what goes wrong is told apart, and every trap that was met once stays shut."
import multiprocessing, os, signal, subprocess, sys, time, tomllib
import nbformat, psutil, pytest
from conftest import ROOT, run_in, write_notebook
from slmkit.core.settings import KitError
from slmkit.run import executors
from slmkit.run.executors import Local, run_all

code = lambda nb: [c for c in nb.cells if c.cell_type == "code"]
status = lambda nb: [c.metadata.papermill.status for c in code(nb)]
text = lambda nb: "".join(o.get("text", "") for c in code(nb) for o in c.get("outputs", []))

# ---- outputs

def test_same_outputs_as_papermill(tiny, tmp_path, monkeypatch):
    "Text, results, rich display, figures, errors that a tag allows: as papermill's own engine gives them."
    monkeypatch.delenv(
        "MPLBACKEND", raising=False
    )  # a notebook test of this process may have set it for its own kernel
    path = tiny(
        "rich",
        "print('a'); print('b')\n1 + 1",
        "from IPython.display import display, Markdown, HTML\ndisplay(Markdown('*x*'))\nHTML('<b>y</b>')",
        "import sys; print('err', file=sys.stderr)",
        "import matplotlib.pyplot as plt\nplt.plot([1, 2]);",
        "import asyncio\nawait asyncio.sleep(0)\n'after'",
        "%%capture got\nprint('hidden')",
        "got.stdout",
        "!echo shell",
        "h = display('first', display_id=True)",
        "h.update('second')",
        "x = 3; x;",
    )
    made = {}
    for engine in (None, "slmkit"):
        # in a process of its own: this one's matplotlib may have a backend already
        cmd = [
            sys.executable,
            "-m",
            "papermill",
            str(path),
            str(tmp_path / f"{engine}.ipynb"),
            "--no-progress-bar",
            "-k",
            "python3",
        ]
        subprocess.run(cmd + (["--engine", engine] if engine else []), check=True, capture_output=True, timeout=120)
        nb = nbformat.read(tmp_path/f"{engine}.ipynb", 4); nbformat.validate(nb)
        made[engine] = [
            [
                (
                    o.output_type,
                    o.get("name"),
                    o.get("text", "").replace("\r\n", "\n"),
                    sorted(o.get("data", {})),
                    o.get("data", {}).get("text/plain"),
                )
                for o in c.outputs
                if "image/png" not in o.get("data", {})
            ]
            for c in code(nb)
        ]
        assert any("image/png" in o.get("data", {}) for c in code(nb) for o in c.outputs)
    assert made["slmkit"] == made[None]

def test_progress_bar_keeps_last_state(tiny, tmp_path, torch_pool):
    _, nb = run_in(
        torch_pool,
        tiny(
            "bar",
            "import sys, time\nfor i in range(5):\n"
            "    print(f'{i}/5', end='\\r', file=sys.stderr, flush=True)\n    time.sleep(.12)",
        ),
        tmp_path,
    )
    assert text(nb).strip("\r") == "4/5"

def test_hundred_thousand_lines(tiny, tmp_path, torch_pool):
    begun = time.time()
    e, nb = run_in(torch_pool, tiny("long", "for i in range(100_000): print(i)"), tmp_path)
    assert e["status"] == "ok" and text(nb).count("\n") == 100_000 and time.time() - begun < 30

def test_progress_inside_a_cell(tiny, tmp_path, torch_pool):
    "The side channel tells cell and last line while the cell is still running."
    path = tiny("steps", "import time\nfor i in range(8): print('step', i, flush=True); time.sleep(.15)")
    torch_pool.start(dict(id="p", notebook=str(path), output=str(tmp_path/"p.ipynb"), log=str(tmp_path/"p.log")))
    seen = []
    while not seen or seen[-1]["event"] != "end": seen += [e for e in torch_pool.events(1) if e.get("id") == "p"]
    said = [e["text"] for e in seen if e["event"] == "progress" and e["text"].startswith("step")]
    assert len(said) >= 2 and len(said) < 9

# ---- failures

CASES = dict(
    error=("1/0", "error"),
    syntax=("def f(:", "syntax"),
    exit0=("import os; os._exit(0)", "exit"),
    exit3=("import os; os._exit(3)", "exit"),
    segfault=("import ctypes; ctypes.string_at(0)", "crash"),
    abort=("import os; os.abort()", "crash"),
    memory=("raise MemoryError", "memory"),
    killed=("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "memory"),
    cuda=("raise RuntimeError('CUDA out of memory.')", "memory"),
    disk=("open('/dev/full', 'w').write('x'*10**6)", "disk"),
    endless=("while True: pass", "timeout"),
    asleep=("import time; time.sleep(60)", "timeout"),
)
@pytest.mark.parametrize("kind", CASES)
def test_failure_is_told_apart_and_stamped(kind, tiny, tmp_path, torch_pool):
    source, wanted = CASES[kind]
    e, nb = run_in(
        torch_pool,
        tiny(kind, "print('before')", source, "print('after')"),
        tmp_path,
        id=kind,
        timeout=1.5 if wanted == "timeout" else 60,
    )
    assert e["status"] == wanted and e["error"], e
    failed = [c for c in code(nb) if c.metadata.papermill.status == "failed"]
    assert len(failed) == 1 and failed[0].outputs[-1].output_type == "error"
    assert "before" in text(nb) and "after" not in text(nb) and status(nb)[-1] == "pending"

def test_sys_exit_zero_is_no_failure(tiny, tmp_path, torch_pool):
    e, nb = run_in(torch_pool, tiny("bye", "import sys\nprint('x')", "sys.exit(0)", "print('never')"), tmp_path)
    assert e["status"] == "ok" and "never" not in text(nb)

def test_a_leftover_process_does_not_hold_the_run(tiny, tmp_path, torch_pool):
    "A process that the notebook left behind holds the pipe: the run ends all the same, and the process too."
    begun = time.time()
    e, nb = run_in(
        torch_pool,
        tiny("orphan", "import os, time\npid = os.fork()\nif pid == 0:\n    time.sleep(300)\nprint(pid)"),
        tmp_path,
    )
    assert e["status"] == "ok" and time.time() - begun < 30

def test_output_folder_vanishes(tiny, tmp_path, torch_pool):
    out = tmp_path/"out"
    e, nb = run_in(
        torch_pool,
        tiny(
            "vanish",
            f"import os, shutil\nwhile os.path.exists({str(out)!r}): shutil.rmtree({str(out)!r}, ignore_errors=True)",
            "1",
        ),
        out,
    )
    assert e["status"] == "folder"

def test_papermill_command_line(tiny, tmp_path):
    "`papermill --engine slmkit` works, fails with the failure, and honours parameters."
    good, bad, dead = tiny("good", "print('rate is', rate)"), tiny("bad", "1/0"), tiny("dead", "import os; os._exit(3)")
    run = lambda p, *a: subprocess.run(
        [sys.executable, "-m", "papermill", "--engine", "slmkit", str(p), str(tmp_path / "o.ipynb"), *a],
        capture_output=True,
        encoding="utf-8",
    )
    assert run(good, "-p", "rate", "0.25").returncode == 0 and "rate is 0.25" in text(
        nbformat.read(tmp_path / "o.ipynb", 4)
    )
    assert "ZeroDivisionError" in run(bad).stderr and run(bad).returncode and run(dead).returncode == 3
    limited = run(good, "--execution-timeout", "5")
    assert limited.returncode and "limits runs, not cells" in limited.stderr

def test_where_no_fork_is_safe_a_fresh_process_does_the_same(tiny, tmp_path, monkeypatch):
    "macOS and Windows: the same call spawns."
    monkeypatch.setattr(executors, "CONTEXT", multiprocessing.get_context("spawn"))
    path = tiny("plain", "print('before')", "import os; os._exit(seed)", "print('after')")
    e, nb = run_in(Local(), path, tmp_path, id="dead", parameters=dict(seed=3))
    assert e["status"] == "exit" and status(nb)[-2:] == ["failed", "pending"]
    assert run_in(Local(), tiny("good", "40 + 2"), tmp_path)[0]["status"] == "ok"

# ---- isolation

def test_fresh_namespace_and_random_state(tiny, tmp_path, torch_pool):
    "Trap: forked children inherit the random state of their parent."
    path = tiny(
        "draw",
        "import random, numpy, torch\nassert 'leak' not in globals(); leak = 1\n"
        "print(random.random(), numpy.random.rand(), torch.rand(1).item())",
    )
    draws = [text(run_in(torch_pool, path, tmp_path, id=f"d{i}")[1]).split() for i in range(2)]
    assert len(draws[0]) == 3 and not set(draws[0]) & set(draws[1])

def test_parallel_torch_in_a_child(tiny, tmp_path, torch_pool):
    "Trap: one multi-threaded operation in the parent hangs every child."
    e, _ = run_in(
        torch_pool,
        tiny(
            "mm",
            "import torch\ntorch.set_num_threads(2)\n"
            "x = torch.rand(600, 600, requires_grad=True); (x @ x).sum().backward()",
        ),
        tmp_path,
        timeout=30,
    )
    assert e["status"] == "ok", e

def test_environment_and_folder_do_not_leak(tmp_path, torch_pool):
    "Trap: papermill in threads shares one working directory. Two at once, each in its own, with its own environment."
    import os
    for i in "ab":
        p = write_notebook(
            tmp_path / i / "nb.ipynb",
            "import os, time\ntime.sleep(.3); print(os.getcwd(), os.environ.get('MINE'))\nos.environ['LEAK'] = '1'",
        )
        torch_pool.start(
            dict(
                id=i,
                notebook=str(p),
                output=str(tmp_path / f"{i}.ipynb"),
                log=str(tmp_path / f"{i}.log"),
                cwd=str(p.parent),
                env={"MINE": i},
            )
        )
    ends = []
    while len(ends) < 2: ends += [e for e in torch_pool.events(1) if e["event"] == "end"]
    assert [text(nbformat.read(tmp_path/f"{i}.ipynb", 4)).split() for i in "ab"] == [[str(tmp_path/i), i] for i in "ab"]
    _, nb = run_in(
        torch_pool,
        write_notebook(tmp_path / "c.ipynb", "import os\nprint('LEAK' in os.environ, 'MINE' in os.environ)"),
        tmp_path,
        id="c",
    )
    assert text(nb).strip() == "False False"

def test_notebook_main_is_its_own(tiny, tmp_path, torch_pool):
    e, nb = run_in(
        torch_pool,
        tiny(
            "main",
            "import sys, pickle\nclass A: pass\n"
            "print(__name__, pickle.loads(pickle.dumps(A())).__class__ is A, sys.stdin.read() == '')",
        ),
        tmp_path,
    )
    assert text(nb).split() == ["__main__", "True", "True"], e

def test_stray_output_goes_to_the_log(tiny, tmp_path, torch_pool):
    _, nb = run_in(
        torch_pool, tiny("stray", "import os; os.write(1, b'from C'); print('from Python')"), tmp_path, id="s"
    )
    assert text(nb) == "from Python\n" and (tmp_path/"s.log").read_text(encoding="utf-8") == "from C"

def test_peak_memory_is_the_runs_own(tiny, tmp_path, torch_pool):
    small, large = (
        run_in(torch_pool, tiny(n, s), tmp_path, id=n)[0]
        for n, s in (("small", "1"), ("large", "x = bytearray(300*2**20)"))
    )
    assert 250 < large["peak_mb"] - small["peak_mb"] < 350

# ---- directives

def test_directives(tiny, tmp_path, torch_pool):
    "`slow` at smoke, `cuda` without CUDA, `eval: false` and skip-execution everywhere; papermill runs `eval: false`."
    import torch
    path = tiny(
        "marks",
        "#| slow\nprint('ran slow')",
        "#| cuda\nprint('ran cuda')",
        "#| eval: false\nprint('ran eval')",
        "#| test\nprint('ran test')",
        "s = '#| slow'\nprint('ran text')",
    )
    said = {p: text(run_in(torch_pool, path, tmp_path, id=p, parameters=dict(profile=p))[1]) for p in ("smoke", "cpu")}
    ran = {p: [w for w in ("slow", "cuda", "eval", "test", "text") if f"ran {w}" in s] for p, s in said.items()}
    gpu = ["cuda"]*torch.cuda.is_available()
    assert ran == dict(smoke=gpu + ["test", "text"], cpu=["slow"] + gpu + ["test", "text"])

# ---- the fork server

def waits(path, pid):
    "The process id that a notebook wrote into a file."
    end = time.time() + 60
    while time.time() < end and not (pid.exists() and pid.read_text(encoding="utf-8")): time.sleep(.05)
    return int(pid.read_text(encoding="utf-8"))

def gone(*pids):
    "Whether the processes are gone within ten seconds; a zombie is gone but for a parent that doesn't look."
    left = lambda p: psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE
    end = time.time() + 10
    while time.time() < end and any(map(left, pids)): time.sleep(.05)
    return not any(map(left, pids))

SLEEP = "import os, time\nopen({pid!r}, 'w').write(str(os.getpid()))\ntime.sleep(100)"

def job(path, tmp_path, id="x"):
    return dict(id=id, notebook=str(path), output=str(tmp_path/f"{id}.ipynb"), log=str(tmp_path/f"{id}.log"))

def test_runs_end_with_their_executor(tiny, tmp_path):
    pool, pid = Local(), tmp_path/"pid"
    pool.start(job(tiny("sleep", SLEEP.format(pid=str(pid))), tmp_path))
    at = waits(pool, pid)
    pool.close()
    assert gone(at) and not pool.live

def test_killed_fork_server_is_replaced(tiny, tmp_path):
    from multiprocessing import forkserver
    pool, pid = Local(), tmp_path/"pid"
    pool.start(job(tiny("s", SLEEP.format(pid=str(pid))), tmp_path))
    at, old = waits(pool, pid), forkserver._forkserver._forkserver_pid
    os.kill(old, signal.SIGKILL)
    ends = []
    while not ends: ends += [e for e in pool.events(1) if e["event"] == "end"]
    assert ends[0]["status"] == "memory" and "fork server" in ends[0]["error"] and gone(at)
    assert run_in(pool, tiny("ok", "1"), tmp_path, id="y")[0]["status"] == "ok"
    assert forkserver._forkserver._forkserver_pid != old

def test_a_fork_server_that_can_not_start_is_one_line(tiny, tmp_path, monkeypatch):
    class Dead:
        def __init__(self, **kw): pass
        def start(self): raise EOFError
    monkeypatch.setattr(
        executors,
        "CONTEXT",
        type("C", (), dict(Process=Dead, Pipe=executors.CONTEXT.Pipe, get_start_method=lambda self: "x"))(),
    )
    with pytest.raises(KitError, match="won't stay: see"):
        Local(log=tmp_path / "warm.log").start(job(tiny("s", "1"), tmp_path))

SCRIPT = """
import os, sys, time
print("main", flush=True)  # a child that imported this script would say it again, and start a batch of its own
from slmkit.run.executors import Local
pool = Local(log={log!r})
pool.start({job!r})
while True: print([e for e in pool.events(1) if e["event"] == "end"], flush=True)
"""
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_of_a_runner_that_was_killed(sign, tiny, tmp_path):
    "Not the fork server, not a run; and a script without `if __name__ == '__main__'` is not run twice."
    pid, script = tmp_path/"pid", tmp_path/"script.py"
    script.write_text(
        SCRIPT.format(job=job(tiny("s", SLEEP.format(pid=str(pid))), tmp_path), log=str(tmp_path / "warm.log")),
            encoding="utf-8"
    )
    heard = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    runner = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        preexec_fn=heard,
    )
    at = waits(runner, pid)
    family = [p.pid for p in psutil.Process(runner.pid).children(recursive=True)]
    assert at in family and len(family) == 3  # the fork server, the run, multiprocessing's resource tracker
    runner.send_signal(sign)
    out, _ = runner.communicate(timeout=20)
    assert gone(*family) and out.count("main") == 1 and "main" not in (tmp_path/"x.log").read_text(encoding="utf-8")

def test_no_zombie_is_left(tiny, tmp_path):
    pool = Local()
    for i in range(3): run_in(pool, tiny("n", "1"), tmp_path, id=str(i))
    below = [p for p in psutil.Process().children(recursive=True) if p.status() == psutil.STATUS_ZOMBIE]
    assert not below

def test_many_jobs_a_few_at_once(tiny, tmp_path):
    path = tiny("n", "import time; time.sleep(.2)")
    pool, most, ends = Local(), 0, []
    for e in run_all(pool, [job(path, tmp_path, str(i)) for i in range(5)], 2):
        ends.append(e["id"])
        most = max(most, len(pool.live) + 1)
    assert sorted(ends) == list("01234") and most <= 2

def test_hub_ids_fail_at_once(tiny, tmp_path, torch_pool):
    "Trap: without HF_HUB_OFFLINE a hub id takes 48 s to fail."
    begun = time.time()
    e, _ = run_in(
        torch_pool,
        tiny("hub", "from transformers import AutoConfig\nAutoConfig.from_pretrained('nobody/nothing')"),
        tmp_path,
    )
    assert e["status"] == "error" and time.time() - begun < 20

# ---- traps of the project's files

def test_cleaning_keeps_the_parameters_tag(tiny):
    "Trap: nbdev-clean drops papermill's tag unless told not to; papermill then runs the defaults and reports success."
    from slmkit.run.notebooks import parameters, read
    from slmkit.project.sync import clean
    path = tiny("tagged", "1"); clean(path)
    assert "rate" in parameters(read(path))
    kept = tomllib.loads((ROOT/"pyproject.toml").read_text(encoding="utf-8"))["tool"]["nbdev"]
    assert kept["allowed_cell_metadata_keys"] == ["tags"]

def test_wheel_has_the_subpackages():
    "Trap: nbdev's template names only the top package."
    from setuptools import find_packages
    tools = tomllib.loads((ROOT/"pyproject.toml").read_text(encoding="utf-8"))["tool"]
    include = tools["setuptools"]["packages"]["find"]["include"]
    assert {"slmkit.run", "slmkit.core"} <= set(find_packages(str(ROOT), include=include))

def test_nbdev_is_new_enough():
    "Trap: nbdev 2 does not import beside today's fastcore."
    from importlib.metadata import version
    assert int(version("nbdev").split(".")[0]) >= 3
    import nbdev.export

def test_importing_touches_neither_network_nor_cuda():
    "Trap: the docs build imports every module."
    code = """
import socket, pkgutil, importlib, slmkit
def no(*a, **k): raise AssertionError('network at import')
socket.socket.connect = no
for m in pkgutil.walk_packages(slmkit.__path__, 'slmkit.'):
    if m.name != 'slmkit._modidx': importlib.import_module(m.name)
import torch; assert not torch.cuda.is_initialized()"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-500:]
