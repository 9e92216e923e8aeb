"""Facts about the processes of a training that the environment tells, before any of them meet."""

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

from llm.errors import UserError
from llm.utils.environment import die_with_parent

SIGUSR1 = getattr(signal, "SIGUSR1", signal.SIGTERM)  # SLURM sends it before the time is over; Windows has none
SIGHUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # comes when the terminal closes; Windows has none
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, SIGUSR1)
if signal.getsignal(SIGHUP) != signal.SIG_IGN:  # nohup has it ignored, which is to stay so
    STOP_SIGNALS += (SIGHUP,)
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets them
# What gloo, NCCL and torch's store say of a process that has gone.
LOST = re.compile(r"Connection (closed|reset|refused)[^.]*|Broken pipe|remote process exited[^.]*|failed to recv[^.]*")
LAUNCHER = "FATHOM_LAUNCHER"  # the process number of our own launcher, for the processes that it has started
_late: list[int] = []


def is_launched() -> bool:
    """Return whether a launcher (torchrun, srun or `launch`) started this process."""
    return all(name in os.environ for name in LAUNCHED)


def launched_rank() -> int:
    """Return the rank of this process, known before it joins the others; 0 without a launcher."""
    return int(os.environ["RANK"]) if is_launched() else 0


def is_one_of_many() -> bool:
    """Return whether torchrun, or an srun step of several tasks, started this process."""
    return is_launched() or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def adopt_slurm() -> None:
    """Set the variables that torchrun would set, in a task of an srun step of several; elsewhere do nothing.

    The variables of the step are absent in a batch script and in the shell of salloc, where those of the job are set.
    """
    slurm = os.environ
    if is_launched() or not is_one_of_many():
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
    """Raise UserError where `trainer.num_nodes` is not the number of nodes that torchrun or srun started.

    Our own launcher goes on with fewer after a restart.
    """
    if LAUNCHER in os.environ:
        return
    world, here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if world % here or cfg.trainer.num_nodes not in (1, world // here):
        raise UserError(
            f"trainer.num_nodes={cfg.trainer.num_nodes}: the launcher started {world} processes, {here} on this node; "
            "leave the key out, or start as many processes on every node"
        )


def begin() -> None:
    """Prepare one of several processes: it does not outlive its launcher, and only rank 0 prints."""
    launcher = os.environ.get(LAUNCHER)
    die_with_parent(int(launcher) if launcher else None)
    if launched_rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  until the process ends


def note_late(signum: int | None) -> None:
    """Note a stop signal that came in the last step of a training, which it did not cut short: no other is to begin."""
    if signum is not None:
        _late.append(signum)


def take_late() -> int | None:
    """Return the stop signal that was noted, and forget it; None if there was none."""
    signum = _late[0] if _late else None
    _late.clear()
    return signum


@contextlib.contextmanager
def heard_signals() -> Iterator[None]:
    """End the process with one line and status 128 + signal on a stop signal inside the block; Ctrl-C stays as it is.

    That is for the time in which nothing is to be saved: a training, a launcher and a server put handlers of their own
    over this one. One of several processes does without: its launcher speaks, and it may wait for the others inside
    torch, where Python hears nothing.
    """
    if is_launched() or threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def stop(signum: int, frame: object) -> None:
        if os.getpid() != owner:  # a forked child ends as if nothing had been set
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        os.write(2, f"interrupted by {signal.Signals(signum).name}\n".encode())  # print may be under way
        raise SystemExit(128 + signum)

    chosen = [s for s in STOP_SIGNALS if s != signal.SIGINT and signal.getsignal(s) == signal.SIG_DFL]
    for signum in chosen:
        signal.signal(signum, stop)
    try:
        yield
    finally:
        for signum in chosen:
            signal.signal(signum, signal.SIG_DFL)


def lost_another(error: BaseException) -> str | None:
    """Return in torch's words that another process could not be reached; None for an error of any other kind."""
    found = LOST.search(str(error)) if isinstance(error, RuntimeError) else None
    return found and found[0]


def end(status: int) -> NoReturn:
    """End a process that was one of several at once: taking down torch's threads in order aborts now and then."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
