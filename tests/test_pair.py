"A lesson and its reproductions: what each name stands for, on throw-away pairs."
import json
from pathlib import Path
import pytest
from slmkit.core.settings import KitError
from slmkit.run import notebooks as nbs
from slmkit.run.plan import chosen

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
CLAIM = code('c = claim("c", says="s", metric="m", value=lambda a: a["x"], least=.1)')

@pytest.fixture
def project(tmp_path):
    "A project with a pair that has two reproductions, a first-edition technique, and a lesson alone."
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

def test_editions_are_told_by_where_the_claims_stand(project):
    first = [p.stem for p in nbs.notebooks(project) if nbs.first_edition(p)]
    assert first == ["older"]
    assert [p.stem for p in nbs.notebooks(project) if not nbs.keeps_outputs(p)] == ["older"]
