"""Serving: replies and their limits, the terminal chat, the browser chat's server and serve.py as real processes."""

import codecs
import itertools
import random
import re
import signal
import socket
import subprocess
import threading
from types import SimpleNamespace

import pytest
import torch
from processes import HANG
from serving_run import make_run, start_process

from llm.errors import UserError
from llm.inference.engine import Engine, TokenEvent
from llm.inference.sampling import SamplingParams
from llm.serving import app, terminal
from llm.serving.chat import ChatModel, Reply, fit_prompt, load_chat_model, stream_reply
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.chat_format import render_conversation, render_prompt

TOKENIZER = Tokenizer([bytes([b]) for b in range(256)])
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=200)
APPLES = "Ava has 12 apples. She buys 7 more. How many?"


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(content) -> dict:
    return {"role": "assistant", "content": content}


class ScriptedEngine:
    """Streams given token ids and records the prompt, and whether the stream was closed."""

    def __init__(self, ids: list[int], seq_len: int = 400, finish_reason: str = "stop"):
        self.ids, self.finish_reason, self.closed = ids, finish_reason, False
        self.tokenizer, self.net = TOKENIZER, SimpleNamespace(config=SimpleNamespace(seq_len=seq_len))

    def stream(self, prompts, params):
        (self.prompt,), self.params = prompts, params
        return self

    def __enter__(self):
        self.finish_reasons = [None]
        return self

    def __exit__(self, *exc):
        self.closed = True

    def __iter__(self):
        for token in self.ids:
            yield [TokenEvent(0, token, False)]
        self.finish_reasons = [self.finish_reason]


