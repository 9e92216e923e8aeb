"""The queue of trainings: order, failures, and workers that are killed. Trainings are shell scripts that resume."""

import json
import os
import signal
import sys
import time
from dataclasses import replace

import processes
import pytest
from experiment_runs import add_run

from llm.errors import UserError
from llm.experiments import queue
from llm.experiments.jobs import STALE, Job, Jobs, is_gone, this_owner
from llm.experiments.queue import Worker

# Goes on behind the steps in its file, as a training does, and refuses to end twice.
TRAINING = """
for word in "$@"; do case $word in run=*) run=${word#*=};; steps=*) steps=${word#*=};; broken=*) exit 3;; esac; done
echo $$ >> $run.starts
case " $* " in *" moody=1 "*) [ $(wc -l < $run.starts) -ge 2 ] || exit 1;; esac
[ -e $run.done ] && exit 0
touch $run.steps
n=$(wc -l < $run.steps)
while [ $n -lt ${steps:-1} ]; do sleep 0.02; n=$((n+1)); echo $n >> $run.steps; done
echo done >> $run.done
"""
WORKER = "from llm.experiments.queue import *; Worker(Jobs('queue.db'), ['sh', 'training.sh'], tick=0.02).work()"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "training.sh").write_text(TRAINING)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def worker():
    """A process that works off queue.db."""
    return processes.start(sys.executable, "-c", WORKER, cwd=os.getcwd(), env={"PYTHONPATH": str(processes.REPO)})


def wait_for(condition):
    end = time.monotonic() + processes.HANG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def lines(path):
    return path.read_text().split() if path.exists() else []


def states(jobs):
    return [job.state for job in jobs.all()]


def test_forty_trials_survive_two_kills_and_none_is_lost_or_repeated(folder):
    jobs = Jobs("queue.db")
    for number in range(40):
        jobs.add([f"run=trial{number}", "steps=3"])
    for done in (9, 22):
        process = worker()
        wait_for(lambda done=done: states(jobs).count("done") >= done)
        wait_for(lambda: any(job.pid for job in jobs.all()))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert processes.finish(worker())[0][0] == 0
    assert states(jobs) == ["done"] * 40 and all(job.attempts == 0 for job in jobs.all())
    for number in range(40):
        assert lines(folder / f"trial{number}.steps") == ["1", "2", "3"]
        assert lines(folder / f"trial{number}.done") == ["done"]
    assert sum(len(lines(path)) for path in folder.glob("*.starts")) <= 42


def test_two_workers_share_a_queue(folder):
    jobs = Jobs("queue.db")
    for number in range(6):
        jobs.add([f"run=trial{number}", "steps=5"])
    assert [status for status, *_ in processes.finish(worker(), worker())] == [0, 0]
    assert states(jobs) == ["done"] * 6 and all(len(lines(path)) == 1 for path in folder.glob("*.starts"))


def test_jobs_come_in_order_after_those_that_they_need(folder, capsys):
    jobs = Jobs("queue.db")
    jobs.add(["run=a", "stage=pretrain"])
    jobs.add(["run=a", "stage=sft"], after=[1])
    jobs.add(["run=moody", "moody=1"])
    jobs.add(["run=broken", "broken=1"])
    jobs.add(["run=never"], after=[4])
    jobs.add(["run=urgent"], first=True)
    Worker(jobs, ["sh", "training.sh"], tick=0.02).work()
    began = [line for line in capsys.readouterr().out.splitlines() if "run=" in line]
    assert [line.split(": ")[1].split()[0] for line in began] == [
        *["run=urgent", "run=a", "run=a", "run=moody", "run=moody", "run=broken", "run=broken"]
    ]
    found = {job.value("run"): (job.state, job.attempts, job.result) for job in jobs.all() if job.id != 2}
    assert found == {
        "urgent": ("done", 0, 0),
        "a": ("done", 0, 0),
        "moody": ("done", 1, 0),
        "broken": ("failed", 2, 3),
        "never": ("waiting", 0, None),
    }
    assert jobs.set_state(4, "waiting", ["failed"]).attempts == 0


