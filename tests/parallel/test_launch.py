"""Launching many processes: torchrun, several nodes, SLURM, sweeps; what they say and how they end.

Two "nodes" are two launchers on 127.0.0.1, each with one process.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPO, run_cli
from holding import FOLDER, TESTS, has_left, held, hold_at, release
from omegaconf import OmegaConf
from processes import HANG, children_of, finish, start, start_warm, wait_until

from llm.cli.overrides import check_overrides
from llm.errors import UserError
from llm.parallel import heartbeat
from llm.parallel.env import LAUNCHED, adopt_slurm, check_layout, take_late
from llm.parallel.launch import child_env, free_port, launch, meeting_place

TINY = ("experiment=tiny", "batch.tokens_per_step=1024", "trainer=cpu", "precision.compute=fp32", "compile=false")
TRAIN = REPO / "train.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
PIPELINE = ("-m", "stage=tokenizer,pretrain")


def two_nodes(root: Path, *args: str, **env: str) -> list:
    """Launchers of train.py on two nodes."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": TESTS, **env}
    command = (TRAIN, *TINY, "trainer.num_nodes=2", f"paths.runs={root}", *args)
    return [start_warm(*command, env=place | {"NODE_RANK": str(k)}) for k in (0, 1)]


def slurm_tasks(root: Path, *args: str, **env: str) -> list:
    """Start what srun --ntasks=2 starts, with the variables that it sets."""
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    step |= {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_NODEID": "0"}
    step |= {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "train", "PYTHONPATH": TESTS, **env}  # Lightning looks for these
    command = (TRAIN, *TINY, f"paths.runs={root}", *args)
    return [start_warm(*command, env=step | {"SLURM_PROCID": k, "SLURM_LOCALID": k}) for k in ("0", "1")]


def torchrun(*args: str, script: str = "train.py", **env: str) -> subprocess.Popen:
    """The agent of torchrun with two processes of train.py, in new interpreters."""
    nodes, paths = ("--standalone", "--nproc_per_node=2"), os.pathsep.join([str(REPO), TESTS])
    return start(*TORCHRUN, *nodes, script, *TINY, *args, env={"PYTHONPATH": paths, **env})


@pytest.fixture(scope="module")
def root(tokenizer_runs, tmp_path_factory):
    """runs/ with a tokenizer of the run `tiny`."""
    return shutil.copytree(tokenizer_runs, tmp_path_factory.mktemp("launch") / "runs")


LONG = ("stage=pretrain", "init_from=tiny/tokenizer", "max_steps=60", "stage.eval_every=0", "stage.sample_every=0")
LONG += (*hold_at(5),)
ODD = ("stage=pretrain", "init_from=tiny/tokenizer", "run=odd", "batch.tokens_per_step=512")


@pytest.mark.slow
def test_torchrun_takes_a_pipeline(tmp_path):
    ((status, out, err),) = finish(torchrun(*PIPELINE, f"paths.runs={tmp_path}"))
    assert status == 0 and out.count("tiny/tokenizer finished") == out.count("tiny/pretrain finished") == 1, err
    assert out.count("== job 2 of 2") == 1


@pytest.mark.slow
def test_torchrun_on_two_nodes(tmp_path):
    nodes = ("--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}")
    command = ("train.py", *TINY, *PIPELINE, "trainer.num_nodes=2", f"paths.runs={tmp_path}")
    agents = [start(*TORCHRUN, *nodes, f"--node_rank={k}", *command) for k in (0, 1)]
    (status, out, err), (other, quiet, _) = finish(*agents)
    assert status == other == 0 and out.count("tiny/pretrain finished") == 1 and quiet == "", err


@pytest.mark.slow
def test_two_launchers_take_a_pipeline(tmp_path):
    (status, out, err), (other, quiet, _) = finish(*two_nodes(tmp_path, *PIPELINE))
    assert status == other == 0 and out.count("tiny/pretrain finished") == 1, err
    assert "finished" not in quiet


@pytest.mark.slow
def test_slurm_tasks_take_a_pipeline(tmp_path):
    (status, out, err), (other, quiet, _) = finish(*slurm_tasks(tmp_path, *PIPELINE))
    assert status == other == 0 and out.count("tiny/pretrain finished") == 1 and quiet == "", err


@pytest.mark.slow
def test_a_sweep_of_two_processes_each(root):
    done = run_cli("train.py", *TINY, "-m", "stage=pretrain", "model=d2,d4", "trainer.devices=2", f"paths.runs={root}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tiny-d2/pretrain finished") == done.stdout.count("tiny-d4/pretrain finished") == 1


# ---- ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dead_process_ends_every_node(root, tmp_path):
    """The launcher of the other node learns it from its own processes, which wait for the dead one."""
    more = ("run=dead", "trainer.devices=2", "batch.tokens_per_step=2048")
    nodes = two_nodes(root, *LONG, *more, **{FOLDER: str(tmp_path)})
    wait_until(lambda: all(held(tmp_path, rank) for rank in range(4)), nodes[0])
    os.kill(children_of(nodes[1].pid)[-1], signal.SIGKILL)
    release(tmp_path)
    (status, *_), (other, _, err) = finish(*nodes)
    assert status == 1 and other == 128 + signal.SIGKILL
    assert "was ended by SIGKILL" in err


@pytest.mark.slow
def test_sigusr1_on_one_node_stops_and_saves_on_all(root, tmp_path):
    long = (*LONG, "run=preempted")
    nodes = two_nodes(root, *long, **{FOLDER: str(tmp_path)})
    wait_until(lambda: held(tmp_path, 0) and held(tmp_path, 1), nodes[0])
    nodes[1].send_signal(signal.SIGUSR1)
    wait_until(lambda: has_left(tmp_path, 1), nodes[1])
    release(tmp_path)
    (status, out, err), (other, *_) = finish(*nodes)
    assert status == other == 128 + signal.SIGUSR1 and "stopped by SIGUSR1 at step" in out, err
    step = out.split("stopped by SIGUSR1 at step ")[1].split(",")[0]
    alone = run_cli("train.py", *TINY, *long, f"paths.runs={root}", PYTHONPATH=TESTS)
    assert alone.returncode == 0 and f"resuming at step {step} of 60" in alone.stdout, alone.stderr


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_slurm_tasks_stop_and_save(root, tmp_path, signum):
    tasks = slurm_tasks(root, *LONG, f"run=slurm{signum}", **{FOLDER: str(tmp_path)})
    wait_until(lambda: held(tmp_path, 0) and held(tmp_path, 1), tasks[0])
    for task in tasks:
        task.send_signal(signum)
    (status, out, err), (other, *_) = finish(*tasks)
    assert status == other == 128 + signum and f"stopped by {signum.name}" in out, err


@pytest.mark.slow
def test_torchrun_stops_and_saves(root, tmp_path):
    agent = torchrun(*LONG, "run=agent", f"paths.runs={root}", **{FOLDER: str(tmp_path)})
    wait_until(lambda: held(tmp_path, 0) and held(tmp_path, 1), agent)
    agent.send_signal(signal.SIGTERM)
    ((status, out, err),) = finish(agent)
    assert status and "stopped by SIGTERM at step" in out, err


# ---- mistakes -------------------------------------------------------------------------------------------------------


# train.py, whose processes leave rank 0 more time to speak than they do, if the machine is busy.
PATIENT = """
from llm.cli import app
app.PATIENCE_SECONDS = 600
app.run_app("train", "llm.stages.run_stage.run_stage")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "noted"), [(1, signal.SIGTERM), (2, None)])
def test_a_signal_behind_the_last_step_of_the_processes_ends_the_sweep_of_one_node(monkeypatch, nodes, noted):
    """A launcher of another node may have heard nothing: it would wait for this one at the next meeting."""

    class Ended:
        def __init__(self, *args):
            self.received = []

        def hear(self, signum, frame):
            self.received.append(signum)

        def run(self):
            os.kill(os.getpid(), signal.SIGTERM)
            return SimpleNamespace(is_failed=lambda: False)

    monkeypatch.setattr("llm.parallel.agent.Agent", Ended)
    monkeypatch.setattr("llm.parallel.agent.rendezvous", lambda *args: nullcontext())
    monkeypatch.setattr("llm.parallel.launch.meeting_place", lambda nodes: ("localhost:1", "localhost"))
    assert launch(SimpleNamespace(num_nodes=nodes, max_restarts=0), 2, "title", dict, int) == 0
    assert (take_late(), take_late()) == (noted, None)


def test_a_mistake_under_torchrun_is_said_once(root, tmp_path):
    (tmp_path / "patient.py").write_text(PATIENT)
    ((status, _, err),) = finish(torchrun(*ODD, f"paths.runs={root}", script=str(tmp_path / "patient.py")))
    assert status == 1 and err.count("error: batch.tokens_per_step=512") == 1 and "exitcode  : 2" in err


@pytest.mark.parametrize(
    "world, here, num_nodes, fits", [(4, 2, 1, True), (4, 2, 2, True), (4, 2, 4, False), (5, 2, 1, False)]
)
def test_num_nodes_must_be_what_the_launcher_started(monkeypatch, world, here, num_nodes, fits):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    cfg = OmegaConf.create({"trainer": {"num_nodes": num_nodes}})
    with nullcontext() if fits else pytest.raises(UserError, match=f"started {world} processes, {here} on this node"):
        check_layout(cfg)


def test_nodes_need_a_meeting_place(root, monkeypatch):
    done = run_cli("train.py", *TINY, *LONG, "trainer.num_nodes=2", f"paths.runs={root}", MASTER_PORT="1")
    assert done.returncode == 2 and "trainer.num_nodes=2: MASTER_ADDR, NODE_RANK not set" in done.stderr
    for name, value in {"MASTER_ADDR": "here", "MASTER_PORT": "1", "NODE_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    assert meeting_place(3) == (2, "here", 1)
    with pytest.raises(UserError, match="NODE_RANK=2: with trainer.num_nodes=2 it is 0 to 1"):
        meeting_place(2)


STEP = {
    "SLURM_JOB_ID": "12345678",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]-ib,login",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "gpu07-ib"}),
        ({"MASTER_PORT": "29500"}, {"MASTER_PORT": "29500"}),
        ({"SLURM_STEP_NODELIST": "n1,n2"}, {"MASTER_ADDR": "n1", "MASTER_PORT": "25681"}),
        ({"SLURM_STEP_NUM_TASKS": "1"}, {"RANK": None}),  # one task starts the others itself
        ({"SLURM_STEP_NUM_TASKS": None, "SLURM_NTASKS": "16"}, {"RANK": None}),  # the shell of salloc or sbatch
        (dict.fromkeys(LAUNCHED, "0"), {"RANK": "0", "WORLD_SIZE": "0"}),  # torchrun within srun
        ({"SLURM_STEP_TASKS_PER_NODE": "8,7"}, None),
    ],
)
def test_variables_of_slurm(monkeypatch, changes, expected):
    monkeypatch.setattr(os, "environ", {name: value for name, value in (STEP | changes).items() if value is not None})
    if expected is None:
        with pytest.raises(UserError, match="SLURM started 8,7 tasks per node"):
            adopt_slurm()
        return
    adopt_slurm()
    assert {name: os.environ.get(name) for name in expected} == expected


JOBS = ("-m", "hydra/launcher=submitit_local", "stage=pretrain", "init_from=tiny/tokenizer")


@pytest.mark.slow
def test_a_sweep_of_submitted_jobs(root, tmp_path):
    pytest.importorskip("submitit")
    command = ("train.py", *TINY, *JOBS, f"hydra.launcher.submitit_folder={tmp_path}/%j", f"paths.runs={root}")
    done = run_cli(*command, "run=jobs", "model=d2,d4", "trainer.devices=2")
    assert done.returncode == 0 and all((root / f"jobs-{d}/pretrain/model").is_dir() for d in ("d2", "d4")), done.stderr
    done = run_cli(*command, "run=jobs", "seed=1,2", "batch.tokens_per_step=513")
    assert (
        done.returncode == 2
        and done.stderr.count("error: batch.tokens_per_step=513") == 1
        and "job 1 of 2" in done.stderr
    )


def test_launchers_of_sweeps_are_checked(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"hydra/launcher=slurm: needs a package .*: pip install -e '.\[slurm\]'"):
        check_overrides("train", ["-m", "hydra/launcher=slurm", "model=d2,d4"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(UserError, match="there is no sbatch here"):
        check_overrides("train", ["-m", "hydra/launcher=slurm", "model=d2,d4"])
    with pytest.raises(UserError, match="starts all jobs at once"):
        check_overrides("train", ["-m", "hydra/launcher=submitit_local", "stage=sft,grpo"])


# The periods of the heartbeat, the rank that stops, and then a meeting that this one keeps from coming about.
SILENT = """
import os, signal, sys
from llm.parallel import heartbeat
from llm.parallel.collectives import barrier, rank
from llm.parallel.process_group import join
heartbeat.BEAT_SECONDS, heartbeat.SILENT_SECONDS = map(float, sys.argv[1:3])
join(on_gpu=False)
if rank() == int(sys.argv[3]):
    os.kill(os.getpid(), signal.SIGSTOP)
barrier()
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])
def test_a_process_that_is_not_heard_of_ends_the_others(tmp_path, victim):
    """One that stands still keeps its connections open, as the processes of a vanished node seem to.

    The period is one that the others, which only wait, keep even on a machine that is busy.
    """
    (tmp_path / "silent.py").write_text(SILENT)
    port, arguments = free_port(), ("1", "30", str(victim))
    started = [start_warm(tmp_path / "silent.py", *arguments, env=child_env(k, 3, port)) for k in range(3)]
    ended = finish(*(process for k, process in enumerate(started) if k != victim))
    assert [status for status, *_ in ended] == [1, 1]
    assert f"error: nothing heard of process {victim} for 30 s" in "".join(err for *_, err in ended)


