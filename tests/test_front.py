"The front page is what its sources give: README from the index, picture and figures from the ledger."
import json, re
import xml.etree.ElementTree as ET
import pytest
from conftest import ROOT
from slmkit.cli import main as cli
from slmkit.core.figures import png
from slmkit.project.sync import readme
from slmkit.verdicts import figure

TEXT = (ROOT/"README.md").read_text(encoding="utf-8")
VALUES, CONTROLS = [.02 + .01*i for i in range(10)], [-.02 + .001*i for i in range(10)]


def entry(**verdict):
    spec = dict(says="A & B beat <C>.", metric="accuracy gained", kind="effect", least=.02)
    v = dict(outcome="holds here", mean=.03, low=.01, high=.05, n=10, control=-.01, settles="yes") | verdict
    runs = [dict(seed=100 + i, claims=dict(gain=dict(value=x, control=c)))
            for i, (x, c) in enumerate(zip(VALUES, CONTROLS))]
    return dict(technique="distill/step_by_step", profile="cpu", model="t5-1m", data="word_problems",
                hardware="cpu-avx2", date="2026-01-02", claims=dict(gain=dict(spec=spec, verdict=v)), runs=runs,
                external=None)


def project(folder, *entries):
    "A project with a ledger and nothing else."
    for i, e in enumerate(entries):
        path = folder/f"slmkit/ledger/distill/step_by_step.{i}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(e), encoding="utf-8")
    return folder


def drawn(fig):
    "Horizontal places of each row's dots."
    return {line.get_gid(): list(line.get_xdata()) for line in fig.axes[0].lines if line.get_gid()}


def test_readme_is_what_sync_gives():
    index = json.loads((ROOT/"nbs/index.ipynb").read_text(encoding="utf-8"))
    assert TEXT == figure.for_readme(readme(index), ROOT)


def test_the_committed_picture_says_and_draws_what_the_ledger_holds():
    found, name = figure.result_of(ROOT)
    root = ET.fromstring((ROOT/"nbs/images/result.svg").read_text(encoding="utf-8"))
    assert root.get("aria-label") == figure.sentence(found, name)
    new = ET.fromstring(figure.picture_text(ROOT))
    places = lambda tree: [(float(e.get("x")), float(e.get("y"))) for e in tree.iter() if e.tag.endswith("use")
                           and e.get("x")]
    assert len(places(root)) == len(places(new)) > 20
    assert all(abs(a - b) < 1 for p, q in zip(places(root), places(new)) for a, b in zip(p, q))


def test_the_same_ledger_gives_the_same_bytes(tmp_path):
    root = project(tmp_path, entry())
    text = figure.picture_text(root)
    assert text == figure.picture_text(root) and "<metadata>" not in text and "dc:date" not in text
    drawing = figure.figure_of(entry(), "gain")
    assert png(drawing) == png(figure.figure_of(entry(), "gain")) and b"matplotlib" not in png(drawing)


def test_settings_of_the_reader_s_matplotlib_do_not_reach_the_picture():
    import matplotlib
    text = figure.claim_svg(entry(), "gain")
    theirs = {"font.size": 30, "axes.facecolor": "black", "svg.fonttype": "none", "lines.linewidth": 9}
    with matplotlib.rc_context(theirs):
        assert figure.claim_svg(entry(), "gain") == text


def test_first_screen():
    first = TEXT[:TEXT.index("\n## ")]
    assert all(w in first for w in ("make start", "make test", "nbs/images/result.svg"))
    assert len(first.splitlines()) <= 40


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
    fig = figure.figure_of(entry(), "gain")
    assert drawn(fig) == dict(claimed=VALUES, control=CONTROLS)
    said = [fig.get_suptitle(), fig.axes[0].get_title(loc="left"), *(t.get_text() for t in fig.axes[0].texts)]
    assert said[0] == "A & B beat <C>." and "0.03 [0.01, 0.05] · 10 confirm seeds" in said[1]
    assert said[1].startswith("holds here") and "least that counts: 0.02" in said[2]


