"""samples.jsonl: what a model said while it trained, also after a resume, a crash, and in a long training."""

import json

import pytest

from llm.errors import UserError
from llm.run import samples_file
from llm.run.samples_file import FILE, SamplesFile, read_samples


def steps(folder):
    return [entry["step"] for entry in read_samples(folder)]


def test_samples_of_every_step_are_kept(tmp_path):
    assert read_samples(tmp_path) == []
    file = SamplesFile(tmp_path)
    file.add(2, [("two | 2", "plus\n<two> ünd"), ("is", "")])
    file.add(4, [("is", "it")])
    first, second = read_samples(tmp_path)
    assert first["samples"][0] == {"prompt": "two | 2", "completion": "plus\n<two> ünd"}
    assert second == {"step": 4, "samples": [{"prompt": "is", "completion": "it"}]}


def test_steps_that_come_again_are_written_anew(tmp_path):
    file = SamplesFile(tmp_path)
    for step in (2, 4, 6):
        file.add(step, [("a", f"{step} before")])
    file.add(4, [("a", "4 after a way back to a checkpoint")])
    assert steps(tmp_path) == [2, 4]
    resumed = SamplesFile(tmp_path)
    resumed.add(4, [("a", "4 again")])
    resumed.add(6, [("a", "6 again")])
    assert [entry["samples"][0]["completion"] for entry in read_samples(tmp_path)] == ["2 before", "4 again", "6 again"]


def test_a_line_that_a_crash_cut_is_left_out(tmp_path):
    SamplesFile(tmp_path).add(2, [("a", "b")])
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 4, "sam')
    assert steps(tmp_path) == [2]
    SamplesFile(tmp_path).add(4, [("a", "b")])
    assert steps(tmp_path) == [2, 4]


def test_a_long_training_stays_in_view_in_a_small_file(tmp_path, monkeypatch):
    monkeypatch.setattr(samples_file, "LARGE", 2000)
    file = SamplesFile(tmp_path)
    for step in range(1, 301):
        file.add(step, [("prompt", "x" * 50)])
        assert (tmp_path / FILE).stat().st_size <= 2000
    found = steps(tmp_path)
    assert found[0] == 1 and found[-1] == 300 and found == sorted(set(found)) and len(found) > 5


@pytest.mark.parametrize("line", ['{"step": 2}', '{"step": "2", "samples": []}', "[1]", '{"step": 2, "samples": [{}]}'])
def test_a_file_of_another_form_is_refused_by_name_and_replaced_by_the_next_training(tmp_path, line):
    (tmp_path / FILE).write_text(line + "\n")
    with pytest.raises(UserError, match=f"{FILE}: line 1"):
        read_samples(tmp_path)
    SamplesFile(tmp_path).add(2, [("a", "b")])
    assert json.loads((tmp_path / FILE).read_text())["step"] == 2


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    file = SamplesFile(tmp_path)
    file.add(1, [("a", "b")])
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).mkdir()
    with pytest.raises(UserError, match=f"cannot write .*{FILE}"):
        file.add(2, [("a", "b")])
