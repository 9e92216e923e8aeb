"""Recorded decode steps, on a CPU, where "recorded" is the plain call on the same buffers."""

import random

import pytest
import torch
from test_batches import ARCHS, check, run, sharp_net
from test_engine import BOS, TOKENIZER

from llm.inference import step_graph
from llm.inference.engine import Engine
from llm.inference.sampling import SamplingParams
from llm.inference.step_graph import StepGraphs, bucket, plain_step
from llm.model import cached_attention
from llm.model.cached_attention import SlotPass, StepPass
from llm.model.kv_cache import SlotCache

VOCAB = TOKENIZER.vocab_size


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """Record every size at once, on this CPU, without our own kernel."""
    monkeypatch.setattr("llm.inference.slot_batch.DecodeStep.for_net", lambda net: None)
    monkeypatch.setattr("llm.inference.slot_batch.shares_texts", lambda device: False)
    monkeypatch.setattr("llm.inference.slot_batch.is_used", lambda device: True)
    monkeypatch.setattr(step_graph, "RECORD_AFTER", 1)
    monkeypatch.setattr(step_graph, "REACHES", (16, 1))


def filled(net, lengths: list[int], rows: int) -> SlotCache:
    """A cache of `rows` rows of 64 places, of which the first have read drawn texts of these lengths."""
    cache, draw = net.new_cache(rows, 64), torch.Generator().manual_seed(0)
    for row, n in enumerate(lengths):
        ids = torch.randint(0, 256, (1, n), generator=draw)
        net(ids, cache=SlotPass(cache, row, 1), last_only=True)
        cache.lengths[row] = n
    return cache


def copied(net, cache: SlotCache) -> SlotCache:
    """A cache that holds what another one does."""
    other = net.new_cache(cache.rows, cache.room)
    for new, old in zip(other.parts, cache.parts, strict=True):
        new.k.copy_(old.k), new.v.copy_(old.v)
    other.lengths.copy_(cache.lengths)
    if cache.last_embed is not None:
        other.last_embed.copy_(cache.last_embed)
    if cache.last_ids is not None:
        other.last_ids.copy_(cache.last_ids)
    if cache.last_keys is not None:
        other.last_keys.copy_(cache.last_keys)
    return other


def test_sizes_are_powers_of_two_within_the_cache():
    cache = sharp_net("classic", 4).new_cache(64, 80)
    found = [bucket(n, longest, cache) for n, longest in ((1, 1), (2, 16), (3, 17), (5, 33), (33, 65), (64, 80))]
    assert found == [(1, 16), (2, 16), (4, 32), (8, 64), (64, 80), (64, 80)]


@pytest.mark.parametrize("arch", ARCHS)
@torch.inference_mode()
def test_a_recorded_step_is_the_plain_step_and_changes_no_row_that_only_fills_the_batch(arch):
    net = sharp_net(arch, 2, window=8)
    cache = filled(net, [5, 30, 12, 20], 8)  # the fourth row is being read
    plain, graphs = copied(net, cache), StepGraphs(net)
    for _ in range(12):
        newest = torch.randint(0, 256, (3,))
        torch.testing.assert_close(graphs.step(cache, newest), plain_step(net, plain, newest), atol=1e-4, rtol=1e-4)
        for one in (cache, plain):
            one.lengths[:3] += 1
    assert set(graphs.recorded) == {(4, 32), (4, 64)}
    assert cache.last_embed is None or torch.equal(cache.last_embed[3], plain.last_embed[3])
    assert cache.last_ids is None or torch.equal(cache.last_ids[:4], plain.last_ids[:4])
    assert cache.last_keys is None or torch.equal(cache.last_keys[3], plain.last_keys[3])
    ids = torch.tensor([[7]])
    rest = (net(ids, cache=SlotPass(one, 3, 1), last_only=True) for one in (cache, plain))
    torch.testing.assert_close(*rest, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_rows_that_join_and_leave_use_the_step_of_their_number():
    net, draw = sharp_net("modern", 4, window=16), random.Random(0)
    engine = Engine(net, TOKENIZER, max_rows=8, frozen=True)
    first = [engine.submit([BOS, *draw.choices(range(256), k=9)], SamplingParams(0.0, max_new_tokens=30))]
    for n in (1, 3):
        for _ in range(4):
            engine.step()
        first += [
            engine.submit([BOS, *draw.choices(range(256), k=9)], SamplingParams(0.0, max_new_tokens=12 + 4 * i))
            for i in range(n)
        ]
    sizes = set()
    while engine.has_work:
        engine.step()
        sizes |= set(engine._batch.graphs.recorded)
    assert {1, 2, 4, 8} <= {rows for rows, _ in sizes}
    for request in first:
        check(net, request)


@torch.inference_mode()
def test_a_step_looks_at_no_number_on_the_device():
    """Tensors of the meta device have no numbers: whoever asks for one gets an error."""
    net = sharp_net("modern", 2, window=8)
    cache = filled(net, [3], 4)
    net.to("meta")
    for part in cache.parts:
        part.k, part.v = part.k.to("meta"), part.v.to("meta")
    cache.last_embed = cache.last_embed.to("meta")
    lengths, live = torch.zeros(4, dtype=torch.long, device="meta"), torch.zeros((), dtype=torch.long, device="meta")
    ids = torch.zeros(4, 1, dtype=torch.long, device="meta")
    assert net(ids, cache=StepPass(cache, lengths, live, 16, "sdpa"), last_only=True).shape == (4, 1, VOCAB)


@torch.inference_mode()
def test_torch_can_compile_a_step_as_one_graph(monkeypatch):
    net = sharp_net("modern", 2, window=8)
    compile_whole = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, dynamic: compile_whole(f, dynamic=dynamic, fullgraph=True, backend="eager")
    )
    cache = filled(net, [3, 9], 2)
    plain, graphs = copied(net, cache), StepGraphs(net, compiles=True)
    newest = torch.tensor([4, 5])
    torch.testing.assert_close(graphs.step(cache, newest), plain_step(net, plain, newest), atol=1e-4, rtol=1e-4)
    assert graphs.recorded


