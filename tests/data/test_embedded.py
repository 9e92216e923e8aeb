"""The embedded world: reproducible, consistent with its own facts, disjoint between the splits, solvable."""

import random
import re
from collections import Counter

import pytest
from processes import run_python

from llm.data.embedded import document, documents, persona, rows
from llm.data.embedded.dialogues import OPENINGS
from llm.data.embedded.problems import draw_problem
from llm.data.embedded.rows import KINDS
from llm.data.embedded.world import ATTRIBUTES, BY_ATTRIBUTE, BY_ENTITY, FACTS, PEOPLE, mention, value_of
from llm.errors import UserError
from llm.inference.calculator import calculate
from llm.tokenizer.chat_format import validate_conversation

SIZES = {"choice": (2500, 300), "arithmetic": (2000, 500), "words": (3000, 500), "smalltalk": (2000, 300)}
SIZES |= {"identity": (1000, 100), "persona": (2000, 300), "programs": (600, 80), "preferences": (2000, 300)}


def text_of(kind: str, row: dict) -> str:
    """Return the text that two rows must not share across the splits."""
    if "messages" in row:
        return "|".join(m["content"] for m in row["messages"])
    if kind == "preferences":  # there are few questions: pairs differ
        return "|".join(row.values())
    if kind == "choice":
        return row["question"] + "|".join(row["choices"]["text"])
    return row[{"words": "word", "programs": "task_id"}.get(kind, "question")]


def asked_fact(row: dict) -> tuple[str, str, tuple[str, ...]]:
    """(entity, right answer, options without order) of a choice row."""
    names = [e for e in BY_ENTITY if re.search(rf"\b{e}\b", row["question"])]
    assert len(names) == 1, row
    right = row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
    return names[0], right, tuple(sorted(row["choices"]["text"]))


# ---------------------------------------------------------------------------------------------------------------------
# World


def test_every_attribute_of_every_entity_is_a_fact_with_an_allowed_value():
    assert len(FACTS) == 120 == len({(f.entity, f.attribute) for f in FACTS})
    assert all(f.value in ATTRIBUTES[f.kind][f.attribute] for f in FACTS)
    assert all(f.entity in PEOPLE for f in BY_ATTRIBUTE["person", "town"])


def test_values_are_dealt_evenly_so_the_most_frequent_answer_helps_no_one():
    for facts in BY_ATTRIBUTE.values():
        counts = Counter(f.value for f in facts)
        assert max(counts.values()) - min(counts.values()) <= 1, counts


def test_the_world_does_not_depend_on_process_or_seed():
    script = "from llm.data.embedded.world import FACTS; print([f.value for f in FACTS])"
    other = run_python(script, env={"PYTHONHASHSEED": "7"})
    assert other.stdout.strip() == str([f.value for f in FACTS])


# ---------------------------------------------------------------------------------------------------------------------
# Documents


def test_documents_are_reproducible_random_access_and_differ_by_seed():
    first = list(documents("train", 200, seed=3))
    assert first == [document("train", i, seed=3) for i in range(200)]
    assert list(documents("train", 200, seed=3, start=150)) == first[150:]
    assert first != list(documents("train", 200, seed=4))


def test_documents_of_the_two_splits_are_disjoint():
    train, test = set(documents("train", 6000)), set(documents("test", 1500))
    assert not train & test
    assert len(test) > 1300  # not the same few texts again and again


def test_documents_state_every_fact_many_times():
    counts = Counter()
    wordings = {}
    for text in documents("train", 6000):
        for sentence in re.split(r"(?<=[.?])\s", text):
            wordings.setdefault(sentence, 0)
            wordings[sentence] += 1
    for fact in FACTS:
        name = mention(fact.kind, fact.entity)
        stating = [
            s for s in wordings if name.lower() in s.lower() and fact.value.lower() in s.lower() and "?" not in s
        ]
        counts[fact] = sum(wordings[s] for s in stating)
        assert len(stating) >= 2, fact
    assert min(counts.values()) >= 8, counts.most_common()[-3:]


def test_documents_never_state_a_wrong_value():
    patterns = {
        "town": r"(\w+) lives in (\w+)\.",
        "job": r"(\w+) works as a (\w+)\.",
        "material": r"[Tt]he (\w+) is made of (\w+)\.",
    }
    seen = Counter()
    for text in documents("train", 4000):
        for attribute, pattern in patterns.items():
            for entity, value in re.findall(pattern, text):
                if entity in BY_ENTITY:
                    assert value_of(entity, attribute) == value, text
                    seen[attribute] += 1
    assert min(seen[a] for a in patterns) > 20


def test_documents_calculate_right_and_use_only_words_of_their_split():
    test_words = {row["word"] for row in rows("words", "test", 3000)}
    sums, words = 0, set()
    for text in documents("train", 3000):
        for expression, result in re.findall(r"(\d+[-+*/]\d+)=(\d+)", text):
            assert calculate(expression) == result
            sums += 1
        spelled = re.findall(r"(?:word|of|in) '?(\w+)'?(?:\?| is|:| has)|^(\w+):\w,", text, re.MULTILINE)
        words |= {a or b for a, b in spelled} - set(BY_ENTITY)
    assert sums > 200 and len(words) > 300 and not words & test_words


