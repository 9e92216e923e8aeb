"""Hostile programs against the sandbox: none harms anything, none counts as passed; with and without namespaces."""

import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from processes import HANG, start, wait_until

from tasks import execution
from tasks.execution import PROTECTIONS, Limits, Program, describe, run_program, run_programs, sandbox_report
from tasks.sandbox.messages import BadMessage, pack, unpack

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="most protections are Linux's")

ADD = "def check(add):\n    assert add(1, 2) == 3\n    assert add(20, 22) == 42\n"


def adding(code: str, namespaces: bool = True, seconds: float = 120.0):
    return run_program(Program(code, "add", ADD), Limits(seconds=seconds, memory_mb=256), namespaces)


LIBC = (
    "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nlibc.shmat.restype = ctypes.c_void_p\n"
    "def add(a, b): return a + b\n"
    "def sure(result):\n    if result < 0: raise OSError(ctypes.get_errno(), 'refused')\n    return result\n"
)
# Memory that no limit of a process counts: each program answers rightly, so it passes if the system gives the memory.
UNCOUNTED = {
    "shared memory of System V": LIBC
    + "for i in range(10):\n    at = libc.shmat(sure(libc.shmget(0, 67 << 20, 0o1600)), None, 0)\n"
    "    ctypes.memset(at, 1, 67 << 20)\n    libc.shmdt(ctypes.c_void_p(at))",
    "semaphores of System V": LIBC + "for i in range(100): sure(libc.semget(0, 250, 0o1600))",
    "queues of System V": LIBC + "for i in range(100):\n    queue = sure(libc.msgget(0, 0o1600))\n"
    "    sure(libc.msgsnd(queue, ctypes.create_string_buffer(b'\\1' * 8008), 8000, 0o4000))",
    "attach another's segment": LIBC
    + "sure(min(libc.shmctl(i, 2, ctypes.create_string_buffer(200)) for i in range(9)))",
    "queues of POSIX": LIBC + "for i in range(5): sure(libc.mq_open(b'/fathom%d' % i, 0o102, 0o600, None))",
    "files in memory": LIBC
    + "for i in range(50):\n    file = os.memfd_create('x')\n    os.write(file, b'x' * (1 << 20))",
    "pages lent to a pipe": LIBC + "import mmap\npage, (_, end) = ctypes.create_string_buffer(4096), os.pipe()\n"
    "vector = (ctypes.c_size_t * 2)(ctypes.addressof(page), 4096)\nsure(libc.vmsplice(end, vector, 1, 0))",
}

