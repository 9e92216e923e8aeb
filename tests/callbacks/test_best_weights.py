"""Best weights: which step they are of, that a resumed or killed run finds them, and what is handed over."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_training import StopAt, fit

from callbacks import best
from callbacks.best import BestWeights, best_note, hand_over_best
from callbacks.cadence import Periodic
from llm.checkpoint.resume import newest_checkpoint
from llm.run.best_score import best_line

RISING = {0: 5.0, 2: 3.0, 4: 4.0, 6: 3.5}


class Scores(Periodic):
    """Stands for the evaluation: gives the bpb of a list, keeps the weights of its step, and may die at one step."""

    def __init__(self, scores, dies_at=None):
        super().__init__(2, at_start=True)
        self.scores, self.dies_at, self.weights = scores, dies_at, {}

    def act(self, trainer, module, step):
        if step == self.dies_at:
            raise RuntimeError("killed")
        self.weights[step] = {name: value.clone() for name, value in module.net.state_dict().items()}
        module.row["bpb"] = self.scores[step]


@pytest.fixture(autouse=True)
def plain_folder(monkeypatch):
    """Write the weights alone: the network of these tests has no tokenizer."""

    def save(folder, net, tokenizer):
        folder.mkdir()
        save_file(net.state_dict(), folder / "weights")

    monkeypatch.setattr(best, "save_model_folder", save)


def train(folder, scores, **options):
    return fit(folder, extra=[scores, BestWeights(folder), *options.pop("extra", [])], **options)


def assert_equal(weights, file):
    found = load_file(file)
    assert set(found) == set(weights) and all(torch.equal(found[name], weights[name]) for name in weights)


def test_an_earlier_best_is_handed_over(tmp_path):
    scores = Scores(RISING)
    train(tmp_path, scores)
    assert hand_over_best(tmp_path) == {"step": 2, "bpb": 3.0}
    assert_equal(scores.weights[2], tmp_path / "model" / "weights")
    assert not torch.equal(scores.weights[2]["lm_head.weight"], scores.weights[6]["lm_head.weight"])


# One amid the run; the others, just behind its start and before its end, under test-full.
STOPS = [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 5))]


@pytest.mark.parametrize("stop_at", STOPS)
def test_a_resumed_run_keeps_the_best_of_a_straight_one(tmp_path, stop_at):
    straight, scores = Scores(RISING), Scores(RISING)
    train(tmp_path / "a", straight)
    train(tmp_path / "b", scores, extra=[StopAt(stop_at)])
    train(tmp_path / "b", scores, ckpt=newest_checkpoint(tmp_path / "b" / "checkpoints")[1])
    assert best_note(tmp_path / "b") == {"step": 2, "bpb": 3.0}
    assert_equal(straight.weights[2], tmp_path / "b" / "best" / "model" / "weights")


def test_an_evaluation_lost_between_checkpoint_and_row_counts_when_it_is_made_again(tmp_path):
    lowest_at_4 = RISING | {4: 1.0}
    with pytest.raises(RuntimeError, match="killed"):
        train(tmp_path, Scores(lowest_at_4, dies_at=4))
    assert best_note(tmp_path)["step"] == 2
    step, path = newest_checkpoint(tmp_path / "checkpoints")
    scores = Scores(lowest_at_4)
    train(tmp_path, scores, ckpt=path)
    assert step == 4 and best_note(tmp_path) == {"step": 4, "bpb": 1.0}
    assert_equal(scores.weights[4], tmp_path / "best" / "model" / "weights")


def test_a_run_killed_while_it_replaced_the_folder_finds_the_old_one(tmp_path):
    train(tmp_path, Scores(RISING))
    (tmp_path / "best").rename(tmp_path / ".best.old")
    (tmp_path / ".best.new").mkdir()
    assert hand_over_best(tmp_path) == {"step": 2, "bpb": 3.0}


def test_a_bpb_that_is_no_number_is_never_the_best(tmp_path):
    train(tmp_path, Scores({0: float("nan"), 2: float("nan"), 4: 2.0, 6: float("nan")}))
    assert best_note(tmp_path) == {"step": 4, "bpb": 2.0}


def test_a_run_that_begins_anew_forgets_the_best_before(tmp_path):
    train(tmp_path, Scores(RISING))
    train(tmp_path, Scores(dict.fromkeys(RISING, 9.0)))
    assert best_note(tmp_path) == {"step": 0, "bpb": 9.0}


def test_without_an_evaluation_nothing_is_handed_over(tmp_path):
    assert hand_over_best(tmp_path) is None and not (tmp_path / "model").exists()


def test_the_line_names_best_last_and_the_weights():
    rows = [{"step": 0, "bpb": 8.0}, {"step": 5, "loss": 1.0}, {"step": 300, "bpb": 2.062}, {"step": 480, "bpb": 2.105}]
    line = "bpb: best 2.062 at 300, last 2.105: overfitting"
    assert best_line(rows) == line
    assert best_line(rows, {"step": 300}) == f"{line}; handed over: the weights of step 300"
    assert best_line(rows[:3]) == "bpb: best 2.062 at 300, last 2.062" and best_line(rows[1:2]) is None
