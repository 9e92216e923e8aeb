"""A finished model in three lines, for notebooks and scripts: chat with it, continue texts, score them."""

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal, overload

from llm.errors import UserError
from llm.inference.engine import Engine
from llm.inference.inside import Inside, look_inside
from llm.inference.request import Completion
from llm.inference.sampling import SamplingParams
from llm.inference.text import TextStream
from llm.inference.warm_up import interrupt_held_back, warm_up
from llm.model.adapters import with_adapters
from llm.model.lora import merged

DEFAULTS = {"temperature": 0.6, "top_k": 50}  # of `serve.py` too

Chat = str | Sequence[dict[str, Any]]  # a question, or messages with role and content


class Model:
    """A trained model with its tokenizer. Settings of all methods are those of `SamplingParams`, such as seed.

    engine: what it generates with, for finer work; name: run/stage. `adapter` of all methods names one of the adapters
    that were loaded; None is the model itself.
    """

    def __init__(self, engine: Engine, name: str):
        self.engine, self.name = engine, name

    def __repr__(self) -> str:
        return f"llm.load({self.name!r})"

    @overload
    def chat(
        self, messages: Chat, stream: Literal[False] = False, adapter: str | None = None, **settings: Any
    ) -> str: ...

    @overload
    def chat(
        self, messages: Chat, stream: Literal[True], adapter: str | None = None, **settings: Any
    ) -> Iterator[str]: ...

    def chat(
        self, messages: Chat, stream: bool = False, adapter: str | None = None, **settings: Any
    ) -> str | Iterator[str]:
        """Return the answer to a question or to messages, as [{"role": "user", "content": "..."}, ...].

        stream: return an iterator over pieces of the answer instead, as they are written. Calls of tools and their
        results are left out. Raises UserError for messages without a user's, and for unknown settings.
        """
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        pieces = self._answer(messages, _params(settings), adapter)
        return pieces if stream else "".join(pieces)

    def _answer(self, messages: Sequence[dict], params: SamplingParams, adapter: str | None) -> Iterator[str]:
        from llm.serving.chat import stream_reply

        shown = ""
        for reply in stream_reply(self.engine, messages, params, adapter=adapter):
            text = "".join(part["text"] for part in reply.content if part["type"] == "text")
            if len(text) > len(shown):
                yield text[len(shown) :]
                shown = text

    @overload
    def generate(
        self,
        prompt: str,
        n: Literal[1] = 1,
        best_of: int | None = None,
        stream: Literal[False] = False,
        adapter: str | None = None,
        **settings: Any,
    ) -> str: ...

    @overload
    def generate(
        self, prompt: str, n: int, best_of: int | None = None, adapter: str | None = None, **settings: Any
    ) -> list[str]: ...

    @overload
    def generate(
        self, prompt: str, *, stream: Literal[True], adapter: str | None = None, **settings: Any
    ) -> Iterator[str]: ...

    def generate(
        self,
        prompt: str,
        n: int = 1,
        best_of: int | None = None,
        stream: bool = False,
        adapter: str | None = None,
        **settings: Any,
    ) -> str | list[str] | Iterator[str]:
        """Return the continuation of a text, or a list of `n` of them.

        best_of: draw so many and keep the `n` whose tokens are likeliest on average. stream: return an iterator over
        pieces of one continuation. Raises UserError for unknown settings, and for best_of below n.
        """
        params, ids = _params(settings), self._ids(prompt)
        if stream:
            if n != 1 or best_of not in (None, 1):
                raise UserError(f"stream=True gives one continuation, not n={n}, best_of={best_of}")
            return self._pieces(ids, params, adapter)
        drawn = n if best_of is None else best_of
        if not 1 <= n <= drawn:
            raise UserError(f"n={n} must be at least 1, and at most best_of={drawn}")
        settings = settings if drawn == n else settings | {"logprobs": settings.get("logprobs") or 0}
        (samples,) = self.engine.generate([ids], _params(settings), num_samples=drawn, adapter=adapter)
        if drawn > n:
            samples = sorted(samples, key=_mean_logprob, reverse=True)[:n]
        texts = [self._text(sample.ids, params) for sample in samples]
        return texts[0] if n == 1 else texts

    def score(self, prompt: str, continuation: str, adapter: str | None = None) -> float:
        """Return the log-probability in nats of a text behind another one: larger is likelier.

        Raises UserError where both together do not fit the context.
        """
        tokenizer, seq_len = self.engine.tokenizer, self._seq_len
        ids, rest = [tokenizer.bos_id, *tokenizer.encode(prompt)], tokenizer.encode(continuation)
        if len(ids) + len(rest) > seq_len:
            raise UserError(f"{len(ids) + len(rest):,} tokens do not fit the model's context of {seq_len:,}")
        return sum(self.engine.score(ids, rest, adapter))

    def look_inside(self, text: str, adapter: str | None = None) -> Inside:
        """Return what the network computes for a text behind <|bos|>: tokens, attention, the logits of every layer.

        A rendered chat begins with <|bos|> itself. Raises UserError for a text that does not fit the context, and for a
        model of another kind than ours.
        """
        net, tokenizer = self.engine.net, self.engine.tokenizer
        if adapter is not None:
            self.engine.check_adapter(adapter)
            net = with_adapters(merged(net), {adapter: self.engine.adapters[adapter]}, net.compute_dtype)
            net.adapters.choose(net.adapters.numbers([adapter]))
        return look_inside(net, tokenizer, tokenizer.encode_prompt(text))

    @property
    def _seq_len(self) -> int:
        return self.engine.net.config.seq_len

    def _ids(self, prompt: str) -> list[int]:
        """Return the ids of a text; of one that leaves no room in the context, its end."""
        tokenizer = self.engine.tokenizer
        return [tokenizer.bos_id, *tokenizer.encode(prompt)[-(self._seq_len - 2) :]]

    def _text(self, ids: Sequence[int], params: SamplingParams) -> str:
        text = TextStream(self.engine.tokenizer, params.stop, params.keep_stop)
        pieces = [text.push(token, n >= params.min_new_tokens) for n, token in enumerate(ids, 1)]
        return "".join(pieces) + text.flush()

    def _pieces(self, ids: list[int], params: SamplingParams, adapter: str | None) -> Iterator[str]:
        text = TextStream(self.engine.tokenizer, params.stop, params.keep_stop)
        numbers = count(1)
        with self.engine.stream([ids], params, adapter=adapter) as steps:
            for events in steps:
                if piece := "".join(text.push(one.id, next(numbers) >= params.min_new_tokens) for one in events):
                    yield piece
        if rest := text.flush():
            yield rest


