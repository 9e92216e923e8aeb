"""Runs an entry point of Fathom in a process that notes what a hostile folder must not bring about.

python tests/hostile_entry.py <script or -m module> <arguments>

HOSTILE_NOTES names the file of the notes: connections to other machines and look-ups of names. HOSTILE_STDIN names a
file that is piped in.
"""

import os
import runpy
import sys

HERE = ("127.0.0.1", "::1", "localhost", "", None, os.uname().nodename)


def note(event: str, args: tuple) -> None:
    """Write down an attempt to reach another machine; an audit hook of Python."""
    address = args[1][0] if event == "socket.connect" and isinstance(args[1], tuple) else None
    name = args[0] if event == "socket.getaddrinfo" else address
    if name not in HERE:
        with open(os.environ["HOSTILE_NOTES"], "a") as file:
            file.write(f"{event} {name}\n")


if __name__ == "__main__":
    sys.addaudithook(note)
    os.dup2(os.open(os.environ["HOSTILE_STDIN"], os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)
    sys.argv = sys.argv[1:]
    if sys.argv[0] == "-m":
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
