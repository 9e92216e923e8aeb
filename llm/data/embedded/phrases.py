"""Wording of facts: several statements and questions per attribute, filled with an entity and a value.

`{n}` is the entity inside a sentence, `{S}` the subject at its start (a name or a pronoun), `{v}` the value.
"""

import random

from llm.data.embedded.world import Fact, capital, mention, pronoun

STATEMENTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("person", "town"): ("{S} lives in {v}.", "{S} has a house in {v}.", "The home of {n} is in {v}."),
    ("person", "job"): ("{S} is a {v}.", "{S} works as a {v}.", "The job of {n} is {v}."),
    ("person", "pet"): ("{S} has a {v}.", "{S} keeps a {v}.", "The pet of {n} is a {v}."),
    ("person", "colour"): ("{S} loves {v}.", "{S} likes the colour {v}.", "The favourite colour of {n} is {v}."),
    ("animal", "colour"): ("{S} is {v}.", "{S} has a {v} coat.", "The colour of {n} is {v}."),
    ("animal", "home"): ("{S} lives in the {v}.", "{S} sleeps in the {v}.", "The home of {n} is the {v}."),
    ("animal", "feed"): ("{S} eats {v}.", "{S} likes to eat {v}.", "The food of {n} is {v}."),
    ("object", "material"): ("{S} is made of {v}.", "{S} was made from {v}.", "There is {v} in {n}."),
    ("object", "owner"): ("{S} belongs to {v}.", "{S} is owned by {v}.", "The owner of {n} is {v}."),
    ("town", "landmark"): ("{S} has a {v}.", "{S} is built around a {v}.", "There is a {v} in {n}."),
    ("town", "craft"): ("{S} is known for {v}.", "{S} makes {v}.", "The people of {n} make {v}."),
}

QUESTIONS: dict[tuple[str, str], tuple[str, ...]] = {
    ("person", "town"): ("Where does {n} live?", "In which town does {n} live?", "Where is the home of {n}?"),
    ("person", "job"): ("What is the job of {n}?", "What does {n} work as?"),
    ("person", "pet"): ("What pet does {n} have?", "Which animal does {n} keep?", "What is the pet of {n}?"),
    ("person", "colour"): ("Which colour does {n} love?", "What is the favourite colour of {n}?"),
    ("animal", "colour"): ("What colour is {n}?", "What is the colour of {n}?"),
    ("animal", "home"): ("Where does {n} live?", "Where does {n} sleep?", "What is the home of {n}?"),
    ("animal", "feed"): ("What does {n} eat?", "What is the food of {n}?"),
    ("object", "material"): ("What is {n} made of?", "What was {n} made from?"),
    ("object", "owner"): ("Who owns {n}?", "Who is the owner of {n}?", "To whom does {n} belong?"),
    ("town", "landmark"): ("What stands in {n}?", "What is there in {n}?"),
    ("town", "craft"): ("What is {n} known for?", "What does {n} make?", "What do the people of {n} make?"),
}

_TAKES_PRONOUN = ("does {n}", "colour is {n}?", "What is {n} ", "owns {n}")


def statement(fact: Fact, rng: random.Random, short: bool = False) -> str:
    """Return a sentence that states the fact; with `short` the subject is a pronoun."""
    wordings = STATEMENTS[fact.kind, fact.attribute]
    if short:
        wordings = tuple(w for w in wordings if w.startswith("{S}"))
    name = mention(fact.kind, fact.entity)
    subject = pronoun(fact.kind, fact.entity) if short else name
    return capital(rng.choice(wordings).format(S=capital(subject), n=name, v=fact.value))


def question(fact: Fact, rng: random.Random, short: bool = False) -> str:
    """Return a question whose answer is the fact's value; with `short` about a pronoun where grammar allows."""
    wordings = QUESTIONS[fact.kind, fact.attribute]
    if short:
        fitting = tuple(w for w in wordings if any(part in w for part in _TAKES_PRONOUN))
        if fitting:
            return rng.choice(fitting).format(n=pronoun(fact.kind, fact.entity))
    return rng.choice(wordings).format(n=mention(fact.kind, fact.entity))
