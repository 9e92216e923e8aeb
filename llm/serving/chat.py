"""Answers to conversations, for every user interface: fit the conversation into the context, stream what comes back.

Nothing here prints or knows of a browser. A conversation that has outgrown the context loses its oldest turns, an
over-long message its beginning; the reply says so in its notes instead of failing.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm.checkpoint.examples import load_examples
from llm.config.stages import stage_row
from llm.errors import UserError
from llm.inference.engine import Engine
from llm.inference.sampling import SamplingParams
from llm.inference.text import TextStream
from llm.run.notes import say, stage_notes
from llm.run.stage_folder import HF
from llm.serving.adapters import load_adapters
from llm.tokenizer.chat_format import PART_MARKS, render_prompt

MIN_ANSWER_SHARE = 4  # a quarter of the context stays free for the answer, unless max_new_tokens is less

LEFT_OUT = "The oldest messages no longer fit the context of {:,} tokens: from here on they are left out."

Message = dict[str, Any]


@dataclass
class Reply:
    """An answer so far. content: parts as in `llm.tokenizer.chat_format`; notes: what the user should know about it.

    tokens: sampled and forced ones so far; seconds: time that the engine took for them.
    """

    content: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    done: bool = False
    tokens: int = 0
    seconds: float = 0.0

    @property
    def speed(self) -> str:
        """The length and the speed of the answer in words; "" before its first token."""
        tokens = "1 token" if self.tokens == 1 else f"{self.tokens:,} tokens"
        return f"{tokens}, {self.tokens / self.seconds:,.0f} per second" if self.seconds else ""

    def as_message(self) -> Message:
        """Return a copy as the assistant's message of a conversation, with what was to be said about it."""
        message = {"role": "assistant", "content": [dict(part) for part in self.content]}
        return message | ({"notes": list(self.notes)} if self.notes else {})


@dataclass(frozen=True)
class ChatModel:
    """A model to chat with. `notes` are things that its user should know beforehand; `examples` questions to begin.

    adapter: name of the engine's adapter that answers, None for the base; beside: models of the base's adapters.
    """

    engine: Engine
    name: str  # run/stage
    summary: str
    notes: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    adapter: str | None = None
    beside: tuple["ChatModel", ...] = ()

    @property
    def seq_len(self) -> int:
        """Tokens of the model's context."""
        return self.engine.net.config.seq_len

    def answer(
        self, messages: Sequence[Message], params: SamplingParams, reply: Reply | None = None
    ) -> Iterator[Reply]:
        """Stream the answer to the last user message, see `stream_reply`."""
        return stream_reply(self.engine, messages, params, reply, self.adapter)


def load_chat_model(
    model: str | Path,
    device: str | None = None,
    compute: str = "auto",
    verify: bool = True,
    adapters: Mapping[str, str] | None = None,
    weights: str | None = None,
) -> ChatModel:
    """Load a finished stage's folder, or hf:<name>, by default to the best device there is.

    compute: number format of a network of ours, see `resolve_compute_dtype`; others keep that of their files. verify:
    compare every file of a folder of ours with its checksum. adapters: folders of adapters by name, which become the
    models `beside`. weights: "int8" = our kernel multiplies by matrices of 8 bits. Raises UserError where an adapter
    does not fit, and for int8 where the kernel does not compute the network.
    """
    import torch

    from llm.model import decode_cpu
    from llm.model.linear import resolve_compute_dtype
    from llm.model.lora import merged

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    net, tokenizer, name = _read_model(model, device, verify)
    if tokenizer_is_ours(tokenizer):
        net.compute_dtype = resolve_compute_dtype(compute, device)
        net.to(net.compute_dtype)
    if weights == "int8":
        if not decode_cpu.computes(merged(net)):
            needs = "needs our C++ kernel (CPU, compiler, an arch that it knows)"
            raise UserError(f"weights=int8 {needs}, which does not compute {name} here; use weights=null")
        net.int8 = True
    examples = () if is_hf(model) else tuple(load_examples(Path(model) / "model"))
    folders = adapters or {}
    engine = Engine(net.eval(), tokenizer, adapters=load_adapters(model, folders, verify))
    beside = tuple(_beside(engine, one, Path(folder), tokenizer) for one, folder in folders.items())
    return ChatModel(engine, name, _summary(net), _notes(model, tokenizer), examples, beside=beside)


