"""A miniseries of pretrainings, the scaling laws that it follows, and what they say about a larger model.

python -m llm.experiments.scaling --name laws --depths 2,3,4 --held-out 5,6 --flops 1e13,2e13,4e13 data=local ...

Runs that are finished are not run again, so the command goes on where it was stopped.
"""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from llm.cli.compose import compose
from llm.cli.overrides import check_overrides
from llm.config.plugins import load_plugins, plugins_in
from llm.errors import UserError
from llm.experiments.laws import (
    Coupled,
    Law,
    Point,
    Surface,
    bootstrap,
    choose_law,
    fit_law,
    fit_parabola,
    interval,
    predict,
)
from llm.experiments.scaling_plots import draw_isoflops, draw_law
from llm.model.config import GPTConfig, flops_per_token, scaling_params
from llm.run.stage_folder import RunDir, read_manifest
from llm.scaling.rules import model_config
from llm.utils.files import read_json, write_json
from llm.utils.format import amount, duration, print_table
from llm.utils.source import program
from llm.utils.streams import run_and_exit

FORMS = {"auto": None, "added": Surface, "coupled": Coupled}
RESERVED = ("stage", "run", "model", "max_steps", "stage.target_flops", "stage.tokens_per_param", "init_from", "-m")
RUNS = "paths.runs"  # --runs names it


@dataclass(frozen=True)
class Job:
    """One pretraining of a series: its depth, its training FLOPs and the factor on all its learning rates.

    seed: None = that of the series' settings.
    """

    depth: int
    flops: float
    lr_frac: float = 1.0
    seed: int | None = None

    def name(self, series: str) -> str:
        """Return the name of the run, as `laws-d4-2e13`, `laws-d4-2e13-lr0.5` or `laws-d4-2e13-s1`."""
        rate = "" if self.lr_frac == 1 else f"-lr{self.lr_frac:g}"
        seed = "" if self.seed is None else f"-s{self.seed}"
        return f"{series}-d{self.depth}-{budget(self.flops)}{rate}{seed}"


@dataclass
class Series:
    """A family of runs with one tokenizer: depths that are fitted and depths held out, with their budgets in FLOPs."""

    name: str
    depths: list[int]
    held_out: list[int]
    flops: list[float]
    held_out_flops: list[float]
    lr_fracs: list[float]
    more_seeds: list[int]
    runs: Path
    settings: list[str]
    form: type[Law] | None = None  # None: the one that predicts fitted runs better
    rate: float = 1.0  # `stage.lr_frac` of the settings, which the runs' own factors multiply
    skipped: list[str] = field(default_factory=list)

    def budgets(self) -> dict[int, list[float]]:
        """Return the budgets of every depth, small ones first."""
        of = dict.fromkeys(self.depths, self.flops) | dict.fromkeys(self.held_out, self.held_out_flops)
        return {depth: of[depth] for depth in sorted(of)}

    def jobs(self) -> list[Job]:
        """Return all runs, small budgets first, then those with more seeds, then those that compare learning rates.

        The last take a depth's smallest budget.
        """
        of = self.budgets()
        jobs = [Job(depth, flops) for depth, budgets in of.items() for flops in budgets]
        jobs.sort(key=lambda job: job.flops)
        jobs += [replace(job, seed=seed) for seed in self.more_seeds for job in jobs]
        return jobs + [Job(depth, of[depth][0], frac) for depth in of for frac in self.lr_fracs if frac != 1]


