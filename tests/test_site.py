"The site as its readers meet it: every link leads somewhere, a real browser finds no error, a second build makes only what changed."
import http.server, json, os, re, shutil, subprocess, sys, threading, time
from functools import partial
from pathlib import Path
import pytest
import yaml
from conftest import ROOT, write_notebook
from slmkit.core.settings import KitError
from slmkit.run.notebooks import notebooks
from slmkit.site.build import build
from slmkit.site.links import LOADED, check
from slmkit.site.plan import address

SHOTS = ROOT/".cache/screenshots"
TECHNIQUE = "distill/step_by_step"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The whole site with what outputs are kept, and one technique with a smoke run of its own: (folder, what both builds said)."
    out = tmp_path_factory.mktemp("site")/"site"
    first = build(out, root=ROOT, run=False)
    return out, first, build(out, TECHNIQUE, root=ROOT, jobs=1)

def project(folder, n=2):
    "A project of its own: an index and `n` small technique notebooks."
    (folder/"slmkit").mkdir(parents=True); (folder/"settings.ini").write_text("[slmkit]\n")
    shutil.copy(ROOT/"slmkit/registry.json", folder/"slmkit/registry.json")
    index = write_notebook(folder/"nbs/index.ipynb", parameters=None)
    index.write_text(json.dumps(dict(json.loads(index.read_text()), cells=[markdown("# Mine\n> For me.\n\nText.\n\n```\nmake start\n```")])))
    for i in range(n):
        p = write_notebook(folder/f"nbs/distill/{i % 100:02d}_copy_{i}.ipynb", f"#| default_exp distill.copy_{i}",
            f"#| export\ndef double_{i}(\n    a, # number\n):\n    'Twice.'\n    return 2*a", f"print('came out:', double_{i}({i}))")
        nb = json.loads(p.read_text())
        nb["cells"].insert(0, markdown(f"# Copy {i}\n> One idea.\n\n## A step\n\nSee `double_{i}` and [the start](../index.ipynb).", f"m{i}"))
        p.write_text(json.dumps(nb))
    return folder

def markdown(text, id="m"): return dict(cell_type="markdown", id=id, metadata={}, source=text)

def slmkit(root, *words, timeout=120):
    code = f"from slmkit.cli.main import main; main({list(words)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=timeout,
                          env=os.environ | dict(PYTHONPATH=str(ROOT)))
    return done.returncode, done.stdout + done.stderr

# ---- the pages

def test_every_link_and_anchor_resolves(site):
    out, first, _ = site
    assert first["problems"] == [] and first["links"] > 5000
    problems, links = check(out)
    assert problems == [] and links >= first["links"] - 50

def test_every_notebook_has_a_page_and_a_place_in_the_sidebar(site):
    wanted = {address(p.relative_to(ROOT/"nbs").as_posix()) for p in notebooks(ROOT)}
    titles = [re.search(r"<h1>(.*?)</h1>", (site[0]/u).read_text())[1] for u in wanted]
    assert len(set(titles)) == len(titles), [x for x in titles if titles.count(x) > 1]
    side = re.search(r'<nav id="site-sidebar".*?</nav>', (site[0]/"index.html").read_text(), re.S)[0]
    assert wanted <= set(re.findall(r'href="([^"]+)"', side)) and all((site[0]/u).is_file() for u in wanted)

def test_nothing_is_loaded_from_elsewhere(site):
    for p in site[0].rglob("*.html"): assert not LOADED.findall(p.read_text()), p
    assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//|fetch\(|XMLHttp", (site[0]/"site.css").read_text() + (site[0]/"site.js").read_text())

def test_pages_are_small_whole_and_have_one_title(site):
    for p in site[0].rglob("*.html"):
        text = p.read_text()
        assert len(text) <= 1_000_000, (p, len(text))
        assert text.count("<h1") == 1 and text.rstrip().endswith("</html>") and 'class="skip" href="#site-main"' in text, p
        images = re.findall(r"<img [^>]*>", text)
        assert all(re.search(r'alt="[^"]+"', i) for i in images), p
        ids = re.findall(r'<[a-zA-Z][^<>]*?\sid="([^"]+)"', text)
        assert len(ids) == len(set(ids)), (p, [i for i in ids if ids.count(i) > 1][:3])

