"""Batch whose rows come and go at any step, within a fixed budget of cached tokens.

Prompts are read in chunks between decode steps. Tokens that prompts share are read once: those of equal prompts, and
those that a prompt has in common with a text of the store. Where the cache grows beyond its budget, the youngest rows
make room, and are read again later.

On a CPU our own kernel computes all passes where it can. On a GPU decode steps are recorded and replayed
(`llm.inference.step_graph`). Elsewhere shapes are few: prompts and batches are padded to a few sizes where half
precision on a CPU would keep code for each.
"""

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from llm.inference.prefixes import LEAST_SHARED, Entry, PrefixStore, common
from llm.inference.request import Request
from llm.inference.step_graph import BUCKETS, REACHES, StepGraphs, is_used, plain_step
from llm.inference.weights import LENGTHS, ROWS, keeps_shapes, round_up
from llm.model.cached_attention import SlotPass
from llm.model.decode_cpu import SPARE, DecodeStep
from llm.model.kv_cache import Prefix

PLACES = (64, 4)  # sizes of the cache's rows, for `round_up`
COMPARED = 16  # waiting requests that the next one is compared with
CHUNK, CHUNK_ELSEWHERE = 512, 4096  # tokens of prompts that are read between two decode steps, on a CPU and on others

Texts = dict[tuple[int, ...], list[Request]]  # texts to be read and the requests that continue each


@dataclass
class Reading:
    """Prompts that are being read in rows of the cache behind those that are decoded.

    texts: different ones; requests: those that continue each, none for a text that only is to be stored. entry, skip:
    text of the store that all begin with, and how many of its tokens count. done: tokens read behind them. adapter:
    name of the one that reads all of them, None for the base.
    """

    texts: list[tuple[int, ...]]
    requests: list[list[Request]]
    entry: Entry | None
    skip: int
    done: int = 0
    adapter: str | None = None


def shares_texts(device: torch.device) -> bool:
    """Return True where rows attend to a text that they share in its one place. Elsewhere each row gets a copy.

    With copies a step on a GPU is one attention per layer, where many texts would need one each.
    """
    return device.type == "cpu"


