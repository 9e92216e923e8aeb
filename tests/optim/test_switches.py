"""Switches of Muon: each against naive loops in float64, off is as without them, and what does not go together."""

from functools import cache

import numpy as np
import pytest
import torch
from conftest import compose
from test_muon_adamw import PLAIN_MUON, arch_net, grads_for

from llm.config.registries import UPDATE_RULES
from llm.errors import UserError
from llm.optim import GroupOptimizer
from llm.optim.build import build_optimizer
from llm.optim.muon_adamw import NEWTON_SCHULZ
from llm.optim.muon_switches import SWITCHES
from llm.optim.schedules import lr_multiplier
from llm.parallel.muon_fsdp import FullyShardedOptimizer
from llm.stages.plan import check_whole
from llm.stages.step_module import StageContext, StepModule

TALL, WIDE, SQUARE = (12, 5), (5, 12), (8, 8)
STEPS, LR = 7, 0.05
HEADS = {"head_rows": 4}


def gradient(shape, step: int) -> torch.Tensor:
    """Rows and columns of different sizes; the first is zero, as behind projections that start at zero."""
    draw = torch.Generator().manual_seed(step)
    sizes = torch.linspace(0.1, 2, shape[0])[:, None].double() * torch.linspace(2, 0.3, shape[1]).double()
    return torch.randn(shape, generator=draw, dtype=torch.float64) * sizes * float(step > 0)


