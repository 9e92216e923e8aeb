"""Memory of the browser chat's server over many turns, as a table, a file of numbers and a plot.

    python bench/server_memory.py [--turns 2000] [--depth 4] [--warmup 500] [--seed 0] [--out memory.csv]
                                  [--plot memory.png] [--beside earlier.csv]

A model with random weights is served by `serve.py` in a process of its own. A visitor asks questions of 1 to 400
characters over HTTP and reads answers of 1 to 8 tokens; every 10 turns another visitor comes. Every 10 turns the
resident memory of the server and of its workers is read. Prints the largest distance from its value after the
warm-up, and a last line of JSON. `--beside` draws the numbers of an earlier run, such as one of another version, into
the same plot.
"""

import _bench  # isort: skip  (puts the project on the path)
import argparse
import csv
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
EVERY = 10  # turns between two readings, and of one visitor


def main() -> None:
    """Serve, ask, and show how the memory went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"turns": 2000, "depth": 4, "warmup": 500, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("out", "plot", "beside"):
        parser.add_argument(f"--{name}", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fathom-bench-") as folder:
        make_run(Path(folder), args.depth)
        start = time.perf_counter()
        readings = []
        for reading in measure(Path(folder), args.turns, random.Random(args.seed)):
            readings.append(reading)
            if args.out:
                args.out.write_text("turn,mib\n" + "".join(f"{turn},{mib:.1f}\n" for turn, mib in readings))
        seconds = time.perf_counter() - start
    after = [mib for turn, mib in readings if turn >= args.warmup]
    largest = max(abs(mib / after[0] - 1) for mib in after)
    if args.plot:
        plot(args.plot, {"now": readings} | ({"before": read(args.beside)} if args.beside else {}))
    _bench.show(
        {
            "turns": args.turns,
            "turns_per_second": args.turns / seconds,
            "mib_at_start": readings[0][1],
            "mib_after_warmup": after[0],
            "mib_at_end": after[-1],
            "largest_change_after_warmup": largest,
        }
    )


def make_run(root: Path, depth: int) -> None:
    """Save a model with random weights as the finished run `memory`."""
    from llm.checkpoint.model_folder import save_model_folder
    from llm.cli.overrides import compose
    from llm.model.gpt import GPT
    from llm.scaling.rules import model_config
    from llm.tokenizer.bpe import Tokenizer
    from llm.utils.files import write_json

    tokenizer = Tokenizer([bytes([b]) for b in range(256)])
    cfg = compose("train", [f"model=d{depth}", "model.seq_len=1024"])
    net = GPT(model_config(cfg.model, cfg.arch, tokenizer.vocab_size)).init_weights(0)
    stage = root / "memory" / "sft"
    save_model_folder(stage / "model", net, tokenizer)
    write_json(stage / "run.json", {"stage": "sft", "status": "finished", "parent": None, "metrics": {}})


def measure(runs: Path, turns: int, rng: random.Random) -> Iterator[tuple[int, float]]:
    """Yield (turn, MiB of resident memory) of a server that answers that many questions, from before the first on."""
    from gradio_client import Client

    command = [sys.executable, str(REPO / "serve.py"), f"paths.runs={runs}", "run=memory", "port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            lines = iter(server.stdout.readline, "")
            url = next(found[1] for line in lines if (found := re.search(r"chat at (http://\S+)", line)))
            yield 0, resident(server.pid)
            for turn in range(1, turns + 1):
                if turn % EVERY == 1:
                    visitor = Client(url, verbose=False)
                question = "".join(rng.choices("abcdefgh ", k=rng.randint(1, 400))) + "?"
                visitor.predict(question, api_name="/ask")
                visitor.predict(1.0, 50, 1.0, rng.randint(1, 8), api_name="/answer")
                if turn % EVERY == 0:
                    visitor.close()
                    mib = resident(server.pid)
                    yield turn, mib
                    if turn % (20 * EVERY) == 0:
                        print(f"turn {turn:,}: {mib:,.0f} MiB", flush=True)
        finally:
            server.terminate()


def resident(pid: int) -> float:
    """Return the MiB of memory that a process and its children hold, without mapped files (Linux).

    Pages of libraries and other files come and go as the system likes.
    """
    process = Path(f"/proc/{pid}")
    own = re.search(r"RssAnon:\s*(\d+) kB", (process / "status").read_text())
    children = [int(child) for thread in process.glob("task/*/children") for child in thread.read_text().split()]
    return int(own[1]) / 1024 + sum(map(resident, children))


def read(path: Path) -> list[tuple[int, float]]:
    """Return the readings of an earlier run."""
    with path.open() as file:
        return [(int(row["turn"]), float(row["mib"])) for row in csv.DictReader(file)]


def plot(path: Path, curves: dict[str, list[tuple[int, float]]]) -> None:
    """Draw readings by name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained", dpi=120)
    axes = figure.subplots()
    for name, readings in curves.items():
        axes.plot(*zip(*readings, strict=True), label=name)
    axes.set(xlabel="turns", ylabel="resident memory, MiB", ylim=(0, None), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
