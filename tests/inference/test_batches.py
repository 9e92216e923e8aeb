"""Every composition of a batch gives what the plain forward gives: joins, ends, aborts, short budgets, shared texts."""

import random

import pytest
import torch
from test_engine import BOS, TOKENIZER

from llm.inference.engine import Engine
from llm.inference.request import Request
from llm.inference.sampling import SamplingParams
from llm.model.config import GPTConfig
from llm.model.gpt import GPT

SEQ_LEN = 96
MODERN = {"value_embeds": True, "residual_scalars": True, "smear": True, "backout": True, "window_pattern": "SSL"}
ARCHS = {"classic": {}, "modern": {**MODERN, "gate_channels": 4}, "gpt2": {"tied": True, "softcap": None}}
TIE = 1e-4  # logits nearer to each other are equally right


@pytest.fixture(params=[("classic", 2), ("classic", 4), ("modern", 2), ("modern", 4), ("gpt2", 4)], ids=str)
def net(request, monkeypatch) -> GPT:
    """A random network of three layers with sharp logits; short windows in `modern`."""
    monkeypatch.setattr("llm.model.config.WINDOW_MULTIPLE", 4)
    arch, n_kv_head = request.param
    return sharp_net(arch, n_kv_head)


def sharp_net(arch: str, n_kv_head: int) -> GPT:
    c = GPTConfig(3, 4, n_kv_head, 8, 32, SEQ_LEN, TOKENIZER.vocab_size, arch=arch, **ARCHS[arch])
    net, generator = GPT(c), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.4)
    return net.eval()


def drawn_prompts(draw: random.Random) -> list[list[int]]:
    """Prompts of which some are equal, some begin alike, and some are long."""
    shared = [BOS, *draw.choices(range(256), k=draw.randint(18, 40))]
    prompts = [[BOS, *draw.choices(range(256), k=draw.randint(0, 60))] for _ in range(3)]
    prompts += [shared[: draw.randint(10, 60)] + draw.choices(range(256), k=draw.randint(0, 20)) for _ in range(3)]
    return [draw.choice(prompts) for _ in range(draw.randint(3, 8))]


def play(engine: Engine, draw: random.Random) -> list[Request]:
    """Submit drawn requests at drawn steps, abort some; return those that came to an end."""
    todo, requests = drawn_prompts(draw), []
    while todo or engine.has_work:
        while todo and (draw.random() < 0.4 or not engine.has_work):
            temperature = draw.choice((0.0, 0.0, 1.0))
            params = SamplingParams(temperature, max_new_tokens=draw.choice((1, 5, 12, 24)), seed=draw.randint(0, 3))
            requests.append(engine.submit(todo.pop(), params, sample=draw.randint(0, 2)))
        engine.step()
        if len(requests) > 1 and draw.random() < 0.05:
            engine.abort(draw.choice(requests[1:]))
        follow = [r for r in requests if r.finish_reason == "length" and len(r.tokens) < SEQ_LEN - 10]
        if follow and len(requests) < 10 and draw.random() < 0.1:  # the history of a chat, or a part of it
            todo.append(draw.choice(follow).tokens[: draw.choice((None, 15))] + draw.choices(range(256), k=5))
    return [request for request in requests if request.finish_reason != "abort"]


def check(net: GPT, request: Request) -> None:
    """A request's greedy tokens are the largest logits of one plain pass over the whole text, up to ties."""
    with torch.no_grad():
        logits = net(torch.tensor([request.tokens]))[0, len(request.prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(request.ids).unsqueeze(1)).squeeze(1)
    assert (chosen >= logits.amax(dim=1) - TIE).all(), request.prompt


def lone(net: GPT, request: Request) -> list[int]:
    engine = Engine(net, TOKENIZER)
    again = engine.submit(request.prompt, request.params, sample=request.sample)
    while engine.has_work:
        engine.step()
    return again.ids


@pytest.mark.parametrize("seed", range(6))
def test_any_composition_of_a_batch_gives_what_each_request_gets_alone(net, seed, monkeypatch):
    draw = random.Random(seed)
    monkeypatch.setattr("llm.inference.slot_batch.CHUNK", draw.choice((8, 24, 512)))
    if draw.random() < 0.3:
        monkeypatch.setattr("llm.inference.slot_batch.keeps_shapes", lambda device, dtype: True)
    options = {"max_rows": draw.choice((1, 3, 16)), "budget": draw.choice((None, 96, 150, 300, 500))}
    engine = Engine(net, TOKENIZER, frozen=draw.random() < 0.7, **options)
    requests = play(engine, draw)
    for request in requests:
        assert request.is_done and len(request.ids) == len(request.mask)
        if request.params.is_greedy:
            check(net, request)
        else:
            assert request.ids == lone(net, request)
    assert engine.stats()["rows"] == 0
    if engine._batch:
        assert all(entry.uses == 0 for entry in engine._batch.store._entries) and not engine._batch.cache.lengths.any()
