"""Starts the processes of a training on this machine, one per device, and ends them together.

`train.py trainer.devices=8` starts itself in 8 processes by this; torchrun and srun start them by themselves. The
processes get the composed configuration, so a job of a sweep starts as a single one does. PyTorch's elastic agent
watches them (`llm.parallel.agent`): the first that fails takes the others with it, or all begin again from the last
checkpoint (`trainer.max_restarts`). Signals go to all of them, and their first UserError becomes the launcher's. With
several nodes one launcher runs on each.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from llm.config.stages import stage_row
from llm.errors import UserError
from llm.parallel.env import LAUNCHER, STOP_SIGNALS, is_launched, note_late
from llm.utils.source import python_path


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


def processes_of_node(cfg) -> int:
    """Return how many processes train on this machine: those that a launcher has started, else those wanted."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if is_launched() else processes_here(cfg)


def check_strategy(name: str, n: int, early_sums: bool = False) -> None:
    """Raise UserError where `strategy.name` is not for `n` processes, or `strategy.early_sums` not for it."""
    if early_sums and name not in ("auto", "muon"):
        raise UserError(
            f"strategy.early_sums=true: strategy={name} does not leave sums to the optimizer; choose strategy=muon, or "
            "set it to false"
        )
    if name == "single" and n > 1:
        raise UserError(f"strategy=single: there are {n} processes; choose strategy=auto, muon, ddp or fsdp")


def meeting_place(num_nodes: int) -> tuple[int, str, int]:
    """Return (number of this node, address and port of the first one); with several, the environment tells.

    Raises UserError where the environment lacks one of them.
    """
    if num_nodes == 1:
        return 0, "127.0.0.1", 0  # the first node takes a free port
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
    return int(node), os.environ["MASTER_ADDR"], int(port)


def launch(trainer, n: int, title: str, config: Callable[[], dict], newest_step: Callable[[], int]) -> int:
    """Train with `n` processes on this machine; returns the exit status. Raises UserError where a process did.

    trainer: that section of the configuration. title: name of the job, equal on all nodes and another for each job of
    a sweep. config: makes the configuration for processes that start now. newest_step: tells the step from which they
    would go on.
    """
    from torch.distributed.elastic.agent.server import WorkerSpec

    from llm.parallel.agent import Agent, cause, first_failure, rendezvous

    place = meeting_place(trainer.num_nodes)
    with tempfile.TemporaryDirectory(prefix="fathom-") as name, changed_environment(shared_env(n)):
        folder = Path(name)
        path = folder / "config.json"

        def write_config():
            path.write_text(json.dumps(config()), encoding="utf-8")

        with rendezvous(title, place, trainer.num_nodes) as meeting:
            spec = WorkerSpec(
                role="trainer",
                local_world_size=n,
                entrypoint=sys.executable,
                args=("-P", "-m", "llm.stages.worker", str(path), name),
                rdzv_handler=meeting,
                max_restarts=trainer.max_restarts,
                monitor_interval=0.05,
                master_addr=place[1],
            )
            agent = Agent(spec, folder, write_config, newest_step)
            with handled(STOP_SIGNALS, agent.hear):
                result = agent.run()
        if errors := sorted(folder.glob("error_*")):
            raise UserError(errors[0].read_text(encoding="utf-8"))
    if not result.is_failed():
        if agent.received and trainer.num_nodes == 1:  # launchers of other nodes may not have heard it, and go on
            note_late(agent.received[0])
        return 0
    code = first_failure(result.failures)[1]
    if code < 0:  # the others then fail for want of an answer, or get SIGTERM from here: that is no news
        print(cause(result.failures), file=sys.stderr)
    return 128 - code if code < 0 else code


@contextlib.contextmanager
def handled(signals: tuple[int, ...], handler: Callable) -> Iterator[None]:
    """Let `handler` have the signals, and put back afterwards what had them before."""
    previous = {signum: signal.signal(signum, handler) for signum in signals}
    try:
        yield
    finally:
        for signum, before in previous.items():
            signal.signal(signum, before)


@contextlib.contextmanager
def changed_environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables that processes inherit, and put the old values back afterwards."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def shared_env(n: int) -> dict[str, str]:
    """Return the variables that all of `n` processes of this node get: where the code is, and a share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        **python_path(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // n))),
        LAUNCHER: str(os.getpid()),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else a restart meets the keys of the processes before
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "",  # `Agent.hear` has them
    }


def child_env(rank: int, n: int, port: int) -> dict[str, str]:
    """Return the environment of one of `n` processes of this machine that are started without an agent.

    Benchmarks and tests start such ones.
    """
    own = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared = {name: value for name, value in shared_env(n).items() if name != LAUNCHER}
    return os.environ | shared | {name: str(value) for name, value in own.items()}


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
