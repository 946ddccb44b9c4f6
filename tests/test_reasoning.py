"""Reasoning tasks: every label recomputed from the text alone; knobs, splits, vocabulary; and the documents that go
before."""
import ast, random, re
import pytest
from slmkit.toyland.documents import patterns as pattern_documents
from slmkit.toyland.documents import reasoning as reasoning_documents
from slmkit.toyland.documents.world import KINDS, leaks, size
from slmkit.toyland.tasks.reasoning import (KIN, list_family, list_text, literal, operation, part_of_family)
from slmkit.core.settings import KitError
from slmkit.toyland.tasks import SHARES, TASKS, split_of, task
from slmkit.toyland.world import CODE, GIRLS, PLACES, vocabulary

HARD = dict(arithmetic=dict(steps=4, digits=2, ops="+-*/"), kinship=dict(steps=4, distractors=4, shuffle=True),
            tracking=dict(moves=8, things=5), ordering=dict(size=7), multi_hop=dict(hops=3, distractors=10),
            recall=dict(pairs=40, digits=3), list_functions=dict(shots=5, length=6), programs=dict(steps=4))
def drawn(name, n=250, seed=0, **knobs):
    "Rows as dicts, without the split filter."
    rng = random.Random(f"{name} {seed}")
    return [TASKS[name](rng, **knobs) for _ in range(n)]
def both(name, n=250): return drawn(name, n) + drawn(name, n, **HARD[name])

# ---- a limited evaluator: our own programs, but read as a stranger's would be

ALLOWED = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Not, ast.USub, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod,
    ast.Call, ast.Name, ast.Load, ast.Store, ast.Constant, ast.Subscript, ast.Slice, ast.ListComp, ast.comprehension,
    ast.Compare, ast.Gt, ast.Lt, ast.Eq, ast.List, ast.Div)
FUNCTIONS = dict(sorted=sorted, sum=sum, len=len, max=max, min=min)
def run(program, **values):
    "The value of an expression of allowed nodes, names and functions only."
    tree = ast.parse(program, mode="eval")
    for node in ast.walk(tree):
        assert isinstance(node, ALLOWED), f"{type(node).__name__} in {program}"
        if isinstance(node, ast.Name): assert node.id in {*FUNCTIONS, *values, "v", "k"}, program
        if isinstance(node, ast.Call): assert getattr(node.func, "id", None) in FUNCTIONS
    return eval(compile(tree, "program", "eval"), {"__builtins__": {}} | FUNCTIONS | values)

@pytest.mark.parametrize("bad", ["__import__('os')", "x.append(1)", "open('f')", "(lambda: 1)()", "[].__class__"])
def test_the_evaluator_refuses_what_no_program_needs(bad):
    with pytest.raises(AssertionError): run(bad, x=[1])

# ---- oracles: from the input alone

def from_arithmetic(row):
    value, seen = 0, []
    for part in row["input"].removesuffix(" . result ?").split(" , "):
        *words, m = part.split()
        m = int(m)
        match " ".join(words):
            case "start at": value = m
            case "add": value += m
            case "take away": value -= m
            case "times": value *= m
            case "divide by":
                assert value % m == 0
                value //= m
        seen.append(value)
    assert all(0 <= v <= 999 for v in seen) and len(seen) == row["difficulty"] + 1
    steps = re.findall(r"(\d+) (.) (\d+) gives (\d+) \.", row["rationale"])
    assert [int(s[3]) for s in steps] == seen[1:] and [int(s[0]) for s in steps] == seen[:-1]
    assert run(row["program"]) == value
    return str(value)

NEUTRAL = {word: g for g, pair in dict(parent=("mother", "father"), child=("daughter", "son"),
        sibling=("sister", "brother"), grandparent=("grandmother", "grandfather"),
        grandchild=("granddaughter", "grandson"), uncle=("aunt", "uncle"), nephew=("niece", "nephew"),
        cousin=("cousin", "cousin")).items() for word in pair}
