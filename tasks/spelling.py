"""Spelling words letter by letter, and counting a letter in a word by hand and with the calculator.

Both tasks draw from a word list. Words of the train and the test split are different words: the embedded world makes
them so, and of a local list that serves both splits one word in eight, chosen by a hash of the word, is for the test.
"""

import random
import zlib
from collections.abc import Sequence
from string import ascii_lowercase
from typing import ClassVar

from llm.tokenizer.chat_format import content_text
from llm.utils.words import letters
from tasks.base import Task, dialogue
from tasks.gsm8k import extract_answer
from tasks.numbers import same_number

TEST_OFFSET = 10_000_000  # item i of the test draws from seed TEST_OFFSET + i: no seed serves both splits
TEST_SHARE = 8
FROM_WORD = 0.9  # chance that the letter asked for is drawn from the word
LOWER_CASE = 0.3  # chance that the question is written in lower case
QUESTION_MARK = 0.5  # chance that a question mark is appended
QUOTES = ("", "'", '"')

ENGLISH = (
    "How many {l} are in {w}",
    "How many {l} are in the word {w}",
    "How many {l} does {w} have",
    "How many times does {l} occur in {w}",
    "How many times does {l} stand in {w}",
    "How often is {l} used in {w}",
    "How often does {l} come up in the word {w}",
    "Count the letter {l} in {w}",
    "Count every {l} in the word {w}",
    "Count {l} in {w}",
    "Tell me how many {l} there are in {w}",
    "Tell me how often {w} has {l}",
    "What is the count of {l} in {w}",
    "What number of {l} does {w} contain",
    "In {w} how many {l} are there",
)
SPANISH = (
    "¿Cuántas {l} hay en {w}",
    "¿Cuántas veces aparece {l} en {w}",
    "Cuenta las {l} de la palabra {w}",
    "Dime cuántas {l} tiene {w}",
    "¿Cuántas {l} contiene la palabra {w}",
    "¿Con qué frecuencia sale {l} en {w}",
)
FRENCH = (
    "Combien de {l} y a-t-il dans {w}",
    "Combien de fois {l} apparaît dans {w}",
    "Compte les {l} dans le mot {w}",
    "Dis-moi combien de {l} contient {w}",
    "Quel est le nombre de {l} dans {w}",
    "Combien de {l} trouve-t-on dans le mot {w}",
)
GERMAN = (
    "Wie viele {l} sind in {w}",
    "Wie oft steht {l} in {w}",
    "Zähle die {l} im Wort {w}",
    "Sag mir, wie viele {l} {w} hat",
    "Wie viele {l} enthält das Wort {w}",
    "Wie häufig ist {l} in {w}",
)
CHINESE = (
    "{w}里有几个{l}",
    "{w}这个词有多少个{l}",
    "数一数{w}中的{l}",
    "请问{w}含有几个{l}",
    "字母{l}在{w}中出现几次",
    "{l}在{w}里有多少个",
)
JAPANESE = (
    "{w}に{l}はいくつありますか",
    "{w}の中の{l}の数は",
    "{w}には{l}が何個ありますか",
    "単語{w}の{l}を数えてください",
    "{l}は{w}に何回出てきますか",
    "{w}に含まれる{l}は何個",
)
KOREAN = (
    "{w}에 {l}이 몇 개 있나요",
    "{w}에서 {l}은 몇 번 나오나요",
    "단어 {w}에 있는 {l}의 수는",
    "{w} 속의 {l}을 세어 주세요",
    "{l}은 {w}에 몇 개인가요",
    "{w}에는 {l}이 몇 번 들어 있나요",
)
ALL_LANGUAGES = ENGLISH + SPANISH + FRENCH + GERMAN + CHINESE + JAPANESE + KOREAN


def words_of_split(words: Sequence[str], split: str) -> list[str]:
    """Return the words of one list that belong to a split, decided by a hash of each word."""
    return [w for w in words if (zlib.crc32(w.encode()) % TEST_SHARE == 0) == (split == "test")]


def spelled(word: str) -> str:
    """Return `word:w,o,r,d`: the word and its letters, without spaces, so that each letter keeps its own token."""
    return f"{word}:{','.join(letters(word))}"


