"""Decode steps on a GPU as CUDA graphs: a step of many small kernels costs one launch.

A step runs on buffers that stay where they are. It is recorded for some sizes, powers of two: the rows of the batch and
the places of a row that it reads; rows that are too many fill the batch and change nothing. A size is recorded once it
was met `RECORD_AFTER` times, so that short jobs do not wait. A recorded step has to give the logits of the plain one
before it is used; if it does not, or cannot be recorded, a line says so and the plain step stays. On a CPU "recorded"
is the plain call on the same buffers, for tests.
"""

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F

from llm.inference.weights import round_up
from llm.model.cached_attention import SlotPass, StepPass, ways
from llm.model.kv_cache import SlotCache

BUCKETS = (1, 1)  # sizes of batches, for `round_up`: 1, 2, 4, 8, ...
REACHES = (256, 1)  # sizes of rows: 256, 512, 1024, ...
RECORD_AFTER = 4  # steps of a size that are computed plainly before it is recorded
WARM_UPS = 2  # calls before a recording, in which libraries allocate what they need
LIMIT, HALF_LIMIT = 1e-3, 2**-5  # differences of logits in fp32 and half precision, as parts of the largest logit
MOST_SIZES = 64  # that torch compiles


def is_used(device: torch.device) -> bool:
    """Return True where steps are recorded: on CUDA devices."""
    return device.type == "cuda"


def plain_step(
    net, cache: SlotCache, newest: torch.Tensor, padded: int | None = None, adapters: torch.Tensor | None = None
) -> torch.Tensor:
    """Feed the first rows of a cache their newest tokens (n,); return the logits (n, V) behind them.

    padded: rows of the batch, n or more. adapters: (n,) numbers of the rows' adapters, None where the network has none.
    The caller sets the cache's lengths afterwards.
    """
    n = len(newest)
    rows = padded or n
    if adapters is not None:
        net.adapters.choose(F.pad(adapters, (0, rows - n)))
    ids = F.pad(newest, (0, rows - n)).unsqueeze(1).to(net.device)
    return net(ids, cache=SlotPass(cache, 0, rows, live=n), last_only=True)[:n, 0]


