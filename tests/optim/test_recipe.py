"""The published forms of the optimizer: naive loops in their order of operations, and tables of what each weight gets.

2025 = October 2025, feb = February 2026, july = July 2026. Numbers stand here as the recipe states them and not as
conf/ does.
"""

import math
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from conftest import compose

from llm.config.registries import UPDATE_RULES
from llm.model.gpt import GPT, build_network
from llm.optim import GroupOptimizer
from llm.optim.build import build_optimizer
from llm.optim.muon_adamw import NEWTON_SCHULZ, POLAR_EXPRESS
from llm.scaling.rules import model_config
from llm.stages.common import finetuning_scales
from llm.stages.pretrain import plan
from llm.stages.step_module import StageContext, StepModule

OPTIONS = {"2025": "muon_2025", "feb": "muon_2026_02", "july": "muon_adamw"}
TALL, WIDE, SQUARE = (48, 12), (12, 48), (16, 16)
STEPS = 20


def config(form: str, *overrides: str):
    """Return the configuration of a training in the published form."""
    return compose("train", f"optim={OPTIONS[form]}", *RUNS[form][0], *overrides)


# ---- one matrix, step by step ---------------------------------------------------------------------------------------


def small_net() -> GPT:
    """Width 32, with everything that has a rate of its own."""
    model = {"depth": 2, "aspect_ratio": 16, "head_dim": 16, "n_kv_head": None, "seq_len": 8}
    return GPT(model_config(model, config("july").arch, 70)).init_weights(0)


@cache
def muon_settings(form: str) -> dict:
    """Return the hyperparameters of the form's group of matrices."""
    group = build_optimizer(small_net(), config(form).optim).param_groups[-1]
    return {name: value for name, value in group.items() if name != "params" and not name.startswith("initial")}


def gradient(shape, step: int) -> torch.Tensor:
    """Rows of different lengths, so that the normalisations have something to do."""
    draw = torch.Generator().manual_seed(step)
    return torch.randn(shape, generator=draw, dtype=torch.float64) * torch.linspace(0.1, 2, shape[0])[:, None].double()


def schedule(step: int) -> dict:
    """Return a rate, a momentum and a decay that all change over the steps."""
    return {"lr": 0.05 * (1 - step / 40), "momentum": 0.85 + 0.005 * step, "weight_decay": 0.3 * (1 - step / 30)}


def polar(u: torch.Tensor, form: str) -> torch.Tensor:
    """Return a matrix (r, c) after five quintics, each in the orientation with the smaller Gram matrix."""
    x = u.T if u.shape[0] > u.shape[1] else u
    x = x / (x.norm() * {"2025": 1.0, "feb": 1.02, "july": 1.01}[form] + 1e-7)
    for i in range(5):
        a, b, c = NEWTON_SCHULZ if form == "2025" else POLAR_EXPRESS[i]
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if u.shape[0] > u.shape[1] else x


def even_rows(u: torch.Tensor, second: torch.Tensor, beta2: float) -> torch.Tensor:
    """Divide rows (columns of a wide matrix) by a running root mean square; the norm of the matrix stays."""
    rows, cols = u.shape
    lines = range(rows) if rows >= cols else range(cols)
    out = torch.empty_like(u)
    for i in lines:
        at = (i, slice(None)) if rows >= cols else (slice(None), i)
        second[i] = beta2 * second[i] + (1 - beta2) * u[at].square().mean()
        out[at] = u[at] / second[i].clamp_min(1e-10).sqrt()
    return out * (u.norm() / out.norm())


def recipe_step(form: str, weight: torch.Tensor, grad: torch.Tensor, state: dict, hyper: dict) -> None:
    """Update a matrix (r, c) in place as the published form does, in its order of operations."""
    rows, cols = weight.shape
    state["momentum"] = hyper["momentum"] * state["momentum"] + (1 - hyper["momentum"]) * grad
    u = (1 - hyper["momentum"]) * grad + hyper["momentum"] * state["momentum"]
    if form == "july":
        for row in range(rows):
            u[row] = u[row] / u[row].norm()
    u = polar(u, form)
    if form == "july":
        u = u * (min(rows, cols) ** 0.5 / u.norm())
    if form != "2025":
        u = even_rows(u, state["second"], 0.95 if form == "feb" else 0.9)
    rate = hyper["lr"] * max(1.0, rows / cols) ** 0.5  # the one rate of the update and, in 2026, of the decay
    if form == "2025":
        weight.sub_(rate * u)
        return
    shrinks = (u * weight >= 0).double()
    weight.sub_(rate * u + rate * hyper["weight_decay"] * weight * shrinks)


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
@pytest.mark.parametrize("form", OPTIONS)
def test_matrices_move_as_in_the_recipe(form, shape):
    """Catches decays, margins and orders of operations that differ: one of 1 % of the update fails."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    param, weight = torch.nn.Parameter(start.clone()), start.clone()
    state = {"momentum": torch.zeros_like(start), "second": torch.zeros(max(shape), dtype=torch.float64)}
    optimizer = GroupOptimizer([muon_settings(form) | {"params": [param]}])
    for step in range(STEPS):
        hyper = schedule(step) | ({"weight_decay": 0.0} if form == "2025" else {})
        optimizer.param_groups[0].update(hyper)
        param.grad = gradient(shape, step)
        recipe_step(form, weight, param.grad.clone(), state, hyper)
        optimizer.step()
    assert (param - weight).norm() < 1e-6 * (weight - start).norm()


@pytest.mark.parametrize(("shape", "factor"), [(TALL, 2.0), (WIDE, 1.0), (SQUARE, 1.0)])
@pytest.mark.parametrize("cautious", [True, False])
def test_the_decay_of_a_tall_matrix_is_a_choice(shape, factor, cautious):
    """coupled_decay=false is torch.optim.Muon's: one decay for all shapes."""
    left = []
    for coupled in (True, False):
        param = torch.nn.Parameter(torch.ones(shape))
        param.grad = torch.zeros(shape)
        own = {"coupled_decay": coupled, "cautious": cautious, "lr": 0.1, "weight_decay": 0.5, "params": [param]}
        GroupOptimizer([muon_settings("july") | own]).step()
        left.append(param.detach())
    for weight, rate in zip(left, (0.05 * factor, 0.05), strict=True):
        torch.testing.assert_close(weight, torch.full(shape, 1 - rate))


