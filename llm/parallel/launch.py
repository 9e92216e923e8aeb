"""Starts the processes of a training on this machine, one per device, and ends them together.

`train.py trainer.devices=8` starts itself in 8 processes by this; torchrun and srun start them by themselves. The
processes get the composed configuration, so a job of a sweep starts as a single one does. The first that fails takes
the others with it, signals go to all of them, and their first UserError becomes the launcher's. With several nodes one
launcher runs on each.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from llm.config.stages import stage_row
from llm.errors import UserError
from llm.parallel.env import LAUNCHER, STOP_SIGNALS, is_launched

GRACE_SECONDS = 10  # after the first failure the others may end by themselves, with what they have to say
KILL_SECONDS = 30  # then they are told to stop, and then killed


def processes_here(cfg) -> int:
    """Return how many processes to start on this machine: one per device of `cfg.trainer`.

    devices=auto: every GPU, or one process on a CPU. Raises UserError for devices that are not there.
    """
    import torch

    devices, on_cpu = cfg.trainer.devices, cfg.trainer.accelerator == "cpu" or not torch.cuda.is_available()
    if not stage_row(cfg.stage.name).parallel:  # made by the first one of all
        return 1
    if devices == "auto":
        return 1 if on_cpu else torch.cuda.device_count()
    if isinstance(devices, bool) or not str(devices).isdigit() or int(devices) < 1:
        raise UserError(f"trainer.devices={devices}: give a whole number of at least 1, or auto")
    if not on_cpu and int(devices) > torch.cuda.device_count():
        raise UserError(f"trainer.devices={devices}: this machine has {torch.cuda.device_count()} GPUs")
    return int(devices)


def processes(cfg) -> int:
    """Return how many processes train: those that a launcher has started, else those wanted on all nodes."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else processes_here(cfg) * cfg.trainer.num_nodes


def meeting_place(num_nodes: int) -> tuple[int, str, str]:
    """Return (number of this node, address and port of the first one); with several, the environment tells.

    Raises UserError where the environment lacks one of them.
    """
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
        command = [sys.executable, "-m", "llm.stages.worker", str(path), folder]
        own = {LAUNCHER: str(os.getpid())}
        environments = [child_env(k, n, port, address, node, num_nodes) | own for k in range(n)]
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
    """Wait until all have ended; after a failure or a second signal they get time, then SIGTERM, then no more.

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
    """Return the environment that torchrun would give one of `n` processes of a node, with a share of the cores."""
    own = {"RANK": node * n + local_rank, "LOCAL_RANK": local_rank, "GROUP_RANK": node}
    own |= {"WORLD_SIZE": num_nodes * n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": address, "MASTER_PORT": port}
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // n)))}
    return os.environ | threads | {"PYTHONPATH": os.pathsep.join(paths)} | {k: str(v) for k, v in own.items()}


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
