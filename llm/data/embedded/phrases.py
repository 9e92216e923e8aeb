"""The wording of facts: several statements and questions per attribute, filled with an entity and a value.

`{n}` is the entity inside a sentence, `{S}` the subject at its start (a name or a pronoun), `{v}` the value.
"""

import random

from llm.data.embedded.world import Fact, capital, mention, pronoun

STATEMENTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("person", "town"): (
        "{S} lives in {v}.",
        "{S} has a house in {v}.",
        "The home of {n} is in {v}.",
        "{v} is the town of {n}.",
    ),
    ("person", "job"): (
        "{S} is a {v}.",
        "{S} works as a {v}.",
        "The job of {n} is {v}.",
        "The work of {n} is that of a {v}.",
    ),
    ("person", "pet"): ("{S} has a {v}.", "{S} keeps a {v}.", "The pet of {n} is a {v}.", "A {v} lives with {n}."),
    ("person", "colour"): (
        "{S} likes {v} best of all colours.",
        "{S} loves the colour {v}.",
        "The favourite colour of {n} is {v}.",
    ),
    ("person", "food"): ("{S} likes to eat {v}.", "{S} loves {v}.", "The favourite food of {n} is {v}."),
    ("animal", "colour"): ("{S} is {v}.", "{S} has a {v} coat.", "The colour of {n} is {v}."),
    ("animal", "home"): ("{S} lives in the {v}.", "{S} sleeps in the {v}.", "The home of {n} is the {v}."),
    ("animal", "feed"): ("{S} eats {v}.", "{S} likes to eat {v}.", "The food of {n} is {v}."),
    ("object", "colour"): ("{S} is {v}.", "{S} has a {v} colour.", "The colour of {n} is {v}."),
    ("object", "material"): ("{S} is made of {v}.", "{S} was made from {v}.", "{v} is what {n} is made of."),
    ("object", "owner"): ("{S} belongs to {v}.", "{S} is owned by {v}.", "{v} owns {n}.", "{v} is the owner of {n}."),
    ("town", "landmark"): (
        "{S} has a {v}.",
        "{S} is built around a {v}.",
        "There is a {v} in {n}.",
        "A {v} stands in {n}.",
    ),
    ("town", "craft"): (
        "{S} is known for {v}.",
        "{S} makes {v}.",
        "People make {v} in {n}.",
        "The {v} of {n} are famous.",
    ),
    ("town", "mayor"): ("{S} is led by {v}.", "The mayor of {n} is {v}.", "{v} is the mayor of {n}.", "{v} leads {n}."),
}

QUESTIONS: dict[tuple[str, str], tuple[str, ...]] = {
    ("person", "town"): ("Where does {n} live?", "In which town does {n} live?", "Where is the home of {n}?"),
    ("person", "job"): ("What is the job of {n}?", "What does {n} work as?", "What work does {n} do?"),
    ("person", "pet"): ("What pet does {n} have?", "Which animal does {n} keep?", "What is the pet of {n}?"),
    ("person", "colour"): (
        "Which colour does {n} like best?",
        "What colour does {n} love?",
        "What is the favourite colour of {n}?",
    ),
    ("person", "food"): (
        "What does {n} like to eat?",
        "Which food does {n} love?",
        "What is the favourite food of {n}?",
    ),
    ("animal", "colour"): ("What colour is {n}?", "What is the colour of {n}?", "Which colour does {n} have?"),
    ("animal", "home"): ("Where does {n} live?", "Where does {n} sleep?", "What is the home of {n}?"),
    ("animal", "feed"): ("What does {n} eat?", "What does {n} like to eat?", "What is the food of {n}?"),
    ("object", "colour"): ("What colour is {n}?", "What is the colour of {n}?", "Which colour does {n} have?"),
    ("object", "material"): ("What is {n} made of?", "What was {n} made from?"),
    ("object", "owner"): ("Who owns {n}?", "Who is the owner of {n}?", "To whom does {n} belong?"),
    ("town", "landmark"): ("What stands in {n}?", "What is there in {n}?", "What does {n} have?"),
    ("town", "craft"): ("What is {n} known for?", "What do people make in {n}?", "What does {n} make?"),
    ("town", "mayor"): ("Who is the mayor of {n}?", "Who leads {n}?", "By whom is {n} led?"),
}

_TAKES_PRONOUN = ("does {n}", "colour is {n}?", "What is {n} ", "owns {n}")


def statement(fact: Fact, rng: random.Random, short: bool = False) -> str:
    """A sentence that states the fact; with `short` the subject is a pronoun."""
    wordings = STATEMENTS[fact.kind, fact.attribute]
    if short:
        wordings = tuple(w for w in wordings if w.startswith("{S}"))
    name = mention(fact.kind, fact.entity)
    subject = pronoun(fact.kind, fact.entity) if short else name
    return capital(rng.choice(wordings).format(S=capital(subject), n=name, v=fact.value))


def question(fact: Fact, rng: random.Random, short: bool = False) -> str:
    """A question whose answer is the fact's value; with `short` it asks about "she", "he" or "it" where grammar allows."""
    wordings = QUESTIONS[fact.kind, fact.attribute]
    if short:
        fitting = tuple(w for w in wordings if any(part in w for part in _TAKES_PRONOUN))
        if fitting:
            return rng.choice(fitting).format(n=pronoun(fact.kind, fact.entity))
    return rng.choice(wordings).format(n=mention(fact.kind, fact.entity))
