"""Metrics as torchmetrics: by hand, in several updates, over processes that the library joins, beside Lightning."""

import math
import statistics

import pytest
import torch
from torchmetrics import MetricCollection

from llm.eval.metrics import BitsPerByte, Core, PassAtK, RewardStatistics, TaskAccuracy, numbers

SIZES = torch.tensor([0, 3, 5])


def filled(metric, *updates):
    for update in updates:
        metric.update(*update)
    return metric


def joined(make, *shares):
    """Return the metric of processes with these updates each, joined as the library joins their states."""
    processes, one = [filled(make(), *updates) for updates in shares], make()
    for name, reduction in one._reductions.items():
        setattr(one, name, reduction(torch.stack([getattr(process, name) for process in processes])))
    one._update_count = 1
    return one


def test_bits_per_byte_by_hand():
    """The third target is ignored, the fourth is a special token without bytes."""
    nats, targets = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[1, 2, -1, 0]])
    metric = filled(BitsPerByte(SIZES), (nats, targets), (nats, targets))
    assert metric.compute().item() == pytest.approx(6.0 / (math.log(2) * 16), rel=1e-12)
    assert math.isnan(filled(BitsPerByte(SIZES), (nats[:, 3:], targets[:, 3:])).compute())


def test_bits_per_byte_hang_neither_on_processes_nor_on_batches():
    nats, targets = torch.rand(6, 32), torch.randint(-1, 3, (6, 32))
    rows = [(nats[i : i + 1], targets[i : i + 1]) for i in range(6)]
    whole = filled(BitsPerByte(SIZES), *rows).compute()
    assert torch.equal(joined(lambda: BitsPerByte(SIZES), rows[:5], rows[5:]).compute(), whole)
    assert filled(BitsPerByte(SIZES), (nats, targets)).compute() == pytest.approx(whole.item(), rel=1e-6)


def test_accuracy_and_its_error():
    found = numbers(filled(TaskAccuracy(0.25), ([True, True, False, False],), ([],)))
    assert found == {"accuracy": 0.5, "n": 4, "stderr": 0.25, "centered": 0.25 / 0.75, "centered_stderr": 0.25 / 0.75}
    shares = [0.25, 1.0, 0.5, 0.0, 0.75]
    found = numbers(joined(TaskAccuracy, [(shares[:2],)], [(shares[2:],)], [([],)]))
    assert found["accuracy"] == 0.5
    assert found["stderr"] == pytest.approx(statistics.pstdev(shares) / math.sqrt(5))
    assert numbers(filled(TaskAccuracy(), ([True] * 3,)))["stderr"] == 0.0


def test_pass_at_k_of_items_on_several_processes():
    found = numbers(joined(lambda: PassAtK((1, 2)), [(4, [2, 0])], [(4, [4])], [(4, [])]))
    assert found == pytest.approx({"pass@1": (0.5 + 0 + 1) / 3, "pass@2": (5 / 6 + 0 + 1) / 3})
    with pytest.raises(ValueError, match="pass@8"):
        PassAtK([8]).update(4, [1])


def test_core_is_the_mean_of_centred_tasks():
    metric = filled(Core({"a": 0.0, "b": 0.5}), ("a", [True, False]), ("b", [True, True, True, False]))
    found = numbers(metric)
    assert (found["core/a"], found["core/b"], found["core"]) == (0.5, 0.5, 0.5)
    errors = [math.sqrt(0.25 / 2), math.sqrt(0.75 * 0.25 / 4) / 0.5]
    assert found["core_stderr"] == pytest.approx(math.hypot(*errors) / 2)
    metric.reset()
    assert numbers(filled(metric, ("a", [True]), ("b", [True])))["core"] == 1.0


def test_rewards_and_groups_that_are_rewarded_alike():
    groups = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.5, 1.0]])
    found = numbers(joined(RewardStatistics, [(groups[:1],)], [(groups[1:],)]))
    flat = groups.flatten().tolist()
    assert found["reward"] == statistics.fmean(flat) and found["reward_alike"] == 0.5
    assert found["reward_std"] == pytest.approx(statistics.pstdev(flat))
    assert (found["reward_min"], found["reward_max"]) == (0.0, 1.0)


def test_they_work_in_a_collection_and_start_again():
    both = MetricCollection({"quiz": TaskAccuracy(0.25), "code": TaskAccuracy()})
    both.update([True, False])
    assert both.compute()["quiz_accuracy" if "quiz_accuracy" in both.compute() else "accuracy"] == 0.5
    both.reset()
    assert both["quiz"].sums.tolist() == [0, 0, 0]
