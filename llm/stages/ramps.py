"""Ramps of pretraining: attention with short windows, or short rows, while a training is young.

Both follow `llm.optim.schedules.ramp_share`, a pure function of the step, so a resumed run needs nothing saved. The
loader's rows stay as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llm.errors import UserError
from llm.model.config import GPTConfig
from llm.model.gpt import GPT

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


def check_ramps(cfg) -> None:
    """Raise UserError for rows that cannot be cut into four."""
    if cfg.stage.get("row_ramp") is not None and cfg.model.seq_len % LEVELS:
        raise UserError(
            f"stage.row_ramp={cfg.stage.row_ramp}: rows of model.seq_len={cfg.model.seq_len} tokens cannot be cut into "
            f"{LEVELS}; take a multiple of {LEVELS}, or set stage.row_ramp=null"
        )


def check_windows(net: GPT, ramp: float | None) -> None:
    """Raise UserError where windows are to grow in blocks that have none, as those of a plugin may."""
    if ramp is not None and not all(hasattr(getattr(block, "attn", None), "window") for block in net.transformer.h):
        raise UserError(
            f"stage.window_ramp={ramp}: blocks of arch={net.config.arch} have no attn.window; set it to null"
        )
