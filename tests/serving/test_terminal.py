"""The chat in the terminal: commands, several lines, pipes, Ctrl-C; as functions and as a process at a terminal."""

import codecs
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from processes import HANG
from scripted_engine import TOKENIZER, ScriptedEngine, scripted_model, user
from serving_run import make_run, start_process

from llm.errors import UserError
from llm.inference.sampling import SamplingParams
from llm.serving import terminal
from llm.serving.chat import Reply, stream_reply
from llm.serving.commands import COMMANDS, HELP, NUMBERS, Session
from llm.serving.interrupts import CtrlC
from llm.serving.saved_chat import Chat, Thread
from llm.tokenizer.chat_format import render_conversation, render_prompt

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=200)
APPLES = "Ava has 12 apples. She buys 7 more. How many?"


class ThreeModels:
    """Models by name that each say their name."""

    first = "run/sft"

    def names(self):
        return ["run/sft", "run/pretrain", "other/sft"]

    def get(self, name):
        if name not in self.names():
            raise UserError(f"there is no model {name!r} here")
        return scripted_model(f"I am {name}", name)


@pytest.fixture
def session():
    """A session, whose reports are gathered in `said`."""
    said = []
    session = Session(ThreeModels(), Chat([Thread("run/sft")]), GREEDY, said.append)
    session.said = said
    return session


def answer(session, *lines: str) -> str:
    """Text of the answer after these lines; "" where the last one asks nothing."""
    for line in lines:
        reply = Reply()
        if wanted := session.take(line):
            for _ in session.model.answer(session.chat.prompt(), session.params, reply):
                pass
            session.answered(reply)
    return terminal.plain_text(reply) if wanted else ""


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def test_every_command_has_a_line_of_help():
    for name in [*COMMANDS, *NUMBERS]:
        assert f"/{name}" in HELP


def test_numbers_change_the_sampling(session):
    for line in ("/temp 0.7", "/topk 5", "/topp 0.9", "/max 12", "/seed 3"):
        assert answer(session, line) == ""
    params = session.params
    assert (params.temperature, params.top_k, params.top_p, params.max_new_tokens, params.seed) == (0.7, 5, 0.9, 12, 3)
    answer(session, "/temperature 0.1", "/top_k 0")
    assert (session.params.temperature, session.params.top_k) == (0.1, 0)
    for wrong, message in (
        *(("/temp", "/temp needs a number, as in /temp 0.1"), ("/topk many", "/topk needs a number")),
        *(("/topk 1.5", "/topk needs a number"), ("/temp -1", "temperature=-1.0"), ("/topp 0", "top_p=0.0")),
        *(("/max 0", "max_new_tokens=0"), ("/temp nan", "temperature=nan")),
    ):
        with pytest.raises(UserError, match=message):
            session.take(wrong)
    assert session.params.temperature == 0.1


@pytest.mark.parametrize(
    ("wrong", "hint"), [("/stagr sft", "mean /stage"), ("/foo", "no command /foo. /help"), ("/", "no command /")]
)
def test_unknown_commands_are_said_so(session, wrong, hint):
    with pytest.raises(UserError, match=hint):
        session.take(wrong)
    assert session.messages == []


def test_two_slashes_begin_a_message_with_one(session):
    answer(session, "//temp is a command")
    assert session.messages[0] == user("/temp is a command")


def test_answers_can_be_repeated_and_questions_taken_back(session):
    for wrong in ("/again", "/undo"):
        with pytest.raises(UserError, match="there is no"):
            session.take(wrong)
    answer(session, "one", "two")
    assert answer(session, "/again") == "I am run/sft" and len(session.messages) == 4
    assert session.params.seed == GREEDY.seed + 3  # or the answer would be the same
    answer(session, "/undo")
    assert [m["content"] for m in session.messages[::2]] == ["one"] and session.said[-1] == "taken back: two"
    answer(session, "/clear")
    assert session.messages == []


def test_a_system_message_stands_before_the_first_question(session):
    answer(session, "/system Be brief.", "one")
    head = {"role": "system", "content": "Be brief."}
    assert session.model.engine.prompt == render_prompt(TOKENIZER, [head, user("one")])
    answer(session, "/system")
    assert session.said[-1] == "system: Be brief."
    answer(session, "/system off")
    assert session.said[-1] == "there is no system message" and session.chat.prompt()[0]["role"] == "user"


def test_the_conversation_goes_on_with_another_model(session):
    answer(session, "one", "/stage pretrain")
    assert answer(session, "two") == "I am run/pretrain" and len(session.messages) == 4
    assert answer(session, "/stage other/sft", "three") == "I am other/sft"
    answer(session, "/stage")
    assert session.said[-1].splitlines() == ["  run/sft", "  run/pretrain", "* other/sft"]
    with pytest.raises(UserError, match="no model 'other/grpo'"):
        session.take("/stage grpo")
    assert session.model.name == "other/sft"


