"""The sampling kernel against the definition in `llm.inference.sampling`."""

import itertools

import pytest
import torch

from llm.inference import sample_cpu
from llm.inference.sample_cpu import sample_rows
from llm.inference.sampling import BROKEN, SamplingParams, sample

pytestmark = pytest.mark.skipif(not sample_cpu.is_available(), reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def definition_is_torch(monkeypatch):
    """Let `sample` compute with torch, so that it can tell whether the kernel is right."""
    monkeypatch.setattr(sample_cpu, "is_available", lambda: False)


def rows_of(n: int, temperature: float, top_k: int, top_p: float, min_p: float = 0.0) -> tuple[torch.Tensor, ...]:
    """Return settings of one caller as they are for n rows."""
    shares = (torch.full((n,), share, dtype=torch.float64) for share in (top_p, min_p))
    return torch.full((n,), temperature), torch.full((n,), top_k), *shares


def hard_logits(vocab: int, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Return random logits (16, vocab), some rows of which are no distribution or a narrow one."""
    logits = scale * torch.randn(16, vocab, generator=generator)
    logits[1, vocab // 2] = float("nan")
    logits[2, 0] = float("inf")
    logits[3] = -float("inf")
    logits[4, : vocab // 2] = -float("inf")
    logits[5] -= 1000.0
    logits[6, -1] = 300.0
    return logits


@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 257, 1000, 4096])
def test_the_kernel_draws_the_ids_of_the_definition(vocab):
    generator = torch.Generator().manual_seed(vocab)
    cuts = (0, 1, 7, 64, 500), (1.0, 0.99, 0.9, 0.5, 1e-3), (0.0, 0.1)
    for scale, temperature, top_k, top_p, min_p in itertools.product((0.3, 6.0), (0.0, 0.3, 1.0, 2.0), *cuts):
        logits = hard_logits(vocab, scale, generator)
        draws = torch.rand(16, dtype=torch.float64, generator=generator)
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        expected = sample(logits, params, draws)
        ids = sample_rows(logits, *rows_of(16, temperature, top_k, top_p, min_p), draws)
        differs = ids != expected  # only where two tokens are equally likely, which sorting may put in any order
        assert top_k or top_p < 1 or not differs.any()
        assert torch.equal(logits[differs, ids[differs]], logits[differs, expected[differs]])
        assert ids[1:4].tolist() == expected[1:4].tolist() == [BROKEN] * 3


def test_each_row_has_settings_of_its_own():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 500, generator=generator)
    settings = ((0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 20, 1.0), (1.5, 0, 0.8))
    temperature, top_k, top_p = map(list, zip(*settings, strict=True))
    draws = torch.rand(4, dtype=torch.float64, generator=generator)
    shares = torch.tensor(top_p, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    ids = sample_rows(logits, torch.tensor(temperature), torch.tensor(top_k), *shares, draws)
    for row, (t, k, p) in enumerate(settings):
        params = SamplingParams(temperature=t, top_k=k, top_p=p)
        assert ids[row] == sample(logits[row : row + 1], params, draws[row : row + 1])[0]


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (40, 1.0), (0, 0.9)])
def test_equal_logits_are_drawn_equally_often(top_k, top_p):
    logits = torch.zeros(1, 100)
    draws = torch.arange(0, 1, 1 / 400, dtype=torch.float64)
    ids = torch.cat([sample_rows(logits, *rows_of(1, 1.0, top_k, top_p), draw[None]) for draw in draws])
    counts = ids.bincount(minlength=100)
    kept = top_k or round(100 * top_p)
    assert counts.count_nonzero() in (kept, kept + 1) and counts.max() - counts[counts > 1].min() <= 11


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (3, 1.0), (0, 0.95)])
def test_the_ends_of_the_draws_give_tokens_that_can_be_drawn(top_k, top_p):
    logits = torch.full((2, 130), -float("inf"))
    logits[:, 10:13] = 0.0
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample_rows(logits, *rows_of(2, 1.0, top_k, top_p), ends).tolist() == [10, 12]


def test_logits_of_a_wider_table_are_read_row_by_row():
    generator = torch.Generator().manual_seed(0)
    logits, draws = torch.randn(5, 90, generator=generator), torch.rand(5, dtype=torch.float64, generator=generator)
    settings = rows_of(5, 1.0, 0, 1.0)
    assert torch.equal(
        sample_rows(logits[:, :70], *settings, draws), sample_rows(logits[:, :70].clone(), *settings, draws)
    )


@pytest.mark.parametrize("name, place", [("temperature", 1), ("top_k", 2), ("top_p", 3), ("min_p", 4), ("draws", 5)])
def test_settings_of_another_shape_or_dtype_are_refused(name, place):
    given = [torch.randn(3, 9), *rows_of(3, 1.0, 0, 1.0), torch.rand(3, dtype=torch.float64)]
    for wrong in (given[place][:2], given[place].to(torch.int32)):
        with pytest.raises(ValueError, match=name):
            sample_rows(*given[:place], wrong, *given[place + 1 :])


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (50, 1.0), (0, 0.9), (50, 0.6)])
def test_min_p_leaves_what_is_likely_enough_beside_the_best(top_k, top_p):
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    weights = torch.softmax(logits, -1)[0]
    order = weights.argsort(descending=True)[: top_k or 300]
    share = weights[order].double() / weights[order].double().sum()
    may = order[(share.cumsum(0) - share < top_p) & (weights[order] >= 0.2 * weights.max())]
    draws = torch.linspace(0, 0.9999, 500, dtype=torch.float64)
    settings = rows_of(500, 1.0, top_k, top_p, 0.2)
    ids = sample_rows(logits.expand(500, -1), *settings, draws)
    assert set(ids.tolist()) == set(may.tolist())
    counts = ids.bincount(minlength=300)[may] / 500
    torch.testing.assert_close(counts, weights[may] / weights[may].sum(), atol=0.005, rtol=0)


def test_the_last_possible_draw_gives_a_token():
    logits = torch.randn(64, 5003, generator=torch.Generator().manual_seed(0))
    draws = torch.full((64,), 1 - 2**-53, dtype=torch.float64)
    found = sample_rows(logits, *rows_of(64, 1.0, 0, 0.95, 0.05), draws)
    assert (found != BROKEN).all() and logits.gather(1, found.unsqueeze(1)).min() > 0