@pytest.mark.parametrize("cautious", [True, False])
def test_heads_decay_as_fast_as_they_move(cautious):
    """A tall matrix of square heads moves, and so decays, at the rate of a square one."""
    param = torch.nn.Parameter(torch.ones(20, 5))
    param.grad = torch.zeros(20, 5)
    own = {"coupled_decay": True, "cautious": cautious, "lr": 0.1, "weight_decay": 0.5, "head_rows": 5}
    GroupOptimizer([muon_settings("july") | own | {"params": [param]}]).step()
    torch.testing.assert_close(param.detach(), torch.full((20, 5), 0.95))


# ---- what each parameter gets, and when -----------------------------------------------------------------------------

VOCAB = 32_768
KINDS = {  # form: kind of parameter -> rate, betas, decay
    "july": {
        "lm_head": (0.008, (0.8, 0.96), 0.01),
        "wte": (0.3, (0.8, 0.995), 0.001),
        "value_embeds": (0.15, (0.8, 0.995), 0.01),
        "resid_scalars": (0.005, (0.8, 0.95), 0.05),
        "x0_scalars": (0.5, (0.96, 0.95), 0.0),
        "smear_gate": (0.2, (0.8, 0.95), 0.0),
        "smear_scalar": (0.2, (0.8, 0.95), 0.0),
        "backout_scalar": (0.2, (0.8, 0.95), 0.0),
    },
    "feb": {
        "lm_head": (0.004, (0.8, 0.95), 0.0),
        "wte": (0.3, (0.8, 0.95), 0.0),
        "value_embeds": (0.3, (0.8, 0.95), 0.0),
        "resid_scalars": (0.005, (0.8, 0.95), 0.0),
        "x0_scalars": (0.5, (0.96, 0.95), 0.0),
    },
    "2025": {"lm_head": (0.004, (0.8, 0.95), 0.0), "wte": (0.2, (0.8, 0.95), 0.0)},
}
BY_WIDTH = ("lm_head", "wte", "value_embeds")  # rates tuned at width 768
FIXED = ("smear_gate", "smear_scalar", "backout_scalar")  # rates that are the same for all batches
RUNS = {  # form: overrides, weight decay of matrices, warm-up, warm-down, last rate, channels of a value gate, ratio
    "july": ((), 0.28, 40, 0.65, 0.05, 12, 12.0),
    "feb": (
        ("arch=modern_2026_02", "stage.tokens_per_param=10.5", "stage.warmup_steps=0", "stage.warmdown_ratio=0.5")
        + ("stage.final_lr_frac=0",),
        *(0.2, 0, 0.5, 0.0, 32, 10.5),
    ),
    "2025": (
        ("arch=classic", "stage.tokens_per_param=20", "stage.count_params=all", "stage.warmup_steps=0")
        + ("stage.warmdown_ratio=0.2", "stage.final_lr_frac=0", "batch.tokens_per_step=524288"),
        *(0.0, 0, 0.2, 0.0, 0, 20.0),
    ),
}


