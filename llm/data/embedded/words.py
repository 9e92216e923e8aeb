"""Invented words of two or three syllables from a small set: an unseen word is made of well-known pieces."""

import random

from llm.data.embedded.splits import split_of

SYLLABLES = tuple(c + v for c in "bdklmnprst" for v in "aeiou")  # 50 syllables: 2,500 words of two, 125,000 of three

SHORT = 0.65  # share of words with two syllables


def draw_word(split: str, rng: random.Random) -> str:
    """Draw a word that belongs to `split` (decided by the word itself)."""
    while True:
        word = "".join(rng.choices(SYLLABLES, k=2 if rng.random() < SHORT else 3))
        if split_of("word/" + word) == split:
            return word


def spell(word: str) -> str:
    """Return the letters of `word` separated by commas."""
    return ",".join(word)
