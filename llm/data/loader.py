"""Training batches, one per optimizer step, prepared by a background thread and resumable to the bit.

A loader turns a feed of tokenised documents (TextSteps) or rendered conversations (ConversationSteps) into packed rows
and those into steps:

    {"micro": [{"inputs": (B, T) int64, "targets": (B, T) int64, -1 = not trained,          micro_per_step of them
                ["weights": (B, T) fp32, factors of the losses, where a message has one]}, ...],
     "n_trained": targets >= 0 in the step, "n_tokens": all positions,
     "state": a function that returns the position after this step}

All counts are of this rank. The position holds the number of steps before it, the cursor of the source, the packing
buffer and the balance of tokens (llm.data.balance) as tensors and primitives (up to buffer x (T + 1) int32 tokens), so
torch.load(weights_only=True) reads it and a loader built with it continues with exactly the steps that would have
followed. It rides with the batch because the thread is ahead of training, as a function because few positions are ever
stored. Steps are a function of source, tokenizer, sizes and rank alone, never of prefetch depth or thread timing.
"""

import logging
import queue
import threading
import time
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice

import numpy as np
import torch

from llm.data.balance import Balance, total
from llm.data.conversations import ConversationFeed
from llm.data.documents import DocumentSource, gives_ids
from llm.data.packing import PACKINGS, BestFit, BestFitCrop, BestFitPad, Document, Stream, deal
from llm.data.tokens import encoded
from llm.errors import UserError

log = logging.getLogger(__name__)
NEWS_SECONDS = 30.0  # seconds between lines in the log while no data come
VAL_PACKING = "crop"  # scores are measured on equal rows whatever the packing of training


@dataclass(frozen=True)
class StepLayout:
    """Shape of a rank's steps, `micro_per_step` micro-batches of `rows_per_micro` rows of `seq_len` tokens, and waits.

    grows_at: numbers of steps, rising, from which on a step has one part more of its micro-batches. The parts are
    equal, one more than these numbers; the first step has one. Raises ValueError for sizes below 1, a rank outside
    `world`, and parts that are no whole micro-batches.
    """

    seq_len: int
    rows_per_micro: int
    micro_per_step: int = 1
    rank: int = 0
    world: int = 1
    prefetch: int = 2  # steps that are prepared ahead
    timeout_s: float = 900.0  # seconds without a step that mean there will be none
    pin_memory: bool = False
    grows_at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = (self.seq_len, self.rows_per_micro, self.micro_per_step, self.prefetch)
        parts_fit = self.micro_per_step % (1 + len(self.grows_at)) == 0
        if min(sizes) < 1 or not 0 <= self.rank < self.world or not parts_fit:
            raise ValueError(f"{self}: out of range")

    def undivided(self) -> "StepLayout":
        """The layout of a loader that reads what all ranks read together."""
        return replace(self, rank=0, world=1)

    def micro_batches_of(self, step: int) -> int:
        """Return the micro-batches of the step `step`, counted from 0."""
        return self.micro_per_step // (1 + len(self.grows_at)) * (1 + bisect_right(self.grows_at, step))


class TextFeed:
    """Tokenised documents of one rank, each beginning with BOS; `cursor` is the position behind the last one."""

    def __init__(
        self,
        source: DocumentSource,
        split: str,
        tokenizer,
        cursor: dict | None,
        rank: int,
        world: int,
        loop: bool,
    ) -> None:
        self.cursor, self.balance = cursor, Balance()
        documents = source.iterate(split, cursor, rank, world, loop)
        self._documents = documents if gives_ids(source) else encoded(documents, tokenizer)

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        ids, self.cursor = next(self._documents)
        self.balance.documents += 1
        self.balance.read += len(ids)
        return Document(ids)


