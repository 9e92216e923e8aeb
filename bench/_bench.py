"""Helpers of the benchmarks: device, medians of alternating runs, peak memory, a table and a last line of JSON."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from llm.utils.environment import keep_private, tune_process  # noqa: E402

keep_private()
tune_process()  # the entry points do it too

import torch  # noqa: E402

from llm.model.linear import resolve_compute_dtype  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def arguments(doc: str, numbers: dict[str, int], **words: str) -> argparse.Namespace:
    """Parse whole numbers and words with their defaults, and --dtype, which becomes a torch.dtype."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in words.items():
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--dtype", default="auto", help="auto, fp32 or bf16")
    args = parser.parse_args()
    args.dtype = resolve_compute_dtype(args.dtype, DEVICE)
    return args


def matmul_rate(dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Return the FLOP/s of a square matrix product that is large enough to be the machine's best."""
    from llm.scaling.machine import measured_matmul_rate

    return measured_matmul_rate(DEVICE, dtype, None if DEVICE.type == "cuda" else 2048, seconds)


def copy_rate() -> float:
    """Return the bytes per second that a copy reads and writes; far more than a GPU's cache holds are copied."""
    n = 1 << (31 if DEVICE.type == "cuda" else 26)
    a, b = (torch.zeros(n, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return 2 * n / min(seconds_of(lambda: a.copy_(b)) for _ in range(10))


def sync() -> None:
    """Wait until the device has finished its work."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(step: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds that a step takes on the device."""
    sync()
    start = clock()
    step()
    sync()
    return clock() - start


def alternating(
    steps: dict[str, Callable[[], object]],
    repeats: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median seconds of each step; they take turns, so that busy moments of the machine meet them all.

    clock: time.process_time counts what the process computes instead, which others on the machine hardly change.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + warmup):
        for name, step in steps.items():
            passed = seconds_of(step, clock)
            if turn >= warmup:
                seconds[name].append(passed)
    return {name: median(values) for name, values in seconds.items()}


def median(values: list[float]) -> float:
    """Return the middle value, the upper one of two."""
    return sorted(values)[len(values) // 2]


def peak_bytes(step: Callable[[], object]) -> int:
    """Return the most memory in use during `step` beyond that before it: measured on a GPU, counted on a CPU."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def show(result: dict) -> None:
    """Print a line per value, then all of them as one line of JSON."""
    result = {name: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for name, v in result.items()}
    result = {"device": str(DEVICE), "threads": torch.get_num_threads()} | result
    width = max(map(len, result))
    for name, value in result.items():
        print(f"{name:{width}}  {value:,.4g}" if isinstance(value, float) else f"{name:{width}}  {value}")
    print(json.dumps(result))
