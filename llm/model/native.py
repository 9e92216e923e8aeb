"""Builds the project's own kernels, small C++ files without torch's headers, and loads them by ctypes.

A kernel is compiled once for a machine, in a few seconds, and kept in `$FATHOM_DATA/kernels`, by default
`~/.cache/fathom/kernels`. The name of the file is a hash of the sources, the compiler and the processor. Kernels are
optional: without a compiler, with `FATHOM_KERNELS=off`, or where compiling fails, callers compute with torch.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-w")
DIGEST = hashlib.sha256().digest_size  # bytes of the checksum behind the end of a library; loaders do not read them
TRIAL = 4  # calls of a kernel in a row by which a number of threads is judged
TOLD_FROM = 1.0  # seconds of compiling from which a line says so


@cache
def library(source: Path, *headers: Path) -> ctypes.CDLL | None:
    """Return the loaded library of a C++ file, compiled if need be; None where kernels are off or cannot be built.

    headers: files that it includes, from its own folder; they count for the hash.
    """
    if os.environ.get("FATHOM_KERNELS", "").lower() in ("off", "0", "false"):
        return None
    for compiler in compilers():
        try:
            path = folder() / f"{source.stem}-{key(compiler, source, *headers)}.so"
            if not is_whole(path):
                path.unlink(missing_ok=True)
                build(compiler, source, path)
            return _with_team(ctypes.CDLL(str(path)))
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home folder
            print(f"kernels: {compiler} cannot build {source.name} ({_first_line(error)})", file=sys.stderr)
    return None


def folder() -> Path:
    """Return the folder of compiled kernels."""
    return Path(os.environ.get("FATHOM_DATA") or "~/.cache/fathom").expanduser() / "kernels"


def compilers() -> list[str]:
    """Return the C++ compilers of this machine, best first: $CXX, g++, clang++."""
    found = (shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)
    return list(dict.fromkeys(filter(None, found)))


def key(compiler: str, *sources: Path) -> str:
    """Return a hash of all that a library depends on: sources, compiler, flags and processor."""
    digest = hashlib.sha256()
    for part in (_version(compiler), " ".join(FLAGS), _processor()):
        digest.update(part.encode() + b"\0")
    for path in sources:
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def is_whole(path: Path) -> bool:
    """Return whether a library is there, belongs to this user and ends in its own checksum."""
    try:
        content, owner = path.read_bytes(), path.stat().st_uid
    except OSError:
        return False
    own = not hasattr(os, "getuid") or owner == os.getuid()
    return own and hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


def build(compiler: str, source: Path, path: Path) -> None:
    """Compile a C++ file to a library, which appears at `path` whole or not at all.

    Raises OSError or subprocess.SubprocessError if the compiler fails or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as place:
        output = Path(place, path.name)
        native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
        command = [compiler, *FLAGS, native, str(source), "-o", str(output)]
        subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        with open(output, "ab") as file:
            file.write(hashlib.sha256(output.read_bytes()).digest())
        os.replace(output, path)
    if (seconds := time.monotonic() - start) > TOLD_FROM:
        done = f"kernels: compiled {source.name} in {seconds:.1f} s, once for this machine ({path.parent})"
        print(done, file=sys.stderr, flush=True)  # stdout may hold an answer that a program reads


def _with_team(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Tell a library where its threads come from (cpu_team.h); return it."""
    lib.set_team.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    lib.set_team(*parallel_functions())
    return lib


def parallel_functions() -> tuple[int, int]:
    """Return the addresses of GOMP_parallel and GOMP_barrier in the OpenMP runtime that torch has loaded; 0 for none.

    A kernel that runs in torch's pool of threads needs no runtime of its own, whose threads would wait beside torch's.
    LLVM's and Intel's runtimes have these two functions as well.
    """
    names = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / names.get(sys.platform, "libtorch_cpu.so")))
        found = [getattr(torch_cpu, name) for name in ("GOMP_parallel", "GOMP_barrier")]  # of a library it depends on
    except (OSError, AttributeError):
        return 0, 0
    return tuple(ctypes.cast(function, ctypes.c_void_p).value for function in found)


class Threads:
    """Choice between one thread and all of torch's for the calls of a kernel, by how long calls took lately.

    On an idle machine all are faster. Where other processes want the cores too, threads that wait for each other many
    times a call are slower than one, up to ten times. Both are tried now and then; what is computed does not depend on
    it. least_work: work of a call, in any unit, below which one thread is always enough.
    """

    def __init__(self, least_work: int):
        self.least_work, self.uses_all = least_work, True
        self._is_trial, self._patience, self._left = False, TRIAL, TRIAL
        self._costs = deque(maxlen=16), deque(maxlen=16)  # seconds per work: of the choice, and of what is tried

    def run(self, work: int, call: Callable[[int], Any]) -> Any:
        """Return call(number of threads)."""
        threads = torch.get_num_threads()
        if threads == 1 or work < self.least_work:
            return call(1)
        start = time.perf_counter()
        result = call(threads if self.uses_all != self._is_trial else 1)
        self._note((time.perf_counter() - start) / work)
        return result

    def _note(self, cost: float) -> None:
        """Take down what a call cost; after a trial keep or change the choice, and begin one after a while."""
        self._costs[self._is_trial].append(cost)
        self._left -= 1
        if self._left:
            return
        if self._is_trial:
            chosen, tried = map(fmean, self._costs)
            self._patience = TRIAL if tried < chosen else min(2 * self._patience, 256 * TRIAL)
            self.uses_all ^= tried < chosen
            self._costs[0].clear()
            self._costs[1].clear()
        self._is_trial = not self._is_trial
        self._left = TRIAL if self._is_trial else self._patience


@cache
def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.stdout


@cache
def _processor() -> str:
    """Return the name of the machine and the abilities of its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    abilities = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    return f"{platform.system()} {platform.machine()} {abilities}"


def _first_line(error: Exception) -> str:
    text = (getattr(error, "stderr", None) or str(error)).strip()
    return next((line for line in text.splitlines() if "error" in line), text.splitlines()[0] if text else "no message")
