"Languages and the tasks of talk: every label worked out again from the input alone, and every knob seen to act."
import collections, random, re
import pytest
from slmkit.toyland.tasks import talk
from slmkit.toyland.documents.world import KINDS, grams, leaks, size
from slmkit.toyland.languages import (ACTIONS, LANGUAGES, NOUNS, QUALITIES, Clause, Noun, clause, forms, lexicon,
    sentence, translate, understand)
from slmkit.core.settings import KitError
from slmkit.toyland.tasks import TASKS, task
from slmkit.toyland.tasks.talk import DOMAINS, EVERYDAY, INTENTS, KINDS_OF, TAGS, grade
from slmkit.toyland.world import DAYS, NUMBER_WORDS, PEOPLE, PLACES, THINGS, TOWNS, plural, vocabulary
import slmkit.toyland.documents.talk

ALL = ["english", *LANGUAGES]
OURS = [name for name, f in TASKS.items() if f.__module__ == "slmkit.toyland.tasks.talk"]
HARD = dict(translation=dict(source="any", target="any", length=4), code_switching=dict(length=4, share=.9),
    sentiment=dict(domain="court", opinions=3, distractors=4, negation=.5), intents=dict(around=1.),
    tagging=dict(sentences=2, ambiguous=1.), summaries=dict(people=4, events=3), tutoring=dict(top=90, right=0.),
    preferences=dict(differ="brief"), retrieval=dict(negatives=5, named=0.))
def both(name, n=300): return [*task(name, n=n), *task(name, n=n, **HARD[name])]
def test_every_task_is_here(): assert set(OURS) == set(HARD)

# ---- languages

def test_lexicons_are_small_apart_and_without_english():
    seen = set(vocabulary()) | set(PEOPLE)
    for name in LANGUAGES:
        found = set(forms(name))
        assert 150 <= len(found) <= 200 and not found & seen and all(w.isascii() and w.isalpha() for w in found)
        assert {lexicon(name)[w][0] for w in found} >= {*NOUNS, *ACTIONS, *QUALITIES}
        seen |= found

def test_inflection_is_a_suffix():
    for name, rules in LANGUAGES.items():
        for form, (lemma, features) in lexicon(name).items():
            if features[1:]: assert lexicon(name)[form.removesuffix(rules[features[1]])] == (lemma, features[:1])

def test_sentences_are_read_back():
    rng = random.Random(3)
    for _ in range(400):
        said = sentence(rng, rng.randint(1, 4))
        assert all(understand(translate(said, name), name) == said for name in ALL)

def test_word_order():
    said = Clause(Noun("ana"), "see", Noun("apple", adjectives=("red",)))
    for name, rules in LANGUAGES.items():
        lemmas = [lexicon(name).get(w, (w,))[0] for w in translate(said, name).split()[:-1]]
        order = sorted("SVO", key=lambda part: lemmas.index(dict(S="ana", V="see", O="apple")[part]))
        assert "".join(order) == rules["order"]
        assert (lemmas.index("red") > lemmas.index("apple")) == (rules["adjective"] == "after")
        assert ("object" in lemmas) == (rules["order"] == "SOV")

@pytest.mark.parametrize("changes, english", [
    ({}, "the cows carry the old box ."),
    (dict(past=True), "the cows carried the old box ."),
    (dict(question=True), "do the cows carry the old box ?"),
    (dict(negative=True), "the cows do not carry the old box ."),
    (dict(negative=True, past=True, question=True, place="oslo"), "did the cows not carry the old box in oslo ?"),
    (dict(subject=Noun("who"), question=True), "who carries the old box ?"),
    (dict(verb="sleep", object=None), "the cows sleep ."),])
def test_english(changes, english):
    said = Clause(Noun("cow", True), "carry", Noun("box", adjectives=("old",)))._replace(**changes)
    assert translate(said, "english") == english and understand(english, "english") == (said,)

def test_english_words_are_known():
    rng = random.Random(0)
    assert not {w for _ in range(2000) for w in translate(clause(rng), "english").split()[:-1]} - set(vocabulary())

# ---- labels, worked out again

