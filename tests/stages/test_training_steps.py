"""Training steps: what a gradient is the gradient of, how rollouts become batches, how a stage resumes and stops."""

import math
import os
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from conftest import compose
from processes import run_python
from small_training import CONFIG, OPTIM, STAGE, STEPS, StopAt, fit, net, rows, step_batch

from callbacks.cadence import Periodic
from callbacks.checkpoint import StepCheckpoint
from callbacks.progress import Progress
from callbacks.watch import LossGuard
from llm.checkpoint.resume import CheckpointWriter, list_checkpoints, newest_checkpoint
from llm.errors import BadLoss, UserError
from llm.model.config import num_params
from llm.parallel.env import STOP_SIGNALS
from llm.stages.device import DeviceOptions
from llm.stages.loss_scaler import LossScaler
from llm.stages.micro_batch import check_fits, out_of_memory
from llm.stages.step_module import StageContext, StepModule
from llm.stages.step_state import Sent


def test_the_first_step_counts_in_the_seconds_but_not_in_the_rates(tmp_path, capsys, monkeypatch):
    """On a clock that only the steps move: 60 s for the first, as torch.compile might take, 1 s for all others."""
    now = [0.0]
    for module in ("throughput", "cadence"):
        monkeypatch.setattr(f"callbacks.{module}.time", SimpleNamespace(perf_counter=lambda: now[0]))

    class SlowStart(StepModule):
        def training_step(self, batch, batch_idx):
            now[0] += 1.0 if self.global_step else 60.0
            super().training_step(batch, batch_idx)

    context = StageContext("pretrain", None, torch.ones(70), STEPS, 8)
    module = SlowStart(net(), OPTIM, STAGE, context)
    module.net.training_forward_blocks = module.net.forward_blocks
    fit(tmp_path / "1", module=module)
    first, second = rows(tmp_path / "1")[:2]
    assert first["ms_per_step"] == first["tok_per_s"] == "" != second["tok_per_s"]
    assert float(first["seconds"]) == pytest.approx(60) and float(second["seconds"]) == pytest.approx(61)
    capsys.readouterr()
    module = SlowStart(net(), OPTIM, STAGE, context)
    module.net.training_forward_blocks = module.net.forward_blocks
    fit(tmp_path / "3", module=module, log_every=3)
    first = rows(tmp_path / "3")[0]
    assert first["step"] == "3" and float(first["ms_per_step"]) == pytest.approx(1000)
    assert float(first["seconds"]) == pytest.approx(62)
    assert "first step: 60.0 s with compilation" in capsys.readouterr().out
    saved = dict(list_checkpoints(tmp_path / "3" / "checkpoints"))[4]  # in the middle of a window of three steps
    state = torch.load(saved, weights_only=True)["callbacks"]["Throughput"]
    assert state["train_seconds"] == pytest.approx(63)


def test_the_split_into_micro_batches_does_not_change_the_weights(tmp_path):
    a, _ = fit(tmp_path / "a", lambda step: step_batch(step, split=4))
    b, _ = fit(tmp_path / "b", lambda step: step_batch(step, split=1))
    for p, q in zip(a.net.parameters(), b.net.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-5, rtol=1e-4)


def test_the_step_gradient_is_that_of_the_mean_over_trained_tokens():
    context = StageContext("sft", None, torch.ones(70), STEPS, 8)
    module, batch = StepModule(net(), OPTIM, STAGE, context), step_batch(0)
    for micro in batch["micro"]:
        (module.micro_loss(micro) / batch["n_trained"]).backward()
    got = [p.grad.clone() for p in module.net.parameters()]
    module.net.zero_grad()
    inputs, targets = (torch.cat([m[k] for m in batch["micro"]]) for k in ("inputs", "targets"))
    module.net(inputs, targets, reduction="mean").backward()
    for g, p in zip(got, module.net.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad, atol=1e-6, rtol=1e-5)


