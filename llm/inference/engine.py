"""The engine: requests for text share one batch, whatever their prompts, lengths, settings and ends are.

`submit` hands in a request; a `step` reads prompts of new rows or gives every row of the batch one token, in turns.
`generate` and `stream` stand on top of them: completions of many prompts (evaluation, reinforcement learning), and
every step as it happens (chat). A step costs one forward pass, one vectorised draw and one copy of B ids to the host.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch

from llm.errors import UserError
from llm.inference.logits import adjusted, log_probs
from llm.inference.request import Completion, Request, TokenEvent
from llm.inference.sampling import BROKEN, Sampler, SamplingParams, draw_keys, uniform_draws
from llm.inference.slot_batch import SlotBatch, default_budget
from llm.inference.static_batch import StaticBatch
from llm.inference.text import StopTexts
from llm.inference.tools import Runner, Tools
from llm.inference.weights import LENGTHS, in_compute_dtype, keeps_shapes, round_up
from llm.model import decode_cpu
from llm.model.adapters import check_fits, with_adapters
from llm.model.lora import Adapter, merged

MAX_ROWS = 256
TOOL_WAIT = 0.05  # seconds that a step without other work waits for the result of a tool
SCORED_AT_A_TIME = 256  # tokens of a prompt whose logits are held at a time


IDLE = {"rows": 0, "cached_tokens": 0, "cache_size": 0, "prefix_hits": 0, "preemptions": 0}


class Engine:
    """Generator of text from a model and its tokenizer, used by one thread at a time.

    max_rows: sequences decoded together; others wait. budget: tokens of context that the cache may hold, by default
    what half of the free memory has room for; where it is short, rows wait and are read again. sharers: engines that
    divide that half among them, as those of several processes on one device do. frozen: the weights never change, so
    that they and what was read are kept while there is nothing to do, and texts that prompts begin with are found
    again; otherwise the weights are read anew after every pause. run_code: function from Python that a model has
    written between its python markers to its output; the calculator alone answers without it. Rows that wait for it
    leave the batch meanwhile. compiles: on a GPU, torch compiles the decode step of each size, which takes a minute.
    adapters: low-rank adapters of the network by name; every request chooses one of them, or none. Raises UserError for
    one that does not fit.
    """

    def __init__(
        self,
        net: Any,
        tokenizer: Any,
        *,
        max_rows: int = MAX_ROWS,
        budget: int | None = None,
        frozen: bool = False,
        sharers: int = 1,
        run_code: Runner | None = None,
        compiles: bool = False,
        adapters: Mapping[str, Adapter] | None = None,
    ):
        self.adapters = dict(adapters or {})
        for name, adapter in self.adapters.items():
            check_fits(net, name, adapter)
        self.net, self.tokenizer, self.max_rows, self.budget, self.frozen = net, tokenizer, max_rows, budget, frozen
        self.sharers, self.compiles = sharers, compiles
        self._waiting: deque[Request] = deque()
        self._unscored: deque[Request] = deque()  # waiting for `prompt_logprobs`
        self._untold: list[TokenEvent] = []  # what has happened and no step has returned yet
        self._streams: dict[Request, Stream] = {}
        self._batch: SlotBatch | StaticBatch | None = None
        self._tools = Tools(tokenizer, run_code) if tokenizer.has_tools else None
        self._away: dict[Future, Request] = {}  # requests that wait for a tool
        self._threads: ThreadPoolExecutor | None = None
        self._sampler: tuple[list[Request], Sampler, np.ndarray] | None = None
        self._reads_next = True  # prompts, where some wait; else the rows are decoded
        self._was_training = False

    # -----------------------------------------------------------------------------------------------------------------
    # Requests

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        sample: int = 0,
        constraint: Any = None,
        adapter: str | None = None,
    ) -> Request:
        """Hand in a prompt (token ids) to be continued, and return its request, which grows by every `step`.

        sample: number that with `params.seed` decides what is drawn. constraint: object with `allowed()`, a bool tensor
        (V,) of tokens that may come next, `accept(id)` and `is_done`. A prompt that leaves no room in the context ends
        at the next step, with finish_reason "length". adapter: name of the one that answers, None for the base. Raises
        ValueError for an empty prompt, UserError for a `logit_bias` of tokens that the model does not have and for an
        adapter that the engine does not have.
        """
        if not len(prompt):
            raise ValueError("the prompt is empty: it needs at least its <|bos|> token")
        vocab = self.net.config.vocab_size
        if wrong := [one for one, _ in params.logit_bias if one >= vocab]:
            raise UserError(f"logit_bias: token {wrong[0]} is not among the model's {vocab:,}")
        self.check_adapter(adapter)
        request = Request(prompt, params, sample, constraint, adapter)
        request.room = min(params.max_new_tokens, self.net.config.seq_len - len(prompt))
        request.stops = StopTexts(self.tokenizer, params.stop) if params.stop else None
        if params.prompt_logprobs is not None and len(prompt) <= self.net.config.seq_len:
            self._unscored.append(request)
        elif request.room > 0:
            self._waiting.append(request)
        else:
            self._end(request, "length")
        return request

    def check_adapter(self, adapter: str | None) -> None:
        """Raise UserError for the name of an adapter that the engine does not have; None is the base."""
        if adapter is not None and adapter not in self.adapters:
            there = ", ".join(self.adapters) or "none at all"
            raise UserError(f"adapter={adapter}: the engine has no adapter of this name; there is {there}")

    @torch.inference_mode()
    def abort(self, request: Request) -> None:
        """End a request at any time, also one that has ended already; its row is free before the next step."""
        if request.is_done:
            return
        self._away = {future: other for future, other in self._away.items() if other is not request}
        for queue in (self._waiting, self._unscored):
            if request in queue:
                queue.remove(request)
        if self._batch is not None and request in self._batch.rows:
            self._batch.leave(request)
        request.finish("abort")
        self._rest()

    @property
    def has_work(self) -> bool:
        """True while a step would do something."""
        return bool(self._untold) or self._is_busy

    @property
    def _is_busy(self) -> bool:
        return bool(self._waiting or self._unscored or self._away or (self._batch and self._batch.rows))

    def stats(self) -> dict[str, int]:
        """Return numbers about this moment: requests in the batch and waiting, tokens in the cache and its size.

        prefix_hits, preemptions: how many prompts began with a text that was read before, and how many rows had to be
        read again, since the weights were read.
        """
        waiting = {"waiting": len(self._waiting) + len(self._unscored)}
        return (IDLE if self._batch is None else self._batch.stats()) | waiting

    def watch(self, stream: "Stream") -> None:
        """Hand the events of a stream's requests to it, whoever calls `step`."""
        self._streams |= dict.fromkeys(stream.requests, stream)

    def unwatch(self, stream: "Stream") -> None:
        """Hand a stream no more events."""
        for request in stream.requests:
            self._streams.pop(request, None)

    # -----------------------------------------------------------------------------------------------------------------
    # Steps

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Read prompts of waiting requests, or give every row one token; return what happened, [] if that is nothing.

        The two take turns while there is something to read, so that the first token of a request is told before the
        others are computed. If it raises, rows that were being decoded wait to be read again.
        """
        if self._is_busy:
            self._wake()
            try:
                self._take_back()
                read = self._read() if self._reads_next else None
                self._reads_next = read is None
                self._extend(*(self._batch.decode(self._waiting) if read is None else read))
            except BaseException:
                self._waiting.extendleft(reversed([r for r in self._batch.rows if not r.is_done]))
                self._let_go()
                raise
        self._rest()
        events, self._untold = self._untold, []
        for event in events:
            if event.request in self._streams:
                self._streams[event.request].pending.append(event)
        return events

    def _read(self) -> tuple[list[Request], torch.Tensor | None] | None:
        """Read a part of what waits; return requests whose prompts are read and their logits, None without any."""
        if self._unscored:
            self._score_prompt()
        return self._batch.read_prompts(self._waiting)

    def _wake(self) -> None:
        """Read the weights, if they are not at hand."""
        if self._batch is None:
            self._was_training = self.net.training
            net = merged(self.net.eval())
            has_kernel = decode_cpu.computes(net)
            if not has_kernel:  # our kernel packs the weights as they are
                net = in_compute_dtype(net)
            if self.adapters:  # of which it reads the fp32 numbers
                net = with_adapters(net, self.adapters, torch.float32 if has_kernel else net.compute_dtype)
            if getattr(net, "has_slots", False):
                budget = self.budget or default_budget(net, self.max_rows, self.sharers)
                self._batch = SlotBatch(net, self.max_rows, budget, self.frozen, self.compiles)
            else:
                self._batch = StaticBatch(net, self.max_rows)

    def _rest(self) -> None:
        """Let go of weights and cache where nothing is left to do, unless they are frozen."""
        if not (self._is_busy or self.frozen or self._batch is None):
            self._let_go()

    def _let_go(self) -> None:
        self._batch = self._sampler = None
        self.net.train(self._was_training)

    def _extend(self, requests: list[Request], logits: torch.Tensor | None) -> None:
        """Give each request the token that is forced, or drawn from its logits (B, V); end those that are done."""
        if not requests:
            return
        ids = self._drawn(requests, adjusted(logits, requests, self.tokenizer.stop_ids)).tolist()
        for row, request in enumerate(requests):
            if request.forced:
                ids[row] = request.forced[0]
        asking = [row for row, r in enumerate(requests) if r.params.logprobs is not None and ids[row] != BROKEN]
        found: dict[int, Any] = {}
        if asking:
            likely = [requests[row].params.logprobs for row in asking]
            found = dict(zip(asking, log_probs(logits[asking], [ids[row] for row in asking], likely), strict=True))
        for row, request in enumerate(requests):
            call = self._accept(request, ids[row], *found.get(row, (None, None)))
            if call is not None:
                self._send_away(request, call)
        for request in reversed(requests):  # the last rows first, so that few have to be moved
            if request.is_done:
                self._batch.leave(request)

    def _drawn(self, requests: list[Request], logits: torch.Tensor) -> torch.Tensor:
        """Return a token id (B,) per request, by its own settings and random numbers."""
        if self._sampler is None or self._sampler[0] != requests:
            keys = draw_keys([r.params.seed for r in requests], [r.sample for r in requests])
            self._sampler = list(requests), Sampler([r.params for r in requests], logits.device), keys
        _, sampler, keys = self._sampler
        draws = None
        if not sampler.is_greedy:
            draws = uniform_draws(keys, [len(request.ids) for request in requests])
            draws = torch.from_numpy(draws).to(logits.device, sampler.dtype)
        return sampler.draw(logits, draws)

    def _accept(self, request: Request, token: int, logprob: float | None, top: list | None) -> str | None:
        """Give a request one token, and end it where it is done; return the tool call to be run that it has closed."""
        if request.forced:
            self._write(request, request.forced.popleft(), True, logprob, top)
        elif token == BROKEN:
            self._fail(request)
        elif token in self.tokenizer.stop_ids and not request.params.ignore_eos:
            request.stop_id, request.stop_logprob = token, logprob
            self._end(request, "stop")
        else:
            try:
                is_last = self._is_last(request, token)
            except Exception as error:  # of whoever wrote the constraint; other requests go on
                request.error = f"the constraint fails: {error}"
                return self._end(request, "error")
            self._write(request, token, False, logprob, top, is_last)
            if self._tools and request.params.use_tools and not request.is_done:
                return self._tools.observe(request, token)
        return None

    def _write(
        self,
        request: Request,
        token: int,
        forced: bool,
        logprob: float | None = None,
        top: list | None = None,
        is_last: bool = False,
    ) -> None:
        """Append a token to a request's text; end the request if it has to."""
        request.ids.append(token)
        request.mask.append(0 if forced else 1)
        request.room -= 1
        if request.params.logprobs is not None:
            request.logprobs.append(logprob)
            request.top.append(top)
        stop = request.stops.push(token) if request.stops else None
        if stop and len(request.ids) >= request.params.min_new_tokens:
            request.stop_text = stop
        if request.stop_text or is_last:
            request.finish("stop")
        elif request.room == 0:
            request.finish("length")
        self._untold.append(TokenEvent(request, token, forced, logprob, top, request.finish_reason))

    @staticmethod
    def _is_last(request: Request, token: int) -> bool:
        """Let the constraint of a request see a sampled token; True if it is fulfilled."""
        if request.constraint is None:
            return False
        request.constraint.accept(token)
        return request.constraint.is_done

    def _send_away(self, request: Request, call: str) -> None:
        """Run a tool call in a thread; its row leaves the batch until the result is there."""
        self._batch.leave(request, comes_back=True)
        self._threads = self._threads or ThreadPoolExecutor(thread_name_prefix="tools")
        self._away[self._threads.submit(self._tools.run, call)] = request

    def _take_back(self) -> None:
        """Write the results of tool calls that have come, and let their requests go on.

        A tool that fails gives no result, and the model goes on by itself. Waits a moment if there is no other work.
        """
        if not self._away:
            return
        is_idle = not (self._waiting or self._unscored or self._batch.rows)
        done, _ = wait(self._away, TOOL_WAIT if is_idle else 0, FIRST_COMPLETED)
        for future in done:
            request = self._away.pop(future)
            for token in [] if future.exception() else self._tools.written(future.result()):
                if not request.is_done:
                    self._write(request, token, True)
            if not request.is_done:
                self._waiting.appendleft(request)

    def _fail(self, request: Request) -> None:
        """End a request that no token can be drawn for."""
        if request.error is None and (request.constraint is not None or request.params.logit_bias):
            request.error = "no token is allowed by the constraint and logit_bias, or the network gives NaN"
        elif request.error is None:
            request.error = "the network gives NaN for the next token: its weights or their precision are broken"
        self._end(request, "error")

    def _end(self, request: Request, reason: str) -> None:
        """End a request without a further token; the step tells."""
        request.finish(reason)
        self._untold.append(TokenEvent(request, None, finish_reason=reason))

    def _score_prompt(self) -> None:
        """Compute the log-probabilities of the next prompt that wants them, and let its request go on."""
        request = self._unscored[0]
        net = self._batch.net
        if self.adapters:
            net.adapters.choose(net.adapters.numbers([request.adapter]))
        request.prompt_logprobs = self._plain_log_probs(request.prompt, request.params.prompt_logprobs)
        self._unscored.popleft()
        if request.room > 0:
            self._waiting.append(request)
        else:
            self._end(request, "length")

    def _plain_log_probs(self, ids: Sequence[int], n_likely: int) -> list:
        """Return [None, (log-probability, most likely tokens) of ids[1], ...] by one pass without a cache."""
        net, n = self._batch.net, len(ids)
        length = min(round_up(n, *LENGTHS), net.config.seq_len) if keeps_shapes(net.device, net.compute_dtype) else n
        padded = torch.tensor([[*ids, *[0] * (length - n)]], device=net.device)
        hidden, found = net.hidden(padded)[0, : n - 1], [None]
        for start in range(0, n - 1, SCORED_AT_A_TIME):
            part = hidden[start : start + SCORED_AT_A_TIME]
            after = ids[start + 1 : start + 1 + len(part)]
            found += log_probs(net.logits(part), after, [n_likely] * len(part))
        return found

    # -----------------------------------------------------------------------------------------------------------------
    # Whole completions

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        num_samples: int = 1,
        adapter: str | None = None,
    ) -> "Stream":
        """Return an iterator over steps, each a list of TokenEvent with a token; closing it ends what is not done.

        `event.row` is `i * num_samples + j` for sample j of prompt i. params: for all prompts, or one for each.
        adapter: as in `submit`. Raises ValueError for an empty prompt.
        """
        return Stream(self, prompts, params, num_samples, adapter)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        num_samples: int = 1,
        adapter: str | None = None,
    ) -> list[list[Completion]]:
        """Return the completions as [prompt][sample].

        A prompt that leaves no room in the context gets an empty completion with finish_reason "length". Raises
        ValueError for an empty prompt, UserError where the network no longer gives numbers.
        """
        with self.stream(prompts, params, num_samples, adapter) as stream:
            for _ in stream:
                pass
            done = [request.completion() for request in stream.requests]
        return [done[i * num_samples : (i + 1) * num_samples] for i in range(len(prompts))]

    def score(self, prompt: Sequence[int], continuation: Sequence[int], adapter: str | None = None) -> list[float]:
        """Return the log-probability of each token of `continuation` behind `prompt` (at least one token).

        Raises ValueError for an empty prompt and for more tokens than the context holds.
        """
        ids, seq_len = [*prompt, *continuation], self.net.config.seq_len
        if len(ids) > seq_len:
            raise ValueError(f"{len(ids)} tokens do not fit the model's context of {seq_len}")
        params = SamplingParams(max_new_tokens=0, prompt_logprobs=0)
        with self.stream([ids], params, adapter=adapter) as stream:
            for _ in stream:
                pass
            found = stream.requests[0].prompt_logprobs
        return [one[0] for one in found[len(prompt) :]]


