"""trainer.max_restarts: a training whose process or node died begins again by itself, from its last checkpoint."""

import os
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPO, run_cli
from holding import FOLDER, TESTS, held, hold_at, release
from processes import children_of, finish, is_alive, start_warm, wait_until
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
)

from llm.parallel import agent
from llm.parallel.agent import Agent, cause, first_failure
from llm.parallel.env import lost_another
from llm.parallel.launch import free_port

TINY = ("experiment=tiny", "batch.tokens_per_step=1024", "trainer=cpu", "precision.compute=fp32", "compile=false")
TINY += ("stage=pretrain", "init_from=tiny/tokenizer", "max_steps=14", "stage.eval_every=0", "stage.sample_every=0")
TINY += (*hold_at(7),)


@pytest.fixture(scope="module")
def root(tokenizer_runs, tmp_path_factory):
    """runs/ with a tokenizer, and a training of two processes that nothing happened to."""
    root = shutil.copytree(tokenizer_runs, tmp_path_factory.mktemp("restart") / "runs")
    done = train(root, "run=straight", "trainer.devices=2")
    assert done.returncode == 0, done.stderr
    return root


def train(root: Path, *args: str):
    return run_cli("train.py", *TINY, f"paths.runs={root}", *args, PYTHONPATH=TESTS)


def start_held(root: Path, folder: Path, *args: str, processes: int = 2, **env: str):
    """The launcher of a training whose `processes` stand still after step 7."""
    env |= {"PYTHONPATH": TESTS, FOLDER: str(folder)}
    launcher = start_warm(REPO / "train.py", *TINY, f"paths.runs={root}", *args, env=env)
    wait_until(lambda: all(held(folder, rank) for rank in range(processes)), launcher)
    return launcher


def weights(root: Path, run: str) -> bytes:
    return (root / run / "pretrain" / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_no_bit_differs(root, tmp_path):
    launcher = start_held(root, tmp_path, "run=killed", "trainer.devices=2", "trainer.max_restarts=3")
    workers = children_of(launcher.pid)
    os.kill(workers[-1], signal.SIGKILL)
    release(tmp_path)
    ((status, out, err),) = finish(launcher)
    assert status == 0 and "was ended by SIGKILL: restart 1 of 3 from step 6" in err, err
    assert "Traceback" not in err, "the other process told of its failed collective"
    assert "resuming at step 6 of 14" in out and "killed/pretrain finished" in out
    assert not any(map(is_alive, workers))
    assert weights(root, "killed") == weights(root, "straight")


@pytest.mark.slow
def test_a_stage_is_overwritten_once_and_a_single_process_starts_again_too(root, tmp_path):
    """A second start with overwrite=true would begin at step 0."""
    shutil.copytree(root / "straight", root / "again")
    more = ("run=again", "trainer.devices=1", "trainer.max_restarts=1", "overwrite=true")
    launcher = start_held(root, tmp_path, *more, processes=1)
    os.kill(children_of(launcher.pid)[-1], signal.SIGKILL)
    release(tmp_path)
    ((status, out, err),) = finish(launcher)
    assert status == 0 and "restart 1 of 1 from step 6" in err and "resuming at step 6 of 14" in out, err
    alone = train(root, "run=alone", "trainer.devices=1")
    assert alone.returncode == 0 and weights(root, "again") == weights(root, "alone")


@pytest.mark.slow
def test_the_node_that_is_left_goes_on(root, tmp_path):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": TESTS, FOLDER: str(tmp_path)}
    command = (REPO / "train.py", *TINY, f"paths.runs={root}", "run=left", "trainer.num_nodes=2")
    nodes = [start_warm(*command, "trainer.max_restarts=2", env=place | {"NODE_RANK": str(k)}) for k in (0, 1)]
    wait_until(lambda: held(tmp_path, 0) and held(tmp_path, 1), nodes[0])
    for pid in (nodes[1].pid, *children_of(nodes[1].pid)):
        os.kill(pid, signal.SIGKILL)
    release(tmp_path)
    ((status, out, err),) = finish(nodes[0])
    assert status == 0 and "restart 1 of 2 from step 6" in err and "left/pretrain finished" in out, err


# ---- what is started again ------------------------------------------------------------------------------------------

KILLED = {0: SimpleNamespace(exitcode=1), 1: SimpleNamespace(exitcode=-signal.SIGKILL)}


@pytest.fixture
def one(tmp_path):
    """An agent that has two restarts left, whose job has a checkpoint at `steps[-1]`."""
    one = Agent.__new__(Agent)
    steps = [0]
    one.__dict__ |= {"steps": steps, "newest_step": lambda: steps[-1], "folder": tmp_path, "began_at": 0}
    one.__dict__ |= {"restarts": 0, "received": [], "_remaining_restarts": 2}
    one._worker_group = SimpleNamespace(spec=SimpleNamespace(max_restarts=2))
    return one


def test_a_killed_process_is_a_reason(one, capsys):
    one.steps.append(10)
    assert one.may_restart(KILLED) and one.began_at == 10
    assert capsys.readouterr().err == "process 1 was ended by SIGKILL: restart 1 of 2 from step 10\n"


def test_who_dies_twice_at_one_place_is_not_started_a_third_time(one, capsys):
    assert one.may_restart(KILLED)
    assert not one.may_restart(KILLED)
    assert "as before, with no checkpoint after step 0: no restart" in capsys.readouterr().err
    one.steps.append(1)
    assert one.may_restart(KILLED)


def test_no_reasons(one):
    mistake = one.folder / "error_0000"
    mistake.touch()
    assert not one.may_restart(KILLED)
    mistake.unlink()
    saved = {rank: SimpleNamespace(exitcode=128 + signal.SIGUSR1) for rank in (0, 1)}
    assert not one.may_restart(saved)
    one.received = [signal.SIGTERM]
    assert not one.may_restart(KILLED)
    one.received, one._remaining_restarts = [], 0
    assert not one.may_restart(KILLED)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[gloo/transport/tcp/pair.cc:537] Read error [::1]:24: Connection reset by peer. This is", "reset by peer"),
        ("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2458", "closed by peer"),
        ("ncclRemoteError: remote process exited or there was a network error.", "remote process exited or"),
        ("mat1 and mat2 shapes cannot be multiplied", None),
    ],
)
def test_a_collective_without_the_other_process_is_told_from_a_mistake_of_the_program(text, reason):
    said = lost_another(RuntimeError(text))
    assert said is None if reason is None else reason in said
    assert lost_another(ConnectionError(text)) is None


