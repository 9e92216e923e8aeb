"""One step's batch as a stage trains it, what is trained coloured: in the terminal, and as a page.

    python -m llm.stages [--rows 4] [--html batch.html] experiment=demo stage=sft ...

The stage is built as `train.py` would build it with the same settings, from the same parent, and its first batch is
shown; for grpo that means sampling answers.
"""

import argparse
import html
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

from llm.utils.format import harmless

KINDS = {  # terminal colour, page style
    "trained": ("\033[32m", "color:#0a7a28;font-weight:600"),
    "punished": ("\033[31m", "color:#b3261e;font-weight:600"),
    "context": ("\033[2m", "color:#777"),
    "special": ("\033[36m", "color:#0b6e99"),
    "special trained": ("\033[1;32m", "color:#0a7a28;font-weight:600;text-decoration:underline"),
}
RESET = "\033[0m"
LEGEND = "trained, trained special token, context, special token; grpo: red = made less likely"


def rows_of(micro_batches: Sequence[dict]) -> Iterator[tuple[list[int], list[float]]]:
    """Yield every row as its ids (T + 1) and the weight of each in the loss, 0 = not trained."""
    for micro in micro_batches:
        inputs, targets = micro["inputs"], micro["targets"]
        weights = micro.get("advantages", micro.get("weights", (targets >= 0).float()))
        for x, y, w in zip(inputs, targets, weights, strict=True):
            yield [*x.tolist(), max(int(y[-1]), 0)], [0.0, *(w * (y >= 0)).tolist()]


def pieces(ids: Sequence[int], weights: Sequence[float], tokenizer) -> list[tuple[str, str]]:
    """Return (kind, text) of runs of tokens of one kind; the filling at the end of a row is left out."""
    specials = range(len(tokenizer.tokens), tokenizer.vocab_size)

    def kind(place: int) -> str:
        if ids[place] in specials:
            return "special trained" if weights[place] else "special"
        return "context" if not weights[place] else "trained" if weights[place] > 0 else "punished"

    end = len(ids)
    while end > 1 and ids[end - 1] in (tokenizer.bos_id, 0) and not weights[end - 1]:
        end -= 1
    runs = groupby(range(end), key=kind)
    shown = [(name, tokenizer.decode([ids[place] for place in places])) for name, places in runs]
    return shown + ([("special", f" [{len(ids) - end} tokens of filling]")] if end < len(ids) else [])


def for_terminal(rows: Sequence[list[tuple[str, str]]]) -> str:
    """Return the rows with terminal colours, a line between them."""
    lines = ["".join(f"{KINDS[kind][0]}{harmless(text)}{RESET}" for kind, text in row) for row in rows]
    return f"\n{'-' * 80}\n".join(lines)


def for_page(rows: Sequence[list[tuple[str, str]]], title: str) -> str:
    """Return a page of HTML that needs nothing else."""
    blocks = (
        "".join(f'<span style="{KINDS[kind][1]}">{html.escape(text)}</span>' for kind, text in row) for row in rows
    )
    body = "\n".join(f"<pre>{block}</pre>" for block in blocks)
    style = (
        "body{max-width:60em;margin:2em auto;font-family:sans-serif}pre{white-space:pre-wrap;border-bottom:1px solid}"
    )
    legend = " · ".join(f'<span style="{css}">{kind}</span>' for kind, (_, css) in KINDS.items())
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title><style>{style}</style>"
    return f"<!doctype html>{head}<h1>{html.escape(title)}</h1><p>{legend}</p>\n{body}\n"


def show(cfg, n_rows: int = 4, page: Path | None = None) -> None:
    """Print the first `n_rows` rows of the stage that `cfg` describes, and write them to `page` (HTML) if given."""
    from llm.config.stages import stage_row
    from llm.run.stage_folder import RunDir
    from llm.stages.shape import parent_of, take_shape
    from llm.stages.train_model import builder
    from llm.stages.trainer import quiet_lightning
    from llm.utils.files import write_atomic

    quiet_lightning()
    row, cfg.stage.eval_every = stage_row(cfg.stage.name), 0
    run = take_shape(cfg, row, RunDir(cfg.paths.runs, cfg.run or f"d{cfg.model.depth}"))
    cfg.run = run.name
    if "keep_rollouts" in cfg.stage:
        cfg.stage.keep_rollouts = 0  # the answers of the run stay
    built = builder(row)(cfg, parent_of(cfg, row, run))
    batch, tokenizer = next(iter(built.data.train_dataloader())), built.module.context.tokenizer
    all_rows = list(rows_of(batch["micro"]))
    rows = [pieces(ids, weights, tokenizer) for ids, weights in all_rows[:n_rows]]
    title = (
        f"{run.name}/{cfg.stage.name}, first step: {len(all_rows)} rows, {batch['n_tokens']:,} tokens, "
        f"{batch['n_trained']:,} trained"
    )
    print(for_terminal(rows), f"{title}; {len(rows)} shown ({LEGEND})", sep="\n\n", flush=True)
    if page is not None:
        write_atomic(page, for_page(rows, title))
        print(f"page: {page}")
    built.data.teardown("fit")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of this command, and the settings that are left for Hydra."""
    parser = argparse.ArgumentParser(prog="python -m llm.stages", add_help=False)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--html", type=Path)
    return parser.parse_known_args(argv)


def main() -> None:
    """Compose the configuration that the command line describes, and show its first batch."""
    from llm.cli.app import run_app

    options, sys.argv[1:] = parse(sys.argv[1:])
    run_app("train", partial(show, n_rows=options.rows, page=options.html))
