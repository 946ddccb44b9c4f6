"A whole class hands in: one row a person whatever was uploaded, the roster, tables for Moodle, Canvas and Excel."
import csv, io, json, os, signal, threading, zipfile
from pathlib import Path
import pytest
from slmkit.core.settings import KitError
from slmkit.lab import grade, lab as labs, results, submissions

BOOK = json.dumps(dict(cells=[dict(cell_type="code", source="def soften(x): return x")]))

def zipped(path, files):
    "A zip with texts or bytes by name, each of a later date than the one before."
    with zipfile.ZipFile(path, "w") as z:
        for day, (name, text) in enumerate(files.items(), 1):
            z.writestr(zipfile.ZipInfo(name, (2026, 1, day, 0, 0, 0)), text)
    return path

def handed(tmp_path, files, asked=("soften",)):
    "People by name, of a zip with files."
    got = submissions.people(submissions.submissions([zipped(tmp_path/"class.zip", files)], tmp_path), asked)
    return {p["student"]: p for p in got}

def inner(**files):
    "Bytes of a zip."
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, text in files.items(): z.writestr(name.replace("__", "."), text)
    return out.getvalue()

# ---- one row a person

def test_everybody_of_a_moodle_download_has_one_row(tmp_path):
    at = "{}_{}_assignsubmission_file/{}".format
    files = {at("Ada Love", 1, "lab.ipynb"): BOOK, at("Bob", 2, "lab.zip"): inner(lab__ipynb=BOOK),
             at("Cy", 3, "lab.py"): "def soften(x): return x", at("Di", 4, "lab.ipynb"): BOOK,
             at("Di", 4, "draft.ipynb"): json.dumps(dict(cells=[])),
             "__MACOSX/" + at("Ada Love", 1, "._lab.ipynb"): "x",
             at("Eve", 5, ".ipynb_checkpoints/lab-checkpoint.ipynb"): BOOK, at("Eve", 5, "lab.ipynb"): BOOK,
             at("Fay", 6, "lab.zip"): b"PK no zip", "Ada Love_1_assignsubmission_onlinetext/text.html": "hello"}
    found = handed(tmp_path, files)
    assert list(found) == ["Ada Love", "Bob", "Cy", "Di", "Eve", "Fay"]
    assert [p["id"] for p in found.values()] == list("123456")
    assert [bool(p["path"]) for p in found.values()] == [True, True, False, True, True, False]
    assert found["Cy"]["note"] == "no notebook: lab.py" and found["Fay"]["note"] == "no notebook: lab.zip"
    assert found["Di"]["note"] == "graded lab.ipynb, not draft.ipynb"  # the later one defines nothing of the lab
    assert len({p["key"] for p in found.values()}) == 6

def test_the_newest_notebook_of_a_person_is_graded(tmp_path):
    at = "Ada_1_assignsubmission_file/{}".format
    found = handed(tmp_path, {at("z.ipynb"): BOOK, at("a.ipynb"): BOOK})["Ada"]
    assert found["path"].name == "a.ipynb" and found["note"] == "graded a.ipynb, not z.ipynb"

@pytest.mark.parametrize("names, people", [
    (["ada.ipynb", "bob.ipynb"], "ada bob"),
    (["week/ada.ipynb", "week/bob.ipynb"], "ada bob"),
    (["ada/lab.ipynb", "bob/lab.ipynb"], "ada bob"),
    (["x/ada/lab.ipynb", "x/bob/sub/lab.ipynb"], "ada bob"),
    (["ada/lab.ipynb", "ada/lab2.ipynb", "bob/lab.ipynb"], "ada bob"),
    (["ada/one.ipynb", "bob/two.ipynb", "cy/lab.py"], "ada bob cy"),
    (["1/ada.ipynb", "1/bob.ipynb", "2/cy.ipynb"], "ada bob cy"),
    (["ada.ipynb", "bob.ipynb", "cy.pdf", "grades.csv", "readme.txt"], "ada bob cy"),
    (["ada.ipynb", "bob.ipynb", "cy.zip/lab.ipynb"], "ada bob cy"),
    (["lovelaceada_7_9_lab.ipynb", "raybob_LATE_8_10_lab-1.ipynb"], "lovelaceada raybob")])
