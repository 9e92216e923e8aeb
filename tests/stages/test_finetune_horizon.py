"""Size of a step and passes of finetuning: by rule, as configured, and the warning of too few steps."""

from conftest import compose

from llm.data.balance import Balance
from llm.data.conversations import Forecast
from llm.stages.finetune import horizon


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
