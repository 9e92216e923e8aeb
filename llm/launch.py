"""Starts the processes of a training on this machine, one per device, and ends them together.

    python -m llm.launch <config.json> <folder for errors>      what every process runs; use train.py instead

`train.py trainer.devices=8` starts itself in 8 processes by this; torchrun starts them by itself. The
processes get the composed configuration, so a job of a sweep starts as a single one does. The first that fails takes
the others with it, signals go to all of them, and their first UserError becomes the launcher's.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llm.environment import die_with_parent, tune_process
from llm.errors import UserError

GRACE_SECONDS = 10  # after the first failure the others may end by themselves, with what they have to say
KILL_SECONDS = 30  # then they are told to stop, and then killed
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets them


def is_launched() -> bool:
    """Whether a launcher (torchrun or `launch`) started this process."""
    return all(name in os.environ for name in LAUNCHED)


def wanted_processes(cfg) -> int:
    """One per device of `cfg.trainer`; auto: every GPU, or one process on a CPU."""
    import torch

    devices, on_cpu = cfg.trainer.devices, cfg.trainer.accelerator == "cpu" or not torch.cuda.is_available()
    if devices == "auto":
        return 1 if on_cpu else torch.cuda.device_count()
    if isinstance(devices, bool) or not str(devices).isdigit() or int(devices) < 1:
        raise UserError(f"trainer.devices={devices}: give a whole number of at least 1, or auto")
    if not on_cpu and int(devices) > torch.cuda.device_count():
        raise UserError(f"trainer.devices={devices}: this machine has {torch.cuda.device_count()} GPUs")
    return int(devices)


def processes(cfg) -> int:
    """How many processes train: those that a launcher has started, else those that are wanted."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else wanted_processes(cfg)


def launch(config: dict, n: int) -> int:
    """Train with `n` processes on this machine; returns the exit status. Raises UserError where a process did."""
    with tempfile.TemporaryDirectory(prefix="fathom-") as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        command, port = [sys.executable, "-m", "llm.launch", str(path), folder], free_port()
        children = [subprocess.Popen(command, env=child_env(k, n, port), start_new_session=True) for k in range(n)]

        def tell(signum, frame=None):
            for child in children:
                child.send_signal(signum)

        previous = {signum: signal.signal(signum, tell) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            wait(children, tell)
            killed = [(rank, -child.returncode) for rank, child in enumerate(children) if (child.returncode or 0) < 0]
        finally:
            tell(signal.SIGKILL)
            for child in children:
                child.wait()
            for signum, handler in previous.items():
                signal.signal(signum, handler)
        if errors := sorted(Path(folder).glob("error_*")):
            raise UserError(errors[0].read_text(encoding="utf-8"))
    if killed:  # the others then fail for want of an answer: that is no news
        rank, signum = killed[0]
        print(f"process {rank} was ended by {signal.Signals(signum).name}", file=sys.stderr)
        return 128 + signum
    return max(child.returncode for child in children)


def wait(children: list[subprocess.Popen], tell) -> None:
    """Until all have ended; after a first failure the others get some time, then SIGTERM, then no more."""
    failed_at, told = None, False
    while any(child.poll() is None for child in children):
        if failed_at is None and any(child.returncode for child in children):
            failed_at = time.monotonic()
        waited = 0.0 if failed_at is None else time.monotonic() - failed_at
        if waited > GRACE_SECONDS and not told:
            tell(signal.SIGTERM)
            told = True
        if waited > GRACE_SECONDS + KILL_SECONDS:
            return
        time.sleep(0.05)


def child_env(rank: int, world: int, port: int) -> dict[str, str]:
    """The variables that torchrun would set, and a fair share of the cores."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": f"fathom-{os.getpid()}"}
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // world)))}
    return os.environ | threads | {"PYTHONPATH": os.pathsep.join(paths)} | {k: str(v) for k, v in own.items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    """One of the processes."""
    config, folder = sys.argv[1:]
    die_with_parent()
    tune_process()
    from omegaconf import OmegaConf

    from llm.trainer import run_stage

    cfg = OmegaConf.create(json.loads(Path(config).read_text(encoding="utf-8")))
    OmegaConf.set_struct(cfg, True)
    status = 0
    try:
        run_stage(cfg)
    except UserError as error:
        (Path(folder) / f"error_{int(os.environ['RANK']):04d}").write_text(str(error), encoding="utf-8")
        status = 2
    except SystemExit as stop:
        status = stop.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # taking down torch's threads in an orderly way aborts now and then


if __name__ == "__main__":
    main()