def test_field_map_and_ledger_can_be_read_without_scripts(site):
    works = json.loads((ROOT/"slmkit/registry.json").read_text())
    field = (site[0]/"field.html").read_text()
    assert field.count("<tr data-title=") == len(works) and "stands in" in field
    from slmkit.verdicts.table import rows
    assert (site[0]/"ledger.html").read_text().count("<tr data-claim=") == len(rows(ROOT))

def test_home_has_the_field_in_numbers(site):
    text = (site[0]/"index.html").read_text()
    assert f"<b>{len(json.loads((ROOT/'slmkit/registry.json').read_text()))}</b>works of the field" in text
    assert all(w in text for w in ("make</span> start" if "make</span> start" in text else "make start", "Teach", "Reproduce", "Read", "<svg"))

def test_a_technique_page_has_evidence_and_outputs(site):
    from slmkit.core.claims import entries
    text, third = (site[0]/f"{TECHNIQUE}.html").read_text(), site[2]
    assert third["failed"] == [] and third["pages"] == 1
    for e in entries(TECHNIQUE):
        for n, c in e["claims"].items():
            v = c["verdict"]
            assert f'id="claim-{n}"' in text and v["outcome"] in text and f"{v['mean']:.3g} [{v['low']:.3g}, {v['high']:.3g}]" in text
    said = re.sub(r"<[^>]+>", "", text)
    assert "Open in Colab" in text and "slmkit run distill/step_by_step --profile cpu" in said and "labs.html#distill-step_by_step" in text
    assert "Outputs are of a smoke run" in text and 'class="output"' in text and text.index("<svg") < text.index('id="notebook"')
    assert "mutants" not in text and "BEGIN SOLUTION" not in text and "#| " not in re.sub(r"<[^>]+>", "", text).replace("#| slow", "")
    assert "GB" in text and e["hardware"] in text

def test_the_notebook_s_own_figure_heads_the_page(site):
    text = (site[0]/f"{TECHNIQUE}.html").read_text()
    head = text[text.index('id="measured"'):text.index('id="notebook"')]
    name = re.search(r'<img src="\.\./(figures/\w+\.png)" alt="Figure of the claim [\w-]+\."', head)[1]
    assert (site[0]/name).read_bytes()[:4] == b"\x89PNG" and head.index("<img") < head.index("<h3")
    for setting in ("Parameters", "Imports", "Profiles"): assert f"<summary>{setting}</summary>" in text

def test_where_modules_say_their_page_is_there_is_one(site):
    docs = {p: re.search(r'^Docs: \S+/slmkit/([^\s"]+)', p.read_text(), re.M) for p in (ROOT/"slmkit").glob("*/*.py")}
    asked = {m[1] for m in docs.values() if m}
    assert len(asked) > 80 and all((site[0]/a).read_text().startswith("# ") for a in asked)
    text = (site[0]/f"{TECHNIQUE}.html.md").read_text()
    assert "```python" in text and "mutants" not in text and "BEGIN SOLUTION" not in text

def test_students_notebooks_hold_no_solution(site):
    from slmkit.lab.lab import find
    text = (site[0]/"labs/distill_step_by_step.ipynb").read_text()
    assert "NotImplementedError" in text and "mutants" not in text and "label_loss + (1 - alpha)*rationale_loss" not in text
    assert all(e.name in text for e in find(TECHNIQUE, ROOT).exercises)

def test_notebooks_use_no_syntax_of_quarto_alone():
    for p in notebooks(ROOT):
        for c in json.loads(p.read_text())["cells"]:
            if c["cell_type"] == "markdown":
                text = re.sub(r"```.*?```|`[^`]*`", "", "".join(c["source"]), flags=re.S)
                assert not re.search(r"^:::|\{\{<|\]\{[.#]|^\{=html", text, re.M), p

