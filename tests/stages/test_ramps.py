"""Ramps of pretraining: windows and rows that grow, a naive form, an exact resume, full evaluations, refusals."""

from copy import copy
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import compose
from model.test_gpt import MODERN, config, naive_forward, random_net
from small_training import StopAt, pretrain, rows, step_batch, weights

from llm.checkpoint.resume import newest_checkpoint
from llm.errors import UserError
from llm.model.config import GPTConfig
from llm.optim.schedules import ramp_share
from llm.scaling.rules import model_config
from llm.stages.plan import check_ramps
from llm.stages.ramps import check_windows, short_windows, shorter_rows, shorter_window


@dataclass(frozen=True)
class Reaching(GPTConfig):
    """A shape whose layers all see two positions beside their own."""

    def window(self, layer):
        return 2


def test_the_share_of_a_step():
    assert [ramp_share(step, 10, 0.4) for step in range(6)] == [0.25, 0.25, 0.5, 0.5, 1.0, 1.0]
    assert [ramp_share(step, 10, None) for step in (0, 9)] == [1.0, 1.0]
    assert [ramp_share(step, 4, 1.0) for step in range(4)] == [0.25, 0.25, 0.5, 0.5]


def test_windows_are_whole_multiples_and_never_larger_than_their_own():
    c = config(seq_len=512, window_pattern="SL")
    assert c.window(0) == 128
    assert [shorter_window(c, None, share) for share in (0.25, 0.5, 1.0)] == [128, 256, None]
    assert [shorter_window(c, 128, share) for share in (0.25, 0.5, 1.0)] == [128, 128, 128]
    assert [shorter_window(replace(c, window_multiple=None), 130, share) for share in (0.25, 0.5)] == [33, 65]


def test_short_windows_equal_the_formulas_and_are_taken_back():
    net = random_net(config(depth=3, seq_len=8, **MODERN | {"window_pattern": "L", "window_multiple": None}))
    ids = torch.randint(0, 70, (8,), generator=torch.Generator().manual_seed(1))
    naive = copy(net)
    naive.config = Reaching(**net.config.to_dict())
    with short_windows(net, 0.25):
        torch.testing.assert_close(net(ids[None])[0].double(), naive_forward(naive, ids), atol=5e-5, rtol=2e-5)
    torch.testing.assert_close(net(ids[None])[0].double(), naive_forward(net, ids), atol=5e-5, rtol=2e-5)
    with pytest.raises(RuntimeError), short_windows(net, 0.5):
        raise RuntimeError
    assert net.windows == [block.attn.window for block in net.transformer.h] == [None] * 3


def test_a_compiled_network_follows_the_windows():
    """By the compiler's guards, with the backend that compiles nothing."""
    net = random_net(config(depth=3, seq_len=8, window_multiple=None))
    ids = torch.randint(0, 70, (2, 8), generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(net.forward_blocks, dynamic=False, backend="eager")
    seen = set()
    for share in (0.25, 0.5, 1.0):
        with short_windows(net, share):
            net.training_forward_blocks = None
            plain = net(ids, ids, reduction="sum").item()
            net.training_forward_blocks = compiled
            assert net(ids, ids, reduction="sum").item() == pytest.approx(plain, rel=1e-6)
        seen.add(plain)
    assert len(seen) == 3


def test_rows_are_cut_and_nothing_else_changes():
    micro = step_batch(1)["micro"][0]
    micro["weights"] = torch.rand(micro["inputs"].shape)
    cut = shorter_rows(micro, 0.25)
    for name, whole in micro.items():
        assert cut[name].tolist() == [row[at : at + 2].tolist() for row in whole for at in (0, 2, 4, 6)]
    assert shorter_rows(micro, 1.0) is micro


@pytest.mark.parametrize("key", ["window_ramp", pytest.param("row_ramp", marks=pytest.mark.slow)])
def test_a_ramp_changes_the_first_steps_and_resumes_to_the_bit(tmp_path, key):
    plain, whole = pretrain(tmp_path / "plain"), pretrain(tmp_path / "a", **{key: 0.7})
    losses = [[float(row["loss"]) for row in rows(tmp_path / name)] for name in ("plain", "a")]
    assert losses[0][0] != losses[1][0] and not torch.equal(weights(plain)[0], weights(whole)[0])
    pretrain(tmp_path / "b", extra=[StopAt(3)], **{key: 0.7})
    resumed = pretrain(tmp_path / "b", ckpt=newest_checkpoint(tmp_path / "b" / "checkpoints")[1], **{key: 0.7})
    assert all(map(torch.equal, weights(resumed), weights(whole)))
    assert whole.net.windows == plain.net.windows == [None, None]


def test_ramps_that_cannot_be_are_refused():
    cfg = compose("train", "stage=pretrain", "model.seq_len=510", "stage.row_ramp=0.5")
    with pytest.raises(UserError, match="stage.row_ramp=0.5: .*multiple of 4, or set stage.row_ramp=null"):
        check_ramps(cfg, model_config(cfg.model, cfg.arch, 300), 2**19)
    net = random_net(config())
    del net.transformer.h[0].attn.window
    with pytest.raises(UserError, match="stage.window_ramp=0.5: .*arch=classic have no attn.window; set it to null"):
        check_windows(net, 0.5)
    check_windows(net, None)


@pytest.mark.parametrize(
    "keys,fix",
    [
        (("experiment=tiny",), "arch.window_multiple=null or stage.window_ramp=null"),
        (("arch=classic", "model.seq_len=128"), "it to null"),
        (("experiment=tiny", "model.seq_len=256"), None),
        (("experiment=tiny", "arch.window_multiple=null"), None),
    ],
)
def test_windows_that_cannot_grow_are_refused(keys, fix):
    cfg = compose("train", "stage=pretrain", *keys, "stage.window_ramp=0.4")
    shape = model_config(cfg.model, cfg.arch, 300)
    if fix is None:
        return check_ramps(cfg, shape, 2**19)
    with pytest.raises(UserError, match=rf"stage.window_ramp=0.4: .*128 tokens, .*model.seq_len=128; set {fix}"):
        check_ramps(cfg, shape, 2**19)
