"""Steps that grow by parts, the loader's side of a batch ramp: rows of equal steps, resumed, skipped, shared out."""

import pytest
import torch
from data.test_loader import placed, same, take, text_steps
from data_files import words, write

from llm.data.loader import StepLayout, positions_for

GROWS = (1, 4, 5)  # one micro-batch, then two, three and four
SIZES = [1, 2, 2, 2, 3, 4, 4, 4]


@pytest.fixture
def folder(tmp_path):
    """Two parquet shards: 40 training documents, 30 for validation."""
    for shard, (n, first) in enumerate([(40, 0), (30, 200)]):
        write(tmp_path / f"shard_{shard}.parquet", words(n, first))
    return tmp_path


def growing(folder, state=None, **more):
    return text_steps(folder, state, **{"rows_per_micro": 2, "micro_per_step": 4, "grows_at": GROWS} | more)


def rows_of(steps):
    return torch.cat([micro["inputs"] for step in steps for micro in step["micro"]])


@pytest.mark.parametrize("packing", ["crop", "best_fit", "stream"])
def test_growing_steps_have_the_rows_of_equal_ones(folder, packing):
    steps = take(growing(folder, packing=packing), len(SIZES))
    plain = take(text_steps(folder, rows_per_micro=2, micro_per_step=1, packing=packing), sum(SIZES))
    assert [len(step["micro"]) for step in steps] == SIZES
    assert [step["n_tokens"] for step in steps] == [step["n_trained"] for step in steps] == [64 * n for n in SIZES]
    assert torch.equal(rows_of(steps), rows_of(plain))
    assert same(steps[-1]["state"] | {"step": 22}, plain[-1]["state"])  # but for its number


@pytest.mark.parametrize("rank, world", [(0, 1), (1, 2)])
def test_growing_steps_resume_behind_every_step(folder, tmp_path, rank, world):
    straight = take(growing(folder, rank=rank, world=world), len(SIZES))
    for done in range(1, len(SIZES)):
        torch.save(straight[done - 1]["state"], tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        assert state["step"] == done
        assert same(take(growing(folder, state, rank=rank, world=world), len(SIZES) - done), straight[done:])


@pytest.mark.parametrize("done", [0, 1, 3])
def test_data_that_is_left_out_does_not_move_the_ramp(folder, done):
    steps = take(growing(folder), len(SIZES))
    loader = growing(folder, steps[done - 1]["state"] if done else None)
    loader.skip(2)
    found = take(loader, len(SIZES) - done)
    assert [len(step["micro"]) for step in found] == SIZES[done:]
    left_out = sum(SIZES[done : done + 2])
    plain = take(text_steps(folder, rows_per_micro=2, micro_per_step=1), sum(SIZES) + left_out)
    assert torch.equal(rows_of(found), rows_of(plain[sum(SIZES[:done]) + left_out :]))
    assert found[-1]["state"]["step"] == len(SIZES)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_have_the_steps_of_one(folder, world):
    """Also where their number changes on the way."""
    alone = [step["n_tokens"] for step in take(growing(folder, rows_per_micro=4), 6)]
    shares = [take(growing(folder, rows_per_micro=4 // world, rank=k, world=world), 6) for k in range(world)]
    assert [sum(step["n_tokens"] for step in steps) for steps in zip(*shares, strict=True)] == alone
    moved = positions_for([steps[2]["state"] for steps in shares], 1)
    resumed = take(growing(folder, moved[0], rows_per_micro=4), 3)
    assert [step["n_tokens"] for step in resumed] == alone[3:]


def test_a_position_of_an_older_release_goes_on(folder):
    """It does not say how many steps it is behind, and its steps are all alike."""
    steps = take(text_steps(folder), 4)
    old = {name: value for name, value in steps[1]["state"].items() if name != "step"}
    again = [placed(step) for step, _ in zip(text_steps(folder, old).steps(), range(2), strict=False)]
    assert all(same(a["micro"], b["micro"]) for a, b in zip(again, steps[2:], strict=True))


def test_parts_that_are_no_whole_micro_batches_are_refused():
    with pytest.raises(ValueError, match="out of range"):
        StepLayout(32, 2, 4, grows_at=(1, 2))
    layout = StepLayout(32, 2, 6, grows_at=(2, 2))  # two parts at once, in a short training
    assert [layout.micro_batches_of(step) for step in range(4)] == [2, 2, 6, 6]
