"""Steps that optimizers need to a target, on one model, data, batch and schedule: a table, and a last line of JSON.

    python bench/optimizers.py [--set model=d4 data=local data.path=text ...] [--methods muon_adamw soap ...]
                       [--steps 600] [--target 1.55] [--factors 0.5 1 2] [--scalar-factors 0.1 1] [--seeds 1 2 3]
                       [--tuning-seed 0] [--share muon_adamw] [--evaluations 40] [--vocab 8192]
                       [--out bench_optimizers] [--plot FILE] [--list]

Every method of `METHODS` but `default` is tuned alike before it is compared, or its place says nothing (Fantastic
Optimizers, arXiv 2509.02046): with a seed of its own, first its rate for the block matrices, then the rates of
embedding, value embeddings and head together, both by `--factors`, then that of the x0 scalars by `--scalar-factors`,
each time the lowest bpb after the last step. A method without such keys has fewer. With `--share`, methods take the
factors that were found for the named one, but for that of the matrices, which alone is tuned: so it costs less than
half, and is as fair where a method changes nothing but the matrices. Then come the seeds of the table.
`default` is today's muon_adamw with the rates it has. As in the third track of modded-nanogpt only the steps count: the
first at which the validation's bits per byte are at most the target, on a line between two evaluations. Without
`--target` this is the mean that `default` ends with, so that it needs all steps. Trainings are jobs of the queue
<out>/queue.sqlite and runs in <out>/runs. What is done is not done again, so the command goes on where it was stopped;
with other settings it takes another --out.
"""

import _bench  # isort: skip  # noqa: F401  (puts the project on the path)
import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from llm.cli.overrides import compose
from llm.errors import UserError
from llm.experiments.queue import jobs_of
from llm.experiments.queue_store import OPEN, Queue
from llm.experiments.runs import MOST_NAMED
from llm.experiments.worker import work
from llm.report.plots import COLOURS, WIDTH, drawing
from llm.run.stage_folder import read_metrics
from llm.utils.format import print_table, value

FIXED = ["model=d4", "model.seq_len=512", "batch.tokens_per_step=8192", "batch.micro_batch_size=4", "data=embedded"]
QUIET = ["stage.sample_every=0", "stage.core_every=0", "keep_last=1"]
TABLES, SCALARS = ("embedding_lr", "value_lr", "unembedding_lr"), ("x0_lr",)
BASELINE, TOKENIZER = "default", "tokenizer"


@dataclass(frozen=True)
class Method:
    """An optimizer: its settings, and the keys of `optim` that are tuned, one group of them after the other."""

    settings: tuple[str, ...] = ()
    rates: tuple[tuple[str, ...], ...] = (("matrix_lr",), TABLES, SCALARS)


METHODS = {
    "default": Method(rates=()),
    "muon_adamw": Method(),
    "muon_2025": Method(("optim=muon_2025",)),
    "adamw": Method(("optim=adamw", "optim.lr=0.002"), (("lr",),)),
    "adamh": Method(("optim=adamw", "optim.hyperball=true", "optim.lr=0.01"), (("lr",),)),
    "average": Method(("stage.average_steps=50",)),
    "soap": Method(("optim.soap_beta=0.9",)),
    "soap_average": Method(("optim.soap_beta=0.9", "stage.average_steps=50")),
    "muon2": Method(("optim.muon2_beta=0.95",)),
    "two_averages": Method(("optim.slow_momentum=0.98",)),
    "normuon_rows": Method(("optim.normuon_rows=true",)),
    "cautious": Method(("optim.cautious_update=true",)),
    "row_floor": Method(("optim.row_floor=0.38",)),
    "muonh": Method(("optim.hyperball=true",)),
    "per_head": Method(("optim.per_head=true",)),
    "dion": Method(("optim.dion_rank=0.25",)),
}


