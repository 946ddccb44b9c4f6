"The front page is what its sources give: README from the index, picture and figures from the ledger."
import json, re, tempfile
import xml.etree.ElementTree as ET
import pytest
from conftest import ROOT
from slmkit.cli import main as cli
from slmkit.core.figures import png
from slmkit.project.sync import readme
from slmkit.verdicts import figure
from slmkit.core.claims import entries, read_entry
from slmkit.project import front, guide
from slmkit.run.notebooks import lessons
from slmkit.verdicts import table
from slmkit.verdicts.entry import dump
from slmkit.verdicts.ledger import publish

TEXT = (ROOT/"README.md").read_text(encoding="utf-8")
VALUES, CONTROLS = [.02 + .01*i for i in range(10)], [-.02 + .001*i for i in range(10)]
SPEC = dict(work="distilling-step-by-step", says="A & B beat <C>.", metric="accuracy gained", kind="effect", least=.02,
            paper=None, stands="paper", was=None, margin=None, tolerance=None, nominal=None, draws=False,
            mean_over_rows=True, scale=None, value="lambda a: a['ours']", control="lambda a: a['shuffled']")
SHARED = dict(technique="distill/step_by_step", profile="cpu", model="t5-1m", data="word_problems", hardware="cpu-avx2",
              hashes=dict(code="c", model="m", data="d"), status="ok", parameters={}, versions={}, stacked=False)


def records(first, spec=SPEC, **more):
    "Ten records of confirm seeds, with a claim `gain` and more claims: name -> (values, controls)."
    claims = dict(gain=(VALUES, CONTROLS)) | more
    one = lambda x, c: dict(value=x, control=c, arms=dict(ours=x, shuffled=c), rows="ab", n_rows=500, spec=spec)
    return [SHARED | dict(seed=first + i, claims={n: one(x[i], c[i]) for n, (x, c) in claims.items()})
            for i in range(10)]


def entry(*batches, **verdict):
    "A published entry, with some fields of the claim's verdict changed."
    with tempfile.TemporaryDirectory() as folder:
        for b in batches or [records(100)]: path = publish(b, "slmkit confirm", folder)
        e = read_entry(path) | dict(date="2026-01-02")
    e["claims"]["gain"]["verdict"] |= verdict
    return e


def project(folder, *entries):
    "A project with a ledger and nothing else."
    for i, e in enumerate(entries):
        path = folder/f"slmkit/ledger/distill/step_by_step.{i}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dump(e), encoding="utf-8")
    return folder


def drawn(fig):
    "Horizontal places of each row's dots."
    return {line.get_gid(): list(line.get_xdata()) for line in fig.axes[0].lines if line.get_gid()}


def test_readme_is_what_sync_gives():
    index = json.loads((ROOT/"nbs/index.ipynb").read_text(encoding="utf-8"))
    assert TEXT == figure.for_readme(front.filled(readme(index), ROOT), ROOT)


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
    assert all(w in first for w in ("make start", "make test", "nbs/images/result-1.svg"))
    assert "nbs/images/result.svg" in TEXT and len(first.splitlines()) <= 40


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
    assert said[0] == "A & B beat <C>." and "0.065 [0.0404, 0.0896] · 10 seeds" in said[1]
    assert said[1].startswith("holds, in Toyland") and "least that counts: 0.02" in said[2]


def test_the_margin_of_as_good_as_is_drawn():
    close = SPEC | dict(kind="as-good-as", least=None, margin=.05)
    fig = figure.figure_of(entry(records(100, close)), "gain")
    upright = [line.get_xdata()[0] for line in fig.axes[0].lines if list(line.get_ydata()) in ([0, 1], [0, .5])]
    assert upright == [0, -.05, .1] and "above -0.05, control above 0.1" in fig.axes[0].texts[0].get_text()


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
    unsure = [-.1, .14]*5
    more = entry(records(100, unsure=(unsure, CONTROLS)), records(110, unsure=(unsure, CONTROLS)))
    assert len(more["runs"]) == 20 and more["claims"]["unsure"]["verdict"]["n"] == 20
    assert drawn(figure.figure_of(more, "gain")) == dict(claimed=VALUES, control=CONTROLS)