def test_the_loss_may_be_read_before_the_last_backward_pass(tmp_path, monkeypatch):
    """Weights and log are the same bits; a loss that is no number is found as before, and no weight is touched."""
    events, trained = [], {}

    class Watched(StepModule):
        spoils = False

        def micro_loss(self, micro):
            events.append("forward")
            loss = super().micro_loss(micro) * (math.nan if self.spoils else 1)
            loss.register_hook(lambda _: events.append("backward"))
            return loss

    class Watching(Sent):
        def __init__(self, numbers):
            events.append("sent")
            super().__init__(numbers)

    def module(is_early: bool) -> Watched:
        options = DeviceOptions("fp32", False, "auto", False, False, True, False, early_check=is_early)
        return Watched(net(), OPTIM, STAGE, StageContext("pretrain", None, torch.ones(70), STEPS, 8, options=options))

    monkeypatch.setattr("llm.stages.step_module.Sent", Watching)
    for is_early, seen in ((False, []), (True, ["sent"])):
        events.clear()
        folder = tmp_path / str(is_early)
        trained[is_early], _ = fit(folder, lambda step: step_batch(step, split=2), module=module(is_early))
        assert events == STEPS * ["forward", "backward", "forward", *seen, "backward"]
    for p, q in zip(trained[False].net.parameters(), trained[True].net.parameters(), strict=True):
        assert torch.equal(p, q)
    assert [row["loss"] for row in rows(tmp_path / "False")] == [row["loss"] for row in rows(tmp_path / "True")]
    bad = module(is_early=True)
    bad.spoils = True
    with pytest.raises(BadLoss, match="the training loss became nan in step 1, micro-batch 0"):
        fit(tmp_path / "bad", module=bad)
    for p, q in zip(bad.net.parameters(), net().parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_step_without_trained_tokens_is_zero_and_not_nan(tmp_path):
    def empty(step):
        batch = step_batch(step)
        for micro in batch["micro"]:
            micro["targets"] = torch.full_like(micro["targets"], -1)
        return batch | {"n_trained": 0}

    module, _ = fit(tmp_path, empty, total=2)
    for p, q in zip(module.net.parameters(), net().parameters(), strict=True):
        assert torch.equal(p, q)


def test_resuming_equals_a_straight_run(tmp_path):
    straight, _ = fit(tmp_path / "straight")
    fit(tmp_path / "broken", total=STEPS, extra=[StopAt(3)])
    step, path = newest_checkpoint(tmp_path / "broken" / "checkpoints")
    assert step == 3
    resumed, _ = fit(tmp_path / "broken", ckpt=path)
    for p, q in zip(straight.net.parameters(), resumed.net.parameters(), strict=True):
        assert torch.equal(p, q)
    assert resumed.progress.tokens == straight.progress.tokens
    for name in ("step", "loss", "lr", "tokens"):
        assert [r[name] for r in rows(tmp_path / "straight")] == [r[name] for r in rows(tmp_path / "broken")]


def test_a_time_budget_goes_on_where_the_sitting_before_ended(tmp_path):
    """Schedules of the first step are those of half of the time already, not of step 6 of many."""
    fit(tmp_path)
    saved = torch.load(newest_checkpoint(tmp_path / "checkpoints")[1], weights_only=True)
    saved["fathom"]["seconds"] = 30.0
    for minutes, place in ((1, 500), (0.1, 1000), (None, 6)):
        context = StageContext("pretrain", None, torch.ones(70), 1000, 8, max_minutes=minutes)
        module = StepModule(net(), OPTIM, STAGE, context)
        module.on_load_checkpoint(saved)
        assert module.budget.place(6, 1000) == place


@pytest.mark.parametrize("signum", STOP_SIGNALS, ids=lambda signum: signum.name)
def test_a_signal_saves_and_stops_after_the_step(tmp_path, signum):
    before = signal.getsignal(signum)
    _, stop = fit(tmp_path, extra=[StopAt(5, signum)], save_every=100)
    assert stop.signum == signum and [s for s, _ in list_checkpoints(tmp_path / "checkpoints")] == [5]
    assert len(rows(tmp_path)) == 5 and signal.getsignal(signum) == before


def test_a_signal_behind_the_vote_of_a_last_step_counts_for_nothing(tmp_path):
    """Only one process had it, and waited for the others, which handed over."""

    class EndsEarly(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if module.global_step == 4:
                os.kill(os.getpid(), signal.SIGUSR1)
                trainer.should_stop = True

    module, stop = fit(tmp_path, extra=[EndsEarly()], save_every=100, log_every=3)
    assert stop.signum is None and module.votes.stop
    assert [s for s, _ in list_checkpoints(tmp_path / "checkpoints")] == [4]
    assert [row["step"] for row in rows(tmp_path)] == ["3", "4"]  # the row of the end is written


def test_a_closed_terminal_stops_but_not_under_nohup():
    code = "from llm.parallel.env import STOP_SIGNALS; print([signum.name for signum in STOP_SIGNALS])"
    for handler, names in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
        command = f"import signal, os, sys; signal.signal(signal.SIGHUP, signal.{handler.name}); "
        command += f"os.execv(sys.executable, [sys.executable, '-c', {code!r}])"
        assert ("SIGHUP" in run_python(command).stdout) == names


class Short(StepModule):
    """Runs out of memory in the step after `after` steps: in its second pass, or while the weights change."""

    def __init__(self, after: int, where: str = "pass", on_gpu: bool = False):
        super().__init__(net(), OPTIM, STAGE, StageContext("pretrain", None, torch.ones(70), STEPS, 8))
        self.after, self.where, self.like_gpu, self.passes_left = after, where, on_gpu, 2

    def micro_loss(self, micro):
        loss = super().micro_loss(micro)
        self.passes_left -= self.global_step == self.after
        if self.where == "pass" and self.passes_left == 0:
            if self.like_gpu:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            torch.empty(2**55)  # a real allocation that fails, after one backward pass
        return loss

    def on_before_optimizer_step(self, optimizer):
        """Fail once the first weight has changed."""
        if self.where == "update" and self.global_step == self.after:
            next(self.net.parameters()).data.zero_()
            torch.empty(2**55)


@pytest.mark.parametrize(("on_gpu", "text"), [(False, "can't allocate memory"), (True, "CUDA out of memory")])
def test_short_memory_in_a_pass_saves_the_step_before(tmp_path, on_gpu, text):
    straight, _ = fit(tmp_path / "straight")
    with pytest.raises(RuntimeError, match=text):
        fit(tmp_path / "short", module=Short(3, on_gpu=on_gpu), save_every=100)
    step, path = newest_checkpoint(tmp_path / "short/checkpoints")
    assert step == 3 and not list(path.parent.glob(".*"))
    resumed, _ = fit(tmp_path / "short", make=lambda number: step_batch(number, split=2), ckpt=path)
    for p, q in zip(straight.net.parameters(), resumed.net.parameters(), strict=True):
        assert torch.equal(p, q)


def test_short_memory_while_weights_change_saves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        fit(tmp_path, module=Short(3, "update"), save_every=2)
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [2]


def test_short_memory_names_the_next_smaller_micro_batch_that_divides():
    def line(rows, micro_batches, again, saved, *more):
        again = f"trainer.activation_checkpointing={str(again).lower()}"
        cfg = compose("train", f"batch.micro_batch_size={rows}", again, *more)
        return out_of_memory(cfg, micro_batches, MemoryError(), saved)

    assert "give batch.micro_batch_size=6 or trainer.activation_checkpointing=true; step 7 is" in line(8, 3, False, 7)
    assert "give batch.micro_batch_size=4; nothing was saved" in line(8, 1, True, None)
    assert "take a smaller model or model.seq_len; nothing" in line(1, 9, True, None)
    assert "give batch.micro_batch_size=3; nothing" in line(
        6, 4, True, None, "stage.batch_ramp=0.4"
    )  # of 24, in 4 parts


def test_a_model_larger_than_the_machine_is_refused_before_it_is_built():
    check_fits(CONFIG, 0.001)
    check_fits(CONFIG, None)
    large = replace(CONFIG, n_layer=300, n_head=150, n_kv_head=150, head_dim=128, n_embd=19200)
    with pytest.raises(UserError, match=r"model.depth=300: .* GiB, more than the 512 GiB"):
        check_fits(large, 512)
    weights = 4 * num_params(CONFIG)["total"] / 2**30
    check_fits(CONFIG, 1.5 * weights)
    with pytest.raises(UserError, match="parameters in each of 2 processes are"):
        check_fits(CONFIG, 1.5 * weights, copies=2)


def test_a_folder_that_was_deleted_is_one_line_and_is_not_made_again(tmp_path):
    class Delete(Periodic):
        def act(self, trainer, module, step):
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(UserError, match=r"cannot write .*run/.*no such file or folder"):
        fit(tmp_path / "run", extra=[Delete(3)], save_every=100)
    assert not (tmp_path / "run").exists()


def test_only_the_newest_two_checkpoints_stay_and_a_damaged_one_is_skipped(tmp_path, caplog):
    fit(tmp_path)
    folder = tmp_path / "checkpoints"
    assert [step for step, _ in list_checkpoints(folder)] == [4, 6]
    newest = list_checkpoints(folder)[-1][1]
    newest.write_bytes(newest.read_bytes()[:1000])
    assert newest_checkpoint(folder)[0] == 4 and "is damaged (1000 bytes instead of" in caplog.text


def test_a_failing_write_keeps_the_checkpoint_before(tmp_path):
    """The file size limit of the process makes real writes fail half-way, as a full disk does."""
    resource = pytest.importorskip("resource")
    module, _ = fit(tmp_path, total=2)
    folder, io = tmp_path / "checkpoints", CheckpointWriter()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(UserError, match="step 2 is intact"):
            io.save_checkpoint({"w": torch.zeros(100_000)}, folder / "step_000003.ckpt")
            io.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "step_000002.ckpt"]
    assert newest_checkpoint(folder)[0] == 2


def test_activation_checkpointing_changes_memory_and_nothing_else():
    batch, grads, saved = step_batch(0), [], []
    for on in (False, True):
        model = net()
        model.activation_checkpointing, held = on, []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, held=held: held.append(t.nbytes) or t, lambda t: t):
            loss = model(batch["micro"][0]["inputs"], batch["micro"][0]["targets"], reduction="sum")
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
        saved.append(sum(held))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)) and saved[1] < 0.5 * saved[0]


