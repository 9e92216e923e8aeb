"""Milliseconds of one training step, split into data, forward + backward, optimizer and the Lightning loop.

    python bench/train_step.py [--depth 4] [--arch modern] [--optim muon_adamw] [--window L] [--seq-len 512] [--rows 4]
                               [--micro 4] [--vocab 8192] [--steps 20] [--dtype auto] [--compile true]
                               [--attention auto] [--plain-logits false]

Everything runs in one process: steps in a plain loop, steps through Lightning with the callbacks of a stage, and the
matrix product rate of which the share is given. In both loops every part of every step is timed; data and framework are
the time that Lightning's steps took beyond their parts; framework_cpu is processor time, for a machine that is not
quiet. Documents come from memory through the real loader, with a
tokenizer that returns stored ids. A step is 4 micro-batches, 8,192 tokens, by default; the optimizer's share is also
given as if it were one. `--plain-logits true` adds the peak memory with a head that holds all logits in fp32. Prints a
table and a last line of JSON.
"""

import _bench  # isort: skip  (puts the project on the path)
import tempfile
import time
from pathlib import Path

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F

from callbacks.metrics import MetricsLog
from callbacks.runtime import GarbageControl
from callbacks.throughput import Throughput
from llm.cli.overrides import compose
from llm.data.loader import StepLayout, TextSteps
from llm.model.compile import compile_training
from llm.model.config import flops_per_token, num_params
from llm.model.gpt import GPT
from llm.optim.build import build_optimizer
from llm.scaling.rules import model_config
from llm.stages.step_module import StageContext, StepData, StepModule
from llm.stages.trainer import quiet_lightning

WARMUP = 3  # steps not counted


class Stored:
    """Source and tokenizer in one: 'documents' of random length that are already ids."""

    bos_id = 0

    def __init__(self, vocab: int):
        rng = np.random.default_rng(0)
        self.documents = [rng.integers(1, vocab, rng.integers(50, 1500), np.int32) for _ in range(2000)]

    def iterate(self, split, cursor=None, rank=0, world=1, loop=True):
        """Yield the stored documents for ever."""
        while True:
            for i, ids in enumerate(self.documents):
                yield ids, {"at": i}

    def encode_document(self, ids):
        """Return the ids unchanged."""
        return ids


def plain_loop(net: GPT, cfg, batches, steps: int) -> dict[str, float]:
    """Return the median seconds of the parts of a step in the shortest possible loop."""
    optimizer = build_optimizer(net, cfg.optim)
    parts = {"data": [], "passes": [], "update": []}
    for _ in range(steps + WARMUP):
        start = time.perf_counter()
        batch = next(batches)
        parts["data"].append(time.perf_counter() - start)
        parts["passes"].append(_bench.seconds_of(lambda batch=batch: passes(net, batch)))
        parts["update"].append(_bench.seconds_of(lambda: (optimizer.step(), optimizer.zero_grad(set_to_none=True))))
    return {name: _bench.median(values[WARMUP:]) for name, values in parts.items()}


def passes(net: GPT, batch: dict) -> None:
    """Run forward and backward pass of all micro-batches of a step."""
    for micro in batch["micro"]:
        ids, targets = (micro[name].to(_bench.DEVICE) for name in ("inputs", "targets"))
        (net(ids, targets, reduction="sum") / batch["n_trained"]).backward()


def passes_with_plain_logits(net: GPT, batch: dict) -> None:
    """Run forward and backward pass of all micro-batches of a step by way of all logits."""
    for micro in batch["micro"]:
        ids, targets = (micro[name].to(_bench.DEVICE) for name in ("inputs", "targets"))
        logits = net.logits(net.hidden(ids, is_training=True))
        (F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / batch["n_trained"]).backward()


def run_lightning(net: GPT, cfg, loader, steps: int, module: type[StepModule], *callbacks: L.Callback) -> None:
    """Train `steps` steps through Lightning as a stage does, with more callbacks in front of the stage's."""
    context = StageContext("bench", None, torch.ones(1), steps, net.config.seq_len)
    with tempfile.TemporaryDirectory() as folder:
        log = MetricsLog(Path(folder) / "metrics.csv", 10)
        trainer = L.Trainer(
            accelerator="auto",
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            logger=False,
            callbacks=[*callbacks, GarbageControl(), Throughput(10, peak_flops=1.0), log],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module(net, cfg.optim, cfg.stage, context), datamodule=StepData(lambda position: loader))