@pytest.mark.parametrize("failure", ["wrong numbers", "no recording"])
def test_a_step_that_fails_its_check_is_not_used_and_harms_nothing(failure, monkeypatch, capsys):
    attend = StepPass.attend

    def broken(self, layer, q, *more):
        if failure == "no recording":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return attend(self, layer, q, *more) + 0.1

    monkeypatch.setattr(StepPass, "attend", broken)
    net = sharp_net("modern", 4, window=8)
    engine = Engine(net, TOKENIZER, frozen=True)
    requests = [engine.submit([BOS, 1, i], SamplingParams(0.0, max_new_tokens=20)) for i in range(3)]
    run(engine)
    for request in requests:
        check(net, request)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("CUDA graphs: not with sdpa attention (")
    assert not engine._batch.graphs.recorded


@torch.inference_mode()
def test_flash_attention_is_told_how_many_places_count(monkeypatch, capsys):
    asked = []

    def reference(q, k, v, cache_seqlens, softmax_scale, causal):
        asked.append((tuple(k.shape[:2]), cache_seqlens.dtype, cache_seqlens.tolist()))
        seen = torch.arange(k.size(1)) < cache_seqlens.unsqueeze(1)
        y = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), seen[:, None, None], scale=softmax_scale, enable_gqa=True
        )
        return y.transpose(1, 2), None

    monkeypatch.setattr(cached_attention, "flash_with_cache", lambda: reference)
    monkeypatch.setattr(step_graph, "ways", lambda *options: ["flash", "sdpa"])
    net = sharp_net("modern", 2, window=8)
    cache = filled(net, [5, 20], 2)
    plain, newest = copied(net, cache), torch.tensor([4, 5])
    logits = StepGraphs(net).step(cache, newest)
    torch.testing.assert_close(logits, plain_step(net, plain, newest), atol=1e-4, rtol=1e-4)
    assert asked == [((2, 9), torch.int32, [6, 9])] * 2 + [((2, 32), torch.int32, [6, 21])]
    assert not capsys.readouterr().err


@torch.inference_mode()
def test_short_jobs_record_nothing(monkeypatch):
    monkeypatch.setattr(step_graph, "RECORD_AFTER", 4)
    net = sharp_net("classic", 4)
    cache, graphs = filled(net, [3], 1), StepGraphs(net)
    found = []
    for _ in range(5):
        graphs.step(cache, torch.tensor([1]))
        cache.lengths += 1
        found.append(len(graphs.recorded))
    assert found == [0, 0, 0, 1, 1]
    cache.resize(2, 64)
    graphs.step(cache, torch.tensor([1]))
    assert list(graphs.recorded) == [(1, 16)], "what was recorded over the old buffers is gone"


def test_a_cache_with_spare_places_is_refused():
    net = sharp_net("classic", 4, window=8)
    lengths = torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="spare=1"):
        StepPass(net.new_cache(1, 64, spare=2), lengths, lengths.sum(), 16, "sdpa")