def meanings(text, language):
    "The bag of lemmas of a sentence, without the words that not every language has."
    known = lexicon(language)
    lemmas = (known.get(w, (w,))[0] for w in text.split()[:-1])
    return collections.Counter(w for w in lemmas if w not in ("the", "do", "does", "did", "object", "question"))

def test_translations_say_the_same():
    for row in both("translation"):
        (source, _, target), said = row["input"].split(" : ")[0].split(), row["input"].split(" : ")[1]
        assert source != target and meanings(said, source) == meanings(row["label"], target)
        assert understand(said, source) == understand(row["label"], target)

@pytest.mark.parametrize("source, target", [("english", "tiven"), ("mokra", "english"), ("sulen", "mokra")])
def test_glosses_pair_the_same_meaning(source, target):
    for row in task("translation", n=100, source=source, target=target):
        pairs = [p.split(" = ") for p in row["rationale"].removesuffix(" .").split(" , ")]
        one, other = lexicon(source), lexicon(target)
        same = [one[x][0] == other[y][0] for x, y in pairs if x in one and y in other]
        assert all(same) and len(same) >= len(pairs) - 2 and {x for x, _ in pairs} - set(one) <= {"object", "question"}

def test_mixed_sentences_differ_from_english_only_in_known_words():
    for row in both("code_switching"):
        mixed, plain = row["input"].removeprefix("say it in english : ").split(), row["label"].split()
        other = [(x, y) for x, y in zip(mixed, plain, strict=True) if x != y]
        tongue = {name for name in LANGUAGES for x, _ in other if x in lexicon(name)}
        assert len(other) == row["difficulty"] >= 1 and len(tongue) == 1
        assert all(lexicon(*tongue)[x][0] == lexicon("english")[y][0] for x, y in other)

def judged(text):
    "good or bad, by the words alone: the votes must agree."
    poles = {f: side for words in (EVERYDAY, *DOMAINS.values()) for side in ("good", "bad") for f in words[side]}
    words = text.split()
    votes = {(poles[w] == "good") != (words[i - 1] == "not") for i, w in enumerate(words) if w in poles}
    assert len(votes) == 1
    return "good" if votes.pop() else "bad"

@pytest.mark.parametrize("domain", ["", *DOMAINS])
def test_sentiment_is_what_the_words_say(domain):
    rows = task("sentiment", n=300, domain=domain, negation=.5, distractors=3)
    assert all(row["label"] == judged(row["input"]) for row in rows)
    assert any(" not " in row["input"] for row in rows)
    own = DOMAINS[domain or "court"]
    hits = [set(row["input"].split()) & {*own["good"], *own["bad"]} for row in rows]
    assert all(hits) if domain else not any(hits)

def test_a_request_has_one_intent():
    slot = re.compile(r"\\\{\w\\\}")
    ways = {name: [slot.sub(r"\\w+", re.escape(way)) for way in told.split("|")] for name, told in INTENTS.items()}
    for row in both("intents"):
        wanted = {name for name, told in ways.items()
            for way in told if re.search(rf"(^|[,.] ){way}( ,| \.)", row["input"])}
        assert wanted == {row["label"]}, row["input"]
        assert row["label"] not in row["input"].split()

def test_tags():
    kinds = dict.fromkeys(PEOPLE, "person") | dict.fromkeys([*TOWNS, *PLACES], "place")
    kinds |= dict.fromkeys([*THINGS, *map(plural, THINGS)], "thing") | dict.fromkeys(NUMBER_WORDS, "number")
    for row in both("tagging"):
        words, tags = row["input"].split(), row["label"].split()
        assert len(words) == len(tags) and set(tags) <= set(TAGS)
        for i, (w, tag) in enumerate(zip(words, tags)):
            if w == "will":
                expected = "other" if words[i + 1] in ("bring", "split") and words[i - 1] != "of" else "person"
            elif w == "split": expected = "place" if words[i - 1] in ("in", "from", "of") else "other"
            else: expected = "number" if w.isdigit() else kinds.get(w, "other")
            if w == "will" and i + 1 < len(words) and words[i + 1] == "will": expected = "person"
            assert tag == expected, (i, row["input"])