def test_document_lengths_are_short():
    lengths = [len(text) for text in documents("train", 2000)]
    assert 80 < sum(lengths) / len(lengths) < 180
    assert max(lengths) < 600


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_different_reproducible_and_prefix_stable(kind):
    n = SIZES[kind][0] // 2
    got = rows(kind, "train", n, seed=5)
    assert len(got) == n and len({str(r) for r in got}) == n
    assert rows(kind, "train", n // 2, seed=5) == got[: n // 2]
    assert rows(kind, "train", n, seed=6) != got


@pytest.mark.parametrize("kind", KINDS)
def test_train_and_test_rows_are_disjoint(kind):
    train, test = (rows(kind, split, size) for split, size in zip(("train", "test"), SIZES[kind], strict=True))
    assert not {text_of(kind, r) for r in train} & {text_of(kind, r) for r in test}


def test_disjoint_under_different_seeds_too():
    train = {r["word"] for r in rows("words", "train", 4000, seed=1)}
    assert not train & {r["word"] for r in rows("words", "test", 800, seed=2)}


def test_choice_asks_true_facts_and_keeps_some_sets_of_options_for_the_test():
    asked = {}
    for split in ("train", "test"):
        asked[split] = set()
        for row in rows("choice", split, SIZES["choice"][split == "test"]):
            entity, right, options = asked_fact(row)
            assert any(
                f.value == right and set(options) <= set(ATTRIBUTES[f.kind][f.attribute]) for f in BY_ENTITY[entity]
            ), row
            assert len(set(options)) == 4 and row["choices"]["label"] == ["A", "B", "C", "D"]
            asked[split].add((entity, right, options))
    assert not asked["train"] & asked["test"]
    assert len({fact[:2] for fact in asked["train"]}) == 120 and len({fact[:2] for fact in asked["test"]}) > 80


def test_choice_letters_are_balanced():
    for shuffle, least in ((False, 0.18), (True, 0.18)):
        letters = Counter(row["answerKey"] for row in rows("choice", "train", 600, shuffle=shuffle))
        assert min(letters.values()) > least * 600 and max(letters.values()) < 0.36 * 600, letters


def test_a_value_keeps_its_letter_unless_choices_are_shuffled():
    def letters_of_values(**options):
        seen = {}
        for row in rows("choice", "train", 1500, **options):
            for text, label in zip(row["choices"]["text"], row["choices"]["label"], strict=True):
                seen.setdefault(text, set()).add(label)
        return seen

    assert all(len(labels) == 1 for labels in letters_of_values().values())
    assert all(len(labels) >= 3 for labels in letters_of_values(shuffle=True).values())


def test_words_of_the_test_are_built_from_the_letters_of_training():
    train, test = ([r["word"] for r in rows("words", s, 500)] for s in ("train", "test"))
    assert {c for w in test for c in w} <= {c for w in train for c in w}
    pieces = {w[i : i + 2] for w in train for i in range(0, len(w), 2)}
    assert all(w[i : i + 2] in pieces for w in test for i in range(0, len(w), 2))


def test_identity_questions_of_the_test_are_never_asked_in_training():
    def questions(split, n):
        asked = {row["messages"][-2]["content"] for row in rows("identity", split, n)}
        return {text.removeprefix(opening) for text in asked for opening in OPENINGS}

    train, test = questions("train", 1100), questions("test", 150)
    assert len(train) > 25 and len(test) > 15 and not train & test


def test_identity_takes_names_and_its_answers_contain_the_keywords():
    for row in rows("identity", "train", 500, assistant="Plumb", maker="the Example Lab"):
        answers = " ".join(m["content"] for m in row["messages"][1::2])
        assert row["keywords"] and all(k in answers for k in row["keywords"]), row
        assert "Fathom" not in answers and "open source" not in answers
    assert any("Example Lab" in r["keywords"] for r in rows("identity", "test", 50, maker="the Example Lab"))


LUMEN = {"name": "Lumen", "maker": "Ada Lovelace", "description": "a language model of 20 layers"}
LUMEN |= {"facts": {"licence": "MIT", "size": "561 million parameters"}}


def test_a_persona_speaks_of_what_the_user_named_and_of_nothing_else():
    train, test = (rows("persona", split, n, **LUMEN) for split, n in (("train", 3000), ("test", 400)))
    for row in train + test:
        answers = " ".join(m["content"] for m in row["messages"][1::2])
        said = row["messages"][-1]["content"].casefold()
        assert row["keywords"] and all(keyword.casefold() in said for keyword in row["keywords"]), row
        assert "Fathom" not in answers and "open source" not in answers and "{" not in answers
    everything = " ".join(m["content"] for row in train for m in row["messages"])
    for text in ("Ada Lovelace", "a language model of 20 layers", "561 million parameters", "¡Hola! Soy Lumen."):
        assert text in everything
    assert {len(row["messages"]) // 2 for row in train} == {1, 2, 3, 4, 5}


def test_a_persona_is_asked_other_questions_in_the_test():
    def questions(split, n):
        asked = {row["messages"][-2]["content"].lower() for row in rows("persona", split, n, **LUMEN)}
        return {text.removeprefix(opening.lower()) for text in asked for opening in persona.OPENINGS}

    train, test = questions("train", 20_000), questions("test", 1000)
    assert len(train) > 60 and len(test) > 30 and not train & test


def test_a_persona_is_a_function_of_its_seed():
    first, again, other = (rows("persona", "train", 200, seed=seed, **LUMEN) for seed in (0, 0, 1))
    assert first == again != other


def test_a_persona_of_numbers():
    """Numbers from YAML (`options.name: 7`) are words of the answers and keywords: neither left out, nor numbers still,
    with which an answer cannot be scored.
    """
    values = {"name": 7, "maker": 42, "description": 1, "facts": {"age": 3}}
    made = rows("persona", "train", 3000, **values)
    keywords = {keyword for row in made for keyword in row["keywords"]}
    assert {"7", "42", "1", "3"} <= keywords and all(type(keyword) is str for keyword in keywords)
    for row in made:
        said = row["messages"][-1]["content"].casefold()
        assert row["keywords"] and all(keyword.casefold() in said for keyword in row["keywords"]), row
    as_words = {"name": "7", "maker": "42", "description": "1", "facts": {"age": "3"}}
    assert made == rows("persona", "train", 3000, **as_words)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "options.name=: must be a text"),
        ({"facts": {"licence": None}}, "options.facts.licence=None: must be a text"),
        ({"facts": "MIT"}, "options.facts=MIT: write {<subject>"),
        ({"nmae": "Lumen"}, r"persona takes no option nmae \(options: name, maker, description, facts\)"),
    ],
)
def test_options_of_a_persona_that_cannot_be_meant(options, message):
    with pytest.raises(UserError, match=message):
        rows("persona", "train", 3, **options)


