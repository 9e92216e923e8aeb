"""Size of a step and passes of finetuning: by rule, as configured, and the warning of too few steps."""

import json

import pytest
from conftest import compose

from llm.data.balance import Balance
from llm.data.conversations import Forecast
from llm.errors import UserError
from llm.stages.finetune import horizon
from llm.stages.plan import check_finetuning


def pass_of(rows, seq_len=512):
    return Forecast(130, 130, rows, seq_len, Balance(documents=130), 20)


def test_a_hundred_conversations_are_seen_often(capsys):
    cfg = compose("train", "experiment=own", "stage=sft")
    assert horizon(cfg, pass_of(6)) == (1024, 40.0, 120)
    assert cfg.batch.micro_batch_size == 2  # of 8 rows that are configured
    assert "WARNING" not in capsys.readouterr().out


def test_many_conversations_are_seen_once():
    cfg = compose("train", "experiment=own", "stage=midtrain")
    tokens, epochs, steps = horizon(cfg, pass_of(20_000))
    assert (tokens, epochs, steps, cfg.batch.micro_batch_size) == (65_536, 1.0, 157, 8)


def test_the_micro_batch_divides_the_step():
    cfg = compose("train", "experiment=own", "stage=sft", "batch.micro_batch_size=6")
    assert horizon(cfg, pass_of(2_000)).tokens_per_step == 8_192 and cfg.batch.micro_batch_size == 4


def test_what_is_configured_is_kept_and_too_few_steps_are_said(capsys):
    keys = ("batch.tokens_per_step=16384", "stage.epochs=1")
    assert horizon(compose("train", "experiment=own", "stage=sft", *keys), pass_of(6)) == (16_384, 1.0, 1)
    warning = "WARNING: 1 steps are too few to learn from: lower batch.tokens_per_step=16384 or raise stage.epochs=1 "
    assert warning in capsys.readouterr().out
    cfg = compose("train", "experiment=own", "stage=sft", *keys, "max_steps=6")
    assert horizon(cfg, pass_of(16)) == (16_384, 12.0, 6)
    assert "WARNING" not in capsys.readouterr().out


def test_published_presets_keep_their_steps():
    for experiment, tokens in {"speedrun": 2**20, "speedrun_2025": 2**16, "demo": 4096, "tiny": 512}.items():
        cfg = compose("train", f"experiment={experiment}", "stage=sft", "max_steps=null")
        rows = cfg.batch.micro_batch_size
        assert horizon(cfg, pass_of(40_000, cfg.model.seq_len)).tokens_per_step == tokens
        assert cfg.batch.micro_batch_size == rows


def begun(tmp_path, devices: int, *keys: str, **derived):
    """Return the configuration of a stage that has saved a step, on another number of devices now."""
    stage_dir = tmp_path / "tiny" / "sft"
    (stage_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    (stage_dir / "checkpoints" / "step_000003.ckpt").touch()
    (stage_dir / "run.json").write_text(json.dumps({"config": {}, "status": "interrupted", "derived": derived}))
    keys = ("stage=sft", "max_steps=null", "trainer=cpu", f"trainer.devices={devices}", f"paths.runs={tmp_path}", *keys)
    return compose("train", "experiment=tiny", "batch.tokens_per_step=null", *keys)


def test_a_resumed_run_keeps_its_step_and_horizon_on_other_devices(tmp_path):
    """By the rule three devices made other steps, and so fewer: the checkpoint of a later step was called damaged."""
    forecast = pass_of(50, 128)
    alone, three = (horizon(begun(tmp_path / str(n), n), forecast) for n in (1, 3))
    assert alone.tokens_per_step == 1024 and three.tokens_per_step == 9 * 128 and alone.steps > three.steps
    kept = dict(zip(("tokens_per_step", "epochs", "steps"), alone, strict=True))
    for devices, rows in ((1, 4), (4, 2), (8, 1)):
        cfg = begun(tmp_path, devices, **kept)
        assert horizon(cfg, forecast) == horizon(cfg, pass_of(60, 128)) == alone
        assert cfg.batch.micro_batch_size == rows
    cfg = begun(tmp_path, 3, **kept)
    with pytest.raises(UserError, match=r"trainer.devices=3: sft was begun with 8 rows .*on 1, 2, 4, 8 of them"):
        check_finetuning(cfg, None)
    with pytest.raises(UserError, match="trainer.devices=3"):
        horizon(cfg, forecast)
    again = begun(tmp_path, 3, "overwrite=true", **kept)
    assert horizon(again, forecast) == three
    assert horizon(begun(tmp_path, 2, "max_steps=7", **kept), forecast)[::2] == (1024, 7)


def test_a_finished_stage_is_lengthened_by_more_passes(tmp_path):
    cfg = begun(tmp_path, 1, "stage.extend=true", "stage.epochs=80", tokens_per_step=1024, epochs=40.0, steps=250)
    stage_dir = tmp_path / "tiny" / "sft"
    assert horizon(cfg, pass_of(50, 128)).steps == 250  # not finished yet
    (stage_dir / "model").mkdir()
    (stage_dir / "run.json").write_text((stage_dir / "run.json").read_text().replace("interrupted", "finished"))
    assert horizon(cfg, pass_of(50, 128)) == (1024, 80.0, 500)
