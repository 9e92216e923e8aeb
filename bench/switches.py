"""Seconds of a training step with a switch over those without, for the table of switches in docs/lab_notebook.md.

    python bench/switches.py --text FOLDER [--depth 4] [--repeats 8]
        [--only ngrams soap ngram_rows+qk_dim ngram_rows+stage.sampled_softmax=0.5]
        [--set model.n_kv_head=1] [--compiled]

FOLDER holds text (`data=local data.path`); the tokenizer is trained on it first. Each switch trains beside the plain
form, steps in turn, each on its own copy of the network and on the same text: forward and backward passes of all
micro-batches, and the update. A step's time is the processor's (`time.process_time`), which others on the machine
hardly change; so run it with one thread. --compiled compiles both, as runs of 500 steps and more are. Prints a table
and a last line of JSON.
"""

import _bench  # isort: skip  (puts the project on the path)
import argparse
import json
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

from llm.cli.overrides import compose
from llm.model.linear import Table
from llm.optim.build import build_optimizer
from llm.run.stage_folder import RunDir
from llm.stages.pretrain import build
from llm.stages.run_stage import run_stage
from llm.stages.step_module import StepModule
from llm.utils.format import markdown_table

SWITCHES = {
    "ngrams": ("arch.ngrams=[2,3]",),
    "ngram_rows": ("arch.ngrams=[2,3]", "arch.ngram_rows=16"),
    "copy_candidate": ("arch.copy_candidate=true",),
    "exclusive_attention": ("arch.exclusive_attention=true",),
    "attention_gate": ("arch.attention_gate=true",),
    "key_offset": ("arch.key_offset=true",),
    "paired_heads": ("arch.paired_heads=all",),
    "qk_dim": ("arch.qk_dim=64",),
    "leaky": ("arch.activation=leaky_relu_squared",),
    "asymmetric_cap": ("arch.asymmetric_cap=true",),
    "loops": ("arch.loops=2",),
    "sampled_softmax": ("stage.sampled_softmax=0.2",),
    "multi_token": ("stage.multi_token=0.5",),
    "prefix_token": ("stage.prefix_token=0.2",),
    "soap": ("optim.soap_beta=0.9",),
    "muon2": ("optim.muon2_beta=0.95",),
    "slow_momentum": ("optim.slow_momentum=0.98",),
    "normuon_rows": ("optim.normuon_rows=true",),
    "cautious_update": ("optim.cautious_update=true",),
    "row_floor": ("optim.row_floor=0.38",),
    "hyperball": ("optim.hyperball=true",),
    "per_head": ("optim.per_head=true",),
    "adamh": ("optim=adamw", "optim.hyperball=true", "optim.lr=0.01"),
    "dion": ("optim.dion_rank=0.25",),
}
STEPS = 6  # different ones, which are repeated


def stepper(lines: list[str], tokenizer: Path, compiled: bool) -> Callable[[], None]:
    """Build the stage that `lines` configure; return a function that trains it for the next step."""
    cfg = compose("train", [*lines, f"compile={compiled}", "stage.eval_every=0"])
    built = build(cfg, tokenizer)
    module: StepModule = built.module
    module.context.options.prepare(module.net, _bench.DEVICE, False, "pretrain", module.context.total_steps)
    module.net.to(_bench.DEVICE)
    for part in module.net.modules():
        if isinstance(part, Table):  # as a single process trains
            part.keeps_gradient = _bench.DEVICE.type == "cpu"
    optimizer = optimizer_of(module)
    batches = cycle(list(islice(built.data.train_dataloader(), STEPS)))

    def step() -> None:
        batch = next(batches)
        for micro in batch["micro"]:
            micro = {name: value.to(_bench.DEVICE) for name, value in micro.items()}
            (module.micro_loss(micro) / batch["n_trained"]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def optimizer_of(module: StepModule):
    """Return the optimizer of a stage that no Trainer runs, with the rates of its first step."""
    context = module.context
    optimizer = build_optimizer(module.net, module.optim_config, context.lr_scale, context.decay_scale)
    module.apply_schedules(optimizer.param_groups)
    return optimizer


def main() -> None:
    """Time all switches, one after the other, each against the plain form."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument(
        "--only", nargs="+", default=list(SWITCHES), help="names above, settings, or several joined by +"
    )
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--set", nargs="+", default=[])
    args = parser.parse_args()
    named = {part for name in args.only for part in name.split("+") if "=" not in part}
    if unknown := named - set(SWITCHES):
        parser.error(f"--only {', '.join(sorted(unknown))}: choose among {', '.join(SWITCHES)}")
    chosen = {name: [line for part in name.split("+") for line in SWITCHES.get(part, (part,))] for name in args.only}
    with tempfile.TemporaryDirectory() as folder:
        plain = [f"model=d{args.depth}", "model.seq_len=512", "arch.window_pattern=L", "data=local"]
        plain += [f"data.path={args.text}", "batch.tokens_per_step=8192", "batch.micro_batch_size=4", "max_steps=300"]
        plain += [f"paths.runs={folder}", "run=bench", *args.set]
        run_stage(compose("train", [*plain, "stage=tokenizer", "stage.vocab_size=8192"]))
        tokenizer = RunDir(folder, "bench").model_dir("tokenizer")
        rows = []
        for name, settings in chosen.items():
            steps = {
                one: stepper([*plain, "stage=pretrain", *more], tokenizer, args.compiled)
                for one, more in (("plain", ()), (name, settings))
            }
            seconds = _bench.alternating(steps, args.repeats, clock=time.process_time)
            rows.append({"switch": name, "settings": settings, "plain_ms": 1000 * seconds["plain"]})
            rows[-1] |= {"ms": 1000 * seconds[name], "ratio": seconds[name] / seconds["plain"]}
            print(f"{name}: {rows[-1]['ratio']:.3f}", flush=True)
    table = [
        [f"`{' '.join(r['settings'])}`", f"{r['plain_ms']:.0f}", f"{r['ms']:.0f}", f"{r['ratio']:.3f}"] for r in rows
    ]
    print(markdown_table(["switch", "plain, ms", "with, ms", "ratio"], table, {1, 2, 3}))
    print(json.dumps({"depth": args.depth, "compiled": args.compiled, "switches": rows}))


if __name__ == "__main__":
    main()
