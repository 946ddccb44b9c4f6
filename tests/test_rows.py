"Files that people bring: every kind is read right, or refused in one line with file, line, column and what to do."
import codecs, gzip, json
from collections import Counter
import pytest
from slmkit.core import data, rows
from slmkit.core.data import load
from slmkit.core.rows import read_rows
from slmkit.core.settings import KitError

@pytest.fixture(autouse=True)
def said_anew(): rows.say_once.cache_clear()

@pytest.fixture
def write(tmp_path):
    "Write a file (text, bytes or a list of rows as JSON lines) and give its path as text."
    def make(name, content):
        if isinstance(content, list): content = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in content)
        path = tmp_path/name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return str(path)
    return make

def refused(path, *words, **how):
    "The one line that refuses a file; it names the file and has all words."
    with pytest.raises(KitError) as e: load(path, **how)
    line = str(e.value)
    assert "\n" not in line and path in line, line
    assert all(w in line for w in words), line
    return line

def inputs(path, split="train", **how): return load(path, split, **how)["input"][:]

# ---- 7: a split column

def test_a_split_column_is_kept(write, capsys):
    marked = [dict(input=f"q{i}", label="a", split="train" if i < 4 else "test") for i in range(20)]
    path = write("m.jsonl", marked)
    assert inputs(path) == [f"q{i}" for i in range(4)] and len(load(path, "test")) == 16
    assert capsys.readouterr().out == f"{path}: 4 train, 0 valid, 16 test rows, as its column split says\n"
    assert load(path).column_names == ["input", "label", "id"]
    with pytest.raises(KitError, match="no valid rows"): load(path, "valid")

@pytest.mark.parametrize("word, split", [("train", "train"), ("valid", "valid"), ("validation", "valid"),
    ("dev", "valid"), ("test", "test"), (" Test ", "test"), ("DEV", "valid")])
def test_words_of_a_split_column(write, word, split):
    path = write("m.jsonl", [dict(input="q", label="a", split=word)])
    assert inputs(path, split) == ["q"]

def test_an_unknown_word_of_a_split_column_is_refused(write):
    path = write("m.csv", "input,label,split\nq,a,train\nr,b,holdout\n")
    refused(path, "line 3", "column 'split'", "'holdout'", "validation")

def test_a_split_column_of_another_name(write):
    path = write("m.csv", "input,label,fold\nq,a,train\nr,b,test\n")
    assert inputs(path, "test", columns="split=fold") == ["r"]

def test_a_division_by_checksum_is_said_once(write, capsys):
    path = write("m.jsonl", [dict(input=f"{i} ?", label="a") for i in range(64)])
    parts = {s: set(inputs(path, s)) for s in ("train", "valid", "test", "train")}
    assert sum(map(len, parts.values())) == 64 == len(set().union(*parts.values()))
    counts = Counter({s: len(p) for s, p in parts.items()})
    assert capsys.readouterr().out.splitlines() == [f"{path}: {counts['train']} train, {counts['valid']} valid, "
        f"{counts['test']} test rows, by a checksum of the input (it has no column split)"]

# ---- 8: cells that are missing, or neither text nor number

@pytest.mark.parametrize("column", ["input", "label"])
@pytest.mark.parametrize("cell, words", [("null", "is missing"), ("NaN", "is missing"), ("[1, 2]", "a list"),
    ('{"a": 1}', "an object"), ("true", "true or false"), ("Infinity", "a float")])
def test_a_json_cell_that_is_no_text_is_refused(write, column, cell, words):
    bad = json.dumps(dict(input="q", label="a") | {column: "CELL"}).replace('"CELL"', cell)
    refused(write("m.jsonl", [dict(input="p", label="b"), "", bad]), "line 3", f"column '{column}'", words)
    refused(write("m.json", f"[{json.dumps(dict(input='p', label='b'))}, {bad}]"), "row 2", f"column '{column}'", words)

@pytest.mark.parametrize("line, column", [(",a", "input"), ("q,", "label"), ("q", "label")])
def test_a_missing_csv_cell_is_refused(write, line, column):
    refused(write("m.csv", f"input,label\np,b\n{line}\n"), "line 3", f"column '{column}' is missing", "fill it")

def test_words_that_only_look_missing_are_text(write):
    path = write("m.csv", "input,label,split\nNone,nan,train\nNA,null,train\n")
    assert list(zip(inputs(path), load(path)["label"])) == [("None", "nan"), ("NA", "null")]

def test_numbers_are_text(write):
    path = write("m.jsonl", [dict(input=1.5, label=2, split="train"), dict(input="", label="b", split="train")])
    assert inputs(path) == ["1.5", ""] and load(path)["label"][:] == ["2", "b"]

def test_a_cell_of_a_joined_input_is_held_to_the_same(write):
    path = write("m.jsonl", [dict(a="x", b=None, label="l")])
    refused(path, "line 1", "column 'b' is missing", columns="input=a+b")

