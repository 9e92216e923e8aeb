"""Distillation: what teacher and student make of a batch, what is refused, and that a stage resumes exactly."""

import csv
import json
import shutil
from dataclasses import replace
from itertools import islice

import pytest
import torch
from conftest import compose
from safetensors.torch import load_file
from small_rollouts import TOKENIZER, Task, by_length, kill, model, same, settings

from llm import objectives
from llm.checkpoint.model_folder import save_model_folder
from llm.errors import UserError
from llm.inference.engine import Engine
from llm.model.gpt import GPT
from llm.run.stage_folder import write_manifest
from llm.scaling.rules import model_config
from llm.stages.distill import ConversationSteps, DistillObjective, StudentSteps, build
from llm.stages.run_stage import run_stage
from llm.tokenizer.bpe import Tokenizer


def teacher(n_embd=24) -> GPT:
    """A network of another width and depth that is not at its start."""
    network = GPT(replace(model().config, n_layer=3, n_embd=n_embd)).init_weights(5)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    return network


def steps(network, position=None, kind=StudentSteps, more=None, **changes):
    stage = settings("distill", **changes)
    return kind(Engine(network, TOKENIZER), Task(), stage, 4, 1, position, by_length, **(more or {}))


def gradients(network) -> list[torch.Tensor]:
    return [p.grad.clone() for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_the_loss_and_the_gradient_are_those_of_the_whole_logits(divergence, monkeypatch):
    monkeypatch.setattr(objectives, "CHUNK_ELEMENTS", 2 * model().config.vocab_size)  # two tokens at a time
    student, other = model(), teacher()
    micro = next(iter(steps(student)))["micro"][0]
    loss, sums = DistillObjective(other, divergence)(student, micro)
    loss.backward()
    found = gradients(student)
    student.zero_grad()
    mask = micro["targets"] >= 0
    a, b = student(micro["inputs"])[mask].log_softmax(-1), other(micro["inputs"])[mask].log_softmax(-1).detach()
    p, q = (a, b) if divergence == "reverse_kl" else (b, a)
    wanted = (p.exp() * (p - q)).sum()
    wanted.backward()
    torch.testing.assert_close(loss, wanted, atol=1e-4, rtol=1e-4)
    for x, y in zip(found, gradients(student), strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-3)
    assert all(p.grad is None for p in other.parameters())
    numbers = DistillObjective.summary({name: value.item() for name, value in sums.items()}, mask.sum().item())
    assert numbers["divergence"] == pytest.approx(loss.item() / mask.sum().item(), rel=1e-4)
    assert numbers["logprob_gap"] < 1e-5 and numbers["ess"] == pytest.approx(1)


def test_the_sampled_form_weighs_tokens_by_what_the_teacher_finds_likelier():
    student, other = model(), teacher()
    micro = next(iter(steps(student)))["micro"][0]
    loss, sums = DistillObjective(other, "sampled")(student, micro)
    ours, theirs = (objectives.token_logprobs(net, micro["inputs"], micro["targets"]) for net in (student, other))
    torch.testing.assert_close(loss, ((ours - theirs).detach() * ours).sum())
    torch.testing.assert_close(sums["divergence"], (ours - theirs).sum().detach())


@pytest.mark.parametrize("divergence", ["reverse_kl", "sampled"])
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(divergence):
    student = model()
    micro = next(iter(steps(student)))["micro"][0]
    loss, _ = DistillObjective(model(), divergence)(student, micro)
    loss.backward()
    assert abs(loss.item()) < 1e-4 and all(g.abs().max() < 1e-4 for g in gradients(student))


def test_rows_without_advantages_count_by_their_cross_entropy_and_padding_by_nothing():
    student, (inputs, targets) = model(), torch.arange(12).view(2, 1, 6)
    objective = DistillObjective(teacher(), "reverse_kl")
    rehearsed = {"inputs": inputs, "targets": targets, "weights": torch.full((1, 6), 0.5)}
    loss, sums = objective(student, rehearsed)
    torch.testing.assert_close(loss, 0.5 * student(inputs, targets, reduction="sum"))
    padding = {"inputs": inputs, "targets": torch.full_like(targets, -1), "advantages": torch.ones(1, 6)}
    nothing, none = objective(student, padding)
    assert nothing == 0 and sums == none == {}


def test_conversations_follow_one_another_and_their_weights_count():
    rows = [Task()[i] for i in range(5)]
    rows[1]["messages"][-1]["train"] = 0.25
    student = model()
    offline = iter(steps(student, kind=ConversationSteps, more={"mixture": rows}, prompts_per_step=1))
    first, second = next(offline), next(offline)
    assert sum(len(micro["inputs"]) for micro in first["micro"]) == 3 and not same(first, second)
    assert set(first["micro"][0]["advantages"].unique().tolist()) == {0.0, 0.25, 1.0}
    resumed = iter(steps(student, first["state"], ConversationSteps, {"mixture": rows}, prompts_per_step=1))
    assert same(next(resumed), second)
    loss, sums = DistillObjective(teacher(), "forward_kl")(student, first["micro"][0])
    assert loss < sums["divergence"] and DistillObjective.summary({k: v.item() for k, v in sums.items()}, 1).keys() == {
        "divergence"
    }


def test_no_conversation_is_left_out_where_a_rollout_serves_several_updates():
    rows, more = [Task()[i] for i in range(5)], {"prompts_per_step": 1, "updates_per_rollout": 2}
    batches = islice(steps(model(), kind=ConversationSteps, more={"mixture": rows}, **more), 4)
    ids = [{token for micro in batch["micro"] for token in micro["inputs"].flatten().tolist()} for batch in batches]
    asked = [{number for number in range(5) if ord(str(number)) in found} for found in ids]
    assert asked == [{0, 1, 2}, {0, 1, 2}, {3, 4, 0}, {3, 4, 0}]


SMALL = ("model.depth=1", "precision.compute=fp32", "trainer=cpu", "callbacks=none", "optim=adamw")


@pytest.fixture
def runs(tokenizer_runs, tmp_path):
    """runs/ with networks of random weights: the stage sft of the run `tiny`, and of `large`, which is its teacher."""
    root = shutil.copytree(tokenizer_runs, tmp_path / "runs")
    tokenizer = Tokenizer.load(root / "tiny" / "tokenizer" / "model")
    for seed, (run, depth) in enumerate({"tiny": 1, "large": 2}.items()):
        cfg = compose("train", "experiment=tiny", *SMALL, f"model.depth={depth}")
        net = GPT(model_config(cfg.model, cfg.arch, tokenizer.vocab_size)).init_weights(seed)
        with torch.no_grad():
            net.head_weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(seed))
        save_model_folder(root / run / "sft" / "model", net, tokenizer)
        write_manifest(root / run / "sft", {"status": "finished", "finished": "now", "stage": "sft"})
    return root


