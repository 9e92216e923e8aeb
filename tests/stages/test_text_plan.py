"""Plans of small texts: packing, passes, warnings, what a resumed run keeps; and the defaults of old runs."""

import json

import pytest
from conftest import compose
from omegaconf import OmegaConf

from llm.data.balance import Balance
from llm.data.sources import document_source
from llm.errors import UserError
from llm.experiments.runs import settings
from llm.run.config_diff import diff_configs, neutral_keys
from llm.scaling.batch_ramp import batch_schedule
from llm.stages import text_plan
from llm.stages.run_stage import keep_old_defaults
from llm.stages.text_plan import TextPlan, plan_text, warnings_of

SIZE = 10_000  # tokens of the text


@pytest.fixture(autouse=True)
def known_size(monkeypatch):
    monkeypatch.setattr(text_plan, "passes_over", lambda source, tokenizer, planned: (SIZE, planned / SIZE))


def config(tmp_path, *keys):
    return compose("train", "experiment=own", "stage=pretrain", f"paths.runs={tmp_path}", *keys)


def planned(cfg, steps, **options):
    return plan_text(cfg, None, None, steps, batch_schedule(cfg, 100), **options)


def cropping(packing):
    """Return a sample of 100 tokens, of which `crop` drops 40."""
    return Balance(read=100, trained=60, cut=40) if packing == "crop" else Balance(read=100, trained=100)


@pytest.mark.parametrize(("steps", "packing"), [(50, "crop"), (100, "crop"), (101, "best_fit")])
def test_packing_follows_the_number_of_passes(tmp_path, steps, packing):
    assert planned(config(tmp_path), steps) == TextPlan(steps, packing, SIZE, steps / 100)


@pytest.mark.parametrize(("steps", "packing", "passes"), [(59, "crop", 0.98), (61, "best_fit", 0.61)])
def test_what_cropping_drops_is_read_too(tmp_path, steps, packing, passes):
    found = planned(config(tmp_path), steps, sample=cropping)
    assert found == TextPlan(steps, packing, SIZE, pytest.approx(passes, abs=0.005))
    assert planned(config(tmp_path, "data.packing=crop"), 61, sample=cropping).passes == pytest.approx(1.017, abs=0.001)


def test_passes_of_a_cropped_text_are_limited_and_warned_of(tmp_path, capsys):
    found = planned(config(tmp_path, "data.packing=crop"), 5000, sample=cropping)
    assert (found.steps, found.passes) == (180, pytest.approx(3))
    tables = planned(config(tmp_path, "data.packing=crop"), 80, sample=cropping, in_tables=SIZE)
    assert tables.passes > 1 and "the tables have 10,000 parameters" in capsys.readouterr().out


def test_a_packing_that_is_named_stays(tmp_path):
    assert planned(config(tmp_path, "data.packing=stream"), 500).packing == "stream"


def test_a_text_of_unknown_size_is_cropped_and_not_shortened(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text_plan, "passes_over", lambda *_: (None, None))
    found = planned(config(tmp_path), 5000)
    assert found == TextPlan(5000, "crop", None, None) and found.facts() == {"packing": "crop"}
    assert capsys.readouterr().out == ""


def test_passes_are_limited_unless_max_steps_is_given(tmp_path, capsys):
    assert planned(config(tmp_path), 5000) == TextPlan(300, "best_fit", SIZE, 3.0)
    capsys.readouterr()
    assert planned(config(tmp_path, "max_steps=5000"), 5000).passes == 50
    assert "WARNING: the run makes 50 passes over its text" in capsys.readouterr().out
    assert planned(config(tmp_path, "stage.max_passes=null"), 5000).steps == 5000


def test_cropping_a_text_that_is_read_again_is_warned_of(tmp_path):
    cfg = config(tmp_path)
    assert warnings_of(cfg, TextPlan(1, "crop", SIZE, 1.0)) == []
    (line,) = warnings_of(cfg, TextPlan(1, "crop", SIZE, 1.5))
    assert "data.packing=best_fit loses nothing" in line
    assert len(warnings_of(cfg, TextPlan(1, "crop", SIZE, 11.0))) == 2


