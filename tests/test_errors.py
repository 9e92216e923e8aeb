"""Errors of the system in words: by their number, wherever that stands."""

import errno
import os

import pytest
import torch
from safetensors import SafetensorError

from llm.errors import UserError, is_out_of_memory, memory_detail, reason_of, system_problem
from llm.utils.files import read_json, replaced_folder, write_atomic


def test_of_a_value_without_end_only_the_beginning_is_repeated():
    text = f"data.train={'x' * 5000} is not read; leave it out"
    assert str(UserError(text)) == f"data.train={'x' * 289}... is not read; leave it out"
    assert str(UserError(path := f"/{'folder/' * 100}x: no permission")) == path


@pytest.mark.parametrize(
    ("number", "words"),
    [
        ("ENOSPC", "no space left on /"),
        ("EDQUOT", "the quota of /"),
        ("EISDIR", "the path is a folder"),
        ("ENOTDIR", "a part of the path is a file"),
        ("ENAMETOOLONG", "the name is too long"),
        ("EACCES", "no permission"),
        ("EROFS", "the file system is read-only"),
        ("EMFILE", "too many open files (ulimit -n)"),
        ("ENOENT", "no such file or folder"),
    ],
)
def test_an_error_of_the_system_is_told_by_its_number(number, words):
    code = getattr(errno, number)
    said = reason_of(OSError(code, os.strerror(code), "/tmp/other"), "/x/y")
    assert words in said and "\n" not in said
    assert ("free some space" in said) == (number in ("ENOSPC", "EDQUOT"))


def test_the_number_may_stand_in_the_text_or_in_the_cause():
    in_rust = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    by_torch = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    by_cause = RuntimeError("basic_ios::clear: iostream error")
    by_cause.__context__ = OSError(errno.ENOSPC, "No space left on device")
    for error in (in_rust, by_torch, by_cause):
        assert reason_of(error, "/x/y").startswith("no space left on / ("), error
    assert reason_of(ValueError("odd\nlines"), "/x/y") == "odd" and reason_of(ValueError(), "/x/y") == "ValueError"


def test_files_say_why_they_cannot_be_written_or_read(tmp_path):
    (tmp_path / "file").write_text("x")
    cases = {
        tmp_path: "the path is a folder",
        tmp_path / "file/below.json": "a part of the path",
        tmp_path / ("x" * 300): "the name is too long",
    }
    for path, words in cases.items():
        with pytest.raises(UserError, match=words):
            write_atomic(path, "text")
    with pytest.raises(UserError, match="the path is a folder"):
        read_json(tmp_path)
    with pytest.raises(UserError, match="cannot be written: a part of the path"), replaced_folder(tmp_path / "file/a"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def failing(call):
    """Return the exception that a call raises."""
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


def test_short_memory_is_known_by_real_errors():
    assert is_out_of_memory(failing(lambda: torch.empty(2**55)))
    assert is_out_of_memory(failing(lambda: bytearray(2**62)))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(ImportError("libx.so: failed to map segment from shared object"))
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert not is_out_of_memory(failing(lambda: torch.empty(2) @ torch.empty(3)))
    assert not is_out_of_memory(UserError("out of memory"))
    hidden = RuntimeError("teardown failed")
    hidden.__context__ = RuntimeError("can't start new thread")
    assert is_out_of_memory(hidden) and memory_detail(hidden) == "can't start new thread"


def test_only_errors_of_the_system_are_told_without_a_traceback(tmp_path):
    assert system_problem(MemoryError()).startswith("out of memory (MemoryError)")
    assert system_problem(failing(tmp_path.read_text)) == f"{tmp_path}: the path is a folder"
    assert system_problem(FileNotFoundError(errno.ENOENT, "gone", "/x")) is None
    assert system_problem(KeyError("x")) is None and system_problem(OSError("no number")) is None
