"""Facts about the machine and the source tree that a run was made with."""

import contextlib
import ctypes
import os
import platform
import re
import signal
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from llm import __version__

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of glibc's mallopt
PR_SET_PDEATHSIG = 1  # of Linux's prctl

# What counts as the project's code: folders and files of the source tree, and endings.
SOURCE = ("llm", "callbacks", "tasks", "conf", "train.py", "evaluate.py", "serve.py")
SUFFIXES = frozenset((".py", ".yaml", ".cpp", ".h", ".css", ".js"))

# Libraries that tell their makers about their use, or run programs of the hub, unless a variable says no.
PRIVATE = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # of data sets and metrics
    "HF_EVALUATE_OFFLINE": "1",  # metrics of the hub are programs; lm-eval would fetch and run them
    "GRADIO_ANALYTICS_ENABLED": "False",
    "WANDB_ERROR_REPORTING": "false",
}


def keep_private() -> None:
    """Turn off what libraries send to their makers; call it before they are imported. Variables that are set stay."""
    for name, value in PRIVATE.items():
        os.environ.setdefault(name, value)


def tune_process() -> None:
    """Set the process options that torch's speed on a CPU depends on; call it before torch is imported.

    Threads that spin for long while they wait take the cores from each other on a busy machine; threads that sleep at
    once cost a third of the speed on an idle one. Memory that glibc returns to the system after every step must be
    cleared page by page when it is needed again, which costs a quarter of a step. Numbers: docs/lab_notebook.md.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "4000")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_MAX, 0)


def return_memory() -> None:
    """Give memory that was freed back to the system (glibc), which `tune_process` keeps for the next step.

    A server has no next step of the same size: what one request left would fit no other, and the rest would grow.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def die_with_parent(parent: int | None = None) -> None:
    """Ask the system to end this process by SIGTERM when the one that started it ends (Linux only).

    parent: number of the process that started this one, where known; if that has gone already, this one ends at once.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None) if os.name == "posix" else None
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if parent is not None and os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


def code_version() -> dict[str, str | None]:
    """Return what names the present code: `version` of the package and `commit` of the source tree."""
    return {"version": __version__, "commit": git_commit()}


def git_commit() -> str | None:
    """Return the commit of the source tree, with `-dirty` if tracked files changed; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed: what git finds further up is another project
        return None
    return _output(["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"])


def code_facts() -> dict[str, Any]:
    """Return the state of the source tree and its size, for run.json.

    `branch` and `changed` (files that differ from the commit, new ones included) are None without git; `branch` is
    "(detached)" where none is checked out. Size: `files`, `lines` and `characters` of code and configuration, without
    tests and docs, and `dependencies`, the packages that the project itself asks for.
    """
    root = Path(__file__).resolve().parents[2]
    status = None
    if (root / ".git").exists():  # an installed package may lie in a checkout of something else
        command = ["git", "-C", str(root), "--no-optional-locks", "status", "--porcelain=v2", "--branch"]
        status = _output(command)
    lines = [] if status is None else status.splitlines()
    branch = next((line.split()[-1] for line in lines if line.startswith("# branch.head ")), None)
    changed = sum(not line.startswith("#") for line in lines) if branch else None
    return {"branch": branch, "changed": changed, **_size(root), "dependencies": _dependencies()}


def _size(root: Path) -> dict[str, int]:
    """Return numbers of files, lines and characters of the code and the configuration below `root`."""
    texts = []
    for path in (path for name in SOURCE for path in (root / name, *(root / name).rglob("*"))):
        with contextlib.suppress(OSError):  # a file that somebody moves meanwhile ends no training
            if path.suffix in SUFFIXES and path.is_file():
                texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return {
        "files": len(texts),
        "lines": sum(text.count("\n") for text in texts),
        "characters": sum(map(len, texts)),
    }


def _dependencies() -> int | None:
    """Return how many packages the project needs without its extras; None where it is not installed."""
    try:
        return sum("extra ==" not in line for line in metadata.requires("fathom") or [])
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Return platform, CPU, memory, GPUs and versions. Imports torch to find the GPUs, so call it when a stage runs."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        gpus.append({"name": device.name, "memory_gb": round(device.total_memory / 2**30, 1)})
    return {
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": memory_gb(),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": _version("lightning"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> str | None:
    """Return what a command prints, stripped; None if it prints nothing, is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def cpu_name() -> str:
    """Return the name of the processor's model; that of its architecture where the system does not tell."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    if match:
        return match.group(1)
    mac = _output(["sysctl", "-n", "machdep.cpu.brand_string"]) if platform.system() == "Darwin" else None
    return mac or platform.processor() or platform.machine()


def memory_gb() -> float | None:
    """Return the physical memory in GiB; None if the system does not tell (Windows)."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
