"""Arithmetic word problems of one to three steps, each one calculator call, with sentences that do not matter.

A problem is a chain: somebody has a number of things (given, or as a product), then operations follow that add, take
away, compare with another person, share out, sell or sum up. The number of operations is the number of steps.
"""

import random
from dataclasses import dataclass, field

from llm.data.embedded.splits import split_of
from llm.data.embedded.world import LANDMARKS, PEOPLE
from llm.errors import UserError

THINGS = (
    "beads",
    "buns",
    "cards",
    "coins",
    "cups",
    "eggs",
    "figs",
    "hats",
    "nuts",
    "pears",
    "pins",
    "plums",
    "seeds",
    "shells",
)
CONTAINERS = ("bag", "basket", "box", "jar")
STEP_SHARES = (0.3, 0.4, 0.3)  # shares of problems with one, two and three steps
DISTRACTORS = 0.35  # chance of each of two distracting sentences
MAX_NUMBER = 60  # largest number stated in a problem
LARGEST = 999  # largest intermediate result

GAIN = (
    "{a} buys {n} more {t}.",
    "Then {a} finds {n} {t}.",
    "{o} gives {a} {n} {t}.",
    "{a} gets {n} more {t} from {o}.",
    "Later {a} picks up {n} {t}.",
)
LOSE = (
    "{a} gives {n} {t} to {o}.",
    "Then {a} loses {n} {t}.",
    "{o} takes {n} {t} from {a}.",
    "{a} sells {n} of the {t}.",
    "Later {a} drops {n} {t}.",
)
HAS = (
    "{a} has {n} {t}.",
    "{a} starts with {n} {t}.",
    "At first {a} has {n} {t}.",
    "There are {n} {t} on the table of {a}.",
)
PRODUCT = (
    "{a} has {k} {c} with {n} {t} in each.",
    "{a} fills {k} {c}. Each holds {n} {t}.",
    "{a} finds {n} {t} a day for {k} days.",
    "{a} makes {k} rows of {n} {t}.",
)
MORE = ("{b} has {n} more {t} than {a}.", "{b} has {n} {t} more than {a}.")
FEWER = ("{b} has {n} fewer {t} than {a}.", "{b} has {n} {t} fewer than {a}.")
TIMES = ("{b} has {k} times as many {t} as {a}.",)
HALF = ("{b} has half as many {t} as {a}.", "{a} has twice as many {t} as {b}.")
SHARE = ("{a} puts the {t} into {k} {c}, the same number in each.", "{a} shares the {t} equally among {k} friends.")
SELL = ("{a} sells all the {t} for {k} coins each.", "Each of the {t} is worth {k} coins.")
ASK = ("How many {t} does {a} have now?", "How many {t} does {a} have in the end?", "What number of {t} does {a} have?")
NOISE = (
    "{o} has {n} {t}.",
    "{a} has {n} {u}.",
    "{o} gives {a} {n} {u}.",
    "{a} is {n} years old.",
    "It is {n} steps to the {l}.",
    "{o} sells {n} {u}.",
)


@dataclass(frozen=True)
class Step:
    """One line of the solution: `before` + the calculation + its result + `after`."""

    before: str
    expression: str
    result: int
    after: str


@dataclass
class Problem:
    """Word problem under construction; `holder` has `value` things after the steps so far."""

    things: str
    holder: str
    value: int
    names: list[str]  # people not used yet
    sentences: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    question: str = ""
    other: tuple[str, int] | None = None  # the person compared with, and that person's number

    def text(self) -> str:
        """Return the problem as one line: sentences and question."""
        return " ".join([*self.sentences, self.question])

    def solution(self) -> str:
        """Return the answer in the GSM8K style: one `<<expression=result>>` mark per line, then `#### result`."""
        lines = [f"{s.before} <<{s.expression}={s.result}>>{s.result} {s.after}" for s in self.steps]
        return "\n".join([*lines, f"#### {self.steps[-1].result}"])

    def add(self, expression: str, result: int, before: str = "", after: str = "") -> None:
        """Append the step that makes `result` the current value."""
        self.steps.append(Step(before or f"{self.holder} has", expression, result, after or f"{self.things}."))
        self.value = result


def _say(problem: Problem, wordings: tuple[str, ...], rng: random.Random, **values: object) -> None:
    text = rng.choice(wordings).format(a=problem.holder, o=problem.names[0], t=problem.things, **values)
    problem.sentences.append(text)


def _number(rng: random.Random, low: int, high: int) -> int:
    return rng.randint(low, max(low, high))


def _plural(container: str) -> str:
    return container + ("es" if container.endswith("x") else "s")


def _start(rng: random.Random, product: bool, limit: int) -> Problem:
    """Begin a problem: somebody has a number of things, given or as a product."""
    names = rng.sample(PEOPLE, 5)
    problem = Problem(things=rng.choice(THINGS), holder=names.pop(), value=0, names=names)
    if product:
        k, n = rng.randint(2, 9), _number(rng, 2, min(limit, 20))
        containers = _plural(rng.choice(CONTAINERS))
        wording = rng.choice(PRODUCT)
        _say(problem, (wording,), rng, k=k, n=n, c=containers)
        first, second = (k, n) if wording.index("{k}") < wording.index("{n}") else (n, k)
        problem.add(f"{first}*{second}", k * n)
    else:
        problem.value = _number(rng, 4, limit)
        _say(problem, HAS, rng, n=problem.value)
    return problem


