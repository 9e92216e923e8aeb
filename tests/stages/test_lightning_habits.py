"""Habits of users of Lightning: callbacks and keywords from the configuration, and a Trainer by hand."""

import math
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from conftest import compose, run_cli
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from processes import run_python
from small_training import OPTIM, STAGE, Numbers, StepData, fit, make_module, net, rows, step_batch
from stages_by_conf import BPB, stage, trained

from callbacks.progress import Progress
from llm.checkpoint.resume import list_checkpoints
from llm.config.renamed import LIGHTNING_KEYS, renamed_key
from llm.config.schema import known_keys
from llm.errors import UserError
from llm.model.lora import LoRA, add_adapter
from llm.stages.common import BuiltStage
from llm.stages.step_module import StageContext, StepModule
from llm.stages.trainer import build_trainer, check_callbacks
from llm.stages.trainer import fit as resume

LIGHTNING = "lightning.pytorch.callbacks"
BY_HAND = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_steps": 3,
    "max_epochs": -1,
}


@pytest.fixture(scope="module")
def config():
    return compose("train", "experiment=tiny", "stage=pretrain", "log_every=1", "trainer=cpu", "callbacks=none")


def callback(name, **options):
    return {"bpb": BPB, "mine": {"_target_": f"{LIGHTNING}.{name}", **options}}


def by_hand(callbacks=(), loader=False, **options):
    module, trainer = stage(3).module, L.Trainer(**(BY_HAND | options), callbacks=list(callbacks))
    trainer.fit(module, *([Numbers(None)] if loader else []), **({} if loader else {"datamodule": StepData(Numbers)}))
    return trainer, module


# ----- callbacks from the configuration


def test_metrics_are_lightnings_too(config, tmp_path):
    trainer, _ = trained(config, tmp_path, callbacks={"bpb": BPB})
    last = rows(tmp_path)[-1]
    for name in ("loss", "bpb", "lr"):
        assert trainer.callback_metrics[name].item() == pytest.approx(float(last[name]), rel=1e-5)
        assert trainer.logged_metrics[name] == pytest.approx(float(last[name]), rel=1e-5)
    assert {"loss", "bpb"} <= set(trainer.progress_bar_metrics)


def test_early_stopping_ends_a_training_that_is_saved_and_logged(config, tmp_path):
    trainer, built = trained(config, tmp_path, 20, callbacks=callback("EarlyStopping", monitor="bpb", mode="max"))
    step = built.module.global_step
    assert 4 <= step < 20 and step % 2 == 0
    assert list_checkpoints(tmp_path / "checkpoints")[-1][0] == step and rows(tmp_path)[-1]["step"] == str(step)


@pytest.mark.parametrize("name", ["EarlyStopping", "ModelCheckpoint"])
def test_a_monitor_that_never_appears_is_an_error_before_the_first_step(config, tmp_path, name):
    options = callback(name, monitor="val_acc")
    with pytest.raises(UserError, match=r"callbacks.mine.monitor=val_acc: .* no such value; choose from .*bpb"):
        trained(config, tmp_path, callbacks=options)
    assert not (tmp_path / "metrics.csv").exists()


def test_a_monitor_that_has_not_appeared_by_the_first_evaluation_is_an_error(config, tmp_path):
    options = callback("ModelCheckpoint", monitor="val_acc") | {"other": {"_target_": f"{__name__}.Mine"}}
    with pytest.raises(UserError, match=r"callbacks.mine.monitor=val_acc: .* choose from .*mine"):
        trained(config, tmp_path, callbacks=options)
    assert rows(tmp_path)[-1]["step"] == "2"


def test_early_stopping_without_evaluations_is_an_error(config, tmp_path):
    options = callback("EarlyStopping", monitor="loss") | {"bpb": BPB | {"every": 0}}
    with pytest.raises(UserError, match="callbacks.mine: .* set stage.eval_every"):
        trained(config, tmp_path, callbacks=options)


