"""Score a finished stage or a model of Hugging Face, and keep the scores in an eval.json: the work of `evaluate.py`."""

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from llm.checkpoint.hf_model import load_hf
from llm.checkpoint.model_folder import load_model_folder
from llm.config.stages import CHAT_KINDS, stage_row
from llm.data.documents import text_id, texts
from llm.data.loader import ConversationSteps, StepLayout, TextSteps, validation_batches
from llm.data.preferences import PreferenceSteps, Usable
from llm.data.sources import document_source
from llm.errors import UserError
from llm.eval.bits_per_byte import bits_per_byte
from llm.eval.core import measure_core
from llm.eval.core_bundle import load_bundle
from llm.eval.judges import judges
from llm.eval.preferences import preference_scores, scalar_rewards
from llm.eval.samples import NO_PROMPTS, draw_samples, given_prompts, questions, text_prompts
from llm.eval.saved import saved_config, saved_keys
from llm.eval.task_scores import chat_core, check_task, evaluate_task
from llm.inference.engine import Engine
from llm.inference.sampling import SamplingParams
from llm.model.linear import resolve_compute_dtype
from llm.report.report import build_report
from llm.run.config_diff import ABSENT, diff_configs
from llm.run.formats import read_scores
from llm.run.lock import waiting_lock
from llm.run.notes import say, stage_notes
from llm.run.stage_folder import HF, OTHER_DATA, find_stage, read_manifest
from llm.tokenizer.chat_format import readable
from llm.utils.addresses import without_secrets
from llm.utils.files import check_writable, write_atomic, write_json
from llm.utils.format import duration, harmless, percent, print_table, value
from llm.utils.source import pip_install
from tasks import Cache, bad_rows, build_task, held_out_mixture
from tasks.registry import build_preferences, held_out_weights
from tasks.snippets import run_snippet

SECTIONS = ("bpb", "chat", "core", "lm_eval", "samples")
TEXT_SAMPLE_TOKENS = 64  # a text has no end of turn to stop at
QUESTIONS_PER_TASK = 2
# Keys of `data` that do not change what a stage is measured on: held-out text is always packed in one way and order.
NO_TEXT = (
    "workers",
    "tasks_path",
    "eval",
    "rl",
    "packing",
    "shuffle",
    "near_duplicates",
    "token_cache",
    "streaming",
    "preferences",
    "prompts",
)
BY_NAME = ("chat", "core_tasks", "lm_eval", "judges", "scored")  # parts of eval.json in which every name counts alone


