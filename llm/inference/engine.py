"""Batched generation: one prefill, then one token per row and step, with calculator calls inside the text.

Prompts of different lengths share a batch, and finished rows leave it. `Engine.stream` yields every step as it happens
(chat), `Engine.generate` collects completions (evaluation, reinforcement learning). A step costs one forward pass, one
vectorised draw and one copy of B ids to the host.

On a CPU, half precision keeps 0.7 MB of generated code for every shape of a product that it has met. There lengths and
batches are rounded up to a few sizes, so that a server's memory stays flat.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from llm.errors import UserError
from llm.inference.calculator import calculate
from llm.inference.sampling import BROKEN, SamplingParams, sample, uniform_draws

LENGTHS = (32, 8)  # sizes of prompts, for `round_up`: 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, ...
ROWS = (1, 4)  # sizes of batches that rows have left: 1, 2, 3, 4, 6, 8, 12, 16, 24, ...
COMPACT_BELOW = 0.75  # finished rows stay until the live share is this small, because leaving copies the cache


class TokenEvent(NamedTuple):
    """One token that a row gained; `forced` = written by the calculator, not sampled."""

    row: int
    id: int
    forced: bool


@dataclass
class Completion:
    """Completion of a prompt. mask: 1 = sampled, 0 = forced by the calculator.

    finish_reason: "stop" (the model ended its turn, or wrote a text of `SamplingParams.stop`, which is kept) or
    "length" (max_new_tokens or the context is used up). stop_id: the sampled token that ended the turn, which is not
    among the ids; None where none did.
    """

    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    stop_id: int | None = None


class Engine:
    """Generator of text from a model and its tokenizer.

    Each call reads the weights anew, so training may go on in between.
    """

    def __init__(self, net, tokenizer):
        self.net, self.tokenizer = net, tokenizer

    def stream(self, prompts: Sequence[Sequence[int]], params: SamplingParams, num_samples: int = 1) -> "TokenStream":
        """Return an iterator over decode steps, each a list of TokenEvent; closing it frees the cache.

        Row `i * num_samples + j` is sample j of prompt i. Raises ValueError for an empty prompt.
        """
        return TokenStream(self.net, self.tokenizer, prompts, params, num_samples)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, num_samples: int = 1
    ) -> list[list[Completion]]:
        """Return the completions as [prompt][sample], all decoded in one batch.

        A prompt that leaves no room in the context gets an empty completion with finish_reason "length". Raises
        ValueError for an empty prompt.
        """
        done = [Completion() for _ in range(len(prompts) * num_samples)]
        with self.stream(prompts, params, num_samples) as stream:
            for events in stream:
                for row, token, forced in events:
                    completion = done[row]
                    completion.ids.append(token)
                    completion.mask.append(0 if forced else 1)
            for completion, reason, stop_id in zip(done, stream.finish_reasons, stream.ended_by, strict=True):
                completion.finish_reason, completion.stop_id = reason, stop_id
        return [done[i * num_samples : (i + 1) * num_samples] for i in range(len(prompts))]


class TokenStream:
    """Decoding of one batch, step by step; `finish_reasons[row]` is None until the row has ended.

    `ended_by[row]` is the token that ended the row's turn, None where none has.

    It is a class and not a generator function, because a `with torch.inference_mode()` around a yield would leak into
    the consumer's code.
    """

    def __init__(self, net, tokenizer, prompts: Sequence[Sequence[int]], params: SamplingParams, num_samples: int = 1):
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1")
        if empty := [i for i, prompt in enumerate(prompts) if not len(prompt)]:
            raise ValueError(f"prompt {empty[0]} is empty: a prompt needs at least its <|bos|> token")
        self.params, self.seq_len = params, net.config.seq_len
        self.finish_reasons: list[str | None] = [None] * (len(prompts) * num_samples)
        self.ended_by: list[int | None] = [None] * len(self.finish_reasons)
        self._training, self._net = net.training, net
        self._compute_net = None
        self._keeps_shapes = keeps_shapes(net.device, net.compute_dtype)
        self._tools = _Calculator(tokenizer) if params.use_tools and tokenizer.has_tools else None
        self._stops = tokenizer.stop_ids
        self._stop_texts = _StopTexts(tokenizer, params.stop) if params.stop else None
        self._prompts: list[Sequence[int]] = []  # those with room for at least one token
        self._slots: list[_Row | None] = []  # by place in the batch; None = finished, waiting to leave
        for i, prompt in enumerate(prompts):
            room = min(params.max_new_tokens, self.seq_len - len(prompt))
            rows = range(i * num_samples, (i + 1) * num_samples)
            if room > 0:
                self._prompts.append(prompt)
                self._slots += [_Row(row, len(prompt), room) for row in rows]
            else:
                self.finish_reasons[rows.start : rows.stop] = ["length"] * num_samples
        self._num_samples = num_samples
        self._step = 0
        self._cache = None

    def __iter__(self) -> Iterator[list[TokenEvent]]:
        return self

    def __enter__(self) -> "TokenStream":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """End now and free the cache; may be called at any time, and more than once."""
        self._slots = []
        self._cache = self._compute_net = self._draws = None
        if self._net is not None:
            self._net.train(self._training)
            self._net = None

    @torch.inference_mode()
    def __next__(self) -> list[TokenEvent]:
        while any(self._slots):
            logits = self._prefill() if self._cache is None else self._decode()
            draws = None if self._draws is None else self._draws[self._step]
            sampled = sample(logits, self.params, draws)
            events = self._accept(sampled)
            self._step += 1
            self._compact()
            if events:
                return events
        self.close()
        raise StopIteration

    def _prefill(self) -> torch.Tensor:
        """Return the logits (rows, V) behind all prompts, each computed once and repeated for its samples."""
        net = self._net.eval()
        self._compute_net = in_compute_dtype(net)
        device, slots = net.device, self._slots
        lengths = [len(prompt) for prompt in self._prompts]
        longest = max(lengths)
        if self._keeps_shapes:
            longest = min(round_up(longest, *LENGTHS), self.seq_len)
        ids = torch.zeros(len(lengths), longest, dtype=torch.long)
        for i, prompt in enumerate(self._prompts):
            ids[i, : len(prompt)] = torch.as_tensor(prompt)
        max_len = max(longest, *(row.length + row.room for row in slots))
        self._cache = net.new_cache(len(lengths), max_len)
        true_lengths = torch.tensor(lengths, device=device)
        logits = self._compute_net(ids.to(device), cache=self._cache, lengths=true_lengths, last_only=True)[:, 0]
        if self._num_samples > 1:
            self._cache.repeat(self._num_samples)
            logits = logits.repeat_interleave(self._num_samples, dim=0)
        self._draws = self._make_draws(device)
        return logits

    def _make_draws(self, device: torch.device) -> torch.Tensor | None:
        """Return the random numbers (steps, rows) of the whole call, on the device; None if decoding is greedy."""
        if self.params.is_greedy:
            return None
        n_steps = max(row.room for row in self._slots)
        draws = uniform_draws(self.params.seed, n_steps, len(self.finish_reasons))
        rows = [row.index for row in self._slots]
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        return torch.from_numpy(draws[:, rows]).to(device, dtype)

    def _decode(self) -> torch.Tensor:
        """Feed every row its newest token and return the logits (rows, V) behind it."""
        self._cache.used = max(row.length - 1 for row in self._slots if row)
        return self._compute_net(self._next_ids, cache=self._cache, last_only=True)[:, 0]

    def _accept(self, sampled: torch.Tensor) -> list[TokenEvent]:
        """Give each live row its forced or sampled token, and end the rows that are done.

        Raises UserError where the network no longer gives numbers.
        """
        events, ids, replaced = [], sampled.tolist(), False
        for slot, row in enumerate(self._slots):
            if row is None:
                continue
            token, forced = ids[slot], False
            if token == BROKEN:
                raise UserError("the network gives NaN for the next token: its weights or their precision are broken")
            if row.forced:
                token, forced = row.forced.popleft(), True
                ids[slot], replaced = token, True
            elif token in self._stops:
                self.ended_by[row.index] = token
                self._finish(slot, "stop")
                continue
            elif self._tools:
                self._tools.observe(row, token)
            events.append(TokenEvent(row.index, token, forced))
            row.length += 1
            row.room -= 1
            if self._stop_texts and self._stop_texts.ended(row, token):
                self._finish(slot, "stop")
            elif row.room == 0:
                self._finish(slot, "length")
        self._next_ids = (torch.tensor(ids, device=sampled.device) if replaced else sampled).unsqueeze(1)
        return events

    def _finish(self, slot: int, reason: str) -> None:
        """End the row in `slot` with a finish_reason; the slot stays in the batch until `_compact`."""
        self.finish_reasons[self._slots[slot].index] = reason
        self._slots[slot] = None
        self._cache.lengths[slot] = 0  # until it leaves, the slot writes at the start of its own cache row

    def _compact(self) -> None:
        """Let finished rows leave the batch once they are a quarter of it; some stay to fill one of a few sizes."""
        keep = [slot for slot, row in enumerate(self._slots) if row]
        if not keep or len(keep) > COMPACT_BELOW * len(self._slots):
            return
        if self._keeps_shapes:
            finished = [slot for slot, row in enumerate(self._slots) if not row]
            keep = sorted(keep + finished[: round_up(len(keep), *ROWS) - len(keep)])
            if len(keep) == len(self._slots):
                return
        self._slots = [self._slots[slot] for slot in keep]
        rows = torch.tensor(keep, device=self._next_ids.device)
        self._cache.keep(rows)
        self._next_ids = self._next_ids[rows]
        if self._draws is not None:
            self._draws = self._draws[:, rows]


class _Row:
    """Sequence in the making: its place among the results, tokens so far, tokens it may still gain, tool state."""

    __slots__ = ("index", "length", "room", "forced", "expression", "tail")

    def __init__(self, index: int, length: int, room: int):
        self.index, self.length, self.room = index, length, room
        self.forced: deque[int] = deque()
        self.expression: list[int] | None = None  # tokens since <|python_start|>
        self.tail = b""  # end of its text, where a stop text may have begun


class _StopTexts:
    """Detector of the texts that end a completion. It looks at bytes, because a text may begin within a token."""

    def __init__(self, tokenizer, texts: Sequence[str]):
        self.tokenizer, self.texts = tokenizer, [text.encode() for text in texts if text]
        self.keep = max(map(len, self.texts), default=1) - 1

    def ended(self, row: _Row, token: int) -> bool:
        """Add a token to a row's text and return True if a stop text is complete."""
        text = row.tail + self.tokenizer.decode_bytes([token])
        row.tail = text[max(0, len(text) - self.keep) :]
        return any(stop in text for stop in self.texts)