def test_model_checkpoints_by_monitor_and_by_steps(config, tmp_path):
    best = callback("ModelCheckpoint", monitor="bpb", dirpath=str(tmp_path / "a" / "best"), save_top_k=-1)
    every = {"_target_": f"{LIGHTNING}.ModelCheckpoint", "every_n_train_steps": 2, "save_top_k": -1}
    trainer, _ = trained(config, tmp_path / "run", callbacks=best | {"every": every})
    after_evaluations = {path.name for path in (tmp_path / "a" / "best").glob("*.ckpt")}
    assert after_evaluations == {f"epoch=0-step={step}.ckpt" for step in (2, 4, 6)}
    saved = sorted((tmp_path / "run" / "lightning" / "checkpoints").glob("*.ckpt"))
    assert [path.name for path in saved] == [f"epoch=0-step={step}.ckpt" for step in (2, 4, 6)]
    assert torch.load(saved[0], weights_only=True)["global_step"] == 2


def test_what_monitors_log_is_in_the_rows(config, tmp_path):
    trained(config, tmp_path, callbacks=callback("LearningRateMonitor", logging_interval="step"))
    rates = [float(row["lr/matrices"]) for row in rows(tmp_path) if row["lr/matrices"]]
    assert {"lr/head", "lr/embedding"} <= rows(tmp_path)[-1].keys()
    assert rates[0] > rates[-1] > 0


@pytest.mark.parametrize("name", ["TQDMProgressBar", "RichProgressBar", "ModelSummary", "DeviceStatsMonitor"])
def test_callbacks_that_show_something(config, tmp_path, name, capsys):
    trainer, built = trained(config, tmp_path, 2, callbacks=callback(name))
    assert built.module.global_step == 2 and rows(tmp_path)[-1]["step"] == "2"


def test_timer_ends_a_training(config, tmp_path):
    _, built = trained(config, tmp_path, 10**6, callbacks=callback("Timer", duration="00:00:00:01"))
    assert built.module.global_step == list_checkpoints(tmp_path / "checkpoints")[-1][0] > 0


def test_averaged_weights_are_evaluated_and_handed_over(config, tmp_path):
    averaging = callback("EMAWeightAveraging", decay=0.9)
    _, averaged = trained(config, tmp_path / "a", callbacks=averaging)
    _, plain = trained(config, tmp_path / "b", callbacks={"bpb": BPB})
    assert rows(tmp_path / "a")[-1]["loss"] == rows(tmp_path / "b")[-1]["loss"]
    assert rows(tmp_path / "a")[-1]["bpb"] != rows(tmp_path / "b")[-1]["bpb"]
    weights = [next(one.module.net.parameters()) for one in (averaged, plain)]
    assert not torch.equal(*weights)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("name", ["EMAWeightAveraging", pytest.param("WeightAveraging", marks=pytest.mark.slow)])
def test_averages_resume_exactly(config, tmp_path, name, rank):
    cfg = config.copy()
    cfg.save_every, cfg.callbacks = 2, callback(name, **({"decay": 0.5} if name.startswith("EMA") else {}))

    def go() -> StepModule:
        network = net() if rank is None else add_adapter(net(), LoRA(rank, lr=0.01), 0)
        module = StepModule(network, OPTIM, STAGE, StageContext("pretrain", None, torch.ones(70), 6, 8))
        module.context.val_batches = step_batch(99)["micro"]
        built = BuiltStage(module, StepData(Numbers), {})
        resume(build_trainer(cfg, tmp_path, built)[0], built, tmp_path)
        return module

    whole = go()
    (tmp_path / "checkpoints" / "step_000006.ckpt").unlink()
    saved = torch.load(tmp_path / "checkpoints" / "step_000004.ckpt", weights_only=True)
    assert all(("lora" in key) is (rank is not None) for key in saved["current_model_state"])
    assert all(map(torch.equal, whole.net.parameters(), go().net.parameters()))


