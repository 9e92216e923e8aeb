"""One line on the machine that the panel runs on: processors, memory, and each GPU that nvidia-smi knows."""

import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import NamedTuple

from llm.utils.format import percent

STAT, MEMORY = Path("/proc/stat"), Path("/proc/meminfo")
SECONDS = 4.0  # that a line stays; pages of several browsers ask for the same
GPU_SECONDS = 5.0  # until nvidia-smi is given up
QUERY = "index,utilization.gpu,memory.used,memory.total"
GIB = 1 << 20  # KiB


class Times(NamedTuple):
    """Ticks of all processors since the start of the machine."""

    busy: int
    total: int


class Machine:
    """Looks at the machine at most every `SECONDS`; the load of processors is that since the look before."""

    def __init__(self, stat: Path = STAT, memory: Path = MEMORY) -> None:
        self.stat, self.memory = stat, memory
        self._lock, self._line, self._at = threading.Lock(), "", -SECONDS
        self._before = _times(stat)

    def line(self) -> str:
        """Return the line; parts that this system does not tell are left out."""
        with self._lock:
            if time.monotonic() - self._at >= SECONDS:
                now = _times(self.stat)
                parts = [_load(self._before, now), _memory(self.memory), *_gpus()]
                self._line, self._at, self._before = "; ".join(filter(None, parts)), time.monotonic(), now
            return self._line


def _times(path: Path) -> Times | None:
    """Return the ticks in /proc/stat (proc(5)): user nice system idle iowait ...; None on other systems."""
    try:
        fields = path.read_text().split("\n", 1)[0].split()
        ticks = [int(field) for field in fields[1:9]]
    except (OSError, ValueError):
        return None
    return Times(sum(ticks) - sum(ticks[3:5]), sum(ticks))


def _load(before: Times | None, now: Times | None) -> str:
    if before is None or now is None or now.total <= before.total:
        return ""
    return f"CPU {percent((now.busy - before.busy) / (now.total - before.total))} of {os.cpu_count()} cores"


def _memory(path: Path) -> str:
    try:
        lines = (line.split() for line in path.read_text().splitlines())
        found = {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1}
        total, free = found["MemTotal"], found["MemAvailable"]
    except (OSError, ValueError, KeyError):
        return ""
    return f"memory {(total - free) / GIB:.1f} of {total / GIB:.1f} GiB"


def _gpus() -> list[str]:
    """Return a part for each GPU of nvidia-smi; [] where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        command = [program, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=GPU_SECONDS, stdin=subprocess.DEVNULL)
        rows = [[field.strip() for field in line.split(",")] for line in said.stdout.splitlines()]
        return [f"GPU {row[0]} {row[1]} %, {int(row[2]) / 1024:.1f} of {int(row[3]) / 1024:.1f} GiB" for row in rows]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return []
