"""Names of the optimizer's groups: what a person reads in place of a number."""

import pytest
import torch
from conftest import compose

from callbacks.metrics import RowLogger
from llm.model.gpt import GPT
from llm.model.lora import DEFAULT_TARGETS, LoRA, add_adapter
from llm.optim.build import build_optimizer, name_groups
from llm.optim.optimizer import GroupOptimizer
from llm.scaling.rules import model_config
from llm.stages.common import learning_rates


def net(*lines) -> tuple[GPT, object]:
    """A small network with the optimizer's configuration."""
    cfg = compose("train", "model=d2", "model.seq_len=32", *lines)
    return GPT(model_config(cfg.model, cfg.arch, 300)).init_weights(0), cfg


def names(optimizer) -> list[str]:
    return [group["name"] for group in optimizer.param_groups]


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ((), ["head", "embedding", "value_embeds", "residual", "x0", "smear", "matrices"]),
        (("arch=gpt2",), ["embedding", "matrices", "vectors"]),
        (("optim=adamw",), ["matrices", "others"]),
        (
            ("arch.copy_candidate=true",),
            ["head", "embedding", "value_embeds", "residual", "x0", "copies", "smear", "matrices"],
        ),
        (("optim=adamw", "arch.ngrams=[3]"), ["matrices", "others", "ngrams"]),
    ],
)
def test_groups_are_named_by_what_they_hold(lines, wanted):
    model, cfg = net(*lines)
    found = names(build_optimizer(model, cfg.optim))
    assert sorted(found) == sorted(wanted)
    rates = learning_rates(model, cfg, 0.5, 1.0)
    assert list(rates) == [*(f"lr/{name}" for name in found), "weight_decay"]
    assert rates["lr/matrices"] == pytest.approx(0.5 * (cfg.optim.get("matrix_lr") or cfg.optim.get("lr")))


def test_an_adapter_is_one_group():
    model, cfg = net()
    add_adapter(model, LoRA(2, 4.0, tuple(DEFAULT_TARGETS), 1e-3, "base"), 0)
    assert names(build_optimizer(model, cfg.optim)) == ["adapter"]


def test_names_of_ones_own_stay_and_are_unique():
    model, _ = net()
    head, *blocks = [p for name, p in model.named_parameters() if name.startswith(("lm_head", "transformer.h"))]
    groups = [{"params": [blocks[0]], "name": "mine"}, {"params": blocks[1:2]}, {"params": blocks[2:3]}]
    groups += [{"params": []}, {"params": [torch.nn.Parameter(torch.zeros(1))], "name": "mine"}]
    name_groups(model, groups)
    assert [group["name"] for group in groups] == ["mine", "matrices", "matrices_2", "others", "mine_2"]
    assert head is not None


def test_a_state_without_names_does_not_take_them_away():
    def optimizer():
        return GroupOptimizer(
            [{"kind": "adamw", "params": [p], "lr": 1.0, "betas": (0.8, 0.9), "eps": 1e-8, "name": "a"}]
        )

    p = torch.nn.Parameter(torch.zeros(2))
    saved = optimizer().state_dict()
    del saved["param_groups"][0]["name"]  # as an older release wrote it
    loaded = optimizer()
    loaded.load_state_dict(saved)
    assert names(loaded) == ["a"]


def test_the_number_format_is_that_of_the_network_and_not_of_the_file():
    model, cfg = net()
    saved = build_optimizer(model, cfg.optim).state_dict()
    model.compute_dtype = torch.bfloat16
    loaded = build_optimizer(model, cfg.optim)
    loaded.load_state_dict(saved)
    assert [group["in_bf16"] for group in loaded.param_groups if group["kind"] == "muon"] == [True]


def test_rates_of_lightnings_monitor_have_short_columns():
    log = RowLogger("folder")
    log.log_metrics({"lr-GroupOptimizer/head": 1.0, "lr-GroupOptimizer/head-momentum": 2.0, "lr": 3.0, "epoch": 0})
    assert log.take() == {"lr/head": 1.0, "lr/head-momentum": 2.0, "lr": 3.0}
