"A lab made from a lesson alone: four kinds of exercise, committed outputs, written answers, an instructor's sheet."
import csv, io, json
import pytest
from conftest import ROOT
from slmkit.lab import build, lab, nbgrader, results, submissions
from slmkit.project.template import new
from slmkit.run import notebooks as nbs

@pytest.fixture
def small(tmp_path):
    "The lab of a new technique whose lesson has the outputs of a run."
    (tmp_path/"settings.ini").write_text("[slmkit]\n", encoding="utf-8")
    (tmp_path/"nbs").mkdir()
    path = new("distill/my_idea", tmp_path)[0]
    nb = nbs.load(path)
    for c in nb["cells"]:
        source = "".join(c["source"])
        if source.startswith("accuracy([vote"):
            c["outputs"] = [dict(output_type="execute_result", execution_count=None, metadata={},
                                 data={"text/plain": ["0.875\n"]})]
        if "#| live" in source and "glance" in source:
            c["outputs"][0]["data"]["text/markdown"].append("\n- **What was measured here:** `voting-helps` opposite")
    path.write_text(json.dumps(nb), encoding="utf-8")
    return lab.read(path)

def built(small, to, monkeypatch):
    "The three notebooks' cells; nothing is run for them."
    monkeypatch.setattr(build, "run_solution", lambda lab: pytest.fail("a lesson is not run"))
    made = build.build(small, to)
    return {k: json.loads(p.read_text(encoding="utf-8"))["cells"] for k, p in made.items()}

def text(cells): return "\n\n".join("".join(c["source"]) for c in cells)

MODEL = "The vote repeats the mistake"  # the model answer to same-mistake

def test_the_student_is_asked_in_four_ways(small, tmp_path, monkeypatch):
    student = text(built(small, tmp_path/"labs", monkeypatch)["student"])
    assert "raise NotImplementedError" in student and "Counter(answers).most_common" not in student
    for name in ("how-many (sweep and read)", "same-mistake (explain)", "weighted (extend)"): assert name in student
    assert "4 exercises, 8 points, about 60 minutes" in student
    assert "0.875" in student and "Expected output" in student

def test_the_student_sees_neither_answers_nor_outcomes(small, tmp_path, monkeypatch):
    cells = built(small, tmp_path/"labs", monkeypatch)["student"]
    student = text(cells)
    hidden = MODEL, "rubric", "<!-- answer", "<!-- exercise", "opposite", "mutants", "#| live", "glance(", 'pip"'
    assert [x for x in hidden if x in student] == []
    assert "**Typical values:** votes: 5 to 40" in student and "](../" not in student
    assert [c["id"] for c in cells if c["id"].startswith("answer-")] == [
        "answer-how-many", "answer-same-mistake", "answer-weighted"]

def test_the_instructor_has_model_answers_and_rubric(small, tmp_path, monkeypatch):
    made = built(small, tmp_path/"labs", monkeypatch)
    sheet = text(made["instructor"])
    assert MODEL in sheet and "- 1: names independence" in sheet and "answers.csv" in sheet
    assert MODEL in text(made["solution"]) and "names independence" not in text(made["solution"])

def test_the_same_lesson_gives_the_same_bytes(small, tmp_path):
    one, two = build.build(small, tmp_path/"one"), build.build(small, tmp_path/"two")
    assert [p.read_bytes() for p in one.values()] == [p.read_bytes() for p in two.values()]

def handed_in(small, tmp_path, answers):
    "A student's notebook with answers by question, in a file."
    path = build.build(small, tmp_path/"labs")["student"]
    nb = json.loads(path.read_text(encoding="utf-8"))
    for c in nb["cells"]:
        name = c["id"].removeprefix("answer-")
        if name in answers: c["source"] = answers[name]
    path = tmp_path/"ada.ipynb"
    path.write_text(json.dumps(nb), encoding="utf-8")
    return path

def test_written_answers_reach_the_instructor(small, tmp_path):
    table = "<!-- your answer: how-many -->\nFrom 1 to 5.\n\n| n | vote |\n|---|---|"
    given = {"how-many": table, "same-mistake": "=1+1"}
    path = handed_in(small, tmp_path, given)
    graded = [dict(lab="distill/my_idea", version="0", source="x", points=2, of=2, exercises=[])]
    results.save(graded, submissions.people([("ada.ipynb", path)]), small, tmp_path/"out")
    rows = list(csv.DictReader(io.StringIO((tmp_path/"out/answers.csv").read_text(encoding="utf-8"))))
    assert [r["Question"] for r in rows] == ["how-many", "same-mistake", "weighted"]
    assert rows[0]["Answer"].startswith("From 1 to 5.\n") and rows[1]["Answer"] == "'=1+1" and rows[2]["Answer"] == ""
    assert {r["Student"] for r in rows} == {"ada"} and [r["Of"] for r in rows] == ["2", "1", "3"]
    assert (tmp_path/"out/canvas.csv").read_text(encoding="utf-8").splitlines()[2] == "ada,,,,,2"

@pytest.mark.parametrize("raw", [b"{", b"[]", b'{"cells": 3}', b'{"cells": [3]}',
                                 b'{"cells": [{"cell_type": "markdown"}]}'])
def test_what_is_no_notebook_has_no_answers(raw): assert results.written_answers(raw) == {}

def test_nbgrader_grades_questions_by_hand(small, tmp_path):
    nb = json.loads(nbgrader.assignment(small, "seed"))
    assert MODEL not in json.dumps(nb) and "opposite" not in json.dumps(nb)
    by_hand = [c["metadata"]["nbgrader"] for c in nb["cells"] if c["cell_type"] == "markdown" and c["metadata"]]
    assert [(m["grade_id"], m["points"], m["grade"], m["solution"]) for m in by_hand] == [
        ("answer-how-many", 2, True, True), ("answer-same-mistake", 1, True, True), ("answer-weighted", 3, True, True)]

def test_the_lab_of_a_lesson_is_proved(small):
    from slmkit.lab.grade import imports_of
    from slmkit.lab.sandbox import Sandbox
    with Sandbox(imports_of([small])) as sandbox: assert build.prove(small, sandbox) == ([], 3)

