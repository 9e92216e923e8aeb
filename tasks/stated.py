"""Answers as rewards read them: one answer in one place, written plainly, or none.

A reward is optimized against, so these rules are stricter than those of evaluation: a sum that the reader would have to
work out, digits of other scripts, a second answer or a word behind the answer earn nothing.
"""

import re

from llm.tokenizer.chat_format import content_text
from tasks.base import visible
from tasks.numbers import Number, parse_number, same_number

MARKS = "####"  # before the answer in the GSM8K form
_TAG = re.compile(r"<\s*/?\s*(?:think|answer)\b[^<>]*>?", re.IGNORECASE)  # also one that is written otherwise
_TO_WORK_OUT = re.compile(r"[/^*×÷⁄]|\\[dt]?frac|\d[eE][-+]?\d")
_MAX_CHARS = 200  # of an answer
FORM = 0.2  # reward for the form of an answer, beside 1.0 for its content


def reference(conversation: dict) -> str:
    """Return the answer of a conversation's last message: its `<answer>` block, what follows `####`, or all of it."""
    text = content_text(conversation["messages"][-1]["content"])
    inside = tagged(text)
    return visible(text).rpartition(MARKS)[2].strip() if inside is None else inside


def stated(completion: str) -> str | None:
    """Return the answer that a completion ends with: the line behind its only `####`, or the whole text without marks.

    Calls of tools and their results do not count, whoever wrote them. None where more than one answer is stated, or
    anything follows it.
    """
    parts = visible(completion).split(MARKS)
    if len(parts) > 2 or MARKS in completion and len(parts) < 2:
        return None
    answer = parts[-1].strip()
    return answer if len(parts) == 1 or len(answer.splitlines()) == 1 else None


def tagged(completion: str) -> str | None:
    """Return the content of the only `<answer>` block, with which a completion ends; None where there is none such."""
    tags, block = _TAG.findall(completion), ["<answer>", "</answer>"]
    if tags[-2:] != block or [tag for tag in tags if "answer" in tag.lower()] != block:
        return None
    before, _, rest = completion.partition("<answer>")
    inside, _, after = rest.partition("</answer>")
    if after.strip() or visible(before + "\0") != visible(before) + "\0":  # the block is not part of a tool's call
        return None
    return inside.strip() if "</answer>" not in before and visible(inside) == inside else None


def in_form(completion: str) -> bool:
    """Return whether a completion is `<think>...</think><answer>...</answer>`, with words in both, and nothing else."""
    if _TAG.findall(completion) != ["<think>", "</think>", "<answer>", "</answer>"] or not tagged(completion):
        return False
    found = re.fullmatch(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", completion, re.DOTALL)
    return found is not None and all(any(map(str.isalnum, text)) for text in found.groups())


def form_reward(conversation: dict, completion: str) -> float:
    """Return 1 for the right answer in the only `<answer>` block at the end, and `FORM` for the form of `in_form`.

    The form counts only with an answer of the wanted kind, so that a number is answered by a number.
    """
    wanted, given = reference(conversation), tagged(completion)
    fits = parse_number(wanted) is None or parse_number(given or "") is not None
    return float(same_answer(wanted, given)) + FORM * (fits and in_form(completion))


def same_answer(wanted: str, given: str | None) -> bool:
    """Return whether an answer is the wanted one: the same number where that is one, else the same words."""
    if not given or len(given) > _MAX_CHARS:
        return False
    number = parse_number(wanted)
    if number is not None:
        return same_number(number, written_number(wanted, given))
    return " ".join(given.casefold().split()) == " ".join(wanted.casefold().split())


def written_number(wanted: str, given: str) -> Number | None:
    """Return the number that `given` writes out; None for what `wanted` has no likes of: sums, other digits, words."""
    if _TO_WORK_OUT.search(given) and not _TO_WORK_OUT.search(wanted):
        return None
    if wanted.isascii() and any(one.isnumeric() and not one.isascii() for one in given):
        return None
    number = parse_number(given)
    return number if number is not None and number.bare else None