def load(path: str | Path, adapters: Sequence[str] = ()) -> Model:
    """Load the model of a run (its last finished stage), or of a stage's folder such as runs/demo/sft.

    adapters: stages trained with model.lora.rank beside this very model, as run/stage of the same runs folder, or
    folders; their names go to `adapter=` of the methods. It writes a few tokens at once, so that the first answer is
    not slow. Raises UserError where there is no model, and for an adapter of another base.
    """
    from llm.run.stage_folder import MANIFEST, find_stage
    from llm.serving.adapters import chosen_adapters
    from llm.serving.chat import load_chat_model

    with interrupt_held_back():
        folder, stage = Path(path).absolute(), None
        if (folder / "model").is_dir() or (folder / MANIFEST).is_file():
            folder, stage = folder.parent, folder.name
        base = find_stage(folder.parent, folder.name, stage)
        found = load_chat_model(base, adapters=chosen_adapters(adapters, folder.parent, str(base)))
        engine = Engine(found.engine.net, found.engine.tokenizer, frozen=True, adapters=found.engine.adapters)
        model = Model(engine, found.name)
        warm_up(model.engine)
    return model


def _mean_logprob(sample: Completion) -> float:
    """Return the mean log-probability of the tokens that were sampled; 0 where none was."""
    found = [logprob for logprob, sampled in zip(sample.logprobs, sample.mask, strict=True) if sampled]
    return sum(found) / max(1, len(found))


def _params(settings: dict[str, Any]) -> SamplingParams:
    """Return settings as SamplingParams; a stop text may stand alone. Raises UserError for names that do not exist."""
    known = SamplingParams.__dataclass_fields__
    if unknown := [name for name in settings if name not in known]:
        raise UserError(f"{unknown[0]}: no such setting; there are {', '.join(known)}")
    stop = settings.get("stop", ())
    return SamplingParams(**DEFAULTS | settings | {"stop": (stop,) if isinstance(stop, str) else tuple(stop)})
