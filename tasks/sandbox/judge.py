"""The program on one side, its tests on the other, in two processes that exchange plain data only.

The program defines a function and answers calls. The judge starts it, only then learns the tests, runs them, and
compares the answers in its own memory: there is nothing in the program's reach that could be changed into success.
"""

import builtins
import contextlib
import os
import signal
import sys
import traceback
import types
from typing import Any, NoReturn

import confine
from messages import BadMessage, pack, receive, send, unpack

STDOUT, STDERR = 3, 4  # where the runner has put what the program's output and errors go to


class Ended(BaseException):
    """The program is no more, or does not keep to the messages: (verdict, detail). No test can take it for its own."""


def judge(job: dict, folder: str, held: dict[str, bool], report: int) -> None:
    """Start the program, test it, send {"verdict", "detail", "held"} to `report`; never returns. held: protections."""
    try:
        limits = job["limits"]
        held["own_user"] = confine.drop_rights(folder)
        confine.prctl(confine.PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored, as the first process of a namespace
        signal.signal(signal.SIGALRM, lambda *_: os._exit(1))  # should the runner be gone already
        signal.alarm(int(limits["seconds"]) + 2)
        confine.limit_resources(limits["memory_mb"], limits["seconds"], limits["file_mb"], limits["open_files"])
        held["filter"] = confine.filter_calls(alone=True, may_fork=True)
        sys.set_int_max_str_digits(0)  # large numbers may travel
        ask_in, ask_out = os.pipe()
        answer_in, answer_out = os.pipe()
        child = os.fork()
        if child == 0:
            run_program(job, folder, held, ask_in, answer_out)
        os.close(ask_in)
        os.close(answer_out)
        os.dup2(STDERR, 2)
        held["landlock"] = receive(answer_in)  # sent before the program runs
        verdict, detail = verdict_of(receive(0) | {"entry_point": job["entry_point"]}, child, ask_out, answer_in)
        send(report, {"verdict": verdict, "detail": detail, "held": held})
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def verdict_of(tests: dict, child: int, ask: int, answer: int) -> tuple[str, str]:
    """Run the tests against the program; an error of theirs (comparing None with a number) is a failed test."""

    ends: list[tuple[str, str]] = []  # the first one counts, whatever tests make of it

    def end(verdict: str, detail: str) -> NoReturn:
        ends.append((verdict, detail))
        raise Ended(*ends[0]) from None

    def call(message: Any) -> Any:
        if ends:
            raise Ended(*ends[0])
        try:
            send(ask, message)
            kind, content = receive(answer)
        except (BrokenPipeError, EOFError):
            end(*_how_it_ended(child))
        except (BadMessage, TypeError, ValueError):
            end("error", "the program wrote something that is no answer")
        if kind == "raise":
            raise _exception(content)
        return content

    def candidate(*args, **kwargs):
        try:
            return unpack(call([pack(args), pack(kwargs)]))
        except BadMessage:
            end("error", "the program wrote something that is no answer")

    try:
        call("start")
        scope: dict[str, Any] = {"__name__": "tests"}
        exec(compile(tests["setup"], "setup.py", "exec"), scope)
        scope[tests["entry_point"]] = candidate  # tests may call it by its name too
        exec(compile(tests["tests"], "tests.py", "exec"), scope)
        scope["check"](candidate)
        return ends[0] if ends else ("pass", "")
    except Ended as ended:
        verdict, detail = ended.args
        return verdict, detail
    except Exception as error:
        raised = getattr(error, "raised", None)
        text = raised or f"{type(error).__name__}: {error}"[:500].strip(": \n")
        return ("error" if raised else "fail"), text


def _exception(content: Any) -> Exception:
    """Rebuild an exception that the program raised; one that is not Python's own becomes a RuntimeError naming it."""
    name, text = (str(one) for one in content) if isinstance(content, list) and len(content) == 2 else ("?", "")
    kind = getattr(builtins, name, None)
    try:
        error = kind(text) if issubclass(kind, Exception) else RuntimeError(f"{name}: {text}")
    except TypeError:  # no class, or one that wants more arguments
        error = RuntimeError(f"{name}: {text}")
    error.raised = f"{name}: {text}".strip(": ")  # by the program, not by the tests
    return error


def _how_it_ended(child: int) -> tuple[str, str]:
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        known = number in signal.Signals._value2member_map_
        return "killed", f"ended by {signal.Signals(number).name if known else f'signal {number}'}"
    return "error", f"ended early with status {os.WEXITSTATUS(status)}"


# ---------------------------------------------------------------------------------------------------------------------
# The side of the program


def run_program(job: dict, folder: str, held: dict[str, bool], ask: int, answer: int) -> None:
    """Define what the code defines, then answer calls of `entry_point` until the judge is gone; never returns."""
    status = 1
    try:
        _keep_only(ask, answer)
        ask, answer = 3, 4
        os.setsid()
        landlock = not held["namespaces"] and confine.limit_paths(folder)
        counted = held["namespaces"] or held["own_user"]  # processes of others do not count against the limit
        confine.set_limit("RLIMIT_NPROC", job["limits"]["processes"] + 2 if counted else 0)
        if not held["namespaces"]:
            confine.filter_calls(alone=False, may_fork=counted)
        send(answer, landlock)
        receive(ask)  # "start"
        module = types.ModuleType("program")
        sys.modules["program"] = module
        sys.argv = ["program.py"]
        status = _serve(job["code"], job["entry_point"], module.__dict__, ask, answer)
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        _flush()
        os._exit(status & 0xFF)


def _serve(code: str, entry_point: str, scope: dict, ask: int, answer: int) -> int:
    try:
        exec(compile(code, "program.py", "exec"), scope)
        function = scope[entry_point]
        reply = ["value", True]
    except Exception as error:
        function, reply = None, _raised(error)
    while True:
        _flush()
        send(answer, reply)
        try:
            args, kwargs = (unpack(part) for part in receive(ask))
        except EOFError:
            return 0
        try:
            reply = ["value", pack(function(*args, **kwargs))]
        except Exception as error:
            reply = _raised(error)


def _raised(error: Exception) -> list:
    traceback.print_exception(error)
    return ["raise", [type(error).__name__, str(error)[:500]]]


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()


def _keep_only(ask: int, answer: int) -> None:
    """Descriptors 0 to 4: nothing to read, output, errors, questions, answers; all others are closed."""
    high = [os.dup2(fd, 50 + i) for i, fd in enumerate((STDOUT, STDERR, ask, answer))]
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    for target, fd in enumerate(high, start=1):
        os.dup2(fd, target)
    os.closerange(5, 64)
