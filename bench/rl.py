"""Methods of post-training from one finetuned model, with seeds: a table of gains, forgetting and seconds, and plots.

    python bench/rl.py [--parent demo/sft] [--runs runs] [--methods grpo ppo dpo] [--seeds 0 1 2] [--items 1000]
                       [--out bench_rl] [--set experiment=demo] [--quick] [--list]

Every method of `METHODS` starts from the same model and is trained by `train.py`, then measured by `evaluate.py`: on
arithmetic with four drawn answers per item (pass@1, pass@4), and greedily on the tasks that it could forget. What is
finished is not done again, so the command goes on where it was stopped. Gains are in points over the parent, which is
measured by the same commands; the error of a mean is its standard error over seeds, or that of the items where there
is one seed. Prints a table, writes <out>.json and <out>.png, and ends with a line of JSON.
"""

import _bench  # isort: skip  # noqa: F401  (puts the project on the path)
import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm.utils.files import read_json, write_json
from llm.utils.format import print_table

REPO = Path(__file__).resolve().parent.parent
GAINED, FORGOTTEN = "arithmetic", ("choice", "spelling", "identity")
SAMPLES = 4  # drawn answers per item of the gained task


@dataclass(frozen=True)
class Method:
    """One way of post-training: a stage and its settings."""

    stage: str
    settings: tuple[str, ...] = ()


def of_grpo(loss: str, *more: str) -> Method:
    """Return the method of `stage=grpo` with a loss."""
    return Method("grpo", (f"stage.loss={loss}", *more))


def of_pairs(loss: str) -> Method:
    """Return the method of `stage=dpo` with a loss."""
    return Method("dpo", (f"stage.loss={loss}",))


METHODS = {
    "reinforce": of_grpo("reinforce"),
    "grpo": of_grpo("grpo", "stage.advantage=zscore"),
    "dr_grpo": of_grpo("dr_grpo"),
    "dapo": of_grpo("dapo", "stage.advantage=zscore", "stage.filter_equal=resample"),
    "gspo": of_grpo("gspo", "stage.advantage=zscore"),
    "cispo": of_grpo("cispo", "stage.advantage=zscore"),
    "sapo": of_grpo("sapo", "stage.advantage=zscore"),
    "ipo_rl": of_grpo("ipo_rl"),
    "rloo": of_grpo("reinforce", "stage.advantage=rloo"),
    "max_rl": of_grpo("reinforce", "stage.advantage=max_rl"),
    "ppo": Method("ppo"),
    **{loss: of_pairs(loss) for loss in ("dpo", "ipo", "orpo", "kto", "simpo")},
    "best_of_n": Method("best_of_n"),
    "distill": Method("distill", ("stage.teacher=demo/grpo",)),
}
QUICK = ("reinforce", "ppo", "dpo", "best_of_n")  # of `make demo-rl`


def main() -> None:
    """Train and measure what is missing, then print the table."""
    args = arguments()
    if args.list:
        print("\n".join(f"{name:12} stage={m.stage} {' '.join(m.settings)}" for name, m in METHODS.items()))
        return
    parent = measured(args, *args.parent.split("/"))
    rows = []
    for name in args.methods:
        runs = [trained(args, name, seed) for seed in args.seeds]
        rows.append(row_of(name, runs, parent))
        show(rows, parent, args)
    print(json.dumps({"parent": parent, "methods": rows}))


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parent", default="demo/sft", help="run/stage to start from (default: demo/sft)")
    parser.add_argument("--runs", default="runs", help="folder of the runs (default: runs)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=[*METHODS], metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--items", type=int, default=1000, help="items of each task (default: 1000)")
    parser.add_argument("--out", type=Path, default=Path("bench_rl"), help="<out>.json and <out>.png")
    parser.add_argument("--set", nargs="*", default=["experiment=demo"], help="settings of every training")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)} with one seed")
    parser.add_argument("--list", action="store_true", help="print the methods and end")
    args = parser.parse_args()
    if args.quick:
        args.methods, args.seeds = list(QUICK), [0]
    return args


def trained(args: argparse.Namespace, name: str, seed: int) -> dict:
    """Train one method with one seed, unless that is done; return what was measured of it."""
    method, run = METHODS[name], f"rl-{name}-{seed}"
    settings = [*args.set, f"stage={method.stage}", f"run={run}", f"init_from={args.parent}", f"seed={seed}"]
    command("train.py", f"paths.runs={args.runs}", *settings, *method.settings)
    return measured(args, run, method.stage)


