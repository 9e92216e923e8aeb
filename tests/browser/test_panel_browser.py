"""The whole way of a newcomer in the panel, in a real browser driven by `panel.mjs`: from own text to an answer."""

import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest
from processes import HANG, REPO, run, start, wait_until
from test_browser import HERE, browser_or_skip

from llm.experiments.queue_store import Queue


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
    """Record of what the browser saw, by part, and of the commands that the page gave for what comes after."""
    chromium, root = browser_or_skip(), tmp_path_factory.mktemp("panel")
    if not (HERE / "node_modules" / "axe-core").is_dir():
        pytest.skip("no axe-core (make browser): see tests/browser/README.md")
    screenshots = Path(os.environ.get("FATHOM_SCREENSHOTS", root))
    screenshots.mkdir(parents=True, exist_ok=True)
    (root / "text.txt").write_text(text())
    report = {}

    def drive(part: str, url: str) -> None:
        words = [url, str(screenshots), chromium, part, str(root / "text.txt")]
        done = run("node", str(HERE / "panel.mjs"), *words)
        assert done.returncode == 0, done.stderr
        report[part] = json.loads(done.stdout)
        assert "failure" not in report[part], report[part]["failure"]

    panel = Panel(root)
    drive("begin", f"{panel.url}/panel/")
    panel.end(signal.SIGKILL)
    panel = Panel(root)
    drive("resume", f"{panel.url}/panel/")
    drive("look", f"{panel.url}/panel/")
    panel.end()
    report["ran"] = {}
    for line in report["resume"]["commands"]:
        words = shlex.split(line)
        assert words[0] == "python", line
        if words[1] != "serve.py":
            done = run(sys.executable, *words[1:])
            report["ran"][words[1] if words[1] != "-m" else words[2]] = (done.returncode, done.stdout + done.stderr)
    panel = Panel(root, "run=letters", "stage=pretrain", "max_new_tokens=20", "temperature=0")
    drive("chat", f"{panel.url}/")
    panel.end()
    report["root"] = root
    return report


@pytest.mark.slow
def test_nothing_comes_from_outside_and_the_console_has_no_errors(seen):
    for part in ("begin", "resume", "look", "chat"):
        assert seen[part]["external"] == [] and seen[part]["errors"] == [], part


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
def test_a_paused_training_goes_on_after_the_server_was_killed(seen):
    assert "paused" in seen["begin"]["paused"] and seen["resume"]["again"].endswith("own/letters/text")
    jobs = Queue(seen["root"] / "runs/queue.sqlite").jobs()
    assert [job.state for job in jobs] == ["done"] * 3
    for name in ("letters", "letters-2"):
        manifest = json.loads((seen["root"] / "runs" / name / "pretrain/run.json").read_text())
        assert (manifest["status"], manifest["steps"]) == ("finished", 600)
        assert manifest["config"]["seed"] == (1 if name == "letters" else 2)


@pytest.mark.slow
def test_two_seeds_are_compared(seen):
    resume = seen["resume"]
    assert "letters/pretrain" in resume["compared"] and "letters-2/pretrain" in resume["compared"]
    assert "bpb" in resume["verdict"]


@pytest.mark.slow
def test_the_commands_of_the_page_evaluate_and_export_and_the_chat_answers(seen):
    assert sorted(seen["ran"]) == ["evaluate.py", "llm.export"]
    assert all(status == 0 for status, _ in seen["ran"].values()), seen["ran"]
    assert json.loads((seen["root"] / "runs/letters/pretrain/eval.json").read_text())
    assert list((seen["root"]).rglob("letters-pretrain-hf/model.safetensors"))
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