@pytest.mark.parametrize("verdict, words", [
    (dict(outcome="opposite", mean=-.05, low=-.07, high=-.03, share=.2, because=["scale", "Too few words."]),
     "opposite, in Toyland: accuracy gained -0.05, interval -0.07 to -0.03, control -0.0155 (20% of the value)"),
    (dict(outcome="opposite", because=["scale", "Too few words."]), "2026-01-02. Why (scale): Too few words."),
    (dict(stale=True), "(stale), in Toyland"),
    (dict(draws=True), "holds (one model, ten draws)"),
    (dict(n=5), "holds (5 seeds)"),
    (dict(outcome="open", mean=None, low=None, high=None, share=None), "open, in Toyland, control -0.0155; 10 ")])
def test_other_outcomes_are_said_as_plainly(verdict, words):
    e = entry(**verdict)
    assert words in figure.sentence(e, "gain")
    assert verdict.get("outcome", "") in figure.note_of(e, "gain")
    assert words.partition(":")[0].partition(",")[0] in figure.claim_svg(e, "gain")


def test_own_and_cpu_go_before_others(tmp_path):
    external, later = entry() | dict(external=dict(source="x")), entry() | dict(profile="gpu", date="2026-09-09")
    found, name = figure.result_of(project(tmp_path, external, later, entry()))
    assert found["profile"] == "cpu" and not found["external"] and name == "gain"
    assert figure.result_of(tmp_path/"none") is None


def test_the_readme_counts_claims_of_papers_from_the_ledger(tmp_path):
    code = entry(); code["claims"]["gain"]["spec"]["stands"] = "construction"
    said = figure.filled(figure.COUNTS, project(tmp_path, entry(), entry(outcome="open"), code))
    assert said == "- claims of papers, in Toyland: 1 holds, 1 open\n- check of code, counted apart: 1 holds"
    assert re.search("^- claims of papers, ", TEXT, re.M) and figure.COUNTS not in TEXT and figure.MARK not in TEXT


def test_without_a_verdict_the_picture_and_the_caption_say_so(tmp_path):
    assert "No verdict yet" in figure.picture_text(tmp_path)
    assert f"no verdict on {figure.flagship(tmp_path)} yet" in figure.for_readme(figure.MARK, tmp_path)


def test_the_readme_s_technique_is_the_one_that_start_runs(tmp_path):
    (tmp_path/"settings.ini").write_text("[slmkit]\nstart = kd_head, step_by_step\n", encoding="utf-8")
    assert figure.flagship(tmp_path) == "kd_head"
    assert figure.result_of(project(tmp_path, entry())) is None  # the ledger has no entry of kd_head


def test_two_copies_of_quarto_s_settings_are_equal():
    assert (ROOT/"_quarto.yml").read_text(encoding="utf-8") == (ROOT/"nbs/_quarto.yml").read_text(encoding="utf-8")