# ---- builds

def test_a_second_build_makes_only_what_changed(tmp_path):
    root, out, runs = project(tmp_path/"p", 3), tmp_path/"out", []
    first = build(out, root=root, jobs=2, say=runs.append)
    assert first["made"] == 3 == len(runs) and first["problems"] == [] == first["failed"]
    text = (out/"distill/copy_1.html").read_text()
    assert "came out: 2" in text and "Open in Colab" in text and 'href="#double_1"' in text and 'href="../index.html"' in text
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.html")}
    again = build(out, root=root, say=runs.append)
    assert again["made"] == 0 and len(runs) == 3
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*.html")}
    path = root/"nbs/distill/copy_1.ipynb"
    path.write_text(path.read_text().replace("## A step", "## Another step"))        # prose: no run
    assert build(out, root=root, say=runs.append)["made"] == 1 and len(runs) == 3
    path.write_text(path.read_text().replace("came out", "there is"))                # code: one run
    assert build(out, root=root, say=runs.append)["made"] == 1 and len(runs) == 4
    assert "there is: 2" in (out/"distill/copy_1.html").read_text()
    path.unlink()
    assert build(out, root=root)["problems"] == [] and not (out/"distill/copy_1.html").exists()

def test_a_failing_notebook_has_a_page_that_says_so(tmp_path):
    root = project(tmp_path/"p", 1)
    path = root/"nbs/distill/copy_0.ipynb"
    path.write_text(path.read_text().replace("print(", "1/0; print("))
    done = build(tmp_path/"out", root=root, jobs=1)
    text = (tmp_path/"out/distill/copy_0.html").read_text()
    assert "ZeroDivisionError" in done["failed"][0] and "The smoke run failed" in text and "ZeroDivisionError" in text

def test_bad_input_is_one_line(tmp_path):
    root = project(tmp_path/"p", 1)
    (tmp_path/"full").mkdir(); (tmp_path/"full/thesis.tex").write_text("mine"); (tmp_path/"file").write_text("")
    for words, says in ((("--only", "copy_9"), "did you mean"), (("--out", str(tmp_path/"full")), "holds files of something else"),
                        (("--out", str(tmp_path/"file")), "is a file")):
        code, said = slmkit(root, "site", "build", *words)
        assert code == 2 and said.count("\n") == 1 and says in said, said
    assert (tmp_path/"full/thesis.tex").read_text() == "mine"
    code, said = slmkit(tmp_path, "site", "build")
    assert code == 2 and said.count("\n") == 1 and "no slmkit project here" in said
    code, said = slmkit(root, "site", "preview", "--port", "99999")
    assert code == 2 and "--port" in said and said.count("\n") == 1

def test_a_damaged_notebook_is_named(tmp_path):
    root = project(tmp_path/"p", 1)
    (root/"nbs/distill/copy_0.ipynb").write_text("{")
    with pytest.raises(KitError, match="00_copy_0.ipynb"): build(tmp_path/"out", root=root)

def test_preview_builds_again_on_a_change(tmp_path):
    from slmkit.site.preview import rebuild, server, watch
    root, out, said = project(tmp_path/"p", 1), tmp_path/"out", []
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    assert rebuild(root, out, say=said.append), said
    s = server(out)
    threading.Thread(target=watch, args=(s, root, out, "", said.append, .2), daemon=True).start()
    time.sleep(.5)
    path = root/"nbs/distill/copy_0.ipynb"; path.write_text(path.read_text().replace("One idea", "Two ideas"))
    end = time.monotonic() + 60
    while not s.builds and time.monotonic() < end: time.sleep(.2)
    s.server_close()
    assert s.builds == 1 and "Two ideas" in (out/"distill/copy_0.html").read_text(), said

# ---- Quarto

