"""Processes of the tests: nothing outlives the tests, and a copy is as good as a new interpreter."""

import os
import signal
import sys

import pytest
from conftest import REPO, run_cli
from processes import MARK, is_alive, kill_marked, run, run_python, start, start_warm, wait_until

from llm.parallel.launch import child_env, free_port

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

# A test that starts what tests start, and then hangs: a process that ignores all signals but SIGKILL, one that this has
# started in a session of its own, and a training that waits for a process that never comes.
HANGING = """
import os, sys
from pathlib import Path
from processes import REPO, start, start_warm
from llm.parallel.launch import child_env, free_port

STUBBORN = '''
import os, signal, subprocess, sys, time
for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(signum, signal.SIG_IGN)
if len(sys.argv) == 3:
    subprocess.Popen([sys.executable, "-S", sys.argv[0], sys.argv[1]], start_new_session=True)
with open(sys.argv[1], "a") as pids:
    pids.write(f"{os.getpid()}\\\\n")
while True:
    time.sleep(1)
'''

def test_hangs(tmp_path):
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    pids = os.environ["PIDS"]
    process = start(sys.executable, "-S", str(tmp_path / "stubborn.py"), pids, "again")
    with open(pids, "a") as file:
        file.write(f"{os.getpid()}\\n")
        if "COPY" in os.environ:
            command = (REPO / "tests/distributed_job.py", "ddp", str(tmp_path), "pretrain")
            job = start_warm(*command, env=child_env(1, 2, free_port()))
            file.write(f"{job.pid}\\n")
    process.wait()
"""


@pytest.mark.parametrize(
    ("signum", "workers"), [(signal.SIGKILL, "1"), (signal.SIGTERM, "1"), (signal.SIGINT, "0")], ids=str
)
def test_tests_that_are_ended_leave_no_process(tmp_path, signum, workers):
    """With and without pytest-xdist; before, what a killed test had started went on for minutes."""
    (tmp_path / "test_hanging.py").write_text(HANGING)
    pids, paths = tmp_path / "pids", os.pathsep.join([str(REPO), str(REPO / "tests")])
    env = {"PIDS": str(pids), "PYTHONPATH": paths} | ({"COPY": "1"} if signum == signal.SIGKILL else {})
    options = ("-p", "conftest", "-p", "no:cacheprovider", "-n", workers, "--rootdir", str(tmp_path))
    tests = start(sys.executable, "-m", "pytest", *options, str(tmp_path), env=env, cwd=tmp_path)
    expected = 4 if "COPY" in env else 3
    wait_until(lambda: pids.exists() and len(pids.read_text().splitlines()) == expected, tests)
    numbers = [int(line) for line in pids.read_text().splitlines()]
    assert all(map(is_alive, numbers))
    tests.send_signal(signum)
    wait_until(lambda: not any(map(is_alive, numbers)))
    tests.communicate()


def test_a_process_of_a_training_ends_with_the_one_that_started_it(tmp_path):
    """distributed_job.py, which waits for another one that never comes, when its parent is killed."""
    parent = "import subprocess, sys, time; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); time.sleep(10000)"
    job = (sys.executable, str(REPO / "tests" / "distributed_job.py"), "ddp", str(tmp_path), "pretrain")
    started = start(sys.executable, "-c", parent, *job, env=child_env(1, 2, free_port()))
    pid = int(started.stdout.readline())
    wait_until(lambda: "libtorch" in open(f"/proc/{pid}/maps").read())  # it is past its start
    started.kill()
    wait_until(lambda: not is_alive(pid))


def test_a_process_whose_launcher_has_gone_before_it_began_ends_at_once():
    """Importing takes seconds: a launcher that is killed meanwhile is not there to be died with."""
    code = "from llm.parallel.env import begin; begin(); print('goes on')"
    assert run_python(code, env={"FATHOM_LAUNCHER": "1"}).returncode == -signal.SIGTERM
    done = run("sh", "-c", f'FATHOM_LAUNCHER=$$ {sys.executable} -c "{code}"; exit $?')
    assert (done.returncode, done.stdout) == (0, "goes on\n"), done.stderr


def test_what_a_test_has_started_is_ended_by_its_mark():
    mark = "mark-of-test-" + "x" * 20
    process = start("sleep", "10000", env={"A": mark})
    wait_until(lambda: b"sleep" in open(f"/proc/{process.pid}/cmdline", "rb").read())  # not the copy of this process
    assert kill_marked(mark) == [process.pid] and process.wait() == -signal.SIGKILL


PROGRAM = """
import os, sys
for stream in (sys.stdin, sys.stdout, sys.stderr):
    stream.reconfigure(errors="replace")
print(sys.argv[1:], os.getcwd(), os.environ.get("A"), __name__, __file__ == sys.argv[0], "torch" in sys.modules)
print("to stderr", file=sys.stderr)
{end}
"""


@pytest.mark.parametrize(
    ("end", "status", "errors"),
    [
        ("", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('words')", 1, "words"),
        ("raise ValueError('wrong')", 1, "ValueError: wrong"),
        ("os._exit(5)", 5, ""),
        ("os.kill(os.getpid(), 15)", -15, ""),
        ("import threading; threading.Thread(target=lambda: print('late')).start()", 0, ""),
    ],
)
def test_a_copy_is_as_good_as_a_new_interpreter(tmp_path, end, status, errors):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(end=end))
    for fresh in (False, True):
        done = run_cli(str(script), "a", "b c", cwd=tmp_path, fresh=fresh, A="value")
        assert done.returncode == status
        first, *more = done.stdout.splitlines()
        assert first == f"['a', 'b c'] {tmp_path} value __main__ True {not fresh}"
        assert more == (["late"] if "late" in end else [])
        assert done.stderr.startswith("to stderr\n") and errors in done.stderr
        assert MARK in os.environ


def test_a_copy_gets_signals(tmp_path):
    script = tmp_path / "waiting.py"
    script.write_text("import time\nprint('waits', flush=True)\ntime.sleep(10000)\n")
    program = start_warm(script)
    assert program.stdout.readline() == "waits\n" and program.poll() is None
    program.send_signal(signal.SIGINT)
    _, errors = program.communicate()
    assert errors.endswith("KeyboardInterrupt\n") and program.returncode == -signal.SIGINT