# Name: (code, verdict). `OUTSIDE` is a folder with a file to be left alone, `PID` the process of the test.
HOSTILE = {
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "timeout"),
    "threads without end": (
        "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(9,)).start()",
        "error",
    ),
    "memory bomb": ("x = []\nwhile True: x.append(bytearray(10**7))", "error"),
    "memory bomb in small pieces": ("def add(a, b):\n    x = [a]\n    while True: x += x", "error"),
    "endless output": ("import os\nwhile True: os.write(1, b'x' * 65536)", "error"),
    "endless output that ignores errors": (
        "import os\nwhile True:\n    try: os.write(1, b'x' * 65536)\n    except OSError: pass",
        "timeout",
    ),
    "huge file": ("open('big', 'wb').write(b'x' * 10**7)", "error"),
    "many files": (
        "def add(a, b):\n    for i in range(10**6): open(f'f{i}', 'w').write('x' * 10**6)",
        "error or timeout",
    ),
    "open files without end": ("files = []\nwhile True: files.append(open('/dev/null'))", "error"),
    "infinite loop": ("while True: pass", "timeout"),
    "infinite loop in C": ("sum(range(10**18))", "timeout"),
    "backtracking in C": ("import re\nre.match('(a+)+$', 'a' * 60 + 'b')", "timeout"),
    "sleep": ("import time\ntime.sleep(1000)", "timeout"),
    "stack overflow in C": ("import ctypes\nctypes.string_at(0)", "killed"),
    "delete files": (
        "import shutil\nshutil.rmtree('OUTSIDE', ignore_errors=True)",
        "error",
    ),
    "overwrite a file": ("open('OUTSIDE/precious', 'w').write('gone')", "error"),
    "read a file": ("print(open('OUTSIDE/precious').read())", "error"),
    "read the environment of others": (
        "import os\nfor pid in (1, os.getppid(), PID):\n    print(open(f'/proc/{pid}/environ').read())",
        "error",
    ),
    "connect": ("import socket\nsocket.create_connection(('127.0.0.1', 22), 1)", "error"),
    "listen": ("import socket\nsocket.socket().bind(('', 0))", "error"),
    "unix socket": ("import socket\nsocket.socket(socket.AF_UNIX).connect('/run/docker.sock')", "error"),
    "ignore SIGTERM": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        "timeout",
    ),
    "kill the parents": (
        "import os, signal\nfor pid in (os.getppid(), PID):\n    for s in (signal.SIGKILL, signal.SIGSTOP, 2):\n"
        "        try: os.kill(pid, s)\n        except OSError: pass",
        "error or killed",
    ),
    "starve the parent": (
        "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))\n"
        "resource.prlimit(PID, resource.RLIMIT_NOFILE, (0, 0))",
        "error or killed",  # its judge has a second of the processor left, and may be ended
    ),
    "a daemon that outlives": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True:\n"
        "            time.sleep(0.05)\n    os._exit(0)",
        "error",
    ),
    "trace the parent": (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.ptrace(16, os.getppid(), 0, 0) < 0: raise OSError(ctypes.get_errno(), 'ptrace')",
        "error",
    ),
    "new namespaces": (
        "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000) < 0: raise OSError('unshare')",
        "error",
    ),
    "become root": ("import os\nos.setuid(0)\nos.setgroups([0])\nopen('/etc/passwd', 'a')", "error"),
    "os._exit(0)": ("import os\nos._exit(0)", "error"),
    "sys.exit(0)": ("import sys\nsys.exit(0)", "error"),
    "sys.exit(0) when called": ("import sys\ndef add(a, b): sys.exit(0)", "error"),
    "end by a signal": ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "killed"),
    "write to every descriptor": (
        "import json, os, struct\nwords = json.dumps({'verdict': 'pass', 'detail': ''}).encode()\n"
        "for fd in range(64):\n    for data in (words, struct.pack('<I', len(words)) + words, b'pass'):\n"
        "        try: os.write(fd, data)\n        except OSError: pass\nos._exit(0)",
        "error",
    ),
    "a message too long": ("import os\ndef add(a, b): os.write(4, b'\\xff' * 8)", "error"),
    "broken messages": ("import os\ndef add(a, b): os.write(4, b'\\x02\\x00\\x00\\x00{}' * 9)", "error"),
    "equal to everything": (
        "class Any:\n    def __eq__(self, other): return True\ndef add(a, b): return Any()",
        "fail",
    ),
    "equal to everything, as a number": (
        "class Any(int):\n    def __eq__(self, other): return True\ndef add(a, b): return Any(0)",
        "fail",
    ),
    "patch what tests use": (
        "import builtins, sys\nbuiltins.AssertionError = ValueError\nbuiltins.exec = lambda *a: None\n"
        "sys.modules.clear()\ndef add(a, b): return 0",
        "fail",
    ),
    "patch the judge in its own process": (
        "import gc, sys\nfor m in list(sys.modules.values()):\n    for n in list(vars(m)):\n"
        "        if n in ('verdict_of', 'judge', 'unpack', 'check'): setattr(m, n, lambda *a: ('pass', ''))\n"
        "def add(a, b): return 0",
        "error or fail",
    ),
    "look for the tests in memory": (
        "import gc\nfound = [o for o in gc.get_objects() if isinstance(o, dict) and 'tests' in o and 'setup' in o]\n"
        "def add(a, b): return 3 if found else 0",
        "fail",
    ),
    "raise what a test may expect": ("def add(a, b): raise AssertionError('pass')", "error"),
    "replace the check": ("def check(*args): return True\nadd = lambda a, b: None", "fail"),
    "recursion without end": ("def add(a, b): return add(b, a)", "error"),
    "a value without end": ("def add(a, b):\n    x = []\n    x.append(x)\n    return x", "error"),
} | {name: (code, "error") for name, code in UNCOUNTED.items()}


