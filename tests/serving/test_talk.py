"""What visitors of the page do: ask, edit, undo, stop, switch models, take up old chats; as functions and over HTTP."""

import html
import itertools
import json
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio")

from processes import HANG  # noqa: E402
from scripted_engine import TOKENIZER, ScriptedEngine, scripted_model, user  # noqa: E402
from serving_run import make_run  # noqa: E402

from llm.errors import UserError  # noqa: E402
from llm.inference.sampling import SamplingParams  # noqa: E402
from llm.serving import browser, talk  # noqa: E402
from llm.serving.chat import Reply, load_chat_model  # noqa: E402
from llm.serving.models import KEPT, MadeRoom, Models  # noqa: E402
from llm.serving.saved_chat import Chat, Thread  # noqa: E402
from llm.serving.talk import MAX_MESSAGE, NONE, UNCHANGED, Handlers, Talk, told  # noqa: E402
from llm.tokenizer.chat_format import render_prompt  # noqa: E402

NOTHING = [UNCHANGED[2:]]  # frames of an answer to nothing; without any, Gradio would empty the chats
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=200)


class Scripted:
    """Models that each say one thing, as `Models` offers them."""

    first, at_once = "run/sft", 1

    def __init__(self):
        self.models = {name: scripted_model(f"I am {name}", name) for name in ("run/sft", "run/pretrain")}

    def names(self):
        return list(self.models)

    def get(self, name):
        if name not in self.models:
            raise UserError(f"there is no model {name!r} here")
        return self.models[name]


@pytest.fixture
def handlers():
    return Handlers(Scripted(), GREEDY)


@pytest.fixture(autouse=True)
def warned(monkeypatch):
    """Warnings that the page would show."""
    shown = []
    monkeypatch.setattr(talk.gr, "Warning", shown.append)
    return shown


def said(messages) -> list[str]:
    return [
        m["content"] if isinstance(m["content"], str) else "".join(p["text"] for p in m["content"]) for m in messages
    ]


def asked(handlers, *questions: str, **settings) -> Talk:
    """A talk in which the questions were asked and answered."""
    visitor = Talk.new(handlers.models.first)
    for question in questions:
        handlers.ask(question, visitor)
        list(handlers.answer(visitor, **settings))
    return visitor


def kept(visitor: Talk) -> dict:
    """Return what the browser keeps, from the Markdown in which it is told."""
    return json.loads(html.unescape(told(visitor)))


# ---------------------------------------------------------------------------------------------------------------------
# Asking


def test_a_question_is_answered_frame_by_frame(handlers, monkeypatch):
    monkeypatch.setattr(talk, "FRAME_SECONDS", 0.0)
    visitor = Talk.new("run/sft")
    box, _, shown, _ = handlers.ask("Who?", visitor)
    assert (box["value"], box["stop_btn"], shown) == ("", "Stop", [user("Who&#63;")])
    frames = [first[-1]["content"].partition("\n")[0] for first, _ in list(handlers.answer(visitor))[1:]]
    assert frames[-1] == "I am run/sft" and len(frames) > 5
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(frames))
    box, _ = handlers.rest(visitor)
    assert box["submit_btn"] == "Send" and not visitor.is_busy
    assert "tokens" in visitor.chat.threads[0].messages[-1]["speed"]
    assert list(handlers.answer(visitor)) == NOTHING  # is asked, so nothing changes


def test_half_a_character_of_utf_16_is_asked_as_the_tokens_have_it(handlers):
    visitor = Talk.new("run/sft")
    handlers.ask("a\ud83d", visitor)
    list(handlers.answer(visitor, system="b\ud83d"))
    assert visitor.chat.threads[0].messages[0]["content"] == "a\ufffd" and visitor.chat.system == "b\ufffd"


def test_an_empty_box_asks_nothing_and_warns_of_nothing(handlers, warned):
    visitor = asked(handlers, "one")
    for empty in ("", "  \n"):
        assert handlers.ask(empty, visitor) is UNCHANGED and list(handlers.answer(visitor)) == NOTHING
    assert said(visitor.chat.threads[0].messages) == ["one", "I am run/sft"] and warned == []


