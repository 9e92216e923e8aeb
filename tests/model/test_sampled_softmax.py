"""Sampled softmax: what a sample holds, and loss and gradients against a naive form in float64."""

import math

import pytest
import torch

from llm.model.cross_entropy import linear_cross_entropy
from llm.model.sampled_softmax import sample_vocabulary, sampled_head, sweep_stride

VOCAB, PADDED, WIDTH = 300, 320, 12


def drawn(tokens=(3, 20), high=VOCAB):
    """Return targets, a third of them ignored."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, high, tokens, generator=generator)
    targets[torch.rand(tokens, generator=generator) < 0.3] = -1
    return targets


def naive_sample(targets: list[int], share: float, step: int) -> set[int]:
    size = math.ceil(share * VOCAB / 64) * 64
    found, i = set(targets) - {-1}, step * size
    while len(found) < size:
        found.add(i * sweep_stride(VOCAB) % VOCAB)
        i += 1
    return found


@pytest.mark.parametrize("step", [0, 1, 7])
def test_a_sample_holds_all_targets_and_negatives_of_the_sweep(step):
    targets = drawn()
    ids = sample_vocabulary(targets, VOCAB, 0.3, step)
    assert len(ids) == len(set(ids.tolist())) == 128
    assert set(ids.tolist()) == naive_sample(targets.flatten().tolist(), 0.3, step)


def test_the_sweep_comes_to_every_token():
    assert all(math.gcd(sweep_stride(size), size) == 1 for size in (1, 2, 3, 70, 256, 8192, 50_257))
    none = torch.full((4,), -1)
    seen = torch.cat([sample_vocabulary(none, VOCAB, 0.2, step) for step in range(5)]).bincount(minlength=VOCAB)
    assert seen.min() >= 1 and seen.max() <= 2


def test_a_sample_doubles_until_the_targets_fit_or_it_is_whole():
    targets = torch.arange(100)
    assert len(sample_vocabulary(targets, VOCAB, 0.01, 3)) == 128
    assert sample_vocabulary(torch.arange(260), VOCAB, 0.01, 3) is None
    assert sample_vocabulary(targets, VOCAB, 0.99, 3) is None


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("cap", [15.0, None])
def test_loss_and_gradients_are_those_of_float64(cap, weighted):
    generator, targets = torch.Generator().manual_seed(1), drawn()
    hidden = torch.randn(*targets.shape, WIDTH, generator=generator).requires_grad_()
    weight = torch.randn(PADDED, WIDTH, generator=generator).requires_grad_()
    factors = torch.rand(targets.shape, generator=generator) if weighted else None
    ids = sample_vocabulary(targets, VOCAB, 0.3, 2)
    loss = linear_cross_entropy(hidden, *sampled_head(weight, targets, ids), cap, factors)
    exact, sample = 0.0, sorted(naive_sample(targets.flatten().tolist(), 0.3, 2))
    for at in (targets >= 0).nonzero().tolist():
        z = weight.double()[sample] @ hidden.double()[tuple(at)]
        z = z if cap is None else cap * torch.tanh(z / cap)
        nats = z.exp().sum().log() - z[sample.index(targets[tuple(at)].item())]
        exact = exact + nats * (1.0 if factors is None else factors[tuple(at)].double())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-5)
    ours, naive = (torch.autograd.grad(x * 0.5, (hidden, weight)) for x in (loss, exact))
    for a, b in zip(ours, naive, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    outside = sorted(set(range(PADDED)) - set(sample))
    assert not ours[1][outside].any()
