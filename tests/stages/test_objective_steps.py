"""Steps of a training that minimises an objective of its own: weights, and the numbers of metrics.csv."""

import pytest
import torch
from small_training import OPTIM, STAGE, STEPS, fit, net, rows, step_batch

from llm import objectives
from llm.stages.step_module import StageContext, StepModule
from llm.stages.step_state import StepLog


def nll(model, micro):
    """The cross-entropy written as an objective, with the number of trained tokens and the largest loss."""
    losses = -objectives.token_logprobs(model, micro["inputs"], micro["targets"])
    kept = losses.detach()
    return losses.sum(), {"nll": kept.sum(), "nll_max": kept.max(), "rows": torch.tensor(float(len(losses)))}


def module_with(objective) -> StepModule:
    return StepModule(net(), OPTIM, STAGE, StageContext("sft", None, torch.ones(70), STEPS, 8), objective)


def test_an_objective_trains_as_the_cross_entropy_it_equals_and_is_logged(tmp_path):
    plain, _ = fit(tmp_path / "plain")
    own, _ = fit(tmp_path / "own", module=module_with(nll))
    for p, q in zip(plain.net.parameters(), own.net.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-5, rtol=1e-4)
    for step, (a, b) in enumerate(zip(rows(tmp_path / "plain"), rows(tmp_path / "own"), strict=True)):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)
        assert float(b["nll"]) == pytest.approx(float(b["loss"]), rel=1e-5)
        assert float(b["nll_max"]) > float(b["nll"])
        assert float(b["rows"]) == pytest.approx(4 / step_batch(step)["n_trained"])


def test_an_objective_may_make_other_numbers_of_its_sums(tmp_path):
    class Perplexity:
        def __call__(self, model, micro):
            return nll(model, micro)

        def summary(self, sums, n_trained):
            return {"perplexity": 2.718281828 ** (sums["nll"] / n_trained)}

    fit(tmp_path, module=module_with(Perplexity()), total=1)
    (row,) = rows(tmp_path)
    assert float(row["perplexity"]) == pytest.approx(2.718281828 ** float(row["loss"]), rel=1e-5)
    assert "nll" not in row


def test_a_row_has_means_of_all_steps_since_the_last_one_also_of_those_before_a_resume():
    before, after = StepLog(), StepLog()
    before.add_step(10.0, 4, {"reward": 1.0})
    after.load_state_dict(before.state_dict())
    after.add_step(2.0, 2, {"reward": 0.0, "kl": 3.0})
    assert after.flush() == {"reward": 0.5, "kl": 3.0, "loss": 2.0}
    assert after.flush() == {}