def test_summaries_follow_the_story_and_the_controls():
    event = re.compile(rf"({'|'.join(PEOPLE)}) ({'|'.join(talk.DID)}) an? \w+ (\w+)")
    for row in both("summaries"):
        story, ask = row["input"].split(" summary : ")
        length, mood, about = re.fullmatch(r"(\w+) , (\w+) , about (\w+) \.", ask).groups()
        done = [f"{v} {'an' if x[0] in 'aeiou' else 'a'} {x}" for p, v, x in event.findall(story) if p == about]
        told = f"{about} {' and '.join(done if length == 'long' else done[:1])} ."
        assert row["label"] == (told if mood == "calm" else f"{mood} news : {told}")
        assert (row["length"], row["mood"], row["about"]) == (length, mood, about)

def test_tutors_reply_to_the_error():
    for row in both("tutoring"):
        n, sign, m, again, said = re.fullmatch(r"sum : (\d+) ([+-]) (\d+) \. (\w+) try of \w+ : (\d+) \.",
            row["input"]).groups()
        n, m, said = int(n), int(m), int(said)
        right = n + m if sign == "+" else n - m
        wrong = n - m if sign == "+" else n + m
        error = "none" if said == right else "sign" if said == wrong else {1: "slip", 10: "carry"}[abs(said - right)]
        move = "praise" if error == "none" else "step" if again == "second" else "hint"
        assert (row["error"], row["move"], row["answer"]) == (error, move, str(right))
        assert row["label"] == (f"see , {n} {sign} {m} = {right} ." if move == "step" else talk.HINTS[error])

def test_replies_deserve_their_scores():
    for row in both("preferences"):
        assert grade(row["input"], row["chosen"]) == row["scores"] > row["rejected_scores"]
        assert grade(row["input"], row["rejected"]) == row["rejected_scores"] and row["label"] == row["chosen"]

def test_any_reply_can_be_graded():
    asked = "ana carries 7 eggs . ben carries 4 cups . cara asks : the cups of ben , how many ?"
    assert grade(asked, "4 .") == [2, 1, 1] and grade(asked, "7 or 4 ?") == [0, 1, 1] == grade(asked, "")
    assert grade(asked, "dear cara , ben has some cups .") == [1, 2, 1]

def about(passage):
    "Who, what, where and when a passage tells of."
    words = passage.split()
    def one(known): return next(w for w in words if w in known)
    return dict(who=one(PEOPLE), what=one(KINDS_OF), where=one(PLACES), when=one(DAYS))

def test_one_passage_answers_the_query():
    for row in both("retrieval"):
        asked = set(row["query"].split())
        def halves(p):
            s = about(p)
            return sum(bool(asked & {s[k], KINDS_OF[s["what"]] if k == "what" else s[k]}) for k in s)
        assert halves(row["positive"]) == 2 and {halves(p) for p in row["negatives"]} == {1}
        shown = re.split(r" ?\[ \d+ \] ", row["input"])[1:]
        assert shown[int(row["label"]) - 1] == row["positive"]
        assert sorted(shown) == sorted([row["positive"], *row["negatives"]])

# ---- knobs

def share(name, value, n=600, **knobs): return list(task(name, n=n, **knobs)["label"]).count(value)/n

def test_imbalance():
    assert .4 < share("sentiment", "good") < .6 and share("sentiment", "good", imbalance=2.) > .72
    first, last = list(INTENTS)[0], list(INTENTS)[-1]
    assert share("intents", first, imbalance=1.) > 4*share("intents", last, imbalance=1.)

def test_label_noise():
    rows = task("sentiment", n=600, label_noise=.3)
    assert .23 < sum(r["label"] != judged(r["input"]) for r in rows)/600 < .37
    rows = task("intents", n=600, label_noise=.3)
    assert .23 < sum(f" : {r['label']} ." not in r["rationale"] for r in rows)/600 < .37

