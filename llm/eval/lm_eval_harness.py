"""Tasks of lm-eval, the field's evaluation harness, judging a network in memory: `eval=lm_eval eval.tasks=[...]`.

lm-eval makes the prompts, asks a model for log-likelihoods and completions, and keeps the score. `HarnessModel` answers
with the code that CORE and chat evaluation use: batches with shared prefixes, and the engine.
"""

import difflib
import json
import logging
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window

from llm.errors import UserError
from llm.eval.core import CHUNK, Row, score_rows
from llm.eval.task_scores import batches_by_length
from llm.inference.engine import Engine
from llm.inference.sampling import SamplingParams
from llm.inference.weights import in_compute_dtype
from llm.tokenizer.chat_format import render_conversation, render_prompt
from llm.utils.files import write_atomic
from llm.utils.format import print_table, value

TASK_SEED, NUMPY_SEED = 0, 1234  # lm-eval's own seeds: some tasks shuffle their choices as they are loaded
MAX_NEW_TOKENS = 256  # if a task sets no limit, as in lm-eval
task_manager = lru_cache(TaskManager)  # reading thousands of task files takes seconds


class HarnessModel(TemplateLM):
    """Model for lm-eval: an engine's network answers its requests.

    A prompt that is too long loses its beginning and is counted in `cut`. batch_size: sequences evaluated together.
    """

    def __init__(self, engine: Engine, batch_size: int):
        super().__init__()
        self.engine, self.net, self.tokens = engine, in_compute_dtype(engine.net.eval()), engine.tokenizer
        self.batch_size, self.cut = batch_size, 0

    @property
    def eot_token_id(self) -> int:
        """Id of the token that begins a text."""
        return self.tokens.bos_id

    @property
    def max_length(self) -> int:
        """Tokens of the model's context."""
        return self.net.config.seq_len

    @property
    def tokenizer_name(self) -> str:
        """Name by which lm-eval caches tokenised requests."""
        return type(self.tokens).__name__

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text behind a BOS token, or of the text alone if add_special_tokens is False."""
        return self.tokens.encode(string) if add_special_tokens is False else self.tokens.encode_prompt(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a chat as text with special tokens written out; without a generation prompt its last turn is open."""
        if hasattr(self.tokens, "chat_text"):
            return self.tokens.chat_text(chat_history, is_open=not add_generation_prompt)
        if add_generation_prompt:
            return self.tokens.decode(render_prompt(self.tokens, chat_history))
        return self.tokens.decode(render_conversation(self.tokens, {"messages": chat_history})[0][:-1])

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list:
        """Return [(log-likelihood in nats, True if it is the greedy completion)] of each (_, context, continuation)."""
        return [one for start in range(0, len(requests), CHUNK) for one in self._score(requests[start : start + CHUNK])]

    def _score(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, greedy) of each request, in one call of `score_rows`."""
        rows = []
        for i, (_, context, continuation) in enumerate(requests):
            ids = np.array([*context, *continuation])
            cut = max(0, len(ids) - self.max_length - 1)  # nothing is predicted behind the last token
            rows.append(Row(i, 0, ids[cut:], max(1, min(len(context) - cut, len(ids) - cut - 1)), cut))
        self.cut += sum(row.cut > 0 for row in rows)
        found = score_rows(self.net, rows, self.batch_size)
        scored = [found[row.example, 0] for row in rows]
        return [(-one.loss * (len(row.ids) - row.start), one.greedy) for row, one in zip(rows, scored, strict=True)]

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood in nats of each whole text, by windows if it is longer than the context."""
        windows, owner = [], []
        for i, request in enumerate(requests):
            ids = self.tokens.encode(request.args[0])
            found = get_rolling_token_windows(ids, self.tokens.bos_id, max_seq_len=self.max_length, context_len=1)
            for context, continuation in map(make_disjoint_window, found):
                windows.append((None, context, continuation))
                owner.append(i)
        sums = [0.0] * len(requests)
        before = self.cut
        for i, (nats, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            sums[i] += nats
        self.cut = before  # the windows of a text are no cut prompts
        return sums

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Return the completion of each prompt, up to its first stop text. Prompts with equal options share batches."""
        alike: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True, default=str)].append(i)
        texts = [""] * len(requests)
        batch = 0
        for members in alike.values():
            params = sampling_params(requests[members[0]].args[1], requests[members[0]].task_name)
            room = max(self.max_length - params.max_new_tokens, self.max_length // 2)
            prompts = {i: self.tok_encode(requests[i].args[0]) or [self.eot_token_id] for i in members}
            self.cut += sum(len(prompt) > room for prompt in prompts.values())
            prompts = {i: prompt[-room:] for i, prompt in prompts.items()}
            for rows in batches_by_length(members, prompts, self.batch_size):
                own = replace(params, seed=batch)
                for i, (done,) in zip(rows, self.engine.generate([prompts[i] for i in rows], own), strict=True):
                    texts[i] = answer_text(self.tokens, done.ids, params.stop)
                batch += 1
        return texts


def sampling_params(options: dict[str, Any], task: str | None) -> SamplingParams:
    """Return a task's generation_kwargs as SamplingParams. Raises UserError for options that the engine lacks."""
    kwargs = dict(normalize_gen_kwargs(options, MAX_NEW_TOKENS))
    stop, length = tuple(text for text in kwargs.pop("until") if text), kwargs.pop("max_gen_toks")
    temperature = float(kwargs.pop("temperature", 1.0)) if kwargs.pop("do_sample") else 0.0
    top_k, top_p = kwargs.pop("top_k", None) or 0, kwargs.pop("top_p", None) or 1.0
    kwargs.pop("temperature", None)
    if unknown := [f"{key}={one}" for key, one in kwargs.items() if (key, one) != ("num_beams", 1)]:
        raise UserError(f"eval.tasks: {task} asks for {unknown[0]} in generation_kwargs, which is not known here")
    return SamplingParams(temperature, int(top_k), float(top_p), max_new_tokens=int(length), stop=stop)


def answer_text(tokenizer: Any, ids: Sequence[int], stop: Sequence[str] = ()) -> str:
    """Return the visible text of a completion: no calculator calls, and nothing from the first stop text on."""
    shown, ids, marks = [], list(ids), {}
    if tokenizer.has_tools:
        start_end = (("python_start", "python_end"), ("output_start", "output_end"))
        marks = {tokenizer.special_id(start): tokenizer.special_id(end) for start, end in start_end}
    while ids:
        one = ids.pop(0)
        if one not in marks:
            shown.append(one)
        elif marks[one] in ids:
            del ids[: ids.index(marks[one]) + 1]
    text = tokenizer.decode(shown)
    return text[: min([text.find(one) for one in stop if one in text], default=len(text))]


class Harness:
    """Tasks of lm-eval that `options` (conf/evaluate.yaml, eval) names, loaded and checked before any model is.

    Raises UserError for unknown names, numbers of examples that a task lacks, and data that cannot be loaded.
    """

    def __init__(self, options: Any):
        self.options = options
        folder = options.include_path
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"eval.include_path={folder}: no such folder; it holds task files (YAML) of lm-eval")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it reports every default that a task leaves as it is
        random.seed(TASK_SEED)
        np.random.seed(NUMPY_SEED)
        self.manager = task_manager(include_path=folder)
        loaded = self._load(list(options.tasks))
        for name, task in loaded["tasks"].items():
            self._check(name, task)
        members = {child for children in loaded["group_map"].values() for child in children}
        self.tasks = [one for name, one in {**loaded["groups"], **loaded["tasks"]}.items() if name not in members]

    def _load(self, names: list[str]) -> dict[str, Any]:
        """Return lm-eval's tasks and groups of these names. Raises UserError for unknown ones, and for faulty data."""
        for name in names:
            if name not in self.manager.all_tasks:
                near = ", ".join(difflib.get_close_matches(name, self.manager.all_tasks, n=5, cutoff=0.5))
                hint = f"; near it: {near}" if near else ""
                raise UserError(f"eval.tasks: lm-eval has no task, group or tag {name!r}{hint}")
        try:
            return self.manager.load(names)
        except Exception as error:  # a task's data, code or template can raise anything
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(
                f"eval.tasks=[{','.join(names)}]: cannot be loaded ({reason}). Their data come from the hub; for "
                "files of your own write task files (dataset_path: json) into eval.include_path"
            ) from error

    def _check(self, name: str, task: Any) -> None:
        """Raise UserError for a task that cannot be evaluated here."""
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(
                f"eval.tasks: {name} runs programs of the model without a sandbox; the task type humaneval of "
                "eval=[chat] has one"
            )
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"eval.tasks: {name} needs images or sound; only text is known here")
        if task.OUTPUT_TYPE == "generate_until" and task.config.generation_kwargs:
            sampling_params(task.config.generation_kwargs, name)
        asked = self.options.num_fewshot
        if not asked or task.config.num_fewshot == 0:  # lm-eval leaves a task's own 0 as it is
            return
        without_itself = task.fewshot_cfg.split == task.config.test_split
        most = len(task.fewshot_docs()) - without_itself
        if asked > most:
            raise UserError(f"eval.num_fewshot={asked}: {name} has only {most} examples to show; set at most that many")

    def measure(self, engine: Engine, folder: Path) -> dict[str, Any]:
        """Measure all tasks, print a table, write lm_eval/<task>.jsonl with a line per item.

        Returns {"lm_eval": {task: {metric: value}}}.
        """
        options = self.options
        model = HarnessModel(engine, options.batch_size)
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=self.tasks,
            num_fewshot=options.num_fewshot,
            limit=options.max_per_task,
            task_manager=self.manager,
            apply_chat_template=options.chat_template,
            random_seed=TASK_SEED,
            numpy_random_seed=NUMPY_SEED,
        )
        shots = results["n-shot"]
        for task, samples in results["samples"].items():
            lines = (json.dumps(record(one), default=handle_non_serializable, ensure_ascii=False) for one in samples)
            write_atomic(folder / "lm_eval" / f"{task}.jsonl", "".join(line + "\n" for line in lines))
        scores = {
            task: plain_scores(found) | {"shots": shots.get(task)}  # None for a group whose tasks differ
            for task, found in results["results"].items()
            if "sample_len" in found  # a group that only lists its tasks has no score of its own
        }
        _print_scores(scores)
        if model.cut:
            print(f"lm_eval: {model.cut} prompts cut to {model.max_length} tokens", flush=True)
        print(f"details: {folder / 'lm_eval'}/", flush=True)
        return {"lm_eval": scores}


