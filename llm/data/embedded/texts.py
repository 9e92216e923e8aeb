"""Pretraining text about the embedded world: short documents, each a pure function of (seed, split, index)."""

import random
from collections.abc import Callable, Iterator

from llm.data.embedded.phrases import question, statement
from llm.data.embedded.problems import draw_problem
from llm.data.embedded.splits import check_split, generator, split_of
from llm.data.embedded.words import draw_word, spell
from llm.data.embedded.world import (
    ATTRIBUTES,
    BY_ATTRIBUTE,
    BY_ENTITY,
    FACTS,
    PEOPLE,
    capital,
    pronoun,
    value_of,
)

WEATHER = ("sunny", "cold", "windy", "warm", "quiet", "rainy")
TIMES = ("One morning", "One evening", "One day", "Last week", "In spring", "In winter")
VERBS = ("walked", "went", "ran", "rode", "came")


def _entity(rng: random.Random) -> str:
    return rng.choice(FACTS).entity  # weighted by the number of facts


def _profile(split: str, rng: random.Random) -> str:
    """Write several facts about one entity, the first by name, the others partly by pronoun."""
    facts = BY_ENTITY[_entity(rng)]
    chosen = rng.sample(facts, rng.randint(2, len(facts)))
    return " ".join(statement(fact, rng, short=i > 0 and rng.random() < 0.5) for i, fact in enumerate(chosen))


def _survey(split: str, rng: random.Random) -> str:
    """Write one attribute of several entities."""
    facts = BY_ATTRIBUTE[rng.choice([(kind, name) for kind, table in ATTRIBUTES.items() for name in table])]
    return " ".join(statement(fact, rng) for fact in rng.sample(facts, rng.randint(3, 5)))


def _dialogue(split: str, rng: random.Random) -> str:
    """Write questions about one or two entities, answered in a word or in a sentence."""
    form = rng.choice(("{}\n{}", "{}\n{}", "Question: {}\nAnswer: {}"))
    lines = []
    for _ in range(rng.randint(1, 2)):
        for fact in rng.sample(BY_ENTITY[_entity(rng)], 2):
            answer = fact.value + "." if rng.random() < 0.4 else statement(fact, rng)
            lines.append(form.format(question(fact, rng), answer))
    return "\n".join(lines)


def _story(split: str, rng: random.Random) -> str:
    """Write a small event in a town that agrees with the facts of the people in it."""
    who, friend = rng.sample(PEOPLE, 2)
    town = value_of(rng.choice((who, friend)), "town")
    she = capital(pronoun("person", who))
    middle = [
        f"{she} took the {value_of(who, 'pet')} along.",
        f"{friend} the {value_of(friend, 'job')} said hello to {who} the {value_of(who, 'job')}.",
        f"They looked at the {value_of(town, 'landmark')} of {town}.",
        f"{she} bought {value_of(town, 'craft')}, for {town} is known for them.",
        f"{she} wore {value_of(who, 'colour')}, and {friend} wore {value_of(friend, 'colour')}.",
        f"{friend} came with the {value_of(friend, 'pet')}.",
    ]
    opening = f"{rng.choice(TIMES)} {who} {rng.choice(VERBS)} to {town} to meet {friend}. It was {rng.choice(WEATHER)}."
    home = value_of(who, "town")
    ending = (
        f"In the end {who} went home to {home}."
        if home != town
        else f"In the end {who} went home, for {who} lives in {home}."
    )
    return " ".join([opening, *rng.sample(middle, rng.randint(2, 4)), ending])


def _sums(split: str, rng: random.Random) -> str:
    """Write a word problem of this split, as a worksheet or as a little story with its calculations in prose."""
    problem = draw_problem(split, rng)
    lines = [f"{s.before} {s.expression}={s.result} {s.after}" for s in problem.steps]
    if rng.random() < 0.5:
        return "\n".join([problem.text(), *lines, f"#### {problem.steps[-1].result}"])
    return " ".join([*problem.sentences, *lines])


def _spelling(split: str, rng: random.Random) -> str:
    """Write sentences that spell invented words of this split or look at their letters."""
    lines = []
    for _ in range(rng.randint(2, 4)):
        word = draw_word(split, rng)
        letter = rng.choice(word)
        lines.append(
            rng.choice(
                (
                    f"The word {word} is spelled {spell(word)}.",
                    f"Spell the word {word}: {spell(word)}.",
                    f"{word}:{spell(word)}",
                    f"The word {word} has {len(word)} letters: {spell(word)}.",
                    f"The first letter of {word} is {word[0]} and the last is {word[-1]}.",
                    f"Count the letter {letter} in {word}: {spell(word)}. This gives us {word.count(letter)}.",
                    f"How many times does '{letter}' stand in '{word}'? Python: {word.count(letter)}.",
                )
            )
        )
    return "\n".join(lines)


MAKERS: tuple[tuple[Callable[[str, random.Random], str], float], ...] = (
    (_profile, 0.36),
    (_survey, 0.12),
    (_dialogue, 0.22),
    (_story, 0.05),
    (_sums, 0.16),
    (_spelling, 0.09),
)


def document(split: str, index: int, seed: int = 0) -> str:
    """Return document number `index` of a split: random access, so that a reader can resume anywhere."""
    rng = generator("documents", check_split(split), seed, index)
    makers, weights = zip(*MAKERS, strict=True)
    while True:
        text = rng.choices(makers, weights=weights)[0](split, rng)
        if split_of("document/" + text) == split:
            return text


def documents(split: str, n: int, seed: int = 0, start: int = 0) -> Iterator[str]:
    """Yield documents `start` ... `n - 1` of a split ("train" or "test"), 60 to 500 characters each.

    Both splits speak of one world. Their texts are disjoint, because a hash of the text decides its split, and word
    problems and spelled words inside a document come from the pool of the document's own split.
    """
    return (document(split, index, seed) for index in range(start, n))