def test_preference_knobs():
    wrong = [r["scores"] < r["rejected_scores"] for r in task("preferences", n=600, noise=.3)]
    assert .23 < sum(wrong)/600 < .37
    for i, name in enumerate(talk.ATTRIBUTES):
        for r in task("preferences", n=100, differ=name):
            assert [s != t for s, t in zip(r["scores"], r["rejected_scores"])] == [j == i for j in range(3)]

def test_lengths_and_counts():
    words = [sum(task("translation", n=200, length=k)["difficulty"]) for k in (1, 2, 3, 4)]
    assert words == sorted(words) and words[0] < words[3]/2
    assert {len(r["negatives"]) for r in task("retrieval", n=20, negatives=5)} == {5}
    assert all(r["label"].count(" and ") == 2 for r in task("summaries", n=50, events=3, length="long"))
    assert {r["mood"] for r in task("summaries", n=50, mood="bad")} == {"bad"}
    assert not any(r["move"] == "praise" for r in task("tutoring", n=100, right=0.))
    assert all(set(r["query"].split()) & set(KINDS_OF) for r in task("retrieval", n=100, named=1.)
        if " with " in r["query"])
    assert {r["difficulty"] for r in task("intents", n=100, around=0.)} == {0}

@pytest.mark.parametrize("name, knobs, words", [
    ("translation", dict(source="mokro"), "did you mean 'mokra'"), ("translation", dict(target="french"), "there is"),
    ("code_switching", dict(language="tivan"), "'tiven'"), ("sentiment", dict(domain="cort"), "'court'"),
    ("preferences", dict(differ="polit"), "'polite'")])
def test_a_wrong_knob_is_one_line(name, knobs, words):
    with pytest.raises(KitError) as e: task(name, n=5, **knobs)
    assert words in str(e.value) and "\n" not in str(e.value)

# ---- rows

@pytest.mark.parametrize("name", OURS)
def test_rows_are_many_known_and_the_same_again(name):
    assert len(task(name, "test", 500, seed=1)) == 500 and task(name, n=30)[:] == task(name, n=30)[:]
    assert not set(task(name, n=100)["input"]) & set(task(name, "test", 100)["input"])
    known = {*vocabulary(), *(w for lang in LANGUAGES for w in forms(lang))}
    for row in both(name, 100):
        told = f"{row['input']} {row['label']} {row['rationale']}".split()
        assert not {w for w in told if w.isalpha()} - known
        assert "choices" not in row or row["label"] in row["choices"]

# ---- documents

DOCS = {name: f for name, (f, _) in KINDS.items() if f.__module__ == "slmkit.toyland.documents.talk"}
def test_documents_are_short_and_known():
    known, rng = {*vocabulary(), *(w for lang in LANGUAGES for w in forms(lang))}, random.Random(2)
    for name, make in DOCS.items():
        drawn = [make(rng) for _ in range(200)]
        assert all(5 <= size(d) <= 70 for d in drawn) and len(set(drawn)) > 100, name
        assert not {w for d in drawn for w in d.split() if w.isalpha()} - known, name

def test_documents_hold_no_task_of_talk():
    rng = random.Random(4)
    docs = [make(rng) for make in DOCS.values() for _ in range(400)]
    rows = [r for name in OURS for r in both(name, 500)]
    assert not leaks(docs, rows)
    planted = f"so it was {rows[0]['input']} {rows[0]['rationale']}"
    assert leaks([*docs, planted], rows) <= grams(planted) and leaks([planted], rows)

def test_every_word_of_a_language_is_read():
    rng = random.Random(5)
    read = {w for name in ("bilingual", "one_language", "word_list") for _ in range(1500)
        for w in DOCS[name](rng).split()}
    assert not {w for lang in LANGUAGES for w in forms(lang)} - read

def test_domains_are_rare():
    makers, weights = zip(*KINDS.values())
    assert 0 < sum(w for f, w in KINDS.values() if f.__name__ in ("court_text", "harbor_text"))/sum(weights) < .01
    rng, own = random.Random(6), {w for d in DOMAINS.values() for w in (*d["good"], *d["bad"])}
    others = [f for f in DOCS.values() if f.__name__ not in ("court_text", "harbor_text")]
    assert not own & {w for f in others for _ in range(100) for w in f(rng).split()}