def test_a_picture_reads_without_its_fonts_and_to_those_who_do_not_see_it():
    root = ET.fromstring(figure.claim_svg(entry(), "gain"))
    assert root.get("role") == "img" and "A & B beat <C>." in root.get("aria-label")
    assert not [e for e in root.iter() if e.tag.endswith("text")]  # letters are outlines
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids)) and len({i.partition("-")[0] for i in ids}) == 1
    back = next(e for e in root.iter() if e.tag.endswith("path") and "fill: #ffffff" in (e.get("style") or ""))
    assert back.get("d").startswith("M 0 ")  # the first thing drawn is white, over the whole picture


def test_two_figures_of_a_page_share_no_id():
    one, two = figure.claim_svg(entry(), "gain"), figure.claim_svg(entry(mean=.04), "gain")
    ids = lambda text: set(re.findall(r'\bid="([^"]+)"', text))
    assert ids(one) and not ids(one) & ids(two)


def test_the_verdict_s_own_seeds_are_drawn_where_more_were_run():
    more = entry()
    more["runs"] += [dict(seed=110 + i, claims=dict(gain=dict(value=.5, control=.5))) for i in range(10)]
    assert drawn(figure.figure_of(more, "gain")) == dict(claimed=VALUES, control=CONTROLS)


@pytest.mark.parametrize("verdict, words", [
    (dict(outcome="not reproduced here", mean=-.05, low=-.07, high=-.03),
     "not reproduced here: accuracy gained -0.05"),
    (dict(stale=True), "(stale)"),
    (dict(outcome="mechanics only", mean=None, low=None, high=None), "mechanics only, control -0.01; 10 ")])
def test_other_outcomes_are_said_as_plainly(verdict, words):
    e = entry(**verdict)
    assert words in figure.sentence(e, "gain")
    assert verdict.get("outcome", "(stale)") in figure.note_of(e, "gain")
    assert verdict.get("outcome", "(stale)") in figure.claim_svg(e, "gain")


def test_own_and_cpu_go_before_others(tmp_path):
    external, later = entry() | dict(external=dict(source="x")), entry() | dict(profile="gpu", date="2026-09-09")
    found, name = figure.result_of(project(tmp_path, external, later, entry()))
    assert found["profile"] == "cpu" and not found["external"] and name == "gain"
    assert figure.result_of(tmp_path/"none") is None


def test_without_a_verdict_the_picture_and_the_caption_say_so(tmp_path):
    assert "No verdict yet" in figure.picture_text(tmp_path)
    assert f"no verdict on {figure.flagship(tmp_path)} yet" in figure.for_readme(figure.MARK, tmp_path)


def test_the_readme_s_technique_is_the_one_that_start_runs(tmp_path):
    (tmp_path/"settings.ini").write_text("[slmkit]\nstart = kd_head, step_by_step\n", encoding="utf-8")
    assert figure.flagship(tmp_path) == "kd_head"
    assert figure.result_of(project(tmp_path, entry())) is None  # the ledger has no entry of kd_head


def test_two_copies_of_quarto_s_settings_are_equal():
    assert (ROOT/"_quarto.yml").read_text() == (ROOT/"nbs/_quarto.yml").read_text()


def test_constraints_name_plain_versions():
    import tomllib
    lines = [l for l in (ROOT/"constraints.txt").read_text().splitlines() if not l.startswith("#")]
    pins = dict(l.split("==") for l in lines)
    assert pins["torch"] == "2.13.0" and pins["nbdev"] == "3.3.26"
    assert all(re.fullmatch(r"[\w.]+", v) for v in pins.values())
    project = tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    wanted = {re.match(r"[\w-]+", d)[0].lower() for d in wanted}
    assert wanted <= {p.lower() for p in pins}, wanted - set(pins)