def test_a_resume_without_the_callback_goes_on_from_the_trained_weights(config, tmp_path):
    cfg = config.copy()
    cfg.save_every = 2

    def go(folder, callbacks) -> StepModule:
        cfg.callbacks = callbacks
        module = StepModule(net(), OPTIM, STAGE, StageContext("pretrain", None, torch.ones(70), 6, 8))
        module.context.val_batches = step_batch(99)["micro"]
        built = BuiltStage(module, StepData(Numbers), {})
        resume(build_trainer(cfg, folder, built)[0], built, folder)
        return module

    plain = go(tmp_path / "plain", {})
    go(tmp_path / "averaged", callback("EMAWeightAveraging", decay=0.5))
    (tmp_path / "averaged" / "checkpoints" / "step_000006.ckpt").unlink()
    resumed = go(tmp_path / "averaged", {})
    assert all(map(torch.equal, plain.net.parameters(), resumed.net.parameters()))


def test_an_average_of_weights_is_refused_where_they_are_sharded(monkeypatch):
    monkeypatch.setattr("llm.parallel.collectives.world_size", lambda: 2)
    averaging = {"mine": EMAWeightAveraging()}
    check_callbacks(averaging, "muon")
    with pytest.raises(UserError, match="callbacks.mine: no process has all weights with strategy=fsdp; use strategy="):
        check_callbacks(averaging, "fsdp")


class Mine(L.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.log("mine", float(trainer.callback_metrics.get("loss", 0.0)) + 1)

    def on_validation_end(self, trainer, module):
        self.seen = trainer.callback_metrics["bpb"].item()


def test_a_callback_of_ones_own_logs_and_sees_evaluations(config, tmp_path):
    mine = {"mine": {"_target_": f"{__name__}.Mine"}, "bpb": BPB}
    trainer, _ = trained(config, tmp_path, callbacks=mine)
    assert float(rows(tmp_path)[-1]["mine"]) > 1
    found = next(one for one in trainer.callbacks if type(one).__name__ == "Mine")
    assert found.seen == pytest.approx(float(rows(tmp_path)[-1]["bpb"]), rel=1e-6)


@pytest.mark.parametrize(
    "name, options, instead",
    [
        ("GradientAccumulationScheduler", {"scheduling": {0: 4}}, "batch.tokens_per_step"),
        ("StochasticWeightAveraging", {"swa_lrs": 1e-2}, "EMAWeightAveraging"),
        ("BatchSizeFinder", {}, "batch.micro_batch_size=auto"),
        ("LearningRateFinder", {}, "stage.lr_frac"),
    ],
)
def test_callbacks_that_cannot_work_say_what_does(config, tmp_path, name, options, instead):
    if name == "GradientAccumulationScheduler":
        from lightning.pytorch.callbacks import GradientAccumulationScheduler

        with pytest.raises(UserError, match=f"callbacks.mine: {name} .*{instead}"):
            check_callbacks({"mine": GradientAccumulationScheduler(**options)}, "single")
        return
    with pytest.raises(UserError, match=f"callbacks.mine: {name} .*{instead}"):
        trained(config, tmp_path, callbacks=callback(name, **options))


# ----- keywords of the Trainer


def test_gradients_are_clipped_to_a_norm(config, tmp_path, monkeypatch):
    _, free = trained(config, tmp_path / "a", 1)
    _, loose = trained(config, tmp_path / "b", 1, gradient_clip_val=1e6)
    _, tight = trained(config, tmp_path / "c", 1, gradient_clip_val=1e-3)
    states = [dict(one.module.net.named_parameters()) for one in (free, loose, tight)]
    assert all(torch.equal(p, states[1][name]) for name, p in states[0].items())
    assert any(not torch.equal(p, states[2][name]) for name, p in states[0].items())


def test_clipping_is_torchs_own():
    module, batch = make_module(), step_batch(0)
    optimizer = module_optimizer(module)
    for micro in batch["micro"]:
        module.net(micro["inputs"], micro["targets"], reduction="sum").backward()
    grads = [p.grad.clone() for p in module.net.parameters() if p.grad is not None]
    theirs = [torch.nn.Parameter(g.clone()) for g in grads]
    for p in theirs:
        p.grad = p.detach().clone()
    total = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    optimizer.max_norm = 0.5
    optimizer.step()
    ours = [p.grad for p in module.net.parameters() if p.grad is not None]
    assert total > 0.5
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.grad, rtol=1e-5, atol=1e-8)


