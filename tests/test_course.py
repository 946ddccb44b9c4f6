"A course: weeks of lessons and labs, hours and prerequisites told from the lessons, one archive."
import csv, io, json, zipfile
import pytest
import yaml
from conftest import ROOT
from slmkit.core.settings import KitError
from slmkit.project import course as courses
from slmkit.run.notebooks import lessons

def lesson(technique, **more):
    "Facts of a lesson."
    said = dict(technique=technique, name=technique.title(), after=[], able=[], asked=[], points=0, work=0)
    return said | more

A = lesson("a/one", after=["words", "x/old"], able=["count"])
B = lesson("a/two", after=["a/one"], asked=[1], points=3, work=50)
WEEKS = [dict(topic="First", read=[A], lab=[]), dict(topic="Second", read=[A, B], lab=[B], discuss="Why?")]
COURSE = dict(name="c", title="A course", sentence="Short.", level="", prerequisites=["Python"], weeks=WEEKS)

@pytest.mark.parametrize("name", courses.courses(ROOT))
def test_courses_of_the_project_are_whole(name):
    c = courses.course(name, ROOT)
    text = courses.syllabus(c)
    assert len(c["weeks"]) >= 2 and all(w["read"] and w["topic"] in text for w in c["weeks"])
    known = {f["technique"] for w in c["weeks"] for f in w["read"]}
    assert {f["technique"] for w in c["weeks"] for f in w["lab"]} <= known <= set(lessons(ROOT))
    assert all(30 <= courses.minutes(w) <= 300 for w in c["weeks"])

def test_hours_points_and_prerequisites_are_told_from_the_lessons():
    assert [courses.minutes(w) for w in WEEKS] == [15, 80] and courses.hours(80) == "1.3 hours"
    assert courses.read_before(COURSE) == ["Python", "x/old"]  # a/one is read before a/two
    text = courses.syllabus(COURSE | {"class": 2}, lambda t: f"{t}.html")
    assert "4 hours together, 1.6 hours on one's own, in 2 weeks" in text and "[x/old](x/old.html)" in text
    assert "### Week 2: Second" in text and "1 exercises, 3 points, 50 minutes" in text and "**Discuss:** Why?" in text
    assert "**Afterwards you can:** count" in text and "**Points:** 3" in text

@pytest.mark.parametrize("week, said", [(dict(read=["adapt/low_rnk"]), "no lesson 'adapt/low_rnk'.*adapt/low_rank"),
                                        (dict(read=["adapt/low_rank"], lab=["adapt/no"]), "no lab 'adapt/no'")])
def test_what_is_not_there_is_told_in_one_line(week, said, tmp_path, monkeypatch):
    (tmp_path/"mine.yml").write_text(yaml.safe_dump(dict(title="t", weeks=[dict(topic="x") | week])), encoding="utf-8")
    monkeypatch.setattr(courses, "courses", lambda root: dict(mine=tmp_path/"mine.yml"))
    with pytest.raises(KitError, match=f"mine.yml: {said}"): courses.course("mine", ROOT)
    with pytest.raises(KitError, match="no course 'min'.*mine"): courses.course("min", ROOT)

def cell(kind, source, id, **more):
    "A cell of a notebook."
    code = dict(outputs=[], execution_count=None) if kind == "code" else {}
    return dict(cell_type=kind, source=source, id=id, metadata={}) | code | more

PICTURE = dict(output_type="display_data", metadata={}, data={"image/png": "iVBORw0KGgo="})

def test_slides_are_the_tagged_cells_else_headings_and_pictures():
    cells = [cell("markdown", "# Title\n\nFirst.\n\nMore.", "a"), cell("code", "secret = 1", "b"),
             cell("code", "plot()", "c", outputs=[PICTURE]), cell("markdown", "Only words.", "d")]
    shown, code = courses.slide_cells(dict(cells=cells))
    assert [c["id"] for c in shown] == ["a", "c"] and shown[0]["source"] == "# Title\n\nFirst." and not code
    page = courses.slides(dict(cells=cells))
    assert "Title" in page and "iVBORw0KGgo=" in page and "plot()" not in page and "secret" not in page
    cells[1]["metadata"] = dict(tags=["slide"])
    page = courses.slides(dict(cells=cells))
    assert "secret" in page and "First." not in page

def test_the_archive_has_syllabus_labs_sheets_slides_and_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(courses, "course", lambda name, root: COURSE)
    monkeypatch.setattr(courses, "lab_files", lambda t, c, into: {"student/x.ipynb": t, "instructor/x.ipynb": "sheet"})
    monkeypatch.setattr(courses, "load", lambda path: None)
    monkeypatch.setattr(courses, "slides", lambda nb: "<html>")
    for f in (A, B): f["path"] = None
    with zipfile.ZipFile(courses.build("c", tmp_path/"c.zip", ROOT)) as z:
        names, table = z.namelist(), z.read("c/lms/canvas.csv").decode()
        assert z.read("c/week-2/student/x.ipynb") == b"a/two"
    assert names == ["c/syllabus.md", "c/lms/canvas.csv", "c/week-1/slides/a_one.html", "c/week-2/student/x.ipynb",
                     "c/week-2/instructor/x.ipynb", "c/week-2/slides/a_one.html", "c/week-2/slides/a_two.html"]
    head, possible = csv.reader(io.StringIO(table))
    assert dict(zip(head, possible))["A/Two"] == "3" and possible[0] == "    Points Possible"

def test_a_lab_of_the_archive_has_three_notebooks(tmp_path):
    c = dict(labs={"t": ROOT/"tests/fixtures/lab_small.ipynb"})
    made = courses.lab_files("t", c, tmp_path, False)
    assert [n.partition("/")[0] for n in made] == ["student", "solution", "instructor"]
    assert all(json.loads(text)["cells"] for text in made.values())
