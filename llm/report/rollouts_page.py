"""`rollouts.html`: the answers of reinforcement learning with rewards and advantages coloured, in one file.

Answers are text of anybody: everything is escaped, and the page's policy lets no script run but its own.
"""

import base64
import hashlib
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from llm.errors import UserError
from llm.tokenizer.chat_format import PART_MARKS
from llm.utils.files import parse_json, read_bytes, write_atomic

PAGE, FILE = "rollouts.html", "rollouts.jsonl"
MOST_BYTES = 1 << 28

STYLE = """
:root { color-scheme: light dark; --good: 150; --bad: 10; --bg: #fff; --fg: #1b1f24; --soft: #f3f4f6; --line: #d5d9de }
@media (prefers-color-scheme: dark) { :root { --bg: #14171a; --fg: #e4e7ea; --soft: #20252a; --line: #3a4148 } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--bg);
  color: var(--fg) }
form { position: sticky; top: 0; background: var(--bg); padding: .6rem 0; border-bottom: 1px solid var(--line);
  display: flex; gap: 1rem; flex-wrap: wrap; align-items: center }
input, select { font: inherit; width: 6rem; background: var(--soft); color: var(--fg); border: 1px solid var(--line) }
article { border: 1px solid var(--line); border-radius: 6px; margin: 1rem 0; overflow: hidden }
article[hidden] { display: none }
header { display: flex; flex-wrap: wrap; gap: .4rem 1rem; padding: .4rem .8rem; background: var(--soft) }
pre { margin: 0; padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px }
pre.prompt { opacity: .75; border-bottom: 1px dashed var(--line) }
.written { border-bottom: 2px dotted currentColor; opacity: .7 }
.number { padding: 0 .4rem; border-radius: 4px }
"""

SCRIPT = """
const form = document.querySelector('form'), rows = [...document.querySelectorAll('article')];
function choose() {
  const low = parseFloat(form.low.value), high = parseFloat(form.high.value), step = form.step.value;
  let shown = 0;
  for (const row of rows) {
    const reward = parseFloat(row.dataset.reward);
    row.hidden = reward < low || reward > high || (step !== '' && row.dataset.step !== step);
    shown += !row.hidden;
  }
  document.querySelector('output').textContent = `${shown} of ${rows.length} answers`;
}
form.addEventListener('input', choose);
form.addEventListener('submit', (event) => event.preventDefault());
choose();
"""


def write_page(stage_dir: Path) -> Path | None:
    """Write the page of a stage's rollouts.jsonl beside it and return its path; None where there is no such file.

    Raises UserError for a file that cannot be read.
    """
    if not (stage_dir / FILE).is_file():
        return None
    page = from_rows(stage_dir, lambda rows: page_of(f"{stage_dir.parent.name}/{stage_dir.name}", rows))
    write_atomic(stage_dir / PAGE, page)
    return stage_dir / PAGE


def from_rows(stage_dir: Path, use: Callable[[list[dict[str, Any]]], Any]) -> Any:
    """Return what a function makes of the answers in rollouts.jsonl; a last line that is being written is left out.

    Raises UserError for a file that cannot be read, or that the function cannot use.
    """
    path = stage_dir / FILE
    try:
        lines = read_bytes(path, MOST_BYTES).decode("utf-8", errors="replace").splitlines(keepends=True)
        return use([parse_json(line.encode(), path) for line in lines if line.endswith("\n")])
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it, the next training writes it anew") from error


def page_of(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return the page for answers as `llm.stages.rollout_log` writes them, the latest step first."""
    rows = sorted(rows, key=lambda row: -int(row["step"]))
    largest = max((abs(float(row["advantage"])) for row in rows), default=0.0) or 1.0
    rewards = [float(row["reward"]) for row in rows] or [0.0]
    low, high = min(rewards), max(rewards)
    steps = "".join(
        f'<option value="{step}">{step + 1}</option>' for step in dict.fromkeys(int(r["step"]) for r in rows)
    )
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>Rollouts of {escape(title)}</title><style>{STYLE}</style></head><body>
<h1>Rollouts of {escape(title)}</h1>
<p>Dotted text was written by a tool or the task and is not trained on. Green is good, red is bad.</p>
<form><label>step <select name="step"><option value="">all</option>{steps}</select></label>
<label>reward from <input name="low" type="number" step="any" value="{low!r}"></label>
<label>to <input name="high" type="number" step="any" value="{high!r}"></label><output></output></form>
{"".join(_article(row, largest, low, high) for row in rows)}
<script>{SCRIPT}</script></body></html>
"""


def _article(row: dict[str, Any], largest: float, low: float, high: float) -> str:
    """Return one answer. largest: of all advantages' sizes; low, high: of all rewards."""
    reward, advantage, step = float(row["reward"]), float(row["advantage"]), int(row["step"])
    place = (reward - low) / (high - low) * 2 - 1 if high > low else 0.0
    sources = "".join(
        f"<span>{escape(str(name))} {float(number):.3g}</span>" for name, number in row["rewards"].items()
    )
    texts = readable_pieces([str(text) for text, _ in row["pieces"]])
    answer = "".join(
        f"<span>{escape(text)}</span>" if sampled else f'<span class="written">{escape(text)}</span>'
        for text, (_, sampled) in zip(texts, row["pieces"], strict=True)
    )
    return (
        f'<article data-reward="{reward!r}" data-step="{step}"><header><b>step {step + 1}</b>'
        f"<span>question {int(row['question'])}</span>{_coloured('reward', reward, place)}"
        f"{_coloured('advantage', advantage, advantage / largest)}{sources}"
        f"<span>{int(row['length'])} tokens</span><span>{escape(str(row['finish']))}</span></header>"
        f'<pre class="prompt">{escape(str(row["prompt"]))}</pre><pre>{answer}</pre></article>\n'
    )


def readable_pieces(pieces: Sequence[str]) -> list[str]:
    """Return the pieces of an answer with calls of the calculator as the report has them: `⟨python: 12*3 = 36⟩`."""
    (call, call_end), (result, result_end) = PART_MARKS["python"], PART_MARKS["python_output"]
    signs = {call_end + result: " = ", call: "⟨python: ", result: " = ", result_end: "⟩"}
    shown = []
    for text, following in zip(pieces, [*pieces[1:], ""], strict=True):
        for mark, sign in signs.items():
            text = text.replace(mark, sign)
        text = text.removesuffix(call_end) if following.startswith(result) else text
        shown.append(text.replace(call_end, "⟩"))
    return shown


def _coloured(name: str, number: float, place: float) -> str:
    """Return a number on a colour. place: from -1 (red) over 0 (none) to 1 (green)."""
    hue, strength = ("--good" if place >= 0 else "--bad"), min(abs(place), 1.0) * 0.45
    style = f"background: hsl(var({hue}) 70% 45% / {strength:.2f})"
    return f'<span class="number" style="{style}">{name} {number:.3g}</span>'
