"""Milliseconds of a step on several processes of this machine by strategy, and how long a checkpoint makes it wait.

    python bench/strategies.py [--processes 2] [--depth 6] [--vocab 8192] [--rows 2] [--seq 256] [--steps 8]
        [--strategies muon,muon-early,ddp,fsdp]

Every strategy trains one network for some steps, in turns and by one set of processes, each with a fair share of the
cores; muon-early is muon with `strategy.early_sums`. The first two steps of a round are left out. Prints a table and a
last line of JSON.
"""

import _bench  # isort: skip  (puts the project on the path)
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightning as L
import torch

from llm.checkpoint.resume import CheckpointWriter
from llm.cli.overrides import compose
from llm.model.gpt import GPT
from llm.parallel import collectives
from llm.parallel.env import end
from llm.parallel.launch import child_env, free_port
from llm.parallel.process_group import join
from llm.parallel.strategy import layout_of_processes, make_strategy
from llm.scaling.rules import model_config
from llm.stages.step_module import StageContext, StepData, StepModule
from llm.stages.trainer import quiet_lightning

STRATEGIES = "muon,muon-early,ddp,fsdp"


class Clock(L.Callback):
    """Callback that records the seconds of every step, and of saving as {asynchronous or not: seconds}."""

    def __init__(self, path: Path):
        self.path, self.seconds, self.at, self.saves = path, [], None, {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        now = time.perf_counter()
        if self.at is not None:
            self.seconds.append(now - self.at)
        self.at = now

    def on_train_end(self, trainer, module) -> None:
        writer = trainer.strategy.checkpoint_io
        for writer.asynchronous in (True, True, False):  # the first one also asks the system for memory
            writer.finish()
            collectives.barrier()
            start = time.perf_counter()
            trainer.save_checkpoint(self.path)
            self.saves[writer.asynchronous] = time.perf_counter() - start


class Steps:
    """Endless loader of one batch of random tokens."""

    def __init__(self, vocab: int, rows: int, seq: int):
        ids = torch.randint(vocab, (rows, seq + 1), generator=torch.Generator().manual_seed(collectives.rank()))
        micro = [{"inputs": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}]
        self.batch = {"micro": micro, "n_trained": rows * seq, "n_tokens": rows * seq, "state": {}}

    def __len__(self) -> int:
        return 10**9

    def __iter__(self):
        while True:
            yield self.batch


def train(name: str, args, folder: Path) -> Clock:
    """Train a network by one strategy for `args.steps` steps; return the clock."""
    cfg = compose("train", [f"model=d{args.depth}", f"model.seq_len={args.seq}"])
    net = GPT(model_config(cfg.model, cfg.arch, args.vocab)).init_weights(0)
    net.compute_dtype = args.dtype
    clock, context = Clock(folder / "step_000001.ckpt"), StageContext("bench", None, None, args.steps, args.seq)
    trainer = L.Trainer(
        accelerator=_bench.DEVICE.type.replace("cuda", "gpu"),
        **layout_of_processes(),
        strategy=make_strategy(name.removesuffix("-early"), name.endswith("-early")),
        max_steps=args.steps,
        max_epochs=-1,
        logger=False,
        callbacks=[clock],
        plugins=[CheckpointWriter()],
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    net.set_attention("auto", trainer.strategy.root_device, True)
    data = StepData(lambda position: Steps(args.vocab, args.rows, args.seq))
    trainer.fit(StepModule(net, cfg.optim, cfg.stage, context), datamodule=data)
    return clock


def work(args, folder: Path) -> None:
    """Run all strategies in turn, as one of the processes; the main one writes the medians to result.json."""
    quiet_lightning()
    join(on_gpu=_bench.DEVICE.type == "cuda")
    names = args.strategies.split(",")
    steps, saves, syncs = ({name: [] for name in names} for _ in range(3))
    for _ in range(args.rounds):
        for name in names:
            clock = train(name, args, folder)
            steps[name] += clock.seconds[1:]
            saves[name].append(clock.saves[True])
            syncs[name].append(clock.saves[False])
    if collectives.is_main():
        medians = [{name: _bench.median(values) for name, values in by.items()} for by in (steps, saves, syncs)]
        (folder / "result.json").write_text(json.dumps(medians))
    collectives.barrier()
    end(0)


def main() -> None:
    """Start the processes, wait for them and print the results."""
    numbers = {"processes": 2, "depth": 6, "vocab": 8192, "rows": 2, "seq": 256, "steps": 8, "rounds": 3}
    args = _bench.arguments(__doc__, numbers, strategies=STRATEGIES)
    if "RANK" in os.environ:
        return work(args, Path(os.environ["FATHOM_BENCH"]))
    with tempfile.TemporaryDirectory() as folder:
        port, command = free_port(), [sys.executable, *sys.argv]
        environments = [child_env(k, args.processes, port) | {"FATHOM_BENCH": folder} for k in range(args.processes)]
        started = [subprocess.Popen(command, env=environment) for environment in environments]
        if any(process.wait() for process in started):
            raise SystemExit("a process failed")
        steps, saves, syncs = json.loads((Path(folder) / "result.json").read_text())
    result = vars(args) | {f"{name}_step_ms": 1000 * seconds for name, seconds in steps.items()}
    first = next(iter(steps))
    result |= {f"{name}_to_{first}": steps[name] / steps[first] for name in steps}
    result |= {f"{name}_checkpoint_waits_ms": 1000 * seconds for name, seconds in saves.items()}
    result |= {f"{name}_checkpoint_to_sync": saves[name] / syncs[name] for name in steps}
    _bench.show(result)
    return None


if __name__ == "__main__":
    main()
