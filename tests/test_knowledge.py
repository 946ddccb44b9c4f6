"Closed and open book, tables with SQL, instructions: every label is found again from the input's text alone."
import random, re, sqlite3
import pytest
from slmkit.toyland.documents.world import KINDS, grams, leaks, size
from slmkit.toyland.tasks.instructions import HELD_OUT, INSTRUCTIONS, SEEN
from slmkit.toyland.tasks.knowledge import database, query, read_table, tight
from slmkit.toyland.documents.knowledge import fact_exchanges
from slmkit.toyland.tasks import TASKS, split_of, task
from slmkit.toyland.tokenizer import build_tokenizer, unknown_share
from slmkit.toyland.world import DAYS, GROUPS, NUMBER_WORDS, OPPOSITES, PEOPLE, THINGS, facts, plural

NAMES = "closed_book", "open_book", "table_qa", "instructions"
HARD = dict(closed_book=dict(choices=5, part="tail"), open_book=dict(sentences=6, conflict=.5), table_qa=dict(rows=12),
            instructions=dict(part="all", length=8))
MINE = {n: f for n, (f, _) in KINDS.items() if f.__module__ == fact_exchanges.__module__}
def drawn(name, n=1500, seed=0):
    "Rows without split filtering, at default and at hard knobs."
    return [TASKS[name](random.Random(f"{seed} {i}"), **knobs) for knobs in ({}, HARD[name]) for i in range(n)]

# ---- what every task holds

@pytest.mark.parametrize("name", NAMES)
def test_words_types_and_choices(name):
    rows, tok = drawn(name, 800), build_tokenizer()
    assert unknown_share(tok, [f"{r['input']} {r['label']} {r['rationale']} {r.get('program', '')}" for r in rows]) == 0
    assert len({tuple((k, type(v)) for k, v in r.items()) for r in rows}) == 1
    assert all(r["label"] in r["choices"] for r in rows if "choices" in r)
    assert all("  " not in r[c] and r[c] == r[c].strip() for r in rows for c in ("input", "label", "rationale"))

@pytest.mark.parametrize("name", NAMES)
def test_splits_are_disjoint_and_seeds_repeat(name):
    train, test = (set(task(name, s, 300)["input"]) for s in ("train", "test"))
    assert not train & test and {split_of(i) for i in test} == {"test"}
    one, two, other = (task(name, n=50, seed=s).to_list() for s in (2, 2, 3))
    assert one == two != other

def test_rows_enough():
    for name in NAMES:
        n = 1200 if name == "closed_book" else 2000  # the facts of the world are finite
        assert len(task(name, "test", n)) == n

# ---- from memory, from a passage

ABOUT = dict(town=r"town|live", job=r"job|work", pet=r"pet|animal", color=r"color", food=r"food|eat",
    hobby=r"hobby|to do")
def asked(question):
    "(person, relation) that a question is about."
    p, = [w for w in question.split() if w in PEOPLE]
    r, = [r for r, words in ABOUT.items() if re.search(rf"\b({words})\b", question)]
    return p, r

@pytest.mark.parametrize("world", [0, 3])
def test_closed_book_is_true_of_its_world(world):
    for row in task("closed_book", n=400, world=world, choices=3):
        question, shown = row["input"].removesuffix(" .").split(" choose : ")
        p, r = asked(question)
        assert row["label"] == facts(world)[p][r] and row["choices"] == shown.split(" , ") and PEOPLE[row["rank"]] == p
        assert row["label"] in row["rationale"].split() and p in row["rationale"].split()

def test_closed_book_parts_and_size():
    rng = random.Random(0)
    rows = [TASKS["closed_book"](rng) for _ in range(60_000)]
    assert 8_700 < len({r["input"] for r in rows}) <= 9_000
    head, tail = ({r["rank"] for r in task("closed_book", n=400, part=p)} for p in ("head", "tail"))
    assert head == set(range(15)) and tail == set(range(30, 60))

SAID = dict(town=r"(\w+) now lives in (\w+)|these days (\w+) is at home in (\w+)",
    job=r"(\w+) now works as a (\w+)|these days (\w+) is a (\w+)",
    pet=r"(\w+) now has a (\w+)|these days (\w+) keeps a (\w+)",
    color=r"(\w+) now loves (\w+)|these days (\w+) likes (\w+) most",
    food=r"(\w+) now eats (\w+)|these days (\w+) loves (\w+)",
    hobby=r"(\w+) now likes (\w+)|these days (\w+) goes for (\w+)")
def test_open_book_is_answered_by_its_passage():
    for row in drawn("open_book", 700):
        p, r = asked(row["question"])
        found = [[g for g in m.groups() if g]
            for s in row["context"].split(" .") if (m := re.fullmatch(SAID[r], s.strip()))]
        assert [v for q, v in found if q == p] == [row["label"]] and row["evidence"] in row["context"]
        assert row["memory"] == facts()[p][r] and row["input"] == f"{row['context']} question : {row['question']}"
        assert row["context"].count(" .") == row["difficulty"]

