"""Starts the processes of a training on this machine, one per device, and ends them together.

    python -m llm.launch <config.json> <folder for errors>      what every process runs; use train.py instead

`train.py trainer.devices=8` starts itself in 8 processes by this; torchrun and srun start them by themselves. The
processes get the composed configuration, so a job of a sweep starts as a single one does. The first that fails takes
the others with it, signals go to all of them, and their first UserError becomes the launcher's. With several nodes one
launcher runs on each.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from llm.environment import die_with_parent, tune_process
from llm.errors import UserError

GRACE_SECONDS = 10  # after the first failure the others may end by themselves, with what they have to say
KILL_SECONDS = 30  # then they are told to stop, and then killed
SIGUSR1 = getattr(signal, "SIGUSR1", signal.SIGTERM)  # SLURM sends it before the time is over; Windows has none
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, SIGUSR1)
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets them


def is_launched() -> bool:
    """Whether a launcher (torchrun, srun or `launch`) started this process."""
    return all(name in os.environ for name in LAUNCHED)


def launched_rank() -> int:
    """Rank of this process, known before it joins the others; 0 without a launcher."""
    return int(os.environ["RANK"]) if is_launched() else 0


def adopt_slurm() -> None:
    """In a task of an srun step of several: set the variables that torchrun would set. Elsewhere nothing happens.

    The variables of the step are absent in a batch script and in the shell of salloc, where those of the job are set.
    """
    slurm = os.environ
    if is_launched() or int(slurm.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return
    per_node = set(re.findall(r"(?:^|,)(\d+)", slurm["SLURM_STEP_TASKS_PER_NODE"]))  # 8(x2),4
    if len(per_node) > 1:
        raise UserError(
            f"SLURM started {slurm['SLURM_STEP_TASKS_PER_NODE']} tasks per node: every node must have as many "
            "(--ntasks-per-node)"
        )
    own = {"RANK": slurm["SLURM_PROCID"], "LOCAL_RANK": slurm["SLURM_LOCALID"], "GROUP_RANK": slurm["SLURM_NODEID"]}
    own |= {"WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"], "LOCAL_WORLD_SIZE": per_node.pop()}
    first_host = re.sub(r"\[(\d+)[^]]*\]", r"\1", slurm["SLURM_STEP_NODELIST"]).split(",")[0]  # gpu[07-09,12],login
    port = 20000 + (int(slurm["SLURM_JOB_ID"]) + int(slurm["SLURM_STEP_ID"])) % 10000
    os.environ.update({"MASTER_ADDR": first_host, "MASTER_PORT": str(port)} | slurm | own)


def check_layout(cfg) -> None:
    """torchrun and srun know how many nodes there are; a `trainer.num_nodes` that says otherwise is an error."""
    world, here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if world % here or cfg.trainer.num_nodes not in (1, world // here):
        raise UserError(
            f"trainer.num_nodes={cfg.trainer.num_nodes}: the launcher started {world} processes, {here} on this node; "
            "leave the key out, or start as many processes on every node"
        )


def processes_here(cfg) -> int:
    """How many to start on this machine: one per device of `cfg.trainer`; auto: every GPU, or one on a CPU."""
    import torch

    devices, on_cpu = cfg.trainer.devices, cfg.trainer.accelerator == "cpu" or not torch.cuda.is_available()
    if cfg.stage.name == "tokenizer":  # made by the first one of all
        return 1
    if devices == "auto":
        return 1 if on_cpu else torch.cuda.device_count()
    if isinstance(devices, bool) or not str(devices).isdigit() or int(devices) < 1:
        raise UserError(f"trainer.devices={devices}: give a whole number of at least 1, or auto")
    if not on_cpu and int(devices) > torch.cuda.device_count():
        raise UserError(f"trainer.devices={devices}: this machine has {torch.cuda.device_count()} GPUs")
    return int(devices)


def processes(cfg) -> int:
    """How many processes train: those that a launcher has started, else those that are wanted on all nodes."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else processes_here(cfg) * cfg.trainer.num_nodes