def test_a_message_that_is_too_long_is_said_so_and_stays_in_the_box(handlers, warned):
    visitor = Talk.new("run/sft")
    assert handlers.ask("x" * (MAX_MESSAGE + 1), visitor) is UNCHANGED
    assert "8,001 characters" in warned[0] and visitor.chat.threads[0].messages == []
    handlers.ask("x" * MAX_MESSAGE, visitor)
    assert len(visitor.chat.threads[0].messages) == 1
    visitor = Talk(Chat([Thread("run/sft", [user("x"), {"role": "assistant", "content": "y"}] * 250)]))
    assert handlers.ask("one more", visitor) is UNCHANGED and "500 messages" in warned[1]


def test_while_an_answer_is_on_its_way_nothing_else_is_done(handlers, warned):
    visitor = Talk.new("run/sft")
    handlers.ask("one", visitor)
    answer = handlers.answer(visitor)
    next(answer)
    assert handlers.ask("two", visitor) is UNCHANGED and handlers.again(visitor) is UNCHANGED
    handlers.undo("", visitor), handlers.choose("run/pretrain", NONE, visitor)
    assert len(warned) == 4 and list(handlers.answer(visitor)) == NOTHING
    list(answer)
    assert said(visitor.chat.threads[0].messages) == ["one", "I am run/sft"]


def test_an_unanswered_question_makes_room(handlers):
    visitor = asked(handlers, "one")
    handlers.ask("never answered", visitor)
    handlers.stop(visitor)
    handlers.ask("two", visitor)
    assert said(visitor.chat.threads[0].messages) == ["one", "I am run/sft", "two"]


def test_a_stopped_answer_stays_and_has_no_last_word(handlers, monkeypatch):
    monkeypatch.setattr(talk, "FRAME_SECONDS", 0.0)
    visitor, engine = Talk.new("run/sft"), handlers.models.get("run/sft").engine
    handlers.ask("one", visitor)
    answer = handlers.answer(visitor)
    next(answer), next(answer), next(answer), next(answer)
    box, _ = handlers.stop(visitor)
    assert box["submit_btn"] == "Send" and not engine.closed
    handlers.undo("", visitor)
    assert list(answer) == [] and engine.closed
    assert visitor.chat.threads[0].messages == []


def test_a_new_chat_ends_the_answer_of_the_old_one(handlers, monkeypatch):
    monkeypatch.setattr(talk, "FRAME_SECONDS", 0.0)
    visitor = Talk.new("run/sft")
    handlers.ask("one", visitor)
    answer = handlers.answer(visitor)
    next(answer), next(answer)
    fresh, first, *_ = handlers.clear(visitor)
    assert list(answer) == [] and first["value"] == [] and fresh.chat.threads[0].messages == []


def test_settings_reach_the_engine_and_wrong_ones_are_said(handlers, warned):
    engine = handlers.models.get("run/sft").engine
    asked(handlers, "one", temperature=0.5, top_k=7, top_p=0.9, max_new_tokens=12, seed="3", system="Be brief.")
    params = engine.params
    assert (params.temperature, params.top_k, params.top_p, params.max_new_tokens, params.seed) == (0.5, 7, 0.9, 12, 3)
    assert engine.prompt == render_prompt(TOKENIZER, [{"role": "system", "content": "Be brief."}, user("one")])
    asked(handlers, "one", system=None)
    seeds = [engine.params.seed]
    asked(handlers, "one", seed=" ")
    assert [*seeds, engine.params.seed] == [GREEDY.seed + 1, GREEDY.seed + 2]  # another answer each time
    for wrong, message in (
        ({"seed": "x"}, "Seed x"),
        ({"seed": "1" * 5000}, f"Seed {'1' * 20}: it must be a whole number of at most 18 digits"),
        ({"temperature": -1}, "temperature=-1"),
        ({"system": "s" * 9000}, "9,000"),
    ):
        visitor = asked(handlers, "one", **wrong)
        assert message in warned[-1] and not visitor.is_busy and len(visitor.chat.threads[0].messages) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Changing what was said


def test_an_edited_question_replaces_what_followed(handlers):
    visitor = asked(handlers, "one", "two", "three")
    handlers.edit(visitor, SimpleNamespace(index=2, value="other"))
    list(handlers.answer(visitor))
    assert said(visitor.chat.threads[0].messages) == ["one", "I am run/sft", "other", "I am run/sft"]
    shown = handlers.edit(visitor, SimpleNamespace(index=[0, 0], value=" "))[2]
    assert [m["content"] for m in shown[::2]] == ["one", "other"]  # an empty one changes nothing
    handlers.edit(visitor, SimpleNamespace(index=[0, 0], value="first"))
    assert said(visitor.chat.threads[0].messages) == ["first"]


