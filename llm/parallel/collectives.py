"""The processes of one training: which one this is, and the few numbers they exchange beside gradients and weights.

Every function also works in a single process without torch.distributed, where there is nobody to talk to. Things
exchanged here live on the host and travel by gloo, so no GPU waits for them.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

_waited = 0.0


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process among those that train together, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Return whether this process is the one that prints and writes."""
    return rank() == 0


def to_local(t: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process holds: all of it, or its rows of a DTensor."""
    return t.to_local() if isinstance(t, DTensor) else t


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Return the sums of numbers over all processes, in fp64: equal bits everywhere."""
    if world_size() == 1:
        return list(values)
    global _waited
    start = time.perf_counter()
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    _waited += time.perf_counter() - start
    return sums.tolist()


def waited_seconds() -> float:
    """Return the seconds that this process has spent in `all_reduce_sum`, above all waiting for the others."""
    return _waited


def all_gather_object(thing: Any) -> list:
    """Return the things of all processes, by rank. They are pickled: for small ones and checkpoints."""
    if world_size() == 1:
        return [thing]
    things: list = [None] * world_size()
    dist.all_gather_object(things, thing)
    return things


def broadcast_object(thing: Any) -> Any:
    """Return the thing that rank 0 has; the argument of the other processes counts for nothing."""
    if world_size() == 1:
        return thing
    box = [thing]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        all_reduce_sum([0.0])
