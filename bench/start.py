"""Seconds from the start of a process to the end of its first step: train.py beside a plain script.

    python bench/start.py [--depth 4] [--seq-len 512] [--vocab 8192] [--repeats 5] [--compile both] [--text FOLDER]

The plain script (bench/_start.py) builds the same network, data, optimizer and compiled step without Hydra and
Lightning, and checks, saves and prints nothing; the losses of both first steps must be equal. They are started in
turns, after each has run once, which fills the compile cache. Text is generated unless --text names a folder. cpu:
processor seconds with those of child processes, which other programs of the machine hardly change; wall: seconds of
the clock. Prints medians, and a last line of JSON.
"""

import _bench  # isort: skip  (puts the project on the path)
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from omegaconf import OmegaConf

from llm.cli.overrides import compose
from llm.utils.files import write_json

REPO = Path(__file__).resolve().parent.parent
ENV = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "bench")])}
END = "+callbacks.first_step._target_=_start.first_step"


def settings(args, folder: Path) -> list[str]:
    """Return the settings of both stages, tokenizer and pretrain."""
    text = ["data=local", f"data.path={Path(args.text).resolve()}"] if args.text else ["data=embedded"]
    return [*text, f"paths.runs={folder}", f"model=d{args.depth}", f"model.seq_len={args.seq_len}"]


def training(args, folder: Path, compiled: bool) -> list[str]:
    """Return the settings of a pretraining without an evaluation, which would come before its first step."""
    rows = [f"batch.tokens_per_step={16 * args.seq_len}", "batch.micro_batch_size=4"]
    more = ["stage=pretrain", "arch.window_pattern=L", "stage.eval_every=0", "max_steps=1000", f"compile={compiled}"]
    return [*settings(args, folder), *rows, *more]


def seconds(command: list[str]) -> tuple[float, float, float]:
    """Return wall and processor seconds of a command from its start to the end of its first step, and its loss."""
    start = time.time()
    done = subprocess.run([sys.executable, *command], cwd=REPO, env=ENV, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    told = json.loads(done.stdout.splitlines()[-1])
    return told["at"] - start, told["cpu"], told["loss"]


def measure(args, folder: Path, compiled: bool) -> dict[str, float]:
    """Return the medians of both programs, and ours minus plain."""
    cfg = compose("train", training(args, folder, compiled))
    config = folder / f"config-{compiled}.json"
    write_json(config, OmegaConf.to_container(cfg, resolve=True))
    ours = ["train.py", *training(args, folder, compiled), "overwrite=true", "init_from=tok/tokenizer", END]
    plain = ["bench/_start.py", str(config), str(folder / "tok/tokenizer/model")]
    found: dict[str, list[tuple[float, ...]]] = {"ours": [], "plain": []}
    for turn in range(args.repeats + 1):
        for name, command in (("ours", ours), ("plain", plain)):
            taken = seconds(command)
            if turn:
                found[name].append(taken)
    losses = [taken[2] for values in found.values() for taken in values]
    if max(losses) - min(losses) > 1e-4:
        sys.exit(f"the first steps are not the same: losses {losses}")
    kind, result = "compiled" if compiled else "eager", {}
    for i, clock in enumerate(("wall", "cpu")):
        both = {name: _bench.median([taken[i] for taken in values]) for name, values in found.items()}
        result |= {f"{kind}_{name}_{clock}_s": value for name, value in both.items()}
        result[f"{kind}_more_{clock}_s"] = both["ours"] - both["plain"]
    return result


def main() -> None:
    """Train a tokenizer, then time the starts."""
    numbers = {"depth": 4, "seq-len": 512, "vocab": 8192, "repeats": 5}
    args = _bench.arguments(__doc__, numbers, compile="both", text="")
    choices = {"both": (False, True), "true": (True,), "false": (False,)}
    if args.compile not in choices:
        sys.exit(f"--compile {args.compile}: choose one of {', '.join(choices)}")
    with tempfile.TemporaryDirectory(prefix="fathom-start-") as place:
        folder = Path(place)
        tokenizer = ["stage=tokenizer", f"stage.vocab_size={args.vocab}", "run=tok"]
        subprocess.run([sys.executable, "train.py", *settings(args, folder), *tokenizer], cwd=REPO, env=ENV, check=True)
        result = {}
        for compiled in choices[args.compile]:
            result |= measure(args, folder, compiled)
    _bench.show(vars(args) | result)


if __name__ == "__main__":
    main()