def test_another_answer_and_undo(handlers):
    visitor = asked(handlers, "one", "two")
    handlers.again(visitor)
    list(handlers.answer(visitor))
    assert said(visitor.chat.threads[0].messages) == ["one", "I am run/sft", "two", "I am run/sft"]
    assert handlers.undo("", visitor)[0] == "two"
    assert handlers.undo("being typed", visitor)[0] == "being typed"  # what stands in the box is not lost
    assert handlers.undo("", visitor)[0] == "" and visitor.chat.threads[0].messages == []
    assert handlers.again(visitor) is UNCHANGED


# ---------------------------------------------------------------------------------------------------------------------
# Models


def test_two_models_answer_side_by_side(handlers):
    visitor = asked(handlers, "one")
    *_, other = handlers.choose("run/sft", "run/pretrain", visitor)
    assert other == "run/pretrain"
    handlers.ask("two", visitor)
    *_, (first, second) = handlers.answer(visitor)
    assert [said(thread.messages)[-2:] for thread in visitor.chat.threads] == [
        ["two", "I am run/sft"],
        ["two", "I am run/pretrain"],
    ]
    assert len(first) == len(second) == 4
    handlers.edit(visitor, SimpleNamespace(index=0, value="new"))
    assert [said(thread.messages) for thread in visitor.chat.threads] == [["new"], ["new"]]
    handlers.stop(visitor)
    handlers.choose("run/pretrain", NONE, visitor)
    assert [thread.model for thread in visitor.chat.threads] == ["run/pretrain"]


@pytest.mark.parametrize(("times", "answer"), [(1, ["one", "I am run/sft"]), (9, ["one"])])
def test_a_model_that_made_room_meanwhile_is_loaded_again(handlers, warned, monkeypatch, times, answer):
    real, asked_for = handlers.models.get, itertools.count()

    class Gone:
        def answer(self, messages, params):
            yield Reply()
            raise MadeRoom("the model has made room for another")

    monkeypatch.setattr(handlers.models, "get", lambda name: Gone() if next(asked_for) < times else real(name))
    visitor = Talk.new("run/sft")
    handlers.ask("one", visitor)
    list(handlers.answer(visitor))
    assert said(visitor.chat.threads[0].messages)[: len(answer)] == answer and len(warned) == (times > 1)
    assert not visitor.is_busy


def test_a_model_that_is_not_offered_is_not_chosen(handlers, warned):
    visitor = asked(handlers, "one")
    *_, model, _ = handlers.choose("../secret", NONE, visitor)
    assert model == "run/sft" and visitor.chat.threads[0].model == "run/sft" and "no model" in warned[0]


def test_models_offer_the_finished_stages_of_all_runs(tmp_path):
    for run, stage in (("a", "sft"), ("a", "pretrain"), ("b", "sft"), ("c", "sft")):
        make_run(tmp_path, run, stage, steps=1)
    (tmp_path / "c" / "sft" / "run.json").write_text("{broken")
    first = load_chat_model(tmp_path / "a" / "sft")
    assert Models(first).names() == ["a/sft"]
    models = Models(first, tmp_path)
    assert models.names() == ["a/sft", "a/pretrain", "b/sft"]
    assert models.get("a/sft") is first and models.get("b/sft").name == "b/sft"
    assert "base model" in models.get("a/pretrain").notes[0]
    assert models.get("a/sft") is not first and len(models._loaded) == KEPT  # the one that waited longest went
    for wrong in ("c/sft", "a/grpo", "../a/sft", "a", ""):
        with pytest.raises(UserError, match="no model"):
            models.get(wrong)
    for compute in ("fp32", "bf16"):
        other = Models(first, tmp_path, compute=compute).get("b/sft")
        assert str(other.engine.net.compute_dtype) == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[compute]


# ---------------------------------------------------------------------------------------------------------------------
# Chats that the browser keeps


def test_a_chat_is_taken_up_as_it_was_told(handlers):
    visitor = asked(handlers, '<b>*one*</b> &amp; 1. \\ "two"\n\n  three', system="Be brief.")
    handlers.choose("run/sft", "run/pretrain", visitor)
    content = kept(visitor)
    state, first, _, _, system, *_ = handlers.restore(json.dumps(content), Talk.new("run/sft"))
    assert state.chat.to_dict() == visitor.chat.to_dict() and state.id == visitor.id
    assert system == "Be brief." and len(first["value"]) == 2
    handlers.ask("two", state)
    assert said(state.chat.threads[1].messages)[-1] == "two"


