"The runner: parameters, cache, failures, two runners at once, what a person and a script see."
import json, subprocess, sys, time
from pathlib import Path
import nbformat, pytest
from conftest import PARAMETERS, RECORD, ROOT
from slmkit.core.settings import KitError
from slmkit.run import batch as runner
from slmkit.run import plan as planning
from slmkit.run import records
from slmkit.run import notebooks
from slmkit.run.progress import Console
from slmkit.run.plan import plan
from slmkit.run.batch import execute


def slmkit(*a, **kw):
    return subprocess.run(
        [sys.executable, "-c", "from slmkit.cli.main import main; main()", *map(str, a)],
        capture_output=True,
        encoding="utf-8",
        **kw,
    )


def go(path, folder, seeds=(0,), profile="smoke", given={}, sweeps={}, **options):
    return execute(
        plan([(Path(path).stem, Path(path))], profile, list(seeds), given, sweeps), folder, jobs=2, **options
    )
RIGHT = [RECORD, "import random\nvalue = random.Random(f'{seed} {rate}').random()", "c.record(value)"]
right = lambda seed, rate: __import__("random").Random(f"{seed} {rate}").random()

# ---- parameters

KINDS = dict(
    int=("n = 3", "5", 5),
    negative=("n = 3", "-2", -2),
    exponent=("n = 3", "1e3", 1000),
    float=("n = .5", "2", 2.0),
    str=("n = 'a'", "b c=d", "b c=d"),
    true=("n = False", "yes", True),
    false=("n = True", "0", False),
    list=("n = [1]", "[2, 3]", [2, 3]),
    tuple=("n = (1,)", "(2,)", (2,)),
    dict=("n = {}", "{'a': 1}", {"a": 1}),
    none=("n = None", "7", 7),
    none_text=("n = None", "x", "x"),
    empty=("n = 'a'", "", ""),
)
@pytest.mark.parametrize("kind", KINDS)
def test_parameter_of_each_type(kind, tiny):
    line, text, value = KINDS[kind]
    run = plan(
        [("t", tiny("t", "n", parameters=f"profile = 'smoke'\nseed = 0\n{line}"))],
        "smoke",
        [0],
        notebooks.pairs([f"n={text}"]),
    )[0]
    assert run["parameters"] == {"n": value} and type(run["parameters"]["n"]) is type(value)

WRONG = dict(
    int=("n = 3", "much"),
    half=("n = 3", "0.5"),
    float=("n = .5", "x"),
    bool=("n = True", "maybe"),
    list=("n = [1]", "{}"),
    code=("n = [1]", "[f()]"),
)
@pytest.mark.parametrize("kind", WRONG)
def test_value_of_another_type_is_refused(kind, tiny):
    line, text = WRONG[kind]
    with pytest.raises(KitError, match="wanted, as in n = "):
        plan([("t", tiny("t", parameters=f"profile = 'smoke'\nseed = 0\n{line}"))], "smoke", [0], {"n": text})

def test_parameters_arrive_in_the_notebook(tiny, tmp_path):
    path = tiny(
        "p",
        RECORD,
        "assert (flag, xs, text) == (True, [1, 2], 'a\"b\\n'), (flag, xs, text)\nc.record(1)",
        parameters=PARAMETERS + "\nflag = False\nxs = []\ntext = ''",
    )
    assert go(path, tmp_path/"r", given=dict(flag="yes", xs="[1, 2]", text='a"b\n'))[0]["status"] == "ok"

def test_mistakes_are_refused_before_anything_starts(tiny, tmp_path):
    path = tiny("t", "1")
    def refused(**kw):
        with pytest.raises(KitError) as e: plan([("t", path)], kw.pop("profile", "smoke"), [0], **kw)
        return str(e.value)
    assert "did you mean 'rate'" in refused(given={"rte": "1"}) and "did you mean 'smoke'" in refused(profile="smok")
    assert "use one" in refused(given={"rate": "1"}, sweeps={"rate": "1,2"})
    with pytest.raises(KitError, match="no code cell tagged"):
        plan([("t", tiny("u", "seed = 0", parameters=None))], "smoke", [0])
    with pytest.raises(KitError, match="must set profile and seed"):
        plan([("t", tiny("v", "1", parameters="seed = 0"))], "smoke", [0])
    with pytest.raises(KitError, match="plain value"):
        plan([("t", tiny("w", "1", parameters="seed = f()"))], "smoke", [0])
    with pytest.raises(KitError, match="plain value"):
        plan([("t", tiny("x", "1", parameters="import os\nseed = 0"))], "smoke", [0])
    with pytest.raises(KitError, match="slmkit confirm"): planning.build_seeds("99-101")
    for bad in ("", "a", "3-1", "1-"):
        with pytest.raises(KitError, match="--seeds"): planning.seeds(bad)
    (tmp_path/"torn.ipynb").write_text('{"cells": [', encoding="utf-8")
    with pytest.raises(KitError, match="is no notebook"): plan([("t", tmp_path/"torn.ipynb")], "smoke", [0])