def test_conflict_is_a_share():
    for share in (0., .3, 1.):
        rows = [TASKS["open_book"](random.Random(i), conflict=share) for i in range(1000)]
        assert abs(sum(r["label"] != r["memory"] for r in rows)/1000 - share) < .06
    assert all(r["label"] == facts(5)[asked(r["question"])[0]][asked(r["question"])[1]]
        for r in task("open_book", n=50, conflict=0., world=5))

# ---- tables

def answer(text, question):
    "The answer to a question about a table, without SQL."
    lines = [l.split(" , ") for l in text.split(" : ")[1].removesuffix(" .").split(" ; ")]
    (key, word, number), rows = lines[0], [(k, w, int(n)) for k, w, n in lines[1:]]
    is_number, q = {word: 1, number: 2}, question.removesuffix(" ?").removesuffix(" .")
    if m := re.fullmatch(r"what is the sum of \w+ for \w+ (\w+)|add the \w+ of all rows with (\w+)", q):
        return str(sum(n for _, w, n in rows if w == (m[1] or m[2])))
    if m := re.fullmatch(r"how many rows have \w+ (\w+)|count the rows with \w+ (\w+)", q):
        return str(sum(w == (m[1] or m[2]) for _, w, _ in rows))
    if m := re.fullmatch(r"(?:which \w+ has|name the \w+ with) the (highest|lowest) \w+", q):
        return sorted(rows, key=lambda r: r[2], reverse=m[1] == "highest")[0][0]
    if m := re.fullmatch(r"(?:which rows have \w+|list each \w+ with \w+) (greater than|smaller than|>|<) (\d+)", q):
        more = m[1] in ("greater than", ">")
        return " , ".join(k for k, _, n in rows if (n > int(m[2]) if more else n < int(m[2])))
    m = re.fullmatch(r"what is the (\w+) of (\w+)|which (\w+) does (\w+) have", q)
    return next(str(r[is_number[m[1] or m[3]]]) for r in rows if r[0] == (m[2] or m[4]))

def test_tables_are_answered_without_sql():
    rows = drawn("table_qa", 1500)
    assert all(answer(r["table"], r["question"]) == r["label"] for r in rows)
    assert {r["kind"] for r in rows} == {"lookup", "count", "sum", "max", "filter"}
    assert all(r["input"] == f"{r['table']} {r['question']}" for r in rows)

def test_the_program_gives_the_label_in_a_file(tmp_path):
    path = tmp_path/"toyland.sqlite"
    for row in task("table_qa", n=30, rows=8):  # tables of one name replace each other in the file
        database(row, path).close()
        with sqlite3.connect(path) as c: assert query(c, row["program"]) == row["label"]
    with pytest.raises(sqlite3.Error): query(database(row), "select nothing from nowhere")

def test_table_knobs():
    assert {r["kind"] for r in task("table_qa", n=60, kinds="sum max")} == {"sum", "max"}
    assert all(len(read_table(r["table"])[2]) == 15 for r in task("table_qa", n=40, rows=15))
    counts = [r["label"] for r in task("table_qa", n=300, kinds="count", rows=6)]
    assert len(set(counts)) >= 3 and max(counts.count(c) for c in counts) < 200  # not one count for all

def test_quotes_are_tightened_and_nothing_else():
    assert tight("select a from b where c = ' d ' and e > 3") == "select a from b where c = 'd' and e > 3"

# ---- instructions