def test_quarto_s_settings_are_whole():
    settings = yaml.safe_load((ROOT/"_quarto.yml").read_text())
    html = settings["format"]["html"]
    assert settings["project"]["type"] == "website" and html["theme"] != "cosmo"  # that one loads fonts
    assert html["html-math-method"] == "mathml" and "commonmark" in settings["format"]  # no script from elsewhere; plain text
    for name in settings["metadata-files"]: assert yaml.safe_load((ROOT/"nbs"/name).read_text()), name
    listed = re.findall(r"- (\S+\.ipynb)", (ROOT/"nbs/sidebar.yml").read_text())
    assert all((ROOT/"nbs"/n).is_file() for n in listed)

def with_settings(root):
    "The small project with what nbdev and Quarto ask for."
    from slmkit.project.sync import sidebar
    for name in ("pyproject.toml", "nbs/_quarto.yml", "nbs/nbdev.yml"): shutil.copy(ROOT/name, root/name)
    (root/"nbs/sidebar.yml").write_text(sidebar(root))
    (root/"slmkit/__init__.py").write_text('__version__ = "0"\n')
    return root

STUB = """#!{python}
# Stands where quarto would: each staged notebook becomes a page of its headings and its raw HTML.
import json, re, sys
from pathlib import Path
assert sys.argv[1] == "render" and "--no-execute" in sys.argv
folder = Path(sys.argv[2])
heading = lambda m: '<h2 id="%s">%s</h2>' % (m[1].lower().replace(" ", "-"), m[1])
for p in folder.rglob("*.ipynb"):
    cells = json.loads(p.read_text())["cells"]
    text = "\\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    text += "".join("".join(o.get("data", dict()).get("text/markdown", "")) for c in cells for o in c.get("outputs", []))
    parts = re.findall(r"^```{{=html}}\\n(.*?)\\n```$|^##+ ([^\\n]*)$", text, re.S | re.M)
    body = "".join(raw or heading((0, head)) for raw, head in parts)
    name = re.search(r"output-file: (\\S+)", "".join(cells[0]["source"]))
    out = folder/"_docs"/p.relative_to(folder).with_name(name[1] if name else p.stem + ".html")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("<!doctype html><html><body><h1>By the stub</h1>" + body + "</body></html>")
"""

def test_what_is_made_around_quarto(tmp_path, monkeypatch):
    "Everything but Quarto itself: staging, evidence, outputs, data pages, links; a stub stands where Quarto would."
    from slmkit.site.quarto import build_with_quarto
    root, tools = with_settings(project(tmp_path/"p", 2)), tmp_path/"tools"
    path = root/"nbs/distill/copy_0.ipynb"
    nb = json.loads(path.read_text())
    nb["cells"] += [dict(cell_type="code", id=f"x{i}", metadata={}, outputs=[], execution_count=None, source=s) for i, s in enumerate((
        "#| hidden\n#| hint: secret\nmutants = ['3*a']", "#| export\nclass Pair:\n    'Two numbers.'", "import json\njson.dumps(missing)"))]
    path.write_text(json.dumps(nb).replace("import json\\njson.dumps(missing)", "#| eval: false\\nimport json\\njson.dumps(missing)"))
    tools.mkdir(); (tools/"quarto").write_text(STUB.format(python=sys.executable)); (tools/"quarto").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    done = build_with_quarto(tmp_path/"out", root, jobs=1)
    assert done["problems"] == [] == done["failed"], (done["problems"], done["failed"])
    text, staged = (tmp_path/"out/distill/copy_0.html").read_text(), next((root/"_proc").rglob("*copy_0.ipynb")).read_text()
    assert "By the stub" in text and "Open in Colab" in text and "--ink" in text and 'id="Pair"' in text
    assert "mutants" not in staged and "secret" not in staged and "came out: 0" in staged and "return 2*a" in staged
    home = (tmp_path/"out/index.html").read_text()
    assert "By the stub" not in home and "works of the field" in home and (tmp_path/"out/site.css").is_file()

