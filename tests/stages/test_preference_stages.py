"""Stages reward and dpo: every loss trains, is evaluated and resumes exactly; what cannot be trained on is refused."""

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import compose
from omegaconf import OmegaConf
from safetensors.torch import load_file

from llm.checkpoint.model_folder import load_model_folder, save_model_folder
from llm.errors import UserError
from llm.eval.evaluate import run_evaluation, score_rows
from llm.eval.preferences import compared, interval
from llm.model.gpt import GPT
from llm.objectives import PREFERENCE_LOSSES, PreferenceSettings
from llm.run.stage_folder import find_stage, write_manifest
from llm.scaling.rules import model_config
from llm.stages.choices import check_kto
from llm.stages.common import load_parent
from llm.stages.data_check import preferred
from llm.stages.dpo import PreferenceObjective, build, settings_of
from llm.stages.rollout_stage import read_task
from llm.stages.run_stage import run_stage
from llm.tokenizer.bpe import Tokenizer
from llm.utils.format import value

SMALL = ("model.depth=1", "precision.compute=fp32", "trainer=cpu", "callbacks=none", "optim=adamw", "save_every=2")
FEW = (
    "max_steps=4",
    "stage.pairs_per_step=4",
    "stage.eval_pairs=8",
    "stage.eval_every=4",
    "stage.preferences=[politeness]",
)
SIZES = ("data.preferences.politeness.size=40", "data.preferences.politeness.test_size=12")


def config(root, run, stage, *more):
    own = ("stage.eval_examples=2", "stage.max_new_tokens=8") if stage == "dpo" else ()
    lines = (*SMALL, *FEW, *SIZES, *own, f"run={run}", "init_from=tiny/sft", f"stage={stage}", f"paths.runs={root}")
    return compose("train", "experiment=tiny", *lines, *more)


def metrics(root, run, stage):
    with open(root / run / stage / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def runs(tokenizer_runs, tmp_path_factory):
    """runs/ with a network of random weights as the stage sft of the run `tiny`."""
    root = shutil.copytree(tokenizer_runs, tmp_path_factory.mktemp("preferences") / "runs")
    cfg, tokenizer = config(root, "tiny", "dpo"), Tokenizer.load(root / "tiny" / "tokenizer" / "model")
    net = GPT(model_config(cfg.model, cfg.arch, tokenizer.vocab_size)).init_weights(0)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    save_model_folder(root / "tiny" / "sft" / "model", net, tokenizer)
    write_manifest(root / "tiny" / "sft", {"status": "finished", "finished": "now", "stage": "sft"})
    return root


@pytest.mark.slow
@pytest.mark.parametrize("stage, more", [("reward", ()), ("dpo", ()), ("dpo", ("stage.loss=kto",))])
def test_a_stage_resumes_exactly(runs, stage, more):
    name = f"{stage}{len(more)}"
    run_stage(config(runs, name, stage, *more))
    shutil.copytree(runs / name, runs / f"{name}_killed")
    folder = runs / f"{name}_killed" / stage
    shutil.rmtree(folder / "model")
    (folder / "checkpoints" / "step_000004.ckpt").unlink()
    manifest = json.loads((folder / "run.json").read_text())
    write_manifest(folder, manifest | {"status": "running"})
    run_stage(config(runs, f"{name}_killed", stage, *more))
    alone, resumed = (load_file(runs / one / stage / "model" / "model.safetensors") for one in (name, f"{name}_killed"))
    assert alone.keys() == resumed.keys()
    assert all(torch.equal(alone[key], resumed[key]) for key in alone)
    first, second = metrics(runs, name, stage), metrics(runs, f"{name}_killed", stage)
    columns = ("loss", "accuracy", "margin", "preference/accuracy", "preference/margin")
    assert [[row[c] for c in columns] for row in first] == [[row[c] for c in columns] for row in second]
    assert len(first) == 5 and float(first[0]["preference/margin"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["ipo", "orpo", "simpo"])
def test_every_loss_trains_and_is_measured(runs, loss):
    run_stage(config(runs, loss, "dpo", f"stage.loss={loss}"))
    rows = metrics(runs, loss, "dpo")
    assert all(math.isfinite(float(value)) for row in rows for value in row.values() if value)
    assert ("kl" in rows[1]) == (loss == "ipo")
    last = rows[-1]
    low, high = (float(last[f"preference/accuracy_{side}"]) for side in ("low", "high"))
    assert low <= float(last["preference/accuracy"]) <= high
    assert 0 <= float(last["preference/win_rate"]) <= 1
    derived = json.loads((runs / loss / "dpo" / "run.json").read_text())["derived"]
    assert (derived["preferences"], derived["preferences_held_out"], derived["rows_dropped"]) == (40, 8, 0)


@pytest.mark.slow
def test_the_first_losses_are_those_of_a_network_that_prefers_nothing(runs):
    found = {}
    for stage, more in (("dpo", ()), ("reward", ()), ("dpo", ("stage.loss=ipo", "stage.beta=0.5"))):
        name = f"first_{stage}{len(more)}"
        run_stage(config(runs, name, stage, "max_steps=1", *more))
        found[name] = metrics(runs, name, stage)[1]
    assert float(found["first_dpo0"]["loss"]) == pytest.approx(math.log(2), abs=1e-5)
    assert float(found["first_reward0"]["loss"]) == pytest.approx(math.log(2), abs=1e-5)
    assert float(found["first_dpo2"]["loss"]) == pytest.approx(1.0, abs=1e-4)
    assert float(found["first_dpo0"]["kl"]) == pytest.approx(0, abs=1e-8)
    assert float(found["first_dpo0"]["accuracy"]) == 0.5


def test_a_reward_model_is_evaluated_and_cannot_be_served_or_chat(runs):
    run_stage(config(runs, "judge", "reward", "max_steps=2"))
    net, _ = load_model_folder(runs / "judge" / "reward" / "model")
    assert net.config.scalar_head and net.scalar_head.weight.abs().sum() > 0
    cfg = compose("evaluate", "run=judge", f"paths.runs={runs}")
    cfg.stage = "reward"
    found = run_evaluation(cfg)
    last = metrics(runs, "judge", "reward")[-1]
    assert found["preferences"]["accuracy"] == pytest.approx(float(last["preference/accuracy"]))
    assert "bpb" not in found and "chat" not in found
    assert "| pairs told apart" in (runs / "judge" / "report.md").read_text()
    with pytest.raises(UserError, match="holds no model that generates text; choose another. Finished .*: tiny/sft.$"):
        find_stage(runs, "judge", "reward")
    table = {metric: cells for metric, *cells in score_rows(found)}
    assert "preferences n" not in table and "preferences margin_stderr" not in table
    assert table["preferences margin"][1:] == [value(found["preferences"]["margin_stderr"]), "8"]
    assert table["preferences accuracy"][1:] == ["", "8"]
    cfg.data = config(runs, "judge", "reward").data
    cfg.data.preferences.politeness.test_size = 6
    merged = run_evaluation(cfg)
    assert merged["preferences"] == found["preferences"], "other pairs replace no score of the stage's own"
    ((_, score),) = merged["other_data"].items()
    assert score["preferences"]["n"] == 6


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("eval=[core]", "eval.bundle=x"), "eval=core"),
        (("eval=lm_eval", "eval.tasks=[arc_easy]"), "eval=lm_eval"),
        (("+eval.judges.mine._target_=builtins.len",), "eval.judges.mine"),
    ],
)
def test_what_needs_text_is_refused_of_a_reward_model_before_it_is_loaded(runs, more, named):
    write_manifest(runs / "unread" / "reward", {"status": "finished", "stage": "reward"})
    (runs / "unread" / "reward" / "model").mkdir(exist_ok=True)
    cfg = compose("evaluate", "run=unread", "trust=[builtins]", f"paths.runs={runs}", *more)
    cfg.stage = "reward"
    with pytest.raises(UserError, match=f"{named}: unread/reward is a reward model and writes no text"):
        run_evaluation(cfg)


