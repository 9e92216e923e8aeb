"""Offset of keys: the formula by loops, prefixes that are cut, a pass that is looked into."""

import pytest
import torch
from model.test_gpt import config, random_net

from llm.inference.inside import Recorder
from llm.model.attention import offset_keys, places_in_documents
from llm.model.cached_attention import SlotPass


def test_slow_channels_come_from_the_token_before():
    k, before = torch.randn(2, 5, 3, 8), torch.randn(2, 1, 3, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    want = k.clone()
    for row in range(2):
        for t in range(5):
            if positions[row, t]:
                for channel in (2, 3, 6, 7):
                    want[row, t, :, channel] = (k[row, t - 1] if t else before[row, 0])[:, channel]
    assert torch.equal(offset_keys(k, before, positions), want)
    assert torch.equal(offset_keys(k)[0], want[0])
    assert torch.equal(offset_keys(k)[1, 0], k[1, 0])


def test_places_are_counted_from_the_start_of_a_document():
    starts = torch.tensor([[1, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0]]).bool()
    assert places_in_documents(starts).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 3]]


def test_a_pass_that_is_looked_into_offsets_keys_too():
    net = random_net(config(depth=2, key_offset=True))
    ids = torch.randint(0, 70, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(net(ids, cache=Recorder(net)), net(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("n", "qk_dim"), [(3, None), (9, None), (3, 8), (9, 8)])
def test_rows_behind_a_cut_prefix_have_the_keys_in_front_of_them(n, qk_dim):
    """Keeps the keys of a prefix's last tokens as before their offset; those of earlier ones are found in its keys."""
    short = {"window_pattern": "LSL", "window_multiple": None}
    net = random_net(config(depth=3, seq_len=32, key_offset=True, qk_dim=qk_dim, **short))
    assert net.windows == [None, 8, None]
    ids = torch.randint(0, 70, (1, 14), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        cache = net.new_cache(2, 16)
        net(ids[:, :9], cache=SlotPass(cache, 0, 1))
        cache.lengths[0] = 9
        cache.start(1, cache.snapshot(0).cut(n, None))
        got = net(ids[:, n:], cache=SlotPass(cache, 1, 1))
        torch.testing.assert_close(got, net(ids)[:, n:], atol=1e-5, rtol=1e-5)
