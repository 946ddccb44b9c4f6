"Lists at a terminal: a summary first, no more than a screen, and all of it where something else reads."
import re
import pytest
from conftest import ROOT
from slmkit.cli.main import main
from slmkit.project.guide import known
from slmkit.project.registry import search

@pytest.fixture
def told(capsys, monkeypatch):
    "Runs a command as at a terminal or into a pipe; gives its lines."
    def run(*words, terminal=True):
        monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as e: main(list(words))
        assert not e.value.code
        return re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    return run

def test_every_technique_is_listed_by_the_field_s_name(told):
    lines = told("list", terminal=False)
    for t, f in known(ROOT).items():
        line = next(l for l in lines if l.startswith(t + " "))
        assert f["name"].split()[0] in line
    assert max(map(len, lines)) <= 80

def test_the_field_begins_with_its_sum_and_served_works(told):
    short, every = told("field"), told("field", "--all")
    assert re.match(r"\d+ works, served/all by family: ", short[0]) and len(short) < 100 < len(every)
    assert "give words" in short[-1] and "no notebook" not in "\n".join(short[:20])
    assert len(told("field", terminal=False)) == len(every)

def test_a_word_begins_a_word():
    works = [dict(title=t, slug=s, authors=[], claim="", mechanism="", paper_result="", reproduction="")
             for t, s in (("LoRA", "a"), ("Exploration", "b"), ("QLoRA-like loras", "c"))]
    assert [w["slug"] for w in search(works, "lora")] == ["a", "c"]

def test_verdicts_begin_with_their_sum(told):
    short = told("verdicts")
    assert short[0].startswith("claims of papers, ") and "slmkit verdicts low_rank" in short[-1] and len(short) < 20
    assert len(told("verdicts", "--all")) > 100 and len(told("verdicts", "low_rank")) > 5
    assert len(told("verdicts", terminal=False)) > 100
