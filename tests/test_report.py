"The report of made-up run folders: what it must say, what it must never say, and what changed between two batches."
import csv, io, json, os, re
from html.parser import HTMLParser
import nbformat, pytest
from slmkit.core.claims import read_entry
from slmkit.cli.main import main
from slmkit.core.settings import KitError
from slmkit.verdicts.entry import dump
from slmkit.verdicts.ledger import publish
from slmkit.verdicts.report import BUILD, claim_rows, compare, groups, ledger_text, newest, outcome_of, said
from slmkit.verdicts.report_page import write

PAPER = dict(value=.04, setting="T5", provenance="memory", comparable=["paper"])
SPEC = dict(work="some-work", says="x <beats> y.", paper=PAPER, kind="effect", metric="gain", least=.02,
            stands="paper", was=None, margin=None, tolerance=None, nominal=None, draws=False, mean_over_rows=True,
            scale=None,
            value="lambda a: a['x'] - a['y']", control="lambda a: a['z'] - a['y']")
SHARED = dict(profile="cpu", model="t5-1m", data="facts", hashes=dict(code="c", model="m", data="d"), commit="abc1234",
              date="2026-01-01", versions=dict(torch="2.13"), hardware="cpu-x-1t-torch2.13", cpu_seconds=2.9,
              peak_mb=500., stacked=False)


def record(seed, gain=.05, status="ok", technique="distill/made_up", seconds=3., **change):
    v = gain + ((seed*7) % 10 - 4.5)/300
    arms = dict(x=.5 + v, y=.5, z=.501)
    helps = dict(value=arms["x"] - .5, control=arms["z"] - .5, arms=arms, rows="ab"*8, n_rows=1000, spec=SPEC)
    return SHARED | dict(technique=technique, seed=seed, parameters=dict(seed=seed, alpha=.5), seconds=seconds,
                         claims=dict(helps=helps) if status == "ok" else {}, status=status,
                         error=None if status == "ok" else "ValueError: <script>alert(1)</script>\nsecond line",
                         notebook=f"notebooks/{technique.replace('/', '_')} {seed}.ipynb") | change


