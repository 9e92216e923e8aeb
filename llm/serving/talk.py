"""Conversations of the page's visitors: ask, answer, edit, undo, choose models, take up old chats.

Nothing here builds the page; `Handlers` returns values for its components, in the order that browser.py names them.
"""

import html
import itertools
import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace

import gradio as gr

from llm.errors import UserError
from llm.inference.sampling import SamplingParams
from llm.serving.chat import ChatModel, Message, Reply
from llm.serving.models import MadeRoom, Models
from llm.serving.rendering import display, escape, typed
from llm.serving.saved_chat import MOST_MESSAGES, Chat, Thread, chat_from
from llm.tokenizer.bpe import without_surrogates
from llm.utils.files import parse_json

FRAME_SECONDS = 0.05  # a browser does not need more frames, and each one sends the whole conversation
MAX_MESSAGE = 8_000  # characters
TRIES = 3  # to answer with a model that others make leave again and again
NONE = "none"  # no second model


@dataclass
class Talk:
    """A visitor's conversation. id: its name in the browser's store, "" until the browser is told of it.

    is_asked: a question waits for its answer to begin; is_busy: until the answer has ended. turn: number of the last
    question, or of what ended its answer. Handlers change the conversation in place, and an answer that sees another
    turn than its own says no more.
    """

    chat: Chat
    id: str = ""
    is_busy: bool = False
    is_asked: bool = False
    turn: int = 0

    @classmethod
    def new(cls, *names: str) -> "Talk":
        """Return an empty conversation with one model or two."""
        return cls(Chat([Thread(name) for name in names]))

    def begin(self) -> None:
        """Let the last question be answered."""
        self.turn, self.is_asked, self.is_busy = self.turn + 1, True, True

    def end(self) -> None:
        """Let no answer that is under way go on."""
        self.turn, self.is_asked, self.is_busy = self.turn + 1, False, False

    def cut(self, index: int) -> None:
        """Drop the messages from a place on."""
        for thread in self.chat.threads:
            del thread.messages[index:]

    def drop_answer(self) -> None:
        """Drop the answer to the last question, if there is one."""
        messages = self.chat.threads[0].messages
        if messages and messages[-1]["role"] == "assistant":
            self.cut(len(messages) - 1)


def told(talk: Talk) -> str:
    """Return what the browser keeps of a chat, as Markdown that shows its JSON letter by letter."""
    talk.id = talk.id or uuid.uuid4().hex
    return typed(json.dumps({"id": talk.id, "chat": talk.chat.to_dict()}, ensure_ascii=False))


def title(model: ChatModel, *others: ChatModel) -> str:
    """Return the head of the page in Markdown: name, shape and notes of a model, or the names of two."""
    if others:
        return f"## {' and '.join(escape(one.name) for one in (model, *others))}"
    return "\n\n".join((f"## {escape(model.name)}", model.summary, *model.notes))


def views(talk: Talk) -> tuple:
    """Return what the two chatbots show; the second one stays as it is where one model answers."""
    shown = [display(thread.messages) for thread in talk.chat.threads]
    return tuple(shown) if len(shown) == 2 else (shown[0], gr.skip())


UNCHANGED = tuple(gr.skip() for _ in range(4))  # for (box, talk, first chat, second chat)


