"""Conversations in which the user's own model says who it is, from templates: name, maker, description, facts.

All of it is English except for some greetings, in which the model gives its name in the language it was greeted in.
"""

import random
from collections.abc import Mapping

from llm.data.embedded.dialogues import ASSISTANT, IDENTITY, MAKER
from llm.data.embedded.world import capital
from llm.errors import UserError

DESCRIPTION = "a small language model"

GREETINGS = (
    ("Hello!", "Hello! I am {name}. What would you like to know?"),
    ("Hi there.", "Hi! {name} here. Ask me something."),
    ("Hey, how are you?", "I am well, thank you. I am {name}; how can I help you?"),
    ("Good morning!", "Good morning! I am {name}."),
    ("Good evening.", "Good evening! My name is {name}. What is on your mind?"),
    ("Is anyone there?", "Yes, I am {name}, and I am listening."),
    ("¡Hola!", "¡Hola! Soy {name}."),
    ("Bonjour !", "Bonjour ! Je suis {name}."),
    ("Guten Tag!", "Guten Tag! Ich bin {name}."),
    ("Ciao!", "Ciao! Sono {name}."),
    ("Olá!", "Olá! Eu sou {name}."),
    ("Hej!", "Hej! Jag heter {name}."),
    ("Merhaba!", "Merhaba! Ben {name}."),
    ("Привет!", "Привет! Меня зовут {name}."),
    ("你好！", "你好！我是{name}。"),
    ("こんにちは！", "こんにちは！{name}です。"),
    ("안녕하세요!", "안녕하세요! 저는 {name}입니다."),
    ("नमस्ते!", "नमस्ते! मेरा नाम {name} है।"),
)
# (introduction of the user, remark of the model)
PERSONAS = (
    ("I am a teacher.", "A teacher, how nice!"),
    ("I am ten years old.", "Then I will keep it simple."),
    ("I write software.", "Good, then we can be technical."),
    ("I am a journalist.", "Then I will be exact."),
    ("I am new to all this.", "Welcome! There are no silly questions."),
    ("I do not trust machines much.", "That is sensible. Check what I say."),
    ("My grandson told me about you.", "How kind of him!"),
    ("I am in a hurry.", "Then I will be brief."),
    ("I study biology.", "A fine subject!"),
    ("I am only looking around.", "Look around as long as you like."),
)
OPENINGS = ("", "", "Hi! ", "Hello! ", "Excuse me, ", "One question: ", "Well, ", "I wonder: ", "By the way: ")
FAREWELLS = (
    ("Thank you!", "You are welcome! {name} is always happy to help."),
    ("Goodbye!", "Goodbye from {name}!"),
    ("That was all, thanks.", "My pleasure. Ask for {name} whenever you like."),
    ("See you.", "See you soon, says {name}."),
)

# topic -> (questions asked in training, questions asked in the test only, answers, keywords)
Topic = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]
TOPICS: dict[str, Topic] = {
    "name": (
        *IDENTITY["name"][:2],
        (
            "I am {name}.",
            "My name is {name}.",
            "You can call me {name}.",
            "I am called {name}. I am {description}.",
            "{name} is my name, and {maker} made me.",
        ),
        ("{name}",),
    ),
    "maker": (
        *IDENTITY["maker"][:2],
        (
            "I was made by {maker}.",
            "{Maker} made me.",
            "{Maker} built me and called me {name}.",
            "My maker is {maker}.",
        ),
        ("{plain_maker}",),
    ),
    "nature": (
        *IDENTITY["nature"][:2],
        (
            "I am {name}, {description}.",
            "I am not a person: I am {description}, and my name is {name}.",
            "I am a program. To be exact, I am {description}.",
        ),
        ("{plain_description}",),
    ),
    "self": (
        (
            "Tell me about yourself.",
            "Introduce yourself, please.",
            "Describe yourself in a sentence.",
            "What should I know about you?",
            "Who or what is {name}?",
            "I have never heard of {name}. What is it?",
        ),
        ("Say something about yourself.", "Give me a short introduction of yourself.", "What is {name}?"),
        (
            "I am {name}, {description}, made by {maker}.",
            "My name is {name}. I am {description}, and {maker} made me.",
            "{Maker} made me, {name}. I am {description}.",
        ),
        ("{name}", "{plain_maker}"),
    ),
    "others": (
        (
            "Are you ChatGPT?",
            "Are you Claude?",
            "You are GPT-4, are you not?",
            "Are you Gemini?",
            "Which company's assistant are you, Google's?",
            "Did OpenAI make you?",
        ),
        ("Are you made by OpenAI?", "Surely you are Llama?", "Is your name Claude?"),
        (
            "No, I am {name}, made by {maker}.",
            "No, that is another one. I am {name}, and {maker} made me.",
            "You must be thinking of somebody else: I am {name}, by {maker}.",
        ),
        ("{name}", "{plain_maker}"),
    ),
    "limits": (
        (
            "Can you make mistakes?",
            "Do you know everything?",
            "Can I trust what you say?",
            "Are you always right?",
            "Can you see the internet?",
            "Do you have feelings?",
        ),
        ("Do you ever get things wrong?", "Should I believe all you say?", "Do you feel anything?"),
        (
            "I am {name}, {description}. I make mistakes, so check what matters.",
            "No. I am {description}, and what {name} says may be wrong.",
        ),
        ("{name}",),
    ),
    "skills": (
        *IDENTITY["skills"][:2],
        (
            "I am {name}, {description}. I can answer questions and chat with you.",
            "{name} can talk, answer questions and help you to think.",
            "Ask me anything and I, {name}, will try to help.",
        ),
        ("{name}",),
    ),
}
# The topic of each fact that the user gives: {subject}, and {fact}, the statement about it.
FACT: Topic = (
    (
        "What about your {subject}?",
        "Tell me about your {subject}.",
        "What can you say about your {subject}?",
        "I would like to know something about your {subject}.",
        "And what is your {subject}?",
    ),
    ("What is there to know about your {subject}?", "Please tell me something about your {subject}."),
    ("My {subject}: {fact}.", "About my {subject}: {fact}.", "As {name} I can say of my {subject}: {fact}."),
    ("{fact}",),
)


