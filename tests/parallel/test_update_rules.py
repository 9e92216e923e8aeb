"""Update rules that are not ours, divided among processes."""

import subprocess
import sys

import pytest
import torch
import update_rule_job
from conftest import REPO

from llm.config import registries
from llm.optim import GroupOptimizer
from llm.parallel.launch import child_env, free_port


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{optimizer class: (weights, state)} of two processes."""
    folder, port = tmp_path_factory.mktemp("rules"), free_port()
    command = [sys.executable, str(REPO / "tests" / "update_rule_job.py"), str(folder)]
    children = [subprocess.Popen(command, env=child_env(rank, 2, port)) for rank in range(2)]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(registries.UPDATE_RULES, "entries", dict(registries.UPDATE_RULES.entries))
    update_rule_job.register()
    return update_rule_job.trained(GroupOptimizer, 2)


@pytest.mark.parametrize("kind", ["ShardedOptimizer", "FullyShardedOptimizer"])
def test_a_new_rule_is_divided_gathered_and_resumed_bit_for_bit(results, alone, kind):
    """Catches a state tensor that is not cut, is put together in another order, or is lost on the way to rank 0."""
    (weights, state), (expected, whole) = results[kind], alone
    for a, b in zip(weights, expected, strict=True):
        assert torch.equal(a, b)
    assert state.keys() == whole.keys()
    for number, tensors in whole.items():
        assert tensors.keys() == state[number].keys()
        assert all(torch.equal(value, state[number][name]) for name, value in tensors.items()), number