class Stream:
    """Steps of some requests of an engine, others' steps left out; `requests` holds them.

    It is a class and not a generator function, because a `with torch.inference_mode()` around a yield would leak into
    the consumer's code.
    """

    def __init__(self, engine: Engine, prompts: Sequence[Sequence[int]], params, num_samples: int, adapter: str | None):
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1")
        if empty := [i for i, prompt in enumerate(prompts) if not len(prompt)]:
            raise ValueError(f"prompt {empty[0]} is empty: a prompt needs at least its <|bos|> token")
        settings = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        self.engine, self.pending = engine, []
        self.requests: list[Request] = []
        try:
            for i, (prompt, own) in enumerate(zip(prompts, settings, strict=True)):
                for j in range(num_samples):
                    number = i * num_samples + j
                    self.requests.append(engine.submit(prompt, own, sample=number, adapter=adapter))
        except BaseException:
            self.close()  # a refused request must not leave those before it in the engine
            raise
        engine.watch(self)

    @property
    def finish_reasons(self) -> list[str | None]:
        """Return why each row has ended, None while it goes on."""
        return [request.finish_reason for request in self.requests]

    def __iter__(self) -> Iterator[list[TokenEvent]]:
        return self

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """End now what is not done; may be called at any time, and more than once."""
        for request in self.requests:
            self.engine.abort(request)
        self.engine.unwatch(self)

    def __next__(self) -> list[TokenEvent]:
        while self.pending or not all(request.is_done for request in self.requests):
            if not self.pending:
                self.engine.step()
            events, self.pending = self.pending, []
            if failed := [event.request.error for event in events if event.request.error]:
                self.close()
                raise UserError(failed[0])
            if events := [event for event in events if event.id is not None]:
                return events
        self.close()
        raise StopIteration
