"""Methods of post-training from one finetuned model, with seeds: a table of gains, forgetting and seconds, and plots.

    python bench/rl.py [--parent demo/sft] [--runs runs] [--methods grpo ppo dpo] [--seeds 0 1 2] [--items 1000]
                       [--out bench_rl] [--set experiment=demo] [--quick] [--list]

Every method of `METHODS` starts from the same model and is trained by `train.py`, then measured by `evaluate.py`: on
arithmetic with four drawn answers per item (pass@1, pass@4), and greedily on the tasks that it could forget. Methods of
preferences tell besides how many held-out pairs they order rightly, and how often the rule of generated pairs prefers
their answers to the parent's. What is finished is not done again, so the command goes on where it was stopped. Gains
are in points over the parent, which is measured by the same commands; the error of a mean is its standard error over
seeds, or that of the items where there is one seed. Seconds are those of training steps, evaluations and start-up
aside, of the fastest seed: other work on the machine can only add to them. Prints a table, writes <out>.json, <out>.png
(gains) and <out>_curves.png (of the first seed, against seconds), and ends with a line of JSON.
"""

import _bench  # isort: skip  # noqa: F401  (puts the project on the path)
import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm.run.stage_folder import read_metrics
from llm.utils.files import read_json, write_json
from llm.utils.format import print_table

REPO = Path(__file__).resolve().parent.parent
GAINED = "arithmetic"
FORGOTTEN = {"choice": 480, "spelling": 1000, "identity": 224}  # and how many different rows the embedded world has
SAMPLES = 4  # drawn answers per item of the gained task
CURVE = {"pass@1": "pass@1, %", "preference/win_rate": "answers preferred to the parent's, %"}
EVERY = ("stage.eval_every=10",)  # steps between two points of a curve
TEACHER = "rl-teacher"  # run of the deeper model, and the settings that make it one
DEEPER = ("model=d6",)


@dataclass(frozen=True)
class Method:
    """One way of post-training: a stage and its settings. has_teacher: it learns from a deeper model."""

    stage: str
    settings: tuple[str, ...] = ()
    has_teacher: bool = False


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
    "best_of_n": Method("best_of_n"),
    "distill": Method("distill", has_teacher=True),
    **{loss: of_pairs(loss) for loss in ("dpo", "ipo", "orpo", "kto", "simpo")},
    "reward": Method("reward"),
}
QUICK = ("reinforce", "ppo", "dpo", "best_of_n")  # of `make demo-rl`


def main() -> None:
    """Train and measure what is missing, then print the table."""
    args = arguments()
    if args.list:
        print("\n".join(f"{name:12} stage={m.stage} {' '.join(m.settings)}" for name, m in METHODS.items()))
        return
    parent = measured(args, *args.parent.split("/"))
    rows, curves = [], {}
    for name in args.methods:
        runs = [trained(args, name, seed) for seed in args.seeds]
        rows.append(row_of(name, runs, parent))
        curves[name] = read_metrics(Path(args.runs) / run_of(name, args.seeds[0]) / METHODS[name].stage)
        show(rows, parent, args)
        draw_curves(args.out.with_name(f"{args.out.name}_curves.png"), curves)
    print(json.dumps({"parent": parent, "methods": rows}))


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parent", default="demo/sft", help="run/stage to start from (default: demo/sft)")
    parser.add_argument("--runs", default="runs", help="folder of the runs (default: runs)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=[*METHODS], metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--items", type=int, default=1000, help="items of a task, where it has so many (default: 1000)")
    parser.add_argument("--out", type=Path, default=Path("bench_rl"), help="path of the results without their endings")
    parser.add_argument("--set", nargs="*", default=["experiment=demo"], help="settings of every training")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)} with one seed")
    parser.add_argument("--list", action="store_true", help="print the methods and end")
    args = parser.parse_args()
    if args.quick:
        args.methods, args.seeds = list(QUICK), [0]
    return args


def run_of(name: str, seed: int) -> str:
    """Return the run that a method is trained in."""
    return f"rl-{name}-{seed}"


