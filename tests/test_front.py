"The front page is what its sources give: README from the index, picture and figures from the ledger; its commands and links exist."
import json, re
import xml.etree.ElementTree as ET
import pytest
from conftest import ROOT
from slmkit.cli import main as cli
from slmkit.verdicts import picture
from slmkit.project.sync import readme

TEXT = (ROOT/"README.md").read_text()

def entry(**verdict):
    spec = dict(says="A & B beat <C>.", metric="accuracy gained", kind="effect", least=.02)
    v = dict(outcome="holds here", mean=.03, low=.01, high=.05, n=10, control=-.01, settles="yes") | verdict
    runs = [dict(seed=100 + i, claims=dict(gain=dict(value=.02 + .01*i, control=-.02))) for i in range(10)]
    return dict(technique="distill/step_by_step", profile="cpu", model="t5-1m", data="word_problems", hardware="cpu-avx2", date="2026-01-02",
                claims=dict(gain=dict(spec=spec, verdict=v)), runs=runs, external=None)

def test_readme_and_picture_are_what_sync_gives():
    assert TEXT == picture.for_readme(readme(json.loads((ROOT/"nbs/index.ipynb").read_text())), ROOT)
    assert (ROOT/"nbs/images/result.svg").read_text() == picture.picture_text(ROOT)

def test_first_screen():
    first = TEXT[:TEXT.index("\n## ")]
    assert all(w in first for w in ("make start", "make test", "nbs/images/result.svg")) and len(first.splitlines()) <= 40

def test_links_lead_somewhere():
    links = [l for l in re.findall(r"\]\(([^)\s]+)\)", TEXT) if not l.startswith(("http", "#"))]
    assert len(links) >= 2 and all((ROOT/l).is_file() for l in links), links

def test_every_command_of_the_readme_exists():
    import typer
    group = typer.main.get_command(cli.build())
    calls = re.findall(r"(?:^|[`/])slmkit ([a-z]+)(?: ([a-z]+))?", TEXT, re.M)
    assert len(calls) > 12
    for verb, sub in calls:
        assert verb in group.commands, verb
        if hasattr(group.commands[verb], "commands"): assert sub in group.commands[verb].commands, (verb, sub)

def test_figures_of_the_picture_are_the_entry_s():
    text = picture.draw(entry())
    root = ET.fromstring(text)
    said = " ".join(e.text or "" for e in root.iter())
    assert "A & B beat <C>." in said and "0.03 [0.01, 0.05]" in said and "10 confirm seeds" in said and "holds here" in said
    circles = [float(e.get("cx")) for e in root.iter() if e.tag.endswith("circle")]
    assert len(circles) == 20 and circles[:10] == sorted(circles[:10]) and len(set(circles[10:])) == 1
    assert all(0 <= c <= picture.WIDTH for c in circles)

@pytest.mark.parametrize("verdict, words", [(dict(outcome="not reproduced here", mean=-.05, low=-.07, high=-.03), "not reproduced here: accuracy gained -0.05"),
    (dict(stale=True), "(stale)"), (dict(outcome="mechanics only", mean=None, low=None, high=None), "mechanics only, control -0.01; 10 ")])
def test_other_outcomes_are_said_as_plainly(verdict, words):
    assert words in picture.sentence(entry(**verdict))
    picture_said = picture.draw(entry(**verdict))
    assert verdict.get("outcome", "(stale)") in picture_said

def test_own_and_cpu_go_before_others(tmp_path):
    for i, e in enumerate([entry() | dict(external=dict(source="x")), entry() | dict(profile="gpu", date="2026-09-09"), entry()]):
        (tmp_path/"distill").mkdir(exist_ok=True); (tmp_path/f"distill/step_by_step.{i}.json").write_text(json.dumps(e))
    found = picture.entry_of(tmp_path)
    assert found["profile"] == "cpu" and not found["external"]
    assert picture.entry_of(tmp_path/"none") is None

def test_two_copies_of_quarto_s_settings_are_equal():
    assert (ROOT/"_quarto.yml").read_text() == (ROOT/"nbs/_quarto.yml").read_text()

def test_constraints_name_plain_versions():
    lines = [l for l in (ROOT/"constraints.txt").read_text().splitlines() if not l.startswith("#")]
    pins = dict(l.split("==") for l in lines)
    assert pins["torch"] == "2.13.0" and pins["nbdev"] == "3.3.26" and all(re.fullmatch(r"[\w.]+", v) for v in pins.values())
    import tomllib
    project = tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]
    wanted = {re.match(r"[\w-]+", d)[0].lower() for d in [*project["dependencies"], *project["optional-dependencies"]["dev"]]}
    assert wanted <= {p.lower() for p in pins}, wanted - set(pins)
