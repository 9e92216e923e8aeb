"""One writer for each stage folder: locks of real processes, released by death, shared within a job."""

import errno
import os
import signal
import sys

import pytest
from conftest import compose
from processes import REPO, run, run_python, start, wait_until

from llm.errors import UserError
from llm.run.lock import holder, is_locked, lock_path, one_writer, waiting_lock

HOLD = """
import sys, time
from pathlib import Path
from llm.run.lock import one_writer
with one_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def hold(folder):
    process = start(sys.executable, "-c", HOLD, str(folder))
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_writer_is_told_who_the_first_one_is(tmp_path):
    first = hold(tmp_path / "demo" / "sft")
    with pytest.raises(UserError, match=rf"process {first.pid} on \S+ since 2\d{{3}}-.* UTC: wait"):
        with one_writer(tmp_path / "demo" / "sft"):
            raise AssertionError("both write")
    assert is_locked(tmp_path / "demo" / "sft")
    with one_writer(tmp_path / "demo" / "pretrain"):  # another stage of the run is free
        pass


def test_death_releases_the_lock(tmp_path):
    first = hold(tmp_path / "demo" / "sft")
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not is_locked(tmp_path / "demo" / "sft")
    with one_writer(tmp_path / "demo" / "sft"):
        assert f"process {os.getpid()} on" in holder(lock_path(tmp_path / "demo" / "sft"))


def test_a_forked_child_does_not_keep_the_lock_of_its_dead_parent(tmp_path):
    code = HOLD.replace('    print("held", flush=True)', "    import os\n    if os.fork():\n        os._exit(9)")
    code = code.replace("time.sleep(600)", "print(os.getpid(), flush=True)\n    time.sleep(600)")
    process = start(sys.executable, "-c", code, str(tmp_path / "sft"))
    child = int(process.stdout.readline())
    assert process.wait() == 9
    try:
        os.kill(child, 0)
        assert not is_locked(tmp_path / "sft")
    finally:
        os.kill(child, signal.SIGKILL)


def test_nothing_is_left_and_a_folder_with_something_in_it_stays(tmp_path):
    with one_writer(tmp_path / "empty" / "sft"):
        assert (tmp_path / "empty").is_dir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "report.md").touch()
    with one_writer(tmp_path / "full" / "sft"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["report.md"]


@pytest.mark.parametrize("run_name", ["demo", "lr:0.5"])
def test_processes_that_the_holder_starts_belong_to_its_job(tmp_path, run_name):
    folder = tmp_path / run_name / "sft"
    code = "import sys; from pathlib import Path; from llm.run.lock import one_writer\n"
    code += "with one_writer(Path(sys.argv[1])): print('worker')"
    with one_writer(folder):
        assert run_python(code, str(folder)).stdout == "worker\n"
        assert is_locked(folder)
    assert not lock_path(folder).exists()


def test_eight_processes_that_start_at_once_write_one_after_another(tmp_path):
    code = (
        "import sys; from pathlib import Path; from llm.errors import UserError; from llm.run.lock import one_writer\n"
        "for _ in range(200):\n"
        "    try:\n"
        "        with one_writer(Path(sys.argv[1]) / 'sft'):\n"
        "            mark = Path(sys.argv[1] + '.mark'); mark.touch(exist_ok=False); mark.unlink()\n"
        "    except UserError: pass\n"
    )
    many = [start(sys.executable, "-S", "-c", code, str(tmp_path / "run"), cwd=REPO) for _ in range(8)]
    for process in many:
        out, err = process.communicate()
        assert process.returncode == 0, err


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):
    import errno

    from llm.run import lock

    def none(fd, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with one_writer(tmp_path / "sft"), waiting_lock(tmp_path / ".eval.json.lock"):
        pass
    assert "has no file locks: start each stage once only" in capsys.readouterr().err


def test_the_lock_of_another_user_holds_though_it_cannot_be_written(tmp_path, monkeypatch):
    """Opening to write is refused here as it is to another user: root, who may run this, is refused nothing."""
    stage, real = tmp_path / "demo" / "sft", os.open

    def refuse(path, flags, *mode, **more):
        if flags & os.O_RDWR and str(path).endswith(".lock"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *mode, **more)

    first = hold(stage)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=f"is being written by process {first.pid} on"), one_writer(stage):
        pass
    assert is_locked(stage)


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("text")
    lock_path(tmp_path / "sft").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot be locked"):
        with one_writer(tmp_path / "sft"):
            pass
    assert (tmp_path / "precious").read_text() == "text"


@pytest.mark.parametrize("more", [(), ("overwrite=true",), ("trainer.devices=2",), ("seed=7",)])
def test_a_stage_that_runs_is_neither_trained_twice_nor_deleted(tmp_path, more):
    from llm.stages.run_stage import run_stage

    stage = tmp_path / "tiny" / "tokenizer"
    stage.mkdir(parents=True)
    (stage / "run.json").write_text('{"stage": "tokenizer", "status": "running", "config": {}}')
    first = hold(stage)
    with pytest.raises(UserError, match=f"being written by process {first.pid}"):
        run_stage(compose("train", "experiment=tiny", "stage=tokenizer", f"paths.runs={tmp_path}", *more))
    assert (stage / "run.json").is_file()
    run_stage(compose("train", "experiment=tiny", "stage=tokenizer", f"paths.runs={tmp_path}", "dry_run=true", *more))


@pytest.mark.slow
def test_the_second_of_two_commands_ends_with_status_2_and_the_first_finishes(tmp_path):
    train = (sys.executable, str(REPO / "train.py"), "experiment=tiny", f"paths.runs={tmp_path}")
    command = (*train, "stage=pretrain", "trainer.devices=2", "max_steps=60", "batch.micro_batch_size=2")
    assert run(*train, "stage=tokenizer").returncode == 0
    first = start(*command)
    wait_until(lambda: (tmp_path / "tiny/pretrain/metrics.csv").is_file(), first)
    first.send_signal(signal.SIGSTOP)  # the launcher, which has the lock: it cannot end before the others have asked
    try:
        for more in ((), ("overwrite=true",)):
            second = run(*command, *more)
            assert second.returncode == 2 and f"process {first.pid} on" in second.stderr, second.stderr
            assert len(second.stderr.strip().splitlines()) == 1
    finally:
        first.send_signal(signal.SIGCONT)
    out, err = first.communicate()
    assert first.returncode == 0, err
    steps = [line.split(",")[0] for line in (tmp_path / "tiny/pretrain/metrics.csv").read_text().splitlines()[1:]]
    assert steps == [str(step) for step in range(61)]