def lightning_loop(net: GPT, cfg, loader, steps: int) -> tuple[float, float, float]:
    """Return the median seconds of a step as a stage does it, of `training_step` in it, and of the CPU around that.

    The last is processor time of the thread that trains, which other programs of a busy machine do not lengthen.
    """
    marks, inside, around, ended = [], [], [], []

    class Timed(StepModule):
        def training_step(self, batch, batch_idx):
            if ended:
                around.append(time.thread_time() - ended[-1])
            inside.append(_bench.seconds_of(lambda: super(Timed, self).training_step(batch, batch_idx)))
            marks.append(time.perf_counter())
            ended.append(time.thread_time())

    run_lightning(net, cfg, loader, steps + WARMUP + 1, Timed)
    whole = [b - a for a, b in zip(marks[WARMUP:], marks[WARMUP + 1 :], strict=False)]
    return _bench.median(whole), _bench.median(inside[WARMUP + 1 :]), _bench.median(around[WARMUP:])


def build(args) -> tuple[GPT, object]:
    """Return the network for `args`, on the device and not compiled, and its configuration.

    `args.attention` becomes the name of the chosen backend.
    """
    words = [f"model=d{args.depth}", f"arch={args.arch}", f"optim={args.optim}", f"model.seq_len={args.seq_len}"]
    words += [f"arch.window_pattern={args.window}"] if args.arch == "modern" else []
    cfg = compose("train", words)
    net = GPT(model_config(cfg.model, cfg.arch, args.vocab)).init_weights(0).to(_bench.DEVICE)
    net.compute_dtype = args.dtype
    args.attention = net.set_attention(args.attention, _bench.DEVICE, fixed_shapes=True)
    return net, cfg


def loader_of(args) -> TextSteps:
    """Return a loader of steps of random documents."""
    stored = Stored(args.vocab)
    layout = StepLayout(args.seq_len, args.rows, args.micro, pin_memory=_bench.DEVICE.type == "cuda")
    return TextSteps(stored, stored, layout, split="train", buffer=1000)


def measure(args) -> dict:
    """Return times and memory of a training step, for `args` as in `main`."""
    quiet_lightning()
    net, cfg = build(args)
    config = net.config
    if args.compile == "true":
        compile_training(net)
    peak = _bench.matmul_rate(args.dtype)
    feed = loader_of(args)
    batch = next(iter(feed))
    first = _bench.seconds_of(lambda: passes(net, batch))
    net.zero_grad(set_to_none=True)
    parts = plain_loop(net, cfg, iter(feed), args.steps)
    batch = next(iter(feed))
    feed.close()
    memory = {"step_peak_mb": _bench.peak_bytes(lambda: passes(net, batch)) / 1e6}
    net.zero_grad(set_to_none=True)
    if args.plain_logits == "true":
        peak_bytes = _bench.peak_bytes(lambda: passes_with_plain_logits(net, batch))
        memory["step_peak_mb_with_plain_logits"] = peak_bytes / 1e6
        net.zero_grad(set_to_none=True)
    whole, inside, around = lightning_loop(net, cfg, loader_of(args), args.steps)
    total, tokens = sum(parts.values()), args.rows * args.seq_len * args.micro
    rate = tokens * flops_per_token(config) / total
    return (
        vars(args)
        | {
            "params": num_params(config)["total"],
            "first_step_s": first,
            "data_ms": 1000 * parts["data"],
            "forward_backward_ms": 1000 * parts["passes"],
            "optimizer_ms": 1000 * parts["update"],
            "framework_ms": 1000 * (whole - inside),
            "framework_cpu_ms": 1000 * around,
            "tok_per_s": tokens / total,
            "flops_per_s": rate,
            "matmul_flops_per_s": peak,
            "share_of_matmul_rate": rate / peak,
            "optimizer_share": parts["update"] / total,
            "optimizer_share_of_one_micro": parts["update"] / (total - (1 - 1 / args.micro) * parts["passes"]),
            "framework_share": (whole - inside) / whole,
            "framework_cpu_share": around / (inside + around),
            "lightning_to_plain": whole / total,
        }
        | memory
    )


def main() -> None:
    """Measure a step in both loops and print the results."""
    numbers = {"depth": 4, "seq-len": 512, "rows": 4, "micro": 4, "vocab": 8192, "steps": 20}
    choices = {"compile": "true", "attention": "auto", "plain-logits": "false"}
    _bench.show(measure(_bench.arguments(__doc__, numbers, arch="modern", optim="muon_adamw", window="L", **choices)))


if __name__ == "__main__":
    main()
