"""The chat in a real browser, driven by `chat.mjs`; `README.md` says how to install what it needs."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from processes import run
from serving_run import ServerProcess, make_run

HERE = Path(__file__).parent
SEQ_LEN = 2048  # room for a song of seconds, to be stopped
SCREENSHOTS = ("1-start", "2-calculator", "3-markdown", "4-context", "5-phone", "6-hostile")


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict:
    """Record of what the browser saw in one session with the chat."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    missing = [
        *([] if chromium else ["chromium"]),
        *([] if shutil.which("node") else ["node"]),
        *([] if (HERE / "node_modules" / "playwright-core").is_dir() else ["playwright-core (make browser)"]),
    ]
    if missing:
        pytest.skip(f"no {', no '.join(missing)}: see tests/browser/README.md")
    folder = tmp_path_factory.mktemp("browser")
    screenshots = Path(os.environ.get("FATHOM_SCREENSHOTS", folder))
    screenshots.mkdir(parents=True, exist_ok=True)
    make_run(folder / "runs", seq_len=SEQ_LEN)
    with ServerProcess(folder / "runs", "temperature=0", f"max_new_tokens={SEQ_LEN}") as server:
        done = run("node", str(HERE / "chat.mjs"), server.url, str(screenshots), chromium)
    assert server.process.returncode == 0 and server.output.endswith("server ended\n"), server.output
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert "failure" not in report, report["failure"]
    assert all((screenshots / f"{name}.png").stat().st_size > 5_000 for name in SCREENSHOTS)
    return report


@pytest.mark.slow
def test_the_page_says_what_it_serves_and_loads_nothing_from_outside(seen):
    assert "tiny/sft" in seen["title"] and seen["heading"] == "tiny/sft"
    assert seen["sliders"] == 3
    assert seen["external"] == [] and seen["errors"] == []
    assert seen["mobileOverflow"] == 0


@pytest.mark.slow
def test_questions_are_answered_with_visible_calculator_calls(seen):
    assert seen["example"] == "I am Fathom, a small language model. Ask me anything!"
    assert seen["calls"] == ["12+7 = 19"]
    assert re.fullmatch(r"Ava has 12 \+ 7 = 12\+7 = 19\s*19 apples\.\n#### 19", seen["calculator"])
    assert seen["unicode"] == "Grüße! 你好 😀"
    assert seen["markdown"] == {"text": "one\ntwo\n\na*b*c and 2*3*4 <b>", "bullets": 2, "code": ["a*b*c"], "bold": 0}


@pytest.mark.slow
def test_images_and_html_appear_as_they_were_written(seen):
    """The record of requests to other servers, which another test looks at, is empty too."""
    assert seen["hostile"]["images"] == 0
    assert "![a](http://evil.example/a.png) <img src=http://evil.example/b.png>" in seen["hostile"]["text"]
    assert "<img src=http://evil.example/c.png>" in seen["hostile"]["text"].split("\n", 1)[1]


@pytest.mark.slow
def test_regenerate_takes_the_new_temperature_and_undo_gives_the_question_back(seen):
    assert seen["again"]["answer"] != seen["calculator"]
    assert (seen["again"]["questions"], seen["again"]["answers"]) == (1, 1)
    assert seen["undone"] == "Ava has 12 apples. She buys 7 more. How many?"


@pytest.mark.slow
def test_answers_stream_and_stop(seen):
    assert seen["frames"] > 3
    assert seen["stopped"]["text"] == "la la la "
    assert seen["stopped"]["length"] == seen["stopped"]["later"] < SEQ_LEN - 100


@pytest.mark.slow
def test_a_full_context_is_a_note_and_no_crash(seen):
    assert seen["overflow"][0].startswith("Your message of 5,000 tokens is longer than the model can read")
    assert re.fullmatch(rf"The oldest \d messages no longer fit the context of {SEQ_LEN:,} tokens .*", seen["dropped"])