@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    "A copy of the checkout with its notebooks staged by nbdev: (folder, what was said on stderr)."
    from test_sync import copy_project
    root = copy_project(ROOT, tmp_path_factory.mktemp("staged")/"project")
    code = ("from pathlib import Path; from nbdev.quarto import refresh_quarto_yml; from slmkit.site.quarto import stage; "
            "refresh_quarto_yml(); print(stage(Path.cwd()))")  # nbdev-docs begins with that
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], cwd=root, capture_output=True, text=True, timeout=1500,
                          env=os.environ | dict(PYTHONPATH=str(root)))
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip().splitlines()[-1]), done.stderr, root

def test_nbdev_stages_every_notebook_without_a_word(staged):
    folder, said, root = staged
    assert not re.search(r"error|warning|traceback", said, re.I), said[:2000]
    for name in ("nbs/nbdev.yml", "nbs/_quarto.yml"): assert (root/name).read_text() == (ROOT/name).read_text()
    names = {re.sub(r"^\d+_", "", p.name) for p in notebooks(root)}
    assert names <= {re.sub(r"^\d+_", "", p.name) for p in folder.rglob("*.ipynb")}

def test_staging_keeps_hidden_cells_back_and_shows_a_lesson_s_code(staged):
    texts = {p: json.loads(p.read_text())["cells"] for p in staged[0].rglob("*.ipynb")}
    own = [p for p in texts if p.parent.name not in ("core", "kit", "site", "toyland", "_proc")]
    assert own and not any(re.search(r"^mutants = ", "".join(c["source"]), re.M) for p in own for c in texts[p])
    [path] = [p for p in own if p.name.endswith("step_by_step.ipynb")]
    source = "\n".join("".join(c["source"]) for c in texts[path])
    assert "def step_by_step_loss(" in source and "BEGIN SOLUTION" not in source

def test_staged_notebooks_take_evidence_and_outputs(staged):
    from slmkit.site.build import Build
    from slmkit.site.quarto import enrich
    folder, _, root = staged
    b = Build(root, root/"_site")
    page, outputs = b.pages[f"{TECHNIQUE}.html"], [[dict(output_type="stream", name="stdout", text=["seen\n"])]]*80
    assert enrich(b, folder, {page.url: (dict(status="ok", error=None, cells=outputs), {})}) == 1
    [path] = folder.rglob("*step_by_step.ipynb")
    nb = json.loads(path.read_text())
    text = "".join("".join(c["source"]) for c in nb["cells"])
    assert "What was measured" in text and sum(bool(c.get("outputs")) for c in nb["cells"]) > 10

@pytest.mark.skipif(not shutil.which("quarto"), reason="no quarto on the PATH: its build was not run")
def test_quarto_builds_the_site(tmp_path):
    from slmkit.site.quarto import build_with_quarto
    done = build_with_quarto(tmp_path/"site", ROOT, run=False)
    assert (tmp_path/"site/index.html").is_file() and (tmp_path/"site/field.html").is_file() and done["pages"] > 50

# ---- what a user of the repository expects

def test_workflows_are_whole_and_their_commands_exist():
    import typer
    from slmkit.cli import main as cli
    group = typer.main.get_command(cli.build())
    found = {p.stem: yaml.safe_load(p.read_text()) for p in (ROOT/".github/workflows").glob("*.yml")}
    assert {"test", "site", "smoke"} <= set(found) and all(w["jobs"] for w in found.values())
    text = "".join(p.read_text() for p in (ROOT/".github/workflows").glob("*.yml"))
    assert all(verb in group.commands for verb in re.findall(r"run: slmkit ([a-z]+)", text))
    assert {"macos-latest", "windows-latest", "deploy-pages@v4"} <= set(re.findall(r"[\w@-]+", text))

# ---- a real browser

@pytest.fixture(scope="session")
def browser(site):
    "A chromium without a network but this machine's own server; skips where there is none."
    if not CHROMIUM: pytest.skip("no chromium here: the pages were not looked at in a browser")
    play = pytest.importorskip("playwright.sync_api", reason="no playwright here: the pages were not looked at in a browser")
    handler = partial(type("Quiet", (http.server.SimpleHTTPRequestHandler,), dict(log_message=lambda *a: None)), directory=str(site[0]))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with play.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield b, f"http://127.0.0.1:{server.server_port}/"
        b.close()
    server.shutdown()

