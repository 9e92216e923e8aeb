"""Standard streams that are closed, full, without a reader, or in a narrow encoding, in real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

# Opens the streams, writes more than a buffer holds, then a file, and tells on stderr that it came to the end.
SPEAKER = """
import sys
from llm.utils.streams import is_lost, keep_going, open_streams
open_streams()
keep_going()
for line in range(3000):
    print("é—", line, flush=line % 100 == 0)
with open(sys.argv[1], "w") as file:
    file.write(f"descriptor {file.fileno()}, lost {is_lost()}")
print("the end", file=sys.stderr)
"""


def speak(redirection: str, path: Path, **env: str) -> subprocess.CompletedProcess:
    """Run SPEAKER in a shell with redirections of its streams; `path` is the file that it writes."""
    command = f'exec "$0" -c "$1" "$2" {redirection}'
    return subprocess.run(
        ["sh", "-c", command, sys.executable, SPEAKER, str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(REPO)} | env,
    )


def test_a_closed_output_takes_no_text_into_the_files_opened_next(tmp_path):
    for redirection in (">&-", "<&- >&- 2>&-"):
        path = tmp_path / "out"
        done = speak(redirection, path)
        assert done.returncode == 0 and path.read_text() == "descriptor 3, lost False", redirection
        assert done.stderr == ("the end\n" if redirection == ">&-" else "")


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no /dev/full")
def test_a_full_output_is_said_once_and_the_work_goes_on(tmp_path):
    done = speak("> /dev/full", tmp_path / "out")
    said = "error: the output cannot be written (No space left on device); going on without\nthe end\n"
    assert (done.returncode, done.stderr) == (0, said)
    assert (tmp_path / "out").read_text().endswith("lost True")
    done = speak("2> /dev/full", tmp_path / "out")
    assert done.returncode == 0 and done.stdout.count("\n") == 3000


LOST = "error: the output cannot be written (Broken pipe); going on without\n"


def without_reader(*words: str) -> tuple[int, str]:
    """Run Python with a stdout that nobody reads; return its exit status and what it says on stderr."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        env = os.environ | {"PYTHONPATH": str(REPO)}
        command = [sys.executable, *words]
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120, env=env)
    finally:
        os.close(writing)
    return done.returncode, done.stderr


def test_a_reader_that_has_gone_is_said_once_and_the_work_goes_on(tmp_path):
    assert without_reader("-c", SPEAKER, str(tmp_path / "out")) == (0, LOST + "the end\n")


def test_a_program_whose_reader_has_gone_ends_in_silence_and_a_worker_of_the_queue_works_on(tmp_path):
    queue = ("-m", "llm.experiments.queue", "--queue", str(tmp_path / "queue.sqlite"))
    assert without_reader(*queue, "list", "--json") == (1, "")
    assert without_reader(*queue, "run") == (0, LOST)
    for program in ("compare", "scaling", "screen", "table"):
        assert without_reader("-m", f"llm.experiments.{program}", "--help")[1] == ""


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}], ids=str)
def test_letters_that_the_encoding_lacks_end_nothing(tmp_path, env):
    done = speak("", tmp_path / "out", **env)
    assert done.returncode == 0 and done.stdout.count("\n") == 3000
    assert done.stdout.startswith(r"\xe9\u2014 0" if "PYTHONIOENCODING" in env else "é— 0")


def test_half_a_letter_ends_no_command():
    """Under C.UTF-8 Python's stdout refuses half a surrogate pair; names of files may hold such."""
    said = "from llm.utils.streams import open_streams; open_streams(); print(chr(0xD800))"
    env = os.environ | {"LC_ALL": "C.UTF-8", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", said], cwd=REPO, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "\\ud800\n"
