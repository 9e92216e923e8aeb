"""What `evaluate.py` runs: score a finished stage on its own held-out data and keep the scores in its eval.json."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from llm.core import measure_core
from llm.core_bundle import load_bundle
from llm.data.documents import document_source, texts
from llm.data.loader import ConversationSteps, TextSteps, validation_batches
from llm.engine import Engine
from llm.errors import UserError
from llm.evaluation import bits_per_byte, chat_core, draw_samples, evaluate_task, questions, text_prompts
from llm.format import duration, percent, value
from llm.model_folder import load_model_folder
from llm.precision import resolve_compute_dtype
from llm.report import build_report, print_table
from llm.run import find_stage, read_json, read_manifest, write_json
from llm.sampling import SamplingParams
from tasks import Cache, build_task, held_out_mixture

SECTIONS = ("bpb", "chat", "core", "samples")
TEXT_SAMPLE_TOKENS = 64  # a text has no end of turn to stop at
QUESTIONS_PER_TASK = 2


def run_evaluation(cfg: DictConfig) -> dict[str, Any]:
    """Score the stage that `cfg` (conf/evaluate.yaml) names, print a table, update eval.json and the run's report.

    Returns the content of eval.json: {"bpb", "bpb_text", "chat": {task: {"accuracy", "n", "stderr", ...}}, "chatcore",
    "core", "core_tasks": {task: {"accuracy", "centered", "n", "stderr"}}, "samples"}.
    """
    wanted = [section for section in SECTIONS if cfg.eval[section]]
    if wrong := [k for k in cfg.eval.ks or [] if not 1 <= k <= cfg.eval.num_samples]:
        raise UserError(f"eval.ks={list(cfg.eval.ks)}: pass@{wrong[0]} needs eval.num_samples={wrong[0]} or more")
    if not wanted:
        raise UserError(f"eval=[] measures nothing: choose from {', '.join(SECTIONS)}, as in eval=[bpb,chat]")
    if cfg.eval.core and cfg.eval.bundle is None:
        raise UserError("eval=[core] needs eval.bundle=<folder or zip of a CORE bundle>; see docs/evaluation.md")
    if cfg.eval.bundle is not None and not cfg.eval.core:
        raise UserError(f"eval.bundle={cfg.eval.bundle}: only eval=[core] reads it")
    stage_dir = find_stage(cfg.paths.runs, cfg.run, cfg.stage)
    subject = Subject(stage_dir, cfg)
    print(f"{stage_dir.parent.name}/{stage_dir.name} on {subject.net.device}", flush=True)
    measure: dict[str, Callable[[], dict]] = {"bpb": subject.bpb, "chat": subject.chat, "samples": subject.samples}
    measure["core"] = subject.core
    scores: dict[str, Any] = {}
    for section in wanted:
        scores |= measure[section]()
    merged = merge_scores(stage_dir / "eval.json", scores)
    print_scores(stage_dir, scores | ({"chatcore": merged.get("chatcore")} if scores.get("chat") else {}))
    print(f"scores: {stage_dir / 'eval.json'}   report: {build_report(stage_dir.parent, redraw=False)}")
    return merged


def merge_scores(path: Path, scores: dict[str, Any]) -> dict[str, Any]:
    """Put new scores into eval.json; sections and tasks that were not measured this time stay."""
    merged = read_json(path) or {}
    by_task = {key: {**(merged.get(key) or {}), **(scores.get(key) or {})} for key in ("chat", "core_tasks")}
    merged |= scores | {key: tasks for key, tasks in by_task.items() if tasks}
    if (overall := chat_core(by_task["chat"])) is not None:
        merged["chatcore"] = overall
    write_json(path, merged)
    return merged


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def print_scores(stage_dir: Path, scores: dict[str, Any]) -> None:
    for sample in scores.get("samples", []):
        print(f"\n> {sample['prompt']}\n{sample['completion']}")
    rows = [[key, value(scores[key]), "", ""] for key in ("bpb", "bpb_text") if key in scores]
    for task, result in scores.get("chat", {}).items():
        rows.append([task, percent(result["accuracy"]), percent(result["stderr"]), value(result["n"])])
        passes = [key for key in result if key.startswith("pass@") and key != "pass@1"]
        rows += [[f"  {key}", percent(result[key]), "", ""] for key in passes]
        for subject, own in result.get("subjects", {}).items():
            rows.append([f"  {subject}", percent(own["accuracy"]), percent(own["stderr"]), value(own["n"])])
    if "chatcore" in scores:
        rows.append(["ChatCORE", value(scores["chatcore"]), "", ""])
    if rows:
        print()
        print_table(["metric", "score", "± 1 s.e.", "items"], rows, title=f"{stage_dir.parent.name}/{stage_dir.name}")


class Subject:
    """A finished stage under evaluation: its network, its tokenizer and the data it has to be judged on.

    The data config is the one saved in run.json unless the command line gives another (`data=`).
    """

    def __init__(self, stage_dir: Path, cfg: DictConfig):
        manifest = read_manifest(stage_dir) or {}
        if not manifest.get("config"):
            raise UserError(f"{stage_dir / 'run.json'} has no config: the stage was not written by train.py")
        saved = OmegaConf.create(manifest["config"])
        self.name, self.seed, self.options = stage_dir.name, saved.seed, cfg.eval
        self.data = saved.data if cfg.data is None else cfg.data
        self.settings, self.folder = saved.stage, stage_dir
        names, most = cfg.eval.core_tasks, cfg.eval.max_per_task
        self.core_tasks = load_bundle(cfg.eval.bundle, names, most) if cfg.eval.core else []
        net, self.tokenizer = load_model_folder(stage_dir / "model")
        use_gpu = torch.cuda.is_available() and saved.trainer.accelerator != "cpu"
        self.net = net.to("cuda" if use_gpu else "cpu")
        self.net.compute_dtype = resolve_compute_dtype(saved.precision.compute, self.net.device)
        self.engine = Engine(self.net, self.tokenizer)
        self.cache = cfg.paths.data
        self._source = self._held_out = None

    @property
    def is_chat(self) -> bool:
        return self.name != "pretrain"

    @property
    def source(self) -> Any:
        """The run's text, found and checked once."""
        if self._source is None:
            self._source = document_source(self.data, self.cache)
        return self._source

    @property
    def held_out(self) -> Any:
        """Held-out conversations of what the stage was trained on; reinforcement learning has those of sft."""
        if self._held_out is None:
            stage = "sft" if self.name == "grpo" else self.name
            self._held_out = held_out_mixture(self.data, stage, self.seed, Cache(self.cache))
        return self._held_out

    def bpb(self) -> dict[str, float]:
        """{"bpb": on the stage's own validation data, "bpb_text": of a chat stage also on the validation text}."""
        if not self.is_chat:
            return {"bpb": self._bits_per_byte("bpb", self._text_steps())}
        train_on = self.settings.get("train_on", "assistant")
        steps = ConversationSteps(
            self.held_out, self.tokenizer, *self._shape(), train_on=train_on, seed=self.seed, loop=False
        )
        scores = {"bpb": self._bits_per_byte("bpb", steps)}
        if self.data.name != "local" or self.data.path is not None:
            scores["bpb_text"] = self._bits_per_byte("bpb_text", self._text_steps())
        return scores

    def _shape(self) -> tuple[int, int]:
        return self.net.config.seq_len, self.options.batch_size

    def _text_steps(self) -> TextSteps:
        return TextSteps(self.source, self.tokenizer, *self._shape(), split="val")

    def _bits_per_byte(self, name: str, steps: Any) -> float:
        start = time.perf_counter()
        batches = validation_batches(steps, self.options.tokens)
        bpb = bits_per_byte(self.net, batches, self.tokenizer.token_bytes())
        tokens = sum(batch["inputs"].numel() for batch in batches)
        print(f"{name}: {bpb:.4f} ({tokens:,} tokens, {duration(time.perf_counter() - start)})", flush=True)
        return bpb

    def chat(self) -> dict[str, dict]:
        """{"chat": {task: its scores}} for the tasks of `data.eval`; nothing before a model has seen a chat.

        Every answer goes to records/<task>.jsonl in the stage's folder.
        """
        if not self.is_chat:
            print(f"chat: left out, stage={self.name} has not seen a conversation yet", flush=True)
            return {}
        options, scores = self.options, {}
        sampling = None
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
            write_records(self.folder / "records" / f"{name}.jsonl", result.pop("records"))
            scores[name] = result
            note = f", {result['too_long']} prompts do not fit model.seq_len" if result["too_long"] else ""
            took = duration(time.perf_counter() - start)
            shown = percent(result["accuracy"], result["stderr"])
            print(f"{name}: {shown} ({result['n']} items, {took}{note})", flush=True)
        return {"chat": scores}

    def _task(self, name: str) -> Any:
        if name not in self.data.tasks:
            raise UserError(f"data.eval names {name!r}, which is not in data.tasks ({', '.join(self.data.tasks)})")
        return build_task(name, self.data.tasks[name], "test", Cache(self.cache))

    def core(self) -> dict[str, Any]:
        """{"core", "core_tasks"}; details go to core.csv and core/<task>.jsonl beside eval.json."""
        return measure_core(self.net, self.tokenizer, self.core_tasks, self.options, self.folder)

    def samples(self) -> dict[str, list]:
        """{"samples": [{"prompt", "completion"}]}: held-out texts continued, or questions of every task answered."""
        if not self.is_chat:
            return {"samples": draw_samples(self.engine, text_prompts(texts(self.source, "val")), TEXT_SAMPLE_TOKENS)}
        prompts = [prompt for name in self.data.eval for prompt in questions(self._task(name), QUESTIONS_PER_TASK)]
        prompts += questions(self.held_out, QUESTIONS_PER_TASK)
        return {"samples": draw_samples(self.engine, prompts, self.options.max_new_tokens)}
