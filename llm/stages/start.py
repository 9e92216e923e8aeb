"""The lines that a stage prints when it begins: what runs, on what, from which parent, on how much, and how long."""

import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

from llm.checkpoint.resume import list_checkpoints
from llm.cli.changes import changes
from llm.config.stages import stage_row
from llm.model.linear import resolve_compute_dtype
from llm.parallel.launch import processes
from llm.scaling.batch_ramp import batch_schedule
from llm.scaling.machine import device_name
from llm.stages.common import BuiltStage
from llm.stages.expect import Expected, expect, held_out_sizes
from llm.stages.job import Job, show_config, show_derived
from llm.stages.micro_batch import training_device
from llm.stages.plan import holds_weights
from llm.utils.format import amount, duration, in_rate
from llm.utils.terminal import can_redraw

LABEL, WIDTH = 9, 120  # columns of a label, and of a wrapped line
MOST_CHANGES = 40


def show_start(job: Job, built: BuiltStage) -> Expected:
    """Print how the stage begins, in a dry run with all that is derived; return what is expected of it."""
    cfg, saved = job.cfg, [] if job.cfg.overwrite else list_checkpoints(job.stage_dir / "checkpoints")
    forecast = expect(cfg, built.derived, built.module.context, saved[-1][0] if saved else 0)
    print("\n".join(start_lines(job, built, forecast)), flush=True)
    show_numbers(cfg, built.derived)
    if built.reading is not None and (lines := built.reading.start_lines(cfg.verbose or cfg.dry_run)):
        print("\n".join(lines), flush=True)
    return forecast


def show_numbers(cfg, derived: Mapping[str, Any]) -> None:
    """Print what the stage needs on a GPU and what is derived, in a dry run; the configuration with verbose=true."""
    if cfg.dry_run:
        is_plain = stage_row(cfg.stage.name).kind in ("text", "chat")
        more = "" if is_plain else "; training passes alone, without answers drawn and other networks"
        print("\n".join(labelled({"on a GPU": gpu_words(derived) + more})))
    if cfg.verbose:
        show_config(cfg)
    if cfg.dry_run or cfg.verbose:
        show_derived(derived)


def show_plan(cfg, derived: Mapping[str, Any]) -> None:
    """Print what follows from the configuration alone, in a dry run before there is a tokenizer."""
    lines = {
        "model": model_words(derived, cfg.arch.name),
        "machine": f"{machine_words(cfg)}; {precision_words(cfg)}",
        **({"data": data_words(derived)} if "bytes_per_token" in derived else {}),
        "steps": step_words(derived, cfg) + unread_words(cfg, derived),
        "time": time_words(expect(cfg, derived), cfg.max_minutes),
    }
    print("\n".join([*labelled(lines), *change_lines(cfg)]))
    show_numbers(cfg, derived)


def labelled(lines: Mapping[str, str], width: int | None = None) -> list[str]:
    """Return lines behind their labels, wrapped to `width`; by default to that of a terminal, and not elsewhere."""
    if width is None and can_redraw():
        width = shutil.get_terminal_size().columns
    options = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": " " * LABEL}
    whole = [f"{label:{LABEL}}{text}" for label, text in lines.items()]
    return whole if width is None else [part for line in whole for part in textwrap.wrap(line, width, **options)]


def start_lines(job: Job, built: BuiltStage, forecast: Expected) -> list[str]:
    """Return the six lines of a stage that trains a model, and one of the settings that differ from the defaults."""
    derived, cfg, ready = built.derived, job.cfg, built.module.made_ready
    lines = {
        "model": model_words(derived, cfg.arch.name),
        "machine": f"{machine_words(cfg)}; {ready or precision_words(cfg)}",
        "parent": parent_words(job, built),
        "data": data_words(derived) + held_out_words(cfg, built.module.context),
        "steps": step_words(derived, cfg),
        "time": time_words(forecast, cfg.max_minutes),
    }
    return [*labelled(lines), *change_lines(cfg)]


def model_words(derived: Mapping[str, Any], arch: str) -> str:
    """Return shape and size of the network."""
    d = derived
    shape = f"{arch}, {d['depth']} layers, {d['n_embd']} wide, context {d['seq_len']:,}"
    return f"{shape}: {d['params_total']:,} parameters"


def machine_words(cfg) -> str:
    """Return what the stage runs on: the number of devices of all nodes, and their name."""
    import torch

    device, world = training_device(cfg), processes(cfg)
    threads = torch.get_num_threads()
    more = f", {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else ""
    return (f"{world} x " if world > 1 else "") + device_name(device) + more


def precision_words(cfg) -> str:
    """Return the number format that the stage would compute in here."""
    return str(resolve_compute_dtype(cfg.precision.compute, training_device(cfg))).removeprefix("torch.")