def test_a_chat_is_saved_and_read_again(session, tmp_path):
    answer(session, "/system Be brief.", "Grüße", f"/save {tmp_path}/chat.json", "two", f"/save {tmp_path}/chat.json")
    saved = list(session.messages)
    answer(session, "/clear", "/system off", f"/load {tmp_path}/chat.json")
    assert session.messages == saved and session.chat.system == "Be brief."
    (tmp_path / "notes.txt").write_text("mine")
    for wrong, message in (
        (f"/save {tmp_path}/notes.txt", "holds no chat"),
        (f"/load {tmp_path}/notes.txt", "notes.txt"),
        (f"/load {tmp_path}/none.json", "no such file"),
        ("/save", "/save needs a file"),
        ("/load", "/load needs a file"),
    ):
        with pytest.raises(UserError, match=message):
            session.take(wrong)
    assert (tmp_path / "notes.txt").read_text() == "mine" and session.messages == saved


def test_a_question_without_an_answer_is_left_out_of_a_chat_that_is_read(session, tmp_path):
    (tmp_path / "chat.json").write_text(json.dumps(no_chat()))
    answer(session, f"/load {tmp_path}/chat.json", "one")
    assert "a question without an answer at the end: x" in session.said[-2]
    assert [message["role"] for message in session.messages] == ["user", "assistant"]


def no_chat(**change) -> dict:
    chat = {"system": "", "threads": [{"model": "a/b", "messages": [user("x")]}]}
    return chat | change


@pytest.mark.parametrize(
    "content",
    [
        {},
        no_chat(threads=[]),
        no_chat(system=None),
        no_chat(threads=[{"model": "a/b", "messages": [{"role": "tool", "content": "x"}]}]),
        no_chat(threads=[{"model": "a/b", "messages": [user("x"), user("y")]}]),
        no_chat(threads=[{"model": "a/b", "messages": [{"role": "user", "content": 3}]}]),
        no_chat(
            threads=[{"model": "a/b", "messages": [{"role": "user", "content": [{"type": "python", "text": ""}]}]}]
        ),
        no_chat(threads=[{"model": "a/b", "messages": [user("x")] * 501}]),
        no_chat(threads=[{"model": 1, "messages": []}] * 3),
    ],
)
def test_what_is_no_chat_is_not_read(session, tmp_path, content):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="chat.json"):
        session.take(f"/load {path}")
    assert session.messages == []


# ---------------------------------------------------------------------------------------------------------------------
# Answers, Ctrl-C


def reply_ids(content) -> list[int]:
    """Ids of an assistant turn with this content, as a model would produce them."""
    ids, _ = render_conversation(TOKENIZER, {"messages": [user("x"), {"role": "assistant", "content": content}]})
    return ids[len(render_prompt(TOKENIZER, [user("x")])) : -1]


def test_terminal_text_only_grows_at_its_end():
    content = [
        {"type": "text", "text": "a "},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
        {"type": "python", "text": "1/0"},
        {"type": "text", "text": " b "},
        {"type": "python_output", "text": "5"},
        {"type": "python", "text": "2*2"},
    ]
    engine, shown = ScriptedEngine(reply_ids(content)), ""
    for reply in stream_reply(engine, [user("x")], GREEDY):
        text = terminal.plain_text(reply)
        assert text.startswith(shown)
        shown = text
    assert shown == "a [1+1 = 2][1/0] b [5][2*2]"


@pytest.mark.parametrize("on_screen", [True, False])
def test_an_answer_does_nothing_to_the_terminal(capsys, monkeypatch, on_screen):
    """Show control signs on a screen; a pipe gets them as they are."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: on_screen, raising=False)
    terminal.print_reply(scripted_model("a\x1b[2J\u202eb"), [user("x")], GREEDY, Reply())
    assert capsys.readouterr().out == ("a\\x1b[2J\\u202eb\n" if on_screen else "a\x1b[2J\u202eb\n")


@pytest.mark.parametrize("patient", [True, False])
def test_ctrl_c_raises_at_the_prompt_only_unless_nobody_waits(patient):
    before = signal.getsignal(signal.SIGINT)
    with CtrlC(patient) as ctrl_c:
        if patient:
            signal.raise_signal(signal.SIGINT)
            assert ctrl_c.heeded() and not ctrl_c.heeded()
        with ctrl_c.at_the_prompt(), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        if patient:
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):  # the first one where nobody is patient, else the second unheeded one
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# ---------------------------------------------------------------------------------------------------------------------
# As a process


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A runs folder with a tiny finished run."""
    root = tmp_path_factory.mktemp("runs")
    make_run(root)
    return root