def _beside(engine: Engine, name: str, folder: Path, tokenizer: Any) -> ChatModel:
    """Return the model of an adapter of an engine. folder: that of its files, by which notes and examples are found."""
    adapter = engine.adapters[name]
    n_params = sum(weight.numel() for weight in adapter.weights.values())
    summary = f"{_summary(engine.net)}; adapter of rank {adapter.lora.rank}, {n_params / 1e6:,.1f} M parameters"
    notes = _notes(folder.parent, tokenizer) if folder.name == "model" else ()
    return ChatModel(engine, name, summary, notes, tuple(load_examples(folder)), adapter=name)


def is_hf(model: str | Path) -> bool:
    """Return True for hf:<name>, False for a stage's folder."""
    return str(model).startswith(HF)


def _read_model(model: str | Path, device: str, verify: bool) -> tuple[Any, Any, str]:
    """Return the network and tokenizer of a stage's folder or of hf:<name>, and a name for the model."""
    if is_hf(model):
        from llm.checkpoint.hf_model import load_hf

        return *load_hf(name := str(model).removeprefix(HF), None, device, verify), _name_of_hf(name)
    from llm.checkpoint.model_folder import load_model_folder

    stage_dir = Path(model)
    net, tokenizer = load_model_folder(stage_dir / "model", device, verify)
    say(*stage_notes(stage_dir))
    return net, tokenizer, f"{stage_dir.parent.name}/{stage_dir.name}"


