"""Launching many processes: torchrun, several nodes, SLURM, sweeps; what they say and how they end.

Two "nodes" are two launchers on 127.0.0.1, each with one process.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from conftest import REPO, run_cli
from omegaconf import OmegaConf

from llm.cli.overrides import check_overrides
from llm.errors import UserError
from llm.parallel.env import LAUNCHED, adopt_slurm, check_layout
from llm.parallel.launch import child_env, free_port, meeting_place

TINY = ("experiment=tiny", "batch.tokens_per_step=1024", "trainer=cpu", "precision.compute=fp32", "compile=false")
TRAIN = (sys.executable, str(REPO / "train.py"))
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
PIPELINE = ("-m", "stage=tokenizer,pretrain")


def start(*command: str, **env: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(REPO), **env}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=REPO, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(*processes: subprocess.Popen, timeout: float = 120) -> list[tuple[int, str, str]]:
    """(status, stdout, stderr) of each, in order."""
    try:
        return [(p.communicate(timeout=timeout), p.returncode)[::-1] for p in processes]
    finally:
        for process in processes:
            process.kill()


def two_nodes(root: Path, *args: str) -> list[subprocess.Popen]:
    """Launchers of train.py on two nodes."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = (*TRAIN, *TINY, "trainer.num_nodes=2", f"paths.runs={root}", *args)
    return [start(*command, **place, NODE_RANK=str(k)) for k in (0, 1)]


