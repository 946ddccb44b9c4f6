"The command line: quick, one line for a mistake, the right exit code."
import subprocess, sys
import pytest, typer
from conftest import ROOT
from slmkit.core.settings import DEFAULTS, KitError, kit_settings
from slmkit.cli import main as cli

HELP = """
import sys
from slmkit.cli import main as cli
try: cli.main(["--help"])
except SystemExit: pass
assert not {"torch", "papermill", "matplotlib", "datasets", "nbdev", "requests"} & set(sys.modules)
"""

def test_help_is_quick_and_whole():
    "No heavy library is imported by it, and no module of verbs is left out."
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert all(v in done.stdout for v in ("run", "confirm", "status", "sync", "start", "field", "lab", "zoo", "site"))

def test_every_verb_ends_with_examples():
    group = typer.main.get_command(cli.build())
    for name, verb in group.commands.items():
        for v in [verb, *getattr(verb, "commands", {}).values()]:
            assert getattr(v, "commands", None) or "slmkit" in (v.epilog or ""), f"slmkit {name} {v.name}: no example"

def said(capsys, *argv):
    with pytest.raises(SystemExit) as e: cli.main(list(argv))
    return e.value.code, capsys.readouterr().err.strip()

def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, err = said(capsys, "status", "nowhere")
    assert code == 2 and err.startswith("slmkit: ") and "\n" not in err
    code, err = said(capsys, "rn")
    assert code == 2 and "Did you mean" in err
    code, err = said(capsys, "run", "missing.ipynb")
    assert code == 2 and "no notebook at missing.ipynb" in err

def test_faults_of_the_kit_name_themselves(capsys, monkeypatch):
    def broken(): raise ZeroDivisionError("by zero\nand more")
    monkeypatch.setattr(cli, "build", broken)
    monkeypatch.delenv("SLMKIT_DEBUG", raising=False)
    assert said(capsys, "run") == (1, "slmkit: ZeroDivisionError: by zero (SLMKIT_DEBUG=1 shows where)")
    monkeypatch.setenv("SLMKIT_DEBUG", "1")
    with pytest.raises(ZeroDivisionError): cli.main([])

def test_a_broken_module_leaves_the_rest(tmp_path, monkeypatch, capsys):
    (tmp_path/"brokenverbs.py").write_text("raise ValueError('half written')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    app = cli.build(["brokenverbs", "slmkit.cli.project", "slmkit.run.batch", "no_such_module_here"])
    said = capsys.readouterr().err
    assert "sync" in typer.main.get_command(app).commands
    assert said == "slmkit: brokenverbs left out: ValueError: half written\n"

def test_broken_pipe_is_quiet():
    command = f"{sys.executable} -c 'from slmkit.cli.main import main; main()' --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, encoding="utf-8")
    assert "Traceback" not in done.stderr and done.stdout

def test_the_settings_of_this_project_are_the_defaults_or_known():
    "settings.ini names nothing that the kit does not read."
    from configparser import ConfigParser
    ini = ConfigParser()
    ini.read(ROOT/"settings.ini", encoding="utf-8")
    assert set(ini["slmkit"]) == set(DEFAULTS) == set(kit_settings(ROOT))
