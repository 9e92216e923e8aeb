"""Ramps of pretraining: attention with short windows, short rows, or small steps while a training is young.

Windows and rows follow `llm.optim.schedules.ramp_share`, a pure function of the step, so a resumed run needs nothing
saved, and the loader's rows stay as they are. Small steps are the loader's, by `llm.scaling.batch_ramp`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import gcd

import torch

from llm.errors import UserError
from llm.model.config import GPTConfig
from llm.model.gpt import GPT
from llm.parallel.launch import processes
from llm.scaling.batch_ramp import PARTS

LEVELS = 4  # the smallest share of a ramp is one over this


def shorter_window(config: GPTConfig, window: int | None, share: float) -> int | None:
    """Return the window of a layer, or the context where it has none, times `share`, in whole `window_multiple`."""
    own, multiple = config.seq_len if window is None else window, config.window_multiple or 1
    short = -int(-own * share // multiple) * multiple
    return short if short < own else window


@contextmanager
def short_windows(net: GPT, share: float) -> Iterator[None]:
    """Let attention reach over `share` of every layer's window, full layers too, as long as the block lasts.

    The windows grow as in modded-nanogpt (track 1, the window schedule), here from a quarter over a half.
    """
    if share == 1:
        yield
        return
    whole = net.windows
    try:
        _set_windows(net, [shorter_window(net.config, window, share) for window in whole])
        yield
    finally:
        _set_windows(net, whole)


def _set_windows(net: GPT, windows: list[int | None]) -> None:
    net.windows = windows
    for block, window in zip(net.transformer.h, windows, strict=True):
        block.attn.window = window


def shorter_rows(micro: dict[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    """Return a micro-batch whose rows (B, T) are cut into (B / share, T x share): as many tokens, less context each."""
    return {name: t.reshape(-1, int(t.size(1) * share)) for name, t in micro.items()} if share < 1 else micro


def check_ramps(cfg, config: GPTConfig, batch_tokens: int) -> None:
    """Raise UserError for rows that cannot be cut into four, windows that cannot grow, and steps that cannot by parts.

    batch_tokens: of a whole step.
    """
    check_batch_ramp(cfg, batch_tokens)
    own = [config.window(layer) for layer in range(config.n_layer)]
    if cfg.stage.get("window_ramp") is not None and own == [shorter_window(config, one, 1 / LEVELS) for one in own]:
        fix = "arch.window_multiple=null or stage.window_ramp=null" if "window_multiple" in cfg.arch else "it to null"
        raise UserError(
            f"stage.window_ramp={cfg.stage.window_ramp}: windows are whole multiples of {config.window_multiple} "
            f"tokens, and none is longer with model.seq_len={config.seq_len}; set {fix}"
        )
    if cfg.stage.get("row_ramp") is not None and cfg.model.seq_len % LEVELS:
        raise UserError(
            f"stage.row_ramp={cfg.stage.row_ramp}: rows of model.seq_len={cfg.model.seq_len} tokens cannot be cut into "
            f"{LEVELS}; take a multiple of {LEVELS}, or set stage.row_ramp=null"
        )


def check_batch_ramp(cfg, batch_tokens: int) -> None:
    """Raise UserError where a part of a step is no whole number of micro-batches, or a key could have no effect."""
    share, parts = cfg.stage.get("batch_ramp"), cfg.stage.get("batch_parts")
    if share is None:
        if parts is not None:
            raise UserError(
                f"stage.batch_parts={parts}: no step is divided without a ramp; set stage.batch_ramp=0.4, or leave it "
                "out"
            )
        return
    if cfg.trainer.overfit_batches:
        raise UserError(
            f"stage.batch_ramp={share}: trainer.overfit_batches={cfg.trainer.overfit_batches} repeats the first steps, "
            "which are the small ones; set stage.batch_ramp=null"
        )
    named = f"stage.batch_ramp={share}" if parts is None else f"stage.batch_parts={parts}"
    parts, rows, world = parts or PARTS, cfg.batch.micro_batch_size, processes(cfg)
    row = cfg.model.seq_len * world
    per_pass = row if rows == "auto" else row * rows
    micro = batch_tokens // per_pass
    if micro % parts:
        fixes = [f"batch.tokens_per_step={-(-micro // parts) * parts * per_pass}"]
        if found := [n for n in range(2, micro + 1) if micro % n == 0]:
            fixes.insert(0, f"stage.batch_parts={min(found, key=lambda n: abs(n - parts))}")
        if rows != "auto" and batch_tokens % (parts * row) == 0:
            fixes.insert(0, f"batch.micro_batch_size={gcd(rows, batch_tokens // (parts * row))}")
        what = "rows" if rows == "auto" else f"micro-batches of {rows} rows"
        raise UserError(
            f"{named}: the {micro} {what} that a device has of batch.tokens_per_step={batch_tokens} are not {parts} "
            f"equal parts; set {' or '.join(fixes)}"
        )


def check_windows(net: GPT, ramp: float | None) -> None:
    """Raise UserError where windows are to grow in blocks that have none, as those of a plugin may."""
    if ramp is not None and not all(hasattr(getattr(block, "attn", None), "window") for block in net.transformer.h):
        raise UserError(
            f"stage.window_ramp={ramp}: blocks of arch={net.config.arch} have no attn.window; set it to null"
        )