def horizon(form: str, depth: int) -> tuple[int, float, float]:
    """Return steps, factor on the rates and factor on the decay, from the depth alone."""
    channels, ratio = RUNS[form][-2:]

    def tokens(layers: int) -> float:
        width = -(-64 * layers // 128) * 128
        blocks = 12 * layers * width**2 + -(-layers // 2) * (width // 128) * channels  # gates: every other layer
        return ratio * (blocks + VOCAB * width * (2 if form == "2025" else 1))

    if form == "2025":
        return int(tokens(depth)) // 2**19, 1.0, 1.0
    batch = 2 ** round(math.log2(2**19 * (tokens(depth) / tokens(12)) ** 0.383))
    rate = (batch / 2**19) ** 0.5
    return int(tokens(depth)) // batch, rate, rate * tokens(12) / tokens(depth)


def course(form: str, step: int, steps: int) -> tuple[float, float, float]:
    """Return the factor on the rates, Muon's momentum and the factor on its decay at a step."""
    _, _, warmup, ratio, last, *_ = RUNS[form]
    warmdown = round(ratio * steps)
    left = min((steps - step) / warmdown, 1.0)
    rate = (step + 1) / warmup if step < warmup else left + (1 - left) * last
    top, rise = (0.97, 400) if form == "july" else (0.95, 300)
    if step < rise:
        momentum = (1 - step / rise) * 0.85 + step / rise * top
    elif form == "july" and step >= steps - warmdown:
        momentum = 0.97 * left + 0.9 * (1 - left)
    else:
        momentum = top
    decay = {"july": 0.5 * (1 + math.cos(math.pi * step / steps)), "feb": 1 - step / steps, "2025": 1.0}[form]
    return rate, momentum, decay


def shrinkage(group: dict, shape: tuple[int, int]) -> float:
    """Return which share of a weight the rule takes away where the update has nothing against it."""
    row = torch.ones(1, 4, dtype=torch.float64)
    UPDATE_RULES.get("muon").apply(group | {"shape": shape}, [row], torch.zeros(1, 1, 4, dtype=torch.float64))
    return 1 - row[0, 0].item()


class AtStep(StepModule):
    """A module that is told its step."""

    global_step = 0


def module_of(form: str, depth: int) -> AtStep:
    """Return a module whose network of vocabulary 32,768 has shapes and no values, planned as a pretraining."""
    cfg = config(form)
    cfg.model.depth = depth
    planned = plan(cfg, VOCAB)
    with torch.device("meta"):
        net = build_network(planned.config)
    context = StageContext("pretrain", None, torch.ones(1), planned.steps, 2048, **planned.scales)
    return AtStep(net, cfg.optim, cfg.stage, context)


@pytest.mark.parametrize("depth", [4, 12, 20, 32])
@pytest.mark.parametrize("form", OPTIONS)
def test_every_parameter_gets_the_rates_betas_and_decays_of_the_recipe(form, depth):
    """Catches schedules and factors that reach other parameters than in the recipe, at any time of the training."""
    module = module_of(form, depth)
    names = {p: name for name, p in module.net.named_parameters()}
    steps, rate_factor, decay_factor = horizon(form, depth)
    assert module.context.total_steps == steps
    module._trainer = SimpleNamespace(strategy=None)
    groups = module.configure_optimizers().param_groups
    for step in (0, 1, 39, 40, 299, 300, 399, 400, steps // 2, steps - steps // 10, steps - 1):
        module.global_step = step
        module.apply_schedules(groups)
        rate, momentum, decay = course(form, step, steps)
        for p, group in ((p, of_p) for of_p in groups for p in of_p["params"]):
            name = names[p]
            kind = next((kind for kind in KINDS[form] if kind in name), None)
            if kind is None:  # a matrix of a block
                rows, cols = p.shape
                lr = 0.02 * rate_factor * rate
                shrinks = lr * RUNS[form][1] * decay_factor * decay * (rows / cols if rows > cols else 1) ** 0.5
                found = (group["kind"], group["lr"], group["momentum"], shrinkage(group, (rows, cols)))
                expected = ("muon", lr, momentum, shrinks)
            else:
                lr, betas, own_decay = KINDS[form][kind]
                factor = 1.0 if kind in FIXED else rate_factor
                factor *= (module.net.config.n_embd / 768) ** -0.5 if kind in BY_WIDTH else 1.0
                found = (group["kind"], group["lr"], *group["betas"], group["weight_decay"], group["eps"])
                expected = ("adamw", lr * factor * rate, *betas, own_decay, 1e-10)
            assert found[0] == expected[0], name
            assert found[1:] == pytest.approx(expected[1:], rel=1e-9, abs=1e-15), (name, step)


def test_finetuning_scales_every_rate_and_decays_no_matrix():
    """Smear and backout too, which pretraining leaves out; the decays of tables and scalars stay."""
    cfg = compose("train", "stage=sft", "stage.lr_frac=0.3")
    groups = build_optimizer(small_net(), cfg.optim, **finetuning_scales(cfg, 2**20)).param_groups
    whole = build_optimizer(small_net(), cfg.optim).param_groups
    assert [g["lr"] for g in groups] == pytest.approx([0.3 * 2**0.5 * g["lr"] for g in whole])
    assert [g["weight_decay"] for g in groups] == [0.01, 0.001, 0.01, 0.05, 0.0, 0.0, 0.0]
    cfg.optim.scale_decay = False  # the decay is the user's own
    assert finetuning_scales(cfg, None)["decay_scale"] == 1.0