def module_optimizer(module):
    from llm.optim.build import build_optimizer

    return build_optimizer(module.net, module.optim_config)


def test_profiler_writes_into_the_stage(config, tmp_path):
    trained(config, tmp_path, 2, profiler="simple")
    assert "training_step" in next(tmp_path.glob("*profile*")).read_text()


@pytest.mark.parametrize("key", ["deterministic", "benchmark", "detect_anomaly"])
def test_switches_pass_through(config, tmp_path, key):
    try:
        _, switched = trained(config, tmp_path, 2, **{key: True})
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
    assert switched.module.global_step == 2


def test_overfitting_repeats_the_first_steps(config, tmp_path):
    trained(config, tmp_path, 6, overfit_batches=1)
    losses = [float(row["loss"]) for row in rows(tmp_path)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_resumed_training_overfits_to_the_same_steps(config, tmp_path, n):
    cfg = config.copy()
    cfg.save_every, cfg.trainer.overfit_batches = 3, n

    def go() -> StepModule:
        built = BuiltStage(make_module(), StepData(Numbers), {})
        resume(build_trainer(cfg, tmp_path, built)[0], built, tmp_path)
        return built.module

    whole = go()
    (tmp_path / "checkpoints" / "step_000006.ckpt").unlink()
    assert all(map(torch.equal, whole.net.parameters(), go().net.parameters()))


def test_plugins_reach_the_trainer(config, tmp_path):
    plugin = {"mine": {"_target_": "lightning.pytorch.plugins.environments.LightningEnvironment"}}
    with pytest.raises(UserError, match="Lightning refuses this: .*multiple"):
        trained(config, tmp_path, 1, plugins=plugin)


def test_keywords_with_another_name_here_are_told(config):
    keys = {"experiment", *(key.split(".")[0] for key in known_keys("train"))}
    for name, instead in LIGHTNING_KEYS.items():
        assert instead.split()[0].split("=")[0].lstrip("~").split(".")[0] in keys and name not in known_keys("train")
        assert f"{name} is set by another key here: {instead}" == renamed_key(name)
    with pytest.raises(UserError, match="trainer.max_time is set by another key here: max_minutes"):
        compose("train", "+trainer.max_time=1")


# ----- a budget of minutes


def test_a_budget_ends_training_with_its_schedule(tmp_path, monkeypatch):
    module = make_module(100)
    module.budget.seconds = 60.0
    monkeypatch.setattr(module.budget, "spent", lambda: 15.0 * (module.global_step + 1))
    fit(tmp_path, total=100, module=module, save_every=50)
    assert module.global_step == 4 and [row["step"] for row in rows(tmp_path)][-1] == "4"
    assert list_checkpoints(tmp_path / "checkpoints")[-1][0] == 4
    rates = [float(row["lr"]) for row in rows(tmp_path)]
    assert rates == pytest.approx([1.0, 1.0, 1.0, 0.5])


def test_a_budget_goes_on_after_a_stop(tmp_path):
    module = make_module(6)
    fit(tmp_path, module=module, save_every=3)
    before = torch.load(list_checkpoints(tmp_path / "checkpoints")[-1][1], weights_only=True)["fathom"]["seconds"]
    again = make_module(6)
    again.on_load_checkpoint({"fathom": {"tokens": 1, "window": module.step_log.state_dict(), "recent": []}})
    assert again.budget.before == 0.0  # a checkpoint from before there were budgets
    assert 0 < before <= module.budget.spent()


# ----- by hand


def test_fit_with_a_data_module_or_a_loader_alone():
    with_data, with_loader = by_hand(), by_hand(loader=True)
    losses = [trainer.callback_metrics["loss"].item() for trainer, _ in (with_data, with_loader)]
    assert losses[0] == losses[1] and with_data[0].global_step == 3


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"limit_train_batches": 2, "max_epochs": 1}])
def test_short_fits(options):
    assert by_hand(**options)[0].global_step == (1 if "fast_dev_run" in options else 2)