def reply_ids(content) -> list[int]:
    """Ids of an assistant turn with this content, as a model would produce them."""
    ids, mask = render_conversation(TOKENIZER, {"messages": [user("x"), assistant(content)]})
    return ids[len(render_prompt(TOKENIZER, [user("x")])) : -1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A runs folder with a tiny finished run."""
    root = tmp_path_factory.mktemp("runs")
    make_run(root)
    return root


# ---------------------------------------------------------------------------------------------------------------------
# Replies


def test_streamed_text_never_shows_half_a_character():
    text = "Grüße! 你好 😀 é"
    engine = ScriptedEngine(TOKENIZER.encode(text))
    shown = ["".join(p["text"] for p in reply.content) for reply in stream_reply(engine, [user("x")], GREEDY)]
    assert shown[-1] == text and len(set(shown)) == len(text) + 1
    assert all(text.startswith(part) for part in shown)


def test_invalid_and_unfinished_bytes_are_replaced_as_in_decode():
    for raw in (b"a\xff\xe4b", b"end \xf0\x9f\x98"):
        reply = Reply()
        for _ in stream_reply(ScriptedEngine(list(raw)), [user("x")], GREEDY, reply):
            pass
        assert reply.content == [{"type": "text", "text": TOKENIZER.decode(list(raw))}]


@pytest.mark.parametrize(
    "content",
    [
        [
            {"type": "text", "text": "12 + 7 = "},
            {"type": "python", "text": "12+7"},
            {"type": "python_output", "text": "19"},
            {"type": "text", "text": "19.\n#### 19"},
        ],
        [{"type": "python", "text": "1/0"}, {"type": "text", "text": "oh"}, {"type": "python", "text": ""}],
        [{"type": "text", "text": "plain"}],
    ],
)
def test_a_reply_has_the_parts_that_render_to_its_tokens(content):
    engine, reply = ScriptedEngine(reply_ids(content)), Reply()
    for _ in stream_reply(engine, [user("x")], GREEDY, reply):
        pass
    assert reply.content == content and reply.done and reply.notes == [] and engine.closed
    assert reply_ids(reply.content) == engine.ids


def test_special_tokens_of_turns_do_not_show():
    ids = [*b"a", TOKENIZER.special_id("user_start"), *b"b"]
    *_, reply = stream_reply(ScriptedEngine(ids), [user("x")], GREEDY)
    assert reply.content == [{"type": "text", "text": "ab"}]


def test_closing_the_replies_stops_the_engine():
    engine = ScriptedEngine(list(b"a long answer"))
    replies = stream_reply(engine, [user("x")], GREEDY)
    next(replies), next(replies)
    assert not engine.closed
    replies.close()
    assert engine.closed


@pytest.mark.parametrize("messages", [[], [{"role": "system", "content": "Be brief."}], [assistant("Hello!")]])
def test_a_conversation_without_a_users_message_is_an_error(messages):
    engine = ScriptedEngine(list(b"never"))
    with pytest.raises(UserError, match="without a user's message"):
        next(stream_reply(engine, messages, GREEDY))


def test_notes_say_why_an_answer_ends_early():
    engine = ScriptedEngine(list(b"abc"), finish_reason="length")
    *_, reply = stream_reply(engine, [user("x")], SamplingParams(max_new_tokens=3))
    assert reply.notes == ["The answer stops here: it reached max_new_tokens, 3."]
    *_, reply = stream_reply(engine, [user("x")], SamplingParams(max_new_tokens=5000))
    assert reply.notes == ["The answer stops here: the model's context of 400 tokens is full."]


# ---------------------------------------------------------------------------------------------------------------------
# Conversations that outgrow the context


def turns(n: int, size: int = 20) -> list[dict]:
    pairs = [(user(f"{i:03}" + "q" * (size - 3)), assistant("a" * size)) for i in range(n)]
    return [message for pair in pairs for message in pair][:-1]


def test_a_conversation_that_fits_is_kept_whole():
    messages = turns(3)
    assert fit_prompt(TOKENIZER, messages, 400, 100) == (render_prompt(TOKENIZER, messages), [])


def test_the_oldest_turns_go_first_and_the_system_message_stays():
    system, messages = {"role": "system", "content": "Be brief."}, turns(10)
    for n_system, head in ((0, []), (1, [system])):
        prompt, (note,) = fit_prompt(TOKENIZER, [*head, *messages], 200, 1000)
        assert len(prompt) <= 150  # a quarter of the context is left for the answer
        kept = next(k for k in range(0, 19, 2) if prompt == render_prompt(TOKENIZER, [*head, *messages[k:]]))
        assert len(render_prompt(TOKENIZER, [*head, *messages[kept - 2 :]])) > 150  # no more would have fitted
        assert note == f"The oldest {kept} messages no longer fit the context of 200 tokens and were left out."
        assert (b"Be brief." in TOKENIZER.decode_bytes(prompt)) == bool(n_system)


def test_a_short_answer_leaves_more_room_for_the_conversation():
    messages = turns(10)
    assert len(fit_prompt(TOKENIZER, messages, 200, 10)[0]) > len(fit_prompt(TOKENIZER, messages, 200, 100)[0])


@pytest.mark.parametrize("text", ["word " * 200, "ü" * 300, "x" + "😀" * 99])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_an_over_long_message_keeps_its_end(text, system):
    prompt, (note,) = fit_prompt(TOKENIZER, [*system, *turns(2), assistant("ok"), user(text)][-3:], 100, 50)
    assert 70 < len(prompt) <= 75
    assert prompt[0] == TOKENIZER.bos_id and prompt[-1] == TOKENIZER.special_id("assistant_start")
    kept = TOKENIZER.decode(prompt[2:-2])
    assert text.endswith(kept) and "\ufffd" not in kept
    assert note.startswith(f"Your message of {len(text.encode())} tokens") or "," in note


def test_a_system_message_longer_than_the_context_is_left_out():
    system = {"role": "system", "content": "s" * 500}
    prompt, notes = fit_prompt(TOKENIZER, [system, user("hello " * 40)], 100, 50)
    assert len(prompt) <= 75 and notes and TOKENIZER.decode(prompt[2:-2]).endswith("hello ")


def test_no_conversation_crashes_the_engine(runs):
    engine = load_chat_model(runs / "tiny" / "sft").engine
    rng = random.Random(0)
    for length in (1, 570, 571, 572, 573, 767, 768, 769, 3000):
        text = "".join(rng.choice("aü😀 ") for _ in range(length))
        *_, reply = stream_reply(engine, [user(text)], SamplingParams(max_new_tokens=5))
        assert reply.done


# ---------------------------------------------------------------------------------------------------------------------
# Terminal


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


def test_prompt_is_answered_once(runs, capsys):
    def config(**values):
        keys = {"run": None, "stage": None, "ui": "gradio", "prompt": None, "host": "127.0.0.1", "port": 0, "seed": 1}
        sampling = {"temperature": 0.0, "top_k": 50, "max_new_tokens": 100}
        return SimpleNamespace(paths=SimpleNamespace(runs=str(runs)), **{**keys, **sampling, **values})

    app.serve(config(prompt=APPLES))  # the only run and its best stage are the default
    assert capsys.readouterr().out == "Ava has 12 + 7 = [12+7 = 19]19 apples.\n#### 19\n"
    app.serve(config(run="tiny", stage="sft", prompt="Greet me.", max_new_tokens=5))
    captured = capsys.readouterr()
    assert captured.out == "Grü�\n" and captured.err == "(The answer stops here: it reached max_new_tokens, 5.)\n"
    app.serve(config(prompt="Greet me.", temperature=2.0, top_k=0, seed=5, max_new_tokens=20))
    app.serve(config(prompt="Greet me.", temperature=2.0, top_k=0, seed=5, max_new_tokens=20))
    app.serve(config(prompt="Greet me.", temperature=2.0, top_k=0, seed=6, max_new_tokens=20))
    captured = capsys.readouterr().out
    half = re.match(r"(.*)\1", captured, re.DOTALL)[1]
    assert half and captured != half * 3

    for wrong, message in (
        ({"prompt": "  "}, "prompt= is empty"),
        ({"run": "none", "prompt": "x"}, "run=none"),
        ({"stage": "grpo", "prompt": "x"}, "stage=grpo"),
        ({"temperature": -1.0, "prompt": "x"}, "temperature=-1.0"),
    ):
        with pytest.raises(UserError, match=message):
            app.serve(config(**wrong))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port={port}: cannot listen there"):
            app.serve(config(port=port))


def test_a_base_model_is_announced(runs, tmp_path):
    stage = tmp_path / "tiny" / "pretrain"
    stage.mkdir(parents=True)
    (stage / "model").symlink_to(runs / "tiny" / "sft" / "model", target_is_directory=True)
    model = load_chat_model(stage)
    assert model.name == "tiny/pretrain" and "base model" in model.notes[0]
    assert load_chat_model(runs / "tiny" / "sft").notes == ()


def read_until(process, pattern: str, seen: str = "") -> str:
    decoder = codecs.getincrementaldecoder("utf-8")()
    while not re.search(pattern, seen):
        chunk = process.stdout.buffer.read1(4096)
        assert chunk, f"waited in vain for {pattern!r}: {seen}"
        seen += decoder.decode(chunk)
    return seen


def test_terminal_chat_as_a_process(runs):
    process = start_process(f"paths.runs={runs}", "run=tiny", "ui=cli", "temperature=0", stdin=subprocess.PIPE)
    watchdog = threading.Timer(HANG, process.kill)  # then reading ends and the test fails
    watchdog.start()
    try:

        def say(line: str, pattern: str) -> str:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            return read_until(process, pattern)

        assert "tiny/sft: 2 layers" in read_until(process, r"\n> $")
        assert "[12+7 = 19]19 apples.\n#### 19\n" in say(APPLES, r"\n> $")
        assert "forgotten" in say("/clear", r"\n> $")
        assert "Grüße! 你好 😀\n" in say("Greet me.", r"\n> $")
        assert "Grüße! 你好 😀\n" in say("/again", r"\n> $")
        assert "Привет 👋\n" in say("Again.", r"\n> $")  # it remembers the turn before
        assert "temperature = 0.5" in say("/temperature 0.5", r"\n> $")
        assert "temperature=-1.0 must be" in say("/temperature -1", r"\n> $")
        assert "needs a number" in say("/top_k many", r"\n> $")
        assert "/quit" in say("/help", r"\n> $")
        say("/temperature 0", r"\n> $")
        say("/clear", r"\n> $")
        say("Sing.", "la la la ")
        process.send_signal(signal.SIGINT)
        assert "(stopped)" in read_until(process, r"\n> $")
        assert "I am Fathom" in say("/clear\nWho are you?", r"anything[^>]*> $")
        process.stdin.close()
        assert process.wait(timeout=HANG) == 0
    finally:
        watchdog.cancel()
        process.kill()


# ---------------------------------------------------------------------------------------------------------------------
# Browser


def test_browser_rendering():
    from llm.serving.browser import markdown

    assert markdown("**bold**, 2*3*4 and 5 * 6") == r"**bold**, 2\*3\*4 and 5 * 6"
    assert markdown("<b>x</b> `i` a\\b") == r"\<b>x\</b> `i` a\\b"
    assert markdown("so\n#### 12\n# Title\n#### Title") == "so\n\\#### 12\n# Title\n#### Title"
    assert markdown("a\n```py\n<a*b*c>\n#### 1\n```\n<") == "a\n\n```py\n<a*b*c>\n#### 1\n```\n\n\\<"
    assert markdown("  ~~~\n  x\n `````\n ~~~~ \n") == "\n\n``````\nx\n`````\n``````\n\n"
    assert markdown("`<b>` `_a|b_`") == "<code>&#60;b&#62;</code> <code>&#95;a&#124;b&#95;</code>"
    call = [{"type": "python", "text": "2*3"}, {"type": "python_output", "text": "6"}, {"type": "text", "text": "6"}]
    assert markdown(call) == '<span class="tool" title="calculator">2&#42;3 &#61; 6</span>6'
    assert markdown(call[:1]) == '<span class="tool" title="calculator">2&#42;3</span>'
    assert markdown("a", ["<note>"]) == 'a\n\n<span class="note">&#60;note&#62;</span>'


def test_browser_conversation_steps(runs):
    import gradio as gr

    from llm.serving import browser

    model = load_chat_model(runs / "tiny" / "sft")
    handlers = browser._Handlers(model, GREEDY)
    emptied, messages, shown = handlers.ask(APPLES, [])
    assert emptied == "" and messages == [user(APPLES)] and shown == [user(APPLES)]
    *_, (answered, shown) = handlers.answer(messages, 0.0, 50, 100)
    assert [part["type"] for part in answered[1]["content"]] == ["text", "python", "python_output", "text"]
    assert ">12&#43;7 &#61; 19</span>19 apples.\n\\#### 19" in shown[1]["content"]
    assert list(handlers.answer(answered, 0.0, 50, 100)) == []  # nothing is asked

    hot = [next(reversed(list(handlers.answer(messages, 2.0, 0, 40))))[1] for _ in range(2)]
    assert hot[0] != hot[1]  # another answer each time
    assert handlers.again(answered) == (messages, [user(APPLES)])
    assert handlers.undo(answered) == (APPLES, [], [])
    assert handlers.undo([]) == ("", [], [])
    asked_while_waiting = handlers.ask("Greet me.", messages)
    assert asked_while_waiting[1] == [user("Greet me.")]  # the unanswered question makes room
    for question, history in (("  ", []), ("x" * (browser.MAX_MESSAGE + 1), []), ("x", [user("x")] * 600)):
        with pytest.raises(gr.Error):
            handlers.ask(question, history)


def test_stopping_in_the_browser_closes_the_engine(runs, monkeypatch):
    from llm.serving import browser

    engine = ScriptedEngine(list(b"a long answer"))
    monkeypatch.setattr(browser, "FRAME_SECONDS", 0.0)
    handlers = browser._Handlers(ChatModel(engine, "a/b", ""), GREEDY)
    answer = handlers.answer([user("x")], 0.0, 0, 10)
    next(answer), next(answer)
    assert not engine.closed
    answer.close()
    assert engine.closed


@pytest.mark.filterwarnings("ignore")  # from inside gradio
def test_browser_chat_over_http(runs):
    from gradio_client import Client

    from llm.serving import browser

    demo = browser.build(load_chat_model(runs / "tiny" / "sft"), GREEDY)
    port = app.usable_port("127.0.0.1", 0)
    browser.launch(demo, "127.0.0.1", port)
    clients = [Client(f"http://127.0.0.1:{port}", verbose=False) for _ in range(2)]
    try:
        frames = []
        for client, question in zip(clients, ("Who are you?", "Sing."), strict=True):
            _, shown = client.submit(question, api_name="/ask").result(timeout=HANG)
            assert [message["role"] for message in shown] == ["user"]  # a conversation for each visitor
            job = client.submit(0.0, 50, 300, api_name="/answer")
            job.result(timeout=HANG)
            frames.append(["".join(p["text"] for p in shown[-1]["content"]) for shown in job.outputs()])
        assert frames[0][-1] == "I am Fathom, a small language model. Ask me **anything**!"
        assert len(frames[1]) > 1 and all(b.startswith(a) for a, b in itertools.pairwise(frames[1]))
        assert frames[1][-2].startswith("la la la ")
    finally:
        for client in clients:
            client.close()
        demo.close(verbose=False)


def test_threads_of_the_server_leave_gradients_on(runs):
    engine: Engine = load_chat_model(runs / "tiny" / "sft").engine
    next(stream_reply(engine, [user("x")], GREEDY))
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