def test_a_scalar_head_is_added_and_left_out_by_the_stage(runs):
    cfg = config(runs, "heads", "reward")
    plain = runs / "tiny" / "sft" / "model"
    net, tokenizer = load_parent(plain, cfg, scalar_head=True)
    assert torch.equal(net.scalars(torch.tensor([[1, 2, 3]])), torch.zeros(1, 3))
    torch.nn.init.ones_(net.scalar_head.weight)
    save_model_folder(runs / "heads" / "model", net, tokenizer)
    kept, _ = load_parent(runs / "heads" / "model", cfg, scalar_head=True)
    assert torch.equal(kept.scalar_head.weight, net.scalar_head.weight)
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(kept.scalars(ids), kept.hidden(ids).sum(-1))
    other, _ = load_parent(runs / "heads" / "model", cfg)
    assert other.scalar_head is None and torch.equal(other(ids), net(ids))


@pytest.mark.parametrize(
    "stage, more, words",
    [
        ("dpo", ("+data.preferences.politeness.options.unpaired=true",), "stage.loss=dpo: needs pairs"),
        ("reward", ("+data.preferences.politeness.options.unpaired=true",), "stage=reward: needs pairs"),
        ("dpo", ("model.seq_len=128", "data.preferences.politeness.source=local"), "data.preferences.politeness"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(runs, stage, more, words):
    with pytest.raises(UserError, match=words):
        run_stage(config(runs, "refused", stage, *more))


def test_data_without_preferences_is_refused():
    cfg = OmegaConf.create({"stage": {"name": "dpo", "preferences": None}, "data": {"preferences": {}}})
    with pytest.raises(UserError, match="data.preferences is empty: stage=dpo trains on preferences"):
        preferred(cfg)


@pytest.mark.slow
def test_kto_takes_single_answers(runs):
    run_stage(config(runs, "single", "dpo", "stage.loss=kto", "+data.preferences.politeness.options.unpaired=true"))
    last = metrics(runs, "single", "dpo")[-1]
    assert math.isfinite(float(last["loss"])) and float(last["baseline"]) >= 0


# ----- scores


def test_accuracy_and_margin_by_hand():
    good, bad = torch.tensor([1.0, 2.0, 0.0, 3.0]), torch.tensor([0.0, 2.0, 1.0, 1.0])
    found = compared(good, bad, is_paired=True)
    assert (found["accuracy"], found["margin"], found["n"]) == (0.625, 0.5, 4)
    assert found["margin_stderr"] == pytest.approx(math.sqrt((0.25 + 0.25 + 2.25 + 2.25) / 4 / 4))
    found = compared(torch.tensor([1.0, 0.0]), torch.tensor([0.5]), is_paired=False)
    assert (found["accuracy"], found["margin"], found["n"]) == (0.5, 0.0, 1)
    assert compared(good, good[:0], True) == {}


def test_every_number_of_a_loss_is_the_key_of_its_name():
    numbers = {name: 0.1 * place for place, name in enumerate(vars(PreferenceSettings()), 1)}
    lines = [f"stage.{name}={number}" for name, number in numbers.items()]
    assert settings_of(compose("train", "stage=dpo", *lines).stage) == PreferenceSettings(**numbers)
    default = settings_of(compose("train", "stage=dpo", "stage.loss=simpo").stage)
    assert default.beta == PREFERENCE_LOSSES["simpo"].beta == 2.0


class Given(torch.nn.Module):
    """Stands for a network: gives a loss of 1 nat to every target."""

    def forward(self, inputs, targets, reduction):
        return (targets >= 0).float()


@pytest.mark.parametrize(("loss", "kl"), [("dpo", 0.5 * (0.5**2 + 2**2) / 2), ("kto", 0.5 * (0.5**2 + 2**2))])
def test_the_distance_from_the_parent_is_a_mean_per_token_of_every_answer(loss, kl):
    """Computes the sum by hand, which a step divides by its pairs, or by its answers: by 1 and by 2."""
    targets = torch.tensor([[-1, 3, 4], [-1, 5, -1]])
    micro = {"inputs": targets, "targets": targets, "last": torch.tensor([2, 1])}
    micro["logprobs_ref"] = torch.tensor([[0.0, -0.5, -0.5], [0.0, -3.0, 0.0]])
    micro |= {"labels": torch.tensor([True, False]), "baseline": torch.tensor(0.0)} if loss == "kto" else {}
    _, sums = PreferenceObjective(PREFERENCE_LOSSES[loss], PreferenceSettings(beta=0.5))(Given(), micro)
    assert sums["kl"].item() == pytest.approx(kl)
    # by 1.0 and 2.0 nats: the chosen answer has become less likely than it was, the other one more likely
    assert sums["margin"].item() == pytest.approx(0.5 * (-1.0 - 2.0)) and sums["accuracy"].item() == 0


def test_the_interval_is_wilsons():
    assert interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert interval(1.0, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)


def test_kto_with_one_row_a_step_has_no_other_question_to_compare_with():
    lines = ("experiment=tiny", "stage=dpo", "stage.loss=kto")
    with pytest.raises(UserError, match="stage.pairs_per_step=1: stage.loss=kto needs the answers of another row"):
        check_kto(compose("train", *lines, "stage.pairs_per_step=1"), None)
    check_kto(compose("train", *lines, "stage.pairs_per_step=2"), None)


def test_kto_on_repeated_steps_is_refused_and_dpo_is_not(tmp_path):
    lines = ("experiment=tiny", "stage=dpo", "trainer.overfit_batches=2")
    for check in (check_kto, lambda cfg: build(cfg, tmp_path)):
        with pytest.raises(UserError, match="trainer.overfit_batches=2: stage.loss=kto measures its baseline"):
            check(compose("train", *lines, "stage.loss=kto"))
    check_kto(compose("train", *lines))


@pytest.mark.parametrize("stage", ["grpo", "ppo", "best_of_n", "distill"])
def test_steps_that_draw_answers_are_not_repeated(stage):
    cfg = compose("train", "experiment=tiny", f"stage={stage}", "trainer.overfit_batches=2")
    with pytest.raises(UserError, match=f"trainer.overfit_batches=2: stage={stage} trains on answers that the weights"):
        read_task(cfg, Path("model"))


def test_only_tasks_that_give_a_reward_are_offered(tmp_path):
    """A task of conversations is trained on, and a source of preferences may stand for a task."""
    turns = [{"role": role, "content": "hi"} for role in ("user", "assistant")]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    files = [f"data.tasks.chat.{split}={tmp_path / split}.jsonl" for split in ("train", "test")]
    own = ("experiment=own", "stage=grpo", "stage.rehearsal=0", *files)
    tiny = ("experiment=tiny", "stage=grpo", "data.tasks.arithmetic.type=chat")
    for lines, words in (
        (own, "data.rl=null: name the task to be rewarded for, stage.task=<one of identity>"),
        ((*own, "stage.task=chat"), "stage.task=chat: a task of kind chat gives no reward; choose one of identity$"),
        ((*tiny, "stage.task=x"), r"not among data.tasks and data.preferences \(spelling, spell_words, identity, po"),
    ):
        with pytest.raises(UserError, match=words):
            read_task(compose("train", *lines), tmp_path)
