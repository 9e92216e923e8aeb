"""The worker that the panel starts for its queue: `python -m llm.panel.worker <queue file>`, in a session of its own.

It lives on when the server ends, and ends itself when no job can start. One works and one waits at most, by two locks.
"""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

from llm.experiments.queue_store import Queue
from llm.experiments.worker import work
from llm.utils.source import python_path


def start_worker(queue: Path) -> subprocess.Popen:
    """Start a worker for a queue; where one works and one waits already, it ends at once."""
    with queue.with_suffix(".worker.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "llm.panel.worker", str(queue)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | python_path(),
        )


def main(path: Path) -> None:
    """Wait until no other worker of the panel is at this queue, then work it off."""
    with path.with_suffix(".next").open("w") as next_one, path.with_suffix(".worker").open("w") as worker:
        try:
            fcntl.flock(next_one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # who waits will see the new jobs too
        fcntl.flock(worker, fcntl.LOCK_EX)
        fcntl.flock(next_one, fcntl.LOCK_UN)
        work(Queue(path), say=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
