"""Best of n: which answers are kept, what is trained of them, and that a rollout goes on after a kill."""

import pytest
import torch
from conftest import compose
from small_rollouts import TOKENIZER, Task, by_length, model, same, settings

from llm.errors import UserError
from llm.inference.engine import Engine
from llm.stages.best_of_n import BestObjective, BestSteps, build, winner
from llm.stages.rollouts import Group


def steps(network, position=None, score=by_length, **changes) -> BestSteps:
    stage = settings("best_of_n", **({"min_reward": 0.5} | changes))
    return BestSteps(Engine(network, TOKENIZER), Task(), stage, 4, 1, position, score)


def nothing(conversations, completions) -> torch.Tensor:
    return torch.zeros(len(completions))


@pytest.mark.parametrize(
    "rewards, least, best",
    [([0.0, 1.0, 0.5], 0.5, 1), ([0.0, 1.0, 1.0], 0.5, 1), ([0.4, 0.0], 0.5, None), ([0.5, 0.0], 0.5, 0)],
)
def test_the_best_answer_is_kept(rewards, least, best):
    assert winner(rewards, least) == best


def test_one_answer_per_question_is_trained_by_its_cross_entropy():
    network = model()
    batch = next(iter(steps(network)))
    rows = sum(int(micro["advantages"].amax(1).sum()) for micro in batch["micro"])
    assert rows == 2 and batch["metrics"]["kept"] == 1
    assert batch["metrics"]["kept_reward"] >= batch["metrics"]["reward"]
    assert batch["n_trained"] == sum(int((micro["targets"] >= 0).sum()) for micro in batch["micro"])
    (micro,) = batch["micro"]
    ends = [max(i for i, target in enumerate(row) if target >= 0) for row in micro["targets"].tolist()]
    assert batch["n_tokens"] == sum(end + 1 for end in ends)  # those of answers left out are not trained on
    loss, sums = BestObjective()(network, micro)
    torch.testing.assert_close(loss, network(micro["inputs"], micro["targets"], reduction="sum"))
    assert sums["logprob_gap"] / sums["tokens"] < 1e-5


def test_the_reward_of_the_kept_is_a_mean_over_these_alone():
    """Leaves out a question none of whose answers is good enough."""
    scores = [torch.tensor(rewards) for rewards in ([0.9, 0.6, 0.0], [0.1, 0.2, 0.4], [0.0, 0.0, 0.7], [0.3, 0.0, 0.0])]
    weights, numbers = steps(model()).chosen([Group(i, [], one, one) for i, one in enumerate(scores)])
    assert weights == [1.0, 0.0, 0.0, *[0.0] * 3, 0.0, 0.0, 1.0, *[0.0] * 3]
    assert numbers == {"kept": 0.5, "kept_reward": pytest.approx((0.9 + 0.7) / 2)}


def test_where_no_answer_is_good_enough_nothing_is_trained():
    network = model()
    batch = next(iter(steps(network, score=nothing)))
    assert batch["metrics"]["kept"] == batch["metrics"]["kept_reward"] == 0 and batch["n_trained"] == 1
    for micro in batch["micro"]:
        loss, _ = BestObjective()(network, micro)
        loss.backward()
        assert loss == 0
    assert not any(p.grad.any() for p in network.parameters() if p.grad is not None)


def test_a_rollout_serves_several_updates_and_goes_on_after_a_kill():
    network = model()
    straight, batches = iter(steps(network, updates_per_rollout=2)), []
    for _ in range(3):
        batches.append(next(straight))
        with torch.no_grad():  # an optimizer step
            network.head_weight.mul_(1.4)
    resumed = next(iter(steps(model(1), batches[0]["state"], updates_per_rollout=2)))
    assert same(resumed, batches[1]) and same(batches[0], batches[1]) and not same(batches[1], batches[2])
    _, sums = BestObjective()(network, resumed["micro"][0])
    assert sums["logprob_gap"] / sums["tokens"] < 1e-5  # of the weights that drew the answers


def test_a_penalty_that_begins_before_the_answer_is_refused(tmp_path):
    lines = ("stage=best_of_n", "stage.max_new_tokens=6", "stage.overlong=6")
    with pytest.raises(UserError, match="stage.overlong=6: must be smaller than stage.max_new_tokens=6"):
        build(compose("train", "experiment=tiny", *lines), tmp_path)