def test_a_running_job_is_cancelled_paused_and_goes_on(folder):
    jobs = Jobs("queue.db")
    jobs.add(["run=dropped", "steps=100000"])
    jobs.add(["run=held", "steps=60"])
    process = worker()
    wait_for(lambda: len(lines(folder / "dropped.steps")) > 1)
    assert queue.main(["--queue", "queue.db", "cancel", "1"]) == 0
    wait_for(lambda: len(lines(folder / "held.steps")) > 1)
    assert queue.main(["--queue", "queue.db", "pause", "2"]) == 0
    assert processes.finish(process)[0][0] == 0
    assert states(jobs) == ["cancelled", "paused"] and not lines(folder / "held.done")
    for pid in (*lines(folder / "dropped.starts"), *lines(folder / "held.starts")):
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    assert queue.main(["--queue", "queue.db", "retry", "2"]) == 0
    assert processes.finish(worker())[0][0] == 0
    assert states(jobs) == ["cancelled", "done"] and lines(folder / "held.steps") == [str(n + 1) for n in range(60)]


def test_a_worker_that_is_asked_to_stop_leaves_its_job_waiting(folder):
    jobs = Jobs("queue.db")
    jobs.add(["run=long", "steps=100000"])
    process = worker()
    wait_for(lambda: len(lines(folder / "long.steps")) > 1)
    process.terminate()
    assert processes.finish(process)[0][0] == 0
    job = jobs.get(1)
    assert (job.state, job.attempts, job.owner, job.pid) == ("waiting", 0, None, None)


def test_workers_of_other_machines_are_gone_when_they_say_nothing():
    now = time.time()
    job = Job(1, ["run=a"], [], 1.0, "running", 0, 2, "elsewhere:1", now, 99, now, None, None)
    assert not is_gone(job) and is_gone(replace(job, beat=now - STALE - 1))
    mine = replace(job, owner=this_owner(), pid=None)
    assert not is_gone(mine) and is_gone(replace(mine, beat=now - STALE - 1))
    assert not is_gone(replace(mine, beat=now - STALE - 1, pid=os.getpid()))  # its training still runs


def test_trainings_behind_the_median_are_stopped(folder):
    jobs, owner = Jobs("queue.db"), this_owner()
    for seed, level in enumerate((2.0, 2.1, 2.2)):
        jobs.add([f"run=done{seed}"])
        jobs.end(jobs.claim(owner), "done", 0)
        add_run(folder / "runs", f"done{seed}", seed, level)
    add_run(folder / "runs", "bad", level=2.15, until=40, status="running")
    add_run(folder / "runs", "good", level=2.05, until=40, status="running")
    add_run(folder / "runs", "early", level=5.0, until=20, status="running")
    for run in ("bad", "good", "early"):
        jobs.add([f"run={run}", "steps=20"])
    Worker(jobs, ["sh", "training.sh"], prune="bpb", tick=0.02).work()
    assert states(jobs)[3:] == ["pruned", "done", "done"] and not lines(folder / "bad.done")
    with pytest.raises(UserError, match="job 4 is pruned; only jobs that are running become paused"):
        jobs.set_state(4, "paused", ["running"])


def test_the_command_adds_lists_and_says_mistakes_in_one_line(folder, capsys):
    assert queue.main(["--queue", "q.db", "add", "run=a", "stage=sft", "optim.matrix_lr=0.01"]) == 0
    assert queue.main(["--queue", "q.db", "add", "run=b", "--after", "1", "--attempts", "3"]) == 0
    assert queue.main(["--queue", "q.db", "list"]) == 0
    assert "run=a stage=sft optim.matrix_lr=0.01" in capsys.readouterr().out
    assert queue.main(["--queue", "q.db", "list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(job["id"], job["after"], job["most"], job["state"]) for job in found] == [
        (1, [], 2, "waiting"),
        (2, [1], 3, "waiting"),
    ]
    (folder / "text.db").write_text("no database, but a text that is long enough to be read as one" * 20)
    cases = {
        ("--queue", "q.db", "add", "stage=sft"): "a job needs run=<name>",
        ("--queue", "q.db", "add", "run=a", "stage=sft"): "job 1 (waiting) is this training already",
        ("--queue", "q.db", "add", "run=c", "--after", "9"): "--after 9: there is no such job",
        ("--queue", "q.db", "add", "run=c", "--attempts", "0"): "--attempts 0: must be 1 or more",
        ("--queue", "q.db", "cancel", "9"): "has no job 9",
        ("--queue", "q.db", "retry", "1"): "job 1 is waiting; only jobs that are failed or cancelled or",
        ("--queue", "text.db", "list"): "cannot be used as a queue",
    }
    for words, problem in cases.items():
        assert queue.main(list(words)) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and printed.count("\n") == 1 and problem in printed