# ---- 9: commas and columns

def test_a_comma_at_the_end_of_each_line_shifts_nothing(write):
    for name, text in (("a.csv", "input,label,split\nq,a,train,\nr,b,train,\n"),
                       ("b.csv", "input,label,split,\nq,a,train,\nr,b,train,\n")):
        path = write(name, text)
        assert (inputs(path), load(path)["label"][:]) == (["q", "r"], ["a", "b"])

def test_a_line_longer_than_the_header_is_refused(write):
    refused(write("m.csv", "input,label\nq,a\nwho, me,b\n"), "line 3", "3 cells under 2 columns", "quote")

def test_blank_lines_and_lines_of_commas_are_no_rows_but_count(write):
    path = write("m.csv", "\n\ninput,label,split\n\nq,a,train\n,,\n")
    assert inputs(path) == ["q"]
    refused(write("n.csv", "\n\ninput,label\n\nq,\n"), "line 5", "column 'label'")

def test_a_quoted_cell_with_a_line_feed_is_one_line_and_counts_as_two(write):
    text = 'input,label,split\n"one,\ntwo",a,train\nr,b,train\n'
    assert inputs(write("m.csv", text)) == ["one,\ntwo", "r"]
    refused(write("n.csv", text + "s,,train\n"), "line 5", "column 'label'")

@pytest.mark.parametrize("name, text, line", [("m.csv", "input,label,input\na,b,c\n", "line 1"),
    ("m.csv", "input, label,label\na,b,c\n", "line 1"),
    ("m.jsonl", '{"input": "a", "label": "b", "input": "c"}', "line 1"),
    ("m.jsonl", '{"input": "a", " label": "b", "label": "c"}', "line 1")])
def test_two_columns_of_one_name_are_refused(write, name, text, line):
    refused(write(name, text), line, "two columns", "rename one")

@pytest.mark.parametrize("text", ['input,label\n"a,b\n', 'input,label\n"a" b,c\n'])
def test_a_stray_quote_is_refused(write, text): refused(write("m.csv", text), "line 2", "quote")

def test_an_index_column_without_a_name_is_no_harm(write):
    assert inputs(write("m.csv", ",input,label,split\n0,q,a,train\n")) == ["q"]

# ---- 10: bytes, lines, names

ROWS = [dict(input="café", label="a", split="train"), dict(input="x\u2028y\u0085z", label="b", split="train")]

@pytest.mark.parametrize("name", ["m.jsonl", "m.json", "m.csv", "m.tsv", "m.ndjson"])
@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_mark_before_the_text_and_ends_of_lines(write, name, coding, end):
    separator = "\t" if name == "m.tsv" else ","
    lines = [json.dumps(r, ensure_ascii=False) for r in ROWS]
    if name == "m.json": text = f"[{','.join(lines)}]"
    elif name in ("m.csv", "m.tsv"): text = end.join(separator.join(x) for x in [ROWS[0], *(r.values() for r in ROWS)])
    else: text = end.join(lines)
    assert inputs(write(name, text.encode(coding))) == [r["input"] for r in ROWS]

def test_a_key_missing_in_a_later_row_is_refused(write):
    path = write("m.jsonl", [dict(input="q", label="a"), dict(input="r")])
    refused(path, "line 2", "column 'label' is missing")
    path = write("m.jsonl", [dict(label="a"), dict(input="r", label="b")])
    refused(path, "line 1", "column 'input' is missing")

def test_half_a_surrogate_pair_is_refused(write):
    path = write("m.jsonl", ['{"input": "q", "label": "a"}', '{"input": "\\ud83d", "label": "a"}'])
    refused(path, "line 2", "column 'input'", "surrogate")
    whole = write("w.jsonl", ['{"input": "\\ud83d\\ude00", "label": "a", "split": "train"}'])
    assert inputs(whole) == ["😀"]

@pytest.mark.parametrize("bad, words", [('{"input": "q"', ["line 2", "character"]), ("text", ["line 2"]),
    ("["*5000, ["can't be read"]), ("[1, 2]", ["line 2", "JSON object"]), ('"text"', ["line 2", "JSON object"])])
def test_a_line_that_is_no_row_is_refused(write, bad, words):
    refused(write("m.jsonl", [dict(input="q", label="a"), bad]), *words)

@pytest.mark.parametrize("content", ["", "\n", "[]", "input,label\n"])
def test_a_file_without_rows_is_refused(write, content):
    refused(write("m.csv" if "," in content else "m.json", content), "no rows")

