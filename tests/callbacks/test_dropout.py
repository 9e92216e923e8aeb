"""Dropout: in training passes alone, as strong as asked, equal after a resume, and refused where useless."""

import pytest
import torch
from small_training import OPTIM, STAGE, STEPS, fit, net
from torch import nn

from callbacks.dropout import Dropout
from llm.cli.overrides import compose
from llm.config.check import check_values
from llm.errors import UserError
from llm.model.gpt import Block
from llm.stages.pretrain import check_dropout
from llm.stages.step_module import StageContext, StepModule

IDS = torch.arange(16).view(2, 8)


def module() -> StepModule:
    return StepModule(net(), OPTIM, STAGE, StageContext("pretrain", None, torch.ones(70), STEPS, 8))


def test_a_share_is_zeroed_and_the_rest_grows_but_only_where_gradients_are_computed():
    block = net().transformer.h[0]
    update = torch.ones(100, 100)
    assert block.dropped(update) is update
    block.dropout = 0.2
    found = block.dropped(update)
    assert set(found.unique().tolist()) == {0.0, 1.25}
    assert abs((found == 0).float().mean() - 0.2) < 0.02
    with torch.no_grad():
        assert block.dropped(update) is update


def test_it_changes_training_resumes_exactly_and_leaves_other_draws_and_evaluations_alone(tmp_path):
    plain, _ = fit(tmp_path / "plain", module=module())
    torch.manual_seed(3)
    whole, _ = fit(tmp_path / "whole", module=module(), extra=[Dropout(0.2, 1)])
    after = torch.rand(4)
    path = tmp_path / "whole" / "checkpoints" / "step_000004.ckpt"
    rest, _ = fit(tmp_path / "rest", ckpt=path, module=module(), extra=[Dropout(0.2, 1)])
    for name, weight in whole.net.state_dict().items():
        assert torch.equal(rest.net.state_dict()[name], weight), name
    assert not torch.equal(plain.net.transformer.wte.weight, whole.net.transformer.wte.weight)
    with torch.no_grad():
        assert torch.equal(whole.net(IDS), whole.net(IDS))
    torch.manual_seed(3)
    fit(tmp_path / "again", module=module())
    assert torch.equal(torch.rand(4), after)


def test_another_seed_zeroes_others(tmp_path):
    one, other = (fit(tmp_path / str(seed), module=module(), extra=[Dropout(0.2, seed)])[0] for seed in (1, 2))
    assert not torch.equal(one.net.transformer.wte.weight, other.net.transformer.wte.weight)


def test_blocks_that_would_ignore_it_are_refused():
    class Own(Block):
        def forward(self, x, *rest):
            return x

    cfg = compose("train", ["stage=pretrain", "stage.dropout=0.1"])
    network = net()
    check_dropout(cfg, network)
    network.transformer.h = nn.ModuleList([Own(network.config, 0)])
    with pytest.raises(UserError, match=r"stage\.dropout=0\.1"):
        check_dropout(cfg, network)


@pytest.mark.parametrize("share", ["0", "1", "-0.1", "high"])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(UserError, match=r"stage\.dropout"):
        check_values(compose("train", ["stage=pretrain", f"stage.dropout={share}"]))