def test_the_failure_that_is_told_is_the_one_that_came_first():
    term = SimpleNamespace(exitcode=-signal.SIGTERM)  # the agent's own
    assert first_failure(KILLED | {2: term}) == (1, -signal.SIGKILL)
    assert first_failure({0: term, 1: SimpleNamespace(exitcode=3)}) == (1, 3)
    assert cause({0: term}) == "process 0 was ended by SIGTERM"
    assert cause({4: SimpleNamespace(exitcode=1)}) == "process 4 ended with status 1"


@pytest.mark.parametrize(
    "error, line",
    [
        (RendezvousClosedError(), "another node has ended the job"),
        (RendezvousTimeoutError("1 of 2 came"), "trainer.num_nodes=1: not all nodes came (1 of 2 came)"),
        (RendezvousConnectionError(), "the first node, 127.0.0.1, does not answer"),
    ],
)
def test_a_node_that_has_lost_the_others_ends_with_one_line(error, line, capsys):
    with pytest.raises(SystemExit, match="1"), agent.rendezvous("job", (0, "127.0.0.1", 0), 1):
        raise error
    assert capsys.readouterr().err.startswith(f"error: {line}")


def test_two_jobs_of_one_name_meet_apart(monkeypatch):
    """The place of the first is closed when the second one comes."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # as `launch` does
    for _ in range(2):
        with agent.rendezvous("twins", (0, "127.0.0.1", 0), 1) as place:
            assert place.next_rendezvous().world_size == 1


def test_the_first_meeting_is_of_all_nodes_and_later_ones_of_those_that_are_left(one, monkeypatch):
    """A node that was slow to start once came too late, and all began again with it."""
    with agent.rendezvous("slow", (0, "127.0.0.1", 0), 3) as place:
        assert place.settings.min_nodes == place.settings.max_nodes == 3
        one.prepare = lambda: None
        monkeypatch.setattr(agent.LocalElasticAgent, "_rendezvous", lambda self, group: None)
        one._rendezvous(SimpleNamespace(spec=SimpleNamespace(rdzv_handler=place)))
        assert place.settings.min_nodes == 1 and not one.is_meeting


@pytest.mark.parametrize("answers", [True, False])
def test_a_store_that_does_not_answer_ends_the_node(answers, monkeypatch, capsys):
    """An agent would wait for the answer for ever: the first node keeps its connections while it stands still."""
    asked, ended = threading.Event(), threading.Event()

    def add(key, amount):
        asked.set()
        if not answers:
            ended.wait()
        if ended.is_set():
            raise RuntimeError

    monkeypatch.setattr(agent, "os", SimpleNamespace(_exit=lambda status: ended.set()))
    monkeypatch.setattr(agent, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(agent, "SILENT_SECONDS", 600 if answers else 0.2)
    agent.watch_store(SimpleNamespace(add=add), "silence")
    wait_until(asked.is_set if answers else ended.is_set)
    assert ended.is_set() != answers
    wait_until(lambda: ("silence" in capsys.readouterr().err) != answers)
    ended.set()  # which ends both threads


def test_a_signal_ends_an_agent_that_has_no_processes_yet(one):
    one.is_meeting, one.kill_at = True, float("inf")
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        one.hear(signal.SIGTERM, None)
    one.is_meeting = False
    one.hear(signal.SIGINT, None)
    assert one.received == [signal.SIGTERM, signal.SIGINT] and one.kill_at < float("inf")  # two: they get a time limit


def test_signals_are_passed_on_once_and_a_second_one_sets_a_limit(one, monkeypatch):
    heard = []
    one.__dict__ |= {"passed_on": 0, "kill_at": float("inf"), "is_meeting": False, "_remaining_restarts": 2}
    process = SimpleNamespace(send_signal=heard.append)
    one._pcontext = SimpleNamespace(subprocess_handlers={0: SimpleNamespace(proc=process)})
    going_on = SimpleNamespace(is_failed=lambda: False)
    monkeypatch.setattr(agent.LocalElasticAgent, "_monitor_workers", lambda self, group: going_on)
    for signum in (signal.SIGTERM, signal.SIGINT):
        one.hear(signum, None)
        one._monitor_workers(None)
        one._monitor_workers(None)
    assert heard == [signal.SIGTERM, signal.SIGINT]
    monkeypatch.setattr(agent.time, "monotonic", lambda: one.kill_at + 1)
    one._monitor_workers(None)
    assert heard[-1] == signal.SIGKILL
