"""Programs that start with torch and Lightning imported already: copies of one process that has imported them.

Importing takes six seconds of processor time and the first composition one, a copy (os.fork) none. A program started
so has its own process, standard streams, environment, folder, signals and exit status, as a new interpreter would give
it, and the processes that `llm.parallel.launch` starts from it are copies again. Figures of reports are empty. Tests
of what an interpreter does when it starts, and one of each kind of job, take a new interpreter: `processes.start` and
`run_cli(..., fresh=True)`.
"""

import atexit
import ctypes
import gc
import io
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15  # of Linux's prctl
NUMBER = struct.Struct("<q")
REQUEST_BYTES = 200_000
before: list = []  # the streams of the process that was copied: they close their files when they go


class Server:
    """The process that is copied, as the process of the tests sees it."""

    def __init__(self, preexec_fn):
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        options = {"pass_fds": [theirs.fileno()], "stdin": subprocess.DEVNULL, "preexec_fn": preexec_fn}
        command = [sys.executable, __file__, str(theirs.fileno())]
        self.process = subprocess.Popen(command, env=environment, cwd=Path(__file__).parent.parent, **options)
        theirs.close()

    def start(self, request: dict, files: list[int]) -> tuple[int, int]:
        """Start a program on three open files; returns its process and a file that will tell its exit status."""
        told, tell = os.pipe()
        socket.send_fds(self.socket, [json.dumps(request).encode()], [*files, tell])
        os.close(tell)
        return NUMBER.unpack(os.read(told, NUMBER.size))[0], told


class Program:
    """A copy that runs a script, with what tests use of subprocess.Popen."""

    def __init__(self, server: Server, name: str, command, cwd, env: dict[str, str], stdout=None, stderr=None):
        self.args, self.returncode, self.stdin = command, None, None
        nothing = os.open(os.devnull, os.O_RDWR)
        self.stdout, out = self._stream(stdout, {None: 1, subprocess.DEVNULL: nothing})
        self.stderr, err = self._stream(stderr, {None: 2, subprocess.DEVNULL: nothing, subprocess.STDOUT: out})
        request = {"name": name, "argv": list(command), "cwd": str(cwd), "env": env}
        self.pid, self.told = server.start(request, [nothing, out, err])
        for number in {nothing, out, err} - {1, 2}:
            os.close(number)

    @staticmethod
    def _stream(choice, others: dict) -> tuple:
        """Our end of a standard stream, None where there is no pipe, and the program's end."""
        if choice != subprocess.PIPE:
            return None, others[choice]
        ours, theirs = os.pipe()
        return open(ours, encoding="utf-8"), theirs

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            status = os.read(self.told, NUMBER.size)  # nothing, if the process that should have told is gone too
            self.returncode = NUMBER.unpack(status)[0] if status else -signal.SIGKILL
            os.close(self.told)
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        texts, streams = {}, [stream for stream in (self.stdout, self.stderr) if stream is not None]
        readers = [threading.Thread(target=lambda s=s: texts.update({s: s.read()}), daemon=True) for s in streams]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        return texts.get(self.stdout), texts.get(self.stderr)

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


# ---- in the process that is copied ----------------------------------------------------------------------------------


def serve(connection: socket.socket) -> dict | None:
    """Make copies until the tests end; returns in each copy, with the program that it is to run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    copies = set()
    while True:
        data, files, *_ = socket.recv_fds(connection, REQUEST_BYTES, 4)
        if not data:
            return None
        copies = {pid for pid in copies if not os.waitpid(pid, os.WNOHANG)[0]}
        copy = os.fork()
        if copy == 0:
            connection.close()
            return become_program(json.loads(data), files)
        copies.add(copy)
        for file in files:
            os.close(file)


def become_program(request: dict, files: list[int]) -> dict:
    """In a copy: make another one, tell its number and how it ends; in that one: return ready for the program."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    *streams, tell = files
    if pid := os.fork():
        for file in streams:
            os.close(file)
        os.write(tell, NUMBER.pack(pid))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(tell, NUMBER.pack(status))
        os._exit(0)
    os.close(tell)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_NAME, request["name"].encode())
    for number, file in enumerate(streams):
        os.dup2(file, number)
        os.close(file)
    reopen_streams()
    os.chdir(request["cwd"])
    set_environment(request["env"])
    return request


def reopen_streams() -> None:
    """The three files behind the standard streams have changed: a pipe cannot do all that a file can."""
    before.extend((sys.stdin, sys.stdout, sys.stderr))
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    for name, number, errors in (("stdout", 1, "strict"), ("stderr", 2, "backslashreplace")):
        stream = io.TextIOWrapper(open(number, "wb", 0, closefd=False), errors=errors, write_through=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def run_program(argv: list[str]) -> NoReturn:
    """Run a script and end as the interpreter would, but for taking down the modules, which takes a second."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.Popen = Worker
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv, sys.path[:1] = argv, [str(Path(argv[0]).parent), *paths]
    status = status_of(lambda: runpy.run_path(argv[0], run_name="__main__"))
    threading._shutdown()
    atexit._run_exitfuncs()
    os._exit(status)


def status_of(program: Callable[[], object]) -> int:
    """Exit status of a program, with what the interpreter would print."""
    try:
        program()
    except SystemExit as stop:
        if not isinstance(stop.code, int | None):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


class Worker:
    """A copy that runs a module, with what PyTorch's elastic agent uses of subprocess.Popen."""

    def __init__(self, args: list[str], env: dict[str, str], start_new_session: bool, stdout=None, stderr=None):
        assert args[:3] == (sys.executable, "-P", "-m") and start_new_session and stdout is stderr is None
        self.returncode = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self._run(list(args[3:]), env))
        while os.getpgid(self.pid) != self.pid:  # the agent signals to the group
            time.sleep(0.001)

    @staticmethod
    def _run(command: list[str], env: dict[str, str]) -> int:
        for signum in signal.valid_signals():  # the agent's handlers are gone in a new interpreter
            if callable(signal.getsignal(signum)):
                signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
        os.setsid()
        set_environment(env)
        sys.argv = command
        return status_of(lambda: runpy.run_module(command[0], run_name="__main__", alter_sys=True))

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("", timeout)
            time.sleep(0.01)
        return self.returncode

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)


def set_environment(variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)


def prctl(option: int, value) -> None:
    ctypes.CDLL(None).prctl(option, value)


def main() -> None:
    """Import, then make copies, each of which runs a program."""
    sys.path[0] = os.getcwd()
    import lightning.pytorch  # noqa: F401
    import pytest  # noqa: F401

    import llm.cli.app  # noqa: F401
    import llm.eval.evaluate  # noqa: F401
    import llm.parallel.agent  # noqa: F401
    import llm.stages.run_stage  # noqa: F401
    from llm.cli.overrides import compose
    from llm.report import plots

    compose("train", ["experiment=tiny"])  # Hydra's parser is slow at first
    plots._figure = lambda path, *args, **options: path.touch()  # takes as long as many a training
    gc.collect()
    gc.freeze()  # or every copy would touch, and so copy, all of its memory
    program = serve(socket.socket(fileno=int(sys.argv[1])))
    if program is not None:
        run_program(program["argv"])


if __name__ == "__main__":
    main()