def main() -> int:
    """Tune, train and compare what is missing, then print the table. Returns the exit status."""
    args = arguments()
    if args.list:
        print("\n".join(f"{name:14} {' '.join(method.settings)}" for name, method in METHODS.items()))
        return 0
    try:
        bench = Bench(args)
        chosen = {name: bench.tuned(name) for name in args.methods}
        curves = bench.curves({(name, seed): (name, chosen[name], seed) for name in chosen for seed in args.seeds})
        show(args, chosen, curves)
        if args.plot is not None:
            draw(args.plot, {name: [curves[name, seed] for seed in args.seeds] for name in chosen})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", nargs="*", default=[], help=f"settings of every training, behind {' '.join(FIXED)}")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=[*METHODS], metavar="NAME")
    parser.add_argument("--steps", type=int, default=600, help="steps of a training (default: 600)")
    parser.add_argument("--target", type=float, help=f"bits per byte to reach (default: where {BASELINE} ends)")
    parser.add_argument("--factors", nargs="+", type=float, default=[0.5, 1, 2], help="of the rates that are tried")
    parser.add_argument("--scalar-factors", nargs="+", type=float, default=[0.1, 1], help="of the x0 scalars' rate")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of the table")
    parser.add_argument("--tuning-seed", type=int, default=0, help="of the search for rates")
    parser.add_argument("--share", choices=[*METHODS], metavar="NAME", help="take its factors, but for matrix_lr")
    parser.add_argument("--evaluations", type=int, default=40, help="of a training (default: 40)")
    parser.add_argument("--vocab", type=int, default=8192, help="size of the vocabulary (default: 8192)")
    parser.add_argument("--out", type=Path, default=Path("bench_optimizers"), help="folder of queue and runs")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves of all methods as PNG")
    parser.add_argument("--list", action="store_true", help="print the methods and end")
    args = parser.parse_args()
    if args.target is None and BASELINE not in args.methods:
        parser.error(f"give --target, or {BASELINE} among the --methods")
    if args.tuning_seed in args.seeds and len(args.factors) + len(args.scalar_factors) > 2:
        parser.error(f"--tuning-seed {args.tuning_seed} is a seed of the table; rates would be chosen by what they win")
    return args