def test_finding_techniques(tmp_path):
    for f in ("distill/mini", "distill/other", "adapt/other", "core/tool"):
        p = tmp_path/"nbs"/f"{f}.ipynb"
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_text("{}", encoding="utf-8")
    find = lambda n: notebooks.find(n, tmp_path)[0]
    assert find("mini") == find("distill/mini") == "distill/mini" and "core/tool" not in notebooks.techniques(tmp_path)
    with pytest.raises(
        KitError, match="several families: say distill/other or adapt/other|adapt/other or distill/other"
    ):
        find("other")
    with pytest.raises(KitError, match="did you mean 'mini'"): find("mni")

# ---- records, cache and strata

def test_record_has_what_the_design_names(tiny, tmp_path):
    r = go(tiny("t", *RIGHT), tmp_path/"r", given=dict(rate=".25"))[0]
    assert r["claims"]["tiny"]["value"] == right(0, .25) and r["parameters"] == {"rate": .25} and r["status"] == "ok"
    assert {
        "technique",
        "profile",
        "seed",
        "model",
        "data",
        "hashes",
        "commit",
        "date",
        "versions",
        "hardware",
        "seconds",
        "cpu_seconds",
        "peak_mb",
        "stacked",
        "error",
        "notebook",
        "environment",
    } <= set(r)
    assert (tmp_path / "r" / r["notebook"]).exists() and "torch" in json.loads(
        (tmp_path / "r" / r["environment"]).read_text(encoding="utf-8")
    )["packages"]
    assert r["cpu_seconds"] > 0 and r["peak_mb"] > 10 and set(r["hashes"]) == {"code", "model", "data"}
    assert r["notebook"].endswith("/notebook.ipynb")
    kept = (tmp_path / "r" / r["notebook"]).with_name("record.json").read_text(encoding="utf-8")
    assert json.loads(kept) == r and not list((tmp_path / "r/running").iterdir())

def why(path, folder, hardware=runner.here, **kw):
    "A run that has torch at hand, by itself or from its fork server, records this machine's class."
    runs = plan([(Path(path).stem, Path(path))], "smoke", [0], **kw)
    return planning.explain(runs, folder, hardware)[0][2]

def test_cache_and_its_reasons(tiny, tmp_path):
    path, folder = tiny("t", *RIGHT, "print('a') # prose"), tmp_path/"r"
    assert why(path, folder) == "never run"
    first = go(path, folder)[0]
    assert why(path, folder) is None and go(path, folder)[0]["date"] == first["date"]
    tiny("t", *RIGHT, "print('b') # other prose"); assert why(path, folder) is None
    tiny("t", RIGHT[0], RIGHT[1] + "\nvalue += 0", RIGHT[2])
    assert why(path, folder).startswith("code changed since ") and "cell" in why(path, folder)
    go(path, folder); assert why(path, folder) is None
    assert why(path, folder, given=dict(rate="0.1")) == "never run" and why(path, folder, model="a/b").startswith(
        "model changed"
    )
    assert len(go(path, folder, force=True)) == 1 and len(records.reading(folder)[0]) == 3

def test_versions_and_hardware_choose_the_stratum(tiny, tmp_path, monkeypatch):
    path, folder = tiny("t", *RIGHT), tmp_path/"r"
    r = go(path, folder)[0]
    place = (folder/r["notebook"]).parent
    again = place.with_name(place.name + ".2"); again.mkdir()
    (again / "record.json").write_text(json.dumps({**r, "hardware": "cpu-y"}), encoding="utf-8")
    assert why(path, folder) is None  # the one without a class still answers
    (place / "record.json").write_text(json.dumps({**r, "hardware": "cpu-y"}), encoding="utf-8")
    assert why(path, folder, lambda: "cpu-x") == "cpu-y then, cpu-x now"
    for p in (place, again):
        other = {**r, "versions": {**r["versions"], "torch": "1.0"}}
        (p / "record.json").write_text(json.dumps(other), encoding="utf-8")
    assert "torch 1.0 then" in why(path, folder)
    assert go(path, folder)[0]["notebook"] == f"{place.name}.3/notebook.ipynb" and len(records.reading(folder)[0]) == 3