class StepLoader:
    """Base of the loaders: rows to steps, the resume state, the background thread.

    Iterating again starts over at `state`. Raises UserError for a state of another loader, sequence length or rank.
    """

    kind = ""

    def __init__(self, layout: StepLayout, state: dict | None = None) -> None:
        self.layout = layout
        self.wait_seconds = 0.0  # time the consumer spent waiting for a step, since the loader was built
        self.state = state
        if state is not None:
            self._check_state(state)
        self._running: Callable[[], _Background | None] = lambda: None
        self._was_iterated = False

    def __len__(self) -> int:
        """Return a huge number: Lightning fetches ahead from a loader without a length. Stages stop at max_steps."""
        return 10**9

    def __iter__(self) -> "_Background":
        """Begin at `state`, in the background; the first time only when the first step is asked for.

        Lightning makes an iterator to see whether it can, and then the one that it uses.
        """
        self.close()
        running = _Background(self)
        self._running = weakref.ref(running)
        if self._was_iterated:
            running.begin()
        self._was_iterated = True
        return running

    def skip(self, steps: int) -> None:
        """Move the start behind the rows of the next `steps` steps, which are not counted as steps."""
        number = self._steps_before()
        for step in islice(self.steps(), steps):
            before, self.state = self.state, step["state"]()
            balance = Balance.from_dict(self.state["balance"])
            balance.leave_out(Balance.from_dict((before or {}).get("balance", {})))
            self.state["balance"] = balance.to_dict()
        if self.state is not None:
            self.state["step"] = number

    def _steps_before(self) -> int:
        """Return the number of steps before the start; 0 where a state of an older release does not say."""
        return (self.state or {}).get("step", 0)

    def close(self) -> None:
        """Stop the background thread, if one is running."""
        if running := self._running():
            running.close()

    def steps(self) -> Iterator[dict]:
        """Yield the steps, prepared in the calling thread."""
        packer, cursor = self._packer(), None
        if self.state is not None:
            cursor = self.state["cursor"]
            packer.load_state_dict({k: _to_numpy(v) for k, v in self.state["packer"].items()})
        feed = self._feed(cursor)
        balance = feed.balance = self._balance_so_far(packer)
        for number in count(self._steps_before()):
            rows = self.layout.rows_per_micro * self.layout.micro_batches_of(number)
            ids = np.full((rows, self.layout.seq_len + 1), self._pad_id(), np.int32)
            mask = np.zeros(ids.shape, np.float32)
            lost, repeated = packer.lost, packer.repeated
            used = [packer.fill(ids[i], mask[i], feed) for i in range(rows)]
            if not any(used):
                return
            step = self._step(ids, mask)
            balance.trained += step["n_trained"]
            balance.masked += sum(used) - step["n_trained"]
            balance.padded += ids.size - sum(used)
            balance.cut += 0 if isinstance(packer, BestFitPad) else packer.lost - lost
            balance.repeated += packer.repeated - repeated
            yield step | {"state": self._position(number + 1, feed.cursor, packer.snapshot(), balance.to_dict())}

    def _balance_so_far(self, packer) -> Balance:
        """Return the balance at `state`; without counters there, what waits to be packed counts as read."""
        if self.state is None:
            return Balance()
        if "balance" in self.state:
            return Balance.from_dict(self.state["balance"])
        return Balance(read=packer.waiting_tokens, partial=1)

    def _position(
        self, step: int, cursor: dict | None, snapshot: Callable[[], dict], balance: dict
    ) -> Callable[[], dict]:
        """Return a function that builds the resume state, behind `step` steps.

        It is built lazily, because copying the buffer costs megabytes and only checkpoints need it.
        """
        identity = self._identity()

        def position() -> dict:
            packer = snapshot()
            counted = balance | {"waiting": int(packer["lengths"].sum())}
            return identity | {"step": step, "cursor": cursor, "packer": _tensors(packer), "balance": counted}

        return position

    def _identity(self) -> dict:
        """The entries of a position that must agree with the loader which continues it."""
        return {
            "kind": self.kind,
            "seq_len": self.layout.seq_len,
            "rank": self.layout.rank,
            "world": self.layout.world,
        }

    def _step(self, ids: np.ndarray, mask: np.ndarray) -> dict:
        """Split packed rows (rows, T + 1) into micro-batches of inputs and shifted targets.

        Where a factor on a loss is not 1, all factors of the step are there too, as `weights`.
        """
        trained = mask[:, 1:] > 0
        parts = {
            "inputs": torch.from_numpy(ids[:, :-1].astype(np.int64)),
            "targets": torch.from_numpy(np.where(trained, ids[:, 1:], -1).astype(np.int64)),
        }
        if (mask[:, 1:] != trained).any():
            parts["weights"] = torch.from_numpy(mask[:, 1:].copy())
        if self.layout.pin_memory:
            parts = {name: part.pin_memory() for name, part in parts.items()}
        split = {name: part.split(self.layout.rows_per_micro) for name, part in parts.items()}
        return {
            "micro": [dict(zip(split, micro, strict=True)) for micro in zip(*split.values(), strict=True)],
            "n_trained": int(trained.sum()),
            "n_tokens": ids.shape[0] * (ids.shape[1] - 1),
        }

    def _check_state(self, state: dict) -> None:
        """Raise UserError unless a resume state fits this loader."""
        for key, value in self._identity().items():
            if state.get(key) != value:
                raise UserError(
                    f"the checkpoint's data position has {key}={state.get(key)}, this run {key}={value}. Continue with "
                    "the configuration that the run started with, or start another with run=<new name>."
                )

    def _packer(self) -> BestFit | BestFitCrop | BestFitPad | Stream:
        """Return a new packer for rows of seq_len + 1 tokens."""
        raise NotImplementedError

    def _feed(self, cursor: dict | None) -> Iterator[Document]:
        """Return an iterator over documents from `cursor` on; its `.cursor` follows what was handed out."""
        raise NotImplementedError

    def _pad_id(self) -> int:
        """Return the token id that fills unused positions."""
        raise NotImplementedError