@pytest.mark.slow
def test_fp16_scales_the_loss_and_leaves_out_steps_that_overflow(tmp_path):
    exact, _ = fit(tmp_path / "fp32")
    half = StepModule(net(), OPTIM, STAGE, StageContext("sft", None, torch.ones(70), STEPS, 8))
    half.net.compute_dtype = torch.float16
    fit(tmp_path / "fp16", module=half)
    moved = sum((p - q).norm() ** 2 for p, q in zip(exact.net.parameters(), net().parameters(), strict=True))
    apart = sum((p - q).norm() ** 2 for p, q in zip(exact.net.parameters(), half.net.parameters(), strict=True))
    assert apart < 0.02 * moved and half.scaler.good_steps == STEPS

    broken = StepModule(net(), OPTIM, STAGE, StageContext("sft", None, torch.ones(70), STEPS, 8))
    broken.net.compute_dtype = torch.float16
    fit(tmp_path / "broken", module=broken, extra=[StopAt(3)])
    resumed = StepModule(net(), OPTIM, STAGE, StageContext("sft", None, torch.ones(70), STEPS, 8))
    resumed.net.compute_dtype = torch.float16
    fit(tmp_path / "broken", module=resumed, ckpt=newest_checkpoint(tmp_path / "broken" / "checkpoints")[1])
    assert resumed.scaler.state_dict() == half.scaler.state_dict()
    for p, q in zip(half.net.parameters(), resumed.net.parameters(), strict=True):
        assert torch.equal(p, q)

    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    scaler = LossScaler(scale=8.0, interval=2)
    for value, good in ((4.0, True), (float("inf"), False), (8.0, True), (8.0, True)):
        params[0].grad, params[1].grad = torch.full((3,), 8.0), torch.full((3,), value)
        before = scaler.scale
        assert scaler.unscale(params) is good
        if good:
            assert params[1].grad.eq(value / before).all()
        else:
            assert params[0].grad is None and params[1].grad is None and scaler.scale == before / 2
    assert scaler.state_dict() == {"scale": 8.0, "good_steps": 0}


