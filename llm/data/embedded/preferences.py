"""Pairs of answers of the embedded world, and the rules that say which of two answers is better.

A rule scores any text, so that answers which a model writes freely can be compared: its win rate over another model is
a true measure of what training on the pairs was for.
"""

import random
import re

from llm.data.embedded.phrases import question, statement
from llm.data.embedded.splits import split_of
from llm.data.embedded.world import ATTRIBUTES, BY_ENTITY, FACTS, Fact, mention

GREETING = ("Hello!", "Hi!", "Good morning!", "Good evening!")
OPENINGS = ("Hi! ", "Hello! ", "Good morning! ")


def polite(text: str, row: dict) -> float:
    """Return 1 for an answer that greets back and then says something, else 0."""
    found = next((word for word in GREETING if text.startswith(word)), None)
    return float(found is not None and len(text) > len(found) + 2)


def brief(text: str, row: dict) -> float:
    """Return -1 for every sentence behind the first, and -3 for an answer that says nothing."""
    sentences = re.findall(r"[.!?](?:\s|$)", text)
    return -3.0 if not text.strip() else 1.0 - max(len(sentences), 1)


def right(text: str, row: dict) -> float:
    """Return 1 for an answer that has the right value of the row's fact and no other value of its kind, else 0."""
    words = set(re.findall(r"\w+", text))
    return float(row["value"] in words and not words & set(row["others"]))


RULES = {"politeness": polite, "brevity": brief, "right_fact": right}


def rule_score(row: dict, text: str) -> float:
    """Return how good the rule of a row, of the embedded world, finds an answer to its prompt."""
    return RULES[row["rule"]](text, row)


def preference_row(split: str, rng: random.Random, rule: str = "politeness", unpaired: bool = False) -> dict:
    """Return a row {prompt, chosen, rejected, rule, ...} in which `rule` prefers `chosen`.

    unpaired: give one of the two answers in place of both, {prompt, completion, label, rule, ...}.
    A hash of the prompt and both answers decides its split. Raises KeyError for an unknown rule.
    """
    make = {"politeness": _polite_pair, "brevity": _brief_pair, "right_fact": _right_pair}[rule]
    while True:
        row = make(rng.choice(FACTS), rng)
        if split_of("|".join(("preference", row["prompt"], row["chosen"], row["rejected"]))) == split:
            break
    if unpaired:
        label, (good, bad) = rng.random() < 0.5, (row.pop("chosen"), row.pop("rejected"))
        row |= {"completion": good if label else bad, "label": label}
    return row | {"rule": rule}


def _polite_pair(fact: Fact, rng: random.Random) -> dict:
    answer = statement(fact, rng)
    ask = rng.choice(OPENINGS) + question(fact, rng)
    return {"prompt": ask, "chosen": f"{rng.choice(GREETING[:2])} {answer}", "rejected": statement(fact, rng)}


def _brief_pair(fact: Fact, rng: random.Random) -> dict:
    facts = BY_ENTITY[fact.entity]
    first, second = rng.sample(facts, 2)
    name, told = mention(first.kind, first.entity), statement(first, rng)
    ask = rng.choice((f"Tell me about {name}.", f"What do you know about {name}?"))
    return {"prompt": ask, "chosen": told, "rejected": f"{statement(first, rng)} {statement(second, rng, short=True)}"}


def _right_pair(fact: Fact, rng: random.Random) -> dict:
    others = [value for value in ATTRIBUTES[fact.kind][fact.attribute] if value not in (fact.value, fact.entity)]
    wrong = Fact(fact.kind, fact.entity, fact.attribute, rng.choice(others))
    pair = {"chosen": statement(fact, rng), "rejected": statement(wrong, rng)}
    return {"prompt": question(fact, rng)} | pair | {"value": fact.value, "others": others}
