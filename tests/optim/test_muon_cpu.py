"""The C++ kernel of Muon's passes: each against float64, whole steps against torch, any number of threads and stack."""

import pytest
import torch

from llm.optim import muon_cpu
from llm.optim.muon_adamw import muon_apply, muon_state, muon_step
from llm.optim.muon_switches import SWITCHES

pytestmark = pytest.mark.skipif(muon_cpu.load() is None, reason="the kernel cannot be compiled here")

SHAPES = [(1, 1), (5, 37), (37, 5), (40, 300), (64, 64)]


def drawn(rows: int, cols: int, n: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * cols)
    return [torch.randn(rows, cols, generator=generator) for _ in range(n)]


def group(**changed) -> dict:
    own = {"momentum": 0.95, "ns_steps": 5, "orthogonalizer": "polar_express", "norm_margin": None, "in_bf16": False}
    own |= {"row_normalize": True, "normuon_beta2": 0.9, "renormalize": True, "cautious": True, "coupled_decay": True}
    return own | {"lr": 0.02, "weight_decay": 0.3} | SWITCHES | changed


def steps_of(group: dict, rows: int, cols: int, threads: int = 1, steps: int = 3) -> list[torch.Tensor]:
    """Return weights, momenta and second moments of three matrices after some steps with fixed gradients."""
    params, states = drawn(rows, cols), [muon_state(group, p) for p in drawn(rows, cols)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for grads in torch.randn(steps, 3, rows, cols, generator=torch.Generator().manual_seed(1)):
            muon_apply(group | {"shape": (rows, cols)}, params, muon_step(group, list(grads), states))
    finally:
        torch.set_num_threads(before)
    return [*params, *[value for state in states for value in state.values()]]


def check_look_ahead(kernels, shape: tuple[int, int], dtype: torch.dtype, rtol: float) -> None:
    """Compare momentum and rows of length 1 with float64; `rtol` is of the rows."""
    grads, buffers = drawn(*shape), drawn(*shape)[::-1]
    grads[1][0] = 0.0
    buffers[1][0] = 0.0  # a row of nothing stays one
    averages = [torch.lerp(b.double(), g.double(), 0.1) for b, g in zip(buffers, grads, strict=True)]
    ahead = torch.stack([torch.lerp(g.double(), a, 0.9) for g, a in zip(grads, averages, strict=True)])
    want = ahead / (ahead.norm(dim=-1, keepdim=True).clamp_min(1e-10) * 7.0)
    found = kernels.look_ahead(grads, buffers, 0.9, 7.0, dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), want, rtol=rtol, atol=1e-7)
    torch.testing.assert_close(torch.stack(buffers).double(), torch.stack(averages), rtol=1e-5, atol=1e-6)


def check_mean_squares_and_scaling(kernels, shape: tuple[int, int], dtype: torch.dtype, of_rows: bool) -> None:
    """Compare mean squares of rows or columns, and the stack times them, with float64."""
    update = torch.stack(drawn(*shape)).to(dtype)
    means = update.double().square().mean(dim=-1 if of_rows else -2, keepdim=True)
    found = kernels.row_mean_square(update, of_rows)
    torch.testing.assert_close(found.double(), means, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(kernels.scaled(update, found), update.float() * found, rtol=0, atol=0)


def check_cautious_decay(kernels, shape: tuple[int, int]) -> None:
    """Compare weights behind a step with cautious decay with float64."""
    params, step = drawn(*shape), torch.stack(drawn(*shape)[::-1])
    step[0, 0, 0] = 0.0  # a number that is not moved decays
    weights = torch.stack(params).double()
    want = weights + step.double() - 0.1 * weights * (step.double() * weights <= 0)
    kernels.apply(params, step, 0.1)
    torch.testing.assert_close(torch.stack(params).double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_momentum_and_rows_are_those_of_float64(shape, dtype):
    check_look_ahead(muon_cpu, shape, dtype, 4e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_rows", [True, False])
def test_mean_squares_and_scaling_are_those_of_float64(shape, dtype, of_rows):
    check_mean_squares_and_scaling(muon_cpu, shape, dtype, of_rows)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cautious_decay_is_that_of_float64(shape):
    check_cautious_decay(muon_cpu, shape)


@pytest.mark.parametrize("shape", [(5, 37), (37, 5), (64, 64)])
@pytest.mark.parametrize("changed", [{}, {"cautious": False}, {"renormalize": False}, {"normuon_rows": True}])
def test_a_step_is_that_of_torch(shape, changed, monkeypatch):
    ours = steps_of(group(**changed), *shape)
    monkeypatch.setattr(muon_cpu, "computes", lambda *_: False)
    for found, want in zip(ours, steps_of(group(**changed), *shape), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_neither_threads_nor_the_stack_change_a_bit():
    one = steps_of(group(in_bf16=True), 48, 80)
    assert all(torch.equal(a, b) for a, b in zip(one, steps_of(group(in_bf16=True), 48, 80, threads=3), strict=True))
    grads = drawn(48, 80)
    whole = muon_cpu.look_ahead(grads, drawn(48, 80), 0.9, 7.0, torch.float32)
    alone = [muon_cpu.look_ahead([g], [b], 0.9, 7.0, torch.float32) for g, b in zip(grads, drawn(48, 80), strict=True)]
    assert torch.equal(whole, torch.cat(alone))


def test_what_the_kernel_does_not_take_goes_to_torch():
    weights = torch.randn(8, 8)
    assert muon_cpu.computes([weights])
    assert not muon_cpu.computes([weights, weights.double()])
    assert not muon_cpu.computes([weights.mT])
    assert not muon_cpu.computes([weights.bfloat16()])
    assert not muon_cpu.computes([torch.empty(8, 8, device="meta")])