def test_clipping_by_the_trainers_keyword():
    (_, free), (_, tight) = by_hand(), by_hand(gradient_clip_val=1e-3)
    assert tight.gradient_clip_val == 1e-3 and free.gradient_clip_val is None
    pairs = zip(free.net.parameters(), tight.net.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "options, instead",
    [
        ({"precision": "bf16-mixed"}, "precision.compute=bf16"),
        ({"precision": "16-mixed"}, "precision.compute=bf16"),
        ({"accumulate_grad_batches": 2}, "batch.tokens_per_step"),
    ],
)
def test_keywords_that_contradict_a_step_are_explained(options, instead):
    if options.get("precision") == "16-mixed" and not torch.cuda.is_available():
        options = {"precision": "bf16-true"}
    with pytest.raises(MisconfigurationException, match=instead):
        by_hand(**options)


def test_callbacks_and_loggers_of_a_trainer_by_hand(tmp_path):
    callbacks = [
        EarlyStopping("loss", check_on_train_epoch_end=True),
        ModelCheckpoint(tmp_path / "best", monitor="loss", every_n_train_steps=1),
        LearningRateMonitor("step"),
    ]
    options = {"logger": CSVLogger(tmp_path / "csv"), "log_every_n_steps": 1, "enable_checkpointing": True}
    by_hand(callbacks, **options)
    assert len(list((tmp_path / "best").glob("*.ckpt"))) == 1
    header = next((tmp_path / "csv").rglob("metrics.csv")).read_text().splitlines()[0].split(",")
    assert {"loss", "lr", "step"} <= set(header) and "lr-GroupOptimizer/embedding" in header


def test_validate_test_and_predict():
    built = stage()
    for name in ("validate", "test"):
        [found] = getattr(L.Trainer(**BY_HAND), name)(built.module, datamodule=built.data, verbose=False)
        assert 0 < found["bpb"] < 20
    predicted = L.Trainer(**BY_HAND).predict(built.module, datamodule=built.data)
    assert [tuple(one.shape) for one in predicted] == [(2, 8), (2, 8)]


def test_the_validation_loop_of_a_trainer_by_hand_stops_early():
    module = stage(50).module
    options = BY_HAND | {"max_steps": 50, "num_sanity_val_steps": 0}
    stopping = EarlyStopping("bpb", mode="max", patience=1)
    trainer = L.Trainer(**options, val_check_interval=2, check_val_every_n_epoch=None, callbacks=[stopping])
    trainer.fit(module, datamodule=StepData(Numbers))
    assert trainer.global_step < 50 and math.isfinite(trainer.callback_metrics["bpb"])


def test_a_data_module_alone_serves_both_kinds_of_batches():
    data = stage().data
    data.setup("fit")
    assert {"micro", "n_trained"} <= set(next(iter(data.train_dataloader())))
    assert [batch["inputs"].shape for batch in data.val_dataloader()] == [(2, 8), (2, 8)]
    assert StepData(Numbers).val_dataloader() == []


def test_hyperparameters_are_in_the_module_its_checkpoints_and_a_csv_logger(tmp_path):
    built = stage(3, {"seed": 5, "model": {"depth": 2}})
    told = {"seed": 5, "model": {"depth": 2}, "derived": {"steps": 3}}
    logger, saver = CSVLogger(tmp_path), ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3)
    trainer = L.Trainer(**(BY_HAND | {"logger": logger, "enable_checkpointing": True}), callbacks=[saver])
    trainer.fit(built.module, datamodule=built.data)
    assert dict(built.module.hparams) == told and built.module.tokens_seen == 3 * 32
    assert torch.load(saver.best_model_path, weights_only=True)["hyper_parameters"] == told
    assert yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text()) == told