def meeting_place(num_nodes: int) -> tuple[int, str, str]:
    """(number of this node, address and port of the first one), which the environment tells if there are several."""
    if num_nodes == 1:
        return 0, "127.0.0.1", str(free_port())
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if not os.environ.get(name)]:
        raise UserError(
            f"trainer.num_nodes={num_nodes}: {', '.join(missing)} not set; on every node give MASTER_ADDR (the first "
            f"node's address), MASTER_PORT (a free port there) and NODE_RANK (0 to {num_nodes - 1})"
        )
    node, port = os.environ["NODE_RANK"], os.environ["MASTER_PORT"]
    if not node.isdigit() or int(node) >= num_nodes:
        raise UserError(f"NODE_RANK={node}: with trainer.num_nodes={num_nodes} it is 0 to {num_nodes - 1}")
    if not port.isdigit():
        raise UserError(f"MASTER_PORT={port}: must be a number")
    return int(node), os.environ["MASTER_ADDR"], port


def launch(config: dict, n: int) -> int:
    """Train with `n` processes on this machine; returns the exit status. Raises UserError where a process did."""
    num_nodes = config["trainer"]["num_nodes"]
    node, address, port = meeting_place(num_nodes)
    with tempfile.TemporaryDirectory(prefix="fathom-") as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        command = [sys.executable, "-m", "llm.launch", str(path), folder]
        environments = [child_env(k, n, port, address, node, num_nodes) for k in range(n)]
        children = [subprocess.Popen(command, env=env, start_new_session=True) for env in environments]

        def tell(signum):
            for child in children:
                child.send_signal(signum)

        received: list[int] = []

        def pass_on(signum, frame):
            received.append(signum)
            tell(signum)

        previous = {signum: signal.signal(signum, pass_on) for signum in STOP_SIGNALS}
        try:
            wait(children, tell, received)
            ended = enumerate(children, start=node * n)
            killed = [(rank, -child.returncode) for rank, child in ended if (child.returncode or 0) < 0]
        finally:
            tell(signal.SIGKILL)
            for child in children:
                child.wait()
            for signum, handler in previous.items():
                signal.signal(signum, handler)
        if errors := sorted(Path(folder).glob("error_*")):
            raise UserError(errors[0].read_text(encoding="utf-8"))
    if killed:  # the others then fail for want of an answer, or get SIGTERM from here: that is no news
        rank, signum = min(killed, key=lambda pair: pair[1] == signal.SIGTERM)
        print(f"process {rank} was ended by {signal.Signals(signum).name}", file=sys.stderr)
        return 128 + signum
    return max(128 - child.returncode if child.returncode < 0 else child.returncode for child in children)


def wait(children: list[subprocess.Popen], tell: Callable[[int], None], received: list[int]) -> None:
    """Until all have ended; after a first failure, or a second signal, they get some time, then SIGTERM, then no more.

    One that waits for a process of a node that has gone hears no signal.
    """
    failed_at, told = None, False
    while [child for child in children if child.poll() is None]:  # all are asked, not only up to the first that runs
        if failed_at is None and (len(received) > 1 or any(child.returncode for child in children)):
            failed_at = time.monotonic()
        waited = 0.0 if failed_at is None else time.monotonic() - failed_at
        if waited > GRACE_SECONDS and not told:
            tell(signal.SIGTERM)
            told = True
        if waited > GRACE_SECONDS + KILL_SECONDS:
            return
        time.sleep(0.05)


def child_env(
    local_rank: int, n: int, port: int | str, address: str = "127.0.0.1", node: int = 0, num_nodes: int = 1
) -> dict[str, str]:
    """The variables that torchrun would set for one of `n` processes on a node, and a fair share of the cores."""
    own = {"RANK": node * n + local_rank, "LOCAL_RANK": local_rank, "GROUP_RANK": node}
    own |= {"WORLD_SIZE": num_nodes * n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": address, "MASTER_PORT": port}
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // n)))}
    return os.environ | threads | {"PYTHONPATH": os.pathsep.join(paths)} | {k: str(v) for k, v in own.items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def begin() -> None:
    """What each of several processes does first: none outlives its launcher, and only rank 0 prints."""
    die_with_parent()
    if launched_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends


def end(status: int) -> NoReturn:
    """End a process that was one of several: taking down torch's threads in an orderly way aborts now and then."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    """One of the processes."""
    config, folder = sys.argv[1:]
    begin()
    tune_process()
    from omegaconf import OmegaConf

    from llm.trainer import run_stage

    cfg = OmegaConf.create(json.loads(Path(config).read_text(encoding="utf-8")))
    OmegaConf.set_struct(cfg, True)
    try:
        run_stage(cfg)
    except UserError as error:
        (Path(folder) / f"error_{launched_rank():04d}").write_text(str(error), encoding="utf-8")
        end(2)
    except SystemExit as stop:
        end(stop.code or 0)
    end(0)


if __name__ == "__main__":
    main()