@pytest.fixture
def tab(browser):
    "tab(url, width, scheme) opens a page; at the end of the test nothing may have gone wrong in any."
    b, base = browser; wrong, open_ = [], []
    def go(url, width=1280, scheme="light"):
        context = b.new_context(viewport=dict(width=width, height=800), color_scheme=scheme); open_.append(context)
        page = context.new_page()
        page.on("console", lambda m: wrong.append(f"console: {m.text}") if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: wrong.append(f"script: {e}"))
        page.on("requestfailed", lambda r: wrong.append(f"failed: {r.url}"))
        page.on("response", lambda r: wrong.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
        page.on("request", lambda r: wrong.append(f"elsewhere: {r.url}") if not r.url.startswith((base, "data:", "file:")) else None)
        page.goto(url if url.startswith("file:") else base + url)
        return page
    yield go
    for c in open_: c.close()
    assert not wrong, wrong

def shot(page, name):
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(SHOTS/f"{name}.png"))

PAGES = dict(home="index.html", field="field.html", ledger="ledger.html", technique=f"{TECHNIQUE}.html", labs="labs.html", zoo="zoo.html",
             reference="reference.html", library="kit/sync.html", toyland="toyland/toyland.html", guide="add_a_technique.html")

@pytest.mark.parametrize("width", [1280, 380])
@pytest.mark.parametrize("name", PAGES)
def test_pages_fit_the_screen_in_light_and_dark(tab, name, width):
    seen = {}
    for scheme in ("light", "dark"):
        page = tab(PAGES[name], width, scheme)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} is wider than {width} pixels"
        seen[scheme] = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color].join()")
        shot(page, f"{name}-{width}-{scheme}")
    assert seen["light"] != seen["dark"]

def test_no_page_is_wider_than_its_screen(tab, site):
    page, wide = tab("index.html"), []
    base = page.url.removesuffix("index.html")
    for p in sorted(site[0].rglob("*.html")):
        page.goto(base + p.relative_to(site[0]).as_posix())
        for width in (1280, 1000, 700, 380):
            page.set_viewport_size(dict(width=width, height=800))
            if not page.evaluate("document.documentElement.scrollWidth <= innerWidth"): wide.append((width, p.name))
    assert not wide, wide

def test_home_answers_in_one_screen(tab):
    page = tab("index.html")
    for s in ("h1", "#two-commands", ".proof svg:visible", ".numbers", ".door >> nth=2"):
        box = page.locator(s).first.bounding_box()
        assert box and box["y"] + box["height"] <= 800, (s, box)

def test_field_map_is_searched_filtered_and_sorted(tab):
    page = tab("field.html")
    rows = page.locator("tbody tr:visible"); every = rows.count()
    page.fill("#q", "distilling step-by-step outperforming")
    assert rows.count() == 1 and page.inner_text("#n").startswith("1 of")
    rows.locator("summary").click(); assert "How it works" in rows.inner_text()
    page.fill("#q", ""); page.click(".fam button[value=infer]")
    assert 0 < rows.count() < every and set(rows.evaluate_all("r => r.map(x => x.dataset.family)")) == {"infer"}
    page.click(".fam button[value=infer]"); assert rows.count() == every
    outcome = page.locator("#out option").nth(1).get_attribute("value")
    page.select_option("#out", outcome)
    assert 0 < rows.count() < every and all(outcome in o for o in rows.evaluate_all("r => r.map(x => x.dataset.outcomes)"))
    page.select_option("#out", "")
    page.focus("th[data-k=title]"); page.keyboard.press("Enter")
    titles = rows.evaluate_all("r => r.slice(0, 40).map(x => x.dataset.title)")
    assert titles == page.evaluate("t => [...t].sort((a, b) => a.localeCompare(b, 'en', {numeric: true}))", titles)
    shot(page, "field-sorted")

