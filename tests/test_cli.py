"The command line: quick, one line for a mistake, the right exit code."
import subprocess, sys, time
import pytest
from slmkit.core.settings import KitError
from slmkit.cli import main as cli

def slmkit(*a, **kw): return subprocess.run([sys.executable, "-c", "from slmkit.cli.main import main; main()", *map(str, a)], capture_output=True, text=True, **kw)

def test_help_does_not_import_torch():
    code = "import sys\nfrom slmkit.kit import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\nassert not {'torch', 'papermill', 'matplotlib', 'datasets'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(v in done.stdout for v in ("run", "confirm", "status", "sync"))

def test_every_verb_ends_with_examples():
    import typer
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
    monkeypatch.setattr(cli, "build", broken); monkeypatch.delenv("SLMKIT_DEBUG", raising=False)
    assert said(capsys, "run") == (1, "slmkit: ZeroDivisionError: by zero (SLMKIT_DEBUG=1 shows where)")
    monkeypatch.setenv("SLMKIT_DEBUG", "1")
    with pytest.raises(ZeroDivisionError): cli.main([])

def test_a_broken_module_leaves_the_rest(tmp_path, monkeypatch, capsys):
    (tmp_path/"brokenverbs.py").write_text("raise ValueError('half written')")
    monkeypatch.syspath_prepend(tmp_path)
    import typer
    app = cli.build(["brokenverbs", "slmkit.project.sync", "slmkit.run.batch", "no_such_module_here"])
    assert "sync" in typer.main.get_command(app).commands and "half written" in capsys.readouterr().err

def test_broken_pipe_is_quiet():
    done = subprocess.run(f"{sys.executable} -c 'from slmkit.cli.main import main; main()' --help | head -1", shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