class Bench:
    """Trains runs through the queue. A run is (name of the method, factors of its groups of rates, seed)."""

    def __init__(self, args: argparse.Namespace) -> None:
        args.out.mkdir(parents=True, exist_ok=True)
        self.args, self.queue = args, Queue(args.out / "queue.sqlite")
        of_stage = [word for word in args.set if word.startswith("stage.")]  # of pretraining, not of the tokenizer
        self.common = [*FIXED, *(word for word in args.set if word not in of_stage)]
        self.common += [f"paths.runs={(args.out / 'runs').resolve()}"]
        self.stage = [*of_stage, *QUIET, f"max_steps={args.steps}"]
        self.train({TOKENIZER: ["stage=tokenizer", f"stage.vocab_size={args.vocab}", "run=tokenizer"]})

    def tuned(self, name: str) -> tuple[float, ...]:
        """Return the factors on a method's groups of rates with the lowest last bpb, found one after the other."""
        rates, shared = METHODS[name].rates, self.args.share
        chosen = [1.0] * len(rates)
        if shared not in (None, name) and rates[1:] == METHODS[shared].rates[1:]:
            rates, chosen[1:] = rates[:1], self.tuned(shared)[1:]
        for at, keys in enumerate(rates):
            factors = self.args.scalar_factors if keys == SCALARS else self.args.factors
            tried = {factor: (*chosen[:at], factor, *chosen[at + 1 :]) for factor in factors}
            if len(tried) > 1:
                curves = self.curves({f: (name, tried[f], self.args.tuning_seed) for f in tried})
                chosen[at] = min(curves, key=lambda factor: curves[factor][-1][1])
            else:
                chosen[at] = factors[0]
        return tuple(chosen)

    def curves(self, runs: dict) -> dict:
        """Train runs that are missing and return the (step, bpb) of each, by their keys in `runs`."""
        self.train({name_of(run): self.settings(*run) for run in runs.values()})
        return {key: curve(self.folder(name_of(run))) for key, run in runs.items()}

    def settings(self, name: str, factors: tuple[float, ...], seed: int) -> list[str]:
        """Return what a training is told beside what all are."""
        method, every = METHODS[name], max(1, self.args.steps // self.args.evaluations)
        optim = compose("train", [*self.common, *method.settings]).optim
        rates = [(key, factor) for keys, factor in zip(method.rates, factors, strict=True) for key in keys]
        return [
            *("stage=pretrain", f"run={name_of((name, factors, seed))}", f"init_from={TOKENIZER}/tokenizer"),
            *(f"seed={seed}", f"stage.eval_every={every}", *self.stage, *method.settings),
            *(f"optim.{key}={optim[key] * factor:.6g}" for key, factor in rates),
        ]

    def folder(self, run: str) -> Path:
        """Return the stage folder of a run."""
        return self.args.out / "runs" / run / ("tokenizer" if run == TOKENIZER else "pretrain")

    def train(self, wanted: dict[str, list[str]]) -> None:
        """Work off the queue until these runs are done.

        Raises UserError where one is not, and where one has other settings: its numbers are not those of this command.
        """
        jobs = {job.folder: job for job in self.queue.jobs() if job.state in (*OPEN, "done")}
        missing = []
        for run, settings in wanted.items():
            words = [*self.common, *settings]
            job = jobs.get(str(self.folder(run).resolve()))
            if job is None:
                missing.append(words)
            elif others := set(job.settings) ^ set(words):
                raise UserError(
                    f"--out {self.args.out}: {run} was begun with other settings than this command has "
                    f"({', '.join(sorted(others)[:MOST_NAMED])}); name another folder"
                )
        for words in missing:
            self.queue.add(jobs_of(words, family="optimizers"))
        states = {}
        work(self.queue, say=lambda line: print(line, file=sys.stderr, flush=True))
        for job in self.queue.jobs():
            states[job.folder] = job.state if job.state != "failed" else f"failed: {job.message}"
        for run in wanted:
            state = states[str(self.folder(run).resolve())]
            if state != "done":
                raise UserError(f"{run} is {state}; the same command goes on")


def name_of(run: tuple) -> str:
    """Return the name of the folder of a run."""
    name, factors, seed = run
    return "-".join([name, *(f"{factor:g}" for factor in factors), str(seed)])


def curve(folder: Path) -> list[tuple[int, float]]:
    """Return the steps of a stage's evaluations and their bits per byte."""
    return [(int(row["step"]), row["bpb"]) for row in read_metrics(folder) if "bpb" in row]


def steps_to(target: float, points: list[tuple[int, float]]) -> float | None:
    """Return the first step at which a line between evaluations (step, bpb) is at most the target, None for never."""
    if points[0][1] <= target:
        return float(points[0][0])
    for (before, high), (step, low) in pairwise(points):
        if low <= target:
            return before + (step - before) * (high - target) / (high - low)
    return None


def show(args: argparse.Namespace, chosen: dict, curves: dict) -> None:
    """Print the table, the fewest steps first, and all numbers as one line of JSON."""
    last = {name: [curves[name, seed][-1][1] for seed in args.seeds] for name in chosen}
    target = statistics.fmean(last[BASELINE]) if args.target is None else args.target
    rows = []
    for name, factors in chosen.items():
        steps = [steps_to(target, curves[name, seed]) for seed in args.seeds]
        reached = [one for one in steps if one is not None]
        row = {"method": name, "factors": factors, "bpb": statistics.fmean(last[name])}
        row |= {"bpb_stderr": stderr(last[name]), "steps": steps, "reached": len(reached)}
        complete = len(reached) == len(steps)  # a mean over those that arrived would flatter
        row |= {"mean_steps": statistics.fmean(reached) if complete else None}
        row |= {"steps_stderr": stderr(reached) if complete else None}
        if name == BASELINE and args.target is None:  # half of its seeds end above their mean
            row |= {"mean_steps": float(args.steps), "steps_stderr": None}
        rows.append(row)
    baseline = next((row["mean_steps"] for row in rows if row["method"] == BASELINE), None)
    for row in rows:
        row["share"] = row["mean_steps"] / baseline if row["mean_steps"] and baseline else None
    rows.sort(key=lambda row: (row["mean_steps"] is None, row["mean_steps"] or 0.0, row["bpb"]))
    header = ["method", "rates", "steps to target", f"of {BASELINE}", "reached", "last bpb"]
    print_table(
        header,
        [
            [
                *(row["method"], ", ".join(f"x {factor:g}" for factor in row["factors"]) or "as they are"),
                *(value(row["mean_steps"], row["steps_stderr"], 1), value(row["share"])),
                *(f"{row['reached']}/{len(args.seeds)}", value(row["bpb"], row["bpb_stderr"])),
            ]
            for row in rows
        ],
        f"target {target:.4f} bpb, {args.steps} steps, seeds {', '.join(map(str, args.seeds))}",
    )
    print(json.dumps({"target": target, "steps": args.steps, "seeds": args.seeds, "methods": rows}))


def draw(path: Path, curves: dict[str, list[list[tuple[int, float]]]]) -> None:
    """Draw bpb by step, above, and the difference to the first method, below: means over seeds, from lowest to highest.

    curves: (step, bpb) of each seed by method; the same steps in all. The first quarter is left out: it is steep.
    """
    first = next(iter(curves))
    with drawing(path, "Bits per byte by optimizer", (WIDTH, 5.6)) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        for colour, (name, seeds) in zip(COLOURS, curves.items(), strict=False):
            steps = [step for step, _ in seeds[0] if step >= seeds[0][-1][0] / 4]
            values = [[bpb for step, bpb in one if step in steps] for one in seeds]
            base = [[bpb for step, bpb in one if step in steps] for one in curves[first]]
            apart = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(values, base, strict=True)]
            for ax, lines in ((above, values), (below, apart)):
                at_step = list(zip(*lines, strict=True))
                ax.fill_between(steps, [min(v) for v in at_step], [max(v) for v in at_step], color=colour, alpha=0.2)
                ax.plot(steps, [statistics.fmean(v) for v in at_step], color=colour, linewidth=1.6, label=name)
        above.set_ylabel("bits per byte")
        below.set_ylabel(f"less that of {first}, same seed")
        below.set_xlabel("step")
        above.legend(loc="upper right")


def stderr(values: list[float]) -> float | None:
    """Return the standard error of a mean, None of fewer than two values."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


if __name__ == "__main__":
    sys.exit(main())