class _Calculator:
    """Calculator calls: when a row closes its python markers, queue the result to be written into that row.

    An expression that cannot be calculated queues nothing, and the model goes on by itself.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        names = ("python_start", "python_end", "output_start", "output_end")
        self.start, self.end, self.output_start, self.output_end = (
            tokenizer.special_id(f"<|{name}|>") for name in names
        )

    def observe(self, row: _Row, token: int) -> None:
        """Follow one sampled token of a row."""
        if token == self.start:
            row.expression = []
        elif row.expression is None:
            return
        elif token != self.end:
            row.expression.append(token)
        else:
            result = calculate(self.tokenizer.decode(row.expression))
            row.expression = None
            if result is not None:
                row.forced.extend((self.output_start, *self.tokenizer.encode(result), self.output_end))


def keeps_shapes(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True where every new shape of a product leaves generated code in memory: half precision on a CPU."""
    return device.type == "cpu" and dtype != torch.float32


def round_up(n: int, least: int, parts: int) -> int:
    """Round n up to one of few sizes: a multiple of `least` or of 1/parts of the next power of two, the larger one."""
    step = max(least, (1 << (n - 1).bit_length()) // parts)
    return -(-n // step) * step


def in_compute_dtype(net):
    """Return the net, or a copy with weights in its compute dtype, so that no pass casts all weights again.

    The results are equal, because the net casts each weight before it multiplies.
    """
    if next(net.parameters()).dtype == net.compute_dtype:
        return net
    with torch.device("meta"):
        copy = type(net)(net.config)
    copy.load_state_dict({name: weight.to(net.compute_dtype) for name, weight in net.state_dict().items()}, assign=True)
    copy.compute_dtype = net.compute_dtype
    return copy.to(net.device).eval()