@pytest.fixture
def heart(monkeypatch):
    """watch() on a clock of its own, on which sleeping takes no time; what it printed and how it ended."""
    now, ended = [0.0], []

    def sleep(seconds):
        now[0] += seconds
        if now[0] > 500:
            raise TimeoutError

    def end(status):
        ended.append(status)
        raise SystemExit

    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: now[0]))
    monkeypatch.setattr(heartbeat, "os", SimpleNamespace(_exit=end))
    return SimpleNamespace(now=now, ended=ended)


def watched(register) -> None:
    """Watch until the end of this process, or until 500 s have passed without one."""
    with pytest.raises((SystemExit, TimeoutError)):
        heartbeat.watch(register, ("127.0.0.1", 1))


def test_rank_0_ends_when_another_process_is_silent(heart, capsys):
    """Let rank 1 of three processes call every time and rank 2 never: only rank 1 is heard of."""
    register = SimpleNamespace(heard={1: 0.0, 2: 0.0})

    def silent():
        register.heard[1] = heart.now[0]
        return heartbeat.Register.silent(register)

    watched(SimpleNamespace(silent=silent))
    assert heart.ended == [1] and heart.now[0] == 50  # the first beat after 45 s
    assert capsys.readouterr().err == "error: nothing heard of process 2 for 45 s\n"