def parent_words(job: Job, built: BuiltStage) -> str:
    """Return the model/ folder that the stage starts from, and what it takes from there."""
    vocabulary = f"tokenizer ({built.module.context.tokenizer.vocab_size:,} tokens)"
    if holds_weights(job.parent):
        return f"{job.parent}: weights and {vocabulary}"
    return f"{job.parent}: {vocabulary}; the weights are fresh"


def data_words(derived: Mapping[str, Any]) -> str:
    """Return what there is to train on, and how often the stage goes through it."""
    d = derived
    if "questions" in d:
        asked = d["rollouts"] * d["samples_per_step"]
        return f"{d['questions']:,} questions; {asked:,} answers to them"
    for name in ("conversations", "preferences"):
        if name in d:
            return f"{d[name]:,} {name}; {d['epochs']:.3g} passes, {amount(d['planned_tokens'])} tokens"
    planned, packing = f"{amount(d['planned_tokens'])} tokens", f", packing {d['packing']}" if "packing" in d else ""
    if d.get("text_tokens") is None:
        return f"text of unknown size; {planned} of it{packing}"
    guess = f", guessed at {d['bytes_per_token']} bytes a token" if "bytes_per_token" in d else ""
    return f"about {amount(d['text_tokens'])} tokens of text{guess}; {d['text_passes']:.1f} passes, {planned}{packing}"


def unread_words(cfg, derived: Mapping[str, Any]) -> str:
    """Return that a text which was not looked at may shorten the run; "" where it cannot, or was."""
    limit = cfg.stage.get("max_passes")
    if limit is None or cfg.max_steps is not None or derived.get("text_tokens") is not None:
        return ""
    return f"; fewer where that is more than stage.max_passes={limit:g} over the text, which was not looked at"


def held_out_words(cfg, context: Any) -> str:
    """Return on how few tokens bits per byte are measured, where not as many are held out as are asked for; else ""."""
    few = [f"{name} of {size.targets:,}" for name, size in held_out_sizes(cfg, context).items() if size is not None]
    return f"; {', '.join(few)} held-out tokens, fewer than stage.eval_tokens={cfg.stage.eval_tokens}" if few else ""


def step_words(derived: Mapping[str, Any], cfg) -> str:
    """Return number and size of the steps."""
    d, rows, world = derived, cfg.batch.micro_batch_size, processes(cfg)
    parts = batch_schedule(cfg, d["tokens_per_step"]).parts

    def sizes(whole: int) -> str:
        return f"{whole:,}" if parts == 1 else f"{whole // parts:,} to {whole:,}"

    micro = f"{sizes(d['micro_batches'])} micro-batch{'es' if d['micro_batches'] > 1 else ''} of {rows} rows"
    what = f"{d['samples_per_step']:,} answers" if "samples_per_step" in d else f"{sizes(d['tokens_per_step'])} tokens"
    return f"{d['steps']:,} steps of {what} ({micro}{f' on each of {world} devices' if world > 1 else ''})"


def time_words(forecast: Expected, max_minutes: float | None = None) -> str:
    """Return how long the stage will take here, how that is known, and whether its minutes end it before."""
    found, share = forecast.estimate, forecast.share
    runs = f"{found.runs} earlier run{'s' if found.runs > 1 else ''} here"
    source = f"from {runs}" if found.runs else f"from matrix rate, {in_rate(forecast.rate)}"
    busy = f"; the machine is busy: {share:.0%} of its time is free" if share < 0.7 else ""
    pauses = found.parts.pauses
    evaluations = f", {duration(pauses)} of it evaluations" if pauses > 0.1 * found.seconds else ""
    is_cut = max_minutes is not None and found.seconds > 60 * max_minutes
    cut = f"; max_minutes={max_minutes:g} ends it earlier, with fewer steps" if is_cut else ""
    return f"about {duration(found.seconds)} on this machine{evaluations} ({source}{busy}){cut}"


def change_lines(cfg) -> list[str]:
    """Return the settings that differ from the defaults, in one line that is wrapped; [] where there are none."""
    found = changes(cfg)
    if not found:
        return []
    more = [] if len(found) <= MOST_CHANGES else [f"and {len(found) - MOST_CHANGES} more (verbose=true)"]
    width = min(shutil.get_terminal_size((WIDTH, 24)).columns, WIDTH)
    return labelled({"changed": " ".join([*found[:MOST_CHANGES], *more])}, width)


def gpu_words(estimated: Mapping[str, Any]) -> str:
    """Return what a stage needs on the GPU of `estimate`."""
    e = estimated
    fits = "fits" if e["estimate_fits"] == "yes" else f"does not fit, {e['estimate_fits'].removeprefix('no: ')}"
    took = duration(3600 * e["estimate_hours"])
    memory = f"{e['estimate_memory_gib']:.1f} GiB of memory ({fits})"
    return f"about {took} and ${e['estimate_dollars']:,.2f} on {e['estimate_gpu']}; {memory}"