COMPOSED = {}  # English, written down by hand: of my (first), the (second) is my (third)
for line in """parent parent grandparent
parent sibling uncle|parent child sibling|child child grandchild|child sibling child
sibling parent parent|sibling child nephew|sibling sibling sibling|grandparent parent great grandparent
grandparent sibling great uncle|grandchild child great grandchild|grandchild sibling grandchild|uncle child cousin
uncle sibling uncle|uncle parent grandparent|nephew sibling nephew|nephew child great nephew|cousin sibling cousin
cousin parent uncle|great-grandparent parent great great grandparent|great-uncle sibling great uncle
great-uncle parent great grandparent|great-grandchild sibling great grandchild
great-grandchild child great great grandchild|great-nephew sibling great nephew""".replace("\n", "|").split("|"):
    first, second, *third = line.split()
    COMPOSED[first.replace("-", " "), second] = " ".join(third)
def neutral(words):
    *great, word = words.split()
    return " ".join([*great, NEUTRAL[word]])

def from_kinship(row):
    told = re.findall(r"(\w+) is the (\w+) of (\w+) \.", row["input"])
    p, q = re.search(r"what is (\w+) to (\w+) \?", row["input"]).groups()
    nearer = {q: ""}  # everyone reached from q, and what they are to q
    while p not in nearer:
        found = [(a, COMPOSED[nearer[b], NEUTRAL[r]] if nearer[b] else NEUTRAL[r])
                 for a, r, b in told if b in nearer and a not in nearer and r in NEUTRAL]
        assert found, row["input"]
        nearer |= dict(found)
    woman, man = next(pair for pair in KIN.values() if neutral(pair[0]) == nearer[p])
    return woman if p in GIRLS else man

def from_tracking(row):
    at, text = {}, row["input"]
    for s in text.split(" . "):
        if m := re.fullmatch(r"(\w+) has the (\w+)", s): at[m[2]] = m[1]
        elif m := re.fullmatch(r"the (\w+) is in the (\w+)", s): at[m[1]] = m[2]
        elif m := re.fullmatch(r"(\w+) and (\w+) swap", s):
            at = {t: {m[1]: m[2], m[2]: m[1]}.get(p, p) for t, p in at.items()}
        elif m := re.fullmatch(r"\w+ brings the (\w+) to the (\w+)", s): at[m[1]] = m[2]
        else: thing = re.fullmatch(r"(?:who has|where is) the (\w+) now \?", s)[1]
    states = row["rationale"].split(" . ")
    assert len(states) == row["difficulty"] + 1 and f"{thing} {at[thing]}" in states[-1]
    return at[thing]

def from_ordering(row):
    above = {}
    for p, w, q in re.findall(r"(\w+) is (\w+) than (\w+) \.", row["input"]):
        up = w in ("taller", "older", "heavier", "faster")
        above[p if up else q] = q if up else p
    order = [next(p for p in above if p not in above.values())]
    while order[-1] in above: order.append(above[order[-1]])
    assert len(order) == row["difficulty"] and " , ".join(order) in row["rationale"]
    if m := re.search(r"number (\d) from the (\w+) on", row["input"]): return order[int(m[1]) - 1]
    return order[0 if re.search(r"(tallest|oldest|heaviest|fastest) \?", row["input"]) else -1]

def from_multi_hop(row):
    facts = {(p, tie): v for p, v, tie in re.findall(r"(\w+) has (\w+) as (\w+) \.", row["context"])}
    assert len(facts) == row["context"].count(".")  # nothing said twice or against another
    asked = row["question"].removeprefix("what is the ").removesuffix(" ?")
    *ties, who = asked.replace(" of the ", " of ").split(" of ")
    used = []
    for tie in reversed(ties):
        used.append(f"{who} has {facts[who, tie]} as {tie} .")
        who = facts[who, tie]
    assert row["evidence"] == " ".join(used) and len(used) == row["difficulty"]
    assert row["input"] == f"{row['context']} question : {row['question']}"
    return who

def from_recall(row):
    listed, asked = row["input"].removesuffix(" ?").split(" . what is ")
    pairs = dict(p.split(" is ") for p in listed.split(" ; "))
    assert len(pairs) == row["difficulty"] and row["evidence"] == f"{asked} is {pairs[asked]}"
    return pairs[asked]

def numbers(text): return [int(w) for w in text.strip("[] ").split()]
def from_list_functions(row):
    *shots, query = row["input"].split(" ; ")
    for shot in shots:
        x, y = shot.split(" > ")
        assert run(row["program"], x=numbers(x)) == numbers(y)
    label = list_text(run(row["program"], x=numbers(query.removesuffix(" >"))))
    assert row["rationale"].endswith(f"{label} .") and row["rationale"].count(":") == row["difficulty"]
    return label