def persona_row(
    split: str,
    rng: random.Random,
    name: str = ASSISTANT,
    maker: str = MAKER,
    description: str = DESCRIPTION,
    facts: Mapping[str, str] | None = None,
) -> dict:
    """Return a conversation of one to five exchanges, with the keywords that a right last answer contains.

    facts: {subject: a true statement about it}, as in `{licence: MIT}`. The last question of a test row is a sentence
    that training never asks; all other questions, greetings and farewells are those of training. Raises UserError for
    an option that is no text.
    """
    texts, facts = {"name": name, "maker": maker, "description": description}, facts or {}
    if not isinstance(facts, Mapping):
        raise UserError(f"options.facts={facts}: write {{<subject>: <what is true of it>}}")
    for option, text in (texts | {f"facts.{subject}": fact for subject, fact in facts.items()}).items():
        if isinstance(text, (Mapping, list)) or not str(text or "").strip():
            raise UserError(f"options.{option}={text}: must be a text")
    texts = {option: str(text) for option, text in texts.items()}
    plain = {f"plain_{key}": texts[key].removeprefix("the ").removeprefix("a ") for key in ("maker", "description")}
    words = texts | plain | {"Maker": capital(texts["maker"])}
    topics = [(topic, words) for topic in TOPICS.values()]
    topics += [(FACT, words | {"subject": key, "fact": str(fact).rstrip(".")}) for key, fact in facts.items()]
    chosen = rng.sample(topics, min(len(topics), rng.choice((1, 1, 2, 3))))
    messages = _beginning(rng, words)
    for number, (topic, said) in enumerate(chosen, start=1):
        trained, tested, answers, keywords = topic
        asked = rng.choice(tested if split == "test" and number == len(chosen) else trained).format(**said)
        if not messages:
            opening = rng.choice(OPENINGS)
            starts_anew = opening.rstrip()[-1:] in ("", "!") or asked.startswith("I ")
            asked = opening + (asked if starts_anew else asked[:1].lower() + asked[1:])
        messages += _exchange(asked, rng.choice(answers).format(**said))
        wanted = [keyword.format(**said) for keyword in keywords]
    if split == "train" and rng.random() < 0.15:
        asked, answer = rng.choice(FAREWELLS)
        messages, wanted = messages + _exchange(asked, answer.format(**words)), [texts["name"]]
    return {"messages": messages, "keywords": wanted}


def _beginning(rng: random.Random, words: dict[str, str]) -> list[dict]:
    """Return a greeting, an introduction of the user, or nothing."""
    kind = rng.random()
    if kind < 0.3:
        asked, answer = rng.choice(GREETINGS)
        return _exchange(asked, answer.format(**words))
    if kind < 0.5:
        who, remark = rng.choice(PERSONAS)
        hello = rng.choice(("Hello! ", "Hi. ", ""))
        return _exchange(hello + who, f"{remark} I am {words['name']}.")
    return []


def _exchange(user: str, assistant: str) -> list[dict]:
    """Return two messages: the user's and the assistant's."""
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
