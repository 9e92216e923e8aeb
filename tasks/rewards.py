"""Rewards of reinforcement learning: `stage.reward` names one, `stage.rewards` several with their weights.

A reward is a subclass of `Reward` in `llm.config.registries.REWARDS`, or a user's own: such a class, or any function
(conversation, completion) -> number, that `stage.reward_options.<name>._target_` names. Tests try to earn each without
deserving it (tests/tasks/test_reward_gaming.py).
"""

import inspect
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import regex

from llm.config.registries import REWARDS
from llm.config.targets import TARGET, arguments_of, check_arguments, load_target
from llm.errors import UserError
from llm.utils.files import parse_json
from llm.utils.words import MARKS
from tasks.base import Task, visible
from tasks.execution import run_programs
from tasks.humaneval import program
from tasks.numbers import parse_number
from tasks.stated import FORM, form_reward, reference, same_answer, stated, tagged

MAX_CHARS = 100_000  # of a completion that is read as JSON


class Reward:
    """A reward of answers: a list of numbers, each within `range`, for conversations and completions.

    A subclass defines `one`, or `__call__` where many answers together are quicker. Its arguments behind `task`, which
    is the task that asks, are the user's, by `stage.reward_options`. It raises UserError for wrong ones.
    """

    range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __init__(self, task: Task):
        self.task = task

    def check(self, conversation: dict) -> None:
        """Raise UserError where no answer to a conversation of the task could be rewarded."""

    def attach(self, cfg, net, tokenizer) -> None:
        """Load what the reward needs beside the network `net` that is trained with the configuration `cfg`.

        It is called once, before training. Raises UserError for what does not fit the network or its tokenizer.
        """

    def one(self, conversation: dict, completion: str) -> float:
        """Return the reward of one completion."""
        raise NotImplementedError

    def __call__(self, conversations: Sequence[dict], completions: Sequence[str]) -> list[float]:
        """Return the reward of each completion."""
        return [self.one(c, text) for c, text in zip(conversations, completions, strict=True)]


class TaskReward(Reward):
    """`task`: as the task itself rewards, 1 for a right answer and 0 for a wrong one where it says nothing else."""

    range = (float("-inf"), float("inf"))

    def __call__(self, conversations: Sequence[dict], completions: Sequence[str]) -> list[float]:
        return self.task.rewards(conversations, completions)


class NumberReward(Reward):
    """`number`: 1 for the right number behind the only `####`, or as the whole answer; 0 for all else."""

    def check(self, conversation: dict) -> None:
        if parse_number(reference(conversation)) is None:
            raise UserError(f"the answers of {self.task.name} are no numbers, such as {reference(conversation)[:60]!r}")

    def one(self, conversation: dict, completion: str) -> float:
        return float(same_answer(reference(conversation), stated(completion)))


class TagReward(Reward):
    """`tag`: 1 for the right answer, alone in the only `<answer>` block, with which the completion ends; else 0."""

    def one(self, conversation: dict, completion: str) -> float:
        return float(same_answer(reference(conversation), tagged(completion)))


class FormatReward(Reward):
    """`format`: 1 as `tag` gives it, and 0.2 for the form `<think>...</think><answer>...</answer>`: 0 to 1.2."""

    range = (0.0, 1.0 + FORM)

    def one(self, conversation: dict, completion: str) -> float:
        return form_reward(conversation, completion)


class CodeReward(Reward):
    """`code`: 1 for code that passes all of the row's tests in the sandbox, else 0; for tasks of type humaneval."""

    needs = ("prompt", "entry_point", "test")

    def check(self, conversation: dict) -> None:
        if missing := [key for key in self.needs if key not in conversation]:
            raise UserError(f"the rows of {self.task.name} have no {missing[0]!r}; choose a task of type humaneval")

    def __call__(self, conversations: Sequence[dict], completions: Sequence[str]) -> list[float]:
        programs = [program(c, text) for c, text in zip(conversations, completions, strict=True)]
        return [float(result.ok) for result in run_programs(programs)]


