"""Muon and AdamW against torch's optimizers and float64."""

import pytest
import torch
from conftest import compose

from llm.errors import UserError
from llm.model.gpt import GPT
from llm.optim import GroupOptimizer, optimizer
from llm.optim.build import build_optimizer
from llm.optim.muon_adamw import COEFFICIENTS, POLAR_EXPRESS, orthogonalize, row_factors, row_mean_square
from llm.scaling.rules import model_config

# A group of plain Muon as Keller Jordan published it: every switch off.
PLAIN_MUON = {"kind": "muon", "momentum": 0.95, "ns_steps": 5, "orthogonalizer": "newton_schulz", "in_bf16": False}
PLAIN_MUON |= {"row_normalize": False, "normuon_beta2": None, "renormalize": False, "cautious": False}
PLAIN_MUON |= {"norm_margin": None, "coupled_decay": False}


def grads_for(params, seed):
    g = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=g)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_torch(weight_decay):
    shapes = [(7, 5), (12,)]
    ours = [torch.nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(1))) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    hyper = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": weight_decay}
    a, b = GroupOptimizer([{"kind": "adamw", "params": ours, **hyper}]), torch.optim.AdamW(theirs, **hyper)
    for step in range(20):
        grads_for(ours, step)
        grads_for(theirs, step)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_muon_equals_torch(shape):
    """torch's Muon orthogonalises in bf16 and each matrix alone; ours in fp32 and stacked."""
    ours = [torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(s))) for s in range(3)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = GroupOptimizer([PLAIN_MUON | {"params": ours, "lr": 0.02, "weight_decay": 0.1}])
    b = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, ns_steps=5, weight_decay=0.1, adjust_lr_fn="original")
    for step in range(10):
        grads_for(ours, step)
        grads_for(theirs, step)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert (p - q).norm() / (10 * 0.02 * min(shape) ** 0.5) < 0.03  # relative to the distance travelled


def test_orthogonalize_equals_a_float64_loop():
    x = torch.randn(5, 12, 20, generator=torch.Generator().manual_seed(0))
    for x_in in (x, x.mT.contiguous()):
        for got, g in zip(orthogonalize(x_in), x_in.double(), strict=True):
            tall = g.shape[0] > g.shape[1]
            y = (g.T if tall else g) / (g.norm() + 1e-7)
            for _ in range(5):
                s = y @ y.T
                y = 3.4445 * y + (-4.7750 * s + 2.0315 * s @ s) @ y
            torch.testing.assert_close(got.double(), y.T if tall else y, atol=1e-4, rtol=1e-4)
        singular = torch.linalg.svdvals(orthogonalize(x_in))
        assert singular.min() > 0.6 and singular.max() < 1.3