def test_names_and_folders_say_whose_it_is(names, people):
    got = submissions.people([(n, Path(n)) for n in names])
    assert [p["student"] for p in got] == people.split() and len({p["key"] for p in got}) == len(got)

def test_a_hostile_zip_does_no_harm(tmp_path, monkeypatch):
    box = tmp_path/"box"
    box.mkdir()
    bad = zipped(tmp_path/"a.zip", {"../../out.ipynb": BOOK, "/tmp/abs.ipynb": BOOK})
    names = [path for _, path in submissions.submissions([bad], box)]
    assert [p.name for p in names] == ["abs.ipynb"] and box in names[0].parents  # what climbs up is left out
    assert not (tmp_path/"out.ipynb").exists() and not Path("/tmp/abs.ipynb").exists()
    deep = inner(lab__ipynb=BOOK)
    for _ in range(6): deep = inner(x__zip=deep)
    (tmp_path/"deep.zip").write_bytes(deep)
    found = submissions.submissions([tmp_path/"deep.zip", zipped(tmp_path/"b.zip", {"a.ipynb": BOOK})], box)
    assert [p.suffix for _, p in found] == [".zip", ".ipynb"]
    monkeypatch.setattr(submissions, "LARGEST", 10)
    with pytest.raises(KitError, match="no notebook"): submissions.submissions([bad], box)

# ---- the roster

MOODLE = "Identifier,Full name,Email address,Grade\nParticipant 1,Ada Love,ada@x.org,\nParticipant 9,Zoë,z@x.org,\n"
CANVAS = "Student,ID,SIS User ID,SIS Login ID,Section,Old\n    Points Possible,,,,,5\n\"Love, Ada\",1,u1,al7,S1,3\n"

@pytest.mark.parametrize("raw, first", [
    (MOODLE.encode("utf-8-sig"), dict(student="Ada Love", id="Participant 1", email="ada@x.org")),
    (CANVAS.encode(), dict(student="Love, Ada", id="1", number="u1", login="al7", section="S1")),
    ("Surname;First name\nGröße;Änne\n".encode("cp1252"), dict(student="Änne Größe", last="Größe", first="Änne")),
    ("Name\tUsername\nAda Love\tal7\n".encode("utf-16"), dict(student="Ada Love", login="al7"))])
def test_a_roster_is_read_as_it_is_exported(raw, first, tmp_path):
    (tmp_path/"r.csv").write_bytes(raw)
    assert submissions.roster(tmp_path/"r.csv")[0] == first

@pytest.mark.parametrize("raw", [b"", b"a,b\n1,2\n", None])
def test_no_roster_is_told_in_one_line(raw, tmp_path):
    if raw is not None: (tmp_path/"r.csv").write_bytes(raw)
    with pytest.raises(KitError, match="roster .*r.csv") as e: submissions.roster(tmp_path/"r.csv")
    assert "\n" not in str(e.value)

def test_the_roster_s_people_come_first_each_once():
    names = ["Ada Love_1_assignsubmission_file/lab.ipynb", "rayzoe_55_1_lab.ipynb", "al.ipynb", "guest.ipynb"]
    got = submissions.people([(n, Path(n)) for n in names])
    rows = [dict(student="Zoë Ray"), dict(student="Cy Moe", id="Participant 1"), dict(student="Al Li"),
            dict(student="Li, Al"), dict(student="Amy", email="al@x.org"), dict(student="Ed")]
    found = submissions.enrolled(got, rows)
    assert [(p["student"], p["path"] and p["path"].name[:3]) for p in found] == [
        ("Zoë Ray", "ray"), ("Cy Moe", "lab"), ("Al Li", None), ("Li, Al", None), ("Amy", "al."), ("Ed", None),
        ("guest", "gue")]
    assert [p["note"] for p in found[2:]] == ["nothing handed in"]*2 + ["", "nothing handed in", "not on the roster"]

def test_a_name_that_two_people_share_is_given_to_neither():
    got = submissions.people([("alli.ipynb", Path("alli.ipynb"))])
    found = submissions.enrolled(got, [dict(student="Al Li"), dict(student="Li, Al")])
    assert [p["path"] for p in found] == [None, None, Path("alli.ipynb")]