def slurm_tasks(root: Path, *args: str) -> list[subprocess.Popen]:
    """What srun --ntasks=2 starts, with the variables that it sets."""
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    step |= {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_NODEID": "0"}
    step |= {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "train"}  # by these Lightning knows SLURM
    command = (*TRAIN, *TINY, f"paths.runs={root}", *args)
    return [start(*command, **step, SLURM_PROCID=k, SLURM_LOCALID=k) for k in ("0", "1")]


def await_checkpoint(process: subprocess.Popen, folder: Path) -> None:
    while not list(folder.glob("checkpoints/*.ckpt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """runs/ with a tokenizer of the run `tiny`."""
    folder = tmp_path_factory.mktemp("runs")
    assert run_cli("train.py", *TINY, "stage=tokenizer", f"paths.runs={folder}").returncode == 0
    return folder


LONG = ("stage=pretrain", "init_from=tiny/tokenizer", "max_steps=3000", "stage.eval_every=0", "stage.sample_every=0")
ODD = ("stage=pretrain", "init_from=tiny/tokenizer", "run=odd", "batch.tokens_per_step=512")


def test_torchrun_takes_a_pipeline(tmp_path):
    command = (*TORCHRUN, "--standalone", "--nproc_per_node=2", "train.py", *TINY, *PIPELINE, f"paths.runs={tmp_path}")
    ((status, (out, err)),) = finish(start(*command))
    assert status == 0 and out.count("tiny/tokenizer finished") == out.count("tiny/pretrain finished") == 1, err
    assert out.count("== job 2 of 2") == 1


@pytest.mark.slow
def test_torchrun_on_two_nodes(tmp_path):
    nodes = ("--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}")
    command = ("train.py", *TINY, *PIPELINE, "trainer.num_nodes=2", f"paths.runs={tmp_path}")
    agents = [start(*TORCHRUN, *nodes, f"--node_rank={k}", *command) for k in (0, 1)]
    (status, (out, err)), (other, (quiet, _)) = finish(*agents)
    assert status == other == 0 and out.count("tiny/pretrain finished") == 1 and quiet == "", err


@pytest.mark.slow
def test_two_launchers_take_a_pipeline(tmp_path):
    (status, (out, err)), (other, (quiet, _)) = finish(*two_nodes(tmp_path, *PIPELINE))
    assert status == other == 0 and out.count("tiny/pretrain finished") == 1, err
    assert "finished" not in quiet


def test_slurm_tasks_take_a_pipeline(tmp_path):
    (status, (out, err)), (other, (quiet, _)) = finish(*slurm_tasks(tmp_path, *PIPELINE))
    assert status == other == 0 and out.count("tiny/pretrain finished") == 1 and quiet == "", err


@pytest.mark.slow
def test_a_sweep_of_two_processes_each(root):
    done = run_cli("train.py", *TINY, "-m", "stage=pretrain", "model=d2,d4", "trainer.devices=2", f"paths.runs={root}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tiny-d2/pretrain finished") == done.stdout.count("tiny-d4/pretrain finished") == 1


# ---- ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dead_process_ends_every_node(root):
    nodes = two_nodes(root, *LONG, "run=dead", "trainer.devices=2", "batch.tokens_per_step=2048")
    await_checkpoint(nodes[0], root / "dead" / "pretrain")
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(nodes[1].pid)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    begin = time.monotonic()
    (status, _), (other, (_, err)) = finish(*nodes, timeout=60)
    assert time.monotonic() - begin < 60 and status == 1 and other == 128 + signal.SIGKILL
    assert "was ended by SIGKILL" in err


def test_sigusr1_on_one_node_stops_and_saves_on_all(root):
    long = (*LONG, "run=preempted", "max_steps=60")
    nodes = two_nodes(root, *long)
    await_checkpoint(nodes[0], root / "preempted" / "pretrain")
    nodes[1].send_signal(signal.SIGUSR1)
    (status, (out, err)), (other, _) = finish(*nodes)
    assert status == other == 128 + signal.SIGUSR1 and "stopped by SIGUSR1 at step" in out, err
    step = out.split("stopped by SIGUSR1 at step ")[1].split(",")[0]
    alone = run_cli("train.py", *TINY, *long, f"paths.runs={root}")
    assert alone.returncode == 0 and f"resuming at step {step} of 60" in alone.stdout, alone.stderr


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_slurm_tasks_stop_and_save(root, signum):
    tasks = slurm_tasks(root, *LONG, f"run=slurm{signum}")
    await_checkpoint(tasks[0], root / f"slurm{signum}" / "pretrain")
    for task in tasks:
        task.send_signal(signum)
    (status, (out, err)), (other, _) = finish(*tasks)
    assert status == other == 128 + signum and f"stopped by {signum.name}" in out, err


@pytest.mark.slow
def test_torchrun_stops_and_saves(root):
    nodes = ("--standalone", "--nproc_per_node=2")
    agent = start(*TORCHRUN, *nodes, "train.py", *TINY, *LONG, "run=agent", f"paths.runs={root}")
    await_checkpoint(agent, root / "agent" / "pretrain")
    agent.send_signal(signal.SIGTERM)
    ((status, (out, err)),) = finish(agent)
    assert status and "stopped by SIGTERM at step" in out, err


# ---- mistakes -------------------------------------------------------------------------------------------------------


def test_a_mistake_under_torchrun_is_said_once(root):
    command = (*TORCHRUN, "--standalone", "--nproc_per_node=2", "train.py", *TINY, *ODD, f"paths.runs={root}")
    ((status, (_, err)),) = finish(start(*command))
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
    assert meeting_place(3) == (2, "here", "1")
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


SILENT = """
import os, signal, sys
from llm.parallel import heartbeat
from llm.parallel.collectives import barrier, rank
from llm.parallel.process_group import join
heartbeat.BEAT_SECONDS, heartbeat.SILENT_SECONDS = 0.2, 2.0
join(on_gpu=False)
if rank() == int(sys.argv[1]):
    os.kill(os.getpid(), signal.SIGSTOP)
barrier()
"""


@pytest.mark.parametrize("victim", [0, 2])
def test_a_process_that_is_not_heard_of_ends_the_others(victim):
    """One that stands still keeps its connections open, as the processes of a vanished node seem to."""
    command, port = [sys.executable, "-c", SILENT, str(victim)], free_port()
    started = [
        subprocess.Popen(command, env=child_env(k, 3, port), stderr=subprocess.PIPE, text=True) for k in range(3)
    ]
    others = [process for k, process in enumerate(started) if k != victim]
    try:
        errors = [process.communicate(timeout=60)[1] for process in others]
    finally:
        started[victim].kill()
        started[victim].communicate()
    assert all(process.returncode == 1 for process in others)
    assert f"error: nothing heard of process {victim} for 2 s" in "".join(errors)
