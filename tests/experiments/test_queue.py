"""The queue of experiments: order, dependencies, attempts, workers that are killed, and its command."""

import os
import signal
import sqlite3
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import processes
import pytest
from conftest import REPO

import llm.experiments.queue as command
import llm.experiments.worker as worker
from llm.errors import UserError
from llm.experiments.queue_store import MOST_DEATHS, Job, NewJob, Queue, is_alive, process_name
from llm.run.stage_folder import read_manifest, write_manifest
from llm.utils.files import parse_json

# Stands in for train.py: counts to `steps` in a file, goes on where a SIGTERM ended it, notes that it is done, and does
# nothing where it is done already.
SCRIPT = """
import pathlib, signal, sys, time
given = dict(word.split("=", 1) for word in sys.argv[1:])
out = pathlib.Path(given["out"])
out.mkdir(parents=True, exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
table = out / "metrics.csv"
if (out / "finished").exists():
    sys.exit(0)
if not table.exists():
    table.write_text("step,bpb\\n")
at = len(table.read_text().splitlines()) - 1
while at < int(given.get("steps", 2)):
    time.sleep(float(given.get("pause", 0)))
    at += 1
    with table.open("a") as file:
        file.write(f"{at},{float(given.get('bpb', 1)) / at}\\n")
if "fail" in given:
    print("error: told to fail")
    sys.exit(2)
(out / "finished").touch()
with (out.parent / "done.txt").open("a") as file:
    file.write(out.name + "\\n")
"""
RUN = """
import sys
import llm.experiments.worker as worker
from llm.experiments.queue_store import Queue
worker.POLL_SECONDS, worker.program = 0.02, lambda name: [sys.executable, f"{sys.argv[2]}/{name}.py"]
worker.work(Queue(sys.argv[1]))
"""


@pytest.fixture
def queue(tmp_path) -> Queue:
    return Queue(tmp_path / "q.sqlite")