def test_constraints_name_plain_versions():
    import tomllib
    lines = [l for l in (ROOT/"constraints.txt").read_text(encoding="utf-8").splitlines() if not l.startswith("#")]
    pins = dict(l.split("==") for l in lines)
    assert pins["torch"] == "2.13.0" and pins["nbdev"] == "3.3.26"
    assert all(re.fullmatch(r"[\w.]+", v) for v in pins.values())
    project = tomllib.loads((ROOT/"pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    wanted = {re.match(r"[\w-]+", d)[0].lower() for d in wanted}
    assert wanted <= {p.lower() for p in pins}, wanted - set(pins)


# ---- what the front page says of the project

def test_the_first_screen_says_for_whom_and_where_to_read():
    first = TEXT[:TEXT.index("\n## ")]
    assert all(f"**{w}**" in first for w in ("instructors", "researchers", "readers"))
    assert "https://slmkit.github.io/slmkit/" in first and len(re.findall(r"images/result-\d\.svg", first)) == 4
    order = [TEXT.index(f"\n## {h}") for h in ("The techniques", "Open a notebook", "Three doors")]
    assert order == sorted(order) and all(w in TEXT for w in ("JupyterLab", "VS Code", "Colab"))


def test_four_results_two_of_a_real_model_and_one_that_does_not_hold():
    found = front.cards(ROOT)
    assert len(found) == 4 and len({f["technique"] for f, *_ in found}) == 4
    assert sum("in Toyland" not in outcome for *_, outcome in found) >= 2
    assert not found[-1][3].startswith("holds")
    for i, (f, picture, said, outcome) in enumerate(found, 1):
        root = ET.fromstring((ROOT/f"nbs/images/result-{i}.svg").read_text(encoding="utf-8"))
        assert root.get("aria-label") == said and root.get("width") == "410" and root.get("viewBox")
        assert not [e for e in root.iter() if e.tag.endswith("}text")]  # letters are outlines: whole in any font
        assert f"[{f['name']}](nbs/{f['technique']}.ipynb): {outcome}" in TEXT


def test_the_first_claim_of_a_paper_is_drawn_and_where_asked_one_that_does_not_hold(tmp_path, monkeypatch):
    e = entry(records(100, worse=(CONTROLS, VALUES)))
    monkeypatch.setattr(front, "entries", lambda technique: [e])
    rows = [dict(table.row(e, n), claim=n) for n in ("gain", "worse")]
    assert front.shown_claim(rows) == (e, "gain") and front.shown_claim(rows, failing=True) == (e, "worse")
    code = [rows[0] | dict(stands="construction"), rows[1]]
    assert front.shown_claim(code) == (e, "worse") and front.shown_claim([]) is None


def test_badges_are_true_and_no_font_cuts_them_off():
    said = front.badges(ROOT)
    assert said["techniques"] == len(lessons(ROOT)) and said["Python"] == "3.11+" and said["licence"] == "Apache-2.0"
    assert said["claims judged"] == sum(len(e["claims"]) for e in entries())
    text = (ROOT/"nbs/images/badges.svg").read_text(encoding="utf-8")
    assert text == front.badges_svg(said) and f"![{front.badges_text(said)}](nbs/images/badges.svg)" in TEXT
    words = [e for e in ET.fromstring(text).iter() if e.tag.endswith("}text")]
    ends = [float(e.get("x")) + float(e.get("textLength")) for e in words]
    assert len(words) == 8 and max(ends) < float(ET.fromstring(text).get("width"))


def test_the_table_has_every_technique_by_the_name_of_the_field():
    line = r"^\|[^|]*\| \[([^\]]+)\]\(nbs/(\S+)\.ipynb\) \| (.+) \|$"
    found, links = guide.known(ROOT), re.findall(line, TEXT, re.M)
    assert {t: f["name"] for t, f in found.items()} == {t: name for name, t, _ in links}
    assert not [name for name, _, _ in links if name.endswith("?") or "|" in name]
    step = next(said for _, t, said in links if t == "distill/step_by_step")
    assert step == front.found_text(guide.of(guide.rows_in_order(ROOT), "distill/step_by_step"))


def test_the_guide_knows_lessons_only_and_every_lesson_has_a_situation():
    said, there = guide.guide(ROOT), lessons(ROOT)
    assert set(said["techniques"]) <= set(there) and set(said["results"]) <= set(there)
    assert [t for t, f in guide.known(ROOT).items() if not f["when"]] == []
    pages = [a for f in guide.known(ROOT).values() for a in f["after"] if "/" in a and " " not in a]
    assert set(pages) <= set(there)


def test_outcomes_are_told_by_scale():
    row = dict(technique="a/b-short", stands="paper", outcome="holds", scale="in Toyland")
    rows = [row, row | dict(outcome="open"), row | dict(scale="on a real small model"), row | dict(stands="variant")]
    assert front.found_text(rows) == "*in Toyland:* 1 holds, 1 open; *on a real small model:* 1 holds"
    assert guide.of(rows, "a/b") == rows and guide.of(rows, "a/bc") == []
    assert "checks of our own code" in front.found_text([row | dict(stands="construction")])
    assert "not confirmed" in front.found_text([row | dict(outcome="never run")])
    assert "without claims" in front.found_text([])


def test_the_number_of_works_is_that_of_the_registry():
    works = len(json.loads((ROOT/"slmkit/registry.json").read_text(encoding="utf-8")))
    assert f"the {works} works that this kit is measured against" in TEXT