class TextSteps(StepLoader):
    """Pretraining steps: rows packed by one of `PACKINGS`, all tokens trained. The train split loops, others end."""

    kind = "text"

    def __init__(
        self,
        source: DocumentSource,
        tokenizer,
        layout: StepLayout,
        state: dict | None = None,
        *,
        split: str = "train",
        packing: str = VAL_PACKING,
        buffer: int = 1000,
    ) -> None:
        super().__init__(layout, state)
        self.source, self.tokenizer, self.split = source, tokenizer, split
        self.packing, self.buffer = packing, buffer

    def _packer(self) -> BestFit | BestFitCrop | Stream:
        return PACKINGS[self.packing](self.layout.seq_len + 1, self.buffer)

    def _feed(self, cursor: dict | None) -> TextFeed:
        loop = self.split == "train"
        return TextFeed(self.source, self.split, self.tokenizer, cursor, self.layout.rank, self.layout.world, loop)

    def _pad_id(self) -> int:
        return self.tokenizer.bos_id


class ConversationSteps(StepLoader):
    """Midtraining and finetuning steps: whole conversations, best-fit packed with padding.

    train_on="assistant" trains the assistant's words (the mask of llm.tokenizer.chat_format), "all" every token.
    loop=False: one pass.
    """

    kind = "conversations"

    def __init__(
        self,
        mixture: Sequence,
        tokenizer,
        layout: StepLayout,
        state: dict | None = None,
        *,
        train_on: str = "assistant",
        seed: int = 42,
        buffer: int = 100,
        loop: bool = True,
    ) -> None:
        super().__init__(layout, state)
        self.mixture, self.tokenizer, self.buffer = mixture, tokenizer, buffer
        self.train_on, self.seed, self.loop = train_on, seed, loop

    def _packer(self) -> BestFitPad:
        return BestFitPad(self.layout.seq_len + 1, self.buffer)

    def _feed(self, cursor: dict | None) -> ConversationFeed:
        return ConversationFeed(
            self.mixture,
            self.tokenizer,
            self.layout.seq_len + 1,
            train_on=self.train_on,
            seed=self.seed,
            cursor=cursor,
            rank=self.layout.rank,
            world=self.layout.world,
            loop=self.loop,
        )

    def _pad_id(self) -> int:
        return self.tokenizer.bos_id


def validation_batches(loader: StepLoader, eval_tokens: int, rank: int = 0, world: int = 1) -> list[dict]:
    """Return the fixed micro-batches {"inputs", "targets"} of a finite loader that cover about `eval_tokens` positions.

    Build the loader with split="val" or loop=False and `layout.undivided()`: all ranks pack the same rows and each
    keeps every world-th micro-batch, so that a score summed over ranks does not depend on their number. Raises
    UserError if no token is trained.
    """
    batches, tokens = [], 0
    for step in loader.steps():
        for micro in step["micro"]:
            if tokens < eval_tokens and bool((micro["targets"] >= 0).any()):
                batches.append(micro)
                tokens += micro["inputs"].numel()
        if tokens >= eval_tokens:
            break
    if not batches:
        raise UserError("the validation split is empty: it holds no trained token. Add validation data.")
    return batches[rank::world]


def positions_for(positions: list[dict | None], world: int) -> list[dict | None]:
    """Return the positions (by rank) from which another number of ranks continues; nothing is lost or repeated.

    Documents and conversations are numbered over all ranks: number i went to rank i % len(positions). Reading goes on
    at the rank that is furthest behind; `consumed` names what the others have read already, and it is left out. The
    documents that wait in the packing buffers are dealt out anew.
    """
    if len(positions) == world:
        return positions
    if any(position is None or "packer" not in position for position in positions):
        return _balanced(positions, _without_documents(positions, world))
    cursors, packers = ([position[key] for position in positions] for key in ("cursor", "packer"))
    behind = min(cursors, key=lambda cursor: cursor["index"])
    cursor = behind | {"consumed": [*behind.get("consumed", []), [cursor["index"] for cursor in cursors]]}
    dealt = deal([{name: _to_numpy(value) for name, value in packer.items()} for packer in packers], world)
    moved = [
        positions[0] | {"rank": rank, "world": world, "cursor": cursor, "packer": _tensors(dealt[rank])}
        for rank in range(world)
    ]
    return _balanced(positions, moved)


