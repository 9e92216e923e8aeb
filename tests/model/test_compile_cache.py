"""A compile cache with files that an interrupted compilation has left."""

import os
import struct
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from processes import run_python

from llm.model.compile_cache import heal, is_cut

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the files are ELF files on Linux only")

COMPILE = """
import torch
from llm.model.compile import _named, compile_training
from types import SimpleNamespace

compile_training(SimpleNamespace(forward_blocks=None, device=torch.device("meta")))
step = _named("the network", torch.compile(lambda x: (x.sin() * 2).sum()))
print(step(torch.arange(1000.0)).item())
"""


def library(size: int) -> bytes:
    """Return an ELF file of `size` bytes that ends with its table of sections: 3 entries of 64 bytes."""
    header = b"\x7fELF\x02".ljust(40, b"\0") + struct.pack("<Q", size - 192) + bytes(10) + struct.pack("<HHH", 64, 3, 2)
    return header.ljust(size, b"\0")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A compile cache with one library that is whole."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "whole.main.so").write_bytes(library(5000))
    return tmp_path


@pytest.mark.parametrize("size", [0, 10, 64, 300, 2500, 4999])
def test_a_library_that_ends_too_early_is_deleted(cache, size, capsys):
    for suffix in ("main.so", "so", "o"):
        (cache / "ab" / f"cut.{suffix}").write_bytes(library(5000)[:size])
    assert len(heal()) == 3 and os.listdir(cache / "ab") == ["whole.main.so"]
    assert "deleted 3 damaged files of an interrupted compilation; compiling again" in capsys.readouterr().out
    assert heal() == [] and capsys.readouterr().out == ""


def test_a_library_whose_header_is_not_written_yet_is_deleted(cache):
    (cache / "ab" / "cut.so").write_bytes(bytes(64) + library(5000)[64:])
    assert heal() == [cache / "ab" / "cut.so"]


def test_what_another_process_is_building_stays(cache):
    building = cache / "ab" / "key.main.so"
    building.write_bytes(library(5000)[:1000])
    (cache / "locks").mkdir()
    with FileLock(cache / "locks" / "key.lock"):
        assert heal() == [] and building.exists()
    assert heal() == [building]


def test_a_precompiled_header_that_an_error_names_is_deleted(cache, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "own.h.gch"
    for path in (used := cache / "used.h.gch", unused := cache / "unused.h.gch", other):
        path.write_bytes(b"header")
    command = f"g++ -include {str(used)[:-4]} -include {str(other)[:-4]} ab/key.main.cpp\n"
    assert heal(f"CppCompileError: C++ compile error\n\nCommand:\n{command}Output:\ncannot read PCH file") == [used]
    assert [path.exists() for path in (used, unused, other)] == [False, True, True]


@pytest.mark.slow
def test_an_interrupted_compilation_heals_itself(tmp_path):
    """In a real cache: libraries cut where loading them fails, ends the process, or works by chance."""

    def compiled() -> str:
        done = run_python(COMPILE, env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
        assert done.returncode == 0, done.stderr
        return done.stdout

    result = compiled()
    kernels = list(tmp_path.rglob("*.main.so"))
    assert kernels and all(not is_cut(path) for path in tmp_path.rglob("*.so")) and "damaged" not in result
    for share in (0.001, 0.1, 0.5):
        for path in kernels:
            os.truncate(path, int(share * path.stat().st_size))
        said, value = compiled().splitlines()
        assert said.startswith("compile cache: deleted") and value == result.strip() and not any(map(is_cut, kernels))