BOTH = OPPOSITES | {v: k for k, v in OPPOSITES.items()}
GROUP = {m: g for g, members in GROUPS.items() for m in members}
def ints(g): return [int(v) for v in g["l"].split()]
def text(values): return " ".join(map(str, values))
def member(g, members): return "yes" if g in members else "no"
def pairs(g): return [p.split() for p in g["l"].split(" , ")]
def group(g): return next(k for k in GROUPS if k == g.get("g") or plural(k) == g.get("gs"))
ORACLE = {  # kind: the answer from the parts of the text (g: the fields of the template; w: the words of its list)
    "repeat": lambda g, w: g["l"], "first_word": lambda g, w: w[0], "last_word": lambda g, w: w[-1],
    "nth_word": lambda g, w: w["first second third fourth fifth".split().index(g["th"])],
    "count_words": lambda g, w: str(g["l"].count(" ") + 1), "reverse": lambda g, w: text(reversed(w)),
    "skip_first": lambda g, w: g["l"].split(" ", 1)[1], "skip_last": lambda g, w: g["l"].rsplit(" ", 1)[0],
    "first_k": lambda g, w: text(w[i] for i in range(int(g["k"]))),
    "replace": lambda g, w: g["l"].replace(g["x"], g["y"]),
    "remove": lambda g, w: text(v for v in w if v != g["x"]), "insert_start": lambda g, w: text([g["y"]] + w),
    "insert_end": lambda g, w: text(w + [g["y"]]), "join_and": lambda g, w: g["l"].replace(" ", " and "),
    "commas": lambda g, w: g["l"].replace(" ", " , "), "brackets": lambda g, w: g["l"].replace(g["x"], f"( {g['x']} )"),
    "numbered": lambda g, w: text(f"{w.index(v) + 1} {v}" for v in w),
    "swap_ends": lambda g, w: text(w[-1:] + w[1:-1] + w[:1]),
    "double_each": lambda g, w: re.sub(r"(\w+)", r"\1 \1", g["l"]),
    "every_second": lambda g, w: text(v for i, v in enumerate(w) if i % 2),
    "position_of": lambda g, w: str(w.index(g["x"]) + 1),
    "word_after": lambda g, w: re.search(rf"\b{g['x']} (\w+)", g["l"])[1],
    "word_before": lambda g, w: re.search(rf"(\w+) {g['w2']}\b", g["l"])[1],
    "write_times": lambda g, w: text([g["x"]]*int(g["k"])), "skip_and_reverse": lambda g, w: text(reversed(w[1:])),
    "contains": lambda g, w: member(g["z"], w), "starts_with": lambda g, w: member(g["s"], w[:1]),
    "unique": lambda g, w: text(sorted(set(w), key=w.index)),
    "how_often": lambda g, w: str(w.count(g["x"])),
    "pattern": lambda g, w: g["x"],
    "group_of": lambda g, w: GROUP[g["x"]], "is_a": lambda g, w: member(g["z"], GROUPS[group(g)]),
    "odd_one_out": lambda g, w: next(v for v in w if sum(GROUP[v] == GROUP[u] for u in w) == 1),
    "pick_group": lambda g, w: text(v for v in w if GROUP[v] == group(g)),
    "count_group": lambda g, w: str(sum(GROUP[v] == group(g) for v in w)),
    "opposite": lambda g, w: BOTH[g["adj"]],
    "plural": lambda g, w: plural(g["x"]),
    "singular": lambda g, w: {plural(t): t for t in THINGS}[g["xs"]],
    "article": lambda g, w: ("an" if re.match("[aeiou]", g["x"]) else "a") + " " + g["x"],
    "day_after": lambda g, w: (DAYS + DAYS)[DAYS.index(g["day"]) + 1],
    "day_before": lambda g, w: (DAYS[-1:] + DAYS)[DAYS.index(g["day"])],
    "negate": lambda g, w: f"{g['p']} is not {g['adj']}", "rename": lambda g, w: f"{g['q']} has {g['xs']}",
    "make_question": lambda g, w: f"is {g['p']} {g['adj']} ?", "many": lambda g, w: f"{plural(g['x'])} are {g['adj']}",
    "pick_color": lambda g, w: text(x for c, x in pairs(g) if c == g["c"]),
    "color_of": lambda g, w: {x: c for c, x in pairs(g)}[g["x"]],
    "other_color": lambda g, w: text(x for c, x in pairs(g) if c != g["c"]),
    "no_colors": lambda g, w: text(p[1] for p in pairs(g)),
    "add": lambda g, w: str(int(g["x"]) + int(g["k"])), "subtract": lambda g, w: str(int(g["b"]) - int(g["k"])),
    "larger": lambda g, w: max(g["x"], g["y"], key=int), "smaller": lambda g, w: min(g["x"], g["y"], key=int),
    "is_more": lambda g, w: "yes" if int(g["x"]) > int(g["y"]) else "no",
    "highest": lambda g, w: text(sorted(ints(g))[-1:]),
    "lowest": lambda g, w: text(sorted(ints(g))[:1]), "sort_up": lambda g, w: text(sorted(ints(g))),
    "sort_down": lambda g, w: text(sorted(ints(g), reverse=True)),
    "odd_or_even": lambda g, w: "odd" if g["x"][-1] in "13579" else "even",
    "pick_even": lambda g, w: text(v for v in w if v[-1] in "02468"),
    "pick_odd": lambda g, w: text(v for v in w if v[-1] in "13579"),
    "next_number": lambda g, w: str(int(g["x"]) + 1),
    "number_before": lambda g, w: str(int(g["x"]) - 1),
    "double": lambda g, w: str(2*int(g["k"])),
    "to_digits": lambda g, w: str(NUMBER_WORDS.index(g["kw"])),
    "to_word": lambda g, w: NUMBER_WORDS[int(g["k"])],
    "last_number": lambda g, w: w[-1],
}