def _without_documents(positions: list[dict | None], world: int) -> list[dict | None]:
    """Return positions that are equal on all ranks for `world` of them; what is left of a rollout is dealt out anew."""
    first = positions[0]
    if not first or "rollout" not in first:
        return [first] * world
    held = [position["rollout"] for position in positions]
    micro = [one for rollout in held for one in rollout["micro"]]
    idle = {name: torch.full_like(t, -1) if name == "targets" else torch.zeros_like(t) for name, t in micro[0].items()}
    means = {name: sum(one["metrics"][name] for one in held) / len(held) for name in held[0]["metrics"]}
    dealt = []
    for rank in range(world):
        totals = {name: sum(one[name] for one in held) for name in ("n_trained", "n_tokens")}
        own = {name: n // world + (rank < n % world) for name, n in totals.items()}
        dealt.append(first | {"rollout": own | {"micro": micro[rank::world] or [idle], "metrics": means}})
    return dealt


def _balanced(before: list[dict | None], after: list[dict | None]) -> list[dict | None]:
    """Return the positions `after` a change of the number of ranks; the first one gets the balances of all `before`."""
    saved = [position["balance"] for position in before if position and "balance" in position]
    if not saved:
        return after
    sums = [total(saved).to_dict()] + [{}] * (len(after) - 1)
    return [position | {"balance": balance} for position, balance in zip(after, sums, strict=True)]


class _Background:
    """Iterator over loader.steps() that a daemon thread keeps `prefetch` steps ahead; errors surface in __next__."""

    def __init__(self, loader: StepLoader) -> None:
        self._loader, self._ended = loader, False
        self._ready: queue.SimpleQueue = queue.SimpleQueue()
        self._free = threading.Semaphore(loader.layout.prefetch)
        stop = threading.Event()
        self._thread = threading.Thread(
            target=_prepare, args=(loader.steps, self._ready, self._free, stop), name="fathom-data", daemon=True
        )
        # `_stop` runs on close, garbage collection or exit.
        self._finalizer = weakref.finalize(self, _stop, self._thread, self._free, stop)

    def begin(self) -> None:
        """Start the thread, if it has not been started."""
        if self._thread.ident is None:
            self._thread.start()

    def __iter__(self) -> "_Background":
        return self

    def __next__(self) -> dict:
        if self._ended:
            raise StopIteration
        self.begin()
        start = time.perf_counter()
        step, error = self._patiently()
        self._loader.wait_seconds += time.perf_counter() - start
        self._free.release()
        if step is None:
            self._ended = True
            self.close()
            raise StopIteration if error is None else error
        return step

    def _patiently(self) -> tuple[dict | None, BaseException | None]:
        """Wait for the next (step, error), with a line in the log now and then. Raises UserError after timeout_s."""
        waited = 0.0
        layout = self._loader.layout
        while waited < layout.timeout_s:
            wait = min(NEWS_SECONDS, layout.timeout_s - waited)
            try:
                return self._ready.get(timeout=wait)
            except queue.Empty:
                waited += wait
                log.warning("process %d waits for training data since %.0f s", layout.rank, waited)
        raise UserError(
            f"no training data for {waited:.0f} s (watch.data_seconds): check the disk or network that data.path is "
            "read from; the same command resumes at the last checkpoint"
        )

    def close(self) -> None:
        """Stop the thread and wait until it has ended. Further steps raise StopIteration."""
        self._ended = True
        self._finalizer()


def _prepare(steps: Callable, ready: queue.SimpleQueue, free: threading.Semaphore, stop: threading.Event) -> None:
    """Run in the thread: put (step, None) for each step, then (None, error or None) at the end."""
    try:
        source = steps()
        while True:
            free.acquire()
            if stop.is_set():
                return
            step = next(source, None)
            ready.put((step, None))
            if step is None:
                return
    except BaseException as error:  # also KeyboardInterrupt: the consumer decides
        ready.put((None, error))


def _stop(thread: threading.Thread, free: threading.Semaphore, stop: threading.Event) -> None:
    """Tell the thread to stop and wait for it, at most 10 seconds."""
    stop.set()
    free.release()
    if thread.ident is not None and thread is not threading.current_thread():
        thread.join(timeout=10)


def _tensors(state: dict) -> dict:
    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in state.items()}


def _to_numpy(value):
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else value