def run_evaluation(cfg: DictConfig) -> dict[str, Any]:
    """Score the stage or model that `cfg` (conf/evaluate.yaml) names, print a table, update eval.json and the report.

    Returns the content of eval.json: {"bpb", "bpb_text", "chat": {task: {"accuracy", "n", "stderr", ...}}, "chatcore",
    "core", "core_tasks": {task: {"accuracy", "centered", "n", "stderr"}}, "lm_eval": {task: {metric: value}},
    "samples", "scored": {score: its data}, "other_data": {data: the same parts, measured on data that is not the
    stage's own}}, and of a model of Hugging Face {"model", "seq_len"}.
    """
    wanted = [section for section in SECTIONS if cfg.eval[section]]
    if wrong := [k for k in cfg.eval.ks or [] if not 1 <= k <= cfg.eval.num_samples]:
        raise UserError(f"eval.ks={list(cfg.eval.ks)}: pass@{wrong[0]} needs eval.num_samples={wrong[0]} or more")
    if not wanted and not cfg.eval.judges:
        raise UserError(f"eval=[] measures nothing: choose from {', '.join(SECTIONS)}, as in eval=[bpb,chat]")
    if cfg.eval.core and cfg.eval.bundle is None:
        raise UserError("eval=[core] needs eval.bundle=<folder or zip of a CORE bundle>; see docs/evaluation.md")
    if cfg.eval.bundle is not None and not cfg.eval.core:
        raise UserError(f"eval.bundle={cfg.eval.bundle}: only eval=[core] reads it")
    if cfg.eval.core_tasks is not None and not cfg.eval.core:
        raise UserError(f"eval.core_tasks={list(cfg.eval.core_tasks)}: only eval=[core] reads it")
    if cfg.eval.lm_eval and not cfg.eval.tasks:
        raise UserError("eval=lm_eval needs the names of tasks, as in eval.tasks=[arc_easy,hellaswag]")
    for key in ("tasks", "num_fewshot", "include_path", "chat_template"):
        if not cfg.eval.lm_eval and cfg.eval[key] not in (None, False):
            raise UserError(f"eval.{key}={cfg.eval[key]}: only eval=lm_eval reads it")
    of_user = judges(cfg.eval, SECTIONS)
    subject = StageSubject(cfg) if cfg.model is None else HFSubject(cfg)
    print(f"{subject.title} on {subject.net.device}", flush=True)
    measure: dict[str, Callable[[], dict]] = {"bpb": subject.bpb, "chat": subject.chat, "samples": subject.samples}
    measure |= {"core": subject.core, "lm_eval": subject.lm_eval}
    own = {name: partial(judge, subject) for name, judge in of_user.items()}
    if subject.is_reward_model:  # it writes no text
        wanted, own = [], {"preferences": subject.preferences}
    scores, merged = dict(subject.facts), {}

    def keep(found: dict[str, Any]) -> None:
        nonlocal scores, merged
        found = found if subject.is_own_data else {"other_data": {subject.data_name: found}}
        warn_of_change(subject.folder / "eval.json", found)
        scores = combined(scores, found)
        merged = merge_scores(subject.folder / "eval.json", subject.facts | found)

    subject.keep = keep
    with saved_keys(subject.folder) if cfg.data is None else contextlib.nullcontext():
        if "chat" in wanted and (subject.is_chat or cfg.model is not None):
            subject.check_tasks()
        for section in [*wanted, *own]:  # each is kept at once: the next one may take hours
            keep((own | measure)[section]())
    print_scores(subject.title, scores | ({"chatcore": merged.get("chatcore")} if scores.get("chat") else {}))
    redraw = [*wanted, *own] != ["samples"]  # figures end with the scores of evaluations
    report = "" if cfg.model is not None else f"   report: {build_report(subject.folder.parent, redraw)}"
    print(f"scores: {subject.folder / 'eval.json'}{report}")
    return merged


def load_harness(options: Any) -> Any:
    """Load lm-eval with the tasks of `eval.tasks`. Raises UserError where the extra package is not installed."""
    try:
        from llm.eval.lm_eval_harness import Harness
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise UserError(f"eval=lm_eval needs a package of its own: {pip_install('lm_eval')}") from error
    return Harness(options)


def merge_scores(path: Path, scores: dict[str, Any]) -> dict[str, Any]:
    """Put new scores into eval.json; sections and tasks that were not measured this time stay."""
    with waiting_lock(path.with_name(".eval.json.lock")):  # another evaluation may measure something else meanwhile
        merged = combined(read_scores(path.parent), scores)
        write_json(path, merged)
    return merged


def combined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return scores with newer ones in their places, ChatCORE and CORE over all tasks; those of other data by its name.

    CORE only where it was measured before: some tasks alone make none.
    """
    by_name = {key: {**(old.get(key) or {}), **(new.get(key) or {})} for key in BY_NAME}
    merged = old | new | {key: part for key, part in by_name.items() if part}
    if (overall := chat_core(by_name["chat"])) is not None:
        merged["chatcore"] = overall
    if "core" in old and "core" not in new and new.get("core_tasks"):  # some of its tasks, or not yet all
        centered = [task["centered"] for task in by_name["core_tasks"].values()]
        merged["core"] = torch.tensor(centered, dtype=torch.float64).mean().item()  # as the metric computes it
    others = dict(old.get("other_data") or {})
    for title, part in (new.get("other_data") or {}).items():
        others[title] = combined(others.get(title, {}), part)
    return merged | ({"other_data": others} if others else {})


def warn_of_change(path: Path, found: dict[str, Any]) -> None:
    """Say where equally many tokens of data with the name of before are others now: its files have changed since."""
    before = read_scores(path.parent).get("scored") or {}
    for name, now in (found.get("scored") or {}).items():
        then = before.get(name, {})
        same_size = all(then.get(key) == now.get(key) for key in ("data", "tokens"))
        if "fingerprint" in now and same_size and then.get("fingerprint") != now["fingerprint"]:
            print(
                f"WARNING: {name}: the held-out part of {now['data']} is another than in the last evaluation "
                f"(fingerprint {then.get('fingerprint')} -> {now['fingerprint']}): its files have changed",
                flush=True,
            )


def data_title(data: Any) -> str:
    """Return `local data/novels` or `hub owner/name`: the option of `data` and where its text comes from."""
    place = next((data[key] for key in ("val", "path", "repo", "train") if data.get(key)), None)
    place = place if place is None or isinstance(place, str) else ",".join(map(str, place))
    return without_secrets(f"{data.name} {place}" if place else data.name)


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Write one JSON line per record, replacing the file; its folder is made."""
    write_atomic(path, "".join(json.dumps(record) + "\n" for record in records))


