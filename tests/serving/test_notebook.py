"""A finished model in three lines: chat, generate, score; `import llm` stays light, Ctrl-C breaks no loading."""

import os
import signal
import subprocess
import sys

import pytest
from serving_run import make_run

import llm
from llm.errors import UserError
from llm.inference.warm_up import interrupt_held_back


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llm.load(make_run(tmp_path_factory.mktemp("runs")).parent)


def test_chat_answers_a_question_and_messages_whole_or_in_pieces(model):
    question = "What is the capital of France?"
    answer = model.chat(question, temperature=0, max_new_tokens=20)
    assert answer and answer == model.chat([{"role": "user", "content": question}], temperature=0, max_new_tokens=20)
    pieces = list(model.chat(question, stream=True, temperature=0, max_new_tokens=20))
    assert "".join(pieces) == answer and len(pieces) > 1
    settings = {"temperature": 0, "max_new_tokens": 20, "stop": answer[3:5]}
    cut = answer[: answer.index(answer[3:5])]
    assert model.chat(question, **settings) == cut + answer[3:5]
    assert model.chat(question, keep_stop=False, **settings) == cut
    assert "".join(model.chat(question, stream=True, keep_stop=False, **settings)) == cut


def test_generate_continues_a_text(model):
    text = model.generate("The cat", temperature=0, max_new_tokens=8)
    assert "".join(model.generate("The cat", stream=True, temperature=0, max_new_tokens=8)) == text
    drawn = model.generate("The cat", n=3, temperature=1.5, max_new_tokens=8, seed=1)
    assert len(drawn) == 3 and drawn == model.generate("The cat", n=3, temperature=1.5, max_new_tokens=8, seed=1)
    assert model.generate("The cat", best_of=3, temperature=1.5, max_new_tokens=8, seed=1) in drawn
    stop = text[3:5]
    kept = model.generate("The cat", temperature=0, max_new_tokens=8, stop=stop)
    assert kept == text[: text.index(stop) + 2]
    left_out = model.generate("The cat", temperature=0, max_new_tokens=8, stop=stop, keep_stop=False)
    assert left_out == text[: text.index(stop)]


def test_best_of_keeps_the_likeliest(model):
    drawn = model.generate("The", n=4, temperature=2.0, max_new_tokens=6, seed=3)
    best = model.generate("The", best_of=4, temperature=2.0, max_new_tokens=6, seed=3)
    assert drawn.index(best) == max(range(4), key=lambda i: model.score("The", drawn[i]) / len(drawn[i]))


def test_score_is_larger_for_what_the_model_says_itself(model):
    text = model.generate("The cat", temperature=0, max_new_tokens=8)
    assert 0 > model.score("The cat", text) > model.score("The cat", "~" * 8)
    with pytest.raises(UserError, match="tokens do not fit the model's context"):
        model.score("x" * 1_000, "y")


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m: m.chat("x", temprature=0), "^temprature: no such setting"),
        (lambda m: m.generate("x", n=2, best_of=1), "n=2 must be at least 1, and at most best_of=1"),
        (lambda m: m.generate("x", n=2, stream=True), "stream=True gives one continuation"),
        (lambda m: m.chat([{"role": "system", "content": "x"}]), "without a user's message"),
    ],
)
def test_wrong_calls_say_what_is_wrong(model, call, error):
    with pytest.raises(UserError, match=error):
        call(model)


def test_a_stage_can_be_named_and_a_missing_run_is_told(model, tmp_path):
    stage = make_run(tmp_path, steps=1)
    assert llm.load(stage).name == "tiny/sft" and repr(llm.load(str(stage))) == "llm.load('tiny/sft')"
    with pytest.raises(UserError):
        llm.load(tmp_path / "nothing")
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        llm.lode  # noqa: B018


def test_import_llm_imports_no_torch():
    code = "import llm, sys; sys.exit('torch' in sys.modules or not callable(llm.load))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_interruption_comes_behind_the_block():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
    done = False
    try:
        with pytest.raises(KeyboardInterrupt), interrupt_held_back():
            os.kill(os.getpid(), signal.SIGINT)
            done = True
        assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
