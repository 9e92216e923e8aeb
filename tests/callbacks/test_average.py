"""The average of weights that is evaluated and handed over: a naive loop, what is saved, an exact resume, refusals."""

import pytest
import torch
from conftest import compose
from lightning import Callback
from small_training import OPTIM, STAGE, STEPS, StopAt, fit, net, rows
from stages_by_conf import BPB, trained

from callbacks.average import AverageReadOut
from callbacks.cadence import Periodic
from llm.checkpoint.resume import checkpoint_path, newest_checkpoint
from llm.errors import UserError
from llm.model.config import GPTConfig
from llm.stages.plan import check_average
from llm.stages.step_module import StageContext, StepModule


def weights(module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.net.parameters()]


class Trained(Callback):
    """Keeps the weights of training after every step; stands before the evaluations."""

    def on_train_start(self, trainer, module):
        self.after = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.after.append(weights(module))


class Measured(Periodic):
    """Keeps the weights that an evaluation sees, by step, and may die at one."""

    def __init__(self, dies_at=None):
        super().__init__(2, at_start=True)
        self.seen, self.dies_at = {}, dies_at

    def act(self, trainer, module, step):
        if step == self.dies_at:
            raise RuntimeError("killed")
        self.seen[step] = weights(module)


class Around(Callback):
    """Fires the hooks of a validation around another callback, as ValidationBegin and ValidationEnd do."""

    def __init__(self, average, measured):
        self.average, self.measured = average, measured

    def on_train_start(self, trainer, module):
        self.measured.on_train_start(trainer, module)

    def on_train_batch_end(self, trainer, module, *args):
        self.average.on_validation_epoch_start(trainer, module)
        self.measured.on_train_batch_end(trainer, module, *args)
        self.average.on_validation_epoch_end(trainer, module)


def run(folder, steps=3, share=None, dies_at=None, extra=(), **options):
    """(module, weights by step that were evaluated, weights of training after every step) of six steps."""
    average, measured, seen = AverageReadOut(steps, share), Measured(dies_at), Trained()
    module, _ = fit(folder, first=[average], extra=[seen, Around(average, measured), *extra], **options)
    return module, measured.seen, seen.after


def naive(after: list[list[torch.Tensor]], steps: int, share: float) -> dict[int, list[torch.Tensor]]:
    """Return what is read out after each step: numbers in float64, one by one."""
    read, average = {}, [torch.zeros_like(w, dtype=torch.float64) for w in after[0]]
    for step, ws in enumerate(after, 1):
        for i, w in enumerate(ws):
            flat, new = average[i].view(-1), w.double().flatten()
            for j in range(len(flat)):
                flat[j] += (new[j] - flat[j]) / min(step, steps)
        read[step] = [(1 - share) * w.double() + share * a for w, a in zip(ws, average, strict=True)]
    return read


def assert_same(left, right):
    assert len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.parametrize(("steps", "share"), [(1, 0.6), (3, None), (100, 1.0)])
def test_the_read_out_is_that_of_a_naive_loop(tmp_path, steps, share):
    module, seen, after = run(tmp_path, steps, share)
    expected = naive(after, steps, 0.6 if share is None else share)
    for found, step in ((seen[2], 2), (seen[6], 6), (weights(module), 6)):
        for a, b in zip(found, expected[step], strict=True):
            torch.testing.assert_close(a.double(), b, atol=1e-6, rtol=1e-5)


def test_training_and_its_checkpoints_are_as_without(tmp_path):
    plain, _ = fit(tmp_path / "plain")
    module, _, after = run(tmp_path / "averaged")
    assert_same(after[-1], weights(plain))
    assert not torch.equal(weights(module)[0], after[-1][0])
    saved = [
        torch.load(checkpoint_path(tmp_path / name / "checkpoints", 6), weights_only=True)
        for name in ("plain", "averaged")
    ]
    assert_same(*(list(one["state_dict"].values()) for one in saved))
    assert rows(tmp_path / "plain")[-1]["loss"] == rows(tmp_path / "averaged")[-1]["loss"]


# One amid the run; the others, just behind its start and before its end, under test-full.
STOPS = [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 5))]


