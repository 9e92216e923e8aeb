"""A network of one head that trains in milliseconds through the real module, checkpoints and callbacks."""

import csv
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import torch
from conftest import compose

from callbacks.checkpoint import StepCheckpoint
from callbacks.metrics import MetricsLog
from callbacks.runtime import CleanStop, GarbageControl
from callbacks.throughput import Throughput
from llm.checkpoint.resume import CheckpointWriter
from llm.model.config import GPTConfig
from llm.model.gpt import GPT
from llm.stages.step_module import StageContext, StepData, StepModule
from llm.stages.trainer import begin_always

OPTIM = compose("train", "optim=muon_2025", "optim.momentum_warmup=4").optim
STAGE = SimpleNamespace(lr_frac=1.0, warmup_steps=0, warmdown_ratio=0.5, final_lr_frac=0.0)
CONFIG = GPTConfig(2, 1, 1, 16, 16, 8, 70)
STEPS = 6


def net(seed=0, config=CONFIG) -> GPT:
    model, g = GPT(config).init_weights(seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return model


def step_batch(step: int, rows=4, split=2) -> dict:
    """A batch that depends on its number alone; some targets ignored."""
    g = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 70, (rows, 9), generator=g)
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=g) < 0.3] = -1
    micro = [{"inputs": x, "targets": y} for x, y in zip(inputs.split(split), targets.split(split), strict=True)]
    return {
        "micro": micro,
        "n_trained": int((targets >= 0).sum()),
        "n_tokens": inputs.numel(),
        "state": {"next": step + 1},
    }


class Numbers:
    """Loader whose position is the number of the next batch."""

    def __init__(self, position, make=step_batch):
        self.next, self.make = 0 if position is None else position["next"], make

    def __len__(self):
        return 10**9

    def __iter__(self):
        while True:
            yield self.make(self.next)
            self.next += 1


def make_module(total=STEPS) -> StepModule:
    return StepModule(net(), OPTIM, STAGE, StageContext("pretrain", None, torch.ones(70), total, 8))


def fit(
    folder,
    make=step_batch,
    ckpt=None,
    extra=(),
    save_every=2,
    total=STEPS,
    module=None,
    log_every=1,
    minutes=None,
    first=(),
):
    module = module or make_module(total)
    checkpoint = StepCheckpoint(save_every, folder / "checkpoints", minutes)
    stop = CleanStop(checkpoint)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=total,
        max_epochs=-1,
        logger=False,
        callbacks=[
            *first,
            checkpoint,
            stop,
            GarbageControl(),
            *extra,
            Throughput(log_every, 1e9),
            MetricsLog(folder / "metrics.csv", log_every),
        ],
        plugins=[CheckpointWriter()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    begin_always(trainer)
    folder.mkdir(parents=True, exist_ok=True)
    data = StepData(lambda position: Numbers(position, make))
    trainer.fit(module, datamodule=data, ckpt_path=None if ckpt is None else str(ckpt))
    return module, stop


def pretrain(folder, ckpt=None, extra=(), config=None, tokenizer=None, **keys) -> StepModule:
    """Train six steps with keys of stage=pretrain; returns the module."""
    stage = compose("train", "stage=pretrain").stage
    for key, value in ({"warmup_steps": 0} | keys).items():
        stage[key] = value
    model = net(config=replace(CONFIG, window_multiple=None) if config is None else config)
    context = StageContext("pretrain", tokenizer, torch.ones(model.config.vocab_size), STEPS, 8)
    return fit(folder, module=StepModule(model, OPTIM, stage, context), ckpt=ckpt, extra=extra)[0]


def weights(module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.net.parameters()]


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


class StopAt(L.Callback):
    """Sends the process a signal during a step, as Ctrl-C or a scheduler would."""

    def __init__(self, step, signum=signal.SIGTERM):
        self.step, self.signum = step, signum

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.global_step == self.step - 1:
            os.kill(os.getpid(), self.signum)