def test_every_chat_has_an_id_of_its_own(handlers):
    first, second = Talk.new("run/sft"), Talk.new("run/sft")
    assert kept(first)["id"] == kept(first)["id"] != kept(second)["id"]
    state, *_ = handlers.clear(first)
    assert kept(state)["id"] != kept(first)["id"]


@pytest.mark.parametrize(
    "stored",
    [
        "",
        "{",
        "[]",
        "1",
        '{"id": null}',
        '{"chat": {}}',
        '{"id": "x", "chat": {"system": "", "threads": []}}',
        "[" * 99999,
    ],
)
def test_what_is_no_chat_begins_a_new_one(handlers, stored):
    state, first, *_ = handlers.restore(stored, asked(handlers, "one"))
    assert state.chat.threads[0].messages == [] and first["value"] == []


def test_a_chat_with_a_model_that_is_gone_goes_on_with_the_present_one(handlers):
    chat = {"system": "", "threads": [{"model": "old/sft", "messages": [user("x")]}]}
    state, *_ = handlers.restore(json.dumps({"id": "0" * 32, "chat": chat}), Talk.new("run/sft"))
    assert state.chat.threads[0].model == "run/sft" and said(state.chat.threads[0].messages) == ["x"]


# ---------------------------------------------------------------------------------------------------------------------
# The page


@pytest.mark.filterwarnings("ignore")  # from inside gradio
def test_the_page_offers_the_examples_of_the_model_and_everything_has_a_label():
    model = scripted_model("I am Fathom", "run/sft")
    object.__setattr__(model, "examples", ("Wie heißt du?",))
    components = browser.build(Models(model), GREEDY).config["components"]
    chat = next(c["props"] for c in components if c["type"] == "chatbot")
    assert [example["text"] for example in chat["examples"]] == ["Wie heißt du?"]
    box = next(c["props"] for c in components if c["props"].get("elem_id") == "fathom-question")
    assert box["submit_btn"] == "Send" and box["label"] == "Message" and box.get("max_length") is None
    order = [c["type"] for c in components]
    assert order.index("chatbot") < order.index("accordion") < order.index("slider")
    assert all(c["props"]["label"] for c in components if c["type"] in ("slider", "dropdown", "textbox"))
    assert not any(c["type"] == "html" for c in components)  # it needs eval, which the guard forbids


@pytest.mark.filterwarnings("ignore")  # from inside gradio
def test_the_page_over_http(tmp_path, monkeypatch):
    """Two visitors get their own answers; Gradio keeps no long list of what they did."""
    from gradio_client import Client
    from page_server import page_server

    monkeypatch.setattr(talk, "FRAME_SECONDS", 0.0)
    demo = browser.build(Models(load_chat_model(make_run(tmp_path))), GREEDY)
    with page_server(demo) as port:
        clients, frames = [Client(f"http://127.0.0.1:{port}", verbose=False) for _ in range(2)], []
        for client, question in zip(clients, ("Who are you?", "Sing."), strict=True):
            _, shown, _ = client.submit(question, api_name="/ask").result(timeout=HANG)
            assert [message["role"] for message in shown] == ["user"]  # a conversation for each visitor
            job = client.submit(0.0, 50, 1.0, 300, api_name="/answer")
            job.result(timeout=HANG)
            frames.append(["".join(p["text"] for p in first[-1]["content"]) for first, _ in job.outputs()])
        assert frames[0][-1].startswith("I am Fathom, a small language model. Ask me **anything**!\n\n<span class=")
        assert len(frames[1]) > 1 and frames[1][-2].startswith("la la la ")
        assert 0 < len(demo._queue.event_analytics) <= demo._queue.ANALYTICS_MAX_EVENTS <= 100
        for client in clients:
            client.close()


def test_stopping_in_the_browser_closes_the_engine(monkeypatch):
    monkeypatch.setattr(talk, "FRAME_SECONDS", 0.0)
    engine = ScriptedEngine(list(b"a long answer"))
    models = Scripted()
    object.__setattr__(models.models["run/sft"], "engine", engine)
    handlers, visitor = Handlers(models, GREEDY), Talk.new("run/sft")
    handlers.ask("x", visitor)
    answer = handlers.answer(visitor)
    next(answer), next(answer), next(answer)
    assert not engine.closed
    answer.close()
    assert engine.closed and not visitor.is_busy