class JsonReward(Reward):
    """`json`: 1 for a completion that is one JSON value of the schema and nothing else, else 0.

    schema: a JSON schema. Standard JSON alone counts: no key twice, no NaN, no deep nesting.
    """

    def __init__(self, task: Task, schema: Mapping[str, Any]):
        super().__init__(task)
        try:
            from jsonschema import validators
            from jsonschema.exceptions import SchemaError
        except ModuleNotFoundError as error:
            raise UserError("needs jsonschema; install Fathom with its extra structured") from error
        kind = validators.validator_for(schema)
        try:
            kind.check_schema(schema)
        except SchemaError as error:
            raise UserError(f"schema is no JSON schema ({error.message[:100]})") from error
        self.validator = kind(schema)
        for value in ({}, [], "", 0, None):
            self._fits(value)  # a reference of the schema itself that leads nowhere is told now

    def _fits(self, value: Any) -> bool:
        from referencing.exceptions import Unresolvable

        try:
            return self.validator.is_valid(value)
        except Unresolvable as error:
            raise UserError(f"schema refers to what is not there ({error})"[:200]) from None
        except RecursionError:
            raise UserError("schema refers to itself without end") from None

    def one(self, conversation: dict, completion: str) -> float:
        if len(completion) > MAX_CHARS:
            return 0.0
        try:
            value = parse_json(completion.encode(), "the completion")
        except (UserError, UnicodeEncodeError):
            return 0.0
        return float(self._fits(value))


class LengthReward(Reward):
    """`length`: 1 for the wanted number of words, less in proportion to what is missing or too much, at least 0.

    words: how many are wanted; signs of Chinese, Japanese and Korean count each, and of scripts like Thai, without
    spaces, every four letters. What repeats itself is not counted, so padding earns nothing.
    """

    def __init__(self, task: Task, words: int):
        super().__init__(task)
        if not isinstance(words, int) or isinstance(words, bool) or words < 1:
            raise UserError(f"words={words}: must be a whole number of at least 1")
        self.words = words

    def one(self, conversation: dict, completion: str) -> float:
        found = words_of(completion)
        too_much = max(0, len(found) - self.words)
        missing = max(0, self.words - n_new(found))
        return max(0.0, 1.0 - (too_much + missing) / self.words)


class LanguageReward(Reward):
    """`language`: share of the letters that are of a script, or how usual the share of a language's small words is.

    script: first word of its letters' Unicode names, such as latin, cyrillic, greek, arabic, cjk; or language: one of
    `SMALL_WORDS`. Texts of fewer than four different words earn 0, and repetitions lessen the reward.
    """

    def __init__(self, task: Task, script: str | None = None, language: str | None = None):
        super().__init__(task)
        if (script is None) == (language is None):
            raise UserError("give either script, such as latin, or language, such as en")
        if language is not None and language not in SMALL_WORDS:
            raise UserError(f"language={language} does not exist: choose one of {', '.join(SMALL_WORDS)}")
        self.script = None if script is None else str(script).upper()
        self.small = frozenset(SMALL_WORDS[language].split()) if language else frozenset()

    def one(self, conversation: dict, completion: str) -> float:
        words = words_of(completion)
        if len(set(words)) < LEAST_WORDS:
            return 0.0
        return (self.of_script(words) if self.script else self.of_language(words)) * n_new(words) / len(words)

    def of_script(self, words: Sequence[str]) -> float:
        letters = [one for word in words for one in word if one.isalpha()]
        return sum(unicodedata.name(one, "").startswith(self.script) for one in letters) / max(len(letters), 1)

    def of_language(self, words: Sequence[str]) -> float:
        share = sum(word in self.small for word in words) / len(words)
        return 0.0 if share > MOST_SMALL else min(1.0, share / USUAL_SMALL)


LEAST_WORDS = 4  # different ones, of a text whose language can be told
USUAL_SMALL, MOST_SMALL = 0.2, 0.7  # shares of small words: of ordinary text, and of a mere list of them
SMALL_WORDS = {
    "en": "the of and to in is was it for on with as at by that this are be from or an not you he she they we have has",
    "de": "der die das und in zu den ist von mit sich des auf für nicht ein eine als auch es an dem war wie ich er sie",
    "fr": "le la les de des du et en un une est que qui dans pour pas sur au avec ce il elle je nous vous sont par ne",
    "es": "el la los las de y en un una es que por con para no se su al lo como más pero del está yo son muy le",
    "it": "il la lo gli le di e in un una è che per con non si su al come più ma del sono da io nel della",
}
_SIGN = r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
_UNSPACED = r"(?=\p{L})[\u0e00-\u109f\u1780-\u17ff]"  # Thai, Lao, Tibetan, Burmese, Khmer
_LETTER = rf"(?!{_SIGN}|{_UNSPACED})[\p{{L}}\p{{N}}]"
_WORD = regex.compile(rf"{_SIGN}|(?:{_UNSPACED}[{MARKS}]*){{1,4}}|{_LETTER}(?:{_LETTER}|[{MARKS}])*")


