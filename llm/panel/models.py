"""Models that the panel lets answer and looks into: loaded when they are wanted, on the CPU of the panel's process.

The graphics cards stay with the trainings. One answer or one look is made at a time: an engine belongs to one thread.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llm.config.stages import row_or_stranger, stage_row
from llm.errors import UserError
from llm.inference.inside import Inside, look_inside
from llm.inference.request import Completion
from llm.inference.sampling import SamplingParams
from llm.panel.runs_view import name_of
from llm.panel.state import Panel
from llm.run.stage_folder import find_stage
from llm.serving.chat import ChatModel, load_chat_model
from llm.tokenizer.chat_format import render_prompt

KEPT = 2  # models in memory
LOOKS = 4  # of `inside` that are kept
MOST_TOKENS = 256  # of a text that is looked into, and of an answer
MOST_LETTERS = 8_000  # of a question


class PanelModels:
    """The models of a panel. Every method that computes is refused where the panel only shows."""

    def __init__(self, panel: Panel) -> None:
        self.panel = panel
        self._loaded: OrderedDict[tuple[str, int], ChatModel] = OrderedDict()
        self._looks: OrderedDict[tuple[str, int, tuple[int, ...]], Inside] = OrderedDict()
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Return the finished stages whose models write text, as run/stage."""
        rows = self.panel.index.rows()
        finished = [row for row in rows if row["status"] == "finished" and row_or_stranger(row["stage"]).servable]
        return [name_of(row) for row in finished if (Path(row["folder"]) / "model" / "config.json").is_file()]

    def chatting(self) -> list[str]:
        """Return those of `names` that have learnt to answer."""
        return [name for name in self.names() if row_or_stranger(name.partition("/")[2]).is_chat]

    def answered(
        self, name: str, questions: Sequence[str], params: SamplingParams, samples: int = 1
    ) -> list[list[tuple[Completion, str]]]:
        """Return answers to questions with their texts, as [question][sample]; calls of tools stand between marks.

        A model that has not learnt to answer continues the question. Raises UserError for an empty one.
        """
        with self._model(name) as model:
            prompts = [prompt_of(model, question) for question in questions]
            found = model.engine.generate(prompts, params, samples)
            return [[(one, model.engine.tokenizer.decode(one.ids)) for one in own] for own in found]

    def texts(self, name: str, questions: Sequence[str], params: SamplingParams, samples: int = 1) -> list[list[str]]:
        """Return the texts of `answered`."""
        return [[content for _, content in own] for own in self.answered(name, questions, params, samples)]

    def ids_of(self, name: str, content: str, is_question: bool, length: int = 128) -> tuple[list[int], list[int]]:
        """Return the tokens of a text, or of a question with the model's greedy answer, and a mask.

        mask: 1 = the model chose the token, 0 = it was given or written by a tool. length: of the answer, at most.
        Raises UserError for an empty text, and for one of more than `MOST_TOKENS` tokens.
        """
        if not content.strip():
            raise UserError("give a text to look into")
        with self._model(name) as model:
            room = min(MOST_TOKENS, model.seq_len)
            ids = prompt_of(model, content) if is_question else model.engine.tokenizer.encode_prompt(content)
            if len(ids) > room - is_question:
                raise UserError(f"the text has {len(ids):,} tokens; {room:,} are looked into at most")
            if not is_question:
                return list(ids), [0] * len(ids)
            params = SamplingParams(temperature=0.0, max_new_tokens=min(length, room - len(ids)))
            ((found,),) = model.engine.generate([ids], params)
        end = [] if found.stop_id is None or len(ids) + len(found.ids) >= room else [found.stop_id]
        return [*ids, *found.ids, *end], [0] * len(ids) + found.mask + [1] * len(end)

    def inside(self, name: str, ids: Sequence[int]) -> Inside:
        """Return what the network computes for some tokens; the last looks are kept."""
        with self._model(name) as model:
            key = (*self._key(name), tuple(ids))
            if key not in self._looks:
                self._looks[key] = look_inside(model.engine.net, model.engine.tokenizer, ids)
                while len(self._looks) > LOOKS:
                    self._looks.popitem(last=False)
            self._looks.move_to_end(key)
            return self._looks[key]

    @contextmanager
    def _model(self, name: str) -> Iterator[ChatModel]:
        """Give a model to one thread, loaded if it was not, or where its files have changed since."""
        self.panel.check_may_change()  # it takes memory, and cores for some seconds
        row = self.panel.index.row(name)
        if row["status"] != "finished" or not row_or_stranger(row["stage"]).servable:
            raise UserError(f"{name}: only a finished stage whose model writes text can be asked")
        with self._lock:
            key = self._key(name)
            if key not in self._loaded:
                for old in [one for one in self._loaded if one[0] == name]:
                    del self._loaded[old]
                while len(self._loaded) >= KEPT:
                    gone, _ = self._loaded.popitem(last=False)
                    self._looks = OrderedDict((k, look) for k, look in self._looks.items() if k[:2] != gone)
                folder = find_stage(self.panel.runs, *name.split("/"))
                self._loaded[key] = load_chat_model(folder, device="cpu")
            self._loaded.move_to_end(key)
            yield self._loaded[key]

    def _key(self, name: str) -> tuple[str, int]:
        try:
            return name, (self.panel.runs / name / "model" / "config.json").stat().st_mtime_ns
        except OSError as error:
            raise UserError(f"{name} has no model ({error.strerror})") from error


def prompt_of(model: ChatModel, question: str) -> list[int]:
    """Return a question as the model reads it: a chat, or for a model that only continues texts the text itself."""
    if not question.strip():
        raise UserError("ask something")
    if len(question) > MOST_LETTERS:
        raise UserError(f"the question has {len(question):,} letters; {MOST_LETTERS:,} are taken")
    tokenizer = model.engine.tokenizer
    if stage_row(model.name.partition("/")[2]).is_chat:
        return render_prompt(tokenizer, [{"role": "user", "content": question}])
    return [tokenizer.bos_id, *tokenizer.encode(question)]