def trained(args: argparse.Namespace, name: str, seed: int) -> dict:
    """Train one method with one seed, unless that is done; return what was measured of it."""
    method, run = METHODS[name], run_of(name, seed)
    settings = [*args.set, f"stage={method.stage}", f"run={run}", f"init_from={args.parent}", f"seed={seed}", *EVERY]
    if method.has_teacher:
        settings.append(f"stage.teacher={teacher(args)}")
    command("train.py", f"paths.runs={args.runs}", *settings, *method.settings)
    return measured(args, run, method.stage)


def teacher(args: argparse.Namespace) -> str:
    """Train a deeper model by all stages up to grpo, those that are not finished; return its run/stage."""
    stages = ("tokenizer", "pretrain", "midtrain", "sft", "grpo")
    settings = (f"paths.runs={args.runs}", *args.set, *DEEPER, f"run={TEACHER}")
    for stage in stages:
        command("train.py", *settings, f"stage={stage}")
    return f"{TEACHER}/{stages[-1]}"


def measured(args: argparse.Namespace, run: str, stage: str) -> dict:
    """Return scores of a stage by task, {"accuracy", "stderr", ...}, and its `metrics`; measures what is not there."""
    folder = Path(args.runs) / run / stage
    file = folder / f"bench_rl_{args.items}.json"
    if not file.exists():
        scores = {} if stage == "reward" else chat_scores(args, run, stage)
        write_json(file, scores | {"metrics": read_json(folder / "run.json")["metrics"]})
    return read_json(file)


def chat_scores(args: argparse.Namespace, run: str, stage: str) -> dict:
    """Return the scores of a stage by task, from evaluate.py."""
    tasks = (GAINED, *FORGOTTEN)
    sizes = [f"data.tasks.{task}.test_size={min(args.items, FORGOTTEN.get(task, args.items))}" for task in tasks]
    common = ["evaluate.py", f"paths.runs={args.runs}", f"run={run}", f"stage={stage}", "eval=[chat]"]
    common += ["data=embedded", *sizes, "eval.max_new_tokens=160", "eval.batch_size=128"]
    command(*common, "eval.temperature=1.0", f"eval.num_samples={SAMPLES}", f"data.eval=[{GAINED}]")
    command(*common, f"data.eval=[{','.join(FORGOTTEN)}]")
    found = read_json(Path(args.runs) / run / stage / "eval.json")["other_data"]["embedded"]["chat"]  # of other sizes
    return {task: found[task] for task in tasks}


