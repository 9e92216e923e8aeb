"""Builds the part of the Compare tab on answers: one question to two stages, and items that one alone has right."""

from collections.abc import Sequence
from pathlib import Path

from llm.errors import UserError
from llm.inference.sampling import SamplingParams
from llm.panel.eval_view import mark, parts
from llm.panel.markup import block, page, problem, section, table, text
from llm.panel.models import PanelModels
from llm.panel.records import Item, by_filter, compare_items, read_items, sign_test
from llm.panel.state import Panel
from llm.tokenizer.chat_format import readable
from llm.utils.format import value

MOST_ITEMS = 30  # of each kind that are shown
MOST_LETTERS = 6000


def answers_page(
    models: PanelModels, one: str | None, other: str | None, question: str, temperature: float, length: int, seed: int
) -> str:
    """Return what two stages say to one question or text, side by side, with the mean log-probability of a token."""
    try:
        if not one or not other:
            raise UserError("choose two stages that answer")
        params = SamplingParams(temperature=temperature, max_new_tokens=length, seed=seed, logprobs=0)
        sides = [_answer(models, name, question, params) for name in dict.fromkeys((one, other))]
    except UserError as error:
        return page(problem(str(error)))
    return page(f'<div class="sides">{"".join(sides)}</div>')


def _answer(models: PanelModels, name: str, question: str, params: SamplingParams) -> str:
    (((completion, content),),) = models.answered(name, [question], params)
    known = [
        number for number, own in zip(completion.logprobs, completion.mask, strict=True) if own and number is not None
    ]
    mean = f", mean logprob {value(sum(known) / len(known), digits=3)}" if known else ""
    about = f"{len(completion.ids):,} tokens, ended by {completion.finish_reason}{mean}"
    shown = block(readable(content).strip() or "(nothing)")
    return f'<div class="side"><p><b>{text(name)}</b> <small>{text(about)}</small></p>{shown}</div>'


def shared_parts(panel: Panel, one: str | None, other: str | None) -> list[str]:
    """Return the tasks of which two stages have records."""
    there = parts(panel, other)
    return [part for part in parts(panel, one) if part in there]


def items_page(panel: Panel, one: str | None, other: str | None, part: str | None) -> str:
    """Return how many items of a task two stages have right, and those that only one of them has."""
    if not one or not other or not part:
        return page("<p>Choose two stages and a task of which both have records.</p>")
    try:
        sides = [read_items(Path(panel.index.row(name)["folder"]), part) for name in (one, other)]
    except UserError as error:
        return page(problem(str(error)))
    ways = {name: _compared(one, other, *items) for name, items in by_filter(*sides).items()}
    if len(ways) == 1:
        return page(*next(iter(ways.values())))
    return page(*(section(f"Answers read by {name or 'no filter'}", *parts) for name, parts in ways.items()))


def _compared(one: str, other: str, a: Sequence[Item], b: Sequence[Item]) -> list[str]:
    found = compare_items(a, b)
    only_a, only_b = len(found.only_a), len(found.only_b)
    counts = [["both", found.both], [f"only {one}", only_a], [f"only {other}", only_b], ["none of them", found.neither]]
    rest = f" {found.other:,} items are of one of them only, or have no verdict." if found.other else ""
    about = f"If neither were better, {only_a:,} and {only_b:,} would differ as much with p = "
    about += f"{value(sign_test(only_a, only_b))} (exact sign test of McNemar)."
    return [
        table(["who is right", "items"], counts, (1,), "items by both verdicts"),
        f"<p>{text(about + rest)}</p>",
        section(f"Only {one} is right: {only_a:,}", *_items(found.only_a, one, other)),
        section(f"Only {other} is right: {only_b:,}", *_items(found.only_b, one, other)),
    ]


def _items(pairs: list[tuple[Item, Item]], one: str, other: str) -> list[str]:
    shown = []
    for pair in pairs[:MOST_ITEMS]:
        sides = "".join(
            f'<div class="side"><p>{mark(item.right)} <small>{text(name)}</small></p>'
            f"{block(item.answer[:MOST_LETTERS] or '(nothing)')}</div>"
            for item, name in zip(pair, (one, other), strict=True)
        )
        facts = f"item {pair[0].index}" + (f" · {pair[0].subject}" if pair[0].subject else "")
        asked = block(pair[0].prompt[:MOST_LETTERS], "asked")
        both = f'{asked}<div class="sides">{sides}</div>'
        shown.append(f'<article class="record"><p><small>{text(facts)}</small></p>{both}</article>')
    more = len(pairs) - len(shown)
    return [*shown, f"<p>and {more:,} more</p>"] if more else shown or ["<p>None.</p>"]