def print_scores(title: str, scores: dict[str, Any]) -> None:
    """Print samples and a table of bits per byte and task scores, where `scores` has any."""
    rows, parts = [], [("", scores), *((f" ({data})", own) for data, own in scores.get("other_data", {}).items())]
    for suffix, part in parts:
        for sample in part.get("samples", []):
            print(harmless(f"\n> {sample['prompt']}\n{readable(sample['completion'])}"))
        rows += [[label + suffix, *cells] for label, *cells in score_rows(part)]
    if rows:
        print()
        print_table(["metric", "score", "± 1 s.e.", "items"], rows, title=title)


def score_rows(scores: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table of scores: metric, score, standard error, number of items."""
    rows = [[key, value(scores[key]), "", ""] for key in ("bpb", "bpb_text") if key in scores]
    for task, result in scores.get("chat", {}).items():
        rows.append([task, percent(result["accuracy"]), percent(result["stderr"]), value(result["n"])])
        passes = [key for key in result if key.startswith("pass@") and key != "pass@1"]
        rows += [[f"  {key}", percent(result[key]), "", ""] for key in passes]
        for subject, own in result.get("subjects", {}).items():
            rows.append([f"  {subject}", percent(own["accuracy"]), percent(own["stderr"]), value(own["n"])])
    preferences = scores.get("preferences", {})
    for key in [key for key in preferences if key != "n" and not key.endswith("_stderr")]:
        form, stderr = percent if key.startswith("accuracy") else value, preferences.get(f"{key}_stderr")
        cells = form(preferences[key]), "" if stderr is None else form(stderr)
        rows.append([f"preferences {key}", *cells, value(preferences["n"]) if "n" in preferences else ""])
    if "chatcore" in scores:
        rows.append(["ChatCORE", value(scores["chatcore"]), "", ""])
    for judge, own in scores.get("judges", {}).items():
        rows += [[f"{judge} {metric}", value(score), "", ""] for metric, score in own.items()]
    return rows


class Subject:
    """A model under evaluation: its network, its tokenizer, and the data and tasks it has to be judged on.

    folder: where its results go; facts: what eval.json says about it beside scores; keep: takes the scores of a part of
    a section, such as a task, as soon as they are there. Subclasses set `net`, `tokenizer`, `data`, `seed`, `is_chat`,
    `folder` and `title`; what can be wrong about tasks of CORE and lm-eval is checked before a model is loaded.
    """

    net: Any
    tokenizer: Any
    data: Any
    seed: int
    is_chat: bool  # answers questions, and does not only continue texts
    folder: Path
    title: str
    is_reward_model = False  # gives answers a number and writes none
    is_own_data = True  # scores are measured on the held-out part of what the stage was trained on

    def __init__(self, cfg: DictConfig):
        check_writable(self.folder)
        self.options, self.cache = cfg.eval, cfg.paths.data
        names, most = cfg.eval.core_tasks, cfg.eval.max_per_task
        self.core_tasks = load_bundle(cfg.eval.bundle, names, most) if cfg.eval.core else []
        self.harness = load_harness(cfg.eval) if cfg.eval.lm_eval else None
        self.facts: dict[str, Any] = {}
        self.keep: Callable[[dict], None] = lambda found: None
        self.tasks: dict[str, Any] = {}  # that were built so far

    @property
    def details(self) -> Path:
        """Return the folder of what stands beside eval.json, item by item; another one for each other data."""
        if self.is_own_data:
            return self.folder
        return self.folder / OTHER_DATA / re.sub(r"[^\w.-]+", "_", self.data_name).strip("_")

    @property
    def reads_text(self) -> bool:
        """Return whether a section that is wanted reads held-out text."""
        wanted = self.options.bpb or (self.options.samples and not self.is_chat and self.prompts is None)
        return bool(wanted and not self.is_reward_model)

    @cached_property
    def text_id(self) -> str:
        """Return the digest of the held-out text of `data`."""
        return text_id(self.source)

    @cached_property
    def data_name(self) -> str:
        """Return the name of data that is not the stage's own: two texts at one place have two names."""
        title = data_title(self.data)
        known = read_scores(self.folder).get("other_data", {}).get(title, {}).get("scored", {})
        others = {origin.get("text") for origin in known.values()} - {None}
        is_known = not self.reads_text or others <= {self.text_id}
        return title if is_known else f"{title}, text {self.text_id[:8]}"

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.net, self.tokenizer, run_code=run_snippet if self.options.python else None)

    @cached_property
    def source(self) -> Any:
        """Return the text of `data`, found and checked once; its training part, which is not read, as it stands."""
        return document_source(OmegaConf.merge(self.data, {"near_duplicates": None}), self.cache, self.tokenizer)

    def bpb(self) -> dict[str, Any]:
        """Return {"bpb": bits per byte on the validation text, None without bytes, "scored": what was measured}."""
        return self._measured(bpb=(self.source.check(), self._text_steps()))

    def _measured(self, **parts: tuple[str, Any]) -> dict[str, Any]:
        """Measure {name: (description of the data, its steps)}; "scored" says of each what it was measured on.

        Its fingerprint is a hash of the tokens that were scored: equal ones mean equal data, order and tokenizer.
        """
        scores: dict[str, Any] = {"scored": {}}
        for name, (description, steps) in parts.items():
            scores[name], tokens, fingerprint = self._bits_per_byte(name, steps)
            scores["scored"][name] = {
                "data": data_title(self.data),
                "source": description,
                "tokens": tokens,
                "fingerprint": fingerprint,
            }
            if isinstance(steps, TextSteps):
                scores["scored"][name]["text"] = self.text_id
        return scores

    def _layout(self) -> StepLayout:
        return StepLayout(self.net.config.seq_len, self.options.batch_size)

    def _text_steps(self) -> TextSteps:
        return TextSteps(self.source, self.tokenizer, self._layout(), split="val")

    def _bits_per_byte(self, name: str, steps: Any) -> tuple[float | None, int, str]:
        """Return (bits per byte or None, tokens that are predicted, their fingerprint)."""
        start = time.perf_counter()
        batches = validation_batches(steps, self.options.tokens)
        bpb = bits_per_byte(self.net, batches, self.tokenizer.token_bytes())
        tokens, digest = 0, hashlib.sha256()
        for batch in batches:
            targets = batch["targets"].cpu()
            counted = targets >= 0
            tokens += int(counted.sum())
            digest.update(targets[counted.any(1)].numpy().tobytes())  # the last micro-batch has rows of padding
        shown = "not measured, the targets have no bytes" if bpb is None else f"{bpb:.4f}"
        print(f"{name}: {shown} ({tokens:,} tokens, {duration(time.perf_counter() - start)})", flush=True)
        return bpb, tokens, digest.hexdigest()[:16]

    def chat(self) -> dict[str, dict]:
        """Return {"chat": {task: its scores}} for the tasks of `data.eval`; answers go to records/<task>.jsonl."""
        options, sampling = self.options, None
        found: dict[str, Any] = {}
        if not self.data.eval:
            print("chat: left out, data.eval names no task: set data.eval=[<task of data.tasks>,...]", flush=True)
            return {}
        if options.num_samples > 1:
            sampling = SamplingParams(options.temperature, max_new_tokens=options.max_new_tokens, seed=self.seed)
        for name in self.data.eval:
            start = time.perf_counter()
            result = evaluate_task(
                self.engine,
                self._task(name),
                options.max_per_task,
                options.max_new_tokens,
                options.batch_size,
                sampling,
                options.num_samples,
                options.ks,
            )
            write_records(self.details / "records" / f"{name}.jsonl", result.pop("records"))
            spec = self.data.tasks[name]
            files = spec.get("test") if spec.source in ("local", "hub") else None
            source = without_secrets(" ".join(str(part) for part in (spec.source, spec.get("repo"), files) if part))
            origin = {"data": data_title(self.data), "source": source, "rows": result["n"]}
            found = combined(found, {"chat": {name: result}, "scored": {f"chat/{name}": origin}})
            self.keep(found)
            note = f", {result['too_long']} prompts do not fit model.seq_len" if result["too_long"] else ""
            took = duration(time.perf_counter() - start)
            shown = percent(result["accuracy"], result["stderr"])
            print(f"{name}: {shown} ({result['n']} items, {took}{note})", flush=True)
        return found

    def check_tasks(self) -> None:
        """Read the tasks of `data.eval`, all before the first is measured. Raises UserError for one that cannot be."""
        for name in self.data.eval:
            check_task(self._task(name))

    def _task(self, name: str) -> Any:
        if name not in self.data.tasks:
            raise UserError(f"data.eval names {name!r}, which is not in data.tasks ({', '.join(self.data.tasks)})")
        if name not in self.tasks:
            spec = self.data.tasks[name]
            self.tasks[name] = build_task(name, spec, "test", Cache(self.cache), bad_rows(self.data))
        return self.tasks[name]

    def core(self) -> dict[str, Any]:
        """Return {"core", "core_tasks"}; details go to core.csv and core/<task>.jsonl beside eval.json."""
        return measure_core(self.net, self.tokenizer, self.core_tasks, self.options, self.details, self.keep)

    def lm_eval(self) -> dict[str, Any]:
        """Return {"lm_eval": {task: {metric: value}}}; every item goes to lm_eval/<task>.jsonl beside eval.json."""
        if self.options.chat_template and not self.is_chat:
            raise UserError(f"eval.chat_template=true: {self.title} has no chat format; leave it out")
        return self.harness.measure(self.engine, self.details)

    def samples(self) -> dict[str, list]:
        """Return {"samples": [{"prompt", "completion"}]}: texts continued, or questions of every task answered.

        They are those of `stage.prompts`, of a model of Hugging Face those of `data.prompts`, else of held-out data.
        """
        if (given := self.prompts) is not None:
            prompts = given_prompts(given, self.tokenizer, self.net.config.seq_len, self.is_chat)
        else:
            prompts = self._questions() if self.is_chat else text_prompts(texts(self.source, "val"))
        if not prompts:
            print(NO_PROMPTS, flush=True)
        length = self.options.max_new_tokens if self.is_chat else TEXT_SAMPLE_TOKENS
        return {"samples": draw_samples(self.engine, prompts, length)}

    @property
    def prompts(self) -> list[str] | None:
        """Return the texts that the configuration gives for samples; None where it gives none."""
        return None if self.is_chat else self.data.get("prompts")

    def _questions(self) -> list[dict]:
        return [prompt for name in self.data.eval for prompt in questions(self._task(name), QUESTIONS_PER_TASK)]


