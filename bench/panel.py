"""The panel's readers on generated runs: first table, charts of 20 runs, and what watching a run costs.

    python bench/panel.py [--runs 500 --rows 4000 --long 20 --steps 100000] [--browser /usr/bin/chromium]

`runs` folders of `rows` metric rows each, and `long` more of `steps` rows. The last line is JSON. With a browser (`make
browser`) a real server is looked at too: its CPU time alone, with the table open, with a run open that gets a row every
second; and the time until a browser shows the table.
"""

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from llm.panel.chart import Line, draw  # noqa: E402
from llm.panel.columns import Columns  # noqa: E402
from llm.panel.curves import curve, fewer, smooth  # noqa: E402
from llm.panel.index import Index  # noqa: E402
from llm.run.stage_folder import write_manifest  # noqa: E402

COLUMNS = ("bpb", "tok_per_s", "ms_per_step", "mfu", "data_wait", "tokens", "flops", "seconds", "lr", "loss")


def add_run(root: Path, name: str, rows: int, seed: int) -> Path:
    """Write a stage with as many rows of metrics; bpb is measured in every fiftieth."""
    folder, chance = root / name / "pretrain", random.Random(seed)
    config = {"stage": {"name": "pretrain"}, "model": {"depth": 4}, "seed": seed, "run": name}
    facts = {"stage": "pretrain", "status": "finished", "config": config, "steps": rows, "tokens": 512 * rows}
    facts |= {"seconds": 0.1 * rows, "metrics": {"bpb": 2.0, "loss": 4.0}, "derived": {"steps": rows}}
    write_manifest(folder, facts)
    with (folder / "metrics.csv").open("w") as file:
        file.write(",".join(("step", *COLUMNS)) + "\n")
        for step in range(rows):
            loss = 4 + chance.random()
            bpb = f"{loss / 2:.6f}" if step % 50 == 0 else ""
            file.write(f"{step},{bpb},1000,12.5,0.1,0.01,{512 * step},{step * 1e9},{step / 10},0.02,{loss:.6f}\n")
    return folder


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return (wall-clock, CPU) seconds of a function."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def chart(columns: Columns, folders: list[Path], metric: str = "loss") -> str:
    """Draw a metric of stages in one chart, smoothed."""
    lines = []
    for number, folder in enumerate(folders):
        x, y = curve(columns, str(folder), metric)
        lines.append(Line(folder.parent.name, *fewer(x, smooth(y, 0.9)), colour=number))
    return draw(metric, lines, "step")


def cost_of_server(root: Path, growing: Path, chromium: str, seconds: float) -> dict[str, float]:
    """Return percent of a core that a server takes, and milliseconds of first views. `growing`: the watched stage."""
    words = ["ui=panel", "port=0", "panel.readonly=true", f"paths.runs={root}"]
    server = subprocess.Popen([sys.executable, str(REPO / "serve.py"), *words], stdout=subprocess.PIPE, text=True)
    try:
        url = next(found[1] for line in server.stdout if (found := re.search(r"(http://\S+/panel)", line)))
        name = f"{growing.parent.name}/{growing.name}"
        asked = [f"{url}/", str(server.pid), name, chromium, str(seconds)]
        command = ["node", str(REPO / "tests/browser/panel_cost.mjs"), *asked]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
            step = 10_000_000
            while driver.poll() is None:
                add_row(growing, step := step + 1)
                time.sleep(1)
            said = driver.stdout.read()
        if driver.returncode:
            raise SystemExit("the browser did not do its part: see above")
        return json.loads(said)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


def add_row(folder: Path, step: int) -> None:
    """Add a row of metrics to a stage, as a training does."""
    with (folder / "metrics.csv").open("a") as file:
        file.write(f"{step},,1000,12.5,0.1,0.01,1,1,1,0.02,4.0\n")


def main() -> None:
    """Make the runs, and time each thing that the panel does with them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("runs", 500), ("rows", 4000), ("long", 20), ("steps", 100_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--browser", help="path of Chromium")
    parser.add_argument("--seconds", type=float, default=30, help="length of a look at the server's CPU time")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root, cache = Path(place) / "runs", Path(place) / "cache"
        for number in range(args.runs):
            add_run(root, f"run-seed={number}", args.rows, number)
        long = [add_run(root, f"long-seed={number}", args.steps, number) for number in range(args.long)]
        results = {"table, no cache": timed(lambda: Index(root, cache, Columns(cache)).rows())}
        results["table, first view"] = timed(lambda: Index(root, cache, Columns(cache)).rows())
        index, columns = Index(root, cache, Columns(cache)), Columns(cache)
        index.rows()
        results["table, again"] = timed(index.rows)
        results["chart, no cache"] = timed(lambda: chart(columns, long))
        results["chart, first view"] = timed(lambda: chart(Columns(cache), long))
        results["chart, again"] = timed(lambda: chart(columns, long))

        def watch() -> None:
            add_row(long[0], args.steps + 1)
            chart(columns, long[:1])

        results["one new row, chart of one run"] = timed(watch)
        served = cost_of_server(root, root / "run-seed=0/pretrain", args.browser, args.seconds) if args.browser else {}
    print(f"{'':<32}{'wall s':>8}{'CPU s':>8}")
    for name, (wall, cpu) in results.items():
        print(f"{name:<32}{wall:>8.3f}{cpu:>8.3f}")
    for name, figure in served.items():
        print(f"{name:<32}{figure:>8}")
    read = {name: {"wall_s": round(wall, 4), "cpu_s": round(cpu, 4)} for name, (wall, cpu) in results.items()}
    print(json.dumps(read | served))


if __name__ == "__main__":
    main()