def test_ledger_is_filtered_sorted_and_linked_from_home(tab):
    page = tab("index.html"); page.click(".counts a >> nth=0"); page.wait_for_load_state()
    rows = page.locator("#rows tbody tr:visible"); some = rows.count()
    chosen = page.input_value("select[data-filter=outcome]")
    assert chosen and some and set(rows.evaluate_all("r => r.map(x => x.dataset.outcome)")) == {chosen}
    page.select_option("select[data-filter=outcome]", ""); assert rows.count() >= some
    page.click("th[data-sort=mean]")
    means = [float(m) for m in rows.evaluate_all("r => r.map(x => x.dataset.mean)") if m]
    assert means == sorted(means)
    page.fill(".bar input", "rationales-help"); assert 0 < rows.count() and "rationales-help" in rows.first.inner_text()
    page.locator("main details summary").first.click(); assert "Attempts" in page.locator("main details[open]").first.inner_text()
    shot(page, "ledger-filtered")

def test_search_finds_by_keyboard(tab):
    page = tab("core/claims.html")
    page.keyboard.press("/"); page.keyboard.type("step by step"); page.wait_for_selector("#site-found [role=option]")
    assert page.locator("#site-found [role=option] a").first.get_attribute("href").endswith(f"{TECHNIQUE}.html")
    shot(page, "search")
    page.keyboard.press("ArrowDown"); page.keyboard.press("Enter"); page.wait_for_url(f"**/{TECHNIQUE}.html*")
    page.keyboard.press("/"); page.keyboard.type("load_model"); page.wait_for_selector("#site-found [role=option]")
    page.keyboard.press("ArrowDown"); page.keyboard.press("Enter"); page.wait_for_url("**/core/zoo.html#load_model")

def test_keyboard_menu_theme_and_copy(tab):
    page = tab(f"{TECHNIQUE}.html")
    page.keyboard.press("Tab"); assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter"); assert page.evaluate("document.activeElement.id") == "site-main"
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click(".theme"); dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.reload(); assert dark == page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.locator(".run .copy").click(); page.locator(".run .copy", has_text="Copied").wait_for()  # the clipboard answers later
    narrow = tab(f"{TECHNIQUE}.html", 380)
    assert not narrow.locator("#site-sidebar").is_visible()
    narrow.click(".menu"); assert narrow.locator("#site-sidebar [aria-current=page]").is_visible()
    shot(narrow, "menu-380"); narrow.keyboard.press("Escape"); assert not narrow.locator("#site-sidebar").is_visible()

def test_the_folder_is_read_without_a_server(tab, site):
    page = tab(f"file://{site[0]}/{TECHNIQUE}.html")
    page.fill("#site-find", "teacher hacking"); page.wait_for_selector("#site-found [role=option]")
    page.click("#site-found a >> nth=0"); page.wait_for_url("**/teacher_hacking.html*")

def test_a_link_into_a_folded_part_opens_it(tab):
    page = tab("ledger.html")
    id_ = page.locator("main details[id]").first.get_attribute("id")
    page.evaluate("i => location.hash = i", id_); page.wait_for_timeout(100)
    assert page.locator("main details[id]").first.evaluate("d => d.open")

if __name__ == "__main__":  # python tests/test_site.py 100: seconds for so many small notebooks, measured rather than tested
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        n, out = int(sys.argv[1]), Path(folder, "site")
        root, took = project(Path(folder, "p"), n), {}
        for name in ("first build", "nothing new", "one change"):
            if name == "one change": (p := root/"nbs/distill/copy_0.ipynb").write_text(p.read_text().replace("came out", "is"))
            done = build(out, root=root, jobs=2); took[name] = done["seconds"]
            assert done["failed"] == [] == done["problems"] and done["made"] == {"first build": n, "nothing new": 0, "one change": 1}[name]
        print(json.dumps(dict(notebooks=n, seconds=took, load=os.getloadavg()[0], cores=os.cpu_count(), time=time.strftime("%F"))))