def batch(folder, records):
    folder.mkdir(parents=True, exist_ok=True)
    (folder/"records.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def own_ledger(tmp_path, monkeypatch):
    monkeypatch.setenv("SLMKIT_LEDGER", str(tmp_path/"ledger"))


BUILDING, CONFIRMED = [record(s) for s in range(3)], [record(s) for s in range(100, 110)]
NO_VERDICT = ("holds", "opposite", "no effect", "explains most", "does better")


class Page(HTMLParser):
    "Tags that are opened and closed, ids, links and text."
    def __init__(self, html):
        super().__init__(); self.open, self.links, self.ids, self.text, self.wrong = [], [], [], [], []
        self.feed(html)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.links += [a[k] for k in ("href", "src", "xlink:href") if k in a]
        if "id" in a: self.ids.append(a["id"])
        if tag not in ("meta", "br", "input", "link", "img"): self.open.append(tag)
    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag: self.wrong.append(tag)
    def handle_data(self, data): self.text.append(data)


def test_a_report_stands_alone_and_is_well_formed(tmp_path):
    html = write(batch(tmp_path/"run", BUILDING + CONFIRMED)).read_text(encoding="utf-8")
    page = Page(html)
    assert page.wrong == [] and page.open == [] and "<svg" in html and "viewport" in html
    assert not any(re.match(r"https?:|//|file:|data:", l) for l in page.links) and "@import" not in html
    for l in page.links:
        assert not l.startswith("#") or l[1:] in page.ids


def test_building_seeds_are_never_called_a_verdict(tmp_path):
    path = write(batch(tmp_path/"run", BUILDING))
    for f in (path, path.with_suffix(".md"), path.with_suffix(".csv")):
        text = f.read_text(encoding="utf-8")
        assert BUILD in text and not any(w in text for w in NO_VERDICT), f


def test_confirm_seeds_give_the_ledgers_verdict(tmp_path):
    publish(CONFIRMED, "slmkit confirm")
    text = " ".join(Page(write(batch(tmp_path/"run", CONFIRMED + BUILDING)).read_text(encoding="utf-8")).text)
    assert "holds" in text and BUILD in text and "in Toyland" in text
    assert re.search(r"claims of papers, in Toyland: 1 holds\s", text)  # what building seeds gave is not counted
    assert "the effect reaches what counts" in text and "the effect goes the other way" not in text  # words that occur
    assert "0.04 (from memory, unchecked)" in text and "nothing published" not in text


def test_this_batch_beside_the_ledger(tmp_path):
    publish(CONFIRMED, "slmkit confirm")
    [row] = claim_rows([record(s, gain=.01) for s in range(3)])
    assert row["label"] == BUILD and row["mean"] < .02 < row["ledger_low"]
    assert (row["ledger_label"], row["ledger_scale"]) == ("holds", "in Toyland")
    assert row["share"] == pytest.approx(row["control"]/row["mean"])
    assert ledger_text(row).startswith("holds, in Toyland:")


def test_why_a_claim_does_not_hold_stands_beside_the_ledgers_verdict(tmp_path):
    path = publish([record(s, gain=-.05) for s in range(100, 110)], "slmkit confirm")
    e = read_entry(path)
    e["claims"]["helps"]["verdict"]["because"] = ["budget", "It stops after <60> steps."]
    path.write_text(dump(e), encoding="utf-8")
    html = write(batch(tmp_path/"run", BUILDING)).read_text(encoding="utf-8")
    assert "opposite, in Toyland" in html and "why not: budget: It stops after &lt;60&gt; steps." in html


def test_a_further_attempt_is_judged_at_its_own_level(tmp_path):
    small = lambda **change: [record(s, gain=.0215, **change) for s in range(100, 110)]
    assert outcome_of("helps", small()) == "holds"
    for code in "abcdefghij":
        path = publish(small(hashes=dict(code=code, model="m", data="d")), "slmkit confirm")
    [row] = claim_rows(small(hashes=dict(code="k", model="m", data="d")))
    assert row["label"].startswith("open") and len(json.loads(path.read_text(encoding="utf-8"))["attempts"]) == 10


def test_counts_are_of_claims_of_papers(tmp_path):
    own = [record(s) for s in range(100, 110)]
    for r in own: r["claims"]["helps"] |= dict(spec=SPEC | dict(work=None, stands="variant"))
    text = write(batch(tmp_path/"run", own)).read_text(encoding="utf-8")
    assert "our variant, counted apart: 1 holds" in text and "claims of papers" not in text


@pytest.mark.parametrize("records, start", [
    (CONFIRMED[:9], "no verdict: 9 seeds"),
    (CONFIRMED[:9] + [record(109, status="failed")], "no verdict: the run of seed 109 failed"),
    (CONFIRMED[:9] + [record(109, hashes=dict(code="new", model="m", data="d"))],
     "no verdict: records from different code"),
    (CONFIRMED[:9] + [record(109, hashes={})], "no verdict: the record of seed 109 lacks")])
def test_incomplete_confirm_seeds_give_no_verdict(tmp_path, records, start):
    assert outcome_of("helps", groups(records)[0]).startswith(start)
    text = write(batch(tmp_path/"run", records)).read_text(encoding="utf-8")
    assert not any(w in text for w in NO_VERDICT)


def test_runs_of_earlier_code_are_left_out_and_counted(tmp_path):
    new = [record(s, gain=.09, hashes=dict(code="new", model="m", data="d")) for s in range(2)]
    path = write(batch(tmp_path/"run", BUILDING + new))
    rows = list(csv.DictReader(io.StringIO(path.with_suffix(".csv").read_text(encoding="utf-8"))))
    assert [(r["seeds"], float(r["mean"]) > .07) for r in rows] == [("0-1", True)]
    assert "3 runs of earlier code, model or data left out" in path.read_text(encoding="utf-8")


def test_a_torn_line_is_left_out_and_counted(tmp_path):
    run = batch(tmp_path/"run", BUILDING)
    with open(run/"records.jsonl", "a", encoding="utf-8") as f: f.write('{"technique": "distill/ma\n')
    assert "1 torn lines left out" in write(run).read_text(encoding="utf-8")


def test_failures_come_with_their_traceback_and_cannot_inject(tmp_path):
    run = batch(tmp_path/"run", BUILDING + [record(3, status="failed"), record(4, status="oom", error=None)])
    error = dict(output_type="error", traceback=["\x1b[31mTraceback\x1b[0m", "line 3 <b>", "ValueError: no rows"])
    (run/"notebooks").mkdir()
    (run/"notebooks/distill_made_up 3.ipynb").write_text(json.dumps(dict(cells=[dict(outputs=[error])])),
        encoding="utf-8")
    html = write(run).read_text(encoding="utf-8")
    assert "line 3 &lt;b&gt;" in html and "\x1b" not in html and "<script>alert" not in html and "oom" in html
    assert "line 3 <b>" in (run/"report.md").read_text(encoding="utf-8")


def test_links_lead_to_the_executed_notebooks(tmp_path):
    links = Page(write(batch(tmp_path/"run", BUILDING)).read_text(encoding="utf-8")).links
    assert "notebooks/distill_made_up%200.ipynb" in links


def test_a_runs_notebook_opens_as_a_page_that_asks_no_other_host(tmp_path):
    run = batch(tmp_path/"run", BUILDING)
    (run/"notebooks").mkdir()
    done = run/"notebooks/distill_made_up 0.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("6*7")]), done)
    links = Page(write(run).read_text(encoding="utf-8")).links
    assert "notebooks/distill_made_up%200.html" in links and "notebooks/distill_made_up%201.ipynb" in links
    page = done.with_suffix(".html")
    assert 'src="http' not in page.read_text(encoding="utf-8")
    before = page.stat().st_mtime_ns
    write(run)
    assert page.stat().st_mtime_ns == before  # made once

def test_arms_costs_and_environment_are_there(tmp_path):
    text = " ".join(Page(write(batch(tmp_path/"run", BUILDING)).read_text(encoding="utf-8")).text)
    for words in ("x", "0.501", "3 s a run", "500 MB at the peak", "torch", "2.13", "abc1234", "cpu-x-1t-torch2.13"):
        assert words in text


def test_the_ids_of_a_page_are_unique(tmp_path):
    ids = Page(write(batch(tmp_path/"run", BUILDING + CONFIRMED)).read_text(encoding="utf-8")).ids
    assert len(ids) == len(set(ids)) > 20


def test_csv_and_markdown_hold_the_same_lines(tmp_path):
    path = write(batch(tmp_path/"run", BUILDING + CONFIRMED))
    rows = list(csv.DictReader(io.StringIO(path.with_suffix(".csv").read_text(encoding="utf-8"))))
    assert [r["seeds"] for r in rows] == ["0-2", "100-109"] and float(rows[0]["mean"]) == pytest.approx(.035, abs=.02)
    assert path.with_suffix(".md").read_text(encoding="utf-8").count("\n| helps") == 2


def test_sweeps_and_reruns_are_kept_apart_and_together():
    swept = [record(0), record(0, parameters=dict(seed=0, alpha=.9)), record(0, gain=.09)]
    rows = claim_rows(swept)
    assert [r["n"] for r in rows] == [1, 1] and rows[0]["mean"] > .07  # the later run of a seed counts


def test_techniques_stay_together_though_runs_are_mixed(tmp_path):
    mixed = [record(s, technique=t) for s in range(2) for t in ("distill/a", "reason/b")]
    html = write(batch(tmp_path/"run", mixed)).read_text(encoding="utf-8")
    assert html.count('<h2 id="distill-a"') == html.count('<h2 id="reason-b"') == 1


def test_a_record_without_a_spec_breaks_no_report(tmp_path):
    import matplotlib.pyplot as plt
    before = len(plt.get_fignums())
    odd = record(0); odd["claims"]["helps"] = dict(value=.1, control=None, arms={}, spec={})
    path = write(batch(tmp_path/"run", [odd, record(1, status="failed", notebook=None)]))
    assert "can't be drawn" in path.read_text(encoding="utf-8")
    assert len(plt.get_fignums()) == before  # the picture that failed is closed as well


@pytest.mark.parametrize("text, said_", [("", "no records"), ("{}\n", "no records"), ("nonsense", "no records")])
def test_a_folder_that_is_no_batch(tmp_path, text, said_):
    (tmp_path/"records.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(KitError) as e: write(tmp_path)
    assert said_ in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(KitError, match="no records"): write(tmp_path/"missing")
    assert not list(tmp_path.glob("report*")) and not (tmp_path/"missing").exists()


# two batches

AFTER = [record(s, gain=-.05, seconds=6.) for s in range(100, 110)]


def test_what_changed_outcome_and_what_got_slower():
    c = compare(CONFIRMED + [record(0, status="failed")], AFTER + [record(1, status="failed"), record(0)])
    [changed] = [o for o in c["outcomes"] if o["what"] == "outcome"]
    assert (changed["was"]["label"], changed["now"]["label"]) == ("holds", "opposite")
    assert c["times"][0]["was"] == 3. and c["times"][0]["now"] == 6.
    assert c["fail_now"] == [("distill/made_up", "cpu", 1)]
    assert c["work_again"] == [("distill/made_up", "cpu", 0)]


def test_nothing_changed_is_said():
    assert said(compare(BUILDING, BUILDING)) == "nothing changed"


def test_a_small_difference_in_time_is_no_news():
    assert compare(BUILDING, [r | dict(seconds=3.3) for r in BUILDING])["times"] == []


def test_new_and_gone_claims():
    other = [r | dict(technique="reason/other") for r in BUILDING]
    assert {o["what"] for o in compare(BUILDING, other)["outcomes"]} == {"new", "gone"}


def test_the_report_of_two_batches_on_the_command_line(tmp_path, capsys):
    a, b = batch(tmp_path/"before", CONFIRMED), batch(tmp_path/"after", AFTER)
    with pytest.raises(SystemExit) as e: main(["report", str(a), str(b)])
    out = capsys.readouterr().out
    assert e.value.code == 0 and "→ opposite" in out and "3 s → 6 s" in out
    assert "Since before" in (b/"report.html").read_text(encoding="utf-8") and not (a/"report.html").exists()


def test_the_newest_batch_is_taken_where_none_is_named(tmp_path):
    with pytest.raises(KitError, match="no run folder"): newest(tmp_path/"runs")
    batch(tmp_path/"runs/x", BUILDING)
    os.utime(batch(tmp_path/"runs/old", BUILDING)/"records.jsonl", (0, 0))
    assert newest(tmp_path/"runs") == tmp_path/"runs/x"


def test_figures_do_not_pile_up(tmp_path):
    import matplotlib.pyplot as plt
    before = len(plt.get_fignums())
    write(batch(tmp_path/"run", BUILDING + CONFIRMED))
    assert len(plt.get_fignums()) == before
