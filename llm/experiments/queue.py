"""A queue of trainings that survives restarts of its workers, on one machine or a shared folder.

    python -m llm.experiments.queue add experiment=demo stage=pretrain run=a optim.matrix_lr=0.01
    python -m llm.experiments.queue add experiment=demo stage=sft run=a --after 1
    python -m llm.experiments.queue run        works off what is waiting; the same command goes on after a kill
    python -m llm.experiments.queue list
    python -m llm.experiments.queue cancel 2   also pause, retry

docs/experiments.md explains it.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from llm.errors import UserError
from llm.experiments.jobs import BEAT, Job, Jobs, this_owner
from llm.run.stage_folder import read_metrics
from llm.utils.environment import die_with_parent
from llm.utils.format import duration, print_table

TRAIN = (sys.executable, str(Path(__file__).resolve().parents[2] / "train.py"))
STOPS = (signal.SIGINT, signal.SIGTERM)
FEWEST = 3  # finished jobs before one is pruned


class Worker:
    """Does the jobs of a queue, one after the other, each as a process of `program` with the job's words.

    prune: a column of metrics.csv, lower is better: a training is stopped where its value is above the median of the
    jobs that are done, at the same step, once `share` of their steps are over. runs: folder of all runs.
    """

    def __init__(
        self,
        jobs: Jobs,
        program: Sequence[str] = TRAIN,
        prune: str | None = None,
        share: float = 0.3,
        runs: str | Path = "runs",
        tick: float = 0.5,
    ):
        self.jobs, self.program, self.prune, self.share = jobs, list(program), prune, share
        self.runs, self.tick, self.stopping = Path(runs), tick, False

    def work(self) -> None:
        """Work until nothing is left that can be done, or until this process is asked to stop."""
        before = {number: signal.signal(number, self._stop) for number in STOPS}
        try:
            while not self.stopping:
                for job in self.jobs.take_back():
                    print(f"job {job.id}: its worker has gone, so it is {job.state}", flush=True)
                job = self.jobs.claim(this_owner())
                if job is not None:
                    self._do(job)
                elif any(job.owner for job in self.jobs.all()):
                    time.sleep(self.tick)  # others may fail, or make way for what waits for them
                else:
                    break
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, *_) -> None:
        self.stopping = True

    def _do(self, job: Job) -> None:
        print(f"job {job.id}: {shlex.join(job.words)}", flush=True)
        logs = self.jobs.path.parent / "queue_logs"
        logs.mkdir(exist_ok=True)
        with open(logs / f"{job.id}.log", "ab") as log:
            training = subprocess.Popen(
                [*self.program, *job.words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the training
                preexec_fn=die_with_parent if sys.platform == "linux" else None,
            )
            state = self._watch(job, training)
        result = training.returncode
        if result == 0 and state == "running":
            job = self.jobs.end(job, "done", result)
        elif self.stopping or state != "running":
            job = self.jobs.end(job, "waiting", result)  # stopped from here: no failure
        else:
            last = job.attempts + 1 >= job.most
            job = self.jobs.end(job, "failed" if last else "waiting", result, failed=True)
        print(f"job {job.id}: {job.state} (exit status {result})", flush=True)

    def _watch(self, job: Job, training: subprocess.Popen) -> str:
        """Wait for the end of a training, which is stopped where that was asked for; return `running`, or why not."""
        state, due, asked = self.jobs.beat(job, training.pid), 0.0, False
        while training.poll() is None:
            if time.monotonic() >= due:
                state, due = self.jobs.beat(job, training.pid), time.monotonic() + min(BEAT, 10 * self.tick)
                if state == "running" and self.prune and self._is_behind(job):
                    state = self.jobs.set_state(job.id, "pruned", ["running"]).state
            if (self.stopping or state != "running") and not asked:
                training.terminate()  # it saves, and ends
                asked = True
            time.sleep(self.tick)
        return state

    def _is_behind(self, job: Job) -> bool:
        """Say whether a training is worse than the median of those that are done, where both have been measured."""
        done = [self._curve(other) for other in self.jobs.all() if other.state == "done"]
        mine, done = self._curve(job), [curve for curve in done if curve]
        if not mine or len(done) < FEWEST:
            return False
        step = max(mine)
        there = [curve[step] for curve in done if step in curve and step >= self.share * max(curve)]
        return len(there) >= FEWEST and mine[step] > median(there)

    def _curve(self, job: Job) -> dict[int, float]:
        folder = self.runs / (job.value("run") or "") / (job.value("stage") or "pretrain")
        return {int(row["step"]): row[self.prune] for row in read_metrics(folder) if self.prune in row}


def show(jobs: Sequence[Job]) -> None:
    """Print a table of jobs."""
    lines = []
    for job in jobs:
        end = job.ended or time.time()
        took = duration(end - job.started) if job.started else "-"
        after = " ".join(map(str, job.after)) or "-"
        lines.append([str(job.id), shlex.join(job.words), job.state, after, f"{job.attempts} of {job.most}", took])
    print_table(["job", "words", "state", "after", "failures", "time"], lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llm.experiments.queue", description="A queue of trainings.")
    parser.add_argument("--queue", default="runs/queue.db", help="file of the queue (default: runs/queue.db)")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="command")
    add = kinds.add_parser("add", help="put a training into the queue")
    add.add_argument("words", nargs="+", help="overrides as for train.py; run=<name> is needed")
    add.add_argument("--after", type=int, action="append", default=[], help="number of a job that must be done before")
    add.add_argument("--attempts", type=int, default=2, help="failures until the job is given up (default: 2)")
    add.add_argument("--first", action="store_true", help="put the job before all others")
    run = kinds.add_parser("run", help="work off the queue, also beside other workers")
    run.add_argument("--prune", help="stop trainings behind the median of finished jobs in this column, such as bpb")
    run.add_argument("--prune-from", type=float, default=0.3, help="share of the steps before pruning (default: 0.3)")
    run.add_argument("--runs", default="runs", help="folder of all runs (default: runs)")
    listed = kinds.add_parser("list", help="show all jobs")
    listed.add_argument("--json", action="store_true", help="print a JSON list")
    for kind, text in (
        ("cancel", "drop a job"),
        ("pause", "stop a job until `retry`"),
        ("retry", "let a job wait again"),
    ):
        kinds.add_parser(kind, help=text).add_argument("job", type=int, nargs="+", help="numbers of jobs")
    return parser


CHANGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "cancel": ("cancelled", ("waiting", "running", "paused", "failed")),
    "pause": ("paused", ("waiting", "running")),
    "retry": ("waiting", ("failed", "cancelled", "paused", "pruned")),
}


def main(argv: Sequence[str] | None = None, work: Callable[[Worker], None] = Worker.work) -> int:
    """Do what `argv` says with a queue; returns the exit status, 2 after a user's mistake."""
    options = _parser().parse_args(argv)
    try:
        jobs = Jobs(options.queue)
        if options.kind == "add":
            if options.attempts < 1:
                raise UserError(f"--attempts {options.attempts}: must be 1 or more")
            print(f"job {jobs.add(options.words, options.after, options.attempts, options.first)}")
        elif options.kind == "run":
            work(Worker(jobs, prune=options.prune, share=options.prune_from, runs=options.runs))
        elif options.kind == "list" and options.json:
            print(json.dumps([asdict(job) for job in jobs.all()], indent=2))
        elif options.kind == "list":
            show(jobs.all())
        else:
            for number in options.job:
                job = jobs.set_state(number, *CHANGES[options.kind])
                print(f"job {job.id}: {job.state}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
