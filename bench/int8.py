"""Seconds of a decode step with matrices in 8 bits against those in the compute dtype (`weights=int8` of serve.py).

    OMP_NUM_THREADS=1 taskset -c 1 python bench/int8.py [--depth 12] [--vocab 32768] [--behind 64] [--repeats 9]
                                                        [--arch modern] [--dtype auto] [--clock cpu]

Both kinds of our C++ kernel take turns in one process; weights are random. A row stands behind --behind tokens. Prints
a table and a last line of JSON; `ratio_...` is the compute dtype over int8, for batches of 1, 4 and 16 rows.
"""

import _bench  # isort: skip  (puts the project on the path)
import time

import torch

from llm.cli.overrides import compose
from llm.model.decode_cpu import SPARE, DecodeStep, load
from llm.model.gpt import GPT
from llm.model.kv_cache import SlotCache
from llm.scaling.rules import model_config

ROWS = (1, 4, 16)
TOKENS = 16  # of a measurement


@torch.inference_mode()
def main() -> None:
    """Time both kinds of step for every batch; print medians and ratios."""
    numbers = {"depth": 12, "vocab": 32768, "behind": 64, "repeats": 9}
    if load() is None:
        raise SystemExit("bench/int8.py compares two ways of our C++ kernel: it needs g++ or clang++")
    args = _bench.arguments(__doc__, numbers, arch="modern", clock="cpu")
    cfg = compose("train", [f"model=d{args.depth}", "model.seq_len=512", f"arch={args.arch}"])
    net = GPT(model_config(cfg.model, cfg.arch, args.vocab)).init_weights(0).to(args.dtype)
    net.compute_dtype, kinds = args.dtype, {}
    for name in ("plain", "int8"):
        net.int8 = name == "int8"
        kinds[name] = DecodeStep.for_net(net)
    result = vars(args) | {f"{name}_mb": sum(p.nbytes for p in kind._packed) / 1e6 for name, kind in kinds.items()}
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    for rows in ROWS:
        cache = SlotCache(net.config, rows, args.behind + 1, dtype=args.dtype, spare=SPARE)
        cache.lengths[:] = args.behind
        ids, times = torch.randint(0, args.vocab, (rows,)), max(1, TOKENS // rows)
        steps = {
            name: lambda s=kind, c=cache, i=ids, n=times: [s(c, i) for _ in range(n)] for name, kind in kinds.items()
        }
        seconds = _bench.alternating(steps, args.repeats, warmup=1, clock=clock)
        result |= {f"{name}_{rows}_ms": 1e3 * s / times for name, s in seconds.items()}
        result[f"ratio_{rows}"] = seconds["plain"] / seconds["int8"]
    _bench.show(result)


if __name__ == "__main__":
    main()