def test_a_resumed_run_keeps_the_plan_it_began_with(tmp_path):
    """The text has grown since: it would now be read less than once."""
    stage_dir = tmp_path / "own" / "pretrain"
    (stage_dir / "checkpoints").mkdir(parents=True)
    kept = {"steps": 40, "packing": "best_fit", "text_tokens": 500, "text_passes": 8.0}
    (stage_dir / "run.json").write_text(json.dumps({"config": {}, "derived": kept}))
    assert planned(config(tmp_path), 50).packing == "crop"  # no checkpoint yet
    (stage_dir / "checkpoints" / "step.ckpt").touch()
    assert planned(config(tmp_path), 50) == TextPlan(40, "best_fit", 500, 8.0)
    assert planned(config(tmp_path, "max_steps=80"), 80) == TextPlan(80, "best_fit", 500, 16.0)
    assert planned(config(tmp_path, "overwrite=true"), 50).packing == "crop"


def test_extend_lengthens_a_finished_run_alone_and_within_the_passes(tmp_path):
    stage_dir = tmp_path / "own" / "pretrain"
    for folder in ("checkpoints", "model"):
        (stage_dir / folder).mkdir(parents=True)
    (stage_dir / "checkpoints" / "step.ckpt").touch()
    manifest = {"config": {}, "derived": {"steps": 30, "packing": "best_fit", "text_tokens": 500, "text_passes": 1.5}}

    def steps(status, *keys):
        (stage_dir / "run.json").write_text(json.dumps(manifest | {"status": status}))
        found = planned(config(tmp_path, "stage.extend=true", *keys), 5000)
        assert found.passes == pytest.approx(found.steps / 20)
        return found.steps

    assert steps("interrupted") == steps("running") == 30
    assert steps("finished") == 60 and steps("finished", "stage.max_passes=null") == 5000
    assert steps("finished", "max_steps=70") == steps("interrupted", "max_steps=70") == 70


@pytest.mark.parametrize(
    ("keys", "balance", "buffer"),
    [
        ((), Balance(read=100, trained=60, cut=40, documents=1), 25),  # a quarter of 100 documents of 100 tokens
        ((), Balance(read=100, trained=100, documents=1, repeated=3), 100),  # cut in 4 pieces each
        ((), Balance(read=1000, trained=1000, documents=1), 16),
        ((), Balance(read=100, trained=100, documents=50), None),  # 5000 of them
        (("stage.buffer=20",), Balance(read=100, trained=100, documents=1), None),
        (("stage.buffer=500",), Balance(read=100, trained=100, documents=1), None),
        (("trainer.devices=2", "trainer=cpu"), Balance(read=100, trained=100, documents=2), 25),
    ],
)
def test_packing_chooses_from_a_quarter_of_a_small_text(tmp_path, keys, balance, buffer):
    found = planned(config(tmp_path, *keys), 20, sample=lambda packing: balance)
    assert found.buffer == buffer and found.facts().get("buffer") == buffer


def test_a_run_that_began_with_a_larger_buffer_keeps_it(tmp_path):
    stage_dir, few = tmp_path / "own" / "pretrain", Balance(read=100, trained=100, documents=1)
    (stage_dir / "checkpoints").mkdir(parents=True)
    (stage_dir / "checkpoints" / "step.ckpt").touch()
    kept = {"steps": 40, "packing": "crop", "text_tokens": 500, "text_passes": 8.0}
    for derived, buffer in ((kept, None), (kept | {"buffer": 30}, 30), ({}, None)):
        (stage_dir / "run.json").write_text(json.dumps({"config": {}, "derived": derived}))
        assert planned(config(tmp_path), 20, sample=lambda packing: few).buffer == buffer
    assert planned(config(tmp_path, "overwrite=true"), 20, sample=lambda packing: few).buffer == 25