def _change(problem: Problem, rng: random.Random, limit: int) -> None:
    """Let the holder win or lose some of the things."""
    if rng.random() < 0.5 and problem.value > 3:
        n = _number(rng, 2, min(limit, problem.value - 1))
        _say(problem, LOSE, rng, n=n)
        problem.add(f"{problem.value}-{n}", problem.value - n)
    else:
        n = _number(rng, 2, limit)
        _say(problem, GAIN, rng, n=n)
        problem.add(f"{problem.value}+{n}", problem.value + n)


def _compare(problem: Problem, rng: random.Random, limit: int) -> None:
    """Give another person more, fewer, a multiple or half; from here on the chain is about that person."""
    a, value, b = problem.holder, problem.value, problem.names.pop()
    kind = rng.choice(["more", "fewer", "times", "half"])
    if kind == "half" and value % 2 == 0:
        wordings, n, expression, result = HALF, 2, f"{value}/2", value // 2
    elif kind == "times" and value * 5 <= LARGEST:
        n = rng.randint(2, 5)
        wordings, expression, result = TIMES, f"{value}*{n}", value * n
    elif kind == "fewer" and value > 3:
        n = _number(rng, 2, min(limit, value - 1))
        wordings, expression, result = FEWER, f"{value}-{n}", value - n
    else:
        n = _number(rng, 2, limit)
        wordings, expression, result = MORE, f"{value}+{n}", value + n
    _say(problem, wordings, rng, b=b, n=n, k=n)
    problem.holder, problem.other = b, (a, value)
    problem.add(expression, result)


def _finish(problem: Problem, rng: random.Random) -> None:
    """Add a last step that changes the question: a sum of two people, a share or a price; nothing if none fits."""
    value, things, options = problem.value, problem.things, []
    shares = [k for k in range(2, 10) if value % k == 0 and value // k > 1]
    if problem.other:
        options += ["together"] * 2
    if shares:
        options.append("share")
    if value * 9 <= LARGEST and things != "coins":
        options.append("sell")
    if not options:
        return
    kind = rng.choice(options)
    if kind == "together":
        other, number = problem.other
        problem.question = f"How many {things} do {other} and {problem.holder} have together?"
        problem.add(f"{number}+{value}", number + value, before="Together they have")
    elif kind == "share":
        k, container = rng.choice(shares), rng.choice(CONTAINERS)
        wording = rng.choice(SHARE)
        _say(problem, (wording,), rng, k=k, c=_plural(container))
        each = "friend get" if "friends" in wording else f"{container} hold"
        problem.question = f"How many {things} does each {each}?"
        problem.add(f"{value}/{k}", value // k, before="Each has")
    else:
        k = rng.randint(2, 9)
        _say(problem, SELL, rng, k=k)
        problem.question = f"How many coins does {problem.holder} get for all the {things}?"
        problem.add(f"{value}*{k}", value * k, before=f"{problem.holder} gets", after="coins.")


def _distract(problem: Problem, rng: random.Random, chance: float, limit: int) -> None:
    """Insert up to two sentences with a number that no step needs, at random places."""
    for _ in range(2):
        if rng.random() < chance:
            others = [t for t in THINGS if t not in (problem.things, "coins")]
            text = rng.choice(NOISE).format(
                a=problem.holder,
                o=problem.names[1],
                n=_number(rng, 2, limit),
                t=problem.things,
                u=rng.choice(others),
                l=rng.choice(LANDMARKS),
            )
            problem.sentences.insert(rng.randint(0, len(problem.sentences)), text)


def _build(n_steps: int, rng: random.Random, distractors: float, limit: int) -> Problem | None:
    """Return a problem of `n_steps` steps, None if a result is too large."""
    problem = _start(rng, rng.random() < 0.35, limit)
    finish = rng.random() < 0.4
    while len(problem.steps) < n_steps:
        if finish and len(problem.steps) == n_steps - 1:
            _finish(problem, rng)
            finish = False
        elif problem.other is None and rng.random() < 0.4:
            _compare(problem, rng, limit)
        else:
            _change(problem, rng, limit)
    if not problem.question:
        problem.question = rng.choice(ASK).format(a=problem.holder, t=problem.things)
    _distract(problem, rng, distractors, limit)
    return problem if max(step.result for step in problem.steps) <= LARGEST else None


def draw_problem(
    split: str,
    rng: random.Random,
    steps: tuple[float, ...] = STEP_SHARES,
    distractors: float = DISTRACTORS,
    max_number: int = MAX_NUMBER,
) -> Problem:
    """Draw a problem that belongs to `split` (decided by its text).

    steps: shares of problems with one, two and three steps. distractors: chance of each of two distracting sentences.
    max_number: largest stated number. Raises UserError for shares, chances or numbers that make no problem.
    """
    if not 1 <= len(steps) <= 3 or min(steps) < 0 or sum(steps) <= 0:
        raise UserError(f"steps={list(steps)}: give up to three shares >= 0 of problems with one, two and three steps")
    if not 0 <= distractors <= 1:
        raise UserError(f"distractors={distractors}: a chance lies between 0 and 1")
    if not 9 <= max_number <= 99:
        raise UserError(f"max_number={max_number}: choose 9 to 99")
    while True:
        n_steps = rng.choices(range(1, len(steps) + 1), weights=steps)[0]
        problem = _build(n_steps, rng, distractors, max_number)
        if problem is not None and split_of("problem/" + problem.text()) == split:
            return problem
