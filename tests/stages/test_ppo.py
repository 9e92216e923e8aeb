"""PPO: rewards and advantages of tokens, the loss of policy and critic, how a rollout goes on after a kill."""

import csv
import shutil

import pytest
import torch
from conftest import compose
from safetensors.torch import load_file
from small_rollouts import TOKENIZER, Task, by_length, kill, model, same, settings

from llm import objectives
from llm.checkpoint.model_folder import load_model_folder, save_model_folder
from llm.errors import UserError
from llm.inference.engine import Engine
from llm.model.gpt import GPT
from llm.run.stage_folder import find_stage, write_manifest
from llm.scaling.rules import model_config
from llm.stages.common import with_scalar_head
from llm.stages.ppo import (
    ActorCriticObjective,
    CriticSteps,
    add_advantages,
    answer_means,
    at_the_end,
    build,
    critic_numbers,
)
from llm.stages.rollouts import Reference, micro_batches_of
from llm.stages.run_stage import run_stage
from llm.tokenizer.bpe import Tokenizer


def critic_steps(network, position=None, reference=None, **changes) -> CriticSteps:
    stage = settings("ppo", **changes)
    return CriticSteps(Engine(network, TOKENIZER), Task(), stage, 4, 1, position, by_length, reference=reference)


def test_the_reward_is_at_the_last_sampled_token():
    assert at_the_end([0, 0, 1, 1], 0.5) == [0.0, 0.0, 0.0, 0.5]
    assert at_the_end([0, 1, 0, 1, 0], -1.0) == [0.0, 0.0, 0.0, -1.0, 0.0]


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_rewards_and_advantages_of_two_answers_by_hand(kl):
    """One answer of two tokens, rewarded by 1, and one of two around a token of a tool, rewarded by 0."""
    ids, masks = [[9, 1, 2], [9, 3, 4, 5]], [[0, 1, 1], [0, 1, 0, 1]]
    rewards = [at_the_end(mask, reward) for mask, reward in zip(masks, (1.0, 0.0), strict=True)]
    (micro,) = micro_batches_of(ids, masks, 2, rewards=rewards, answer=[0, 1])  # the longer one stands first
    micro["values_old"] = torch.tensor([[0.5, 7.0, 0.25], [0.4, 0.6, 7.0]])
    micro["logprobs_old"] = torch.tensor([[-1.0, 0.0, -2.0], [-0.5, -3.0, 0.0]])
    if kl:
        micro["logprobs_ref"] = torch.tensor([[-1.5, 0.0, -1.0], [-0.5, -5.0, 0.0]])
    gamma, lam = 0.9, 0.8
    numbers = add_advantages([micro], settings("ppo", kl=kl, gamma=gamma, lam=lam))
    second = 1.0 - kl * 2.0 - 0.6
    first = 0.0 + gamma * 0.6 - 0.4 + gamma * lam * second
    last = 0.0 + kl * 1.0 - 0.25
    begin = 0.0 - kl * 0.5 + gamma * 0.25 - 0.5 + gamma * lam * last
    found = torch.tensor([begin, last, first, second])
    wanted = torch.tensor([[begin + 0.5, 0.0, last + 0.25], [first + 0.4, second + 0.6, 0.0]])
    torch.testing.assert_close(micro["returns"], wanted)
    white = ((found - found.mean()) / found.std()).tolist()
    torch.testing.assert_close(
        micro["advantages"], torch.tensor([[white[0], 0.0, white[1]], [white[2], white[3], 0.0]]), atol=1e-6, rtol=1e-5
    )
    assert answer_means([micro], 2) == pytest.approx([(white[2] + white[3]) / 2, (white[0] + white[1]) / 2], abs=1e-5)
    assert "logprobs_ref" not in micro and "rewards" not in micro and "answer" not in micro
    assert numbers["value"] == pytest.approx((0.5 + 0.25 + 0.4 + 0.6) / 4)
    assert numbers.get("kl") == (pytest.approx((0.5 - 1.0 + 0.0 + 2.0) / 4) if kl else None)