def polar(u: np.ndarray) -> np.ndarray:
    x = u.T if u.shape[0] > u.shape[1] else u
    x = x / (np.linalg.norm(x) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if u.shape[0] > u.shape[1] else x


def naive_soap(m, g, state, beta=0.8, every=3):
    for name, size, product in (("left", len(g), g @ g.T), ("right", g.shape[1], g.T @ g)):
        cov, basis = state.get(name, (np.zeros((size, size)), np.eye(size)))
        cov = beta * cov + (1 - beta) * product
        if state["step"] % every == 0:
            basis = np.linalg.qr((cov + 1e-3 * np.trace(cov) / size * np.eye(size)) @ basis)[0]
        state[name] = cov, basis
    p, q = state["left"][1], state["right"][1]
    seen, out = p.T @ g @ q, np.zeros_like(g)
    v = state.setdefault("v", np.zeros_like(g))
    for i in range(g.shape[0]):
        for j in range(g.shape[1]):
            v[i, j] = beta * v[i, j] + (1 - beta) * seen[i, j] ** 2
            out[i, j] = (p.T @ m @ q)[i, j] / (v[i, j] ** 0.5 + 1e-8)
    return p @ out @ q.T


def naive_muon2(m, g, state, beta=0.8):
    v = state.setdefault("v", np.zeros_like(g))
    out = np.zeros_like(g)
    for i in range(g.shape[0]):
        for j in range(g.shape[1]):
            v[i, j] = beta * v[i, j] + (1 - beta) * g[i, j] ** 2
            out[i, j] = m[i, j] / (v[i, j] ** 0.5 + 1e-8)
    return out


BEFORE = {  # name: switches, what they do to the momentum
    "soap": ({"soap_beta": 0.8, "soap_every": 3}, naive_soap),
    "muon2": ({"muon2_beta": 0.8}, naive_muon2),
}


def naive_averages(m, g, state, beta=0.9, share=0.3):
    """`m` is what Nesterov makes of the first average alone."""
    fast = (m - 0.05 * g) / 0.95
    slow = state.setdefault("slow", np.zeros_like(g))
    for i in range(g.shape[0]):
        for j in range(g.shape[1]):
            slow[i, j] = beta * slow[i, j] + (1 - beta) * g[i, j]
    return 0.05 * g + 0.95 * ((1 - share) * fast + share * slow)


BEFORE["averages"] = {"slow_momentum": 0.9, "slow_share": 0.3}, naive_averages


def naive_agreeing(weight, u, g, rate):
    kept = np.array([[float(u[i, j] * g[i, j] > 0) for j in range(g.shape[1])] for i in range(g.shape[0])])
    return weight - rate * u * kept / max(kept.mean(), 1e-3)


def naive_floor(weight, u, g, rate, floor=40.0):
    out = weight.copy()
    for i, row in enumerate(rate * u):
        least, length = LR * floor * np.linalg.norm(weight[i]), np.linalg.norm(row)
        out[i] -= row * (max(1.0, least / length) if length > 0 else 1.0)
    return out


def naive_hyperball(weight, u, g, rate):
    if not u.any():
        return weight
    radius = np.linalg.norm(weight)
    out = weight - LR * radius * u / np.linalg.norm(u)
    return radius * out / np.linalg.norm(out)


def naive_floored_ball(weight, u, g, rate, floor=1.2):
    """Rows of the step that the sphere has made lr R long are lengthened, and then all is put back on the sphere."""
    if not u.any():
        return weight
    radius = np.linalg.norm(weight)
    out = naive_floor(weight, u, g, LR * radius / np.linalg.norm(u), floor)
    return radius * out / np.linalg.norm(out)


def naive_rows(weight, u, g, rate, state):
    out, norm = u.copy(), np.linalg.norm(u)
    for i in range(len(u)):
        state[i] = 0.7 * state.get(i, 0.0) + 0.3 * (u[i] ** 2).mean()
        out[i] = u[i] / max(state[i], 1e-10) ** 0.5
    return weight - rate * out * norm / max(np.linalg.norm(out), 1e-20)


AFTER = {  # name: switches, what they make of a weight
    "agreeing": ({"cautious_update": True}, naive_agreeing),
    "floor": ({"row_floor": 0.4 * 100}, naive_floor),
    "hyperball": ({"hyperball": True}, naive_hyperball),
    "floor on the hyperball": ({"hyperball": True, "row_floor": 1.2}, naive_floored_ball),
}


def moved(shape, switches, start=None) -> torch.Tensor:
    """Return a matrix after all steps of plain Muon with switches, in float64."""
    p = torch.nn.Parameter(first(shape) if start is None else start.clone())
    optimizer = GroupOptimizer([PLAIN_MUON | switches | {"params": [p], "lr": LR}])
    for step in range(STEPS):
        p.grad = gradient(shape, step)
        optimizer.step()
    return p.detach()


def first(shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
@pytest.mark.parametrize("name", BEFORE)
def test_what_is_done_before_the_orthogonalisation(name, shape):
    switches, naive = BEFORE[name]
    weight, m, state = first(shape).numpy().copy(), np.zeros(shape), {}
    for step in range(STEPS):
        g, state["step"] = gradient(shape, step).numpy(), step
        m = 0.95 * m + 0.05 * g
        u = naive(0.95 * m + 0.05 * g, g, state)
        weight -= LR * max(1.0, shape[0] / shape[1]) ** 0.5 * polar(u)
    torch.testing.assert_close(moved(shape, switches), torch.from_numpy(weight), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(moved(shape, {}), torch.from_numpy(weight), atol=1e-3)


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
@pytest.mark.parametrize("name", [*AFTER, "rows"])
def test_what_is_done_behind_the_orthogonalisation(name, shape):
    state: dict = {}
    rows = {"normuon_rows": True, "normuon_beta2": 0.7}, lambda *given: naive_rows(*given, state)
    switches, naive = AFTER.get(name, rows)
    weight, m = first(shape).numpy().copy(), np.zeros(shape)
    for step in range(STEPS):
        g = gradient(shape, step).numpy()
        m = 0.95 * m + 0.05 * g
        weight = naive(weight, polar(0.95 * m + 0.05 * g), g, LR * max(1.0, shape[0] / shape[1]) ** 0.5)
    torch.testing.assert_close(moved(shape, switches), torch.from_numpy(weight), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(moved(shape, {}), torch.from_numpy(weight), atol=1e-3)


@pytest.mark.parametrize("more", [{}, {"soap_beta": 0.8, "soap_every": 3}, {"normuon_beta2": 0.9}])
def test_heads_move_as_matrices_of_their_own(more):
    parts = [torch.nn.Parameter(part.clone()) for part in first(TALL).chunk(3)]
    optimizer = GroupOptimizer([PLAIN_MUON | more | {"params": parts, "lr": LR}])
    for step in range(STEPS):
        for p, grad in zip(parts, gradient(TALL, step).chunk(3), strict=True):
            p.grad = grad
        optimizer.step()
    whole = moved(TALL, HEADS | more)
    torch.testing.assert_close(whole, torch.cat([p.detach() for p in parts]), atol=1e-9, rtol=1e-9)
    assert not torch.allclose(whole, moved(TALL, more), atol=1e-3)


def test_heads_are_those_of_queries_keys_and_values():
    net, config = arch_net("modern"), compose("train", "optim.per_head=true").optim
    groups = [g for g in build_optimizer(net, config).param_groups if g["kind"] == "muon"]
    names = {id(p): name for name, p in net.named_parameters()}
    found = {g["head_rows"]: {names[id(p)].split(".")[-2] for p in g["params"]} for g in groups}
    assert found[net.config.head_dim] == {"c_q", "c_k", "c_v"}
    assert {"c_proj", "c_fc"} <= found[None] and not found[None] & found[net.config.head_dim]


def naive_dion(weight, g, state, rank):
    """Algorithm 1 of the paper, projection by projection."""
    basis = state.setdefault("basis", first_basis(weight.shape[1], rank))
    b = state.get("m", np.zeros_like(g)) + g
    p = np.linalg.qr(b @ basis)[0]
    s = np.stack([sum(b[i] * p[i, k] for i in range(len(b))) for k in range(rank)], axis=1)
    state["m"] = b - 0.05 * sum(np.outer(p[:, k], s[:, k]) for k in range(rank))
    lengths = np.linalg.norm(s, axis=0)
    state["basis"] = s / np.maximum(lengths, 1e-30)
    return weight - LR * (weight.shape[0] / weight.shape[1]) ** 0.5 * p @ state["basis"].T


def first_basis(cols: int, rank: int) -> np.ndarray:
    drawn = torch.randn(cols, rank, generator=torch.Generator().manual_seed(0)).numpy()
    return drawn / np.linalg.norm(drawn, axis=0)


def naive_adamh(weight, g, state, step):
    m, v = (state.get(name, np.zeros_like(g)) for name in "mv")
    state["m"], state["v"] = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
    u = (state["m"] / (1 - 0.8**step)) / ((state["v"] / (1 - 0.9**step)) ** 0.5 + 1e-8)
    return naive_hyperball(weight, u, g, LR)


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
@pytest.mark.parametrize("kind", ["dion", "adamh"])
def test_rules_beside_muon(kind, shape):
    rank, state, weight = round(0.4 * min(shape)), {}, first(shape).numpy().copy()
    hyper = {"dion_rank": 0.4, "momentum": 0.95} if kind == "dion" else {"betas": (0.8, 0.9), "eps": 1e-8}
    p = torch.nn.Parameter(first(shape))
    optimizer = GroupOptimizer([hyper | {"kind": kind, "params": [p], "lr": LR}])
    for step in range(STEPS):
        p.grad = gradient(shape, step)
        g = p.grad.numpy().copy()
        optimizer.step()
        weight = naive_dion(weight, g, state, rank) if kind == "dion" else naive_adamh(weight, g, state, step + 1)
    torch.testing.assert_close(p.detach(), torch.from_numpy(weight), atol=1e-6, rtol=1e-6)


def test_a_matrix_of_zeros_grows_to_half_a_semi_orthogonal_one():
    """On the sphere of its own norm, 0, it could never move."""
    norms = []
    p = torch.nn.Parameter(torch.zeros(SQUARE, dtype=torch.float64))
    optimizer = GroupOptimizer([PLAIN_MUON | {"hyperball": True, "params": [p], "lr": 0.3}])
    for step in range(1, 30):
        p.grad = gradient(SQUARE, step)
        optimizer.step()
        norms.append(p.norm().item())
    assert norms[0] == pytest.approx(0.3 * 0.5 * 8**0.5)
    assert norms[-1] == pytest.approx(0.5 * 8**0.5) == max(norms)


@pytest.mark.parametrize("shape", [TALL, WIDE, (2, 12)])
def test_the_eigenbases_do_not_follow_rounding(shape):
    """After the first turn the longer side's covariance has less than full rank: its null space is any basis."""
    ends = []
    for noise in (0.0, 1e-14):
        p = torch.nn.Parameter(first(shape))
        optimizer = GroupOptimizer([PLAIN_MUON | {"soap_beta": 0.9, "params": [p], "lr": LR}])
        for step in range(12):
            p.grad = gradient(shape, step) * (1 + noise * gradient(shape, 100 + step))
            optimizer.step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends, atol=1e-10, rtol=0)


def test_a_long_side_keeps_its_own_basis():
    on = {"soap_beta": 0.8, "soap_every": 3}
    switches = on | {"soap_side": 6}
    for shape, held in ((TALL, "right"), (WIDE, "left")):
        state = UPDATE_RULES.get("muon").new_state(PLAIN_MUON | SWITCHES | switches, torch.zeros(shape))
        assert f"soap_{held}" in state and len([name for name in state if "basis" in name]) == 1
        assert moved(shape, switches).isfinite().all()
        assert not torch.allclose(moved(shape, switches), moved(shape, on), atol=1e-3)
    neither = {"soap_beta": 0.8, "soap_side": 1}  # Adam's division in front of the orthogonalisation
    torch.testing.assert_close(moved(SQUARE, neither), moved(SQUARE, {"muon2_beta": 0.8}), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("step", [0, 5, 39, 40, 70, 99])
def test_the_rate_falls_along_a_power(step):
    """Warm-up 10, flat to 40, then to 5 % of the peak at 100."""
    left = max(0.0, min(1.0, (100 - step) / 60))
    expected = (step + 1) / 10 if step < 10 else left**1.2 + (1 - left**1.2) * 0.05
    assert lr_multiplier(step, 100, 10, 0.6, 0.05, 1.2) == pytest.approx(expected)
    assert lr_multiplier(step, 100, 10, 0.6, 0.05, None) == lr_multiplier(step, 100, 10, 0.6, 0.05)


def test_the_power_is_a_key_of_pretraining():
    rates = []
    for line in ("stage.warmdown_power=2", "stage.warmdown_power=null"):
        cfg = compose("train", "stage=pretrain", "stage.warmup_steps=0", "stage.final_lr_frac=0", line)
        module = StepModule(
            arch_net("classic"), cfg.optim, cfg.stage, StageContext("pretrain", None, torch.ones(1), 100, 8)
        )
        rates.append(module.lr_frac(90))
    assert rates[0] == pytest.approx(rates[1] ** 2) and 0 < rates[1] < 1


# ---- beside the default settings, and what is refused ---------------------------------------------------------------

SETTINGS = {
    "soap": ("optim.soap_beta=0.9", "optim.soap_every=2"),
    "soap_side": ("optim.soap_beta=0.9", "optim.soap_side=32"),
    "muon2": ("optim.muon2_beta=0.95",),
    "averages": ("optim.slow_momentum=0.98", "optim.slow_share=0.4"),
    "rows": ("optim.normuon_rows=true",),
    "agreeing": ("optim.cautious_update=true",),
    "floor": ("optim.row_floor=50",),
    "hyperball": ("optim.hyperball=true",),
    "heads": ("optim.per_head=true",),
    "dion": ("optim.dion_rank=0.25",),
}


@cache
def trained(*lines) -> list[torch.Tensor]:
    """Weights of a small network after three steps of the default optimizer."""
    net = arch_net("modern")
    optimizer = build_optimizer(net, compose("train", *lines).optim)
    for step in range(3):
        grads_for(net.parameters(), step)
        optimizer.step()
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("name", SETTINGS)
def test_every_switch_goes_with_the_default_settings(name):
    weights = trained(*SETTINGS[name])
    assert all(w.isfinite().all() for w in weights)
    assert any(not torch.equal(a, b) for a, b in zip(weights, trained(), strict=True))


def test_adamh_is_a_switch_of_adamw():
    net, old = arch_net("classic"), arch_net("classic")
    config = compose("train", "optim=adamw", "optim.hyperball=true").optim
    optimizer = build_optimizer(net, config)
    assert [group["kind"] for group in optimizer.param_groups] == ["adamh", "adamw"]
    grads_for(net.parameters(), 1)
    optimizer.step()
    for p, q in zip(net.parameters(), old.parameters(), strict=True):
        assert not torch.equal(p, q)
        if p.ndim == 2 and q.norm() > 1 and id(p) in {id(one) for one in optimizer.param_groups[0]["params"]}:
            torch.testing.assert_close(p.norm(), q.norm())


def test_groups_of_older_checkpoints_have_the_switches_off():
    def optimizer():
        p = torch.nn.Parameter(first(SQUARE))
        p.grad = gradient(SQUARE, 1)
        return GroupOptimizer([PLAIN_MUON | {"params": [p], "lr": LR}])

    saved, loaded = optimizer().state_dict(), optimizer()
    for name in SWITCHES:
        del saved["param_groups"][0][name]
    loaded.load_state_dict(saved)
    assert {name: loaded.param_groups[0][name] for name in SWITCHES} == SWITCHES
    loaded.step()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ("optim.soap_every=5",),
            "optim.soap_every=5: it belongs to optim.soap_beta, which is off; set optim.soap_beta=0.9",
        )
    ],
)
def test_what_does_not_go_together_is_refused(lines, message):
    with pytest.raises(UserError, match=message):
        build_optimizer(arch_net("modern"), compose("train", *lines).optim)


def test_the_hyperball_is_refused_where_matrices_lie_in_rows():
    config = compose(
        "train", "stage=pretrain", "trainer=cpu", "trainer.devices=2", "strategy=fsdp", "optim.hyperball=true"
    )
    with pytest.raises(UserError, match="optim.hyperball=true: .*use strategy=muon or ddp"):
        check_whole(config)
    with pytest.raises(UserError, match="optim.hyperball=true: .*use strategy=muon or ddp"):
        build_optimizer(arch_net("modern"), config.optim, optimizer=FullyShardedOptimizer)
