"""One command for a machine with a GPU that nobody prepared: what is equal, how fast it is, and against which ceiling.

    python bench/gpu_check.py [--out .] [--minutes 9] [--only attention,decode] [--small]        `make gpu-check`

Every part runs in a process of its own with a budget of seconds. A part that runs out of time is reported with its
findings so far, and is no failure. A check that fails, or a part that crashes, is named and makes the exit status 1.
Writes gpu_check.json into --out and prints a table. Without a GPU, or with --small, every part runs in a small form.
Needs no network, and no files beside the checkout.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
OK, FAILED, CRASHED, LATE, LEFT_OUT = "ok", "failed", "crashed", "out of time", "left out"
PATIENCE = 3


@dataclass(frozen=True)
class Part:
    """Part of the check: module:function, called with (Findings, small, **options), and the seconds it may take.

    budget: on a GPU; the small form, on a CPU that may be busy, gets `PATIENCE` times as much.
    measures: True if it measures speed, and so must have the machine to itself.
    """

    name: str
    where: str
    budget: float
    options: dict = field(default_factory=dict)
    measures: bool = True


PARTS = (
    Part("machine", "_gpu_kernels:machine", 40),
    Part("attention", "_gpu_kernels:attention", 75),
    Part("optimizer", "_gpu_kernels:optimizer", 60),
    Part("compile", "_gpu_training:compilation", 120),
    Part("step_d12", "_gpu_training:step", 70, {"depth": 12}),
    Part("step_d20", "_gpu_training:step", 130, {"depth": 20}),
    Part("fp8", "_gpu_training:fp8", 110),
    Part("joint_qkv", "_gpu_training:switches", 60, {"key": "joint_qkv"}),
    Part("bf16_tables", "_gpu_training:switches", 60, {"key": "bf16_tables"}),
    Part("muon_kernels", "_gpu_kernels:muon_kernels", 40),
    Part("early_check", "_gpu_training:early_check", 50, {"depth": 12}),
    Part("micro_batch", "_gpu_training:micro_batch", 60),
    Part("decode", "_gpu_running:decode", 80),
    Part("core", "_gpu_running:core", 50),
    Part("decode_compiled", "_gpu_running:decode", 150, {"compiles": True}),
    Part("tuned_products", "_gpu_training:switches", 150, {"key": "tuned_products"}),
    Part("resume", "_gpu_running:resume", 110, measures=False),
    Part("demo", "_gpu_running:demo", 110, measures=False),
)


class Findings:
    """Values and checks of a part, each written to a file at once, so that nothing is lost when time runs out."""

    def __init__(self, path: Path):
        self.path, self.values, self.checks = path, {}, {}

    def note(self, **values) -> None:
        """Keep numbers and words by name."""
        self.values |= values
        self._write()

    def check(self, name: str, error: float, limit: float) -> None:
        """Keep an error and its limit; the check is ok if the error is not above the limit, and never for NaN."""
        self.checks[name] = {"error": error, "limit": limit, "ok": bool(error <= limit)}
        self._write()

    def _write(self) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps({"values": self.values, "checks": self.checks}))
        new.replace(self.path)


def run_part(part: Part, seconds: float, small: bool, folder: Path) -> dict:
    """Run a part in a process of its own for at most `seconds`; return its status, its seconds and its findings."""
    if seconds < 1:
        return {"status": LEFT_OUT, "seconds": 0.0, "values": {}, "checks": {}}
    path, log = folder / f"{part.name}.json", folder / f"{part.name}.log"
    command = [sys.executable, __file__, "--child", json.dumps([part.where, part.options, small, str(path)])]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    begin = time.monotonic()
    with log.open("wb") as out:
        started = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
        try:
            code = started.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(started)
    result = json.loads(path.read_text()) if path.exists() else {"values": {}, "checks": {}}
    result |= {"status": status_of(code, result["checks"]), "seconds": time.monotonic() - begin}
    if result["status"] == CRASHED:
        result |= error_of(code, log.read_text(errors="replace"))
    return result


def end(started: subprocess.Popen) -> None:
    """End a part's process and all processes that it has started."""
    try:
        os.killpg(started.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    started.wait()


def status_of(code: int | None, checks: dict) -> str:
    """Return the status of a part that ended with `code` (None: its time ran out) and these checks."""
    if not all(check["ok"] for check in checks.values()):
        return FAILED
    if code is None:
        return LATE
    return OK if code == 0 else CRASHED


def error_of(code: int, log: str) -> dict:
    """Return the last line of a log, which names the error, and its last 40 lines."""
    lines = [line for line in log.splitlines() if line.strip()] or [f"ended with {code} without a word"]
    return {"error": lines[-1][:500], "log": lines[-40:]}


def run_all(parts: tuple[Part, ...], minutes: float, small: bool, folder: Path) -> dict[str, dict]:
    """Run the parts that measure one after the other, then the rest side by side; return results by name.

    All parts end within `minutes`; those for which no time remains are left out.
    """
    deadline = time.monotonic() + 60 * minutes
    results = {}

    def run(part: Part) -> None:
        seconds = min(part.budget * (PATIENCE if small else 1), deadline - time.monotonic())
        results[part.name] = result = run_part(part, seconds, small, folder)
        print(f"{part.name:12} {result['status']:12} {result['seconds']:6.1f} s", flush=True)

    for part in parts:
        if part.measures:
            run(part)
    others = [part for part in parts if not part.measures]
    with ThreadPoolExecutor(max(len(others), 1)) as pool:
        list(pool.map(run, others))
    return results


def show(results: dict[str, dict]) -> None:
    """Print the table: a line per part, below it its checks and its numbers."""
    for name, result in results.items():
        print(f"\n{name}: {result['status']}, {result['seconds']:.1f} s")
        if "error" in result:
            print(f"  {result['error']}")
        for key, check in result["checks"].items():
            word = "equal" if check["ok"] else "DIFFERS"
            print(f"  {word:8} {key}: error {check['error']:.3g}, limit {check['limit']:.3g}")
        width = max(map(len, result["values"]), default=0)
        for key, value in result["values"].items():
            print(f"  {key:{width}}  {value:,.4g}" if isinstance(value, float) else f"  {key:{width}}  {value}")


def chosen(names: str | None, parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """Return the parts of these names, separated by commas, or all for None; exits with a line for an unknown one."""
    if names is None:
        return parts
    known = {part.name: part for part in parts}
    if unknown := [name for name in names.split(",") if name not in known]:
        raise SystemExit(f"error: no part {unknown[0]!r}; there are {', '.join(known)}")
    return tuple(known[name] for name in names.split(","))


def child(where: str, options: dict, small: bool, path: str) -> None:
    """Run a part in this process."""
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    module, function = where.split(":")
    getattr(importlib.import_module(module), function)(Findings(Path(path)), small, **options)


def has_gpu() -> bool:
    """Return True if torch finds a CUDA GPU; another process looks, so that this one holds no memory of the GPU."""
    ask = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)"
    return subprocess.run([sys.executable, "-c", ask]).returncode == 0


def main(parts: tuple[Part, ...] = PARTS) -> int:
    """Run the command line; return the exit status: 1 if a check failed or a part crashed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for gpu_check.json")
    parser.add_argument("--minutes", type=float, default=8.8, help="minutes for all parts together")
    parser.add_argument("--only", help="names of parts, separated by commas: " + ",".join(part.name for part in parts))
    parser.add_argument("--small", action="store_true", help="run the small form of every part, which needs no GPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*json.loads(args.child))
        return 0
    parts, small = chosen(args.only, parts), args.small or not has_gpu()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/compiled"  # nothing is compiled yet
        results = run_all(parts, args.minutes, small, Path(folder))
    (args.out / "gpu_check.json").write_text(json.dumps({"small": small, "parts": results}, indent=1) + "\n")
    show(results)
    bad = [name for name, result in results.items() if result["status"] in (FAILED, CRASHED)]
    print(f"\n{args.out / 'gpu_check.json'}: " + (f"failed: {', '.join(bad)}" if bad else "nothing failed"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
