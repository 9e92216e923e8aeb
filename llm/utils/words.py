"""Words of text in any script, also of those that are written without spaces, or with marks on letters."""

import re
import unicodedata

import regex

MARKS = r"\p{M}\u200c\u200d"  # accents, vowel signs, joiners: of a letter; for a class of `regex`
WORD_CHARS = 16  # characters per word from which on text counts as written without spaces ...
SIGNS_SHARE = 3  # ... and one in so many characters that is of such a script
# Chinese, Japanese, Thai, Lao, Tibetan, Burmese, Khmer
_SIGNS = re.compile("[\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]+")

_LETTERS = rf"\p{{L}}[\p{{L}}{MARKS}]*"
_WORD = regex.compile(rf"{_LETTERS}|(?!.*\p{{Latin}}){_LETTERS}(?:['’]{_LETTERS})+")


def word_of(text: str) -> str | None:
    """Return a word of letters and their marks in its one spelling (NFC); None for any other text.

    Outside Latin script an apostrophe may stand within it, as that of Ukrainian.
    """
    text = unicodedata.normalize("NFC", text)
    return text if _WORD.fullmatch(text) else None


def letters(word: str) -> list[str]:
    """Return the letters of a word as a reader sees them, each with its marks."""
    return list(word) if word.isascii() else regex.findall(r"\X", word)


def has_spaces(words: list[str], text: str) -> bool:
    """Return whether a text is written with spaces between its words; words: its parts between spaces.

    How many spaces stand between two words, as in indented code and in tables, does not matter.
    """
    chars = sum(map(len, words))
    if len(words) * WORD_CHARS < chars:
        return False
    return text.isascii() or SIGNS_SHARE * sum(map(len, _SIGNS.findall(text))) < chars


def words_or_signs(text: str) -> list[str] | str:
    """Return the words of a text in small letters; its characters, as one text, where it is written without spaces."""
    words = text.lower().split()
    return words if has_spaces(words, text) else "".join(words)
