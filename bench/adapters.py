"""Several adapters in one engine: tokens per second beside none, and memory beside engines of merged weights.

    python bench/adapters.py [--depth 4] [--vocab 8192] [--rows 16] [--adapters 4] [--rank 8] [--prompt 32]
                             [--tokens 128] [--repeats 5] [--arch modern] [--dtype auto] [--clock wall]

Engines take turns in one process: one without adapters, one that has adapters and rows that use none, and one whose
rows use all of them in turn. Weights are random, and nobody ends a turn. Then each of two processes loads N models: N
adapters of one engine, and N engines of merged weights; what it holds more than with one model is told. Prints a table
and a last line of JSON.
"""

import _bench  # isort: skip  (puts the project on the path)
import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from llm.cli.overrides import compose
from llm.inference.engine import Engine
from llm.inference.sampling import SamplingParams
from llm.model.gpt import GPT
from llm.model.lora import Adapter, LoRA, targeted
from llm.scaling.rules import model_config
from llm.utils.environment import return_memory


class Numbers:
    """Tokenizer without words, tools and ends of turns."""

    bos_id, has_tools, stop_ids = -1, False, frozenset()


def drawn_adapter(net: GPT, rank: int, seed: int) -> Adapter:
    """Return an adapter of the default targets with random numbers."""
    lora, g, weights = LoRA(rank), torch.Generator().manual_seed(seed), {}
    for name, module in targeted(net, lora):
        out, width = module.weight.shape
        weights[f"{name}.lora_A"] = torch.randn(rank, width, generator=g) / width**0.5
        weights[f"{name}.lora_B"] = torch.randn(out, rank, generator=g) * 0.01
    return Adapter(lora, weights)


def network(args) -> GPT:
    """Return the network of the recipe with random weights."""
    cfg = compose("train", [f"model.depth={args.depth}", f"arch={args.arch}"])
    net = GPT(model_config(cfg.model, cfg.arch, args.vocab)).init_weights().eval()
    net.compute_dtype = args.dtype
    return net.to(_bench.DEVICE)


def job(engine: Engine, names: list[str | None], args) -> None:
    """Write --tokens behind a prompt in every row; row i has the adapter names[i]."""
    params = SamplingParams(max_new_tokens=args.tokens)
    for row, name in enumerate(names):
        engine.submit([1 + (row * 31 + j) % (args.vocab - 1) for j in range(args.prompt)], params, adapter=name)
    while engine.has_work:
        engine.step()


def resident() -> int:
    """Return the bytes that this process has in memory."""
    gc.collect()
    return_memory()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(args, n: int, way: str) -> None:
    """Print how many bytes n models take in this process: adapters of one engine, or engines of their own."""
    net = network(args)
    engines = [Engine(net, Numbers(), frozen=True, max_rows=args.rows)]
    job(engines[0], [None], args)
    before = resident()
    if way == "adapters":
        adapters = {str(i): drawn_adapter(net, args.rank, i) for i in range(n)}
        engines = [Engine(net, Numbers(), frozen=True, max_rows=args.rows, adapters=adapters)]
        job(engines[0], list(adapters), args)
    else:
        for _ in range(n):
            engines.append(Engine(network(args), Numbers(), frozen=True, max_rows=args.rows))
            job(engines[-1], [None], args)
    print(resident() - before)


def main() -> None:
    """Measure and print."""
    numbers = {"depth": 4, "vocab": 8192, "rows": 16, "adapters": 4, "rank": 8, "prompt": 32, "tokens": 128}
    args = _bench.arguments(__doc__, numbers | {"repeats": 5}, arch="modern", clock="wall", memory="")
    if args.memory:
        return memory(args, args.adapters, args.memory)
    net = network(args)
    adapters = {str(i): drawn_adapter(net, args.rank, i) for i in range(args.adapters)}
    names = [str(i % args.adapters) for i in range(args.rows)]
    plain, several = (Engine(net, Numbers(), frozen=True, max_rows=args.rows, adapters=a) for a in (None, adapters))
    jobs = {
        "none": lambda: job(plain, [None] * args.rows, args),
        "there, not used": lambda: job(several, [None] * args.rows, args),
        "one": lambda: job(several, ["0"] * args.rows, args),
        f"{args.adapters} in turn": lambda: job(several, names, args),
    }
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    result = {"dtype": args.dtype}
    seconds = _bench.alternating(jobs, args.repeats, clock=clock)
    for name, one in seconds.items():
        result[f"tokens_per_second {name}"] = args.rows * args.tokens / one
        result[f"time_share {name}"] = one / seconds["none"]
    for way in ("adapters", "engines"):
        command = [sys.executable, __file__, *sys.argv[1:], "--memory", way]
        held = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        result[f"megabytes {args.adapters} {way}"] = held / 1e6
    _bench.show(result)


if __name__ == "__main__":
    main()
