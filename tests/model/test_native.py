"""Building kernels: once, whole or not at all, and never in the way of a machine without a compiler."""

import threading
from pathlib import Path

import pytest

from llm.model import native

pytestmark = pytest.mark.skipif(not native.compilers(), reason="there is no C++ compiler")

SOURCE = 'extern "C" void set_team(void*, void*) {}\nextern "C" long answer() { return 42; }\n'


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """Return a small C++ file; kernels are kept in a folder of the test."""
    monkeypatch.setenv("FATHOM_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("FATHOM_KERNELS", raising=False)
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


def load(source: Path):
    """Load a kernel as a fresh process would."""
    return native.library.__wrapped__(source)


def built() -> list[Path]:
    """Return all that lies in the folder of kernels."""
    return sorted(native.folder().iterdir())


def test_a_kernel_is_built_once_and_again_when_its_source_changes(source):
    assert load(source).answer() == 42
    (first,) = built()
    stamp = first.stat().st_mtime_ns
    assert load(source).answer() == 42
    assert built() == [first] and first.stat().st_mtime_ns == stamp
    source.write_text(SOURCE.replace("42", "43"))
    assert load(source).answer() == 43


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:900] + b"x" + b[901:]])
def test_a_damaged_library_is_built_again_and_never_loaded(source, damage):
    path = native.folder() / f"answer-{native.key(native.compilers()[0], source)}.so"
    native.build(native.compilers()[0], source, path)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert not native.is_whole(path)
    assert load(source).answer() == 42
    assert native.is_whole(path)


def test_builds_at_one_time_do_not_harm_each_other(source):
    path = native.folder() / "answer.so"
    threads = [threading.Thread(target=native.build, args=(native.compilers()[0], source, path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert native.is_whole(path) and built() == [path]


def test_an_interrupted_build_leaves_nothing(source, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    path = native.folder() / "answer.so"
    monkeypatch.setattr(native.subprocess, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        native.build(native.compilers()[0], source, path)
    assert built() == []


def test_without_a_compiler_there_is_no_kernel_and_no_word(source, monkeypatch, capfd):
    monkeypatch.setattr(native, "compilers", list)
    assert load(source) is None
    assert capfd.readouterr() == ("", "")


def test_a_compiler_that_fails_is_named_in_one_line(source, capfd):
    source.write_text("this is no C++")
    assert load(source) is None
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == len(native.compilers()) and "cannot build answer.cpp" in lines[0] and "error" in lines[0]


def test_a_compiler_that_cannot_be_started_is_named_in_one_line(source, tmp_path, monkeypatch, capfd):
    broken = tmp_path / "c++"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    monkeypatch.setattr(native, "compilers", lambda: [str(broken)])
    assert load(source) is None
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{broken} cannot build answer.cpp" in line


def test_without_a_home_folder_there_is_no_kernel(source, monkeypatch, capfd):
    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FATHOM_DATA")
    monkeypatch.setattr(native.Path, "expanduser", homeless)
    assert load(source) is None
    assert "home directory" in capfd.readouterr().err


def test_kernels_can_be_turned_off(source, monkeypatch):
    monkeypatch.setenv("FATHOM_KERNELS", "off")
    assert load(source) is None


def test_threads_come_from_the_runtime_of_torch():
    assert all(native.parallel_functions())


def test_the_number_of_threads_follows_what_calls_take(monkeypatch):
    clock, seconds, used = [0.0], {1: 1.0, 2: 0.6}, []

    def call(threads: int) -> int:
        used.append(threads)
        clock[0] += seconds[threads]
        return len(used)

    monkeypatch.setattr(native.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(native.time, "perf_counter", lambda: clock[0])
    threads = native.Threads(least_work=100)
    assert [threads.run(100, call) for _ in range(400)] == list(range(1, 401))
    assert used.count(2) > 360 and 1 in used  # an idle machine
    seconds[2] = 10.0  # a busy one
    used.clear()
    for _ in range(4000):
        threads.run(100, call)
    assert used[2500:].count(2) < 30 and 2 in used[2500:]
    seconds[2] = 0.6
    for _ in range(4000):
        threads.run(100, call)
    assert threads.uses_all
    used.clear()
    threads.run(99, call)
    assert used == [1]  # too little to share
