"""Several adapters in one engine: each row of any batch gets what the merged network of its adapter gives alone."""

import random
from functools import cache

import pytest
import torch
from drawn_adapters import drawn_adapter, merged_with
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batches import KINDS, check, run, sharp_net, without_kernel
from test_engine import BOS, TOKENIZER

from llm.errors import UserError
from llm.inference.engine import Engine
from llm.inference.sampling import SamplingParams
from llm.model.lora import LoRA, add_adapter

NAMES = (None, "low", "mlp", "whole")


@cache
def made(arch: str, n_kv_head: int):
    """A network, three adapters of it by name, and the networks that hold them merged."""
    net = sharp_net(arch, n_kv_head)
    adapters = {
        "low": drawn_adapter(net, 1, 1, ("attention", "embedding")),
        "mlp": drawn_adapter(net, 3, 2, ("mlp",)),
        "whole": drawn_adapter(net, 2, 3),
    }
    return net, adapters, {name: merged_with(net, adapters.get(name)) for name in NAMES}


rows = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 2), st.integers(1, 40), st.integers(0, 6)), min_size=1)


batches = given(
    way=st.sampled_from(("kernel", "torch", "graphs")),
    kind=st.sampled_from(KINDS),
    rows=rows,
    max_rows=st.sampled_from((2, 5, 16)),
    frozen=st.booleans(),
)


@settings(max_examples=8, deadline=None)
@batches
def test_every_row_of_a_mixed_batch_gets_what_its_merged_network_gives(way, kind, rows, max_rows, frozen):
    check_batch(way, kind, rows, max_rows, frozen)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@batches
def test_every_row_of_many_mixed_batches_gets_what_its_merged_network_gives(way, kind, rows, max_rows, frozen):
    check_batch(way, kind, rows, max_rows, frozen)


