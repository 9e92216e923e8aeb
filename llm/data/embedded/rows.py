"""Task rows of the embedded world in the raw formats of the real files, so that one task class reads both."""

import inspect
import random
from collections.abc import Callable

from llm.data.embedded.dialogues import choice_row, identity_row, smalltalk_row
from llm.data.embedded.persona import persona_row
from llm.data.embedded.preferences import preference_row
from llm.data.embedded.problems import draw_problem
from llm.data.embedded.programs import program_row
from llm.data.embedded.splits import check_split, collect, generator
from llm.data.embedded.words import draw_word
from llm.errors import UserError


def arithmetic_row(split: str, rng: random.Random, **difficulty) -> dict:
    """Return a GSM8K-style row; `difficulty` is passed on to `problems.draw_problem`."""
    problem = draw_problem(split, rng, **difficulty)
    return {"question": problem.text(), "answer": problem.solution()}


def word_row(split: str, rng: random.Random) -> dict:
    """Return a row with one invented word."""
    return {"word": draw_word(split, rng)}


# kind -> (maker of one row, key by which rows are told apart)
KINDS: dict[str, tuple[Callable[..., dict], Callable[[dict], str]]] = {
    "choice": (choice_row, lambda row: row["question"] + "|".join(row["choices"]["text"])),
    "arithmetic": (arithmetic_row, lambda row: row["question"]),
    "words": (word_row, lambda row: row["word"]),
    "identity": (identity_row, lambda row: "|".join(m["content"] for m in row["messages"])),
    "persona": (persona_row, lambda row: "|".join(m["content"] for m in row["messages"])),
    "smalltalk": (smalltalk_row, lambda row: "|".join(m["content"] for m in row["messages"])),
    "programs": (program_row, lambda row: row["task_id"]),
    "preferences": (preference_row, lambda row: "|".join(map(str, row.values()))),
}
OPTIONS = {
    "arithmetic": draw_problem,
    "choice": choice_row,
    "identity": identity_row,
    "persona": persona_row,
    "preferences": preference_row,
}


def options_of(kind: str) -> tuple[str, ...]:
    """Return the names of the options that `rows` takes for a kind (difficulty, names)."""
    if kind not in OPTIONS:
        return ()
    return tuple(name for name in inspect.signature(OPTIONS[kind]).parameters if name not in ("split", "rng"))


def rows(kind: str, split: str, n: int, seed: int = 0, **options) -> list[dict]:
    """Return `n` different rows of a kind of `KINDS`: choice, arithmetic, words, identity, persona, smalltalk, ...

    A shorter list is a prefix of a longer one. Train and test are disjoint by construction: identity and persona by the
    question that is scored, the others by a hash of the fact with its options, the problem, word, chat, function name
    or pair of answers.

    Options: arithmetic takes steps, distractors, max_number; choice takes shuffle; identity takes assistant, maker;
    persona takes name, maker, description, facts; preferences take rule, unpaired.
    Raises UserError for an unknown kind, split or option, and if the world holds fewer than `n` rows.
    """
    if kind not in KINDS:
        raise UserError(f"the embedded world has no rows of kind {kind!r}: choose one of {', '.join(KINDS)}")
    unknown = set(options) - set(options_of(kind))
    if unknown:
        known = ", ".join(options_of(kind)) or "none"
        raise UserError(f"{kind} takes no option {', '.join(sorted(unknown))} (options: {known})")
    make, key = KINDS[kind]
    rng = generator("rows", kind, check_split(split), seed)
    return collect(lambda: make(split, rng, **options), key, n, f"{kind} ({split})")
