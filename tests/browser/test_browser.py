"""The chat in a real browser, driven by `chat.mjs`; `README.md` says how to install what it needs."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from processes import run
from serving_run import ServerProcess, make_run

from llm.checkpoint.examples import save_examples

HERE = Path(__file__).parent
SEQ_LEN = 4096  # room for a song of seconds, to be stopped
SLOWLY = {"FATHOM_KERNELS": "off"}  # torch takes these seconds
LOOKS = tuple(f"{width} {scheme}" for width in ("desktop", "phone") for scheme in ("light", "dark"))
SCREENSHOTS = ("1-start", "2-calculator", "3-markdown", "4-context", "6-hostile", "7-chats", "8-settings")
SCREENSHOTS += ("9-side-by-side", *(f"5-{look.replace(' ', '-')}" for look in LOOKS))
ANYTHING = "I am Fathom, a small language model. Ask me anything!"


def browser_or_skip() -> str:
    """Path of Chromium; where it or what drives it is missing, the test is skipped."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    missing = [
        *([] if chromium else ["chromium"]),
        *([] if shutil.which("node") else ["node"]),
        *([] if (HERE / "node_modules" / "playwright-core").is_dir() else ["playwright-core (make browser)"]),
    ]
    if missing:
        pytest.skip(f"no {', no '.join(missing)}: see tests/browser/README.md")
    return chromium


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict:
    """Record of what the browser saw in one session with the chat."""
    chromium = browser_or_skip()
    folder = tmp_path_factory.mktemp("browser")
    screenshots = Path(os.environ.get("FATHOM_SCREENSHOTS", folder))
    screenshots.mkdir(parents=True, exist_ok=True)
    save_examples(make_run(folder / "runs", seq_len=SEQ_LEN) / "model", ["Who are you?", "Greet me."])
    make_run(folder / "runs", stage="midtrain", seq_len=SEQ_LEN)
    with ServerProcess(folder / "runs", "temperature=0", f"max_new_tokens={SEQ_LEN}", env=SLOWLY) as server:
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
    assert seen["external"] == [] and seen["errors"] == []
    assert seen["overflows"] == dict.fromkeys(LOOKS, 0)


@pytest.mark.slow
def test_settings_are_folded_and_examples_come_first_by_the_keyboard(seen):
    assert seen["visibleSliders"] == 0 and seen["seed"]
    examples = ["Select example 1: Who are you?", "Select example 2: Greet me."]
    assert seen["tabOrder"][:6] == ["Toggle Sidebar", *examples, "Message", "Send", "Settings"]


@pytest.mark.slow
def test_an_empty_box_asks_nothing_and_a_message_that_is_too_long_stays(seen):
    assert seen["empty"] == {"toasts": 0, "value": ""}
    assert seen["tooLong"]["hint"] == "The message has 8,001 characters, 8,000 are possible."
    assert (seen["tooLong"]["length"], seen["tooLong"]["questions"]) == (8001, 0)


@pytest.mark.slow
def test_questions_are_answered_with_visible_calculator_calls(seen):
    assert seen["example"] == ANYTHING
    assert re.fullmatch(r"\d+ tokens, [\d,]+ per second", seen["speed"])
    assert seen["calls"] == ["12+7 = 19"]
    assert re.fullmatch(r"Ava has 12 \+ 7 = 12\+7 = 19\s*19 apples\.\n#### 19", seen["calculator"])
    assert seen["unicode"] == "Grüße! 你好 😀"
    assert seen["markdown"] == {"text": "one\ntwo\n\na*b*c and 2*3*4 <b>", "bullets": 2, "code": ["a*b*c"], "bold": 0}


@pytest.mark.slow
def test_what_was_typed_is_shown_copied_and_edited_to_the_letter(seen):
    """The record of requests to other servers, which another test looks at, is empty too."""
    hostile = seen["hostile"]
    assert hostile["images"] == 0
    assert hostile["text"] == hostile["copied"] == hostile["edited"] == hostile["asked"]
    assert seen["copied"] == "Ava has 12 + 7 = [12+7 = 19]19 apples.\n#### 19"


@pytest.mark.slow
def test_regenerate_takes_the_new_temperature_and_undo_gives_the_question_back(seen):
    assert seen["again"]["answer"] != seen["calculator"]
    assert (seen["again"]["questions"], seen["again"]["answers"]) == (1, 1)
    assert seen["undone"] == "Ava has 12 apples. She buys 7 more. How many?"


@pytest.mark.slow
def test_an_edited_question_is_answered_in_its_place_and_a_reload_keeps_the_chat(seen):
    assert seen["edited"] == seen["reloaded"] == {"questions": ["Who are you?"], "answer": ANYTHING}


@pytest.mark.slow
def test_a_chat_is_exported(seen):
    (thread,) = seen["exported"]["threads"]
    assert thread["model"] == "tiny/sft" and thread["messages"][0] == {"role": "user", "content": "Who are you?"}
    assert seen["exportedText"].startswith("# tiny/sft\n\nYou: Who are you?\n\ntiny/sft: I am Fathom")


@pytest.mark.slow
def test_answers_stream_and_stop(seen):
    assert seen["frames"] > 3
    assert seen["stopped"]["text"] == "la la la "
    assert seen["stopped"]["length"] == seen["stopped"]["later"] < SEQ_LEN - 100


@pytest.mark.slow
def test_a_full_context_is_a_note_said_once_and_no_crash(seen):
    assert any(note.startswith("Your message of 5,000 tokens is longer than") for note in seen["overflow"])
    assert len(seen["dropped"]) == 1 and f"the context of {SEQ_LEN:,} tokens" in seen["dropped"][0]


@pytest.mark.slow
def test_two_stages_answer_side_by_side(seen):
    both = seen["sideBySide"]
    assert both["heading"] == "tiny/sft and tiny/midtrain" and both["question"] == "Greet me."
    assert both["first"] == both["second"] == seen["unicode"]