def test_a_pipe_holds_answers_only(runs):
    lines = ["Who are you?", "", "/clear", '"""', "Greet", '"""', "/clear", "Greet \\", "me.", "/clear", "Greet me."]
    process = start_process(
        f"paths.runs={runs}", "ui=cli", "temperature=0", stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = process.communicate("\n".join(lines), timeout=HANG)
    answers = out.splitlines()
    assert answers[0] == "I am Fathom, a small language model. Ask me **anything**!" and answers[-1] == "Grüße! 你好 😀"
    assert len(answers) == 4 and process.returncode == 0
    assert err.splitlines() == ["forgotten"] * 3

    process = start_process(f"paths.runs={runs}", "ui=cli", stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate("/stagr\nWho are you?", timeout=HANG)
    assert (out, process.returncode) == ("", 2) and err.startswith("error: there is no command /stagr")


class AtTerminal:
    """The chat as a process at a terminal of its own; `seen` is what the screen has shown."""

    def __init__(self, runs, state, *args: str):
        self._own, its = pty.openpty()
        environment = {"XDG_STATE_HOME": str(state), "TERM": "dumb", "INPUTRC": os.devnull}
        command = (f"paths.runs={runs}", "run=tiny", "ui=cli", "temperature=0", *args)
        self.process = start_process(*command, env=environment, stdin=its, stdout=its, stderr=its)
        os.close(its)
        self._decoder, self.seen = codecs.getincrementaldecoder("utf-8")(errors="replace"), ""
        self._watchdog = threading.Timer(HANG, self.process.kill)  # then reading ends and the test fails
        self._watchdog.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._watchdog.cancel()
        self.process.kill()
        os.close(self._own)

    def until(self, pattern: str, is_interrupted: bool = False) -> str:
        """Wait until the screen shows something new that `pattern` finds; return what is new.

        is_interrupted: Ctrl-C is pressed, and again every other second, because Python sees a signal between the
        writing of a prompt and the wait for keys with the next one only.
        """
        if is_interrupted:
            self.process.send_signal(signal.SIGINT)
        while not re.search(pattern, self.seen):
            if not select.select([self._own], [], [], 2)[0]:
                if is_interrupted:
                    self.process.send_signal(signal.SIGINT)
                continue
            try:
                chunk = os.read(self._own, 4096)
            except OSError:  # the process has ended
                chunk = b""
            assert chunk, f"waited in vain for {pattern!r}: {self.seen}"
            self.seen += self._decoder.decode(chunk).replace("\r", "")
        seen, self.seen = self.seen, ""
        return seen

    def say(self, text: str, pattern: str = r"\n> $") -> str:
        """Type a line, and wait for an answer."""
        os.write(self._own, f"{text}\n".encode())
        return self.until(pattern)


def test_the_chat_at_a_terminal(runs, tmp_path):
    with AtTerminal(runs, tmp_path) as chat:
        assert "tiny/sft: 2 layers" in chat.until(r"\n> $")
        assert "[12+7 = 19]19 apples.\n#### 19\n" in chat.say(APPLES)
        assert "forgotten" in chat.say("/clear")
        assert "Grüße! 你好 😀\n" in chat.say("Greet me.")
        assert "Привет 👋\n" in chat.say("Again.")  # it remembers the turn before
        assert "there is no command /bye" in chat.say("/bye")
        chat.say("/clear")
        chat.say("Sing.", "la la la ")
        chat.process.send_signal(signal.SIGINT)
        assert "(stopped)" in chat.until(r"\n> $")
        assert "/quit or Ctrl-D" in chat.until(r"\n> $", is_interrupted=True)
        chat.say("/clear")
        assert "I am Fathom" in chat.say("Who are you?")
        chat.say("/quit", "")
        assert chat.process.wait(timeout=HANG) == 0
    kept = (tmp_path / "fathom" / "chat_history").read_text()
    assert "Greet me." in kept and "/bye" in kept
    with AtTerminal(runs, tmp_path) as chat:
        chat.until(r"\n> $")
        chat.say("\x10", "/quit")  # Ctrl-P: the last line of the last chat
        assert chat.process.wait(timeout=HANG) == 0


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_ctrl_c_before_the_first_prompt_breaks_nothing(runs, tmp_path):
    with AtTerminal(runs, tmp_path) as chat:
        maps = Path(f"/proc/{chat.process.pid}/maps")
        while "libtorch" not in maps.read_text():
            assert chat.process.poll() is None
            time.sleep(0.01)
        chat.process.send_signal(signal.SIGINT)  # while torch and the model are loaded
        shown = chat.until(r"\n> $")
        assert "Traceback" not in shown and "tiny/sft" in shown
        assert "I am Fathom" in chat.say("Who are you?")
        os.write(chat._own, b"\x04")
        assert chat.process.wait(timeout=HANG) == 0
