"""A resume checkpoint whose parts are missing, of a wrong type or of another stage is skipped, or refused in a line."""

import copy

import pytest
import torch
from small_training import fit

from llm.checkpoint.parts import wrong_part
from llm.checkpoint.resume import CheckpointWriter, load_checkpoint, newest_checkpoint, set_aside
from llm.errors import UserError
from llm.stages.trainer import check_within, needed, restoring

WRONG = (None, True, -1, "4", 10**30, [], {}, [[1]], torch.zeros(3, dtype=torch.int64), torch.zeros(1).expand(2**40))
IDS = "none true -1 text huge list mapping lists tensor endless".split()
DONE = ("loops", "fit_loop", "epoch_loop.manual_optimization.optim_step_progress", "total", "completed")
WTE = ("state_dict", "net.transformer.wte.weight")
GROUP = ("optimizer_states", 0, "param_groups", 0)
MOMENT = ("optimizer_states", 0, "state", 0, "exp_avg")
PACKER = {"placed": 5, "lost": 0, "row_len": 4, "lengths": torch.tensor([2, 9]), "tokens": torch.zeros(6).int()}
CURSOR = {"epoch": 0, "shard": 0, "row": 3, "index": 3}
REAL = {"kind": "text", "cursor": CURSOR, "packer": PACKER, "balance": {"read": 9}}
PARTS = ("state_dict", "optimizer_states", "StepData", "global_step", "epoch", "loops", "fathom")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return what a stage of 6 steps needs, and its folder of checkpoints of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("parts")
    module, _ = fit(folder)
    return needed(module), folder / "checkpoints"


@pytest.fixture
def saved(trained):
    checkpoint = copy.deepcopy(load_checkpoint(trained[1] / "step_000006.ckpt"))
    checkpoint["StepData"] = {"positions": [copy.deepcopy(REAL)]}
    return checkpoint


def put(thing, place, value):
    """Replace, or for KeyError delete, what is at a place of nested mappings and lists."""
    for key in place[:-1]:
        thing = thing[key]
    if value is KeyError:
        del thing[place[-1]]
    else:
        thing[place[-1]] = value


def test_sound_checkpoints_pass(trained, saved):
    needs, folder = trained
    assert needs.misfit(saved) is None
    assert newest_checkpoint(folder, needs.misfit) == (6, folder / "step_000006.ckpt")


@pytest.mark.parametrize("wrong", WRONG, ids=IDS)
@pytest.mark.parametrize(
    "place",
    [
        *((name,) for name in PARTS),
        WTE,
        DONE,
        (*GROUP, "params"),
        (*GROUP, "lr"),
        (*GROUP, "kind"),
        (*GROUP, "betas"),
        MOMENT,
        ("optimizer_states", 0, "state"),
        ("fathom", "window"),
        ("fathom", "recent"),
        ("callbacks", "Throughput", "train_seconds"),
        ("StepData", "positions", 0, "packer", "lengths"),
        ("StepData", "positions", 0, "packer", "tokens"),
        ("StepData", "positions", 0, "cursor", "shard"),
    ],
    ids=lambda place: ".".join(map(str, place)),
)
def test_a_wrong_part_is_said_in_one_line(trained, saved, place, wrong):
    if place[-1] == "recent" and wrong == []:
        return  # no losses yet: right
    put(saved, place, wrong)
    problem = trained[0].misfit(saved)
    assert problem and "\n" not in problem and len(problem) < 400 and str(place[-1]).split(".")[-1] in problem


@pytest.mark.parametrize(
    "place,value,words",
    [
        (WTE, KeyError, "tensor state_dict.net.transformer.wte.weight is missing"),
        (WTE, torch.zeros(3, 4), r"wte.weight is \(3, 4\) of torch.float32, but must be \("),
        (MOMENT, KeyError, "tensor optimizer_states.0..state.0.exp_avg is missing"),
        (MOMENT, torch.zeros(2), r"state.0.exp_avg is \(2,\)"),
        ((*MOMENT[:-1], "step"), KeyError, "tensor optimizer_states.0..state.0.step is missing"),
        (("state_dict", "net.more"), torch.zeros(1), "tensor state_dict.net.more is not of this stage"),
        (("optimizer_states", 0, "state", 99), {}, "state.99 is of no parameter"),
        ((*GROUP, "kind"), "os.system", "kind is os.system"),
        ((*GROUP, "lr"), float("nan"), "lr is nan"),
        (("global_step",), 5, "global_step is 5, but loops counts 6 steps"),
        (("StepData", "positions", 0, "packer", "tokens"), torch.zeros(5).int(), r"tokens is .*\(5,\)"),
    ],
)
def test_tensors_and_names_are_compared_with_the_stages_own(trained, saved, place, value, words):
    import re

    put(saved, place, value)
    assert re.search(words, trained[0].misfit(saved))


@pytest.mark.parametrize("empty", [KeyError, {}], ids=["missing", "empty"])
def test_a_parameter_that_never_had_a_gradient_has_no_state(trained, saved, empty):
    """All of them without a state are no checkpoint of a step."""
    for place in range(len(trained[0].states)):
        assert trained[0].misfit(saved) is None
        put(saved, (*MOMENT[:-2], place), empty)
    assert "state.0.step is missing" in trained[0].misfit(saved)


def test_of_more_steps_than_the_stage_has(trained, saved):
    saved["global_step"] = 10**9
    put(saved, DONE, 10**9)
    assert trained[0].misfit(saved) == "global_step is 1000000000, but the stage has 6 steps"
    assert wrong_part(saved) is None


def test_what_does_not_fit_is_skipped_and_never_thrown_away(trained, saved, tmp_path, caplog):
    needs, folder = trained
    writer = CheckpointWriter(3, False)
    writer.save_checkpoint(load_checkpoint(folder / "step_000004.ckpt"), tmp_path / "step_000004.ckpt")
    put(saved, WTE, torch.zeros(3, 4))
    writer.save_checkpoint(saved, tmp_path / "step_000006.ckpt")
    used = newest_checkpoint(tmp_path, needs.misfit)
    assert used == (4, tmp_path / "step_000004.ckpt") and "step_000006.ckpt is damaged (tensor" in caplog.text
    set_aside(tmp_path, used)
    assert sorted(path.name for path in tmp_path.glob("step*")) == ["step_000004.ckpt", "step_000006.damaged"]
    (tmp_path / "step_000004.ckpt").unlink()
    (tmp_path / "step_000006.damaged").rename(tmp_path / "step_000006.ckpt")
    with pytest.raises(UserError, match=r"step_000006.ckpt: tensor state_dict.*no other checkpoint can be used"):
        newest_checkpoint(tmp_path, needs.misfit)


def test_a_sound_checkpoint_behind_the_last_step_is_left_alone(trained):
    """It was called damaged, and renamed where an older one was there."""
    with pytest.raises(UserError, match=r"step 6 was saved, but the stage has 5 steps now"):
        check_within(trained[1], 5)
    check_within(trained[1], 6)


def test_what_breaks_between_loading_and_the_first_step_names_the_file(trained, tmp_path):
    module, _ = fit(tmp_path)
    module.has_begun = False
    with pytest.raises(UserError, match=r"a.ckpt: the stage cannot go on from it \(KeyError: 'row', test_parts.py:"):
        with restoring(module, tmp_path / "a.ckpt"):
            raise KeyError("row")
    module.has_begun = True
    with pytest.raises(KeyError), restoring(module, tmp_path / "a.ckpt"):
        raise KeyError("row")