class Letters:
    @staticmethod
    def decode(ids):
        return " ".join(map(str, ids))


def test_a_loss_that_is_no_number_stops_before_the_update(tmp_path):
    """In step 3 the second micro-batch overflows: the checkpoint holds the weights after step 2, bit for bit."""

    class Overflowing(StepModule):
        def micro_loss(self, micro):
            loss = super().micro_loss(micro)
            return loss * float("inf") if "bad" in micro else loss

    def make(step):
        batch = step_batch(step)
        if step == 2:
            batch["micro"][1]["bad"] = torch.ones(())
        return batch

    def module(cls=StepModule):
        return cls(net(), OPTIM, STAGE, StageContext("sft", Letters, torch.ones(70), STEPS, 8))

    folder = tmp_path / "broken"
    guard = LossGuard(StepCheckpoint(2, folder / "checkpoints"), folder)
    with pytest.raises(UserError, match="became inf in step 3, micro-batch 1.*step 2 was saved"):
        fit(folder, make, module=module(Overflowing), extra=[guard], save_every=100)
    text = (folder / "bad_loss_step_3.txt").read_text()
    assert text.splitlines()[0] == Letters.decode(step_batch(2)["micro"][1]["inputs"][0].tolist())
    step, path = newest_checkpoint(folder / "checkpoints")
    assert step == 2
    fit(tmp_path / "straight", extra=[StopAt(2)], module=module())
    _, other = newest_checkpoint(tmp_path / "straight" / "checkpoints")
    ours, theirs = (torch.load(p, weights_only=True)["state_dict"] for p in (path, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    resumed, _ = fit(folder, ckpt=path, module=module())  # without the accident it goes on
    whole, _ = fit(tmp_path / "whole", module=module())
    for p, q in zip(resumed.net.parameters(), whole.net.parameters(), strict=True):
        assert torch.equal(p, q)


def test_metrics_gain_columns_without_losing_rows(tmp_path):
    class Late(Periodic):
        def act(self, trainer, module, step):
            module.row["bpb"] = step / 10

    fit(tmp_path, extra=[Late(4)])
    table = rows(tmp_path)
    assert [r["step"] for r in table] == ["1", "2", "3", "4", "5", "6"]
    assert [r["bpb"] for r in table] == ["", "", "", "0.4", "", "0.6"]  # every fourth step, and the last
    assert all(float(r["tok_per_s"]) > 0 and float(r["ms_per_step"]) > 0 for r in table)
    assert [float(r["lr"]) for r in table] == pytest.approx([1, 1, 1, 1, 2 / 3, 1 / 3])


def test_progress_lines_show_what_was_logged(tmp_path, capsys):
    fit(tmp_path, extra=[Progress(1)])
    out = capsys.readouterr().out
    assert "pretrain step 6/6" in out and "loss" in out and "ETA" in out