def test_failed_runs_are_tried_again(tiny, tmp_path):
    path, flag = (
        tiny("t", RECORD, f"import os\nassert os.path.exists({str(tmp_path/'flag')!r})\nc.record(1)"),
        tmp_path / "flag",
    )
    assert go(path, tmp_path/"r")[0]["status"] == "error" and why(path, tmp_path/"r") == "failed last time (error)"
    flag.touch(); assert go(path, tmp_path/"r")[0]["status"] == "ok"

def test_code_edited_during_a_run(tiny, tmp_path):
    path = tiny("t", RECORD, "import json\np = 'PATH'\n", "c.record(1)")
    nb = json.loads(path.read_text(encoding="utf-8"))
    edit = "t.replace('c.record(1)', 'c.record(2)').replace('0.5', '0.75')"
    nb["cells"][2]["source"] = f"t = open({str(path)!r}).read(); open({str(path)!r}, 'w').write({edit})"
    path.write_text(json.dumps(nb), encoding="utf-8")
    assert go(path, tmp_path/"r")[0]["status"] == "changed"

def test_relative_places_are_made_absolute(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); (tmp_path/"my.jsonl").write_text("{}\n", encoding="utf-8")
    run = plan([("t", tiny("t", "1"))], "smoke", [0], data="my.jsonl")[0]
    assert run["given"]["data"] == str(tmp_path/"my.jsonl")

def test_ten_thousand_cached_runs_are_planned_soon(tiny, tmp_path):
    "The issue's aim is 5 s; a generous 20 keeps a busy machine from failing this."
    path, folder = tiny("t", *RIGHT), tmp_path/"r"; folder.mkdir()
    sweeps = dict(rate=",".join(str(i/1000) for i in range(1000)))
    made = dict(
        versions=records.versions(),
        status="ok",
        date="2026-01-01T00:00:00",
        hardware=None,
        claims={},
        error=None,
        seconds=1,
    )
    first = plan([("t", path)], "smoke", list(range(10)), {}, sweeps)
    assert len(first) == 10_000
    for r in first:
        (folder/r["id"]).mkdir()
        (folder / r["id"] / "record.json").write_text(
            json.dumps({**{k: r[k] for k in ("technique", "profile", "seed", "parameters", "hashes")}, **made}),
            encoding="utf-8",
        )
    planning._look.cache_clear(); begun = time.time()
    assert len(execute(plan([("t", path)], "smoke", list(range(10)), {}, sweeps), folder)) == 10_000
    assert time.time() - begun < 20

# ---- the files of records

GOOD = dict(technique="a", profile="smoke", seed=0, status="ok", parameters={}, hashes={}, date="2026-01-01T00:00:00")
def scratch(folder, name="new"):
    (folder/name).mkdir(parents=True)
    return folder/name

def test_strange_files_are_counted_and_left_out(tmp_path):
    for seed, text in enumerate(["{}", "[1]", '{"torn": ', "\xff", json.dumps(GOOD)]):
        records.publish(tmp_path, GOOD | dict(seed=seed), scratch(tmp_path))
        (tmp_path/records.run_id(GOOD | dict(seed=seed))/"record.json").write_text(text, encoding="utf-8")
    found, torn = records.reading(tmp_path)
    assert found == [GOOD] and torn == 4
    run = GOOD | dict(seed=1); run["id"] = records.run_id(run)
    assert records.lookup(tmp_path, run, None) == (None, "never run")

def test_a_folder_put_together_by_hand(tmp_path):
    "One file of lines, and folders of runs beside it."
    (tmp_path/"records.jsonl").write_text(json.dumps(GOOD | dict(seed=7)) + '\n{"torn": ', encoding="utf-8")
    assert records.is_run_folder(tmp_path) and not records.is_run_folder(tmp_path/"none")
    records.publish(tmp_path, GOOD | dict(seed=8), scratch(tmp_path))
    found, torn = records.reading(tmp_path)
    assert [r["seed"] for r in found] == [7, 8] and torn == 1

def test_full_disk_leaves_no_half_record(tmp_path, monkeypatch):
    def full(*a, **kw): raise OSError(28, "No space left on device")
    monkeypatch.setattr(records, "whole", full)
    with pytest.raises(OSError, match="No space"): records.publish(tmp_path, dict(GOOD), scratch(tmp_path))
    assert records.reading(tmp_path) == ([], 0) and not (tmp_path/records.run_id(GOOD)).exists()