class Words:
    "Reads the statement of a program and computes it: a second way from words to value, without any code."
    def __init__(self, text, n, m, x): self.w, self.n, self.m, self.x = text.split(), n, m, x
    def take(self, phrase):
        k = len(phrase.split())
        if self.w[:k] == phrase.split():
            self.w = self.w[k:]
            return True
    def two(self):
        a = self.value()
        assert self.take("and")
        return a, self.value()
    def value(self):
        x = self.x
        for phrase, v in {"the sum of x": sum(x), "the largest of x": max(x), "the smallest of x": min(x),
                "the first of x": x[0], "the last of x": x[-1], "how many are in x": len(x)}.items():
            if self.take(phrase): return v
        for phrase, f in {"the sum of": lambda a, b: a + b, "the difference of": lambda a, b: a - b,
                "the product of": lambda a, b: a*b, "the larger of": max, "the smaller of": min}.items():
            if self.take(phrase): return f(*self.two())
        for phrase, f in {"twice": lambda a: 2*a, "half of": lambda a: a//2, "the square of": lambda a: a*a}.items():
            if self.take(phrase): return f(self.value())
        if self.take("the remainder of"):
            a = self.value()
            assert self.take("over 10")
            return a % 10
        word = self.w.pop(0)
        return {"n": self.n, "m": self.m}[word] if word in "nm" else int(word)
    def result(self):
        for phrase, f in {"x in reverse": lambda x: x[::-1], "x sorted": sorted}.items():
            if self.take(phrase): return f(self.x)
        for phrase, f in {"each of x plus": lambda v, a: [v + a], "each of x times": lambda v, a: [v*a],
                "all of x above": lambda v, a: [v]*(v > a), "all of x below": lambda v, a: [v]*(v < a)}.items():
            if self.take(phrase):
                a = self.value()
                return [w for v in self.x for w in f(v, a)]
        return self.value()

def from_programs(row):
    text = row["input"].removeprefix("compute ").removesuffix(" .")
    for line in row["tests"]:
        given, result = line.split(" -> ")
        n, m, x = re.fullmatch(r"n = (\d) , m = (\d) , x = (\[.*\])", given).groups()
        values = dict(n=int(n), m=int(m), x=ast.literal_eval(x))
        words = Words(text, **values)
        assert words.result() == ast.literal_eval(result) == run(row["program"], **values) and not words.w, line
    return row["program"]

ORACLES = {name.removeprefix("from_"): f for name, f in list(globals().items()) if name.startswith("from_")}
NAMES = sorted(ORACLES)

@pytest.mark.parametrize("name", NAMES)
def test_labels_follow_from_the_text_alone(name):
    for row in both(name): assert ORACLES[name](row) == row["label"], row

@pytest.mark.parametrize("name", NAMES)
def test_an_oracle_sees_a_wrong_label(name):
    rows = drawn(name, 60)
    wrong = [r | dict(label=s["label"]) for r, s in zip(rows, rows[1:]) if r["label"] != s["label"]]
    assert sum(ORACLES[name](r) != r["label"] for r in wrong) == len(wrong) > 30

# ---- what all tasks promise

@pytest.mark.parametrize("name", NAMES)
def test_rows_are_whole_and_in_the_vocabulary(name):
    rows, known = both(name), {*vocabulary(), *CODE}
    kinds = [{k: type(v) for k, v in r.items()} for r in rows]
    assert all(k == kinds[0] for k in kinds) and {"input", "label", "rationale", "difficulty"} <= set(kinds[0])
    for column in ("input", "label", "rationale"):
        words = {w for r in rows for w in r[column].split()}
        assert not {w for w in words if w.isalpha()} - known and "" not in words
    if "choices" in kinds[0]:
        assert all(r["label"] in r["choices"] and len(set(r["choices"])) == len(r["choices"]) for r in rows)
    assert max(size(r["input"]) for r in drawn(name)) <= 85

@pytest.mark.parametrize("name", NAMES)
def test_splits_are_disjoint_and_seeds_repeat(name):
    found = {s: {r for seed in range(2) for r in task(name, s, 30, seed)["input"]} for s in SHARES}
    assert all({split_of(i) for i in inputs} == {s} for s, inputs in found.items())
    assert task(name, n=9, seed=5).to_list() == task(name, n=9, seed=5).to_list() != task(name, n=9, seed=6).to_list()

@pytest.mark.parametrize("name", NAMES)
def test_no_answer_is_right_by_its_frequency(name):
    labels = [r["label"] for r in drawn(name, 600)]
    assert max(map(labels.count, set(labels))) < 600*.16

# ---- knobs

def test_steps_of_all_kinds_go_up_to_what_is_asked_for():
    for name, knob, most in (("arithmetic", "steps", 4), ("kinship", "steps", 4), ("tracking", "moves", 6),
            ("multi_hop", "hops", 3)):
        assert {r["difficulty"] for r in drawn(name, **{knob: most})} == set(range(1, most + 1))
        assert {r["difficulty"] for r in drawn(name, 50, **{knob: 1})} == {1}
    assert {r["difficulty"] for r in drawn("ordering", size=6)} == {3, 4, 5, 6}
    assert {r["program"].count("v") // 2 > 0 for r in drawn("programs", 50, lists=0.)} == {False}

def test_operations_and_digits_of_arithmetic():
    assert {r["program"].split()[2] for r in drawn("arithmetic", 200, steps=1, ops="/")} == {"/"}
    signs = {s for r in drawn("arithmetic", ops="+-") for s in r["program"].split() if s in "+-*/"}
    assert signs == {"+", "-"}
    added = [int(r["program"].split()[3]) for r in drawn("arithmetic", steps=1, digits=2, ops="+")]
    assert 50 < max(added) < 100 and max(int(r["program"].split()[3]) for r in drawn("arithmetic", steps=1)) < 10

@pytest.mark.parametrize("sign", "+-*/")
def test_operations_stay_between_0_and_999(sign):
    rng = random.Random(0)
    for value in (0, 1, 7, 500, 998, 999):
        for _ in range(50):
            m, new = operation(rng, value, sign, 99)
            assert 0 <= new <= 999 and m >= 0 and run(f"{value} {sign} {m}") == new

def test_distractors_are_sentences_that_do_not_matter():
    for n in (0, 6):
        rows = drawn("multi_hop", 100, hops=2, distractors=n)
        assert all(r["context"].count(".") == r["difficulty"] + n for r in rows)
    assert max(r["input"].count(" . ") - r["difficulty"] for r in drawn("kinship", distractors=0)) == 0
    assert {r["input"].count(" . ") - r["difficulty"] for r in drawn("kinship", distractors=3)} == {0, 1, 2, 3}

def test_facts_are_drawn_anew_so_memory_does_not_help():
    from slmkit.toyland.world import facts
    asked = [(r["question"].split()[-2], r["question"].split()[3], r["label"]) for r in drawn("multi_hop", 400, hops=1)]
    assert .02 < sum(facts()[p][tie] == v for p, tie, v in asked)/400 < .25

def test_the_place_of_the_asked_pair():
    for place, i in ((0., 0), (.5, 5), (1., 10)):
        for r in drawn("recall", 20, pairs=11, place=place):
            assert r["input"].split(" . ")[0].split(" ; ")[i] == r["evidence"]
    assert all(r["label"].isalpha() for r in drawn("recall", 50, values="words"))
    assert max(size(r["input"]) for r in drawn("recall", 20, pairs=60, digits=3)) > 300

def test_list_functions_are_many_different_and_kept_apart():
    family, probe = list_family(), random.Random(5)
    lists = [[probe.randrange(10) for _ in range(probe.randint(2, 6))] for _ in range(300)]
    assert len({str([f(x) for x in lists]) for *_, f in family}) == len(family) > 100
    seen, unseen = ({r["program"] for r in drawn("list_functions", 300, part=p)} for p in ("seen", "unseen"))
    assert not seen & unseen and len(unseen) > 25 and len(seen) > 60
    assert len(part_of_family("all")[1]) == len(part_of_family("seen")[1]) + len(part_of_family("unseen")[1])

def test_examples_settle_the_answer_of_a_list_function():
    for row in drawn("list_functions", 40):
        *shots, query = [tuple(map(numbers, s.removesuffix(" >").split(" > "))) for s in row["input"].split(" ; ")]
        answers = {list_text(f(query[0])) for *_, f in list_family() if all(f(x) == y for x, y in shots)}
        assert answers == {row["label"]}

@pytest.mark.parametrize("name, knobs, words", [
    ("recall", dict(pairs=61), "1 to 60"),
    ("tracking", dict(form="swop"), "swap, carry"),
    ("list_functions", dict(part="new"), "all, seen or unseen")])
def test_wrong_knobs_are_told_in_one_line(name, knobs, words):
    with pytest.raises(KitError, match=words) as e: task(name, n=1, **knobs)
    assert "\n" not in str(e.value)

# ---- the documents that go before

OURS = {n: f for n, (f, _) in KINDS.items() if f.__module__ in (reasoning_documents.__name__,
        pattern_documents.__name__)}
def read(name, n=200):
    rng = random.Random(name)
    return [OURS[name](rng) for _ in range(n)]

@pytest.fixture(scope="module")
def docs(): return [d for name in OURS for d in read(name)]

def test_documents_are_short_varied_and_in_the_vocabulary(docs):
    assert len(OURS) > 30 and max(map(size, docs)) <= 110
    assert sum(size(d) > 70 for d in docs) < .01*len(docs)  # long ones are rare: a text of 72 tokens must hold most
    assert not {w for d in docs for w in d.split() if w.isalpha()} - {*vocabulary(), *CODE}
    for name in OURS:
        # two kinds are finite
        assert len(set(read(name, 100))) > (20 if name in ("family_words", "days") else 60), name

def test_no_document_shares_eight_tokens_with_a_task(docs):
    rows = [r for name in NAMES for r in both(name, 300)]
    found = leaks(docs, rows)
    assert not found, sorted(found)[:5]
    assert leaks(docs + [rows[0]["input"]], rows)

EQUATION = re.compile(r"(?<![-+*/)\]] )(?<!\S)(\d+) ([-+*/]) (\d+) = (\d+)(?! [-+*/])")
def test_every_equation_in_the_documents_is_true():
    "But for `repeats`: its random rows of numbers and signs are there to be copied, and may look like sums."
    found = [e for name in OURS if name != "repeats" for d in read(name) for e in EQUATION.findall(d)]
    for x, sign, y, z in found: assert run(f"{x} {sign} {y}") == int(z), (x, sign, y, z)
    assert len(found) > 1000 and {e[1] for e in found} == set("+-*/")

def test_one_digit_facts_are_frequent():
    ones = [e for name in ("small_facts", "running_sums", "by_tens_and_ones") for d in read(name)
        for e in EQUATION.findall(d)]
    assert sum(len(x) == len(y) == 1 for x, _, y, _ in ones) > .3*len(ones)

def test_values_of_list_code_are_right():
    for d in read("code_lists"):
        name, x, rest = re.match(r"(\w) = (\[.*?\]) \. (.*) \.$", d).groups()
        for code, value in re.findall(r"(.+?) (?::(?! :)|is|==|#) (\[[^\]k]*\]|\d+)(?: [;.,] |$)", rest):
            try: assert run(code.lstrip("; .,"), **{name: ast.literal_eval(x)}) == ast.literal_eval(value), d
            except SyntaxError: pytest.fail(f"{code!r} in {d!r}")

def test_carried_things_are_where_they_were_last_brought():
    checked = 0
    for d in read("carried_things", 500):
        places = [w for w in d.split() if w in PLACES]
        things = {w for w in d.split() if w in pattern_documents.THINGS}
        if len(things) == 1:
            checked += 1
            assert places[-1] == places[-2], d
    assert checked > 100

def test_repeats_can_be_predicted_from_what_stands_before():
    for name, least in (("repeats", .3), ("pairs_again", .4), ("listings", .1)):
        shares = []
        for d in read(name):
            words = d.split()
            bigrams, known = set(), 0
            for pair in zip(words, words[1:]):
                known += pair in bigrams
                bigrams.add(pair)
            shares.append(known/len(words))
        assert sum(shares)/len(shares) > least, name

def test_families_are_told_as_english_says():
    for d in read("family_words"):
        if m := re.fullmatch(r"([a-z ]+) and then (\w+) : ([a-z ]+) \.", d):
            assert neutral(m[3]) == COMPOSED[neutral(m[1]), neutral(m[2])]

def test_literal_is_read_back_by_python():
    for v in (0, -7, 12, [], [3, -1, 40]): assert ast.literal_eval(literal(v)) == v
