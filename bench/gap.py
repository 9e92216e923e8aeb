"""Engine and trainer: how far apart their log-probabilities are, beside a run in which that is broken on purpose.

    python bench/gap.py [--parent demo/sft] [--runs runs] [--steps 40] [--every 10] [--out gap] [--set experiment=demo]

Trains `stage=grpo` three times from one model and one seed: as it is, in bf16, and with a fault that training systems
with an engine of their own have had: the engine gets new weights only after every tenth update. What is finished is
not trained again. Prints the numbers of some steps, writes <out>.png, and ends with a line of JSON.
"""

import _bench  # isort: skip  # noqa: F401  (puts the project on the path)
import argparse
import copy
import csv
import json
import subprocess
import sys
from pathlib import Path

from llm.report.plots import COLOURS
from llm.utils.format import print_table

REPO = Path(__file__).resolve().parent.parent
SMOOTH = 5  # steps of which the reward is averaged
COLUMNS = {"logprob_gap": "nats", "ess": "share of tokens", "reward": f"mean of {SMOOTH} steps", "pass@1": "held out"}
Rows = list[dict[str, float]]


def main() -> None:
    """Train what is missing, then print and draw."""
    args = arguments()
    stale = f"engine's weights up to {args.every - 1} updates old"
    variants = {"as it is": (1, []), "bf16": (1, ["precision.compute=bf16"]), stale: (args.every, [])}
    found = {}
    for number, (name, (every, settings)) in enumerate(variants.items()):
        run = f"gap-{number}-{every}"
        common = [f"paths.runs={args.runs}", *args.set, "stage=grpo", f"run={run}", f"init_from={args.parent}"]
        common += [f"max_steps={args.steps}", f"stage.eval_every={max(1, args.steps // 4)}", "log_every=1"]
        line = [sys.executable, str(Path(__file__).resolve()), "--train", str(every), *common, *settings]
        if subprocess.run(line, cwd=REPO, check=False).returncode:
            sys.exit(f"the training {run} ended with an error")
        found[name] = rows_of(Path(args.runs) / run / "grpo" / "metrics.csv")
    show(found, args.steps)
    plot(args.out.with_suffix(".png"), found)
    print(json.dumps({name: summary(rows) for name, rows in found.items()}))


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parent", default="demo/sft", help="run/stage to start from (default: demo/sft)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (default: runs)")
    parser.add_argument("--steps", type=int, default=40, help="updates of each training (default: 40)")
    parser.add_argument("--every", type=int, default=10, help="updates between new weights of the broken engine")
    parser.add_argument("--out", type=Path, default=Path("gap"), help="the plot, <out>.png")
    parser.add_argument("--set", nargs="*", default=["experiment=demo"], help="settings of every training")
    args = parser.parse_args()
    args.runs = args.runs.resolve()
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Trainings


class StaleWeights:
    """Stands in for `full_model` of the rollouts: gives a copy of the network that only every n-th rollout renews."""

    def __init__(self, every: int, full_model):
        self.every, self.full_model, self.rollouts, self.kept = every, full_model, 0, None

    def __call__(self, net):
        if self.rollouts % self.every == 0:
            self.kept = copy.deepcopy(self.full_model(net))
        self.rollouts += 1
        return self.kept


def train(every: int, settings: list[str]) -> None:
    """Run train.py with an engine that gets new weights after so many updates."""
    from llm.cli.app import run_app
    from llm.stages import rollouts

    if every > 1:
        rollouts.full_model = StaleWeights(every, rollouts.full_model)
    sys.argv = [str(REPO / "train.py"), *settings]
    run_app("train", "llm.stages.run_stage.run_stage")


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def rows_of(path: Path) -> Rows:
    """Return the numbers of metrics.csv by row, empty cells left out."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


def summary(rows: Rows) -> dict[str, float]:
    """Return the mean gap and effective sample size of all steps, the largest gap, and the last pass rate."""
    gaps, shares = ([row[key] for row in rows if key in row] for key in ("logprob_gap", "ess"))
    last = [row["pass@1"] for row in rows if "pass@1" in row][-1]
    numbers = {"logprob_gap": sum(gaps) / len(gaps), "largest_mean_gap": max(gaps)}
    return numbers | {"ess": sum(shares) / len(shares), "pass@1": last}


def show(found: dict[str, Rows], steps: int) -> None:
    """Print gap, effective sample size and reward of five steps, and the last pass rate."""
    chosen = sorted({1, *(max(1, steps * part // 4) for part in range(1, 5))})
    lines = []
    for name, rows in found.items():
        by_step = {int(row["step"]): row for row in rows}
        for column, digits in (("logprob_gap", "{:.1e}"), ("ess", "{:.4f}"), ("reward", "{:.2f}")):
            lines.append([name, column, *(digits.format(by_step[step][column]) for step in chosen)])
    print_table(["run", "column", *(f"step {step}" for step in chosen)], lines)
    print({name: f"pass@1 {100 * summary(rows)['pass@1']:.1f} %" for name, rows in found.items()})


def plot(path: Path, found: dict[str, Rows]) -> None:
    """Draw each column of all runs over the steps, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.9), layout="constrained", dpi=100)
    panels = figure.subplots(1, len(COLUMNS))
    for axes, (column, unit) in zip(panels, COLUMNS.items(), strict=True):
        for colour, (name, rows) in zip(COLOURS, found.items(), strict=False):
            points = [(row["step"], row[column]) for row in rows if column in row]
            xs, ys = zip(*points, strict=True)
            if column == "reward":
                ys = [sum(part) / len(part) for part in (ys[max(0, i - SMOOTH + 1) : i + 1] for i in range(len(ys)))]
            axes.plot(xs, ys, label=name, color=colour, linewidth=1.3, marker="o" if column == "pass@1" else None)
        axes.set_title(f"{column} ({unit})", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(color="#E5E5E5", linewidth=0.7)
    panels[0].set_yscale("log")
    figure.supxlabel("step", fontsize=9)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False, fontsize=9)
    figure.savefig(path)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(int(sys.argv[2]), sys.argv[3:])
    else:
        main()
