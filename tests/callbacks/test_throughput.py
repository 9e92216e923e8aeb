"""Speed of training by a clock of the test's own: what counts in it, and what does not."""

from types import SimpleNamespace

import pytest
import torch

from callbacks import cadence, throughput
from callbacks.cadence import Periodic
from callbacks.throughput import Throughput
from llm.stages.step_state import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it: `clock.now`, in seconds."""
    clock = SimpleNamespace(now=100.0)
    clock.perf_counter = lambda: clock.now
    for module in (cadence, throughput):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def module():
    """A module in the middle of a training: six FLOPs a token, of a peak of 1,000 a second."""
    loader = SimpleNamespace(wait_seconds=10.0)
    module = SimpleNamespace(global_step=4, progress=Progress(tokens=400), row={}, row_is_missing=False)
    module.net, module.device = SimpleNamespace(training_forward_blocks=None), torch.device("cpu")
    module.context, module.flops_per_token = SimpleNamespace(total_steps=100), 6
    module.trainer = SimpleNamespace(datamodule=SimpleNamespace(loader=loader), world_size=2, is_global_zero=True)
    return module


class Evaluates(Periodic):
    """Takes seven seconds."""

    def __init__(self, clock):
        super().__init__(every=1)
        self.clock = clock

    def act(self, trainer, module, step):
        self.clock.now += 7


def test_evaluations_count_in_neither_speed_nor_seconds(clock, module):
    speed, evaluation = Throughput(log_every=2, peak_flops=1000.0), Evaluates(clock)
    speed.load_state_dict({"train_seconds": 50.0})
    speed.on_train_start(module.trainer, module)
    for _ in range(2):
        module.global_step += 1
        module.progress.tokens += 100
        clock.now += 2
        module.trainer.datamodule.loader.wait_seconds += 0.5
        evaluation.on_train_batch_end(None, module, None, None, 0)
        speed.on_train_batch_end(module.trainer, module, None, None, 0)
    assert module.progress.paused_seconds == 14 and module.progress.doing is None
    row = module.row
    assert (row["tok_per_s"], row["ms_per_step"], row["data_wait"]) == pytest.approx((200 / 4, 2000, 1 / 4))
    assert row["mfu"] == pytest.approx(50 * 6 / (1000 * 2))
    assert (row["tokens"], row["flops"], row["seconds"]) == (600, 3600.0, 54.0)
    clock.now += 3
    assert speed.state_dict() == {"train_seconds": 57.0}