def _print_scores(scores: dict[str, dict[str, Any]]) -> None:
    rows = [
        [task, metric, value(number), value(one.get(f"{metric}_stderr")), value(one["n"]), value(one["shots"])]
        for task, one in scores.items()
        for metric, number in one.items()
        if metric not in ("n", "shots") and not metric.endswith("_stderr")
    ]
    print_table(["task", "metric", "score", "± 1 s.e.", "items", "shots"], rows, title="lm-eval")


def plain_scores(found: dict[str, Any]) -> dict[str, Any]:
    """Return {metric: number, <metric>_stderr: number, "n": items} from lm-eval's result of a task or group.

    lm-eval writes "acc,none" for a metric and the filter that answers went through; a filter that does nothing is left
    out.
    """
    scores: dict[str, Any] = {}
    for key, number in found.items():
        metric, _, how = key.partition(",")
        if how and isinstance(number, int | float):
            name, is_error = metric.removesuffix("_stderr"), metric.endswith("_stderr")
            scores[name + (f",{how}" if how != "none" else "") + ("_stderr" if is_error else "")] = number
    return scores | {"n": found["sample_len"]}


def record(sample: dict[str, Any]) -> dict[str, Any]:
    """Return an item for a line of jsonl: its prompt (`arguments`), the answer (`responses`), and each metric."""
    kept = {"index": sample["doc_id"], "target": sample["target"], "arguments": sample["arguments"]}
    kept |= {"responses": sample["filtered_resps"], "filter": sample["filter"]}
    return kept | {metric: sample[metric] for metric in sample["metrics"]}
