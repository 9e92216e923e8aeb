"""Abuse of the server: requests that Schemathesis makes from its own document, /openapi.json.

    python tests/abuse.py [--requests 10000] [--seed 0] [--schemathesis FILE]

`make abuse` installs Schemathesis beside the project's packages and runs this. A tiny model is served by `serve.py`.
Every answer must conform to the document (status, headers, media type, schema), what the document forbids must be
refused, and no answer may have status 500 or more. Prints the counts by route and status and a last line of JSON, and
exits with 1 where anything else was seen.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # many small matrices are fastest on one thread

from serving_run import ServerProcess, make_run  # noqa: E402

HERE = Path(__file__).resolve().parent
EXAMPLES = 200  # of each route in one round
# One thread: with more, CPython 3.11 at times fails inside Hypothesis ("AST constructor recursion depth mismatch").
# What the document allows may still be refused: it cannot say that a prompt must fit the context.
OPTIONS = ("--workers=1", "--continue-on-failure", "--no-color", "--exclude-checks=positive_data_acceptance")
FORBIDDEN = 500  # this status and those above it: no worker dies here, and nothing ends or takes too long


def main() -> int:
    """Serve, abuse, tell; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000, help="at least so many requests are sent")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first round; each round has the next one")
    parser.add_argument("--schemathesis", default="schemathesis", help="its program")
    args = parser.parse_args()
    program = shutil.which(args.schemathesis)
    if program is None:
        parser.error(f"no {args.schemathesis}: use `make abuse`, or pip install schemathesis")
    with tempfile.TemporaryDirectory(prefix="fathom-abuse-") as folder:
        make_run(Path(folder))
        log = Path(folder) / "log"
        with log.open("w") as stderr, ServerProcess(Path(folder), "ui=api", "max_new_tokens=50", stderr=stderr) as one:
            counts, failed, seed = Counter(), 0, args.seed
            while sum(counts.values()) < args.requests:
                failed += abuse(str(Path(program).absolute()), one.url, seed, folder) != 0
                counts, seed = counted(log), seed + 1
    for (path, status), n in sorted(counts.items()):
        print(f"{path:24} {status} {n:8,}")
    bad = sum(n for (_, status), n in counts.items() if status >= FORBIDDEN)
    told = {"requests": sum(counts.values()), "rounds": seed - args.seed, "bad": bad, "failed": bool(failed or bad)}
    print(json.dumps(told))
    return int(told["failed"])


def abuse(program: str, url: str, seed: int, folder: str) -> int:
    """Let Schemathesis send a round of requests, and keep its notes in a folder; return its exit status."""
    options = (*OPTIONS, f"--max-examples={EXAMPLES}", f"--seed={seed}", "--generation-database=none")
    env = os.environ | {"SCHEMATHESIS_HOOKS": "abuse_hooks", "PYTHONPATH": str(HERE)}
    return subprocess.run([program, "run", f"{url}/openapi.json", *options], env=env, cwd=folder).returncode


def counted(log: Path) -> Counter:
    """Return how many requests the server's log tells of, by route and status."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return Counter((line["path"], line["status"]) for line in lines)


if __name__ == "__main__":
    sys.exit(main())