def _name_of_hf(name: str) -> str:
    """Return the name of a model of the hub, or the last part of a folder's path."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def tokenizer_is_ours(tokenizer: Any) -> bool:
    """Return True for a tokenizer that Fathom has trained, False for one of transformers."""
    return not hasattr(tokenizer, "hf")


def _summary(net: Any) -> str:
    """Return the size of a network in words."""
    n_params = sum(weight.numel() for weight in net.parameters())
    depth = f"{net.config.n_layer} layers, " if hasattr(net.config, "n_layer") else ""
    rounded = ", matrices in int8" if getattr(net, "int8", False) else ""
    return f"{depth}{n_params / 1e6:,.1f} M parameters{rounded}, context of {net.config.seq_len:,} tokens"


def _notes(model: str | Path, tokenizer: Any) -> tuple[str, ...]:
    """Return what users of a model should know beforehand."""
    if not is_hf(model):
        if stage_row(Path(model).name).is_chat:
            return ()
        return ("This is a base model: it continues text and has not learnt to answer. Finish stage=sft to chat.",)
    if getattr(tokenizer, "has_chat_format", True):  # every tokenizer of ours has one
        return ()
    return ("This model has no chat format: questions are written into a text for it to continue.",)


def stream_reply(
    engine: Engine,
    messages: Sequence[Message],
    params: SamplingParams,
    reply: Reply | None = None,
    adapter: str | None = None,
) -> Iterator[Reply]:
    """The answer to the last user message, growing token by token: `reply` (or a new one), yielded each time.

    Only whole characters appear. Closing the iterator stops the generation. That old messages are left out is said
    once in a conversation (`Message["notes"]`). adapter: name of the engine's adapter that answers, None for the model
    itself. Raises UserError, with its first step, where no message is the user's.
    """
    reply = Reply() if reply is None else reply
    seq_len = engine.net.config.seq_len
    prompt, notes = fit_prompt(engine.tokenizer, messages, seq_len, params.max_new_tokens)
    builder = _ReplyBuilder(engine.tokenizer, reply.content, params)
    said = {note for message in messages for note in message.get("notes") or ()}
    reply.notes += [note for note in notes if note != LEFT_OUT.format(seq_len) or note not in said]
    yield reply
    with engine.stream([prompt], params, adapter=adapter) as stream:
        begin = time.perf_counter()
        for events in stream:
            reply.seconds += time.perf_counter() - begin
            reply.tokens += len(events)
            for event in events:
                builder.push(event.id)
            yield reply
            begin = time.perf_counter()
        builder.flush()
        if stream.finish_reasons == ["length"]:
            left = seq_len - len(prompt)
            reply.notes.append(
                f"The answer stops here: it reached max_new_tokens, {params.max_new_tokens}."
                if params.max_new_tokens <= left
                else f"The answer stops here: the model's context of {seq_len:,} tokens is full."
            )
    reply.done = True
    yield reply


def fit_prompt(
    tokenizer, messages: Sequence[Message], seq_len: int, max_new_tokens: int
) -> tuple[list[int], list[str]]:
    """Prompt ids that leave room for an answer, and notes on what had to go.

    Keeps the system message and as many of the newest turns as fit. If even the last message does not fit, its end is
    kept (and the system message only if there is room for it). Raises UserError without a user's message.
    """
    budget = seq_len - min(max_new_tokens, seq_len // MIN_ANSWER_SHARE)
    messages = [{"role": m["role"], "content": m["content"]} for m in messages]
    starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not starts:
        raise UserError(f"a conversation of {len(messages)} messages without a user's message: nothing can be answered")
    system = messages[:1] if messages[0]["role"] == "system" else []
    fitting = None
    for start in reversed(starts):
        prompt = render_prompt(tokenizer, [*system, *messages[start:]])
        if len(prompt) > budget:
            break
        fitting = start, prompt
    if fitting is None:
        return _cut_last_message(tokenizer, system, messages[starts[-1]], budget)
    start, prompt = fitting
    return prompt, [LEFT_OUT.format(seq_len)] if start > len(system) else []


def _cut_last_message(tokenizer, system: list[Message], message: Message, budget: int) -> tuple[list[int], list[str]]:
    """The prompt of one message that is longer than the context, cut at its front until it fits."""
    text = message["content"] if isinstance(message["content"], str) else "".join(p["text"] for p in message["content"])
    ids = tokenizer.encode(text)
    note = f"Your message of {len(ids):,} tokens is longer than the model can read: only its last {{}} were read."
    for head in [system, []] if system else [[]]:
        keep = budget - len(render_prompt(tokenizer, [*head, {"role": "user", "content": ""}]))
        while keep > 0:
            # A cut may fall inside a character; and the rest may take more tokens than before.
            end = tokenizer.decode_bytes(ids[-keep:]).decode("utf-8", errors="ignore")
            prompt = render_prompt(tokenizer, [*head, {"role": "user", "content": end}])
            if len(prompt) <= budget:
                return prompt, [note.format(f"{keep:,}")]
            keep -= len(prompt) - budget
    return render_prompt(tokenizer, [{"role": "user", "content": ""}]), [note.format("0")]


def part_switches(tokenizer: Any) -> dict[int, str]:
    """Return the special tokens around calculator calls and results, each with the kind of what follows."""
    switches = {}
    for kind, (start, end) in PART_MARKS.items() if tokenizer.has_tools else ():
        switches[tokenizer.special_id(start)], switches[tokenizer.special_id(end)] = kind, "text"
    return switches


class _ReplyBuilder:
    """Folds token ids into content parts. Bytes of an unfinished character wait for the rest of it."""

    def __init__(self, tokenizer, content: list[dict[str, str]], params: SamplingParams):
        self.tokenizer, self.content, self.params = tokenizer, content, params
        self._kind, self._n_tokens = "text", 0
        self._switch = part_switches(tokenizer)
        self._new_text()

    def push(self, token: int) -> None:
        self._n_tokens += 1
        if token not in self.tokenizer.special_ids:
            self._add(self._text.push(token, self._n_tokens >= self.params.min_new_tokens))
        elif token in self._switch:
            self.flush()
            self._kind = self._switch[token]
            if self._kind != "text":  # an empty call is shown as well
                self.content.append({"type": self._kind, "text": ""})

    def flush(self) -> None:
        """Turn bytes that still wait into U+FFFD, like `Tokenizer.decode`."""
        self._add(self._text.flush())
        self._new_text()

    def _new_text(self) -> None:
        self._text = TextStream(self.tokenizer, self.params.stop, self.params.keep_stop)

    def _add(self, text: str) -> None:
        if not text:
            return
        if not self.content or self.content[-1]["type"] != self._kind:
            self.content.append({"type": self._kind, "text": ""})
        self.content[-1]["text"] += text