def count_by_hand(word: str, letter: str) -> str:
    """Return the spelled word, then one numbered line per letter that marks each hit with the running count."""
    lines, count = [spelled(word)], 0
    for number, char in enumerate(letters(word), start=1):
        count += char == letter
        lines.append(f"{number}:{char}" + (f" hit! count={count}" if char == letter else ""))
    return "\n".join([*lines, f"This gives us {count}."])


def _countable(asked: Sequence[str], word: str) -> Sequence[str]:
    """Return the letters of which Python finds as many in a word as a reader does: a bare one stands in one with marks.

    All of them where there are none such.
    """
    own = letters(word)
    return [one for one in asked if one[0].isalpha() and own.count(one) == word.count(one)] or asked


class SimpleSpelling(Task):
    """Task "Spell the word: X", answered by "X:x,...". Items go round the list in one shuffled order."""

    kind = "generative"
    reads = "words"
    generated: ClassVar[dict[str, str]] = {"embedded": "words"}

    def __init__(self, words: Sequence[str], name: str, size: int, **slices):
        super().__init__(range(size), name, **slices)
        self.words = list(words)
        random.Random(42).shuffle(self.words)

    @classmethod
    def from_words(cls, words: Sequence[str], name: str, size: int, split: str, source: str, stop: int | None) -> Task:
        """Build the task; split and source change nothing but the words."""
        return cls(words, name, size, stop=stop)

    def conversation(self, row: int, index: int) -> dict:
        word = self.words[row % len(self.words)]
        return {"messages": dialogue(f"Spell the word: {word}", spelled(word))}

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return completion.strip() == conversation["messages"][-1]["content"]


class SpellingBee(Task):
    """Task "How many r are in strawberry?": spell and count, check with `.count()`, then answer `#### n`.

    Item i is a function of its seed alone: i in training, `TEST_OFFSET` + i in the test. questions: templates with
    `{l}` (letter) and `{w}` (word).
    """

    kind = "generative"
    reads = "words"
    generated: ClassVar[dict[str, str]] = {"embedded": "words"}

    def __init__(
        self,
        words: Sequence[str],
        name: str,
        size: int,
        split: str = "train",
        questions: Sequence[str] = ALL_LANGUAGES,
        **slices,
    ):
        offset = TEST_OFFSET if split == "test" else 0
        self.words, self.questions = list(words), questions
        super().__init__(range(offset, offset + size), name, **slices)

    @classmethod
    def from_words(cls, words: Sequence[str], name: str, size: int, split: str, source: str, stop: int | None) -> Task:
        """Build the task; questions about embedded words are in English, as the embedded world's text is."""
        return cls(words, name, size, split, ENGLISH if source == "embedded" else ALL_LANGUAGES, stop=stop)

    def conversation(self, row: int, index: int) -> dict:
        rng = random.Random(row)
        word = rng.choice(self.words)
        asked = letters(word) if rng.random() < FROM_WORD else list(ascii_lowercase)
        letter = rng.choice(_countable(asked, word))
        question = self._question(word, letter, rng)
        return {"messages": dialogue(question, self._answer(word, letter))}

    def _question(self, word: str, letter: str, rng: random.Random) -> str:
        template = rng.choice(self.questions)
        if rng.random() < LOWER_CASE:
            template = template.lower()
        quote_letter, quote_word = rng.choice(QUOTES), rng.choice(QUOTES)
        text = template.format(l=f"{quote_letter}{letter}{quote_letter}", w=f"{quote_word}{word}{quote_word}")
        return text + ("?" if rng.random() < QUESTION_MARK else "")

    def _answer(self, word: str, letter: str) -> list[dict]:
        count, quote = str(word.count(letter)), '"' if "'" in word else "'"
        by_hand = f"Count '{letter}' in '{word}'.\n{count_by_hand(word, letter)}\nPython: "
        return [
            {"type": "text", "text": by_hand},
            {"type": "python", "text": f"{quote}{word}{quote}.count('{letter}')"},
            {"type": "python_output", "text": count},
            {"type": "text", "text": f"\n#### {count}"},
        ]

    def evaluate(self, conversation: dict, completion: str) -> bool:
        own = content_text(conversation["messages"][-1]["content"])
        return same_number(extract_answer(own), extract_answer(completion))