def old_manifest(cfg, **values):
    """Return the run.json of a run from before the keys of small texts existed, with the defaults of that time."""
    config = OmegaConf.to_container(cfg)
    del config["data"]["shuffle"]
    for name in ("max_passes", "keep_best"):
        config["stage"].pop(name, None)
    for key, value in ({"data.packing": "crop"} | values).items():
        group, name = key.split(".")
        config[group][name] = value
    return {"config": config}


@pytest.mark.parametrize(
    ("stage", "values"),
    [
        ("pretrain", {}),
        ("pretrain", {"data.packing": "stream"}),
        ("midtrain", {"stage.epochs": 1.0, "batch.tokens_per_step": 16384}),
        ("sft", {"stage.epochs": 1.0, "batch.tokens_per_step": 16384}),
    ],
)
def test_an_old_run_is_resumed_with_the_defaults_of_its_time(stage, values):
    cfg = compose("train", "experiment=own", f"stage={stage}")
    manifest = old_manifest(cfg, **values)
    keep_old_defaults(cfg, manifest)
    now = OmegaConf.to_container(cfg)
    assert diff_configs(manifest["config"], now, neutral_keys(stage)) == []
    assert now["data"]["shuffle"] is None and now["data"]["packing"] == values.get("data.packing", "crop")


LATER = {  # keys of switches that came one after the other, off at first
    "arch": ("activation", "ngrams", "ngram_rows", "ngram_into", "copy_candidate"),
    "optim": ("ngram_lr", "ngram_betas", "ngram_decay", "copy_lr"),
    "trainer": ("gradient_clip_val", "overfit_batches"),
}


def test_a_run_from_before_a_switch_is_one_without_it():
    cfg = compose("train", "experiment=tiny")
    old = OmegaConf.to_container(cfg, resolve=True)
    for group, names in LATER.items():
        for name in names:
            del old[group][name]
    assert diff_configs(old, OmegaConf.to_container(cfg), neutral_keys("pretrain")) == []
    row = {"stage": "pretrain"}
    assert settings(row | {"config": old}) == settings(row | {"config": OmegaConf.to_container(cfg, resolve=True)})
    words = ("arch.copy_candidate=true", "optim.copy_lr=0.1", "arch.ngrams=[2]", "arch.activation=leaky_relu_squared")
    asked = compose("train", "experiment=tiny", *words)
    keep_old_defaults(asked, {"config": old})
    found = diff_configs(old, OmegaConf.to_container(asked), neutral_keys("pretrain"))
    assert {key: now for key, _, now in found} == {
        "arch.copy_candidate": True,
        "optim.copy_lr": 0.1,
        "arch.ngrams": [2],
        "arch.activation": "leaky_relu_squared",
    }


def test_an_old_run_keeps_the_update_rules_and_the_windows_it_began_with():
    """Runs from before tall matrices decayed at their own rate; February's windows were rounded up to 128."""
    february = ("optim=muon_2026_02", "arch=modern_2026_02")
    cfg = compose("train", "experiment=tiny", *february)
    old, began = {"config": OmegaConf.to_container(cfg, resolve=True)}, OmegaConf.to_container(cfg)
    for name in ("coupled_decay", "momentum_overlap", "norm_margin"):
        del old["config"]["optim"][name]
    del old["config"]["arch"]["window_multiple"]
    keep_old_defaults(cfg, old)
    assert diff_configs(old["config"], OmegaConf.to_container(cfg), neutral_keys("pretrain")) == []
    assert (cfg.optim.coupled_decay, cfg.optim.momentum_overlap, cfg.optim.norm_margin) == (False, True, None)
    assert cfg.arch.window_multiple == 128
    again, saved = compose("train", "experiment=tiny", *february), OmegaConf.to_container(cfg)
    keep_old_defaults(again, {"config": saved})  # resumed a second time: run.json now has the keys
    assert OmegaConf.to_container(again) == saved
    asked = compose("train", "experiment=tiny", *february, "optim.coupled_decay=true")
    keep_old_defaults(asked, old)  # the command's own word is not overridden: the run is refused, with the key
    assert [key for key, *_ in diff_configs(old["config"], OmegaConf.to_container(asked))] == ["optim.coupled_decay"]
    new = compose("train", "experiment=tiny", *february)
    keep_old_defaults(new, {"config": began})
    assert OmegaConf.to_container(new) == began


