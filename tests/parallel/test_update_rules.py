"""Update rules that are not ours, divided among processes, and their state through a chain of resumes."""

from functools import cache

import pytest
import torch
import update_rule_job
from conftest import REPO
from processes import finish, start_warm

from llm.config import registries
from llm.optim import GroupOptimizer, optimizer
from llm.parallel.launch import child_env, free_port


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """results(n): {(optimizer class, resumed, rules): (weights, state)} of n processes, and {early: weights}."""

    @cache
    def run(n: int) -> dict:
        folder, port = tmp_path_factory.mktemp("rules"), free_port()
        job = (REPO / "tests" / "update_rule_job.py", str(folder))
        ended = finish(*(start_warm(*job, env=child_env(rank, n, port)) for rank in range(n)))
        assert [status for status, *_ in ended] == [0] * n, ended
        return torch.load(folder / "results.pt", weights_only=True)

    return run


@pytest.fixture
def own_rules(monkeypatch):
    monkeypatch.setattr(registries.UPDATE_RULES, "entries", dict(registries.UPDATE_RULES.entries))
    monkeypatch.setattr(optimizer, "STACK_BYTES", dict(optimizer.STACK_BYTES))
    update_rule_job.register()


def assert_same(got: tuple[list, dict], expected: tuple[list, dict]) -> None:
    """Fail unless weights and state of every parameter are equal bit for bit."""
    (weights, state), (other_weights, other_state) = got, expected
    for a, b in zip(weights, other_weights, strict=True):
        assert torch.equal(a, b)
    assert state.keys() == other_state.keys()
    for number, tensors in other_state.items():
        assert tensors.keys() == state[number].keys()
        assert all(torch.equal(value, state[number][name]) for name, value in tensors.items()), number


@pytest.mark.parametrize("n", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(
    ("kind", "rules"),
    [
        *(("ShardedOptimizer", rules) for rules in update_rule_job.RULES),
        *(("FullyShardedOptimizer", rules) for rules in update_rule_job.RULES if rules not in update_rule_job.WHOLE),
    ],
)
def test_a_rule_is_divided_gathered_and_resumed_bit_for_bit(results, own_rules, kind, rules, resumed, n):
    """Catches a state that is not cut, is put together in another order, or is overwritten by a process without any."""
    assert_same(results(n)[kind, resumed, rules], update_rule_job.trained(GroupOptimizer, n, False, rules))


def test_sums_that_begin_early_and_what_is_exchanged_beside_them_keep_one_order(results):
    """Also where a process has no gradient of a part: it exchanged its losses where others summed that part."""
    assert all(map(torch.equal, results(3)[True], results(3)[False]))


@pytest.mark.parametrize("rules", update_rule_job.RULES)
def test_one_process_resumes_bit_for_bit(own_rules, rules):
    """strategy=single, and every process of strategy=ddp."""
    assert_same(*(update_rule_job.trained(GroupOptimizer, 2, resumed, rules) for resumed in (True, False)))