def command(script: str, *settings: str) -> None:
    """Run one of the project's commands. Exits where it fails: nothing is lost, and the next call goes on there."""
    line = [sys.executable, str(REPO / script), *settings]
    begin = time.perf_counter()
    done = subprocess.run(line, cwd=REPO, capture_output=True, text=True, check=False)
    print(f"{time.perf_counter() - begin:6.0f} s  {script} {' '.join(settings)}", flush=True)
    if done.returncode:
        sys.exit(f"{' '.join(line)}\nended with status {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def scores_of(one: dict) -> Iterator[tuple[str, float, float]]:
    """Yield (name, percent, standard error of the items) of all that was measured of a stage."""
    if GAINED in one:
        own, key = one[GAINED], f"pass@{SAMPLES}"
        yield "pass@1", 100 * own["pass@1"], 100 * own["stderr"]
        yield key, 100 * own[key], 100 * math.sqrt(own[key] * (1 - own[key]) / own["n"])  # of an item it is 0 or 1
    for task in FORGOTTEN:
        if task in one:
            yield task, 100 * one[task]["accuracy"], 100 * one[task]["stderr"]
    if (accuracy := one["metrics"].get("preference/accuracy")) is not None:
        width = one["metrics"]["preference/accuracy_high"] - one["metrics"]["preference/accuracy_low"]
        yield "pairs", 100 * accuracy, 100 * width / 3.92  # of the interval of 95 %
    if (rate := one["metrics"].get("preference/win_rate")) is not None:
        yield "wins", 100 * rate, 100 * one["metrics"]["preference/win_rate_stderr"]


def row_of(name: str, runs: Sequence[dict], parent: dict) -> dict:
    """Return means and standard errors over seeds, in percent, of a method's scores, beside those of the parent."""
    row: dict = {"method": name, "seeds": len(runs), "seconds": min(run["metrics"]["seconds"] for run in runs)}
    start = {key: value for key, value, _ in scores_of(parent)} | {"pairs": 50.0, "wins": 50.0}  # by chance, by itself
    columns = zip(*map(scores_of, runs), strict=True)
    for column in columns:
        (key, _, item_error), values = column[0], [value for _, value, _ in column]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else item_error
        spread = max(values) - min(values)
        row[key] = {"mean": statistics.mean(values), "error": error, "spread": spread, "before": start[key]}
    return row


def show(rows: Sequence[dict], parent: dict, args: argparse.Namespace) -> None:
    """Print the table so far, and write it as JSON and as a plot."""
    keys = list(dict.fromkeys(key for row in rows for key in row if isinstance(row[key], dict)))
    start = {key: f"{value:.1f}" for key, value, _ in scores_of(parent)}
    print()
    print_table(
        ["method", *keys, "s"],
        [
            ["(parent)", *(start.get(key, "") for key in keys), ""],
            *([row["method"], *(told(row.get(key)) for key in keys), f"{row['seconds']:.0f}"] for row in rows),
        ],
    )
    write_json(args.out.with_suffix(".json"), {"parent": parent, "methods": list(rows)})
    draw_gains(args.out.with_suffix(".png"), rows, keys)


def told(score: dict | None) -> str:
    """Return a score as text, empty where a method has none."""
    return "" if score is None else f"{score['mean']:.1f} ± {score['error']:.1f}"


def draw_gains(path: Path, rows: Sequence[dict], keys: Sequence[str]) -> None:
    """Draw the changes over the parent, in points: a row of bars per score."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 1.6 * len(keys), 1.2 + 0.28 * len(rows)), layout="constrained", dpi=120)
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    places = range(len(rows))
    for axes, key in zip(panels, keys, strict=True):
        of_key = [(place, row[key]) for place, row in enumerate(rows) if key in row]
        changes, errors = [one["mean"] - one["before"] for _, one in of_key], [one["error"] for _, one in of_key]
        axes.barh([place for place, _ in of_key], changes, xerr=errors, color="#0072B2", ecolor="#7F7F7F")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(key, fontsize=9)
        axes.tick_params(labelsize=8)
    panels[0].set_yticks(places, [row["method"] for row in rows])
    panels[0].invert_yaxis()
    figure.supxlabel("points over the parent (pairs: over chance; wins: over a draw)", fontsize=9)
    figure.savefig(path)


def draw_curves(path: Path, curves: dict[str, list[dict]]) -> None:
    """Draw what methods reach against the seconds that they have trained: a panel per metric of `CURVE`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(CURVE), 4.5), layout="constrained", dpi=120)
    for axes, (key, label) in zip(figure.subplots(1, len(CURVE)), CURVE.items(), strict=True):
        shown = {name: points for name, rows in curves.items() if len(points := points_of(rows, key)) > 1}
        for i, (name, points) in enumerate(shown.items()):
            line = "-" if i < 10 else "--"  # the colours of a panel are ten
            axes.plot(*zip(*points, strict=True), line, marker=".", label=name, color=f"C{i % 10}")
        axes.set(xlabel="seconds of training", ylabel=label)
        axes.grid(alpha=0.3)
        if shown:
            axes.legend(fontsize=8, ncols=2)
    figure.savefig(path)


def points_of(rows: Sequence[dict], key: str) -> list[tuple[float, float]]:
    """Return (seconds, percent) of the rows of metrics.csv that have a metric."""
    return [(row.get("seconds", 0.0), 100 * row[key]) for row in rows if key in row]


if __name__ == "__main__":
    main()
