"""Speed of this machine: the rate of its matrix products, measured once, and what earlier runs took.

Both are kept in one file of the user's, so that a run knows at its start how long it will take. Nothing depends on the
file: where it cannot be read or written, the rate is measured again and earlier runs are forgotten.
"""

import contextlib
import os
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from llm.errors import UserError
from llm.utils.environment import cpu_name
from llm.utils.files import read_json, write_json
from llm.utils.shapes import listing, mapping, real, text

MOST_RUNS = 200  # that are remembered; older ones go


@dataclass(frozen=True)
class Parts:
    """Seconds of a training: of a step behind the first, of the first, of all evaluations and checkpoints, of the rest.

    The rest is what comes before the first step and behind the last.
    """

    step: float
    first: float
    pauses: float
    rest: float


@dataclass(frozen=True)
class Run:
    """A training on this machine: what was expected of it by the matrix rate alone, and what it took.

    on: device, number format and the like (see `key`). flops: of one step of one process.
    """

    on: str
    stage: str
    flops: float
    expected: Parts
    took: Parts


NAMES = tuple(field.name for field in fields(Parts))
_PARTS = mapping(dict.fromkeys(NAMES, real(0, 1e9)), needs=NAMES)
_RUN = mapping(
    {"on": text, "stage": text, "flops": real(0, 1e30), "expected": _PARTS, "took": _PARTS},
    needs=tuple(field.name for field in fields(Run)),
)
FORM = mapping({"rates": mapping(others=real(1, 1e21)), "runs": listing(_RUN)})


def file() -> Path:
    """Return the file: $FATHOM_MACHINE, else machine.json in fathom/ of the user's cache. RuntimeError: no home."""
    if named := os.environ.get("FATHOM_MACHINE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fathom" / "machine.json"


def read() -> dict:
    """Return {"rates", "runs"} of the file; both are empty where there is none, or one that cannot be used."""
    found: dict = {}
    with contextlib.suppress(UserError, OSError, RuntimeError):
        found = read_json(file()) or {}
        FORM(found, "machine.json")
        return {"rates": found.get("rates", {}), "runs": found.get("runs", [])}
    return {"rates": {}, "runs": []}


def write(content: dict) -> None:
    """Write the file, if that is possible."""
    with contextlib.suppress(UserError, OSError, RuntimeError):
        write_json(file(), content)


def device_name(device: torch.device) -> str:
    """Return the name of a device's model: that of the processor, or of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name() if device.type == "cpu" else device.type


def key(device: torch.device, dtype: torch.dtype) -> str:
    """Return what a rate depends on: the device's model, its threads, the number format and the version of torch."""
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{device_name(device)}{threads}, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}"


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of this machine's matrix products: the rate that is kept, or one measured now (0.3 s)."""
    name = key(device, dtype)
    rate = read()["rates"].get(name)
    if rate is None:
        rate = measured_matmul_rate(device, dtype)
        content = read()  # another process may have written meanwhile
        write(content | {"rates": content["rates"] | {name: rate}})
    return rate


def free_share(device: torch.device, seconds: float = 0.1) -> float:
    """Return the share of its processors' time, above 0, that this process gets now beside others; 1.0 on a GPU."""
    if device.type != "cpu":
        return 1.0
    a, threads = torch.randn(512, 512), torch.get_num_threads()
    begin, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - begin < seconds:
        a @ a
    return cpu_share(time.process_time() - used, time.perf_counter() - begin, threads)


def cpu_share(used: float, spent: float, threads: int) -> float:
    """Return the share of the time of `threads` processors in `used` of `spent` seconds, from 0.01 to 1."""
    return min(max(used / max(spent * threads, 1e-9), 0.01), 1.0)


def measured_matmul_rate(device: torch.device, dtype: torch.dtype, n: int | None = None, seconds: float = 0.3) -> float:
    """Return the FLOP/s of n x n x n products, best of the repetitions that fit in `seconds`.

    By default n is 1024 on a CPU and 8192 on a GPU, which smaller products do not fill. On a CPU its own time counts,
    so that other programs which run meanwhile change little.
    """
    n = n or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    on_cpu, threads = device.type == "cpu", torch.get_num_threads()
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        synchronize()
        start, used = time.perf_counter(), time.process_time()
        a @ b
        synchronize()
        spent, used = time.perf_counter() - start, (time.process_time() - used) / threads
        best = min(best, used if on_cpu and used > 0 else spent)
    return 2 * n**3 / best


def remember(run: Run) -> None:
    """Add a run to those that are known, as the last one; the oldest go."""
    content = read()
    write(content | {"runs": [*content["runs"], asdict(run)][-MOST_RUNS:]})


def earlier_runs() -> list[Run]:
    """Return the runs that are known, the oldest first."""
    return [
        Run(
            one["on"], one["stage"], one["flops"], *(Parts(*map(one[kind].get, NAMES)) for kind in ("expected", "took"))
        )
        for one in read()["runs"]
    ]