@pytest.mark.parametrize(
    "lines, words",
    [
        ((), "stage.teacher=null: name the model to learn from, stage.teacher=<run>/<stage>"),
        (("stage.divergence=sampled", "stage.source=data"), "stage.divergence=sampled: needs tokens that the student"),
        (("stage.divergence=sampled", "stage.updates_per_rollout=2"), "stage.updates_per_rollout=2: stage.divergence="),
        (("stage.overlong=5",), "stage.overlong=5: stage=distill learns from no reward; set it to 0"),
        (("stage.task=nothing",), "stage.task=nothing: not among data.tasks"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(lines, words, tmp_path):
    named = ("stage.teacher=large/sft",) if lines else ()
    with pytest.raises(UserError, match=words):
        build(compose("train", "experiment=tiny", "stage=distill", *named, *lines), tmp_path)


def test_teachers_that_do_not_fit_are_refused_in_one_line(runs):
    parent = runs / "tiny" / "sft" / "model"
    lines = ("stage=distill", "run=tiny", f"paths.runs={runs}")

    def refusal(*more):
        with pytest.raises(UserError) as refused:
            build(compose("train", "experiment=tiny", *SMALL, *lines, *more), parent)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    assert "stage.teacher=huge is neither a run nor a folder" in refusal("stage.teacher=huge")
    network = GPT(replace(model().config, seq_len=128)).init_weights(0)
    save_model_folder(runs / "bytes", network, TOKENIZER)
    assert "has another tokenizer (265 tokens) than the trained" in refusal(f"stage.teacher={runs / 'bytes'}")
    tokenizer, cfg = Tokenizer.load(parent), compose("train", "experiment=tiny", *SMALL, "model.seq_len=64")
    short = GPT(model_config(cfg.model, cfg.arch, tokenizer.vocab_size)).init_weights(0)
    save_model_folder(runs / "short", short, tokenizer)
    assert "its context of 64 tokens is shorter than model.seq_len=128" in refusal(f"stage.teacher={runs / 'short'}")


@pytest.mark.slow
@pytest.mark.parametrize("source", ["rollouts", "data"])
def test_a_killed_stage_resumes_exactly_and_comes_nearer_to_its_teacher(runs, source):
    lines = ("stage=distill", "init_from=tiny/sft", f"paths.runs={runs}", "save_every=1", "keep_last=4", "max_steps=4")
    lines += ("stage.teacher=large/sft", f"stage.source={source}", "stage.rehearsal=2", "stage.max_new_tokens=8")
    lines += ("stage.updates_per_rollout=2", "stage.rehearsal_weight=0.01", "stage.lr_frac=1")

    def train(name):
        run_stage(compose("train", "experiment=tiny", *SMALL, *lines, f"run={name}"))

    train("straight")
    assert list(json.loads((runs / "straight/distill/run.json").read_text())["further"]) == ["stage.teacher"]
    kill(runs, "distill", (2, 3, 4))
    train("killed")
    a, b = (load_file(runs / name / "distill" / "model" / "model.safetensors") for name in ("straight", "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    with open(runs / "straight" / "distill" / "metrics.csv", newline="") as file:
        found = [float(row["divergence"]) for row in csv.DictReader(file) if row["divergence"]]
    assert found[1] < found[0] and len(found) == 4


def test_steps_for_all_passes_over_the_conversations_are_not_rounded_down_pass_by_pass(runs):
    lines = ("stage=distill", "run=tiny", f"paths.runs={runs}", "stage.teacher=large/sft", "stage.source=data")
    more = ("stage.epochs=3", "max_steps=null", "stage.prompts_per_step=16", "stage.samples_per_prompt=4")
    built = build(compose("train", "experiment=tiny", *SMALL, *lines, *more), runs / "tiny" / "sft" / "model")
    conversations = built.derived["conversations"]
    assert conversations % 64 and 3 - 64 / conversations < built.derived["epochs"] <= 3


def test_a_run_without_a_name_has_that_of_its_model(runs):
    lines = ("stage=distill", "run=null", "init_from=tiny/sft", f"paths.runs={runs}", "stage.teacher=large/sft")
    more = (
        "max_steps=1",
        "stage.rehearsal=0",
        "stage.max_new_tokens=4",
        "stage.eval_examples=2",
        "stage.keep_rollouts=1",
    )
    run_stage(compose("train", "experiment=tiny", *SMALL, *lines, *more))
    folder = runs / "d1/distill"
    manifest = json.loads((folder / "run.json").read_text())
    assert (manifest["status"], manifest["config"]["run"]) == ("finished", "d1") and (
        folder / "rollouts.jsonl"
    ).is_file()