def words_of(text: str) -> list[str]:
    """Return the words of what a reader sees, in lower case.

    Signs of Chinese, Japanese and Korean stand alone. Of Thai and the like four letters are one, about a word's length.
    """
    return _WORD.findall(unicodedata.normalize("NFC", visible(text).casefold()))


def n_new(words: Sequence[str]) -> int:
    """Return how many words begin a run of two that was not there before, and are not half of the text themselves."""
    often = {word for word, n in Counter(words).items() if n > max(2, len(words) // 3)}
    return len({pair for pair in zip(words, [*words, ""][1:], strict=True) if pair[0] not in often})


# ---------------------------------------------------------------------------------------------------------------------
# Several of them


class Rewards:
    """Weighted rewards by name. Called with N conversations and completions, it returns a row of R numbers for each.

    names, weights: of the R rewards. Raises UserError for a reward that is not a finite number.
    """

    def __init__(self, rewards: Mapping[str, Callable], weights: Mapping[str, float]):
        self.rewards, self.names, self.weights = dict(rewards), list(rewards), [float(weights[n]) for n in rewards]

    def attach(self, cfg, net, tokenizer) -> None:
        """Let each reward load what it needs, see `Reward.attach`."""
        for reward in self.rewards.values():
            if isinstance(reward, Reward):
                reward.attach(cfg, net, tokenizer)

    def __call__(self, conversations: Sequence[dict], completions: Sequence[str]) -> list[list[float]]:
        columns = [
            _finite(name, reward(conversations, completions), len(completions)) for name, reward in self.rewards.items()
        ]
        return [list(row) for row in zip(*columns, strict=True)]


def build_rewards(
    task: Task, weights: Mapping[str, float], options: Mapping[str, Mapping[str, Any]], key: str = "stage.rewards"
) -> Rewards:
    """Build the rewards that `weights` names, with their `options`, for the answers to a task.

    key: the place in the configuration that names them. Raises UserError for names and options that do not exist, and
    where the task's first row could earn nothing.
    """
    for name, mapping in ((key, weights), ("stage.reward_options", options)):
        if not isinstance(mapping, Mapping):
            raise UserError(f"{name}={str(mapping)[:80]}: must be a mapping of rewards by name, {{number: ...}}")
    for name, weight in weights.items():
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not math.isfinite(weight):
            raise UserError(f"{key}.{name}={weight}: must be a number, the weight of the reward")
        if not isinstance(options.get(name) or {}, Mapping):
            raise UserError(f"stage.reward_options.{name}={options[name]}: must be a mapping of options")
    if not weights:
        raise UserError(f"{key} is empty: name a reward and its weight, as in {key}={{number: 1.0, format: 0.2}}")
    if other := [name for name in options if name not in weights]:
        raise UserError(f"stage.reward_options.{other[0]}: {key} names no such reward")
    return Rewards({name: _built(name, task, options.get(name) or {}, key) for name in weights}, weights)


def reward_kind(name: str, options: Mapping[str, Any], key: str) -> Any:
    """Return the class or function of a reward: one of Fathom's by its name, a user's own by `_target_` in its options.

    Raises UserError where there is none, and for a class that does not extend `Reward`.
    """
    if TARGET not in options:
        return REWARDS.get(name, key)
    where = f"stage.reward_options.{name}"
    if name in REWARDS:
        raise UserError(f"{where}.{TARGET}: {name} is a reward of Fathom's; give yours another name")
    kind = load_target(options, where)
    return load_target(options, where, Reward) if inspect.isclass(kind) else kind


def _built(name: str, task: Task, options: Mapping[str, Any], key: str) -> Callable:
    """Return one reward, a function of conversations and completions."""
    kind, where = reward_kind(name, options, key), f"stage.reward_options.{name}"
    if not inspect.isclass(kind):
        check_arguments(kind, options, where, given=("conversation", "completion"))
        score = partial(kind, **arguments_of(options))
        return lambda conversations, completions: [
            score(*each) for each in zip(conversations, completions, strict=True)
        ]
    check_arguments(kind, options, where, given=("task",))
    try:
        reward = kind(task, **arguments_of(options))
        if len(task):
            reward.check(task[0])
    except UserError as error:
        raise UserError(f"{key}: {name}: {error}") from error
    return reward


def _finite(name: str, values: Sequence[Any], wanted: int) -> list[float]:
    numbers = [float(value) for value in values]
    if len(numbers) != wanted:
        raise UserError(f"reward {name}: gave {len(numbers)} numbers for {wanted} answers")
    if wrong := [number for number in numbers if not math.isfinite(number)]:
        raise UserError(f"reward {name}: gave {wrong[0]}; a reward must be a finite number")
    return numbers
