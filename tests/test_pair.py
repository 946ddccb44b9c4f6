"A lesson and its reproductions: what each name stands for, on throw-away pairs."
import json, re, shutil
from pathlib import Path
import pytest
import slmkit
from conftest import ROOT
from slmkit.core.settings import KitError
from slmkit.project import check, pair, publish, sync
from slmkit.project.template import new
from slmkit.run import notebooks as nbs
from slmkit.run.plan import chosen, plan

def code(source, *tags): return dict(cell_type="code", id="", source=source, metadata=dict(tags=list(tags)),
                                     outputs=[], execution_count=None)
def words(source): return dict(cell_type="markdown", id="", source=source, metadata={})

def write(path, *cells):
    "A notebook of these cells, each with an id of its own."
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [c | dict(id=f"cell{i}") for i, c in enumerate(cells)]
    nb = dict(cells=cells, metadata=dict(kernelspec=dict(name="python3")), nbformat=4, nbformat_minor=5)
    path.write_text(json.dumps(nb, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path

PARAMETERS = code('profile = "cpu"\nseed = 0', "parameters")
CLAIM = code('c = claim("c", says="s", metric="m", value=lambda a: a["x"], control=lambda a: 0, least=.1)')

@pytest.fixture
def project(tmp_path):
    "A project with a pair that has two reproductions, a notebook with a claim of its own, and a lesson alone."
    (tmp_path/"settings.ini").write_text("[slmkit]\n", encoding="utf-8")
    adapt = tmp_path/"nbs/adapt"
    write(adapt/"low_rank.ipynb", words("# A\n> b"), code("#| default_exp adapt.low_rank"), PARAMETERS)
    write(adapt/"low_rank_repro.ipynb", words("# A, measured\n> b"), PARAMETERS, CLAIM)
    write(adapt/"low_rank_repro_dora.ipynb", words("# A, DoRA\n> b"), PARAMETERS, CLAIM)
    write(adapt/"older.ipynb", words("# B\n> b"), code("#| default_exp adapt.older"), PARAMETERS, CLAIM)
    write(adapt/"zero.ipynb", words("# C\n> b"), code("#| default_exp adapt.zero"), PARAMETERS)
    return tmp_path

# ---- names

def names(found): return [name for name, _ in found]

@pytest.mark.parametrize("typed, wanted", [
    ("adapt/low_rank", ["adapt/low_rank", "adapt/low_rank-dora"]),
    ("low_rank", ["adapt/low_rank", "adapt/low_rank-dora"]),
    ("adapt/low_rank-dora", ["adapt/low_rank-dora"]),
    ("low_rank-dora", ["adapt/low_rank-dora"]),
    ("older", ["adapt/older"]),
    ("zero", ["adapt/zero"]),
])
def test_a_name_stands_for_its_experiments(project, typed, wanted):
    assert names(chosen([typed], root=project)) == wanted

def test_a_name_leaves_out_what_has_not_the_profile(project):
    "As long as something has it; else the refusal names what lacks it."
    path = project/"nbs/adapt/low_rank_repro_dora.ipynb"
    write(path, words("# A, DoRA\n> b"), PARAMETERS, code("cfg = settings(profile, {}, smoke={}, real={})"), CLAIM)
    assert names(chosen(["low_rank"], root=project, profile="cpu")) == ["adapt/low_rank"]
    assert names(chosen(["low_rank"], root=project, profile="real")) == ["adapt/low_rank", "adapt/low_rank-dora"]
    with pytest.raises(KitError, match="low_rank-dora has no profile 'cpu': there is real, smoke"):
        plan(chosen(["low_rank-dora"], root=project, profile="cpu"), "cpu", [0])

def test_lesson_stands_for_the_lesson(project):
    (name, path), = chosen(["low_rank"], root=project, lesson=True)
    assert name == "adapt/low_rank.lesson" and path.name == "low_rank.ipynb"
    assert names(chosen(["older"], root=project, lesson=True)) == ["adapt/older"]

def test_a_path_is_itself(project, tmp_path):
    at = project/"nbs/adapt"
    given = [str(at/f"{n}.ipynb") for n in ("low_rank", "low_rank_repro", "low_rank_repro_dora", "older")]
    assert names(chosen(given, root=project)) == ["adapt/low_rank.lesson", "adapt/low_rank", "adapt/low_rank-dora",
                                                  "adapt/older"]
    assert chosen([str(at/"low_rank.ipynb")], root=project)[0][1] == (at/"low_rank.ipynb").resolve()

def test_a_notebook_of_ones_own_needs_no_project(tmp_path):
    path = write(tmp_path/"mine/idea_repro.ipynb", PARAMETERS, CLAIM)
    assert chosen([str(path)], root=tmp_path) == [("idea", path.resolve())]

def test_all_and_family_take_every_experiment_once(project):
    every = ["adapt/low_rank", "adapt/low_rank-dora", "adapt/older", "adapt/zero"]
    assert names(chosen([], all=True, root=project)) == names(chosen([], family="adapt", root=project)) == every
    lessons = names(chosen([], all=True, root=project, lesson=True))
    assert lessons == ["adapt/low_rank.lesson", "adapt/older", "adapt/zero"]

def test_an_unknown_name_is_told_with_the_nearest(project):
    with pytest.raises(KitError, match="did you mean 'low_rank-dora'"): chosen(["low_rank-dor"], root=project)

def test_a_reproduction_stands_after_its_lesson_in_every_list(project):
    (project/"nbs/adapt/_order.yml").write_text("- zero\n- low_rank\n", encoding="utf-8")
    listed = [p.stem for p in nbs.notebooks(project)]
    assert listed == ["zero", "low_rank", "low_rank_repro", "low_rank_repro_dora", "older"]
    assert list(nbs.lessons(project)) == ["adapt/zero", "adapt/low_rank", "adapt/older"]

def test_claims_belong_to_the_reproduction_that_declares_them(project):
    found = [(c["technique"], Path(c["notebook"]).name) for c in nbs.declared(project)]
    assert found == [("adapt/low_rank", "low_rank_repro.ipynb"), ("adapt/low_rank-dora", "low_rank_repro_dora.ipynb"),
                     ("adapt/older", "older.ipynb")]

# ---- the contract

UNPUBLISHED = {f"{n}.ipynb" for n in  # it may only shrink
               "low_rank_repro_banking step_by_step_repro_esnli".split()}

def test_every_pair_of_the_project_is_published():
    pages = [p for p in nbs.notebooks(ROOT) if p.parent.name in nbs.TECHNIQUES and nbs.keeps_outputs(p)]
    assert {p.name for p in pages if not nbs.read(p)["metadata"].get("slmkit")} <= UNPUBLISHED

SECOND = list(nbs.lessons(ROOT).values())
DRAWS = re.compile(r"torch\.(rand|randn|randint|randperm|normal)\(|np\.random\.(?!default_rng\(\w)")
SEEDS = re.compile(r"seed_everything\(|torch\.manual_seed\(")

@pytest.mark.parametrize("path", SECOND, ids=lambda p: p.stem)
def test_a_lesson_shows_the_same_numbers_each_time(path):
    "What a lesson draws for its reader is drawn from a generator, or after a seed."
    seeded = False
    for source, _ in nbs.sources(nbs.read(path)):
        for line in source.splitlines():
            if line.startswith(" "): continue  # of a function: it draws where it is called
            seeded = seeded or SEEDS.search(line)
            assert seeded or not DRAWS.search(line) or "generator" in line, line

@pytest.mark.parametrize("path", SECOND, ids=lambda p: p.stem)
def test_a_lesson_installs_this_version(path):
    told = [v for source, _ in nbs.sources(nbs.read(path)) for v in re.findall(r"refs/tags/v(.+)\.tar\.gz", source)]
    assert told == [slmkit.__version__]

@pytest.fixture
def made(tmp_path):
    "The two notebooks of a new technique."
    (tmp_path/"settings.ini").write_text("[slmkit]\n", encoding="utf-8")
    (tmp_path/"nbs").mkdir()
    return new("distill/my_idea", tmp_path)

def changed(path, change):
    "The notebook after `change(source) -> source` of every cell."
    nb = nbs.load(path)
    for c in nb["cells"]: c["source"] = change("".join(c["source"])).splitlines(True)
    path.write_text(json.dumps(nb), encoding="utf-8")
    return path

def test_the_templates_break_nothing(made): assert [check.notebook_problems(p) for p in made] == [[], []]

@pytest.mark.parametrize("old, new, line", [
    ("#| headline voting-helps", "1", "0 cells `#| headline"),
    ("#| headline voting-helps", "#| headline voting-help", "no claim of its reproductions: 'voting-help'"),
    ("#| hide", "#| hidden", "no install cell"),
    ("#| default_exp distill.my_idea", "#| default_exp distill.idea", "no `#| default_exp distill.my_idea`"),
    ("cite(", "print(", "#| live knows no 'print'"),
    ('cite("self-ensemble-icl-calibration")', "cite(slug)", "one call of cite or glance with values written out"),
    ("self-ensemble-icl-calibration", "self-ensemble-icl-calibratio", "no work 'self-ensemble-icl-calibratio'"),
    ("minutes=60", "minutes=70", "the words of glance(...) are not today's: run slmkit sync"),
    ("$$", "$", "no displayed formula"),
    ("#| test", "#| tried", "exercise vote: no #| test cell"),
    ('profile = "cpu"', 'profile = "smoke"', "which no reader is shown"),
    ("smoke=dict(", "gpu=dict(", "the profile table has no smoke"),
    ("seed = 0 ", "sead = 0 ", "the parameters cell sets no seed"),
    ("name=weighted", "", "needs a name, as name=where-to-use"),
    ("exercise: extend", "exercise: extent", "no kind of question 'extent': did you mean 'extend'"),
    ("answer: weighted", "answer: weights", "an answer to 'weights': did you mean 'weighted'"),
    ("statistics.mode", "statistics.mode" + " "*120, "characters (at most 120)"),
    ("> One sentence", "One sentence", "the first cell needs a title"),
])
def test_check_names_each_breach_of_a_lesson(made, old, new, line):
    found = check.notebook_problems(changed(made[0], lambda s: s.replace(old, new)))
    assert any(line in f for f in found), found
    assert all("\n" not in f for f in found) and len(found) <= 3

@pytest.mark.parametrize("old, new, line", [
    ("settings(profile", "dict(profile", "no profile table"),
    ("claim(", "say(", "no claim: declare one"),
    (".record(", ".keep(", "nothing is recorded"),
    ("expect(voting", "repr(voting", "no expect(claim, ...)"),
    ("import random", "import random\nfrom slmkit.toyland.world import World", "it imports slmkit.toyland.world"),
    ("## The claim", "## The claim\n" + "\n".join("x" for _ in range(2)), ""),
    ("arms = Arms", "#| export\narms = Arms", "a reproduction exports nothing"),
    ("seed = 0 ", "sead = 0 ", "the parameters cell sets no seed"),
])
def test_check_names_each_breach_of_a_reproduction(made, old, new, line):
    found = check.notebook_problems(changed(made[1], lambda s: s.replace(old, new)))
    assert any(line in f for f in found) if line else found == []
    assert all("\n" not in f for f in found) and len(found) <= 2

def test_a_lesson_is_short_enough_for_one_sitting(made):
    nb = nbs.load(made[0])
    seen = len(pair.visible(nb))
    more = [words(f"Remark {i}.") | dict(id=f"more{i}") for i in range(46 - seen)]
    made[0].write_text(json.dumps(nb | dict(cells=nb["cells"] + more)), encoding="utf-8")
    assert check.notebook_problems(made[0]) == ["46 cells that a reader sees (at most 45)"]

def test_the_picture_stands_early(made):
    nb = nbs.load(made[0])
    i = next(i for i, c in enumerate(nb["cells"]) if "#| plot" in "".join(c["source"]))
    nb["cells"].append(nb["cells"].pop(i))
    made[0].write_text(json.dumps(nb), encoding="utf-8")
    found, = check.notebook_problems(made[0])
    assert found == "no picture (a plot, or an <svg> in Markdown) within its first 10 content cells"

def test_a_lab_needs_all_four_kinds_and_what_grading_needs(made):
    switched_on = changed(made[0], lambda s: s.replace("#| default_exp", "#| lab\n#| default_exp"))
    assert check.notebook_problems(switched_on) == []
    found = check.notebook_problems(changed(made[0], lambda s: s.replace("#| hint: ", "#| note: ").replace(
        "exercise: extend", "exercise: explain").replace("<!-- rubric -->", "")))
    assert [f for f in found if "hint" in f] and [f for f in found if "no model answer or no rubric" in f]
    assert "#| lab without an exercise of the kind 'extend'" in found

def test_an_orphan_is_named(made):
    made[0].unlink()
    assert "its lesson my_idea.ipynb is not there" in check.notebook_problems(made[1])[0]

# ---- the headline and the ledger

def ledger(folder, technique, **outcomes):
    "A ledger of one file."
    claims = {n: dict(verdict=dict(outcome=o), spec={}) for n, o in outcomes.items()}
    path = folder/f"{technique}.cpu.m.d.h.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = dict(technique=technique, profile="cpu", claims=claims, arms=[], runs=[])
    path.write_text(json.dumps(entry), encoding="utf-8")
    return folder

@pytest.mark.parametrize("head, outcome, line", [
    ("voting-helps", "holds", ""),
    ("voting-helps", "opposite", "the headline leans on 'voting-helps', the ledger says: opposite"),
    ("voting-helps", "open", "the headline leans on 'voting-helps', the ledger says: open"),
    ("voting-helps", "no effect that counts", "the ledger says: no effect that counts"),
    ("not voting-helps", "opposite", ""),
    ("not voting-helps", "holds", "the headline says that 'voting-helps' does not hold, the ledger says: holds"),
])
def test_the_headline_says_what_the_ledger_says(made, tmp_path, head, outcome, line):
    path = changed(made[0], lambda s: s.replace("#| headline voting-helps", f"#| headline {head}"))
    folder = ledger(tmp_path/"ledger", "distill/my_idea", **{"voting-helps": outcome})
    found = pair.headline_problems(path, nbs.read(path), folder)
    assert [line in f for f in found] == [True]*bool(line), found

def test_a_headline_may_lean_on_either_reproduction(made, tmp_path):
    folder = ledger(tmp_path/"ledger", "distill/my_idea-other", **{"voting-helps": "holds"})
    assert pair.headline_problems(made[0], nbs.read(made[0]), folder) == []

def test_a_claim_that_does_not_hold_needs_its_reason(made, tmp_path):
    folder = ledger(tmp_path/"ledger", "distill/my_idea", **{"voting-helps": "opposite"})
    texts = [s for s, _ in nbs.sources(nbs.read(made[1]))]
    assert "say why with because" in pair.reason_problems(made[1], texts, folder)[0]
    assert pair.reason_problems(made[1], [*texts, 'because(voting_helps, "power", "Too few.")'], folder) == []
    assert pair.reason_problems(made[1], [*texts, 'because(voting_helps, "power", WORDS)'], folder)  # can't be read

# ---- outputs

TEXT = dict(output_type="stream", name="stdout", text="42\n")
NOISE = dict(output_type="stream", name="stderr", text=" 10%|#  |\n")
IMAGE = dict(output_type="display_data", metadata={},
             data={"image/png": "iVBORw0KGgo=\n", "text/plain": "<Figure at 0x7f>"})

def pretend(monkeypatch, *outputs, **record):
    "Let `publish` take these outputs for every code cell instead of running anything."
    def executed(path, profile, folder, force=False, kind="quiet"):
        nb = nbs.load(path)
        for c in nb["cells"]:
            if c["cell_type"] == "code": c["outputs"] = [dict(o) for o in outputs]
        nb["cells"].insert(3, code("seed = 0", "injected-parameters") | dict(id="injected", outputs=[TEXT]))
        return nb, dict(cpu_seconds=1) | record
    monkeypatch.setattr(publish, "executed", executed)

def published(made, tmp_path, monkeypatch, *outputs):
    pretend(monkeypatch, *outputs)
    return [publish.publish_one(p, tmp_path/"runs") for p in made]

def test_publish_stores_outputs_by_cell(made, tmp_path, monkeypatch):
    assert published(made, tmp_path, monkeypatch, TEXT, NOISE) == made
    for p in made:
        nb = nbs.read(p)
        assert "injected" not in {c["id"] for c in nb["cells"]} and publish.outputs_problem(p) == ""
        texts = [o.get("text") for c in nb["cells"] if c["cell_type"] == "code" and not publish.is_live(c)
                 for o in c["outputs"]]
        assert texts and set(map("".join, texts)) == {"42\n"}
        said = nb["metadata"]["slmkit"]
        assert (said["edition"], said["profile"], said["seed"], len(said["outputs"])) == (2, "cpu", 0, 64)

def test_publishing_the_same_again_changes_nothing(made, tmp_path, monkeypatch):
    published(made, tmp_path, monkeypatch, TEXT)
    before = [p.read_bytes() for p in made]
    assert published(made, tmp_path, monkeypatch, TEXT | dict(text=["42\n"])) == [None, None]
    assert [p.read_bytes() for p in made] == before
    assert published(made, tmp_path, monkeypatch, TEXT | dict(text="43\n")) == made

def test_sync_keeps_what_was_published(made, tmp_path, monkeypatch):
    published(made, tmp_path, monkeypatch, TEXT, IMAGE)
    assert [sync.clean(p) for p in made] == [None, None]

def test_saving_in_jupyter_is_no_change(made, tmp_path, monkeypatch):
    import nbformat
    published(made, tmp_path, monkeypatch, TEXT, IMAGE)
    for p in made:
        nbformat.write(nbformat.read(p, 4), p)
        assert publish.outputs_problem(p) == ""

def test_a_run_of_ones_own_is_told_with_the_remedy(made, tmp_path, monkeypatch):
    published(made, tmp_path, monkeypatch, TEXT)
    nb = nbs.load(made[0])
    next(c for c in nb["cells"] if c.get("outputs") and not publish.is_live(c))["outputs"] = [TEXT | dict(text="41\n")]
    made[0].write_text(json.dumps(nb), encoding="utf-8")
    found, = check.notebook_problems(made[0])
    assert "not those that were published: slmkit publish distill/my_idea, or git checkout my_idea.ipynb" in found

def test_outputs_that_were_never_published_are_told(made):
    nb = nbs.load(made[1])
    nb["cells"][1]["outputs"] = [TEXT]
    made[1].write_text(json.dumps(nb), encoding="utf-8")
    assert len(check.notebook_problems(made[1])) == 1 and "no outputs yet" in publish.outputs_note(made[1])

def test_outputs_older_than_the_code_are_listed_and_not_failed(made, tmp_path, monkeypatch):
    published(made, tmp_path, monkeypatch, TEXT)
    assert [publish.outputs_note(p) for p in made] == ["", ""]
    for p in made: changed(p, lambda s: s.replace('right=.6', 'right=.7'))
    assert [check.notebook_problems(p) for p in made] == [[], []]
    assert all("older than its code: slmkit publish distill/my_idea" in publish.outputs_note(p) for p in made)

def test_a_picture_needs_words(made, tmp_path, monkeypatch):
    published(made, tmp_path, monkeypatch, IMAGE)
    found = check.notebook_problems(made[1])
    assert found and all("a picture without `#| fig-alt" in f for f in found)
    assert not any("voting_helps.plot()" in f for f in found)

def test_a_slow_lesson_is_not_stored(made, tmp_path, monkeypatch):
    pretend(monkeypatch, TEXT, cpu_seconds=61)
    before = made[0].read_bytes()
    with pytest.raises(KitError, match="took 61 CPU s, a lesson takes at most 60"):
        publish.publish_one(made[0], tmp_path/"runs")
    assert made[0].read_bytes() == before and publish.publish_one(made[1], tmp_path/"runs") == made[1]

def test_a_heavy_notebook_is_not_stored(made, tmp_path, monkeypatch):
    pretend(monkeypatch, TEXT | dict(text="x"*20_000))
    with pytest.raises(KitError, match="bytes, at most 120,000: the largest output is that of"):
        publish.publish_one(made[0], tmp_path/"runs")

def test_publish_names_what_it_takes(project, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(publish, "publish_one", lambda path, *rest: taken.append(path.stem))
    for typed, lesson in (("low_rank", False), ("low_rank", True), ("low_rank-dora", False), ("zero", False)):
        publish.publish(typed, tmp_path, lesson, root=project)
    assert taken == ["low_rank", "low_rank_repro", "low_rank_repro_dora", "low_rank", "low_rank_repro_dora", "zero"]

def test_a_real_run_is_published_twice_without_a_second_run(tmp_path):
    "With papermill, pictures and all: the injected cell stays out, a picture is small and carries no software field."
    import base64
    path = write(tmp_path/"nbs/adapt/tiny.ipynb", words("# T\n> s"), code("#| default_exp adapt.tiny"), PARAMETERS,
                 code("#| plot\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()"),
                 code("import sys\nprint('noise', file=sys.stderr)\nprint(profile, seed)"), code("#| real\n1/0"))
    assert publish.publish_one(path, tmp_path/"runs", "smoke") == path  # tests run nothing but smoke
    nb = nbs.read(path)
    assert [c["id"] for c in nb["cells"]] == [f"cell{i}" for i in range(6)]
    shown, = [o for o in nb["cells"][3]["outputs"] if "data" in o]
    png = base64.b64decode("".join(shown["data"]["image/png"]))
    assert b"Software" not in png and b"pHYs" in png and int.from_bytes(png[16:20], "big") < 480
    assert ["".join(o["text"]) for o in nb["cells"][4]["outputs"]] == ["smoke 0\n"]
    assert "skipped at smoke" in "".join(nb["cells"][5]["outputs"][0]["text"])
    assert publish.publish_one(path, tmp_path/"runs", "smoke") is None
    assert len(list((tmp_path/"runs").glob("*/record.json"))) == 1

# ---- the page

def staged(root, to, name):
    "The staged cells of a page."
    from slmkit.site.stage import stage
    stage(root, to)
    return json.loads((to/name).read_text(encoding="utf-8"))["cells"]

@pytest.fixture
def site(made, tmp_path):
    "A project with the pair, its module, a first page, and the lesson that it asks to be read first."
    (tmp_path/"slmkit/distill").mkdir(parents=True)
    (tmp_path/"slmkit/distill/my_idea.py").write_text('"An idea."\n# AUTOGENERATED!\n', encoding="utf-8")
    shutil.copy(ROOT/"slmkit/registry.json", tmp_path/"slmkit/registry.json")
    write(tmp_path/"nbs/index.ipynb", words("# Mine\n> For me."))
    write(tmp_path/"nbs/adapt/first_steps.ipynb", words("# First steps\n> Start here."))
    return tmp_path

def test_the_pages_of_a_pair(site, tmp_path):
    cells = staged(tmp_path, tmp_path/"src", "distill/my_idea.ipynb")
    text = "\n".join(c["source"] for c in cells)
    for unseen in ("<!--", "repeats the mistake", "names independence", "headline", "pip", "cite(", "glance("):
        assert unseen not in text, unseen
    assert "[arXiv:2312.13772](https://arxiv.org/abs/2312.13772)" in text
    assert "**Typical values:** votes: 5 to 40" in text
    assert "*Sweep and read: 2 points, 15 minutes, difficulty 1 of 3.*" in text
    assert "[my_idea, measured](my_idea_repro.ipynb)" in text and "{toctree}" in text
    plot = next(c for c in cells if "plt.plot" in c["source"])
    assert plot["metadata"]["mystnb"]["image"]["alt"].startswith("How often a vote is right")
    listed = (tmp_path/"src/distill/index.md").read_text(encoding="utf-8")
    assert "my_idea.ipynb" in listed and "my_idea_repro" not in listed
    measured = "\n".join(c["source"] for c in staged(tmp_path, tmp_path/"src", "distill/my_idea_repro.ipynb"))
    assert "slmkit run distill/my_idea --profile cpu" in measured and "arms.record" in measured

def test_sphinx_finds_nothing_amiss_in_a_pair(site, tmp_path):
    pytest.importorskip("sphinx")
    from slmkit.site.build import build
    assert build(tmp_path/"out", root=site)["problems"] == []
    page = (tmp_path/"out/distill/my_idea.html").read_text(encoding="utf-8")
    assert 'href="my_idea_repro.html"' in page and 'href="../adapt/first_steps.html"' in page
    assert '<math' in page and 'display="block"' in page
