"""Cost of a checkpoint: seconds that a step waits for it, and seconds by which it makes training longer.

    python bench/checkpoint.py [--depth 6] [--vocab 8192] [--rows 4] [--seq 512] [--saves 5] [--every 250]

The whole state of a network and its optimizer is written beside the training (async) and by the step itself (sync),
against training without checkpoints, in turns in one process. Slowed down by: seconds more for the steps during which a
checkpoint is written. Share: of the wall-clock, with a checkpoint every `--every` steps. Floor: the time to copy the
state's bytes at the measured rate. Prints a table and a last line of JSON.
"""

import _bench  # isort: skip  (puts the project on the path)
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from llm.checkpoint.resume import CheckpointWriter, list_checkpoints
from llm.cli.overrides import compose
from llm.model.gpt import GPT
from llm.optim.build import build_optimizer
from llm.scaling.rules import model_config


def turns(
    writers: dict[str, CheckpointWriter | None],
    count: int,
    folder: Path,
    state: Callable[[], dict],
    train: Callable[[], object],
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Save and train with each writer in turn, `count` times; return the seconds of saving and of both, by writer."""
    waits: dict[str, list[float]] = {name: [] for name in writers}
    totals: dict[str, list[float]] = {name: [] for name in writers}
    for turn in range(count + 1):
        for name, writer in writers.items():
            _bench.sync()
            start = time.perf_counter()
            if writer is not None:
                writer.save_checkpoint(state(), folder / f"step_{turn:06d}.ckpt")
            waited = time.perf_counter() - start
            train()
            _bench.sync()
            total = time.perf_counter() - start
            if writer is not None:
                writer.finish()
            if turn > 0:
                waits[name].append(waited)
                totals[name].append(total)
    return waits, totals


def main() -> None:
    """Measure the writers in turn and print the results."""
    args = _bench.arguments(__doc__, {"depth": 6, "vocab": 8192, "rows": 4, "seq": 512, "saves": 5, "every": 250})
    cfg = compose("train", [f"model=d{args.depth}", f"model.seq_len={args.seq}"])
    net = GPT(model_config(cfg.model, cfg.arch, args.vocab)).init_weights(0).to(_bench.DEVICE)
    net.compute_dtype = args.dtype
    net.set_attention("auto", _bench.DEVICE, True)
    optimizer = build_optimizer(net, cfg.optim)
    ids = torch.randint(args.vocab, (args.rows, args.seq + 1), device=_bench.DEVICE)

    def step() -> None:
        net(ids[:, :-1], ids[:, 1:], reduction="mean").backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def state() -> dict:
        return {"state_dict": net.state_dict(), "optimizer_states": [optimizer.state_dict()]}

    step_seconds = _bench.median([_bench.seconds_of(step) for _ in range(8)][2:])
    with tempfile.TemporaryDirectory() as folder:
        writers = {"none": None, "async": CheckpointWriter(2, True), "sync": CheckpointWriter(2, False)}
        path = Path(folder) / "step_000001.ckpt"
        writers["sync"].save_checkpoint(state(), path)
        start = time.perf_counter()
        writers["sync"].save_checkpoint(state(), path)
        steps = max(3, int(2 * (time.perf_counter() - start) / step_seconds) + 1)  # a checkpoint is written meanwhile
        waits, totals = turns(writers, args.saves, Path(folder), state, lambda: [step() for _ in range(steps)])
        size = list_checkpoints(Path(folder))[-1][1].stat().st_size
    wait, total = ({name: _bench.median(v) for name, v in values.items()} for values in (waits, totals))
    result = vars(args) | {"megabytes": size / 1e6, "step_ms": 1000 * step_seconds}
    for name in ("async", "sync"):
        more = total[name] - total["none"]
        result |= {f"{name}_step_waits_ms": 1000 * wait[name], f"{name}_slowed_down_by_ms": 1000 * more}
        result[f"{name}_share"] = more / (more + args.every * total["none"] / steps)
    result["async_to_sync_wait"] = wait["async"] / wait["sync"]
    result["floor_ms"] = 1000 * 2 * size / _bench.copy_rate()
    _bench.show(result)


if __name__ == "__main__":
    main()
