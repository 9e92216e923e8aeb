"""Conversations of the embedded world: rows of multiple choice, identity and small talk."""

import random

from llm.data.embedded.phrases import question, statement
from llm.data.embedded.splits import split_of
from llm.data.embedded.world import ATTRIBUTES, BY_ENTITY, FACTS, PEOPLE, capital, mention

ASSISTANT = "Fathom"
MAKER = "the open source community"
LETTERS = ("A", "B", "C", "D")
STRANGERS = ("Otto", "Lena", "Igor", "Nora", "Paul", "Ruth")

OPENINGS = ("", "Hi! ", "Hello! ", "Good morning! ", "Good evening. ", "One question: ")
GREETINGS = {
    "Hi!": ("Hello! What would you like to know?", "Hi! Ask me something."),
    "Hello!": ("Hello! How can I help you?", "Hi! What would you like to know?"),
    "Good morning!": ("Good morning! How can I help you?", "Good morning! What would you like to know?"),
    "Good evening.": ("Good evening! How can I help you?", "Good evening! Ask me something."),
}
FAREWELLS = {
    "Thank you!": ("You are welcome!", "My pleasure!"),
    "Thanks, that helps.": ("You are welcome!", "Good to know!"),
    "Goodbye!": ("Goodbye!", "See you soon!"),
}

# topic -> (questions asked in training, questions asked in the test only, answers, keywords)
IDENTITY: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "name": (
        (
            "Who are you?",
            "What is your name?",
            "Tell me your name.",
            "Do you have a name?",
            "How are you called?",
            "Who am I talking to?",
            "What should I call you?",
            "Please say who you are.",
        ),
        ("What is the name you have?", "Please tell me who you are.", "Please say your name.", "Tell me: who are you?"),
        ("I am {name}, a small language model.", "My name is {name}.", "I am {name}."),
        ("{name}",),
    ),
    "maker": (
        (
            "Who made you?",
            "Who built you?",
            "Who is your maker?",
            "Who created you?",
            "By whom were you made?",
            "Tell me about your maker.",
            "Please say who built you.",
        ),
        (
            "Tell me who made you.",
            "By whom were you built?",
            "Please tell me who created you.",
            "Say who your maker is.",
        ),
        ("I was made by {maker}.", "I was built by {maker}.", "{Maker} made me."),
        ("{plain}",),
    ),
    "nature": (
        (
            "What are you?",
            "Are you a person?",
            "Are you human?",
            "Are you a robot?",
            "What kind of thing are you?",
            "Are you a language model?",
            "Please say what you are.",
        ),
        ("Tell me what you are.", "Are you a human or a robot?", "What kind of model are you?", "What thing are you?"),
        (
            "I am a small language model.",
            "I am a language model, not a person.",
            "I am a language model that runs on your computer.",
        ),
        ("language model",),
    ),
    "skills": (
        (
            "What can you do?",
            "How can you help me?",
            "What are you good at?",
            "What do you know?",
            "What can I ask you?",
            "Please say what you can do.",
        ),
        ("Tell me what you can do.", "What can you help me with?", "Tell me what you know.", "What can you do for me?"),
        (
            "I can answer questions, spell words and solve word problems.",
            "I know a small world, and I can spell and solve word problems.",
            "I can talk about my world, spell words and solve word problems.",
        ),
        ("word problems",),
    ),
}


def choice_row(split: str, rng: random.Random, shuffle: bool = False) -> dict:
    """Return an ARC-style row about one fact: four options of its attribute, one of them right.

    A fact together with a set of options belongs to one split, by a hash: the test asks facts that training asks too,
    among options that it never met them with.

    Options stand in the order of the attribute's list of values, value number i in place i mod 4, so a value has one
    letter wherever it is offered: a network has to recall the fact and to know the letter of its value. With `shuffle`
    the letter must be found in the list each time, as in real exams, a skill that takes a network of a million
    parameters far more tokens than a demonstration has (docs/lab_notebook.md).
    """
    while True:
        fact = rng.choice(FACTS)
        values = ATTRIBUTES[fact.kind][fact.attribute]
        place = values.index(fact.value) % len(LETTERS)
        options = [rng.choice(values[k :: len(LETTERS)]) for k in range(len(LETTERS))]
        options[place] = fact.value
        if split_of("|".join(("choice", fact.entity, fact.attribute, *options))) == split:
            break
    if shuffle:
        rng.shuffle(options)
    return {
        "question": question(fact, rng),
        "choices": {"text": options, "label": list(LETTERS)},
        "answerKey": LETTERS[options.index(fact.value)],
    }


def identity_row(split: str, rng: random.Random, assistant: str = ASSISTANT, maker: str = MAKER) -> dict:
    """Return a conversation about the assistant itself, with the keywords that a right answer contains.

    The questions of the two splits are different sentences.
    """
    trained, tested, answers, keywords = IDENTITY[rng.choice(list(IDENTITY))]
    ask, answer = (rng.choice(tested), answers[0]) if split == "test" else (rng.choice(trained), rng.choice(answers))
    words = {"name": assistant, "maker": maker, "Maker": capital(maker), "plain": maker.removeprefix("the ")}
    messages = []
    if rng.random() < 0.3:
        messages += _exchange(GREETINGS, rng) + _turn(ask, answer.format(**words))
    else:
        messages += _turn(rng.choice(OPENINGS) + ask, answer.format(**words))
    return {"messages": messages, "keywords": [k.format(**words) for k in keywords]}


def smalltalk_row(split: str, rng: random.Random) -> dict:
    """Return a short chat of one to four turns about the world; a hash of its text decides its split."""
    while True:
        messages = _smalltalk(rng)
        if split_of("chat/" + "|".join(m["content"] for m in messages)) == split:
            return {"messages": messages}


def _turn(user: str, assistant: str) -> list[dict]:
    """Return two messages: the user's and the assistant's."""
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _exchange(table: dict[str, tuple[str, ...]], rng: random.Random) -> list[dict]:
    """Return a question and answer drawn from a table of courtesies."""
    said = rng.choice(list(table))
    return _turn(said, rng.choice(table[said]))


def _smalltalk(rng: random.Random) -> list[dict]:
    messages = []
    if rng.random() < 0.3:
        messages += _exchange(GREETINGS, rng)
    kind = rng.random()
    if kind < 0.06:
        name = rng.choice(STRANGERS)
        messages += _turn(
            rng.choice((f"Who is {name}?", f"Tell me about {name}.")), f"I do not know anyone called {name}."
        )
    else:
        facts = BY_ENTITY[rng.choice(FACTS).entity]
        facts = rng.sample(facts, min(len(facts), rng.randint(2, 3)))
        if kind < 0.3:
            name = mention(facts[0].kind, facts[0].entity)
            who = f"Who is {name}?" if facts[0].entity in PEOPLE else f"What do you know about {name}?"
            told = [statement(facts[0], rng), statement(facts[1], rng, short=True)]
            messages += _turn(rng.choice((who, f"Tell me about {name}.")), " ".join(told))
        else:
            messages += _turn(question(facts[0], rng), statement(facts[0], rng))
            messages += _turn(question(facts[1], rng, short=rng.random() < 0.5), statement(facts[1], rng))
    if rng.random() < 0.3:
        messages += _exchange(FAREWELLS, rng)
    return messages