def test_many_writers(tmp_path):
    "Four processes publish the same hundred runs: four tries of each, none lost, none overwritten."
    code = """
import os, sys
from pathlib import Path
from slmkit.run.records import publish
folder = Path(sys.argv[1])
for i in range(100):
    scratch = folder/f"scratch.{os.getpid()}"
    scratch.mkdir()
    publish(folder, dict(technique="a"*50, profile="smoke", seed=i, status="ok", parameters={}, hashes={}), scratch)"""
    ps = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    assert [p.wait() for p in ps] == [0]*4
    found, torn = records.reading(tmp_path)
    assert sorted(r["seed"] for r in found) == sorted([*range(100)]*4) and torn == 0

# ---- failures in a batch

def test_batch_goes_on_and_says_what_failed(tiny, tmp_path):
    "One notebook, a failure by seed: the others finish, exit code 1, a table, the executed notebooks kept."
    kinds = [
        "c.record(1)",
        "1/0",
        "import os; os._exit(0)",
        "import ctypes; ctypes.string_at(0)",
        "while True: pass",
        "raise MemoryError",
        "open('/dev/full', 'w').write('x'*10**6)",
        "c.record(7)",
    ]
    path = tiny("f", RECORD, f"exec({kinds!r}[seed])")
    done = slmkit(
        "run", path, "--profile", "smoke", "--seeds", "0-7", "--out", tmp_path / "r", "--timeout", 3, "--jobs", 2
    )
    last = {r["seed"]: r for r in records.reading(tmp_path/"r")[0]}
    assert [last[i]["status"] for i in range(8)] == ["ok", "error", "exit", "crash", "timeout", "memory", "disk", "ok"]
    assert (
        done.returncode == 1
        and "8 runs: 2 done, 0 cached, 6 failed" in done.stdout
        and done.stderr.count("/f.smoke") == 6
    )
    for r in last.values():
        nb = nbformat.read(tmp_path/"r"/r["notebook"], 4)
        assert (
            "failed" in [c.metadata.papermill.get("status") for c in nb.cells if "papermill" in c.metadata]
        ) == (r["status"] != "ok")
    status = slmkit("status", tmp_path/"r")
    assert (
        status.returncode == 1
        and "2 ok" in status.stdout
        and "1 timeout" in status.stdout
        and "out of memory" in status.stdout
    )

def test_run_folder_vanishes(tiny, tmp_path):
    folder = tmp_path/"r"
    path = tiny(
        "v",
        RECORD,
        f"import shutil, os\nwhile os.path.exists({str(folder)!r}): shutil.rmtree({str(folder)!r}, ignore_errors=True)",
    )
    found = go(path, folder, [0])
    assert found[0]["status"] == "folder"

def test_out_that_is_a_file(tiny, tmp_path):
    (tmp_path/"r").write_text("x", encoding="utf-8")
    done = slmkit("run", tiny("t", "1"), "--profile", "smoke", "--seeds", "0", "--out", tmp_path/"r")
    assert done.returncode == 2 and done.stderr.count("\n") == 1

def small_disk(tmp_path):
    disk = tmp_path/"disk"; disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if done.returncode: pytest.skip("may not mount a small disk here")
    return disk
def test_real_full_disk(tiny, tmp_path):
    "A disk of 256 KB: the run that does not fit fails as `disk`, the batch ends with a table, records are whole."
    disk = small_disk(tmp_path)
    try:
        path = tiny("d", *RIGHT, "if seed == 1: print('x'*400_000)")
        found = execute(plan([("d", path)], "smoke", [0, 1, 2]), disk/"r", jobs=1)
        assert [r["status"] for r in found] == ["ok", "disk", "ok"]
        assert records.reading(disk/"r")[1] == 0
    finally:
        subprocess.run(["umount", "-l", str(disk)])

# ---- executors and what people see

def test_an_unknown_executor_is_refused(tiny, tmp_path):
    with pytest.raises(KitError, match="no executor 'rai': did you mean 'ray'"):
        go(tiny("t", "1"), tmp_path / "r", executor="rai")


def test_at_once():
    assert [runner.at_once(j, "local", [dict(profile=p)]) for j, p in ((0, "gpu"), (3, "gpu"), (0, "cpu"))] == [
        1,
        3,
        runner.cores(),
    ]