def measured(args: argparse.Namespace, run: str, stage: str) -> dict:
    """Return the scores of a stage by task, {"accuracy", "stderr", ...}, and `seconds`; measures what is not there."""
    folder = Path(args.runs) / run / stage
    file = folder / f"bench_rl_{args.items}.json"
    if not file.exists():
        tasks = (GAINED, *FORGOTTEN)
        sizes = [f"data.tasks.{task}.test_size={args.items}" for task in tasks]
        common = ["evaluate.py", f"paths.runs={args.runs}", f"run={run}", f"stage={stage}", "eval=[chat]"]
        common += ["data=embedded", *sizes, "eval.max_new_tokens=160", "eval.batch_size=128"]
        drawn = ("eval.temperature=1.0", f"eval.num_samples={SAMPLES}", f"data.eval=[{GAINED}]")
        command(*common, *drawn)
        command(*common, f"data.eval=[{','.join(FORGOTTEN)}]")
        found = read_json(folder / "eval.json")["other_data"]["embedded"]["chat"]  # test sets of other sizes
        scores = {task: found[task] for task in tasks}
        seconds = read_json(folder / "run.json")["seconds"]
        write_json(file, scores | {"seconds": seconds})
    return read_json(file)


def command(script: str, *settings: str) -> None:
    """Run one of the project's commands. Exits where it fails: nothing is lost, and the next call goes on there."""
    line = [sys.executable, str(REPO / script), *settings]
    begin = time.perf_counter()
    done = subprocess.run(line, cwd=REPO, capture_output=True, text=True, check=False)
    print(f"{time.perf_counter() - begin:6.0f} s  {script} {' '.join(settings)}", flush=True)
    if done.returncode:
        sys.exit(f"{' '.join(line)}\nended with status {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def row_of(name: str, runs: Sequence[dict], parent: dict) -> dict:
    """Return means and standard errors over seeds, in percent, of a method's scores and of their changes."""
    row: dict = {"method": name, "seeds": len(runs), "seconds": statistics.mean(run["seconds"] for run in runs)}
    scores = {key: (GAINED, key) for key in ("pass@1", f"pass@{SAMPLES}")}
    scores |= {task: (task, "accuracy") for task in FORGOTTEN}
    for key, (task, score) in scores.items():
        values = [100 * run[task][score] for run in runs]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 100 * runs[0][task]["stderr"]
        row[key] = {"mean": statistics.mean(values), "error": error, "before": 100 * parent[task][score]}
    return row


def show(rows: Sequence[dict], parent: dict, args: argparse.Namespace) -> None:
    """Print the table so far, and write it as JSON and as a plot."""
    keys = [key for key in rows[0] if isinstance(rows[0][key], dict)]
    print()
    print_table(
        ["method", *keys, "s"],
        [
            [row["method"], *(f"{row[k]['mean']:.1f} ± {row[k]['error']:.1f}" for k in keys), f"{row['seconds']:.0f}"]
            for row in [before(rows[0]), *rows]
        ],
    )
    write_json(args.out.with_suffix(".json"), {"parent": parent, "methods": list(rows)})
    plot(args.out.with_suffix(".png"), rows, keys)


def before(row: dict) -> dict:
    """Return the row of the parent, from the scores before a method."""
    scores = {k: {"mean": v["before"], "error": 0.0} for k, v in row.items() if isinstance(v, dict)}
    return {"method": "(parent)", "seconds": 0.0} | scores


def plot(path: Path, rows: Sequence[dict], keys: Sequence[str]) -> None:
    """Draw the changes over the parent, in points: a row of bars per score."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 2.2 * len(keys), 1.2 + 0.28 * len(rows)), layout="constrained", dpi=120)
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    names = [row["method"] for row in rows]
    for axes, key in zip(panels, keys, strict=True):
        changes = [row[key]["mean"] - row[key]["before"] for row in rows]
        axes.barh(names, changes, xerr=[row[key]["error"] for row in rows], color="#0072B2", ecolor="#7F7F7F")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(key, fontsize=9)
        axes.tick_params(labelsize=8)
    panels[0].invert_yaxis()
    figure.supxlabel("points over the parent", fontsize=9)
    figure.savefig(path)


if __name__ == "__main__":
    main()