def test_polar_express_equals_a_float64_loop_and_is_closer_to_orthogonal():
    g = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    y = g.double() / (g.double().norm() * 1.01 + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        s = y @ y.T
        y = a * y + (b * s + c * s @ s) @ y
    got = orthogonalize(g[None], 5, "polar_express")[0]
    torch.testing.assert_close(got.double(), y, atol=1e-4, rtol=1e-4)
    exact = torch.linalg.svd(g, full_matrices=False)
    error = {m: (orthogonalize(g[None], 5, m)[0] - exact.U @ exact.Vh).norm() for m in COEFFICIENTS}
    assert error["polar_express"] < 0.6 * error["newton_schulz"]


def test_products_are_in_bf16_where_the_network_computes_in_it():
    net, config = arch_net("modern"), compose("train", "optim=muon_adamw").optim
    assert not build_optimizer(net, config).param_groups[-1]["in_bf16"]
    net.compute_dtype = torch.bfloat16
    assert build_optimizer(net, config).param_groups[-1]["in_bf16"]
    g = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    exact, rounded = orthogonalize(g[None]), orthogonalize(g[None], dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16 and 0 < (exact - rounded).norm() < 0.05 * exact.norm()


def test_normuon_keeps_the_norm_and_evens_out_rows():
    u = torch.randn(2, 8, 4) * torch.tensor([1.0, 10.0] * 4)[:, None]
    out = u * row_factors(row_mean_square(u), torch.zeros(2, 8, 1), 0.0)
    torch.testing.assert_close(out.norm(dim=(1, 2)), u.norm(dim=(1, 2)))
    rows = out.norm(dim=2)
    torch.testing.assert_close(rows, rows.mean(1, keepdim=True).expand_as(rows))


def test_the_size_of_a_stack_changes_nothing(monkeypatch):
    results = []
    for size in (1, 1 << 30):
        monkeypatch.setitem(optimizer.STACK_BYTES, "cpu", size)
        net = arch_net("modern")
        opt = build_optimizer(net, compose("train", "optim=muon_adamw").optim)
        for step in range(3):
            grads_for(net.parameters(), step)
            opt.step()
        results.append(list(net.parameters()))
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("in_bf16", [False, True])
def test_cautious_decay_spares_weights_that_the_update_grows(in_bf16):
    p = torch.nn.Parameter(torch.tensor([[1.0, -1.0], [1.0, -1.0]]))
    before, p.grad = p.detach().clone(), torch.tensor([[1.0, 1.0], [0.5, -0.7]])
    still = GroupOptimizer([PLAIN_MUON | {"params": [p], "lr": 0.1, "in_bf16": in_bf16}])
    still.step()
    update = before - p.detach()
    q = torch.nn.Parameter(before.clone())
    q.grad = p.grad
    muon = {"params": [q], "lr": 0.1, "weight_decay": 0.5, "cautious": True, "in_bf16": in_bf16}
    GroupOptimizer([PLAIN_MUON | muon]).step()
    torch.testing.assert_close(p.detach() - q.detach(), 0.05 * before * ((update * before) >= 0))


def test_muon_refuses_vectors():
    with pytest.raises(UserError, match="2-D"):
        GroupOptimizer([PLAIN_MUON | {"params": [torch.nn.Parameter(torch.zeros(3))], "lr": 0.1}])


def arch_net(arch: str) -> GPT:
    """Width 32, all features of the architecture."""
    model = {"depth": 2, "aspect_ratio": 16, "head_dim": 16, "n_kv_head": None, "seq_len": 8}
    return GPT(model_config(model, compose("train", f"arch={arch}").arch, 70)).init_weights(0)


@pytest.mark.parametrize("option", ["muon_2025", "muon_2026_02", "muon_adamw", "adamw"])
@pytest.mark.parametrize("arch", ["classic", "modern", "gpt2"])
def test_groups_cover_every_parameter_once(option, arch):
    net = arch_net(arch)
    groups = build_optimizer(net, compose("train", f"optim={option}").optim).param_groups
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in net.parameters())
    matrices = {id(p) for p in net.transformer.h.parameters() if p.ndim == 2}
    decayed = {id(p) for g in groups if g["decays"] for p in g["params"]}
    assert decayed == matrices


def test_rates_are_the_references():
    width = (32 / 768) ** -0.5
    groups = build_optimizer(arch_net("classic"), compose("train", "optim=muon_2025").optim, lr_scale=0.5).param_groups
    assert [g["lr"] for g in groups] == pytest.approx([0.002 * width, 0.1 * width, 0.01])
    assert [g["kind"] for g in groups] == ["adamw", "adamw", "muon"]
    groups = build_optimizer(arch_net("modern"), compose("train", "optim=muon_adamw").optim, 1.0, 2.0).param_groups
    rates = [0.008 * width, 0.3 * width, 0.15 * width, 0.005, 0.5, 0.2, 0.02]
    assert [g["lr"] for g in groups] == pytest.approx(rates)
    assert [g["weight_decay"] for g in groups] == pytest.approx([0.01, 0.001, 0.01, 0.05, 0.0, 0.0, 0.56])
    betas = [(0.8, 0.96), (0.8, 0.995), (0.8, 0.995), (0.8, 0.95), (0.96, 0.95), (0.8, 0.95)]
    assert [g["betas"] for g in groups[:-1]] == betas


@pytest.mark.parametrize("option", ["muon_2025", "muon_adamw", "adamw"])
def test_state_survives_a_round_trip(option):
    """Two steps, save, load into a new optimizer, third step: bit for bit as without the break."""

    def run(break_at: int | None):
        net = arch_net("modern")
        config = compose("train", f"optim={option}").optim
        opt = build_optimizer(net, config)
        for step in range(3):
            if step == break_at:
                state = opt.state_dict()
                opt = build_optimizer(net, config)
                assert all(v.dtype == torch.float32 for s in state["state"].values() for v in s.values())
                opt.load_state_dict(state)
            grads_for(net.parameters(), step)
            opt.step()
        return net

    for a, b in zip(run(None).parameters(), run(2).parameters(), strict=True):
        assert torch.equal(a, b)