class Handlers:
    """Actions of the page. `params` are the settings that it begins with.

    What asks returns (box, talk, first chat, second chat); what changes the chat as a whole (talk, first chat, second
    chat, what the browser keeps, system prompt, title, model, second model).
    """

    def __init__(self, models: Models, params: SamplingParams):
        self.models, self.params = models, params
        self._answers = itertools.count()

    def ask(self, question: str, talk: Talk) -> tuple:
        """Append the question of the box and empty it. One that cannot be asked stays there; an empty one is none."""
        return self._ask(question, talk, len(talk.chat.threads[0].messages), value="")

    def ask_example(self, talk: Talk, picked: gr.SelectData) -> tuple:
        """Ask an example question."""
        return self._ask(picked.value["text"], talk, len(talk.chat.threads[0].messages))

    def edit(self, talk: Talk, edited: gr.EditData) -> tuple:
        """Ask another question in the place of an earlier one; what followed that is dropped."""
        index = edited.index[0] if isinstance(edited.index, list | tuple) else edited.index
        asked = self._ask(edited.value, talk, index)
        return (gr.skip(), talk, *views(talk)) if asked is UNCHANGED else asked  # the browser shows the edited one

    def again(self, talk: Talk) -> tuple:
        """Drop the last answer, for another one."""
        if is_busy(talk) or not talk.chat.threads[0].messages:
            return UNCHANGED
        talk.drop_answer()
        return self._begin(talk)

    def undo(self, question: str, talk: Talk) -> tuple:
        """Take the last question and its answer back. The question returns to the box, unless there is another one."""
        if is_busy(talk):
            return (*UNCHANGED, gr.skip())
        talk.drop_answer()
        messages = talk.chat.threads[0].messages
        question = question if question.strip() or not messages else messages[-1]["content"]
        talk.cut(len(messages) - 1)
        return question, talk, *views(talk), told(talk)

    def answer(
        self,
        talk: Talk,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        max_new_tokens: int | None = None,
        seed: str | None = None,
        system: str | None = None,
    ) -> Iterator[tuple]:
        """Stream the answer to the last question, of both models at once, as (first chat, second chat)."""
        if not talk.is_asked:
            yield UNCHANGED[2:]  # a generator that yields nothing would leave empty chats
            return
        talk.is_asked, turn = False, talk.turn
        try:
            yield views(talk)
            params = self._params(temperature, top_k, top_p, max_new_tokens, seed)
            if len(system or "") > MAX_MESSAGE:
                raise UserError(f"The system prompt has {len(system):,} characters, {MAX_MESSAGE:,} are possible.")
            talk.chat.system = without_surrogates(system or "")
            yield from self._frames(talk, turn, params)
        except UserError as error:
            gr.Warning(html.escape(str(error)))
        finally:  # also when the stop button or a closed page ends this generator
            if talk.turn == turn:
                talk.end()

    def _params(self, temperature, top_k, top_p, max_new_tokens, seed) -> SamplingParams:
        """Return the settings of an answer; None = as the page began. Raises UserError for wrong ones."""
        following = self.params.seed + next(self._answers)  # or asking again would give the same answer
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "max_new_tokens": max_new_tokens}
        given = {name: value for name, value in given.items() if value is not None}
        given |= {name: int(given[name]) for name in ("top_k", "max_new_tokens") if name in given}
        seed = (seed or "").strip() or str(following)
        if not (seed.isdecimal() and len(seed) <= 18):
            raise UserError(f"Seed {seed[:20]}: it must be a whole number of at most 18 digits, or empty.")
        return replace(self.params, **given, seed=int(seed))

    def _frames(self, talk: Talk, turn: int, params: SamplingParams) -> Iterator[tuple]:
        """Let the models answer in turns, token by token, until all have ended, or the talk has gone on."""
        threads, replies = talk.chat.threads, {}
        for number, thread in enumerate(threads):
            replies[number] = self._replies(thread.model, talk.chat.prompt(number), params)
        next_frame, begun = 0.0, set()
        try:
            while replies:
                for number, stream in list(replies.items()):
                    if (reply := next(stream, None)) is None:
                        del replies[number]
                    elif talk.turn != turn:
                        return
                    else:
                        del threads[number].messages[len(threads[number].messages) - (number in begun) :]
                        threads[number].messages.append(_message(reply))
                        begun.add(number)
                if not replies or time.monotonic() >= next_frame:
                    yield views(talk)
                    next_frame = time.monotonic() + FRAME_SECONDS
        finally:
            for stream in replies.values():
                stream.close()

    def _replies(self, name: str, messages: list[Message], params: SamplingParams) -> Iterator[Reply]:
        """Let a model answer. One that has made room for another between two steps is loaded again."""
        for _ in range(TRIES):
            try:
                yield from self.models.get(name).answer(messages, params)
                return
            except MadeRoom as error:
                made_room = error
        raise made_room

    def rest(self, talk: Talk) -> tuple:
        """Return the box with its present button, and the chat for the browser to keep."""
        return _box(talk), told(talk)

    def stop(self, talk: Talk) -> tuple:
        """End the answer that is under way, or the wait for it."""
        talk.end()
        return self.rest(talk)

    def clear(self, talk: Talk) -> tuple:
        """Begin a new chat with the models of this one."""
        talk.end()
        return self._whole(Talk.new(*(thread.model for thread in talk.chat.threads)))

    def restore(self, stored: str, talk: Talk) -> tuple:
        """Take up a chat that the browser has kept: {"id", "chat"}; anything else begins a new one."""
        try:
            kept = parse_json(stored.encode("utf-8", "replace"), "the stored chat")
            chat = chat_from(kept["chat"], "the stored chat")
            name = uuid.UUID(hex=kept["id"]).hex
        except (UserError, LookupError, TypeError, ValueError, AttributeError):
            return self.clear(talk)
        talk.end()
        for thread in chat.threads:
            if thread.model not in self.models.names():
                thread.model = self.models.first
        return self._whole(Talk(chat, name), chat.system)

    def choose(self, model: str, other: str, talk: Talk) -> tuple:
        """Let another model go on with the conversation, or a second one answer beside it."""
        if not is_busy(talk):
            threads = talk.chat.threads
            try:
                for name in {model, other} - {NONE}:
                    self.models.get(name)
                threads[0].model = model
                second = threads[1].messages if len(threads) == 2 else list(threads[0].messages)
                threads[1:] = [] if other == NONE else [Thread(other, second)]
            except UserError as error:
                gr.Warning(html.escape(str(error)))
        return self._whole(talk)

    def _ask(self, question: str, talk: Talk, index: int, **box) -> tuple:
        """Put a question in the place of what follows `index`; `UNCHANGED` where that is not possible."""
        if not question.strip() or is_busy(talk):
            return UNCHANGED
        if len(question) > MAX_MESSAGE:
            gr.Warning(
                f"The message has {len(question):,} characters, {MAX_MESSAGE:,} are possible. Please shorten it."
            )
            return UNCHANGED
        if index >= MOST_MESSAGES:
            gr.Warning(f"A chat has at most {MOST_MESSAGES} messages. Please begin a new one.")
            return UNCHANGED
        talk.cut(index - index % 2)  # an unanswered question makes room
        for thread in talk.chat.threads:
            thread.messages.append({"role": "user", "content": without_surrogates(question)})
        return self._begin(talk, **box)

    def _begin(self, talk: Talk, **box) -> tuple:
        talk.begin()
        return _box(talk, **box), talk, *views(talk)

    def _whole(self, talk: Talk, system: str | None = None) -> tuple:
        threads = talk.chat.threads
        try:
            models = [self.models.get(thread.model) for thread in threads]
        except UserError as error:
            gr.Warning(html.escape(str(error)))
            models = [self.models.get(self.models.first)]
            threads[1:], threads[0].model = [], self.models.first
        two = len(threads) == 2
        examples = [{"text": text} for text in models[0].examples]
        shown = [display(thread.messages) for thread in threads]
        first = gr.update(value=shown[0], examples=examples, label=models[0].name, show_label=two)
        second = gr.update(visible=False)
        if two:
            second = gr.update(value=shown[1], visible=True, label=models[1].name, show_label=True)
        other = models[1].name if two else NONE
        system = gr.skip() if system is None else system
        return talk, first, second, told(talk), system, title(*models), models[0].name, other


def is_busy(talk: Talk) -> bool:
    """Return whether an answer is on its way, and say so to who wants something else meanwhile."""
    if talk.is_busy:
        gr.Warning("An answer is on its way: wait for it, or stop it.")
    return talk.is_busy


def _message(reply: Reply) -> Message:
    return reply.as_message() | ({"speed": reply.speed} if reply.speed else {})


def _box(talk: Talk, **box):
    """Return what changes in the question box: its button, and the text if there is a new one."""
    return gr.update(submit_btn=False if talk.is_busy else "Send", stop_btn="Stop" if talk.is_busy else False, **box)
