"""Serving: replies and their limits, the terminal chat, the browser chat's server and serve.py as real processes."""

import random
import re
import socket
from dataclasses import asdict
from types import SimpleNamespace
from unittest.mock import AsyncMock

import pytest
import torch
from scripted_engine import TOKENIZER, ScriptedEngine, assistant, user
from serving_run import make_run

from llm.errors import UserError
from llm.inference.engine import Engine
from llm.inference.sampling import SamplingParams
from llm.model import decode_cpu
from llm.serving import app, worker
from llm.serving.chat import LEFT_OUT, Reply, fit_prompt, load_chat_model, stream_reply
from llm.tokenizer.chat_format import render_conversation, render_prompt

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=200)
APPLES = "Ava has 12 apples. She buys 7 more. How many?"


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
        assert note == LEFT_OUT.format(200)
        assert (b"Be brief." in TOKENIZER.decode_bytes(prompt)) == bool(n_system)


def test_that_old_messages_are_left_out_is_said_once():
    engine, messages, notes = ScriptedEngine(TOKENIZER.encode("ok"), seq_len=200), turns(10), []
    for _ in range(3):
        *_, reply = stream_reply(engine, messages, GREEDY)
        notes.append(reply.notes)
        messages = [*messages, reply.as_message(), user("and?")]
    assert notes == [[LEFT_OUT.format(200)], [], []]


def test_a_reply_knows_its_length_and_speed():
    replies = stream_reply(ScriptedEngine(TOKENIZER.encode("four")), [user("x")], GREEDY)
    assert next(replies).speed == ""
    *_, reply = replies
    assert reply.tokens == 4 and reply.seconds > 0 and re.fullmatch(r"4 tokens, [\d,]+ per second", reply.speed)


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
# One answer


def test_prompt_is_answered_once(runs, capsys):
    def config(**values):
        keys = {"run": None, "stage": None, "model": None, "ui": "gradio", "prompt": None, "compute": "auto", "seed": 1}
        keys |= {"adapters": None, "weights": None}
        sampling = {"temperature": 0.0, "top_k": 50, "top_p": 1.0, "max_new_tokens": 100}
        return SimpleNamespace(paths=SimpleNamespace(runs=str(runs)), verify=True, **{**keys, **sampling, **values})

    app.serve(config(prompt=APPLES))  # the only run and its best stage are the default
    assert capsys.readouterr().out == "Ava has 12 + 7 = [12+7 = 19]19 apples.\n#### 19\n"
    app.serve(config(run="tiny", stage="sft", prompt="Greet me.", max_new_tokens=5))
    captured = capsys.readouterr()
    assert captured.out == "Grü�\n" and captured.err == "(The answer stops here: it reached max_new_tokens, 5.)\n"
    if decode_cpu.load() is not None:
        app.serve(config(prompt=APPLES, weights="int8"))
        assert "[12+7 = 19]" in capsys.readouterr().out
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


def test_a_port_that_is_taken_is_told():
    pytest.importorskip("fastapi")
    from llm.serving.http import listen

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port={port}: cannot listen there"):
            listen("127.0.0.1", port)
    with listen("127.0.0.1", 0) as free:
        assert free.getsockname()[1] > 0


def test_a_base_model_is_announced(runs, tmp_path):
    stage = tmp_path / "tiny" / "pretrain"
    stage.mkdir(parents=True)
    (stage / "model").symlink_to(runs / "tiny" / "sft" / "model", target_is_directory=True)
    model = load_chat_model(stage)
    assert model.name == "tiny/pretrain" and "base model" in model.notes[0]
    assert load_chat_model(runs / "tiny" / "sft").notes == ()


def test_weights_in_int8_reach_the_engine_of_a_worker(runs, monkeypatch):
    http, found = pytest.importorskip("llm.serving.http"), []
    if decode_cpu.load() is None:
        pytest.skip("there is no C++ compiler")
    monkeypatch.setattr(http, "_serve", AsyncMock(side_effect=lambda cfg, source, *rest: found.append(source)))
    keys = dict(adapters=None, offer="none", verify=True, host="127.0.0.1", port=0, public_names=[], ui="api")
    keys |= dict(paths=SimpleNamespace(runs=str(runs)), plugins=[], trust=[])
    keys |= dict(api=SimpleNamespace(access_key=None, origins=[]))
    for weights, told in ((None, ""), ("int8", ", matrices in int8")):
        http.serve(SimpleNamespace(**keys, compute="fp32", weights=weights), str(runs / "tiny" / "sft"), GREEDY)
        place = {"device": "cpu", "threads": None, "rows": 4, "sharers": 1, "known": None}
        engine, facts = worker.load(asdict(found[-1]) | place)
        assert engine.net.int8 is (weights == "int8") and f"parameters{told}, context" in facts["summary"]
        packed = {matrix.dtype for matrix in engine._batch._kernel._packed}
        assert packed == {torch.int8 if weights else torch.float32}
    monkeypatch.setattr(decode_cpu, "load", lambda: None)
    with pytest.raises(UserError, match="weights=int8 needs .*; use weights=null"):
        load_chat_model(runs / "tiny" / "sft", weights="int8")


def test_a_worker_that_starts_again_takes_no_other_model(runs):
    worker, pool = pytest.importorskip("llm.serving.worker"), pytest.importorskip("llm.serving.pool")
    pool = pool.Pool(pool.Source(str(runs / "tiny" / "sft")), ["cpu"], rows=4, queue=1)
    _, pool.facts = worker.load(pool._load_message(pool.workers[0]))
    worker.load(pool._load_message(pool.workers[0]))
    for part in ("another tokenizer", "other weights"):
        pool.facts["fingerprints"] = {part.split()[1]: "of before"}
        with pytest.raises(UserError, match=f"holds {part} .* than the server began with"):
            worker.load(pool._load_message(pool.workers[0]))


def test_threads_of_the_server_leave_gradients_on(runs):
    engine: Engine = load_chat_model(runs / "tiny" / "sft").engine
    next(stream_reply(engine, [user("x")], GREEDY))
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