# ---- tables

def result(points, **more):
    exercise = dict(function="soften", points=points, of=4)
    return dict(student="Zoë Ray", id="9", points=points, of=4, exercises=[exercise], note="") | more

def rows(text): return list(csv.reader(io.StringIO(text)))

def test_tables_have_the_keys_of_moodle_canvas_and_excel():
    known = result(2.5, number="u9", login="zr", section="S1", email="zr@x.org")
    head, possible, one = rows(results.canvas_table([known], "lab"))
    assert possible == ["    Points Possible", "", "", "", "", "4"]
    assert one == ["Zoë Ray", "9", "u9", "zr", "S1", "2.5"]
    head, one = rows(results.moodle_table([known], "lab"))
    assert dict(zip(head, one)) == {"Identifier": "Participant 9", "Full name": "Zoë Ray", "ID number": "u9",
        "Email address": "zr@x.org", "Grade": "2.5", "Maximum Grade": "4", "Feedback comments": ""}
    text = results.table([known], "lab")
    assert text.encode()[:3] == b"\xef\xbb\xbf" and rows(text[1:])[0][3:5] == ["soften (4)", "lab"]

@pytest.mark.parametrize("why", [dict(missing="nothing to grade"), dict(ungraded="no room")])
def test_what_was_not_graded_is_empty_and_never_zero(why):
    none = result(None, **why)
    for made in (results.table, results.canvas_table, results.moodle_table):
        assert not {"0", "0.0"} & set(rows(made([none], "lab"))[-1])
    assert list(why.values())[0] in results.table([none], "lab")

# ---- grading

def small():
    task = labs.Exercise(name="soften", points=4, cases=6, hint="")
    return labs.Lab(technique="t/small", version="0", digest="d", exercises=[task])

class Pool(grade.ThreadPoolExecutor):
    "A pool that says when what waits has been cancelled."
    stopped = threading.Event()
    def shutdown(self, wait=True, cancel_futures=False):
        super().shutdown(wait=False, cancel_futures=cancel_futures)
        if cancel_futures: self.stopped.set()
        super().shutdown(wait=wait)

@pytest.fixture
def interruptible():
    "Ctrl-C arrives, also where a shell has started the tests in the background, which ignores it."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)

def test_ctrl_c_keeps_what_is_graded(monkeypatch, interruptible):
    monkeypatch.setattr(grade, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(grade, "all_cases", lambda lab, seed: {})
    monkeypatch.setattr(grade, "check_sandbox", lambda *args: None)
    def one(sandbox, lab, drawn, path, slot):
        if path.stem == "b":
            os.kill(os.getpid(), signal.SIGINT)
            assert Pool.stopped.wait(60)
        return grade.total(lab, [grade.no_result(lab.exercises[0], "", 3.)])
    monkeypatch.setattr(grade, "grade_file", one)
    got = grade.grade(["a.ipynb", None, "b.ipynb", "c.ipynb", "d.ipynb"], small(), "x", None, jobs=1)
    assert [r["points"] for r in got] == [3, None, 3, None, None]
    assert ["missing" in r for r in got] == [False, True, False, False, False]
    assert "stopped" in got[3]["ungraded"] and got[3]["exercises"][0]["points"] is None

def test_ctrl_c_does_not_reach_students_code():
    from slmkit.lab.sandbox import Sandbox
    with Sandbox(["json:"]) as box: assert os.getsid(box.process.pid) != os.getsid(0)

def test_a_large_notebook_goes_without_its_outputs(tmp_path, monkeypatch):
    cell = dict(cell_type="code", source="def soften(x): return x", outputs=["x"*5000], id="a")
    path = tmp_path/"a.ipynb"
    path.write_text(json.dumps(dict(cells=[cell])), encoding="utf-8")
    assert grade.contents(path) == path.read_bytes()
    monkeypatch.setattr(grade, "BIG", 4000)
    kept = json.loads(grade.contents(path))["cells"]
    assert kept == [dict(cell_type="code", id="a", source="def soften(x): return x")]
    monkeypatch.setattr(grade, "LARGEST", 4500)
    with pytest.raises(KitError, match="larger than"): grade.contents(path)