def check_batch(way, kind, rows, max_rows, frozen):
    """Prompts begin with one of three texts, so that what an adapter has read lies ready for others to take it."""
    net, adapters, merged = made(*kind)
    texts = [[BOS, *random.Random(seed).choices(range(256), k=60)] for seed in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        if way != "kernel":
            without_kernel(patch)
        if way == "graphs":  # as on a GPU
            patch.setattr("llm.inference.slot_batch.shares_texts", lambda device: False)
            patch.setattr("llm.inference.slot_batch.is_used", lambda device: True)
            patch.setattr("llm.inference.step_graph.RECORD_AFTER", 1)
        engine, requests = Engine(net, TOKENIZER, max_rows=max_rows, frozen=frozen, adapters=adapters), []
        for name, text, length, steps in rows:
            params = SamplingParams(0.0, max_new_tokens=9, logprobs=0)
            requests.append(engine.submit(texts[text][: length + 20], params, adapter=name))
            for _ in range(steps):
                engine.step()
        run(engine)
    for request in requests:
        check(merged[request.adapter], request)
        with torch.no_grad():
            logits = merged[request.adapter](torch.tensor([request.tokens]))[0, len(request.prompt) - 1 : -1]
        wanted = logits.log_softmax(-1)[torch.arange(len(request.ids)), request.ids]
        torch.testing.assert_close(torch.tensor(request.logprobs), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("has_kernel", [True, False])
def test_a_row_without_an_adapter_has_the_numbers_of_an_engine_without_any(has_kernel, monkeypatch):
    """Bit for bit, also while others in the batch have one."""
    if not has_kernel:
        without_kernel(monkeypatch)
    net, adapters, _ = made("modern", 2)
    params, prompt = SamplingParams(0.8, max_new_tokens=12, logprobs=3, seed=4), [BOS, *b"It is"]
    alone = Engine(net, TOKENIZER).submit(prompt, params)
    plain, several = Engine(net, TOKENIZER), Engine(net, TOKENIZER, adapters=adapters)
    alone, beside = (engine.submit(prompt, params) for engine in (plain, several))
    if has_kernel:  # torch's products depend a little on the number of rows
        several.submit(prompt, params, adapter="whole")
    run(plain), run(several)
    assert (alone.ids, alone.logprobs, alone.top) == (beside.ids, beside.logprobs, beside.top)


def test_what_one_adapter_has_read_is_not_taken_by_another():
    net, adapters, merged = made("classic", 4)
    engine = Engine(net, TOKENIZER, frozen=True, adapters=adapters)
    prompt, params = [BOS, *range(40)], SamplingParams(0.0, max_new_tokens=8)
    found = {}
    for name in NAMES * 2:
        request = engine.submit(prompt, params, adapter=name)
        run(engine)
        found.setdefault(name, []).append((request.ids, request.cached_tokens > 0))
        check(merged[name], request)
    for name, ((first, was_cached), (second, is_cached)) in found.items():
        assert first == second and (was_cached, is_cached) == (False, True), name
    assert len({tuple(first) for (first, _), _ in found.values()}) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_scored_by_the_adapter(name):
    net, adapters, merged = made("modern", 4)
    engine = Engine(net, TOKENIZER, adapters=adapters)
    ids = [BOS, *b"a text of some tokens"]
    with torch.no_grad():
        wanted = merged[name](torch.tensor([ids]))[0].log_softmax(-1)[torch.arange(3, len(ids) - 1), ids[4:]]
    found = engine.score(ids[:4], ids[4:], adapter=name)
    torch.testing.assert_close(torch.tensor(found), wanted, atol=1e-4, rtol=0)


def test_half_precision_is_as_near_as_the_merged_network():
    """The kernel adds the products before it rounds, so it is nearer to the exact numbers than the merged weights."""
    exact, adapters, _ = made("modern", 2)
    params, prompt = SamplingParams(0.0, max_new_tokens=1, logprobs=0), [BOS, *b"A sentence that is read as a prompt"]
    wanted = Engine(exact, TOKENIZER, adapters=adapters).generate([prompt], params, adapter="whole")[0][0]
    net = sharp_net("modern", 2)
    net.compute_dtype = torch.bfloat16
    found = Engine(net, TOKENIZER, adapters=adapters).generate([prompt], params, adapter="whole")[0][0]
    assert found.ids == wanted.ids
    assert abs(found.logprobs[0] - wanted.logprobs[0]) < 0.2


def test_the_network_stays_as_it_is():
    net, adapters, _ = made("classic", 2)
    Engine(net, TOKENIZER, adapters=adapters).generate([[BOS]], SamplingParams(max_new_tokens=1), adapter="low")
    assert net.adapters is None and all(getattr(one, "by_row", None) is None for one in net.modules())


def test_a_name_that_the_engine_does_not_have_is_refused():
    net, adapters, _ = made("classic", 2)
    engine = Engine(net, TOKENIZER, adapters=adapters)
    with pytest.raises(UserError, match="adapter=other: the engine has no adapter of this name; there is low, mlp, wh"):
        engine.submit([BOS], SamplingParams(), adapter="other")
    with pytest.raises(UserError, match="there is none at all"):
        Engine(net, TOKENIZER).submit([BOS], SamplingParams(), adapter="low")
    assert not engine.has_work


def test_adapters_that_do_not_fit_are_refused():
    net, (_, adapters, _) = sharp_net("classic", 2), made("classic", 2)
    other = sharp_net("classic", 4)
    with pytest.raises(UserError, match=r"adapters: low does not fit its base: transformer.h.0.attn.c_k.lora_B is \("):
        Engine(other, TOKENIZER, adapters=adapters)
    with pytest.raises(UserError, match="adapters: low needs a model that Fathom has trained"):
        Engine(torch.nn.Linear(1, 1), TOKENIZER, adapters=adapters)
    add_adapter(net, LoRA(2))
    with pytest.raises(UserError, match="the base of low is still being trained"):
        Engine(net, TOKENIZER, adapters=adapters)