class Recorded:
    """A function that always uses the same memory: recorded as a CUDA graph and replayed, on a CPU called.

    Its result is valid until the next call of any `Recorded` with one `memory`, a `Memory`.
    """

    def __init__(self, function: Callable[[], torch.Tensor], memory: "Memory"):
        self._function, self._graph = function, None
        if memory.stream is None:
            return
        stream, current = memory.stream, torch.cuda.current_stream(memory.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function()
        current.wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Threads of the process that copy to the GPU, such as those that load data, do not spoil the recording.
        with torch.cuda.graph(self._graph, memory.pool, stream, capture_error_mode="thread_local"):
            self._result = function()

    def __call__(self) -> torch.Tensor:
        if self._graph is None:
            return self._function()
        self._graph.replay()
        return self._result


class Memory:
    """Stream and pool of memory of recordings that never run at the same time; none on a CPU."""

    def __init__(self, device: torch.device):
        is_cuda = device.type == "cuda"
        self.device = device
        self.stream = torch.cuda.Stream(device) if is_cuda else None
        self.pool = torch.cuda.graph_pool_handle() if is_cuda else None


class StepGraphs:
    """Decode steps of a network over a cache, recorded by size. compiles: each is compiled by torch before.

    The cache must be made with spare=1. Steps of rows that stand behind a prefix are plain ones.
    """

    def __init__(self, net, compiles: bool = False):
        self.net, self.compiles = net, compiles
        self.ways = ways(net.device, net.compute_dtype, net.config.head_dim)
        self._memory = Memory(net.device)
        self._met: Counter[tuple[int, int]] = Counter()
        self._version = -1
        self.recorded: dict[tuple[int, int], Recorded] = {}

    def step(self, cache: SlotCache, newest: torch.Tensor, adapters: torch.Tensor | None = None) -> torch.Tensor:
        """Feed the first rows of a cache their newest tokens (n,); return the logits (n, V), valid until the next call.

        adapters: (n,) numbers of the rows' adapters, None where the network has none. The caller sets the cache's
        lengths afterwards.
        """
        n = len(newest)
        size = bucket(n, int(cache.lengths[:n].max()) + 1, cache)
        if not self.ways or size[0] > cache.rows or cache.prefixes:
            return plain_step(self.net, cache, newest, adapters=adapters)
        if cache.version != self._version:
            self._start_anew(cache)
        recorded = self.recorded.get(size)
        if recorded is None:
            self._met[size] += 1
            if self._met[size] < RECORD_AFTER:
                return plain_step(self.net, cache, newest, adapters=adapters)
            return self._record(size, cache, newest, adapters)
        self._fill(size[0], cache, newest, adapters)
        return recorded()[:n]

    def _start_anew(self, cache: SlotCache) -> None:
        """Forget what was recorded over buffers that are gone, and make those of the step."""
        self.recorded, self._version = {}, cache.version
        self._ids = torch.zeros(cache.rows, 1, dtype=torch.long, device=cache.device)
        self._lengths = torch.zeros(cache.rows, dtype=torch.long, device=cache.device)
        self._live = torch.zeros((), dtype=torch.long, device=cache.device)
        self._adapters = torch.zeros(cache.rows, dtype=torch.long, device=cache.device)

    def _fill(self, rows: int, cache: SlotCache, newest: torch.Tensor, adapters: torch.Tensor | None) -> None:
        """Write what changes from step to step into the buffers."""
        self._ids[: len(newest), 0].copy_(newest, non_blocking=True)
        self._lengths[:rows].copy_(cache.lengths[:rows], non_blocking=True)
        self._live.fill_(len(newest))
        if adapters is not None:
            self._adapters[: len(adapters)].copy_(adapters, non_blocking=True)

    def _record(
        self, size: tuple[int, int], cache: SlotCache, newest: torch.Tensor, adapters: torch.Tensor | None
    ) -> torch.Tensor:
        """Record the step of a size and compare its logits with those of the plain step; return them.

        The way of attention that fails is not tried again.
        """
        lasts = (cache.last_embed, cache.last_ids, cache.last_keys)
        before = [None if last is None else last.clone() for last in lasts]
        wanted = plain_step(self.net, cache, newest, adapters=adapters)
        for way in list(self.ways):
            try:
                self._fill(size[0], cache, newest, adapters)
                self._restore(cache, before)
                with self._compiling():
                    recorded = Recorded(self._function(size, cache, way), self._memory)
                    self._restore(cache, before)
                    logits = recorded()[: len(newest)]
                check(logits, wanted, self.net.compute_dtype)
            except Exception as error:  # whatever fails: the plain step is there
                reason = (str(error) or type(error).__name__).strip().splitlines()[0]
                print(f"CUDA graphs: not with {way} attention ({reason}); decoding goes on without", file=sys.stderr)
                self.ways.remove(way)
                self.recorded = {}
            else:
                self.recorded[size] = recorded
                return logits
        self._restore(cache, before)
        return plain_step(self.net, cache, newest, adapters=adapters)  # again: a trial may have written wrong keys

    def _compiling(self) -> AbstractContextManager:
        """Return a context in which torch compiles as many sizes as there are."""
        return torch._dynamo.config.patch(recompile_limit=MOST_SIZES) if self.compiles else nullcontext()

    @staticmethod
    def _restore(cache: SlotCache, before: list[torch.Tensor | None]) -> None:
        for last, old in zip((cache.last_embed, cache.last_ids, cache.last_keys), before, strict=True):
            if old is not None:
                last.copy_(old)

    def _function(self, size: tuple[int, int], cache: SlotCache, way: str) -> Callable[[], torch.Tensor]:
        """Return the step of a size as a function without arguments, which reads the buffers."""
        rows, reach = size
        ids, lengths, live, net = self._ids[:rows], self._lengths[:rows], self._live, self.net
        adapters = self._adapters[:rows]

        def step() -> torch.Tensor:
            if net.adapters is not None:
                net.adapters.rows = adapters
            return net(ids, cache=StepPass(cache, lengths, live, reach, way), last_only=True)[:, 0]

        return torch.compile(step, dynamic=False) if self.compiles else step


def bucket(n: int, longest: int, cache: SlotCache) -> tuple[int, int]:
    """Return the size (rows, places of a row) of the step for n rows of which the longest needs `longest` places."""
    return round_up(n, *BUCKETS), min(round_up(longest, *REACHES), cache.room)


def check(logits: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise RuntimeError if logits differ from the wanted ones by more than rounding in `dtype`, or are no numbers."""
    error, largest = (logits - wanted).abs().max().item(), wanted.abs().max().item()
    limit = (LIMIT if dtype in (torch.float32, torch.float64) else HALF_LIMIT) * largest
    if not error <= limit:
        raise RuntimeError(f"the logits differ by {error:.3g} from the plain step's, more than {limit:.3g}")
