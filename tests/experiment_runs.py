"""Folders of runs as trainings leave them, with learning curves of a known level and spread."""

import math
import random

from llm.run.stage_folder import RunDir, write_manifest

MACHINE = {"cpu": "Test CPU", "cpu_threads": 2, "gpus": []}
TOKENIZER = "70" * 32


def add_run(
    root,
    run,
    seed=1,
    level=2.0,
    lr=0.02,
    steps=100,
    every=20,
    seconds=50.0,
    status="finished",
    until=None,
    spoil=None,
    tokens=None,
    start=None,
    **extra,
):
    """Write a pretraining run whose bpb falls to `level`, evaluated every `every` steps; return its stage folder.

    seconds: of all its steps. until: the step at which it stopped, before its end. spoil: {step: text} of cells of bpb
    to be replaced. tokens: of all its steps, which metrics.csv counts then. start: the setting `init_from`. extra: keys
    of run.json.
    """
    folder = RunDir(root, run).path / "pretrain"
    stage = {"name": "pretrain", "eval_every": every, "eval_tokens": 4096}
    config = {"stage": stage, "model": {"depth": 4}, "optim": {"matrix_lr": lr}, "data": {"name": "embedded"}}
    config |= {"seed": seed, "run": run, "max_steps": steps, "init_from": start}
    steps = until or steps
    curve = {step: level + 6 * math.exp(-step / 15) for step in range(0, steps + 1, every)}
    cells = {step: repr(number) for step, number in curve.items()} | (spoil or {})
    facts = {"stage": "pretrain", "status": status, "config": config, "commit": "c0ffee" * 6, "steps": steps}
    facts |= {"tokens": 512 * steps, "flops": 1e9 * steps, "seconds": seconds + 3, "environment": MACHINE}
    facts |= {
        "parents": {"init_from": {"tokenizer": TOKENIZER, "weights": None}},
        "data": {"held_out_text": "aa11", "read": {}},
    }
    facts |= {"metrics": {"bpb": curve[max(curve)], "loss": 2 * level, "tok_per_s": 1000.0}}
    write_manifest(folder, facts | {"derived": {"params_total": 1_000_000, "depth": 4}} | extra)
    lines = ["step,bpb,seconds,loss" + (",tokens" if tokens else "")]
    for step in range(0, steps + 1, 10):
        clock = repr(seconds * step / steps) if step else ""
        lines.append(
            f"{step},{cells.get(step, '')},{clock},{3.0 if step else ''}"
            + (f",{tokens * step / steps}" if tokens else "")
        )
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return folder


def add_sweep(root, name, seeds, level=2.0, sd=0.01, draw=0, **options):
    """Write a run for every seed, whose levels scatter by the standard deviation `sd`; `draw` seeds the scatter."""
    chance = random.Random(f"{name} {draw}")
    for seed in seeds:
        add_run(root, f"{name}-seed={seed}", seed, level + chance.gauss(0, sd), **options)