def budget(flops: float) -> str:
    """Write FLOPs for a name: `2e13`."""
    return re.sub(r"e\+?0*", "e", f"{flops:g}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a series, fit its laws and print them. Returns the exit status, 2 after a user's mistake."""
    try:
        series, wanted = _parse(argv)
        vocab = _begin(series)
        _train_all(series, vocab)
        _tell(series, wanted, vocab)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(argv: Sequence[str] | None) -> tuple[Series, list[Job]]:
    """Return the series of a command line, and the runs whose loss is asked for without running them."""
    parser = argparse.ArgumentParser(
        prog="python -m llm.experiments.scaling",
        description="Train models at fixed FLOPs, fit scaling laws to the results and predict larger models.",
    )
    parser.add_argument("--name", required=True, help="name of the series; runs are <name>-d<depth>-<FLOPs>")
    parser.add_argument("--depths", type=_whole, default="2,3,4", help="depths that the laws are fitted to")
    parser.add_argument("--held-out", type=_whole, default="", help="depths that are run to test predictions")
    parser.add_argument("--flops", type=_real, required=True, help="training FLOPs of a run, several budgets")
    parser.add_argument(
        "--held-out-flops", type=_real, default="", help="budgets of the depths held out (default: all of --flops)"
    )
    parser.add_argument(
        "--predict", default="", metavar="DEPTH:FLOPS,...", help="models whose loss is predicted and not run"
    )
    parser.add_argument(
        "--lr-fracs", type=_real, default="", help="factors on all learning rates, compared at every depth"
    )
    parser.add_argument(
        "--more-seeds", type=_whole, default="", help="further seeds: every run is made with these too, and means count"
    )
    parser.add_argument(
        "--form",
        choices=FORMS,
        default="auto",
        help="law: added = E + A / N^a + B / D^b, coupled = ((Nc / N)^(a / b) + Dc / D)^b, auto = the better one",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of train.py for all runs")
    args = parser.parse_intermixed_args(argv)
    for setting in args.settings:
        if setting.split("=")[0].lstrip("+~") in RESERVED:
            raise UserError(f"{setting}: the series sets this key itself; leave it out")
        if setting.split("=")[0] == RUNS:
            raise UserError(f"{setting}: the folder of all runs is given by --runs={setting.partition('=')[2]}")
    for option, values, example in (("--depths", args.depths, "2,3,4"), ("--flops", args.flops, "1e13,2e13")):
        if not values:
            raise UserError(f"{option}: names no number; give one or more, as {option} {example}")
    for depth in args.depths + args.held_out:
        if depth < 1:
            raise UserError(f"--depths {depth}: must be at least 1")
    if both := set(args.depths) & set(args.held_out):
        raise UserError(f"--held-out {min(both)}: is also one of --depths; a depth is either fitted or held out")
    if args.held_out_flops and not args.held_out:
        raise UserError("--held-out-flops: no depth is held out; name them with --held-out")
    positive = {"--flops": args.flops, "--held-out-flops": args.held_out_flops, "--lr-fracs": args.lr_fracs}
    for option, values in positive.items():
        if any(not 0 < number < float("inf") for number in values):
            raise UserError(f"{option} {','.join(f'{x:g}' for x in values)}: all must be positive numbers")
    wanted = [_wanted(text) for text in filter(None, args.predict.split(","))]
    flops = sorted(set(args.flops))
    held_out_flops = sorted(set(args.held_out_flops)) or flops
    budgets = (flops, held_out_flops, args.lr_fracs)
    series = Series(
        args.name, args.depths, args.held_out, *budgets, args.more_seeds, args.runs, args.settings, FORMS[args.form]
    )
    load_plugins(plugins_in(args.settings))
    for words in (_overrides(series, series.jobs()[0]), _tokenizer_overrides(series)):
        check_overrides("train", words)
    cfg = compose("train", ["stage=pretrain", *args.settings])
    series.rate, own = cfg.stage.lr_frac, cfg.seed
    seeds = [own, *args.more_seeds]
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise UserError(f"--more-seeds: seed {twice[0]} is there twice (that of the settings is {own}); give each once")
    return series, wanted


def _whole(text: str) -> list[int]:
    """Parse whole numbers with commas between."""
    return [int(word) for word in text.split(",") if word]


def _real(text: str) -> list[float]:
    """Parse numbers with commas between."""
    return [float(word) for word in text.split(",") if word]


def _wanted(text: str) -> Job:
    """Parse DEPTH:FLOPS, as 8:1e15."""
    try:
        depth, flops = text.split(":")
        job = Job(int(depth), float(flops))
    except ValueError:
        job = Job(0, 0)
    if job.depth < 1 or not 0 < job.flops < float("inf"):
        raise UserError(f"--predict {text}: write depth and FLOPs, as 8:1e15")
    return job


def _overrides(series: Series, job: Job) -> list[str]:
    """Return the command line of one pretraining."""
    own = [
        f"model=d{job.depth}",
        "max_steps=null",
        f"stage.target_flops={job.flops:g}",
        f"stage.lr_frac={series.rate * job.lr_frac:g}",
    ]
    own += [] if job.seed is None else [f"seed={job.seed}"]
    names = [f"run={job.name(series.name)}", f"init_from={series.name}/tokenizer", f"paths.runs={series.runs}"]
    return ["stage=pretrain", *series.settings, *own, *names]


def _tokenizer_overrides(series: Series) -> list[str]:
    """Return the command line of the tokenizer; settings of `stage` are those of pretraining."""
    settings = [word for word in series.settings if not word.lstrip("+~").startswith("stage.")]
    return ["stage=tokenizer", *settings, f"run={series.name}", f"paths.runs={series.runs}"]


def _begin(series: Series) -> int:
    """Train the tokenizer of the series where there is none; returns its number of entries.

    Raises UserError where the series was begun with other settings: its runs could not be compared.
    """
    record = series.runs / series.name / "series.json"
    begun = read_json(record)
    if begun is not None and begun.get("settings") != series.settings:
        raise UserError(
            f"--name {series.name}: begun with {' '.join(begun['settings'])}; give these, or another --name"
        )
    if begun is not None and begun.get("lr_frac", 1.0) != series.rate:
        raise UserError(
            f"--name {series.name}: begun with stage.lr_frac={begun.get('lr_frac', 1.0):g}, now it is {series.rate:g}; "
            "give another --name"
        )
    write_json(record, {"settings": series.settings, "lr_frac": series.rate})
    folder = RunDir(series.runs, series.name).stage_dir("tokenizer")
    if not _is_finished(folder):
        _run(_tokenizer_overrides(series), folder)
    return int(read_manifest(folder / "run.json")["derived"]["vocab_size"])


def _train_all(series: Series, vocab: int) -> None:
    """Run what is not finished. Runs that would take more than one pass over the text are skipped and said."""
    jobs, begun, spent = series.jobs(), time.monotonic(), 0.0
    left = sum(job.flops for job in jobs if not _is_finished(_folder(series, job)))
    print(f"{len(jobs)} runs, {left:.3g} FLOPs to train")
    one_pass = float("inf")  # tokens that a run trains while it reads the text once
    for job in jobs:
        folder = _folder(series, job)
        if not _is_finished(folder):
            tokens = job.flops / flops_per_token(_shape(tuple(series.settings), job.depth, vocab))
            if tokens > one_pass:
                reason = f"{amount(tokens)} tokens are more than one pass over the text trains, {amount(one_pass)}"
                series.skipped.append(f"{job.name(series.name)}: {reason}")
                left -= job.flops
                continue
            _run(_overrides(series, job), folder)
            spent, left = spent + job.flops, left - job.flops
            rest = left / spent * (time.monotonic() - begun)
            print(f"{job.name(series.name)}: bpb {_point(folder, job).loss:.4f}, about {duration(rest)} left")
        facts = read_manifest(folder / "run.json")["derived"]
        if facts.get("text_passes"):
            one_pass = facts["planned_tokens"] / facts["text_passes"]
    for line in series.skipped:
        print(f"skipped {line}")


def _run(overrides: list[str], folder: Path) -> None:
    """Run train.py and wait for it, also through Ctrl-C, in which it saves. Raises UserError where it fails."""
    log = folder.parent / f"{folder.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        started = subprocess.Popen([*program("train"), *overrides], stdout=out, stderr=out)
        while True:
            try:
                status = started.wait()
                break
            except KeyboardInterrupt:
                print("stopping: the run saves what it has; the same command goes on from there", file=sys.stderr)
    if status or not _is_finished(folder):
        lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        raise UserError(f"train.py {' '.join(overrides)} ended with status {status}: {lines[-1]} (see {log})")


def _is_finished(folder: Path) -> bool:
    """Return whether a stage is complete."""
    return (read_manifest(folder / "run.json") or {}).get("status") == "finished"


def _folder(series: Series, job: Job) -> Path:
    """Return the stage folder of a run."""
    return RunDir(series.runs, job.name(series.name)).stage_dir("pretrain")


@cache
def _shape(settings: tuple[str, ...], depth: int, vocab: int) -> GPTConfig:
    """Return the shape of the model of a depth, with the settings of a series."""
    cfg = compose("train", ["stage=pretrain", *settings, f"model=d{depth}"])
    return model_config(cfg.model, cfg.arch, vocab)


def _point(folder: Path, job: Job) -> Point:
    """Return what a finished run measured. Raises UserError where it has no bits per byte."""
    facts = read_manifest(folder / "run.json")
    if facts["metrics"].get("bpb") is None:
        raise UserError(f"{folder}: no bpb was measured; set stage.eval_every above 0 and keep callbacks.bpb")
    derived = facts["derived"]
    return Point(
        derived["params_scaling"], facts["tokens"], facts["flops"], facts["metrics"]["bpb"], job.depth, job.flops
    )


def _points(series: Series, depths: Sequence[int]) -> list[Point]:
    """Return the finished runs of these depths with the learning rates of the rule, seeds of one run as their mean."""
    found: dict[Job, list[Point]] = {}
    for job in series.jobs():
        if job.depth in depths and job.lr_frac == 1 and _is_finished(folder := _folder(series, job)):
            found.setdefault(replace(job, seed=None), []).append(_point(folder, job))
    return [replace(points[0], loss=fmean(p.loss for p in points), seeds=len(points)) for points in found.values()]


def _tell(series: Series, wanted: list[Job], vocab: int) -> None:
    """Print and draw the laws of the finished runs; write them to <runs>/<name>/scaling.json."""
    points, held = _points(series, series.depths), _points(series, series.held_out)
    folder = series.runs / series.name
    result: dict[str, Any] = {"points": [asdict(p) for p in points], "held_out": [asdict(p) for p in held]}
    result["isoflop"] = list(_isoflops(series, points + held))
    draw_isoflops(folder / "isoflop.png", points + held)
    if series.lr_fracs:
        result["rates"] = _rates(series)
    pictures = [folder / "isoflop.png"]
    try:
        law, left_out = choose_law(points)
        law = law if series.form is None else fit_law(points, series.form)
    except ValueError as error:
        print(f"no law is fitted: {error}")
    else:
        laws = bootstrap(points, law)
        asked = [(p.depth, p.params, p.tokens, p.loss) for p in held]
        for job in wanted:
            shape = _shape(tuple(series.settings), job.depth, vocab)
            asked.append((job.depth, scaling_params(shape), job.flops / flops_per_token(shape), None))
        result |= _forms(left_out) | _law(points, law, laws)
        result["predictions"] = list(_predictions(points, law, laws, asked))
        draw_law(folder / "law.png", points, held, law)
        pictures.append(folder / "law.png")
    result["skipped"] = series.skipped
    write_json(folder / "scaling.json", result)
    print(f"wrote {', '.join(map(str, [folder / 'scaling.json', *pictures]))}")


def _isoflops(series: Series, points: list[Point]) -> Iterator[dict[str, Any]]:
    """Print the best tokens and parameters of every budget; yield them as mappings."""
    rows = []
    for flops in series.flops:
        same = [p for p in points if p.budget == flops]
        best = fit_parabola(same)
        if best is None or not best.is_inside:
            rows.append([budget(flops), str(len(same)), "no minimum among the runs", "", ""])
            continue
        ratio = best.tokens / _params_at(same, best.tokens)
        rows.append([budget(flops), str(len(same)), amount(best.tokens), f"{ratio:.3g}", f"{best.loss:.4f}"])
        yield asdict(best) | {"flops": flops, "tokens_per_param": ratio}
    print_table(["FLOPs", "runs", "best tokens", "tokens per parameter", "bpb"], rows, "Best size at equal FLOPs")


def _params_at(points: list[Point], tokens: float) -> float:
    """Return the parameters that spend the budget of `points` on `tokens`, by a straight line in logarithms."""
    import numpy as np

    slope, constant = np.polyfit(np.log([p.tokens for p in points]), np.log([p.params for p in points]), 1)
    return float(np.exp(slope * np.log(tokens) + constant))


def _forms(left_out: dict[type[Law], float]) -> dict[str, Any]:
    """Print how well each form predicts fitted runs from the other ones; return it as a mapping."""
    rows = [[form.FORMULA, f"{100 * error:.2f} %"] for form, error in left_out.items()]
    print_table(["law", "error"], rows, "Each fitted run predicted from the others")
    return {"forms": {form.FORMULA: error for form, error in left_out.items()}}


def _law(points: list[Point], law: Law, laws: list[Law]) -> dict[str, Any]:
    """Print the numbers of the law with their intervals; return them as a mapping."""
    bounds = {f.name: interval([getattr(drawn, f.name) for drawn in laws]) for f in fields(law)}
    rows = [[name, f"{getattr(law, name):.4g}", f"{low:.4g} to {high:.4g}"] for name, (low, high) in bounds.items()]
    per_param = sum(p.flops / p.params / p.tokens for p in points) / len(points)
    flops = max(p.flops for p in points)
    ratios = [drawn.best_tokens(flops, per_param) ** 2 * per_param / flops for drawn in (law, *laws)]
    low, high = interval(ratios[1:])
    rows.append([f"tokens per parameter at {flops:.3g} FLOPs", f"{ratios[0]:.3g}", f"{low:.3g} to {high:.3g}"])
    print_table(["number", "fit", "95 % interval"], rows, f"{law.FORMULA}, in bits per byte")
    if high < 10 * low:
        print(f"for a training of this size: stage.tokens_per_param={ratios[0]:.3g} stage.count_params=matrices")
    else:
        print("these runs do not tell the best tokens per parameter: its interval spans more than a factor of ten")
    return {
        "formula": law.FORMULA,
        "law": asdict(law),
        "intervals": bounds,
        "tokens_per_param": ratios[0],
        "tokens_per_param_in": [low, high],
    }


def _predictions(
    points: list[Point], law: Law, laws: list[Law], asked: list[tuple[int, float, float, float | None]]
) -> Iterator[dict[str, Any]]:
    """Print predictions of (depth, parameters, tokens, loss if measured); yield them as mappings."""
    rows = []
    for depth, params, tokens, loss in asked:
        told = predict(points, law, laws, params, tokens)
        seen = ["", "", ""]
        if loss is not None:
            inside = told.low <= loss <= told.high
            seen = [f"{loss:.4f}", f"{100 * (told.loss / loss - 1):+.2f} %", "yes" if inside else "no"]
        rows.append([f"d{depth}", amount(tokens), f"{told.loss:.4f}", f"{told.low:.4f} to {told.high:.4f}", *seen])
        yield {"depth": depth, "params": params, "tokens": tokens, "measured": loss} | asdict(told)
    if rows:
        header = ["model", "tokens", "predicted", "95 % interval", "measured", "error", "covered"]
        print_table(header, rows, "Predictions of models that were not fitted, bits per byte")


def _rates(series: Series) -> dict[str, Any]:
    """Print bpb by depth and factor on the learning rates, and whether one factor is best at all depths."""
    fracs = sorted({1.0, *series.lr_fracs})
    table, best = {}, {}
    for depth, budgets in series.budgets().items():
        jobs = {frac: Job(depth, budgets[0], frac) for frac in fracs}
        losses = {
            frac: _point(_folder(series, job), job).loss
            for frac, job in jobs.items()
            if _is_finished(_folder(series, job))
        }
        table[f"d{depth}"] = losses
        best[f"d{depth}"] = min(losses, key=losses.get) if losses else None
    rows = [
        [name, *(f"{losses[frac]:.4f}" if frac in losses else "" for frac in fracs), f"{best[name]:g}"]
        for name, losses in table.items()
        if losses
    ]
    header = ["model", *(f"x {frac:g}" for frac in fracs), "best"]
    print_table(header, rows, "Bits per byte by factor on all learning rates, at the smallest budget of each depth")
    places = [fracs.index(frac) for frac in best.values() if frac is not None]
    steps = max(places) - min(places)
    verdict = "rates transfer over depth" if steps <= 1 else "rates do not transfer over depth"
    print(f"{verdict}: grid steps between the best factors: {steps} (at most 1 is asked for)")
    return {"bpb": table, "best": best, "grid_steps_apart": steps}


if __name__ == "__main__":
    run_and_exit(main)