def test_a_budget_starts_no_run_that_would_end_too_late(tiny, tmp_path):
    path = tiny("b", RECORD, "import time; time.sleep(.5)\nc.record(1)")
    few = go(path, tmp_path/"few", range(8), budget=.5, least=3)
    assert [r["seed"] for r in few] == [0, 1, 2] and go(path, tmp_path/"few", range(8), budget=.1, least=3) == few
    assert len(go(path, tmp_path/"few", range(8), budget=600, least=3)) == 8

def test_deaths_are_kept_with_their_notebooks(tiny, tmp_path):
    "What a cell printed before its process died is not kept; the cells before it are."
    r = go(tiny("d", "print('before')", "print('lost'); import os; os.abort()"), tmp_path/"r")[0]
    nb = nbformat.read(tmp_path/"r"/r["notebook"], 4)
    assert r["status"] == "crash" and [o.get("text") or o.ename for c in nb.cells for o in c.outputs] == [
        "before\n",
        "crash",
    ]

def test_dry_run_json_and_quiet(tiny, tmp_path):
    path, args = tiny("t", *RIGHT), ("--profile", "smoke", "--seeds", "0-1", "--out", tmp_path/"r")
    assert (
        "2 runs: 0 cached, 2 to run" in slmkit("run", path, *args, "--dry-run").stdout
        and not (tmp_path / "r").exists()
    )
    lines = [json.loads(l) for l in slmkit("run", path, *args, "--json").stdout.splitlines()]
    assert [l.get("status") for l in lines] == ["ok", "ok", None] and lines[-1]["failed"] == 0
    done = slmkit("run", path, *args, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "2 cached, 0 to run" in slmkit("run", path, *args, "--dry-run").stdout

def test_two_runners_on_one_folder(tiny, tmp_path):
    "Every run is done once, both end well."
    path = tiny("t", *RIGHT, "import time; time.sleep(.1)")
    cmd = [
        sys.executable,
        "-c",
        "from slmkit.cli.main import main; main()",
        "run",
        str(path),
        "--profile",
        "smoke",
        "--seeds",
        "0-15",
        "--out",
        str(tmp_path / "r"),
        "--jobs",
        "2",
        "--quiet",
    ]
    ps = [subprocess.Popen(cmd) for _ in range(2)]
    assert [p.wait(120) for p in ps] == [0, 0]
    found, torn = records.reading(tmp_path/"r")
    assert sorted(r["seed"] for r in found) == list(range(16)) and torn == 0

def test_ctrl_c_stops_and_resumes(tiny, tmp_path):
    import signal
    go = tmp_path/"go"  # the runs from seed 4 on wait for it, so that Ctrl-C meets some on the way
    path = tiny("t", RECORD, f"""
        import time
        from pathlib import Path
        while seed > 3 and not Path({str(go)!r}).exists(): time.sleep(.02)
        c.record(1)""")
    cmd = [
        sys.executable,
        "-c",
        "from slmkit.cli.main import main; main()",
        "run",
        str(path),
        "--profile",
        "smoke",
        "--seeds",
        "0-9",
        "--out",
        str(tmp_path / "r"),
        "--jobs",
        "2",
    ]
    heard = lambda: signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # tests in the background of a shell inherit that it is ignored
    p = subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", preexec_fn=heard)
    while len(records.reading(tmp_path/"r")[0]) < 2 and p.poll() is None: time.sleep(.05)
    p.send_signal(signal.SIGINT); out, err = p.communicate(timeout=20)
    assert (
        p.returncode == 130
        and "the same command does the rest" in err
        and all(r["status"] == "ok" for r in records.reading(tmp_path / "r")[0])
    )
    go.touch()
    assert subprocess.run(cmd, capture_output=True).returncode == 0
    assert sorted(r["seed"] for r in records.reading(tmp_path/"r")[0]) == list(range(10))

def test_confirm_publishes(tiny, tmp_path, monkeypatch):
    "Seeds 100-109, no others, handed to the ledger with the command."
    from slmkit.verdicts import confirm
    got, nb = [], str(tiny("t", *RIGHT))
    monkeypatch.setattr(confirm, "publish", lambda records, command, power=None:
                        got.append(([r["seed"] for r in records], command)) or "file")
    monkeypatch.setattr(confirm, "expected", lambda *args: {})  # its claims have no fields
    queue = confirm.confirm([nb], "smoke", tmp_path/"r", jobs=2)
    assert got[0][0] == list(range(100, 110)) and got[0][1].startswith("slmkit confirm ") and "file" in queue.lines[0]