@pytest.mark.parametrize("stop_at", STOPS)
def test_a_resumed_run_reads_out_the_same_bits(tmp_path, stop_at):
    whole, seen, _ = run(tmp_path / "a")
    run(tmp_path / "b", extra=[StopAt(stop_at)])
    resumed, again, _ = run(tmp_path / "b", ckpt=newest_checkpoint(tmp_path / "b" / "checkpoints")[1])
    assert_same(weights(resumed), weights(whole))
    assert_same(again[6], seen[6])


def test_an_evaluation_that_is_made_again_is_of_the_read_out(tmp_path):
    """The run was killed between the checkpoint of step 4 and its row."""
    whole, seen, _ = run(tmp_path / "a")
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "b", dies_at=4)
    resumed, again, _ = run(tmp_path / "b", ckpt=newest_checkpoint(tmp_path / "b" / "checkpoints")[1])
    assert_same(again[4], seen[4])
    assert_same(weights(resumed), weights(whole))


@pytest.mark.parametrize("loops", [1, 2])
def test_a_checkpoint_in_the_middle_of_an_evaluation_has_the_weights_of_training(tmp_path, loops):
    """A matrix that blocks share stands in it at every place."""

    class Saves(Measured):
        def act(self, trainer, module, step):
            super().act(trainer, module, step)
            if step == 4:
                trainer.save_checkpoint(tmp_path / "during.ckpt")

    average, measured, after = AverageReadOut(3), Saves(), Trained()
    config = GPTConfig(1 + loops, 1, 1, 16, 16, 8, 70, arch="modern", loops=loops)  # two blocks
    context = StageContext("pretrain", None, torch.ones(70), STEPS, 8)
    module = StepModule(net(config=config), OPTIM, STAGE, context)
    fit(tmp_path, first=[average], extra=[after, Around(average, measured)], module=module)
    saved = torch.load(tmp_path / "during.ckpt", weights_only=True)["state_dict"]
    names = list(average.average)
    assert_same([saved[f"net.{name}"] for name in names], after.after[3])
    places = module.net.named_parameters(remove_duplicate=False)
    first = {id(p): f"net.{name}" for name, p in module.net.named_parameters()}
    assert all(torch.equal(saved[f"net.{name}"], saved[first[id(p)]]) for name, p in places)
    assert (len(saved) > len(names)) == (loops > 1)
    assert not torch.equal(saved[f"net.{names[0]}"], measured.seen[4][0])


def test_a_checkpoint_without_averages_or_with_those_of_another_network_is_refused(tmp_path):
    fit(tmp_path, extra=[StopAt(3)])
    with pytest.raises(ValueError, match="averages of weights"):
        run(tmp_path, ckpt=newest_checkpoint(tmp_path / "checkpoints")[1])


def test_the_stage_evaluates_and_hands_over_the_read_out(tmp_path):
    config = compose("train", "experiment=tiny", "stage=pretrain", "log_every=1", "trainer=cpu", "callbacks=none")
    _, plain = trained(config, tmp_path / "a", callbacks={"bpb": BPB})
    config.stage.average_steps, config.stage.average_share = 4, 0.5
    _, averaged = trained(config, tmp_path / "b", callbacks={"bpb": BPB})
    assert rows(tmp_path / "a")[-1]["loss"] == rows(tmp_path / "b")[-1]["loss"]
    assert rows(tmp_path / "a")[0]["bpb"] == rows(tmp_path / "b")[0]["bpb"]
    assert rows(tmp_path / "a")[-1]["bpb"] != rows(tmp_path / "b")[-1]["bpb"]
    assert not torch.equal(weights(plain.module)[0], weights(averaged.module)[0])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("stage.average_share=0.5",), "stage.average_share=0.5: .*set stage.average_steps=100"),
        (
            ("stage.average_steps=9", "strategy=fsdp", "trainer.devices=2"),
            "stage.average_steps=9: .*use strategy=muon or ddp",
        ),
    ],
)
def test_what_cannot_be_is_refused(lines, message):
    with pytest.raises(UserError, match=message):
        check_average(compose("train", "stage=pretrain", "trainer=cpu", *lines))


def test_two_averages_are_refused(tmp_path):
    config = compose(
        "train", "experiment=tiny", "stage=pretrain", "trainer=cpu", "callbacks=none", "stage.average_steps=9"
    )
    with pytest.raises(UserError, match="stage.average_steps=9: EMAWeightAveraging .*keep one"):
        trained(config, tmp_path, callbacks={"mine": {"_target_": "lightning.pytorch.callbacks.EMAWeightAveraging"}})