def test_a_process_ends_when_rank_0_does_not_answer_for_long(heart, capsys, monkeypatch):
    """Single calls that fail are forgiven: one in two is answered, then none."""

    def silent_processes(register, address):
        if heart.now[0] > 200 or heart.now[0] % 10:
            raise OSError("no answer")
        return []

    monkeypatch.setattr(heartbeat, "silent_processes", silent_processes)
    watched(None)
    assert heart.ended == [1] and heart.now[0] == 250  # answered last at 200 s
    assert capsys.readouterr().err == "error: nothing heard of process 0 for 45 s\n"


def test_a_call_tells_rank_0_who_calls_and_the_caller_who_is_silent(monkeypatch):
    """Over a real connection: rank 2 of three calls, rank 1 has not for longer than the limit."""
    with heartbeat.Register("127.0.0.1", 3) as register:
        register.heard = {1: -1e9, 2: -1e9}
        monkeypatch.setattr(heartbeat.collectives, "rank", lambda: 2)
        monkeypatch.setattr(heartbeat, "BEAT_SECONDS", HANG)
        assert heartbeat.silent_processes(None, ("127.0.0.1", register.server_address[1])) == [1]
        assert register.heard[2] > 0
        register.shutdown()


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n", b"99\n", b"0\n", b"\xff" * 100, b""])
def test_a_call_of_a_stranger_is_neither_noted_nor_told(said, capfd):
    """A scanner of the network left a traceback, and a number was a rank that is silent 45 s later."""
    with heartbeat.Register("127.0.0.1", 3) as register:
        with socket.create_connection(register.server_address, timeout=HANG) as call:
            call.sendall(said)
            call.shutdown(socket.SHUT_WR)
            assert call.recv(100) == b""
        register.shutdown()
    assert set(register.heard) == {1, 2} and capfd.readouterr().err == ""