class StageSubject(Subject):
    """A finished stage of a run. Its data config is the one saved in run.json unless `data=` gives another."""

    def __init__(self, cfg: DictConfig):
        self.folder = find_stage(cfg.paths.runs, cfg.run, cfg.stage, any_model=True)
        self.name, self.title = self.folder.name, f"{self.folder.parent.name}/{self.folder.name}"
        reads_data = bool(cfg.eval.bpb or cfg.eval.chat or cfg.eval.samples or cfg.eval.judges)
        self.is_reward_model = not stage_row(self.name).servable
        if self.is_reward_model:
            self._check_sections(cfg.eval)
        config = saved_config(self.folder, cfg.paths.data if cfg.data is None and reads_data else None)
        if cfg.eval.seq_len is not None:
            raise UserError(f"eval.seq_len={cfg.eval.seq_len}: only model=hf:... takes it; a run has its model.seq_len")
        super().__init__(cfg)
        saved = OmegaConf.create(config, flags={"allow_objects": False})
        self.seed, self.settings, self.is_chat = saved.seed, saved.stage, stage_row(self.name).kind in CHAT_KINDS
        self.data = saved.data if cfg.data is None else cfg.data
        self.has_own_settings = same_data(self.data, saved.data, self.is_chat, self.is_reward_model)
        self.trained_beside = ((read_manifest(self.folder) or {}).get("data") or {}).get("held_out_text")
        net, self.tokenizer = load_model_folder(self.folder / "model", verify=cfg.verify)
        say(*stage_notes(self.folder))
        use_gpu = torch.cuda.is_available() and saved.trainer.accelerator != "cpu"
        self.net = net.to("cuda" if use_gpu else "cpu")
        self.net.compute_dtype = resolve_compute_dtype(saved.precision.compute, self.net.device)

    def _check_sections(self, options: Any) -> None:
        """Raise UserError for what a reward model cannot be measured by."""
        asked = [f"eval={name}" for name in ("core", "lm_eval") if options[name]]
        asked += [f"eval.judges.{name}" for name in options.judges]
        if asked:
            raise UserError(
                f"{', '.join(asked)}: {self.title} is a reward model and writes no text; leave it out, or choose "
                "another stage=. It is measured on held-out pairs of data.preferences"
            )

    @cached_property
    def has_own_text(self) -> bool:
        """Return whether the held-out text is that of the training, or where none is noted of an evaluation."""
        scored = read_scores(self.folder).get("scored") or {}
        known = self.trained_beside or scored.get("bpb_text" if self.is_chat else "bpb", {}).get("text")
        if known in (None, self.text_id):
            return True
        print(
            f"WARNING: the held-out text of {data_title(self.data)} is another than before ({known} -> "
            f"{self.text_id}): its files have changed. Its scores stand in eval.json as {self.data_name!r}",
            flush=True,
        )
        return False

    @cached_property
    def is_own_data(self) -> bool:
        """Return whether scores are measured on the held-out part of what the stage was trained on."""
        return self.has_own_settings and (self.is_chat or not self.reads_text or self.has_own_text)

    @cached_property
    def data_name(self) -> str:
        """Return the name of data that is not the stage's own; text in the place of its own is named by a digest."""
        if self.has_own_settings:
            return f"{data_title(self.data)}, text {self.text_id[:8]}"
        return super().data_name

    @cached_property
    def held_out(self) -> Any:
        """Return held-out conversations of the mixture that the stage's row names, the one it was trained on."""
        return held_out_mixture(self.data, stage_row(self.name).mixture_key, self.seed, Cache(self.cache))

    def bpb(self) -> dict[str, float | None]:
        """Return {"bpb": on the stage's own held-out data, "bpb_text": of a chat stage also on held-out text}."""
        if not self.is_chat:
            return super().bpb()
        train_on = self.settings.get("train_on", "assistant")
        steps = ConversationSteps(
            self.held_out, self.tokenizer, self._layout(), train_on=train_on, seed=self.seed, loop=False
        )
        weights = held_out_weights(self.data, stage_row(self.name).mixture_key)
        found = self._measured(bpb=(f"held-out rows of {', '.join(weights)}", steps))
        if self.data.name == "local" and self.data.path is None:
            return found
        text = self._measured(bpb_text=(self.source.check(), self._text_steps()))
        is_other = self.has_own_settings and not self.has_own_text
        return combined(found, {"other_data": {self.data_name: text}} if is_other else text)

    def preferences(self) -> dict[str, dict]:
        """Return {"preferences": {"accuracy", ...}} of a reward model on held-out pairs, see `preference_scores`."""
        chosen = self.settings.get("preferences")
        names = list(self.data.get("preferences") or {}) if chosen is None else chosen
        sources = build_preferences(self.data, names, "test", Cache(self.cache), bad_rows(self.data))
        usable = Usable.of(sources, self.tokenizer, self.net.config.seq_len, self.settings.eval_pairs)
        steps = PreferenceSteps(sources, usable, self.tokenizer, rows_per_micro=self.options.batch_size)
        found = preference_scores(self.net, steps.fixed(), scalar_rewards)
        share, low, high = (percent(found[f"accuracy{side}"]) for side in ("", "_low", "_high"))
        print(f"preferences: accuracy {share} (95 %: {low} to {high}), {found['n']} pairs", flush=True)
        source = {"data": data_title(self.data), "source": f"held-out rows of {', '.join(names)}", "rows": found["n"]}
        return {"preferences": found, "scored": {"preferences": source}}

    def chat(self) -> dict[str, dict]:
        """Return the scores of chat tasks; nothing for a stage that has not seen a conversation."""
        if self.is_chat:
            return super().chat()
        print(f"chat: left out, stage={self.name} has not seen a conversation yet", flush=True)
        return {}

    @property
    def prompts(self) -> list[str] | None:
        """Return `stage.prompts` of the training; None where it was null, or the key is younger."""
        return self.settings.get("prompts")

    def _questions(self) -> list[dict]:
        return super()._questions() + questions(self.held_out, QUESTIONS_PER_TASK)


