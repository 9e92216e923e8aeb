"""Answers to conversations, for every user interface: fit the conversation into the context, stream what comes back.

Nothing here prints or knows of a browser. A conversation that has outgrown the context loses its oldest turns, an
over-long message its beginning; the reply says so in its notes instead of failing.
"""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm.config.stages import stage_row
from llm.errors import UserError
from llm.inference.engine import Engine
from llm.inference.sampling import SamplingParams
from llm.run.notes import say, stage_notes
from llm.tokenizer.chat_format import PART_MARKS, render_prompt

MIN_ANSWER_SHARE = 4  # a quarter of the context stays free for the answer, unless max_new_tokens is less

Message = dict[str, Any]


@dataclass(frozen=True)
class ChatModel:
    """A model to chat with. `notes` are things that its user should know beforehand."""

    engine: Engine
    name: str  # run/stage
    summary: str
    notes: tuple[str, ...] = ()


@dataclass
class Reply:
    """An answer so far. content: parts as in `llm.tokenizer.chat_format`; notes: what the user should know about it."""

    content: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    done: bool = False


def load_chat_model(stage_dir: str | Path, verify: bool = True) -> ChatModel:
    """The model of a finished stage on the best device there is, with weights in the dtype it computes in.

    verify: compare every file with its checksum.
    """
    import torch

    from llm.checkpoint.model_folder import load_model_folder
    from llm.model.config import num_params
    from llm.model.linear import resolve_compute_dtype

    stage_dir = Path(stage_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net, tokenizer = load_model_folder(stage_dir / "model", device, verify)
    say(*stage_notes(stage_dir))
    net.compute_dtype = resolve_compute_dtype("auto", device)
    net.to(net.compute_dtype).eval()
    config = net.config
    summary = (
        f"{config.n_layer} layers, {num_params(config)['total'] / 1e6:,.1f} M parameters, "
        f"context of {config.seq_len:,} tokens"
    )
    notes = ()
    if not stage_row(stage_dir.name).is_chat:
        notes = ("This is a base model: it continues text and has not learnt to answer. Finish stage=sft to chat.",)
    return ChatModel(Engine(net, tokenizer), f"{stage_dir.parent.name}/{stage_dir.name}", summary, notes)


def stream_reply(
    engine: Engine, messages: Sequence[Message], params: SamplingParams, reply: Reply | None = None
) -> Iterator[Reply]:
    """The answer to the last user message, growing token by token: `reply` (or a new one), yielded each time.

    Only whole characters appear. Closing the iterator stops the generation. Raises UserError, with its first step,
    where no message is the user's.
    """
    reply = Reply() if reply is None else reply
    seq_len = engine.net.config.seq_len
    prompt, notes = fit_prompt(engine.tokenizer, messages, seq_len, params.max_new_tokens)
    builder = _ReplyBuilder(engine.tokenizer, reply.content)
    reply.notes += notes
    yield reply
    with engine.stream([prompt], params) as stream:
        for events in stream:
            for event in events:
                builder.push(event.id)
            yield reply
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
    dropped = start - len(system)
    if not dropped:
        return prompt, []
    return prompt, [f"The oldest {dropped} messages no longer fit the context of {seq_len:,} tokens and were left out."]


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


class _ReplyBuilder:
    """Folds token ids into content parts. Bytes of an unfinished character wait for the rest of it."""

    def __init__(self, tokenizer, content: list[dict[str, str]]):
        self.tokenizer, self.content = tokenizer, content
        self._kind = "text"
        self._switch = {}  # special token -> kind of what follows it
        for kind, (start, end) in PART_MARKS.items():
            self._switch[tokenizer.special_id(start)] = kind
            self._switch[tokenizer.special_id(end)] = "text"
        self._first_special = tokenizer.bos_id
        self._new_decoder()

    def push(self, token: int) -> None:
        if token < self._first_special:
            self._add(self._decoder.decode(self.tokenizer.decode_bytes([token])))
        elif token in self._switch:
            self.flush()
            self._kind = self._switch[token]
            if self._kind != "text":  # an empty call is shown as well
                self.content.append({"type": self._kind, "text": ""})

    def flush(self) -> None:
        """Turn bytes that still wait into U+FFFD, like `Tokenizer.decode`."""
        self._add(self._decoder.decode(b"", final=True))
        self._new_decoder()

    def _new_decoder(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def _add(self, text: str) -> None:
        if not text:
            return
        if not self.content or self.content[-1]["type"] != self._kind:
            self.content.append({"type": self._kind, "text": ""})
        self.content[-1]["text"] += text