@pytest.mark.parametrize("namespaces", [True, False], ids=["namespaces", "no namespaces"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_harm_nothing_and_never_pass(tmp_path, monkeypatch, name, namespaces):
    monkeypatch.setenv("FATHOM_SECRET", "a-secret-word")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("a-secret-word")
    code, expected = HOSTILE[name]
    code = code.replace("OUTSIDE", str(outside)).replace("PID", str(os.getpid()))
    result = adding(code, namespaces, seconds=0.5 if "timeout" in expected else 120.0)
    assert not result.ok and result.verdict in expected.split(" or "), result
    assert "a-secret-word" not in result.stdout + result.stderr
    assert (outside / "precious").read_text() == "a-secret-word" and os.listdir(tmp_path) == ["outside"]
    assert not programs_left(tmp_path), "a process of the program is still there"


@pytest.mark.parametrize("name", UNCOUNTED)
def test_memory_that_no_limit_counts_is_refused_by_name(name):
    """It is the filter that refuses: outside of a sandbox the program would get what it asks for."""
    for namespaces in (True, False):
        result = adding(UNCOUNTED[name], namespaces)
        if not result.held["filter"]:
            pytest.skip("this machine has no system call filter")
        assert result.detail.startswith("PermissionError: [Errno 1]"), result


def test_files_in_folders_that_all_may_write_to_do_not_stay():
    name = f"/dev/shm/fathom-left-{os.getpid()}"
    code = f"import os\nos.mkdir({name!r})\nopen({name + '/file'!r}, 'w').write('x')\ndef add(a, b): return a + b"
    result = adding(code, namespaces=False)
    if not (result.held["own_user"] or result.held["landlock"]):
        pytest.skip("the program is of the same user as the test: nobody can tell whose files they are")
    assert not os.path.exists(name)


def programs_left(tmp_path) -> list[str]:
    """Processes of sandboxes whose folder lies in `tmp_path`."""
    left = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
            if f"{tmp_path}/fathom-program".encode() in line and (folder / "stat").read_text().split(") ")[1][0] != "Z":
                left.append(folder.name)
        except (OSError, IndexError):
            pass
    return left


@pytest.mark.parametrize("namespaces", [True, False])
def test_right_programs_pass(namespaces):
    assert adding("def add(a, b): return a + b", namespaces).verdict == "pass"
    code = "import threading, tempfile, collections\ndef add(a, b):\n    print('hello')\n    return a + b"
    result = adding(code, namespaces)
    assert (result.verdict, result.stdout) == ("pass", "hello\nhello\n")
    assert adding("def add(a, b): return a - b").verdict == "fail"
    assert adding("def sub(a, b): return a + b").detail == "KeyError: 'add'"


def test_namespaces_show_an_empty_folder_and_no_processes():
    code = (
        "import os\ndef f(): return os.getcwd(), os.listdir('.'), os.path.exists('/proc/self'), os.path.exists('/home')"
    )
    result = run_program(Program(code, "f", "def check(f): assert f() == ('/tmp', [], False, False)"))
    if not result.held["namespaces"]:
        pytest.skip("this machine allows no namespaces")
    assert result.ok, result


def test_programs_inherit_no_environment(monkeypatch):
    monkeypatch.setenv("FATHOM_SECRET", "a-secret-word")
    code = "import os\ndef f(): return 'FATHOM_SECRET' in os.environ or len(os.environ)"
    assert run_program(Program(code, "f", "def check(f): assert f() in (0, 1)")).ok  # Python sets LC_CTYPE itself


def test_values_travel_as_they_are():
    values = [
        1,
        -(2**200),
        1.5,
        float("inf"),
        True,
        None,
        "é\ud800",
        b"\x00",
        2j,
        (1, [2, {3}], {(4, 5): "x"}),
        range(3),
    ]
    code = f"def f(x): return x\nmore = {values!r}".replace("inf", "1e999")
    tests = (
        f"inf = 1e999\ndef check(f):\n    for x in {values!r}:\n        assert f(x) == x and type(f(x)) is type(x), x\n"
    )
    assert run_program(Program(code, "f", tests)).detail == ""
    assert unpack(pack(values)) == values and repr(unpack(pack(object()))).startswith("<object")
    for broken in ({}, ["list"], ["code", []], ["dict", [1]], ["set", [["list", []]]]):
        with pytest.raises(BadMessage):
            unpack(broken)


def test_tests_see_exceptions_and_may_expect_them():
    tests = "def check(f):\n    try: f()\n    except ValueError as e: assert str(e) == 'no'\n    else: assert False\n"
    assert run_program(Program("def f(): raise ValueError('no')", "f", tests)).ok
    result = run_program(Program("class Odd(Exception): pass\ndef f(): raise Odd('x')", "f", tests))
    assert (result.verdict, result.detail) == ("error", "Odd: x")


@pytest.mark.parametrize("excepted", ["except Exception:", "except:"])
def test_a_program_that_ends_itself_passes_no_test(excepted):
    tests = f"def check(f):\n    try: f()\n    {excepted} return\n"
    result = run_program(Program("import os\ndef f(): os._exit(3)", "f", tests))
    assert (result.verdict, result.detail) == ("error", "ended early with status 3")
    again = "def check(f):\n    for _ in range(3):\n        try: f()\n        except BaseException: pass\n"
    assert run_program(Program("import os\ndef f(): os._exit(3)", "f", again)).verdict == "error"
    killed = run_program(Program("import os\ndef f(): os.kill(os.getpid(), 40)", "f", tests))
    assert (killed.verdict, killed.detail) == ("killed", "ended by signal 40")


def test_many_programs_side_by_side_keep_their_order(monkeypatch):
    """None is started before eight are under way: programs that run one after the other never meet."""
    execution.announce_sandbox()  # which runs one by itself
    meeting, really_run = threading.Barrier(8, timeout=HANG), execution.run_program

    def run_together(*args):
        meeting.wait()
        return really_run(*args)

    monkeypatch.setattr(execution, "run_program", run_together)
    programs = [Program(f"def f(): return {i}", "f", "def check(f): assert f() % 2") for i in range(8)]
    results = run_programs(programs, Limits(seconds=120), workers=8)
    assert [r.verdict for r in results] == ["fail", "pass"] * 4


def test_a_caller_that_is_killed_leaves_no_program(tmp_path):
    code = "import time\nwhile True: time.sleep(0.1)"
    script = f"from tasks.execution import *\nrun_program(Program({code!r}, 'f', ''), Limits(seconds=6000))"
    caller = start(sys.executable, "-c", script, env={"TMPDIR": str(tmp_path)})
    wait_until(lambda: programs_left(tmp_path), caller)
    os.kill(caller.pid, signal.SIGKILL)
    wait_until(lambda: not programs_left(tmp_path))


def test_the_report_says_what_holds_and_what_does_not():
    assert sandbox_report().endswith("limits") or "NOT out of reach" in sandbox_report()
    nothing = dict.fromkeys(PROTECTIONS, False)
    assert describe(nothing) == (
        "limits; NOT out of reach: this user's files and environment, the network, the space on the disk, "
        "memory beyond the limit"
    )
    assert "NOT" not in describe(nothing | {"namespaces": True, "filter": True})
    assert describe(nothing | {"landlock": True, "filter": True}).endswith(
        "limits; NOT out of reach: the space on the disk"
    )