def fields(way, said):
    "The fields of a template as they stand in the text, or None; a field that comes twice must be the same."
    names, pattern = [], ""
    for part in re.split(r"(\{[^}]+\})", way):
        name = re.sub(r"\W", "", part)
        if not part.startswith("{"): pattern += re.escape(part)
        elif name in names: pattern += f"(?P={name})"
        else:
            names.append(name)
            pattern += f"(?P<{name}>.+)" if name == "l" else rf"(?P<{name}>\w+)"
    m = re.fullmatch(pattern, said)
    return m and m.groupdict()

@pytest.mark.parametrize("kind", list(INSTRUCTIONS))
def test_every_kind_is_answered_from_its_text(kind):
    ways = INSTRUCTIONS[kind][1]
    rows = [TASKS["instructions"](random.Random(i), kinds=kind, length=n) for n in (3, 5, 9) for i in range(150)]
    used = set()
    for r in rows:
        said = r["input"].removesuffix(" .").removeprefix("please ").removeprefix("now ")
        found = [(way, g) for way in ways if (g := fields(way, said)) is not None]
        assert found and r["kind"] == kind, r["input"]
        assert all(ORACLE[kind](g, g.get("l", "").split()) == r["label"] for _, g in found), r
        used |= {way for way, _ in found}
    assert used == set(ways)

def test_kinds_seen_and_held_out():
    assert len(SEEN) >= 40
    assert len(HELD_OUT) >= 10
    assert not set(SEEN) & set(HELD_OUT)
    assert ORACLE.keys() == INSTRUCTIONS.keys()
    for part, names in (("seen", SEEN), ("held_out", HELD_OUT), ("all", [*SEEN, *HELD_OUT])):
        assert {TASKS["instructions"](random.Random(i), part=part)["kind"] for i in range(2500)} == set(names)

@pytest.mark.parametrize("kind", ["contains", "starts_with", "is_a", "is_more"])
def test_yes_is_no_better_a_guess_than_no(kind):
    said = [TASKS["instructions"](random.Random(i), kinds=kind)["label"] for i in range(1000)]
    assert 440 < said.count("yes") < 560 and set(said) == {"yes", "no"}

# ---- documents

def test_no_document_rehearses_a_task():
    rows = [r for name in NAMES for r in drawn(name, 2000, seed=1)]
    rows += [dict(input=r["program"], rationale="") for r in rows if "program" in r]
    docs = [f(random.Random(i)) for f in MINE.values() for i in range(1500)]
    found = leaks(docs, rows)
    assert not found, sorted(found)[:5]
    planted = next(r for r in rows if len(grams(r["input"])) > 3)
    assert leaks(docs[:50] + [planted["input"]], rows)

def test_documents_tell_the_truth_about_people():
    "Who is said to live, work, eat ... in an exchange or a record is so in the world."
    rng = random.Random(4)
    for _ in range(2000):
        doc = MINE["fact_exchanges"](rng)
        homes = re.findall(r"home of (\w+) \? (\w+) \.", doc) + re.findall(r"house of (\w+) stands in (\w+)", doc)
        for p, town in homes: assert facts()[p]["town"] == town
        for p, pet in re.findall(r"with (\w+) lives an? (\w+)", doc): assert facts()[p]["pet"] == pet
    for _ in range(1000):
        m = re.match(r"is (\w+) at home in (\w+) \? (yes|no , at home in (\w+))", MINE["fact_checks"](rng))
        if m:
            assert facts()[m[1]]["town"] == (m[2] if m[3] == "yes" else m[4])
            assert (m[3] == "yes") == (facts()[m[1]]["town"] == m[2])

def test_head_facts_are_told_far_more_often_than_tail_facts():
    rng = random.Random(2)
    told = [w for _ in range(4000) for w in MINE["fact_exchanges"](rng).split() if w in PEOPLE]
    head, tail = (sum(told.count(p) for p in part)/len(part) for part in (PEOPLE[:15], PEOPLE[30:]))
    assert head > 5*tail and set(told) == set(PEOPLE)

def test_sql_of_the_documents_is_right():
    "The queries in the documents give what a real database gives."
    from slmkit.toyland.documents.knowledge import grid, programs
    rng, empty = random.Random(3), 0
    for _ in range(300):
        name, columns, rows = grid(rng)
        text = f"{name} : {' , '.join(columns)} ; " + " ; ".join(" , ".join(map(str, r)) for r in rows) + " ."
        with database(text) as c:
            for sql, result in programs(rng, name, columns, rows):
                assert query(c, sql).replace(" , ", " ") == str(result), sql

def test_documents_are_short_and_each_kind_has_many_forms():
    for name, f in MINE.items():
        docs = [f(random.Random(i)) for i in range(400)]
        assert max(map(size, docs)) <= 72, name
        assert len({re.sub(r"\d+", "0", " ".join(w for w in d.split() if w not in PEOPLE)) for d in docs}) > 20, name