class HFSubject(Subject):
    """A causal language model of Hugging Face; its results lie in <paths.runs>/hf/<name>/."""

    seed = 42  # of drawn answers, the default of train.py

    def __init__(self, cfg: DictConfig):
        self.title, name = str(cfg.model), str(cfg.model).removeprefix(HF)
        if self.title == name or not name:
            raise UserError(
                f"model={self.title}: write model=hf:<owner>/<name> or model=hf:<folder>; a run is chosen by run="
            )
        for key in ("run", "stage"):
            if cfg[key] is not None:
                raise UserError(f"{key}={cfg[key]} and model={self.title}: give either a run or a model")
        asked = [section for section in ("bpb", "chat", "samples") if cfg.eval[section]]
        if asked and cfg.data is None:
            raise UserError(
                f"eval=[{','.join(asked)}]: model={self.title} comes without data: give data=local data.path=<text>, "
                "or measure something else, such as eval=[core] or eval=lm_eval"
            )
        self.data, self.folder = cfg.data, Path(cfg.paths.runs) / "hf" / folder_name(name)
        before = read_scores(self.folder)
        if (other := before.get("model", self.title)) != self.title:
            raise UserError(f"{self.folder} holds scores of model={other}; move it away or set another paths.runs")
        super().__init__(cfg)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.net, self.tokenizer = load_hf(name, cfg.eval.seq_len, device, cfg.verify)
        seq_len = self.net.config.seq_len
        if (other := before.get("seq_len", seq_len)) != seq_len:
            raise UserError(
                f"{self.folder} holds scores with a context of {other} tokens, now it would be {seq_len}: set "
                f"eval.seq_len={other}, move the folder away or set another paths.runs"
            )
        self.is_chat = getattr(self.tokenizer, "has_chat_format", True)  # every tokenizer of ours has one
        self.facts = {"model": self.title, "seq_len": seq_len}


def same_data(data: Any, other: Any, is_chat: bool, is_reward_model: bool = False) -> bool:
    """Return whether two data configurations measure a stage on the same data.

    Tasks count for chat stages, preferences for reward models: of others they are not measured.

    A key that only one of them has is younger than the other; it counts unless it is null or changes nothing.
    """
    left_out = NO_TEXT if is_chat else (*NO_TEXT, "tasks", "mixture")
    left_out = [key for key in left_out if key != "preferences" or not is_reward_model]
    differences = diff_configs(_resolved(data), _resolved(other), left_out)
    return all({old, new} == {ABSENT, "stop"} for _, old, new in differences)  # data.bad_rows=stop, as ever


def _resolved(data: Any) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.create(data) if isinstance(data, dict) else data, resolve=True)


def folder_name(name: str) -> str:
    """Return owner--name of a model on the hub; of a folder its last three parts, as every run has a folder `model`."""
    parts = Path(name).expanduser().resolve().parts[-3:] if Path(name).expanduser().is_dir() else name.split("/")
    return re.sub(r"[^\w.-]", "_", "--".join(part for part in parts if part != "/"))
