"""Builds the Data tab: texts as tokens, and the rows that a stage would train on."""

import os
import re
import subprocess
import sys
import tempfile
import threading
from functools import lru_cache
from pathlib import Path

from llm.errors import UserError
from llm.panel.form import Form
from llm.panel.jobs import ANSI, DRY_SECONDS, check
from llm.panel.markup import page, problem, text
from llm.panel.state import Panel
from llm.stages.show_batch import KINDS, LEGEND
from llm.tokenizer.bpe import Tokenizer
from llm.utils.source import python_path

MOST_LETTERS = 20_000  # of a text that is cut into tokens
MOST_ROWS = 16

_showing = threading.Lock()


def tokenizers(panel: Panel) -> list[str]:
    """Return the finished stages that have a tokenizer of ours."""
    return [
        f"{row['run']}/{row['stage']}"
        for row in panel.index.rows()
        if row["status"] == "finished" and (Path(row["folder"]) / "model" / "fathom_tokenizer.json").is_file()
    ]


def cut(panel: Panel, name: str, content: str) -> str:
    """Return a text with its tokens coloured, their number, and how many bytes each stands for."""
    if not name:
        return page("<p>Choose a stage with a tokenizer.</p>")
    if len(content) > MOST_LETTERS:
        return page(problem(f"{len(content):,} letters; {MOST_LETTERS:,} are cut at most"))
    try:
        folder = Path(panel.index.row(name)["folder"]) / "model"
        tokenizer = _loaded(str(folder), (folder / "fathom_tokenizer.json").stat().st_mtime_ns)
    except (UserError, OSError) as error:
        return page(problem(str(error)))
    ids = tokenizer.encode(content)
    size = len(content.encode("utf-8", errors="replace"))
    shown = ((one, tokenizer.decode_bytes([one]).decode("utf-8", errors="replace")) for one in ids)
    spans = "".join(f'<span class="token" title="{one}">{text(letters)}</span>' for one, letters in shown)
    ratio = f", {size / len(ids):.2f} bytes per token" if ids else ""
    about = f"{name}: {len(ids):,} tokens for {size:,} bytes{ratio}; vocabulary of {tokenizer.vocab_size:,}"
    return page(f"<p><b>{text(about)}</b></p>", f'<pre class="block" tabindex="0">{spans}</pre>')


@lru_cache(maxsize=4)
def _loaded(folder: str, changed: int) -> Tokenizer:
    """Load a tokenizer, again where its file has changed."""
    return Tokenizer.load(folder)


def training_rows(panel: Panel, form: Form, rows: int) -> str:
    """Return the first rows that the stage of a form would train on, trained tokens coloured, as `make show-data`.

    The stage is built in a process of its own, from its parent. Raises UserError for a mistake in the form.
    """
    panel.check_may_change()  # it takes a core for some seconds
    settings = check(panel, form)
    if form.sweep:
        raise UserError("training rows: one job at a time; leave several values out")
    if not _showing.acquire(blocking=False):
        raise UserError("rows are being made already")
    try:
        with tempfile.TemporaryDirectory(prefix="fathom_rows_") as place:
            file = Path(place) / "rows.html"
            words = ["--rows", str(max(1, min(int(rows), MOST_ROWS))), "--html", str(file)]
            done = subprocess.run(
                [sys.executable, "-m", "llm.stages", *words, *settings],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=DRY_SECONDS,
                start_new_session=True,
                env=os.environ | python_path(),
            )
            if not file.is_file():
                said = ANSI.sub("", done.stderr.decode("utf-8", errors="replace")).strip().splitlines()
                raise UserError(said[-1].removeprefix("error: ") if said else "no rows were made")
            return from_page(file.read_text(encoding="utf-8"))
    except subprocess.TimeoutExpired:
        raise UserError(f"this took more than {DRY_SECONDS} s; try make show-data in the terminal") from None
    finally:
        _showing.release()


def from_page(content: str) -> str:
    """Return the rows of a page of `llm.stages.show_batch`, in the colours of the panel's."""
    for kind, (_, style) in KINDS.items():
        content = content.replace(f'<span style="{style}">', f'<span class="{kind}">')
    title = re.search(r"<h1>(.*?)</h1>", content)
    blocks = re.findall(r"<pre>(.*?)</pre>", content, re.DOTALL)
    shown = ('<pre class="block" tabindex="0">' + one.replace("\n", "&#10;") + "</pre>" for one in blocks)
    return page(f"<p><b>{title[1] if title else ''}</b></p><p>{text(LEGEND)}</p>", *shown)