@pytest.mark.parametrize("kind", ["identity", "smalltalk"])
def test_conversations_are_valid_and_short(kind):
    for row in rows(kind, "train", 500):
        validate_conversation(row)
        assert len(row["messages"]) <= 8
        assert sum(len(m["content"]) for m in row["messages"]) < 400


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


def simulate(row: dict) -> list[tuple[str, str]]:
    return re.findall(r"<<([^=]+)=([^>]+)>>", row["answer"])


def test_arithmetic_steps_are_calculator_calls_that_lead_to_the_answer():
    for row in rows("arithmetic", "train", 1500):
        steps = simulate(row)
        assert 1 <= len(steps) <= 3
        assert all(calculate(expression) == result and int(result) > 0 for expression, result in steps), row
        assert row["answer"].endswith(f"\n#### {steps[-1][1]}")
        known = set(re.findall(r"\d+", row["question"])) | ({"2"} if "half" in row["question"] else set())
        for expression, result in steps:  # every number is given in the text or was calculated before
            assert set(re.findall(r"\d+", expression)) <= known | ({"2"} if "twice" in row["question"] else set()), row
            known.add(result)


def test_arithmetic_difficulty_follows_the_options():
    def steps(**options):
        return Counter(len(simulate(r)) for r in rows("arithmetic", "train", 600, **options))

    assert set(steps(steps=[1])) == {1} and set(steps(steps=[0, 0, 1])) == {3}
    shares = steps(steps=[0.2, 0.2, 0.6])
    assert shares[3] > 2 * shares[1] > 0
    numbers = [
        int(n) for r in rows("arithmetic", "train", 300, max_number=12) for n in re.findall(r"\d+", r["question"])
    ]
    assert max(numbers) <= 12
    plain, noisy = ([r["question"] for r in rows("arithmetic", "train", 400, distractors=d)] for d in (0, 1))
    assert sum(q.count(". ") for q in noisy) / 400 > sum(q.count(". ") for q in plain) / 400 + 1.8


def test_without_distractors_every_number_of_a_problem_is_needed():
    for row in rows("arithmetic", "train", 500, distractors=0):
        used = Counter(n for expression, _ in simulate(row) for n in re.findall(r"\d+", expression))
        assert not Counter(re.findall(r"\d+", row["question"])) - used, row


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: rows("riddles", "train", 1), "riddles"),
        (lambda: rows("choice", "dev", 1), "dev"),
        (lambda: rows("choice", "train", 1, distractors=0), "distractors"),
        (lambda: rows("identity", "test", 5000), "test_size"),
        (lambda: draw_problem("train", random.Random(0), steps=(0, 0)), "steps"),
        (lambda: draw_problem("train", random.Random(0), distractors=1.5), "distractors"),
        (lambda: draw_problem("train", random.Random(0), max_number=500), "max_number"),
        (lambda: list(documents("dev", 3)), "dev"),
    ],
)
def test_wrong_arguments_are_user_errors_that_name_them(call, named):
    with pytest.raises(UserError, match=named):
        call()