def test_the_critic_is_judged_by_the_variance_that_it_explains():
    returns = torch.tensor([0.0, 1.0, 1.0, 0.0])
    for values, share in ((returns, 1.0), (torch.full((4,), 0.3), 0.0), (1 - returns, -3.0), (returns / 2, 0.75)):
        numbers = critic_numbers(returns - values, returns)
        assert numbers["explained_variance"] == pytest.approx(share)
        assert numbers["value"] == pytest.approx(values.mean().item())
    assert critic_numbers(torch.ones(3), torch.ones(3)) == {"value": 0.0, "explained_variance": 0.0}


def test_the_loss_is_that_of_its_definition():
    """Loss and gradients against loops over single tokens in fp64."""
    network, stage = model(scalar_head=True).double(), settings("ppo", clip=0.1, value_clip=0.05, value_coef=0.3)
    network.compute_dtype = torch.float64
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 256, (4, 12), generator=g)
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=g) < 0.3] = -1
    names = ("logprobs_old", "advantages", "values_old", "returns", "logprobs_engine")
    micro = {name: torch.randn(4, 11, generator=g, dtype=torch.float64) for name in names}
    with torch.no_grad():  # ratios and values on both sides of their bounds
        logprobs, values = objectives.token_logprobs_and_values(network, inputs, targets)
        micro["logprobs_old"] = logprobs + 0.2 * micro["logprobs_old"]
        micro["values_old"] = values + 0.1 * micro["values_old"]
    total, sums = ActorCriticObjective(stage)(network, {"inputs": inputs, "targets": targets, **micro})
    total.backward()
    got = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    wanted = torch.zeros((), dtype=torch.float64)
    cut = {"clip_low": 0, "clip_high": 0, "value_clip": 0}
    logits, values = network(inputs).log_softmax(-1), network.scalars(inputs)
    for b, t in (targets >= 0).nonzero().tolist():
        old, advantage, value_old, gain = (micro[name][b, t].item() for name in names[:4])
        r = (logits[b, t, targets[b, t]] - old).exp()
        surrogate = torch.minimum(r * advantage, r.clamp(0.9, 1.1) * advantage)
        near = value_old + (values[b, t] - value_old).clamp(-0.05, 0.05)
        plain, clipped = (values[b, t] - gain) ** 2, (near - gain) ** 2
        wanted = wanted - surrogate + 0.3 * 0.5 * torch.maximum(plain, clipped)
        cut["clip_low"] += int(r < 0.9 and advantage < 0)
        cut["clip_high"] += int(r > 1.1 and advantage > 0)
        cut["value_clip"] += int(clipped > plain)
    wanted.backward()
    torch.testing.assert_close(total, wanted, atol=1e-6, rtol=1e-6)
    for a, p in zip(got, network.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, atol=1e-6, rtol=1e-5)
    assert {name: int(sums[name]) for name in cut} == cut and all(cut.values())


def test_rehearsed_conversations_count_by_their_cross_entropy():
    network = model(scalar_head=True)
    ids = torch.randint(0, 256, (2, 6))
    micro = {"inputs": ids[:, :-1], "targets": ids[:, 1:], "weights": torch.full((2, 5), 0.5)}
    loss, sums = ActorCriticObjective(settings("ppo"))(network, micro)
    torch.testing.assert_close(loss, 0.5 * network(ids[:, :-1], ids[:, 1:], reduction="sum"))
    loss.backward()
    assert not sums and network.scalar_head.weight.grad is not None


def test_the_first_update_of_a_rollout_clips_nothing_and_the_next_goes_on_after_a_kill():
    plain = model()
    network = with_scalar_head(plain, True)
    parent = Reference(plain)
    straight = iter(critic_steps(network, reference=parent, kl=0.1, updates_per_rollout=2))
    objective, batches = ActorCriticObjective(settings("ppo")), []
    for _ in range(3):
        batches.append(next(straight))
        micro = batches[-1]["micro"][0]
        _, sums = objective(network, micro)
        is_first = len(batches) != 2
        assert (sums["clip_low"] + sums["clip_high"] == 0) == is_first
        assert torch.equal(micro["values_old"], network.scalars(micro["inputs"]).detach()) == is_first
        with torch.no_grad():  # an optimizer step
            network.head_weight.mul_(1.4)
            network.scalar_head.weight.add_(0.1)
    first = batches[0]["metrics"]
    assert first["value"] == first["explained_variance"] == 0 and first["kl"] == pytest.approx(0, abs=1e-5)
    assert batches[2]["metrics"]["value"] != 0 and batches[2]["metrics"]["kl"] > 0.01
    whole = torch.cat([m["advantages"][m["targets"] >= 0] for m in batches[0]["micro"]])
    assert whole.mean().item() == pytest.approx(0, abs=1e-5) and whole.std().item() == pytest.approx(1, abs=1e-4)
    other = model(1, scalar_head=True)
    resumed = next(iter(critic_steps(other, batches[0]["state"], reference=parent, kl=0.1, updates_per_rollout=2)))
    assert same(resumed, batches[1]) and same(batches[0], batches[1])
    assert {"values_old", "returns", "advantages", "logprobs_old"} <= resumed["micro"][0].keys()


