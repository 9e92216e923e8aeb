"""The whole way of a newcomer in the panel, in a real browser driven by `panel.mjs`: from own text to an answer."""

import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest
from processes import HANG, REPO, start, wait_until
from test_browser import HERE, browser_or_skip

from llm.cli.overrides import check_overrides
from llm.experiments.queue_store import Queue
from llm.run.formats import read_scores


def text() -> str:
    """Return a text that is always there: two pages of the guide."""
    return "\n\n".join((REPO / "docs" / name).read_text(encoding="utf-8") for name in ("data.md", "runs.md"))


class Panel:
    """A panel as a real server on a free port, over a folder of its own."""

    def __init__(self, root: Path, *more: str):
        words = ["ui=panel", "port=0", f"paths.runs={root / 'runs'}", f"paths.data={root / 'data'}", *more]
        self.process, self.url = start(sys.executable, str(REPO / "serve.py"), *words), ""
        for line in self.process.stdout:
            if found := re.search(r"(http://\S+)/panel", line):
                self.url = found[1]
                return
        raise AssertionError(f"the panel did not start: {self.process.communicate()}")

    def end(self, number: int = signal.SIGINT) -> None:
        """Send a signal, and wait for the end."""
        self.process.send_signal(number)
        self.process.communicate(timeout=HANG)


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict:
    """Record of what the browser saw, by sitting: before the server was killed, after, every tab, and the chat."""
    chromium, root = browser_or_skip(), tmp_path_factory.mktemp("panel")
    if not (HERE / "node_modules" / "axe-core").is_dir():
        pytest.skip("no axe-core (make browser): see tests/browser/README.md")
    screenshots = Path(os.environ.get("FATHOM_SCREENSHOTS", root))
    screenshots.mkdir(parents=True, exist_ok=True)
    (root / "text.txt").write_text(text())
    report = {}

    def drive(sitting: str, parts: str, url: str) -> None:
        words = [url, str(screenshots), chromium, parts, str(root / "text.txt")]
        process = start("node", str(HERE / "panel.mjs"), *words)
        said, told = process.communicate(timeout=HANG * len(parts.split(",")))
        assert process.returncode == 0, told
        report[sitting] = json.loads(said)
        assert "failure" not in report[sitting], (told, report[sitting]["failure"])

    panel = Panel(root)
    drive("begin", "send,tokenizer,pause", f"{panel.url}/panel/")
    panel.end(signal.SIGKILL)
    panel = Panel(root)
    drive("after", "again,resume,second,compare,evaluate,exported,ask", f"{panel.url}/panel/")
    drive("look", "look", f"{panel.url}/panel/")
    panel.end()
    panel = Panel(root, "run=letters", "stage=pretrain", "max_new_tokens=20", "temperature=0")
    drive("chat", "chat", f"{panel.url}/")
    panel.end()
    report["root"] = root
    return report


@pytest.mark.slow
def test_nothing_comes_from_outside_and_the_console_has_no_errors(seen):
    for sitting in ("begin", "after", "look", "chat"):
        assert seen[sitting]["external"] == [] and seen[sitting]["errors"] == [], sitting


@pytest.mark.slow
def test_own_text_is_sent_checked_and_refused_where_it_is_none(seen):
    begin = seen["begin"]
    assert "virus.exe: is no file that can be read" in begin["refused"]
    assert (seen["root"] / "data/own/letters/text/my_text.txt").read_text() == text()
    assert not (seen["root"] / "data/own/letters/text/virus.exe").exists()
    assert "my_text.txt" in begin["checked"] and "held out" in begin["checked"]
    assert begin["mistake"] == "max_steps=-1: must be at least 1"
    assert "vocabulary of 512" in begin["tokenizer"] and "bytes of held-out text per token" in begin["tokenizer"]


@pytest.mark.slow
def test_time_and_memory_are_told_before_the_start_and_the_training_is_watched(seen):
    begin = seen["begin"]
    assert "memory" in begin["time"] and "600" in begin["time"]
    assert "pretrain" in begin["watched"] and "step" in begin["watched"]
    assert re.search(r"CPU [\d.]+ % of \d+ cores; memory", begin["machine"])


@pytest.mark.slow
def test_a_paused_training_goes_on_after_the_server_was_killed_and_a_second_seed_follows(seen):
    assert "paused" in seen["begin"]["paused"] and seen["after"]["again"].endswith("own/letters/text")
    assert "init_from=letters/tokenizer" in seen["after"]["command"]
    jobs = Queue(seen["root"] / "runs/queue.sqlite").jobs()
    assert [(job.script, job.state) for job in jobs] == [
        (script, "done") for script in ("train", "train", "train", "evaluate", "evaluate", "export")
    ]
    for name in ("letters", "letters-2"):
        manifest = json.loads((seen["root"] / "runs" / name / "pretrain/run.json").read_text())
        assert (manifest["status"], manifest["steps"]) == ("finished", 600)
        assert manifest["config"]["seed"] == (1 if name == "letters" else 2)


@pytest.mark.slow
def test_two_seeds_are_compared(seen):
    after = seen["after"]
    assert "letters/pretrain" in after["compared"] and "letters-2/pretrain" in after["compared"]
    assert after["verdict"].startswith("undecided") and "train more seeds" in after["verdict"]


@pytest.mark.slow
def test_both_are_evaluated_and_one_is_exported_from_the_page(seen):
    for name in ("letters", "letters-2"):
        assert read_scores(seen["root"] / "runs" / name / "pretrain")["bpb"] > 0
    assert "bpb" in seen["after"]["scores"] and "letters-2/pretrain" in seen["after"]["scores"]
    assert "Samples over time" in seen["after"]["run"]
    assert (seen["root"] / "exports/letters-pretrain-hf/model.safetensors").is_file()
    assert "letters-pretrain-hf" in seen["after"]["exported"]


@pytest.mark.slow
def test_the_page_gives_commands_that_its_programs_take(seen):
    lines = [shlex.split(line) for line in seen["after"]["commands"]]
    for line, script in zip(lines, ("serve", "evaluate", "export"), strict=True):
        words = [word for word in line if "=" in word]
        check_overrides(script, words)
        assert "run=letters" in words and f"paths.runs={seen['root'] / 'runs'}" in words


@pytest.mark.slow
def test_two_stages_answer_in_the_panel_and_the_chat_beside_it(seen):
    first, second = seen["after"]["answers"]
    assert "letters/pretrain" in first and "letters-2/pretrain" in second and "mean logprob" in first
    assert seen["chat"]["answer"].strip()


@pytest.mark.slow
def test_every_tab_is_usable_by_all(seen):
    """The faults are those that axe-core calls serious or critical, in four looks of every tab."""
    look = seen["look"]
    assert look["tabs"][:4] == ["Runs", "Compare", "Train", "Data"] and look["looks"] == 4 * len(look["tabs"])
    assert look["faults"] == [] and look["overflows"] == {}


@pytest.mark.slow
def test_no_process_is_left_behind(seen):
    def left() -> list[bytes]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                found.append(path.read_bytes())
            except OSError:  # it has ended
                continue
        return [line for line in found if str(seen["root"]).encode() in line]

    wait_until(lambda: not left())
