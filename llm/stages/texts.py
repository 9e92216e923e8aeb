"""The user's files of text that a stage reads, compared on a resume with those that it began with.

A cursor counts rows, so in other files it would go on at another place, and nobody would notice.
"""

import hashlib
import os
from itertools import zip_longest
from pathlib import Path

from llm.errors import UserError
from llm.stages.job import Job
from llm.stages.parents import holds_work

END_BYTES = 1 << 16  # read at the beginning and at the end of a file: terabytes of text must not delay a start


def check_same_texts(job: Job) -> None:
    """Note the files of `data=local` in run.json; UserError where an unfinished stage was begun with others.

    Files of stores and of the hub are not looked at, nor is a run.json of an older release, which names none.
    """
    from llm.data.sources import build_source, is_remote

    cfg = job.cfg
    if not job.row.reads_text or cfg.data.name != "local" or is_remote(cfg.data):
        return
    files = build_source(cfg.data, cfg.paths.data).files
    paths = list(dict.fromkeys(getattr(file, "archive", file) for file in files))
    now = job.manifest["texts"] = [[path.name, content_sum(path)] for path in paths]
    record = job.run.manifest(job.row.name) or {}
    if cfg.overwrite or cfg.dry_run or not holds_work(job.stage_dir) or record.get("texts") is None:
        return
    for begun, present in zip_longest(record["texts"], now):
        if begun != present:
            raise UserError(
                f"{job.stage_dir}: this stage was begun with other text: {_change(begun, present)}. Put the files "
                "back, or overwrite=true starts the stage again"
            )


def _change(begun: list[str] | None, present: list[str] | None) -> str:
    """Say in words what became of a file [name, sum]; None: there is no further file."""
    if begun is None:
        return f"{present[0]} is new"
    if present is None:
        return f"{begun[0]} is missing"
    return f"{begun[0]} has changed" if begun[0] == present[0] else f"{present[0]} is in the place of {begun[0]}"


def content_sum(path: Path) -> str:
    """Return the bytes of a file and a hash of its first and last END_BYTES, `<bytes>-<hash>`."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.sha256()
        for start in (0, max(0, size - END_BYTES)):
            file.seek(start)
            digest.update(file.read(END_BYTES))
    return f"{size}-{digest.hexdigest()[:16]}"