def test_one_answer_per_question_is_enough():
    batch = next(iter(critic_steps(model(scalar_head=True), samples_per_prompt=1)))
    assert sum(len(micro["inputs"]) for micro in batch["micro"]) == 2 and batch["metrics"]["response_len"] > 0


@pytest.mark.parametrize(
    "line, words",
    [
        ("stage.overlong=6", "stage.overlong=6: must be smaller than stage.max_new_tokens=6"),
        ("stage.rewards={number: 1.0}", "stage.reward=number: stage.rewards names rewards too"),
        ("stage.turns=2", "stage.turns=2: task arithmetic never replies"),
        ("stage.task=nothing", "stage.task=nothing: not among data.tasks"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(line, words, tmp_path):
    lines = ("stage=ppo", "stage.max_new_tokens=6", "stage.reward=number", line)
    with pytest.raises(UserError, match=words):
        build(compose("train", "experiment=tiny", *lines), tmp_path)


@pytest.fixture
def runs(tokenizer_runs, tmp_path):
    """runs/ with a network of random weights as the stage sft of the run `tiny`."""
    root = shutil.copytree(tokenizer_runs, tmp_path / "runs")
    cfg, tokenizer = compose("train", "experiment=tiny", *SMALL), Tokenizer.load(root / "tiny" / "tokenizer" / "model")
    net = GPT(model_config(cfg.model, cfg.arch, tokenizer.vocab_size)).init_weights(0)
    save_model_folder(root / "tiny" / "sft" / "model", net, tokenizer)
    write_manifest(root / "tiny" / "sft", {"status": "finished", "finished": "now", "stage": "sft"})
    return root


SMALL = ("model.depth=1", "precision.compute=fp32", "trainer=cpu", "callbacks=none", "optim=adamw")


@pytest.mark.slow
def test_a_stage_killed_between_two_updates_resumes_exactly_and_hands_over_no_critic(runs):
    lines = ("stage=ppo", "init_from=tiny/sft", f"paths.runs={runs}", "save_every=1", "keep_last=3")
    lines += ("max_steps=3", "stage.kl=0.1", "stage.rehearsal=2", "stage.max_new_tokens=8")
    lines += ("stage.reward=length", "stage.reward_options={length: {words: 5}}")

    def train(name):
        run_stage(compose("train", "experiment=tiny", *SMALL, *lines, f"run={name}"))

    train("straight")
    kill(runs, "ppo", (2, 3))
    train("killed")
    a, b = (load_file(runs / name / "ppo" / "model" / "model.safetensors") for name in ("straight", "killed"))
    parent = load_file(runs / "tiny" / "sft" / "model" / "model.safetensors")
    assert a.keys() == b.keys() == parent.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], parent[key]) for key in a)
    assert find_stage(runs, "straight", "ppo").name == "ppo"
    net, _ = load_model_folder(runs / "straight" / "ppo" / "model")
    assert not net.config.scalar_head
    tables = []
    for name in ("straight", "killed"):
        with open(runs / name / "ppo" / "metrics.csv", newline="") as file:
            tables.append(list(csv.DictReader(file)))
    columns = ("loss", "reward", "value", "value_loss", "explained_variance", "kl", "clip_low", "entropy", "ess")
    first, second = ([[row[c] for c in columns] for row in table] for table in tables)
    assert first == second and len([row for row in first if row[0]]) == 3
