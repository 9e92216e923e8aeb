"""Weights of answers between 0 and 1: factors on the losses of their tokens, from the row to the gradient."""

from itertools import islice

import pytest
import torch
from test_loader import Bytes

from llm.data.loader import ConversationSteps, StepLayout
from llm.errors import UserError
from llm.model.config import GPTConfig
from llm.model.gpt import GPT
from llm.tokenizer.chat_format import render_conversation


def conversation(i: int, weight) -> dict:
    turns = [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "no", "train": weight}]
    return {"messages": [*turns, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "yes"}]}


def steps(weight, n=2, state=None, size=40) -> list[dict]:
    mixture = [conversation(i, weight if i % 2 else True) for i in range(size)]
    loader = ConversationSteps(mixture, Bytes(), StepLayout(63, 2, 2), state, buffer=8)
    return list(islice(loader.steps(), n))


def test_factors_of_an_answer_reach_its_tokens_and_their_gradients():
    half, whole = steps(0.25)[0], steps(True)[0]
    assert half["n_trained"] == whole["n_trained"]
    net = GPT(GPTConfig(1, 1, 1, 16, 16, 64, 270)).init_weights(0)
    for micro, full in zip(half["micro"], whole["micro"], strict=True):
        assert torch.equal(micro["targets"], full["targets"]) and "weights" not in full
        trained = micro["weights"][micro["targets"] >= 0]
        assert set(trained.tolist()) == {0.25, 1.0} and not micro["weights"][micro["targets"] < 0].any()
        losses = net(full["inputs"], full["targets"], reduction="none")
        total = net(micro["inputs"], micro["targets"], reduction="sum", token_weights=micro["weights"])
        torch.testing.assert_close(total, (losses * micro["weights"]).sum())


def test_factors_come_back_after_a_resume():
    """Conversations that wait to be packed keep theirs."""
    straight = steps(0.25, 3)
    for rest, step in zip(steps(0.25, 2, straight[0]["state"]()), straight[1:], strict=True):
        for micro, wanted in zip(rest["micro"], step["micro"], strict=True):
            assert micro.keys() == wanted.keys()
            assert all(torch.equal(micro[name], wanted[name]) for name in micro)


def test_a_state_without_factors_is_as_it_was():
    assert steps(True)[0]["state"]()["packer"]["mask"].dtype == torch.bool


@pytest.mark.parametrize("train_all", [False, True])
def test_a_mask_holds_the_factors(train_all):
    tokenizer = Bytes()
    _, plain = render_conversation(tokenizer, conversation(1, True), train_all=train_all)
    _, mask = render_conversation(tokenizer, conversation(1, 0.25), train_all=train_all)
    assert {now / before for now, before in zip(mask, plain, strict=True) if before} == {0.25, 1.0}


@pytest.mark.parametrize("wrong", [2, 1.5, -0.5, "0.5", None, float("nan")])
def test_other_weights_are_refused(wrong):
    with pytest.raises(UserError, match="train must be true, false or a number between 0 and 1"):
        render_conversation(Bytes(), conversation(1, wrong))