def test_parquet(write, tmp_path):
    import pandas as pd
    path = str(tmp_path/"m.parquet")
    pd.DataFrame([r | dict(n=i) for i, r in enumerate(ROWS)]).to_parquet(path)
    assert inputs(path) == [r["input"] for r in ROWS]
    assert load(path, columns="label=n")["label"][:] == ["0", "1"]
    whole = pd.array([7, None], dtype="Int64")
    pd.DataFrame(dict(input=["q", None], label=["a", "b"], n=whole, l=[[1], [2]])).to_parquet(path)
    refused(path, "row 2", "column 'input' is missing")
    refused(path, "row 2", "column 'n' is missing", columns="input=label,label=n")
    refused(path, "row 1", "column 'l' holds", columns="input=label,label=l")
    refused(write("cut.parquet", b"PAR1 cut"), "can't be read")

def test_two_parquet_columns_of_one_name_are_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])]*3, names=["input", "label", "label"]), tmp_path/"m.parquet")
    refused(str(tmp_path/"m.parquet"), "label")

@pytest.mark.parametrize("name", ["M.JSONL", "M.Csv", "M.TSV", "m.NDJSON", "M.JSON", "M.CSV.GZ", "m.jsonl.gz"])
def test_suffixes_in_capitals_and_gzip(write, name):
    kind = name.lower().removesuffix(".gz")
    text = "input,label,split\nq,a,train\n" if "sv" in kind else '{"input": "q", "label": "a", "split": "train"}\n'
    content = text.replace(",", "\t" if "tsv" in kind else ",").encode()
    assert inputs(write(name, gzip.compress(content) if "gz" in name.lower() else content)) == ["q"]

def test_an_existing_path_is_never_a_hub_id(write, tmp_path, monkeypatch):
    def hub(*a): raise AssertionError("the hub was asked")
    monkeypatch.setattr(data, "hub_rows", hub)
    refused(write("rows.xlsx", b"PK"), "must end in", ".parquet")
    refused(write("rows", "x"), "must end in")
    monkeypatch.chdir(tmp_path)
    (tmp_path/"owner").mkdir()
    (tmp_path/"owner/name").write_text("x", encoding="utf-8")
    refused("owner/name", "must end in")
    refused(str(tmp_path), "is a folder")
    refused(str(tmp_path/"lost.csv"), "no file")
    for name in ("./a/b", "~/b", "/a/b", "a/b/c"):
        with pytest.raises(KitError, match="no data"): load(name)
    with pytest.raises(AssertionError, match="the hub was asked"): load("someone/else")

@pytest.mark.parametrize("separator", [";", "\t", ","])
def test_the_separator_is_seen(write, separator):
    cells = [["input", "label", "split"], ["one" if separator == "," else "one, or two", "a", "train"]]
    assert inputs(write("m.csv", "\n".join(separator.join(c) for c in cells))) == [cells[1][0]]

@pytest.mark.parametrize("coding", ["cp1252", "latin-1", "utf-16-le"])
@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
def test_a_wrong_encoding_is_named(write, coding, name):
    lines = ['{"input": "q", "label": "a"}', '{"input": "café", "label": "b"}']
    if name == "m.csv": lines = ["input,label", "café,b"]
    line = refused(write(name, "\n".join(lines).encode(coding)), "UTF-8", "line 1" if "16" in coding else "line 2")
    assert ("UTF-16" if "16" in coding else "Windows-1252") in line

CUT = {"two bytes": codecs.BOM_UTF16_LE + b"a", "cut": gzip.compress(b"x"*500, mtime=0)[:20],
       "no gzip": b"\x1f\x8bno gzip"}
@pytest.mark.parametrize("cut", CUT.values(), ids=CUT)
def test_a_damaged_file_is_refused(write, cut): refused(write("m.csv", cut), write("m.csv", cut))

def test_column_names_with_commas_or_edge_spaces(write):
    path = write("m.csv", '"what, where", label ,split\n"a, b", "c, d",train\n')
    assert load(path, columns='input="what, where"')["label"][:] == ["c, d"]
    path = write("m.jsonl", [{" input": "q", "label ": "a", "split": "train"}])
    assert inputs(path) == ["q"] and load(path)["label"][:] == ["a"]
    path = write("p.csv", "a+b,label,split\nq,l,train\n")
    assert inputs(path, columns="input=a+b") == ["q"]

@pytest.mark.parametrize("columns, words", [("input", "write part=column"), ('input="a', "double quote"),
    ("inptu=a", "did you mean 'input'")])
def test_a_mapping_that_is_wrong_is_one_line(write, columns, words):
    with pytest.raises(KitError, match=words) as e: load(write("m.csv", "a,b\n1,2\n"), columns=columns)
    assert "\n" not in str(e.value)

def test_a_column_that_is_not_there_is_named(write):
    refused(write("m.csv", "question,label\nq,a\n"), "no column 'input'", "question", "--columns input=NAME")

def test_places_are_lines_of_the_file(write):
    path = write("m.jsonl", ["", '{"a": 1}', "", '{"a": 2}'])
    assert [p for p, _ in rows.placed_rows(path)] == ["line 2", "line 4"] and read_rows(path) == [dict(a=1), dict(a=2)]