def free_memory() -> int:
    """Return the bytes of the host's memory that are free or can be freed; 8 GB where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 8 << 30


def default_budget(net, max_rows: int, sharers: int = 1) -> int:
    """Return the tokens that half of the free memory has room for, enough for one row and at most for all.

    sharers: engines that use the memory, this one too; each takes its part of that half.
    """
    config, size = net.config, net.compute_dtype.itemsize
    if net.device.type == "cuda":  # what torch keeps for the next tensors is free too
        kept = torch.cuda.memory_reserved(net.device) - torch.cuda.memory_allocated(net.device)
        free = torch.cuda.mem_get_info(net.device)[0] + kept
    else:
        free = free_memory()
    per_token = 2 * config.n_layer * config.n_kv_head * config.head_dim * size
    return max(config.seq_len, min(max_rows * config.seq_len, free // (2 * sharers) // per_token))


class SlotBatch:
    """Rows decoded together, from a cache of `net.new_cache`.

    max_rows: rows at most; budget: tokens that cache and store may hold (a lone row may exceed it, so that every
    request comes to its end); remembers: whether the texts of rows that have ended go into the store; compiles: whether
    torch compiles the steps that are recorded on a GPU.
    """

    def __init__(self, net, max_rows: int, budget: int, remembers: bool, compiles: bool = False):
        self.net, self.max_rows, self.budget, self.remembers = net, max_rows, budget, remembers
        self._kernel = DecodeStep.for_net(net)
        self.graphs = None if self._kernel or not is_used(net.device) else StepGraphs(net, compiles)
        self._row_sizes, self._places = (BUCKETS, REACHES) if self.graphs else (ROWS, PLACES)
        self.cache = net.new_cache(1, min(self._places[0], net.config.seq_len), spare=SPARE if self._kernel else 1)
        self.store, self.preemptions = PrefixStore(), 0
        self._rows: list[Request] = []  # row i of the cache
        self._behind: list[Entry | None] = []  # text of the store that row i stands behind
        self._reading: Reading | None = None
        self._shares = shares_texts(net.device)
        self._chunk = CHUNK if net.device.type == "cpu" else CHUNK_ELSEWHERE
        self._keeps_shapes = self._kernel is None and keeps_shapes(net.device, net.compute_dtype)

    @property
    def rows(self) -> list[Request]:
        """Requests in the cache: those that are decoded, in the order of the logits, then those being read."""
        reading = self._reading.requests if self._reading else []
        return [*self._rows, *(request for same in reading for request in same)]

    def stats(self) -> dict[str, int]:
        """Return numbers for `Engine.stats`."""
        return {
            "rows": len(self.rows),
            "cached_tokens": int(self.cache.lengths.sum()) + self.store.n_tokens,
            "cache_size": self.cache.rows * self.cache.cost(self.cache.room) + self.store.cost,
            "prefix_hits": self.store.hits,
            "preemptions": self.preemptions,
        }

    # -----------------------------------------------------------------------------------------------------------------
    # Decoding

    def decode(self, waiting: deque[Request]) -> tuple[list[Request], torch.Tensor | None]:
        """Feed every row its newest token; return the rows and the logits (B, V) behind them.

        Rows that the budget has no place for are put back in front of `waiting`.
        """
        if not self._rows:
            return [], None
        self._make_place(waiting)
        n, newest = len(self._rows), torch.tensor([request.ids[-1] for request in self._rows])
        numbers = self._numbers([request.adapter for request in self._rows])
        if self._kernel:
            logits = self._kernel(self.cache, newest, numbers)
        elif self.graphs:
            logits = self.graphs.step(self.cache, newest, numbers)
        else:
            padded = round_up(n, *ROWS) if self._keeps_shapes else n
            logits = plain_step(self.net, self.cache, newest, padded, numbers)
        self.cache.lengths[:n] += 1
        return list(self._rows), logits

    def _numbers(self, adapters: Sequence[str | None]) -> torch.Tensor | None:
        """Return the numbers (n,) of rows' adapters; None where the network has none."""
        return None if self.net.adapters is None else self.net.adapters.numbers(adapters)

    def _make_place(self, waiting: deque[Request]) -> None:
        """See to it that every row can take a token, by a larger cache or by fewer rows."""
        while True:
            reading = len(self._reading.texts) if self._reading else 0
            rows, room = len(self._rows) + reading, self._longest() + 1
            if rows <= self.cache.rows and room <= self.cache.room:
                return
            if size := self._new_size(rows, room):
                return self._resize(size)
            if rows == 1:
                return self._resize(self._alone(room))
            self.preemptions += 1
            if reading:
                self._put_back(waiting)
            else:
                waiting.appendleft(self._rows[-1])
                self._drop(len(self._rows) - 1)

    def _longest(self) -> int:
        """Return the most tokens of its own that a row has in the cache."""
        return int(self.cache.lengths.max())

    def _new_size(self, rows: int, room: int, stored: int = 0) -> tuple[int, int] | None:
        """Return the size of a cache that holds `rows` rows of `room` tokens; None where the budget forbids it.

        One direction becomes smaller where the budget asks for it. stored: cost of what will be added to the store.
        """
        available = self.budget - self.store.needed - stored
        least = round_up(rows, *self._row_sizes), min(round_up(room, *self._places), self.net.config.seq_len)
        larger = max(rows, self.cache.rows), max(room, self.cache.room)
        if larger != (self.cache.rows, self.cache.room):
            larger = max(least[0], self.cache.rows), max(least[1], self.cache.room)
        return next((size for size in (larger, least) if size[0] * self.cache.cost(size[1]) <= available), None)

    def _alone(self, room: int) -> tuple[int, int]:
        """Return the size of a cache for a lone row, which has its place whatever the budget is."""
        return 1, min(round_up(room, *self._places), self.net.config.seq_len)

    def _resize(self, size: tuple[int, int]) -> None:
        """Give the cache a size, and the store what is left of the budget."""
        self.store.shrink(self.budget - size[0] * self.cache.cost(size[1]))
        if size != (self.cache.rows, self.cache.room):
            self.cache.resize(*size)

    # -----------------------------------------------------------------------------------------------------------------
    # Rows that leave

    def leave(self, request: Request, comes_back: bool = False) -> None:
        """Take a request out of the cache, whether it is decoded or being read; comes_back: what was read is kept."""
        if request in self._rows:
            row = self._rows.index(request)
            if self.remembers or comes_back:
                self._remember(row)
            self._drop(row)
            return
        for same in self._reading.requests:
            if request in same:
                same.remove(request)
        if not any(self._reading.requests):
            self._put_back(deque())

    def _remember(self, row: int) -> None:
        """Put all that a row has read into the store, if there is room for it."""
        before = self.cache.prefix_of(row)
        n = int(self.cache.lengths[row]) + (before.length if before else 0)
        spare, cost = self.budget - self.cache.rows * self.cache.cost(self.cache.room), self.cache.cost(n)
        if n >= LEAST_SHARED and cost <= spare - self.store.needed:
            self.store.shrink(spare - cost)
            request = self._rows[row]
            self.store.add(request.tokens[:n], self.cache.snapshot(row), adapter=request.adapter)

    def _drop(self, row: int) -> None:
        """Let a row leave. The last row of those behind the same text takes its place, and the last row of all its."""
        self._use(self._behind[row], -1)
        last = len(self._rows) - 1
        alike = max((i for i in range(row, last + 1) if self._behind[i] is self._behind[row]), default=row)
        for source, target in ((alike, row), (last, alike)):
            if source != target:
                self.cache.move(source, target)
                self._rows[target], self._behind[target] = self._rows[source], self._behind[source]
        self._rows.pop()
        self._behind.pop()
        self.cache.start(last)
        if self._reading:  # what is being read follows the rows without a gap
            for i in range(len(self._reading.texts)):
                self.cache.move(last + 1 + i, last + i)

    def _put_back(self, waiting: deque[Request]) -> None:
        """Stop reading; the requests wait again."""
        reading, self._reading = self._reading, None
        waiting.extendleft(reversed([request for same in reading.requests for request in same]))
        self._use(reading.entry, -1)
        for i in range(len(reading.texts)):
            self.cache.start(len(self._rows) + i)

    def _use(self, entry: Entry | None, uses: int = 1) -> None:
        """Count rows that stand behind a text of the store, so that it is not dropped."""
        if entry is not None:
            entry.uses += uses
            self.store.use(entry)

    # -----------------------------------------------------------------------------------------------------------------
    # Reading

    def read_prompts(self, waiting: deque[Request]) -> tuple[list[Request], torch.Tensor | None] | None:
        """Read a chunk of the prompts that wait; return requests whose prompts are read, and the logits (B, V).

        Returns None where nothing waits that there is a place for.
        """
        if self._reading is None:
            known = self._join_known(waiting)
            if known[0]:
                return known
            self._reading = self._next(waiting)
            if self._reading is None:
                return None
        logits = self._read_chunk(self._reading)
        return ([], None) if logits is None else self._join(logits, waiting)

    def _join_known(self, waiting: deque[Request]) -> tuple[list[Request], torch.Tensor | None]:
        """Let requests join whose whole text is in the store, with the logits behind it."""
        joined, logits = [], []
        while waiting and len(self._rows) < self.max_rows:
            request = waiting[0]
            entry, n = self.store.find(request.tokens, request.adapter)
            if n < len(request.tokens) or not self._add_row(request, entry):
                break
            waiting.popleft()
            self.store.hits += 1
            request.cached_tokens = len(request.prompt)
            joined.append(request)
            logits.append(entry.logits)
        return joined, torch.stack(logits) if joined else None

    def _add_row(self, request: Request, entry: Entry) -> bool:
        """Add a row that begins with a text of the store; return False where the budget forbids it."""
        entry.uses += 1  # or it could make room for the row
        own = 1 if self._shares else len(entry.tokens) + 1
        size = self._new_size(len(self._rows) + 1, max(self._longest() + 1, own))
        if size is not None:
            self._resize(size)
            self.cache.start(len(self._rows), entry.prefix, is_copied=not self._shares)
            self._count_in(request, entry if self._shares else None)
        entry.uses -= 1
        return size is not None

    def _count_in(self, request: Request, entry: Entry | None) -> None:
        """Take a request among the rows; the cache has it already, behind the text `entry`."""
        self._rows.append(request)
        self._behind.append(entry)
        self._use(entry)

    def _next(self, waiting: deque[Request]) -> Reading | None:
        """Take the prompts out of `waiting` that are read next, as many as a chunk and the budget have room for.

        All have one adapter: that of the request that waits longest.
        """
        if not waiting or len(self._rows) >= self.max_rows:
            return None
        first, adapter = tuple(waiting[0].tokens), waiting[0].adapter
        entry, skip = self.store.find(first, adapter)
        if self._rows and not self._planned_size({first: [waiting[0]]}, entry, skip):
            return None  # not even the first one fits
        n = self._shared_by_others(first, skip, waiting)
        if n and (reading := self._begin({first[:n]: []}, entry, skip, adapter)):
            return reading
        texts: Texts = {}
        for request in islice(waiting, self.max_rows - len(self._rows)):
            text = tuple(request.tokens)
            if request.adapter != adapter:
                continue
            is_known = len(text) == skip  # the whole of it: nothing would be read, and it joins when its turn comes
            if texts and text not in texts and (is_known or self.store.find(text, adapter) != (entry, skip)):
                continue
            more = texts | {text: [*texts.get(text, []), request]}
            fits = text in texts or self._pass_size(more, skip) <= self._chunk  # an equal text is not read again
            if texts and not (fits and self._planned_size(more, entry, skip)):
                break
            texts = more
        reading = self._begin(texts, entry, skip, adapter)
        if reading:
            taken = {request for same in reading.requests for request in same}
            kept = [request for request in waiting if request not in taken]
            waiting.clear()
            waiting.extend(kept)
        return reading

    def _shared_by_others(self, first: tuple[int, ...], skip: int, waiting: deque[Request]) -> int:
        """Return how many first tokens of the text `first` are worth a reading of their own; 0 = none.

        Others that wait begin with them too, and go on otherwise; or a text of the store does, but its layers with a
        window keep its end alone: the next prompt that begins so will find them.
        """
        adapter, text = waiting[0].adapter, np.array(first)
        found = [min(self.store.longest_beginning(first, adapter), len(first) - 1)]
        for request in islice(waiting, 1, COMPARED):
            if request.adapter != adapter:
                continue
            other = np.array(request.tokens)
            if not np.array_equal(text, other):
                found.append(min(common(text, other), len(text) - 1, len(other) - 1))
        return min((n for n in found if n >= skip + LEAST_SHARED), default=0)

    def _pass_size(self, texts: Collection[Sequence[int]], skip: int) -> int:
        """Return the tokens of a pass over whole texts behind their first `skip`. Our kernel needs no padding."""
        if self._kernel:
            return sum(len(text) - skip for text in texts)
        return self._padded(texts, skip) * len(texts)

    def _padded(self, texts: Iterable[Sequence[int]], skip: int, done: int = 0) -> int:
        """Return the tokens per row of the next pass over texts, of which `skip` + `done` tokens are there already."""
        n = min(max(map(len, texts)) - skip - done, self._chunk)
        return min(round_up(n, *LENGTHS), self.net.config.seq_len - skip - done) if self._keeps_shapes else n

    def _planned_size(self, texts: Texts, entry: Entry | None, skip: int) -> tuple[int, int] | None:
        """Return the size that the cache needs to read texts and to continue them, None where the budget forbids it."""
        own = 0 if self._shares else skip
        rest = max(map(len, texts)) - skip
        last = (rest - 1) // self._chunk * self._chunk  # where the last chunk begins, which may be padded
        room = own + max(rest + 1, last + self._padded(texts, skip, last))
        rows = max(len(texts), sum(map(len, texts.values())))
        stored = sum(self.cache.cost(len(text)) for text, requests in texts.items() if len(requests) != 1)
        if entry is not None and (not entry.uses or skip < len(entry.tokens)):
            stored += self.cache.cost(skip)
        room = min(max(self._longest() + 1, room), self.net.config.seq_len)
        return self._new_size(len(self._rows) + rows, room, stored)

    def _begin(self, texts: Texts, entry: Entry | None, skip: int, adapter: str | None) -> Reading | None:
        """Give texts their rows in the cache, behind the first `skip` tokens of a text of the store.

        adapter: name of the one that reads them.
        Returns None where the budget forbids it; a lone request is always read, if need be without the store.
        """
        size = self._planned_size(texts, entry, skip)
        if size is None and not self._rows and any(texts.values()):
            ((text, requests),) = list(texts.items())[:1]
            texts, entry, skip = {text: requests[:1]}, None, 0
            size = self._planned_size(texts, None, 0) or self._alone(len(text) + 1)
        if size is None:
            return None
        if entry is not None and skip < len(entry.tokens):
            entry = self.store.add(entry.tokens[:skip], self._cut(entry, skip), adapter=adapter)
        self.store.hits += sum(map(len, texts.values())) if entry else 0
        self._use(entry)
        self._resize(size)
        for i, requests in enumerate(texts.values()):
            self.cache.start(len(self._rows) + i, entry and entry.prefix, is_copied=not self._shares)
            for j, request in enumerate(requests):
                request.cached_tokens = len(request.prompt) if j else min(skip, len(request.prompt))
        return Reading(list(texts), list(texts.values()), entry, skip, adapter=adapter)

    def _cut(self, entry: Entry, n: int) -> Prefix:
        """Return the first n tokens of a text of the store as a prefix of its own."""
        last_ids, last_embed = self.cache.last_of(entry.tokens[:n]), None
        if entry.prefix.last_embed is not None:
            if self.net.adapters is not None:
                self.net.adapters.choose(self._numbers([entry.adapter]))
            last_embed = self.net.smear_input(int(entry.tokens[n - 1]))
        return entry.prefix.cut(n, last_embed, last_ids)

    def _read_chunk(self, reading: Reading) -> torch.Tensor | None:
        """Read the next tokens of all texts; return the logits (texts, V) behind their ends, None before the last."""
        begin, first = reading.skip + reading.done, len(self._rows)
        parts = [torch.tensor(text[begin : begin + self._chunk]) for text in reading.texts]
        lengths = torch.tensor([len(part) for part in parts])
        if self._kernel:
            own = self.cache.lengths[first : first + len(parts)]
            at = torch.cat([start + torch.arange(n) for start, n in zip(own, lengths, strict=True)])
            rows = torch.arange(first, first + len(parts)).repeat_interleave(lengths)
            numbers = self._numbers([reading.adapter] * len(at))
            logits = self._kernel.extend(self.cache, torch.cat(parts), at, rows, lengths.cumsum(0) - 1, numbers)
        else:
            ids = torch.zeros(len(parts), self._padded(reading.texts, reading.skip, reading.done), dtype=torch.long)
            for i, part in enumerate(parts):
                ids[i, : len(part)] = part
            one_pass, device = SlotPass(self.cache, first, len(parts)), self.net.device
            if self.net.adapters is not None:
                self.net.adapters.choose(self._numbers([reading.adapter] * len(parts)))
            logits = self.net(ids.to(device), cache=one_pass, lengths=lengths.to(device), last_only=True)[:, 0]
        self.cache.lengths[first : first + len(parts)] += lengths
        reading.done += int(lengths.max())
        return None if reading.skip + reading.done < max(map(len, reading.texts)) else logits

    def _join(self, logits: torch.Tensor, waiting: deque[Request]) -> tuple[list[Request], torch.Tensor | None]:
        """Let the requests that were read take part in decoding; return them with the logits behind their prompts.

        Texts with several requests (or none) go into the store; those for which there is no place wait again.
        """
        reading, self._reading = self._reading, None
        first, joined, picked, stored = len(self._rows), [], [], {}
        for i, (text, requests) in enumerate(zip(reading.texts, reading.requests, strict=True)):
            if len(requests) != 1:
                stored[i] = self.store.add(text, self.cache.snapshot(first + i), logits[i], reading.adapter)
                stored[i].uses += 1  # until its rows stand behind it
                continue
            if first + i != len(self._rows):
                self.cache.move(first + i, len(self._rows))
            self._count_in(requests[0], reading.entry if self._shares else None)
            joined.append(requests[0])
            picked.append(i)
        for row in range(len(self._rows), first + len(reading.texts)):
            self.cache.start(row)
        left = []
        for i, entry in stored.items():
            for request in reading.requests[i]:
                if self._add_row(request, entry):
                    joined.append(request)
                    picked.append(i)
                else:
                    left.append(request)
            entry.uses -= 1
        self._use(reading.entry, -1)
        waiting.extendleft(reversed(left))
        return joined, logits[picked] if joined else None