@pytest.fixture
def scripts(tmp_path, monkeypatch) -> Path:
    """Return a folder with the script in the place of train.py, which workers of this process use."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "train.py").write_text(SCRIPT)
    monkeypatch.setattr(worker, "program", lambda name: [sys.executable, str(folder / f"{name}.py")])
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(worker, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(worker, "PRUNE_SECONDS", 0.05)
    return folder


def job(tmp_path, name: str, *settings: str, **more) -> NewJob:
    """Return a job of the script that writes <tmp_path>/out/<name>."""
    folder = tmp_path / "out" / name
    return NewJob([f"out={folder}", *settings], cwd=str(tmp_path), folder=str(folder), **more)


def states(queue: Queue) -> list[str]:
    return [one.state for one in queue.jobs()]


def done(tmp_path) -> list[str]:
    file = tmp_path / "out" / "done.txt"
    return file.read_text().split() if file.exists() else []


def test_jobs_run_in_order_and_after_what_they_need(queue, tmp_path, scripts):
    b, a = queue.add([job(tmp_path, "b"), job(tmp_path, "a", needs=(-1,))])
    queue.move(a, before=b)  # which it needs all the same
    queue.add([job(tmp_path, "c")], first=True)
    (d,) = queue.add([job(tmp_path, "d")])
    queue.move(d, before=b)
    said = []
    assert worker.work(queue, say=said.append) == (4, 0)
    assert done(tmp_path) == ["c", "d", "b", "a"]
    assert queue.job(a).result == 0.5 and queue.job(a).attempts == 1
    assert any(line.startswith(f"job {a}: done after") and "bpb 0.5" in line for line in said)


def test_jobs_can_be_moved_before_one_as_often_as_wanted(queue, tmp_path):
    a, b, c = queue.add([job(tmp_path, name) for name in "abc"])
    for _ in range(40):
        queue.move(b, before=c)
        queue.move(a, before=c)
        assert [one.id for one in queue.jobs()] == [b, a, c]
    (d,) = queue.add([job(tmp_path, "d")])
    (e,) = queue.add([job(tmp_path, "e")], first=True)
    assert [one.id for one in queue.jobs()] == [e, b, a, c, d]


def test_a_failure_is_tried_again_and_holds_back_what_needs_it(queue, tmp_path, scripts):
    a, b, c = queue.add(
        [job(tmp_path, "a", "fail=1", most_attempts=2), job(tmp_path, "b", needs=(-1,)), job(tmp_path, "c")]
    )
    said = []
    assert worker.work(queue, say=said.append) == (1, 1)
    assert queue.job(a).failures == 2 and queue.job(a).message == "status 2: error: told to fail"
    assert states(queue) == ["failed", "queued", "done"]
    assert said[-1] == f"1 jobs are left: {b} (waits for {a} (failed))"
    log = worker.log_of(queue, queue.job(a)).read_text()
    assert log.count("told to fail") == 2


def test_nothing_is_lost_or_repeated_when_the_worker_is_killed_twice(queue, tmp_path, scripts):
    names = [f"j{i:02d}" for i in range(14)]
    queue.add([job(tmp_path, name, "steps=4", "pause=0.02") for name in names])
    for share in (3, 8):
        started = processes.start(sys.executable, "-c", RUN, str(queue.path), str(scripts), cwd=REPO)
        processes.wait_until(lambda share=share: len(done(tmp_path)) >= share, started)
        started.send_signal(signal.SIGKILL)
        started.communicate()
        assert len(done(tmp_path)) < len(names)
    processes.run(sys.executable, "-c", RUN, str(queue.path), str(scripts), cwd=REPO)
    assert done(tmp_path) == names
    assert states(queue) == ["done"] * len(names)
    assert sum(one.attempts for one in queue.jobs()) <= len(names) + 2
    for name in names:
        rows = (tmp_path / "out" / name / "metrics.csv").read_text().splitlines()
        assert rows[1:] == [f"{n},{1 / n}" for n in (1, 2, 3, 4)]


def test_two_workers_share_a_queue(queue, tmp_path, scripts):
    names = [f"j{i}" for i in range(8)]
    queue.add([job(tmp_path, name, "pause=0.02") for name in names])
    both = [processes.start(sys.executable, "-c", RUN, str(queue.path), str(scripts), cwd=REPO) for _ in range(2)]
    for one in both:
        one.communicate()
    assert sorted(done(tmp_path)) == names and states(queue) == ["done"] * 8


@pytest.mark.parametrize(("action", "state"), [("cancel", "cancelled"), ("pause", "paused")])
def test_a_running_job_saves_and_ends_when_asked(queue, tmp_path, scripts, action, state):
    (a,) = queue.add([job(tmp_path, "a", "steps=100000", "pause=0.01")])
    helper = threading.Thread(target=lambda: (_until(lambda: queue.job(a).process), getattr(queue, action)([a])))
    helper.start()
    worker.work(queue, say=lambda line: None)
    helper.join()
    assert queue.job(a).state == state and queue.job(a).result is None and not done(tmp_path)
    (queue.retry if state == "cancelled" else queue.resume)([a])
    assert queue.job(a).state == "queued" and queue.job(a).attempts == 0


@pytest.mark.parametrize("ended", ["queued", "paused", "failed"])
@pytest.mark.parametrize(("action", "state"), [("cancel", "cancelled"), ("pause", "paused")])
def test_what_is_asked_of_a_job_while_it_ends_is_done(queue, tmp_path, ended, action, state):
    (a,) = queue.add([job(tmp_path, "a", most_attempts=2)])
    queue.claim(process_name(os.getpid()))
    getattr(queue, action)([a])
    assert queue.end(a, ended) == state == queue.job(a).state and queue.job(a).wish is None


def test_a_job_that_ended_before_it_heard_of_a_cancel_has_its_end(queue, tmp_path):
    for name, state in (("a", "done"), ("b", "failed")):
        (number,) = queue.add([job(tmp_path, name)])
        queue.claim(process_name(os.getpid()))
        queue.cancel([number])
        assert queue.end(number, state) == state


def test_a_later_wish_replaces_that_which_a_job_saves_for(queue, tmp_path, scripts, monkeypatch):
    (scripts / "train.py").write_text(SCRIPT.replace("sys.exit(143)", "(time.sleep(0.6), sys.exit(143))"))
    queue.add([job(tmp_path, "a", "steps=100000", "pause=0.01")])
    saved, wishes, ends = tmp_path / "out" / "a" / "metrics.csv", iter(["paused"]), []
    monkeypatch.setattr(queue, "beat", lambda *_: next(wishes, "cancelled") if saved.exists() else None)
    monkeypatch.setattr(queue, "end", lambda number, state, *_: ends.append(state))
    worker._run(queue, queue.claim(process_name(os.getpid())), worker._Stop(None))
    assert ends == ["cancelled"]


def test_time_that_is_up_puts_the_job_back(queue, tmp_path, scripts):
    (a,) = queue.add([job(tmp_path, "a", "steps=100000", "pause=0.01")])
    begun = time.monotonic()
    assert worker.work(queue, minutes=0.2 / 60, say=lambda line: None) == (0, 0)
    assert time.monotonic() - begun >= 0.2
    assert queue.job(a).state == "queued"


def test_a_signal_to_the_worker_lets_the_job_save_and_puts_it_back(queue, tmp_path, scripts):
    (a,) = queue.add([job(tmp_path, "a", "steps=100000", "pause=0.01")])
    saved = tmp_path / "out" / "a" / "metrics.csv"
    helper = threading.Thread(target=lambda: (_until(saved.exists), os.kill(os.getpid(), signal.SIGTERM)))
    helper.start()
    assert worker.work(queue, say=lambda line: None) == (0, 0)
    helper.join()
    assert queue.job(a).state == "queued" and saved.exists()


def test_what_is_worse_than_the_median_of_its_family_is_given_up(queue, tmp_path, scripts):
    good = [job(tmp_path, f"g{i}", "steps=8", f"bpb={i}", family="lr") for i in (1, 2, 3)]
    bad = job(tmp_path, "bad", "steps=100000", "pause=0.01", "bpb=9", family="lr", prune_after=4)
    fine = job(tmp_path, "fine", "steps=8", "pause=0.02", "bpb=1.5", family="lr", prune_after=4)
    alone = job(tmp_path, "alone", "steps=8", "pause=0.02", "bpb=9", family="other", prune_after=4)
    queue.add([*good, bad, fine, alone])
    assert worker.work(queue, say=lambda line: None) == (5, 0)
    assert states(queue) == ["done"] * 3 + ["pruned", "done", "done"]
    pruned = queue.jobs()[3]
    assert "median" in pruned.message and pruned.result is not None


def test_a_curve_that_the_job_overwrites_does_not_judge_it(queue, tmp_path, scripts):
    queue.add([job(tmp_path, f"g{i}", f"bpb={i}", family="lr") for i in (1, 2, 3)])
    worker.work(queue, say=lambda line: None)
    new = job(tmp_path, "new", "overwrite=true", family="lr", prune_after=1)
    table = Path(new.folder) / "metrics.csv"
    table.parent.mkdir()
    table.write_text("step,bpb\n1,9\n")
    os.utime(table, (time.time() - 60,) * 2)
    queue.add([new])
    mine = queue.claim(process_name(os.getpid()))
    assert not worker.is_worse(mine, queue.jobs())
    table.write_text("step,bpb\n1,9\n")
    os.utime(table, (mine.started + 1,) * 2)
    assert worker.is_worse(mine, queue.jobs())


@pytest.mark.parametrize(
    ("begun", "given", "runs"),
    [
        (-60, ["overwrite=true"], ["overwrite=true"]),  # that of an earlier training, which is to go
        (60, ["overwrite=true", "seed=1"], ["seed=1", "overwrite=false", "resume=true"]),
        (60, ["resume=false"], ["overwrite=false", "resume=true"]),
        (None, ["overwrite=true"], ["overwrite=true"]),
    ],
)
def test_what_a_job_has_begun_it_does_not_overwrite(queue, tmp_path, scripts, begun, given, runs):
    (a,) = queue.add([job(tmp_path, "a", *given)])
    if begun is not None:
        at = datetime.fromtimestamp(queue.job(a).added + begun, UTC).isoformat()
        write_manifest(queue.job(a).folder, {"stage": "pretrain", "status": "interrupted", "started": at})
    worker.work(queue, say=lambda line: None)
    assert queue.job(a).state == "done" and queue.job(a).settings[1:] == given
    log = worker.log_of(queue, queue.job(a)).read_text().splitlines()
    assert log[0] == f"$ train.py {' '.join([queue.job(a).settings[0], *runs])}"


@pytest.mark.parametrize(
    ("mode", "own", "worse"), [("min", 2.5, True), ("min", 1.5, False), ("max", 1.5, True), ("max", 2.5, False)]
)
def test_the_median_rule_knows_which_way_is_better(tmp_path, mode, own, worse):
    def told(name, value, **more):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.csv").write_text(f"step,bpb\n5,{value}\n")
        return Job([], folder=str(folder), family="f", mode=mode, prune_after=5, **more)

    others = [told(f"o{v}", v, state="done") for v in (1, 2, 3)]
    mine = told("mine", own, state="running")
    assert worker.is_worse(mine, [*others, mine]) is worse
    assert not worker.is_worse(mine, others[:2]), "two are too few to compare with"


def test_the_median_rule_reads_one_metric_of_the_whole_family(tmp_path):
    def told(name, bpb, loss, metric=None, **more):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.csv").write_text(f"step,bpb,loss\n5,{bpb},{loss}\n")
        return Job([], folder=str(folder), family="f", metric=metric, prune_after=5, **more)

    others = [told(f"o{v}", v, v + 4, "bpb", state="done") for v in (1, 2, 3)]
    fine = told("fine", 1.5, 5.5, "loss", state="running")  # a loss above all bpb
    assert not worker.is_worse(fine, [*others, fine])
    poor = told("poor", 2.5, 6.5, "loss", state="running")
    assert worker.is_worse(poor, [*others, poor])


def test_the_median_rule_compares_with_what_others_had_at_that_step(tmp_path):
    """Leaves a job alone that leads at its step, though the others, which have ended, went on to better values."""

    def told(name, *rows, **more):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.csv").write_text("\n".join(["step,bpb", *rows, ""]))
        return Job([], folder=str(folder), family="f", mode="min", prune_after=5, **more)

    others = [told(f"o{i}", "5,2.0", "10,1.0", state="done") for i in range(3)]
    ahead, behind = told("ahead", "5,1.5", state="running"), told("behind", "5,2.5", state="running")
    late = told("late", "5,1.5", "10,1.4", state="running")
    assert [worker.is_worse(one, [*others, one]) for one in (ahead, behind, late)] == [False, True, True]


def test_a_job_whose_worker_has_died_is_taken_over_when_its_process_has_ended(queue, tmp_path):
    (a,) = queue.add([job(tmp_path, "a")])
    gone = process_name(os.getpid()).rsplit(":", 1)[0] + ":0-0"  # this number, but started at another time
    assert not is_alive(gone, time.time()) and is_alive(process_name(os.getpid()), None)
    assert queue.claim(gone).id == a
    queue.beat(a, process_name(os.getpid()))
    assert queue.claim("other") is None, "its process still runs"
    queue.beat(a, gone)
    again = queue.claim(process_name(os.getpid()))
    assert again.id == a and again.attempts == 2


def test_a_job_whose_worker_has_died_can_be_cancelled_replaced_and_cleared(queue, tmp_path):
    gone = process_name(os.getpid()).rsplit(":", 1)[0] + ":0-0"

    def killed(wish=None):
        (number,) = queue.add([job(tmp_path, "a")])
        assert queue.claim(gone).id == number
        if wish:
            with sqlite3.connect(queue.path) as db:
                db.execute("UPDATE jobs SET wish = ? WHERE id = ?", (wish, number))
        return number

    number = killed()
    queue.cancel([number])
    assert queue.job(number).state == "cancelled"
    number = killed("cancelled")
    with pytest.raises(UserError, match=f"job {number} is cancelled"):
        queue.cancel([number])
    assert queue.job(number).state == "cancelled", "the list says so too"
    number = killed("cancelled")
    killed("cancelled")  # it writes the same folder
    assert queue.job(number).state == "cancelled" and queue.clear() == 4


def test_a_job_that_kills_its_workers_fails_in_the_end(queue, tmp_path):
    (a,) = queue.add([job(tmp_path, "a")])
    gone = process_name(os.getpid()).rsplit(":", 1)[0] + ":0-0"
    for _ in range(MOST_DEATHS):
        assert queue.claim(gone) is not None
    assert queue.claim(gone) is None
    assert queue.job(a).state == "failed" and f"{MOST_DEATHS} times" in queue.job(a).message


def test_a_stop_in_good_order_is_no_death(queue, tmp_path):
    (a,) = queue.add([job(tmp_path, "a")])
    gone = process_name(os.getpid()).rsplit(":", 1)[0] + ":0-0"
    for _ in range(MOST_DEATHS):
        assert queue.end(queue.claim(gone).id, "queued") == "queued"
    for _ in range(MOST_DEATHS):
        assert queue.claim(gone).id == a
    assert queue.claim(gone) is None and queue.job(a).state == "failed"


def test_a_worker_elsewhere_is_believed_until_it_is_silent():
    assert is_alive("elsewhere:1:x", time.time()) and not is_alive("elsewhere:1:x", time.time() - 1000)


def test_two_open_jobs_never_write_one_folder(queue, tmp_path):
    queue.add([job(tmp_path, "a")])
    with pytest.raises(UserError, match="job 1 of the queue writes .*a already"):
        queue.add([job(tmp_path, "b"), job(tmp_path, "a")])
    assert len(queue.jobs()) == 1, "a mistake adds nothing"


def test_a_job_is_not_retried_into_a_folder_that_another_open_one_writes(queue, tmp_path):
    (a,) = queue.add([job(tmp_path, "a")])
    queue.cancel([a])
    (again,) = queue.add([job(tmp_path, "a")])
    with pytest.raises(UserError, match=f"job {again} of the queue writes .*a already; cancel that one first"):
        queue.retry([a])
    queue.cancel([again])
    with pytest.raises(UserError, match=f"job {a} of the queue writes"):
        queue.retry([a, again])
    queue.retry([again])
    assert states(queue) == ["cancelled", "queued"]


def test_mistakes_are_told(queue, tmp_path):
    (a,) = queue.add([job(tmp_path, "a")])
    with pytest.raises(UserError, match="--after 7: there is no such job"):
        queue.add([job(tmp_path, "b", needs=(7,))])
    with pytest.raises(UserError, match="job 1 is queued: this is for jobs that are paused"):
        queue.resume([a])
    with pytest.raises(UserError, match="job 9 is not in the queue; the list has 1"):
        queue.cancel([a, 9])
    with pytest.raises(UserError, match="--before 1: is the job that is moved"):
        queue.move(a, before=a)
    assert queue.job(a).state == "queued"


def test_a_file_that_is_no_queue_is_told(tmp_path):
    (tmp_path / "q").write_text("not a database, but long enough to be looked at " * 40)
    with pytest.raises(UserError, match="paths.queue=.*cannot be used as a queue"):
        Queue(tmp_path / "q")
    with sqlite3.connect(tmp_path / "later") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError, match="later version of Fathom"):
        Queue(tmp_path / "later")


def test_clear_keeps_what_is_needed(queue, tmp_path, scripts):
    a, b = queue.add([job(tmp_path, "a"), job(tmp_path, "b")])
    worker.work(queue, say=lambda line: None)
    queue.add([job(tmp_path, "c", needs=(b,))])
    assert queue.clear() == 1 and [one.id for one in queue.jobs()] == [b, 3]


def test_clear_keeps_what_a_failed_job_needs_that_an_open_one_waits_for(queue, tmp_path, scripts):
    names = {"first": [], "a": ["first"], "b": ["a"], "c": ["b"]}
    ids = {}
    for name, needs in names.items():
        settings = ["fail=1"] if name == "b" else []
        (ids[name],) = queue.add([job(tmp_path, name, *settings, needs=tuple(ids[n] for n in needs))])
    worker.work(queue, say=lambda line: None)
    assert queue.clear() == 1 and [one.id for one in queue.jobs()] == [ids["a"], ids["b"], ids["c"]]
    queue.retry([ids["b"]])
    assert queue.claim(process_name(os.getpid())).id == ids["b"]


def test_a_job_that_is_queued_again_has_no_result_of_before(queue, tmp_path):
    (a,) = queue.add([job(tmp_path, "a")])
    queue.claim(process_name(os.getpid()))
    queue.end(a, "pruned", "its values were worse", 2.5)
    queue.retry([a])
    assert (queue.job(a).state, queue.job(a).result, queue.job(a).message) == ("queued", None, "")


def test_a_long_last_line_of_a_log_is_cut_with_a_mark(tmp_path):
    for words, wanted in (("x" * 300, "x" * 300), ("x" * 301, "x" * 299 + "…")):
        (tmp_path / "1.log").write_text(f"before\n{words}\n")
        assert worker._last_line(tmp_path / "1.log", 7) == wanted


# The command


def run(tmp_path, *words: str) -> int:
    return command.main([*words, "--queue", str(tmp_path / "q.sqlite")])


def test_a_sweep_becomes_jobs_with_runs_of_their_own(tmp_path, capsys):
    runs = f"paths.runs={tmp_path}/runs"
    words = ["-m", "experiment=tiny", "stage=tokenizer,pretrain", "seed=1,2", "run=a", runs]
    assert run(tmp_path, "add", "--json", "--family", "f", "--hypothesis", "seeds differ", *words) == 0
    jobs = parse_json(capsys.readouterr().out.encode(), "jobs")
    assert [one["folder"] for one in jobs] == [
        f"{tmp_path}/runs/a-seed={seed}/{stage}" for stage in ("tokenizer", "pretrain") for seed in (1, 2)
    ]
    assert [one["needs"] for one in jobs] == [[], [], [1], [2]]
    assert {one["hypothesis"] for one in jobs} == {"seeds differ"} and {one["state"] for one in jobs} == {"queued"}
    assert run(tmp_path, "list") == 0 and "waits for 1 (queued)" in capsys.readouterr().out


def test_a_list_reads_the_queue_once(queue, tmp_path, capsys, monkeypatch):
    queue.add([job(tmp_path, f"a{i}") for i in range(5)])
    reads, jobs = [], Queue.jobs
    monkeypatch.setattr(Queue, "jobs", lambda self: reads.append(self) or jobs(self))
    assert run(tmp_path, "list", "--json") == 0 and len(reads) == 1
    found = parse_json(capsys.readouterr().out.encode(), "jobs")
    assert [one["log"] for one in found] == [str(worker.log_of(queue, one)) for one in jobs(queue)]


def test_a_job_waits_for_the_queued_job_that_makes_what_it_takes(tmp_path, capsys):
    words = ["experiment=tiny", f"paths.runs={tmp_path}/runs", "run=a"]
    assert run(tmp_path, "add", "stage=tokenizer", *words) == 0
    assert run(tmp_path, "add", "-m", "stage=pretrain,sft", *words) == 0
    assert run(tmp_path, "add", "-m", "stage=pretrain", "seed=1,2", *words) == 0
    assert run(tmp_path, "add", "--script", "evaluate", words[1], "run=a", "stage=pretrain") == 0
    tokenizer, pretrain, sft, one, two, scored = Queue(tmp_path / "q.sqlite").jobs()
    assert pretrain.needs == (tokenizer.id,) and scored.needs == (pretrain.id,)
    assert run(tmp_path, "add", "--script", "evaluate", words[1], "run=a") == 0  # of the last stage that there will be
    assert Queue(tmp_path / "q.sqlite").jobs()[-1].needs == (tokenizer.id, pretrain.id, sft.id)
    assert one.needs == two.needs == (tokenizer.id,)
    assert "init_from='a/tokenizer'" in one.settings and "run='a-seed=1'" in one.settings
    # usually sft starts from midtrain, which no job makes: as by `train.py -m`, it takes what this sweep has pretrained
    assert sft.needs == (pretrain.id,) and "init_from='a/pretrain'" in sft.settings


def test_a_job_waits_for_the_queued_jobs_that_make_its_other_models(tmp_path):
    words = ["experiment=tiny", f"paths.runs={tmp_path}/runs"]
    assert run(tmp_path, "add", "-m", "stage=pretrain", "run=a,b,c", "init_from=old/tokenizer", *words) == 0
    taught = ["stage=pretrain", "run=d", "init_from=old/tokenizer", "stage.teachers=[a,b/pretrain]", *words]
    assert run(tmp_path, "add", *taught) == 0
    copied = ["stage=distill", "run=e", "init_from=a/pretrain", f"stage.teacher={tmp_path}/runs/c/pretrain", *words]
    assert run(tmp_path, "add", *copied) == 0
    a, b, c, two, one = Queue(tmp_path / "q.sqlite").jobs()
    assert two.needs == (a.id, b.id) and one.needs == (a.id, c.id)


@pytest.mark.parametrize(
    ("key", "folder"),
    [
        ("init_from", "runs/a/pretrain"),
        ("init_from", "{}/runs/a/pretrain"),
        ("init_from", "{}/runs/a/pretrain/model"),
        ("stage.teacher", "runs/a/pretrain/model"),
    ],
)
def test_a_job_waits_for_the_queued_job_that_makes_the_folder_it_names(tmp_path, monkeypatch, key, folder):
    monkeypatch.chdir(tmp_path)
    words = ["experiment=tiny", "paths.runs=runs"]
    assert run(tmp_path, "add", "-m", "stage=pretrain,sft", "run=a", "init_from=old/tokenizer", *words) == 0
    named = {"init_from": "old/pretrain", "stage.teacher": "old/pretrain"} | {key: folder.format(tmp_path)}
    assert run(tmp_path, "add", "stage=distill", "run=b", *(f"{k}={v}" for k, v in named.items()), *words) == 0
    made, _, taking = Queue(tmp_path / "q.sqlite").jobs()
    assert taking.needs == (made.id,), "and not what else the run makes"


@pytest.mark.parametrize(
    ("words", "of_jobs"),
    [
        (["logger=null"], [["logger=null"]]),
        (["-m", "logger=null", "seed=1,2"], [["~logger", "seed=1"], ["~logger", "seed=2"]]),
        (["-m", "arch=glob(mod*)"], [["arch=modern"], ["arch=modern_2026_02"]]),
        (["-m", 'hydra.sweeper.params={seed: "choice(1,2)"}'], [["seed=1"], ["seed=2"]]),
        (["-m", "--config-dir={}", "seed=1,2"], [["--config-dir={}", "seed=1"], ["--config-dir={}", "seed=2"]]),
    ],
)
def test_a_command_line_means_what_it_means_to_train(tmp_path, words, of_jobs):
    fixed = ["stage=tokenizer", f"paths.runs={tmp_path}/runs", "run=a"]
    assert run(tmp_path, "add", *fixed, *(word.replace("{}", str(tmp_path)) for word in words)) == 0
    jobs = Queue(tmp_path / "q.sqlite").jobs()
    wanted = [[word.replace("{}", str(tmp_path)) for word in one] for one in of_jobs]
    left = [[word for word in one.settings if word not in fixed and not word.startswith("run=")] for one in jobs]
    assert sorted(left) == sorted(wanted)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["add", "sed=1"], "unknown key 'sed'"),
        (["add", "seed=1,2"], "-m"),
        (["add", "experiment=tiny", "--attempts", "0"], "--attempts 0: must be at least 1"),
        (["add", "experiment=tiny", "--prune-after", "5"], "--family"),
        (["add", "experiment=tiny", "--after", "x"], "--after x: must be the number of a job"),
        (["cancel"], "cancel: give the numbers of jobs"),
        (["show", "4"], "job 4 is not in the queue"),
        (["move", "1"], "--before"),
        (["conclude", "1"], "--verdict"),
    ],
)
def test_a_wrong_command_is_one_line(tmp_path, capsys, words, line):
    assert run(tmp_path, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and line in error and error.count("\n") == 1
    assert not Queue(tmp_path / "q.sqlite").jobs()


def test_the_ledger_holds_every_hypothesis_with_its_mean_and_verdict(queue, tmp_path, scripts, capsys):
    jobs = [job(tmp_path, f"a{i}", f"bpb={i}", hypothesis="smaller is better", family="night") for i in (1, 2, 3)]
    queue.add([*jobs, job(tmp_path, "none"), job(tmp_path, "b", "fail=1", hypothesis="it fails", family="night")])
    worker.work(queue, say=lambda line: None)
    assert run(tmp_path, "conclude", "1", "2", "3", "--verdict", "keep") == 0
    capsys.readouterr()
    assert run(tmp_path, "ledger", "--json") == 0
    first, second = parse_json(capsys.readouterr().out.encode(), "ledger")
    assert first["results"] == [0.5, 1.0, 1.5] and first["mean"] == 1.0 and first["verdict"] == "keep"
    assert first["stderr"] == pytest.approx(0.5 / 3**0.5) and first["jobs"] == [1, 2, 3]
    assert second["mean"] is None and second["states"] == ["failed"]
    assert run(tmp_path, "ledger") == 0 and "smaller is better" in capsys.readouterr().out


def test_the_mean_of_a_hypothesis_is_of_jobs_that_came_to_their_end(queue, tmp_path, capsys):
    """Leaves out what a job had reached when it was given up."""
    queue.add([job(tmp_path, name, hypothesis="it helps") for name in ("whole", "given-up")])
    for state, result in (("done", 1.0), ("pruned", 9.0)):
        queue.end(queue.claim(process_name(os.getpid())).id, state, "", result)
    assert run(tmp_path, "ledger", "--json") == 0
    (told,) = parse_json(capsys.readouterr().out.encode(), "ledger")
    assert told["results"] == [1.0] and told["mean"] == 1.0 and told["states"] == ["done", "pruned"]


@pytest.mark.slow
def test_real_trainings_survive_a_killed_worker(tmp_path):
    words = ["experiment=tiny", f"paths.runs={tmp_path}/runs", "run=a"]
    assert run(tmp_path, "add", "stage=tokenizer", *words) == 0
    more = ["stage=pretrain", "seed=1,2", "max_steps=60", "save_every=5"]
    assert run(tmp_path, "add", "-m", *more, *words) == 0  # they share the tokenizer that job 1 will make
    line = [sys.executable, "-m", "llm.experiments.queue", "run", "--queue", str(tmp_path / "q.sqlite")]
    started = processes.start(*line, cwd=REPO)
    folder = tmp_path / "runs" / "a-seed=1" / "pretrain"
    processes.wait_until(lambda: list(folder.glob("checkpoints/*.ckpt")), started)
    started.send_signal(signal.SIGKILL)
    started.communicate()
    finished = processes.run(*line, cwd=REPO)
    assert "2 done, 0 failed" in finished.stdout, finished.stdout + finished.stderr
    assert [one.state for one in Queue(tmp_path / "q.sqlite").jobs()] == ["done"] * 3
    assert read_manifest(folder)["steps"] == 60


def _until(condition) -> None:
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
