"""Copy candidates in a network: formulas, causality, cached decoding, cut prefixes, keys, a training that goes on."""

import pytest
import torch
from conftest import compose
from model.test_copies import drawn
from model.test_gpt import COPIES, MODERN, config, naive_forward, random_net
from model.test_ngrams import goes_on

from llm.inference.inside import Recorder
from llm.model.cached_attention import SlotPass
from llm.model.config import GPTConfig, num_params
from llm.model.gpt import GPT
from llm.optim.build import build_optimizer
from llm.scaling.rules import model_config

BOS = 61


def network(seq_len: int = 48, **more) -> GPT:
    return random_net(config(depth=3, seq_len=seq_len, **MODERN | COPIES | more))


def test_forward_of_a_text_that_repeats_itself_equals_the_formulas():
    net, ids = network(), drawn(1, 40, most=3)[0]
    ids[[0, 21]] = BOS
    torch.testing.assert_close(net(ids[None])[0].double(), naive_forward(net, ids), atol=5e-5, rtol=2e-5)


def test_later_tokens_and_other_documents_change_no_logits():
    net, ids = network(window_pattern="L", bos_id=BOS), drawn(1, 40, most=3)
    ids[0, [0, 21]] = BOS
    with torch.no_grad():
        whole = net(ids)
        assert torch.allclose(net(ids[:, :30]), whole[:, :30], atol=1e-5)
        other = torch.cat((drawn(1, 21, seed=5, most=3), ids[:, 21:]), dim=1)
        assert torch.allclose(net(other)[:, 21:], whole[:, 21:], atol=1e-5)
        net.copies[0].scale.zero_()  # the candidates do reach the logits
        assert not torch.allclose(net(ids), whole, atol=1e-2)


def test_rows_of_other_lengths_decode_as_the_full_forward_says():
    net, ids, lengths = network(), drawn(3, 40, most=3), torch.tensor([3, 20, 11])
    ids[:, 0] = BOS
    with torch.no_grad():
        full, cache = net(ids), net.new_cache(4, 40)
        prompt = torch.where(torch.arange(20) < lengths.unsqueeze(1), ids[:, :20], 0)
        got = [net(prompt, cache=SlotPass(cache, 0, 3), lengths=lengths, last_only=True)[:, 0]]
        for step in range(20):
            cache.lengths[:3] = lengths + step
            new = ids.gather(1, (lengths + step).unsqueeze(1))
            got.append(net(new, cache=SlotPass(cache, 0, 3))[:, 0])
            if step == 9:
                cache.resize(5, 44)
    for step, logits in enumerate(got):
        want = torch.stack([full[row, lengths[row] - 1 + step] for row in range(3)])
        torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n_new", [1, 6])
def test_rows_behind_a_cut_prefix_and_continuations_find_what_stands_in_it(n_new):
    net, ids = network(window_pattern="L"), drawn(1, 30, most=3)
    with torch.no_grad():
        full, cache = net(ids), net.new_cache(2, 30)
        net(ids[:, :20], cache=SlotPass(cache, 0, 1))
        cache.lengths[0] = 20
        cache.start(1, cache.snapshot(0).cut(15, net.smear_input(ids[0, 14]), cache.last_of(ids[0, :15].tolist())))
        got = net(ids[:, 15 : 15 + n_new], cache=SlotPass(cache, 1, 1))
        torch.testing.assert_close(got, full[:, 15 : 15 + n_new], atol=1e-5, rtol=1e-5)
        rest = torch.cat((ids[:, 20 : 20 + n_new], drawn(1, n_new, seed=7)))
        hidden = net.continue_prefixes(ids[:, :20], torch.tensor([20]), 2, rest)
        for row in range(2):
            want = net.hidden(torch.cat((ids[:, :20], rest[row : row + 1]), dim=1))[0, 19:]
            torch.testing.assert_close(hidden[row], want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(net(ids, cache=Recorder(net)), full, atol=1e-5, rtol=1e-5)


def test_keys_of_the_architecture_and_of_the_optimizer_make_and_train_them():
    def made(*lines):
        cfg = compose("train", "model=d2", *lines)
        return model_config(cfg.model, cfg.arch, 300), cfg.optim

    assert made()[0].copy_bos is None and not made()[0].copy_candidate and "copies" not in num_params(made()[0])
    shape, keys = made("arch.copy_candidate=true", "optim.copy_lr=0.7")
    assert shape.copy_bos == 291 and num_params(shape)["copies"] == 2 * 8 * 129
    assert GPTConfig.from_dict(shape.to_dict()) == shape
    net = GPT(shape).init_weights(0)
    assert sum(p.numel() for p in net.parameters()) == num_params(shape)["total"]
    plain = GPT(made()[0]).init_weights(0)  # at first nothing is added
    ids = drawn(1, 20)
    assert torch.equal(net(ids), plain(ids))
    (group,) = (group for group in build_optimizer(net, keys).param_groups if group["name"] == "copies")
    assert group["lr"] == 0.7 and group["weight_decay"] == 0 and len(group["params"]) == 4


def test_a_training_that_goes_on_from_a_saved_state_is_equal_bit_by_bit():
    net = goes_on(lambda: GPT(config(depth=2, **MODERN, **COPIES)).init_weights(0), drawn(2, 21, most=9))
    assert all(p.any() for p in net.copies.parameters())


def test_a_text_that_repeats_itself_is_learnt_sooner():
    """Rows of drawn ids that come twice: what the second half holds nothing but a copy can know."""

    def loss(**more) -> float:
        torch.manual_seed(0)
        net = GPT(config(depth=1, seq_len=48, vocab=70, arch="modern", **more)).init_weights(0)
        optimizer = build_optimizer(net, compose("train").optim)
        for step in range(25):
            half = drawn(8, 20, seed=step, most=60)
            ids = torch.cat((half, half), dim=1)
            found = net(ids[:, :-1], ids[:, 1:], reduction="none")[:, 20:].mean()
            found.backward()
            optimizer.step()
            optimizer.zero_grad()
        return found.item()

    assert loss(**COPIES) < loss() - 1
