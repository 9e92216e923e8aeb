"""Seconds that a user waits for the command line: help, a misspelt key, composing, and importing torch and Lightning.

Each command is a fresh process, run `REPEATS` times; the table shows the best, the last line is JSON.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
REPEATS = 3
COMMANDS = {
    "help": ["train.py", "--help"],
    "misspelt key": ["train.py", "stage=pretrain", "modle=d4"],
    "option that does not exist": ["train.py", "model=d5x"],
    "compose one job": ["train.py", "experiment=demo", "stage=sft", "--cfg", "job"],
    "import torch and Lightning": ["-c", "import torch, lightning"],
}


def measure(arguments: list[str]) -> tuple[float, float]:
    """Return (wall-clock, CPU) seconds of one process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=REPO, capture_output=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure every command and print the best times."""
    results = {name: min(measure(arguments) for _ in range(REPEATS)) for name, arguments in COMMANDS.items()}
    print(f"{'command':<28}{'wall s':>8}{'CPU s':>8}")
    for name, (wall, cpu) in results.items():
        print(f"{name:<28}{wall:>8.2f}{cpu:>8.2f}")
    print(
        json.dumps({name: {"wall_s": round(wall, 3), "cpu_s": round(cpu, 3)} for name, (wall, cpu) in results.items()})
    )


if __name__ == "__main__":
    main()
