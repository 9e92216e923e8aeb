"""Heals the compile cache: a process that was ended while the C++ compiler wrote leaves a file that ends too early.

torch's compiler keeps what it has built in a folder, for all later starts, and takes a file that is there for whole. A
library that ends too early cannot be loaded, or ends the process that loads it by SIGBUS; a precompiled header that
does so makes every compilation fail. What is deleted here is built again.
"""

import os
import re
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock, Timeout

# Of the header of a 64-bit ELF file, little-endian: magic number and class; where the table of sections begins; the
# size of its entries, and their number. The linker writes the table last and the header after it.
ELF_HEADER = struct.Struct("<5s35xQ10xHH2x")
ELF = b"\x7fELF\x02"


def heal(failure: str = "") -> list[Path]:
    """Delete the damaged files of the compile cache, and say so on stdout; return them.

    failure: text of an error of the compiler. A precompiled header that it used counts as damaged: nothing but the
    compiler can tell. It is returned too where another process has deleted it already.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir())
    damaged = [path for path in libraries(folder) if is_cut(path) and delete_unless_locked(path, folder)]
    for name in re.findall(r"-include (\S+)", failure):
        header = Path(name + ".gch")
        if header.is_relative_to(folder):
            header.unlink(missing_ok=True)
            damaged.append(header)
    if damaged:
        what = "1 damaged file" if len(damaged) == 1 else f"{len(damaged)} damaged files"
        print(f"compile cache: deleted {what} of an interrupted compilation; compiling again ({folder})", flush=True)
    return damaged


def libraries(folder: Path) -> Iterable[Path]:
    """Yield the libraries and object files below `folder`; none where they are not ELF files (not Linux)."""
    if sys.platform == "linux":
        for place, _, names in os.walk(folder):
            yield from (Path(place, name) for name in names if name.endswith((".so", ".o")))


def is_cut(path: Path) -> bool:
    """Return whether an ELF file ends before its table of sections does; False for one that has gone."""
    try:
        with open(path, "rb") as file:
            head, size = file.read(ELF_HEADER.size), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return False
    if len(head) < ELF_HEADER.size:
        return True
    magic, sections, entry, count = ELF_HEADER.unpack(head)
    return magic != ELF or size < sections + entry * count


def delete_unless_locked(path: Path, folder: Path) -> bool:
    """Delete a file that is still cut once nobody builds it; return whether that was so.

    folder: the compile cache. Its compiler holds the lock `locks/<key>.lock` while it writes `<key>.so`.
    """
    locks = folder / "locks"
    locks.mkdir(exist_ok=True)
    try:
        with FileLock(locks / f"{path.name.split('.')[0]}.lock", timeout=0):
            if is_cut(path):
                path.unlink()
                return True
    except (Timeout, FileNotFoundError):
        pass
    return False