def test_forward_gives_logits():
    assert make_module()(torch.zeros(1, 8, dtype=torch.long)).shape == (1, 8, 70)


def test_the_module_decides_its_number_format(config):
    from llm.stages.device import DeviceOptions

    module = make_module(3)
    module.context.options = DeviceOptions("bf16", False, "auto", False, False, True, False)
    L.Trainer(**BY_HAND).fit(module, datamodule=StepData(Numbers))
    assert module.net.compute_dtype == torch.bfloat16


def test_checkpoints_make_the_module_again(tmp_path):
    """By its configuration where a stage has saved it, else with the parts that are given."""
    module, _ = fit(tmp_path, total=2)
    _, path = list_checkpoints(tmp_path / "checkpoints")[-1]
    parts = {"net": make_module().net, "optim": module.optim_config, "stage": module.stage_config}
    again = StepModule.load_from_checkpoint(path, context=module.context, **parts)
    assert all(map(torch.equal, module.net.parameters(), again.net.parameters()))
    with pytest.raises(UserError, match="saved by hand, it knows no configuration; give net, optim"):
        StepModule.load_from_checkpoint(path)


def test_resume_by_ckpt_path(tmp_path):
    module, _ = fit(tmp_path, total=6, save_every=3)
    again = make_module(6)
    first = list_checkpoints(tmp_path / "checkpoints")[0]
    trainer = L.Trainer(**(BY_HAND | {"max_steps": 6}))
    trainer.fit(again, datamodule=StepData(Numbers), ckpt_path=str(first[1]), weights_only=True)
    assert first[0] == 3 and trainer.global_step == 6
    assert all(map(torch.equal, module.net.parameters(), again.net.parameters()))


def test_without_a_bar_there_are_lines_and_lightnings_bar_is_refused(config, tmp_path):
    ours = {"bpb": BPB, "progress": {"_target_": "callbacks.progress.Progress", "log_every": 1}}
    trainer, _ = trained(config, tmp_path, 2, callbacks=ours, enable_progress_bar=False)
    (shown,) = [one for one in trainer.callbacks if isinstance(one, Progress)]
    assert not shown.wants_bar
    with pytest.raises(UserError, match="enable_progress_bar=False"):
        trained(config, tmp_path, 2, callbacks=callback("RichProgressBar"), enable_progress_bar=False)


# ----- real processes


@pytest.mark.slow
def test_a_callback_a_keyword_a_logger_and_a_trainer_by_hand_in_real_processes(tmp_path):
    """One run with a habit of each kind, then a notebook's lines on what it left."""
    tiny = ["experiment=tiny", "trainer=cpu", f"paths.runs={tmp_path}", "run=mine"]
    done = run_cli("train.py", *tiny, "stage=tokenizer", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    stopping = "callbacks.early={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: bpb, mode: max}"
    habits = [f"+{stopping}", "trainer.gradient_clip_val=1.0", "trainer.profiler=simple", "logger=tensorboard"]
    steps = ["max_steps=40", "stage.eval_every=2"]
    done = run_cli("train.py", *tiny, "stage=pretrain", *steps, *habits, cwd=tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "mine" / "pretrain"
    assert int(rows(folder)[-1]["step"]) < 40 and (folder / "model").is_dir()
    assert list((folder / "tensorboard").glob("events*")) and list(folder.glob("*profile*"))
    code = f"""
import torch
from llm.stages.step_module import StepModule
from llm.checkpoint.resume import list_checkpoints
from pathlib import Path
module = StepModule.load_from_checkpoint(list_checkpoints(Path({str(folder)!r}) / "checkpoints")[-1][1])
print(module.hparams["derived"]["steps"], *module(torch.zeros(1, 8, dtype=torch.long)).shape)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-4:] == ["40", "1", "8", "384"]