def test_an_old_run_of_own_data_keeps_its_two_files():
    cfg = compose("train", "experiment=own", "stage=sft", "data.tasks_path=mine")
    old = {"config": OmegaConf.to_container(cfg, resolve=True)}
    old["config"]["data"]["tasks"]["chat"] |= {"train": "mine/chat/train.jsonl", "test": "mine/chat/val.jsonl"}
    keep_old_defaults(cfg, old)
    assert diff_configs(old["config"], OmegaConf.to_container(cfg, resolve=True), neutral_keys("sft")) == []
    other = compose("train", "experiment=own", "stage=sft", "data.tasks_path=others")
    keep_old_defaults(other, old)
    assert other.data.tasks.chat.train == "others/chat"


def test_defaults_of_a_new_run_are_not_taken_from_its_past():
    cfg = compose("train", "experiment=own", "stage=sft")
    new = {"config": OmegaConf.to_container(cfg) | {"batch": {"tokens_per_step": 512}}}
    before = OmegaConf.to_container(cfg)
    keep_old_defaults(cfg, new)
    keep_old_defaults(cfg, None)
    anew = compose("train", "experiment=own", "stage=sft", "overwrite=true")
    keep_old_defaults(anew, old_manifest(anew, **{"batch.tokens_per_step": 16384}))
    assert OmegaConf.to_container(cfg) == before and anew.batch.tokens_per_step is None


def test_a_key_of_the_command_line_wins_over_the_defaults_of_an_old_run():
    cfg = compose("train", "experiment=own", "stage=sft", "stage.epochs=3")
    keep_old_defaults(cfg, old_manifest(cfg, **{"stage.epochs": 1.0}))
    assert cfg.stage.epochs == 3


def test_a_seed_for_documents_that_are_made_up_is_refused(tmp_path):
    with pytest.raises(UserError, match="data.shuffle=1 is not read by this option of data"):
        document_source(compose("train", "experiment=tiny", "data.shuffle=1").data, tmp_path)
    assert document_source(compose("train", "experiment=tiny").data, tmp_path) is not None


def test_few_steps_are_told_with_the_size_that_makes_more(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text_plan, "passes_over", lambda source, tokenizer, planned: (330_000, planned / 330_000))

    def told(*keys):
        cfg = config(tmp_path, *keys)
        plan_text(cfg, None, None, 10_000, batch_schedule(cfg, 16_384))
        return [line for line in capsys.readouterr().out.splitlines() if "steps of 16,384" in line]

    (line,) = told()
    assert line.startswith("WARNING: stage.max_passes=3 leaves 60 steps of 16,384 tokens. As many tokens in 120 steps")
    assert line.endswith(": batch.tokens_per_step=8192")
    assert told("model.seq_len=2048")[0].endswith(": batch.tokens_per_step=8192 batch.micro_batch_size=4")
    assert told("stage.max_passes=20") == told("stage.max_passes=null") == told("max_steps=60") == []
    assert "in 120 steps" in told("model.seq_len=8192")[0] and told("model.seq_len=16384") == []
    unlimited, resumed = config(tmp_path, "stage.max_passes=null"), TextPlan(60, "crop", 330_000, 3.0)
    assert text_plan.few_steps(unlimited, resumed, 10_000, batch_schedule(unlimited, 16_384)) == []  # of a kept plan
