"""A cache of metrics.csv by columns: what was read once is not parsed again, and rows that are new are appended.

Each stage has a folder below the cache, with state.json and one file per column of (step, value) pairs in float64. Any
part may be deleted at any time. Empty cells take no room; NaN and infinite values are kept, since they are findings.
"""

import contextlib
import csv
import hashlib
import os
import shutil
import threading
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm.errors import UserError
from llm.run.lock import waiting_lock
from llm.utils.files import read_json, write_json

FORMAT = 1
FEW = 1 << 16  # bytes of new rows up to which plain Python is quicker than to call Arrow
PIECE = 1 << 27  # bytes that are parsed at once
TAIL = 64  # bytes before the end of what was read, by which it is known again
MOST_STATES = 4096  # stages whose state is kept in memory

Points = tuple[np.ndarray, np.ndarray]  # steps, ascending, and values; float64 (N,)


@dataclass
class State:
    """State of what was read of one metrics.csv. read: bytes, whole lines only; columns: {name: [file, bytes]}."""

    source: str
    format: int = FORMAT
    inode: int = 0
    size: int = 0
    changed: int = 0  # time of the last change in nanoseconds
    read: int = 0
    tail: str = ""
    header: list[str] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)  # last value of every column, with the last step


class Columns:
    """The cache of all stages in one folder. Threads and processes may use one folder at once.

    Every method raises UserError where metrics.csv cannot be read, or the cache cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._states: OrderedDict[str, State] = OrderedDict()
        self._lock = threading.Lock()

    def names(self, stage_dir: str | Path) -> list[str]:
        """Return the columns that have a value, in the order of the file, without the step."""
        return list(self._fresh(Path(stage_dir))[1].columns)

    def last(self, stage_dir: str | Path) -> dict[str, float]:
        """Return the last value of every column, and the last step; {} without rows."""
        return dict(self._fresh(Path(stage_dir))[1].last)

    def points(self, stage_dir: str | Path, name: str) -> Points:
        """Return the steps and values of a column; of two rows for one step the later one counts. Empty: no column."""
        for _ in range(2):
            place, state = self._fresh(Path(stage_dir))
            file, length = state.columns.get(name, ["", 0])
            if not length:
                break
            with contextlib.suppress(OSError):
                numbers = np.fromfile(place / file, np.float64, length // 8)
                if numbers.nbytes == length:
                    return _ascending(numbers[::2], numbers[1::2])
            self.forget(stage_dir)  # someone has deleted the cache, or a part of it
        return np.empty(0), np.empty(0)

    def forget(self, stage_dir: str | Path) -> None:
        """Delete what is kept of a stage."""
        source = str(_source(Path(stage_dir)))
        with self._lock:
            self._states.pop(source, None)
        shutil.rmtree(self._place(source), ignore_errors=True)

    def _place(self, source: str) -> Path:
        return self.folder / hashlib.sha256(source.encode()).hexdigest()[:24]

    def _fresh(self, stage_dir: Path) -> tuple[Path, State]:
        """Return the folder and the state of a stage after what is new in its file has been read."""
        path = _source(stage_dir)
        source = str(path)
        place = self._place(source)
        try:
            facts = path.stat()
        except OSError:
            return place, State(source)
        with self._lock:
            state = self._states.get(source)
        if state is None or not _is_current(state, facts):
            try:
                place.mkdir(parents=True, exist_ok=True)
                with waiting_lock(place / ".lock", seconds=20):
                    state = _update(path, place, _saved(place, source))
            except (OSError, csv.Error) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                raise UserError(f"{path} cannot be read into the cache {self.folder} ({reason})") from error
            with self._lock:
                self._states[source] = state
                while len(self._states) > MOST_STATES:
                    self._states.popitem(last=False)
        return place, state


def _source(stage_dir: Path) -> Path:
    return Path(os.path.abspath(stage_dir)) / "metrics.csv"


def _saved(place: Path, source: str) -> State:
    """Return the state on disk; a new one where there is none that can be used."""
    try:
        found = State(**(read_json(place / "state.json") or {"source": source}))
    except (UserError, OSError, ValueError, TypeError):  # not ours, or damaged
        return State(source)
    return found if found.format == FORMAT and found.source == source else State(source)


def _is_current(state: State, facts: os.stat_result) -> bool:
    return (state.inode, state.size, state.changed) == (facts.st_ino, facts.st_size, facts.st_mtime_ns)


def _update(path: Path, place: Path, state: State) -> State:
    """Read the new rows of a file into its columns, all rows where it is another file than before."""
    with path.open("rb") as file:
        facts = os.fstat(file.fileno())
        if _is_current(state, facts):
            return state
        if not _goes_on(file, facts, state):
            for old in place.glob("*.f64"):
                old.unlink(missing_ok=True)
            state = State(state.source)
        state.inode, state.size, state.changed = facts.st_ino, facts.st_size, facts.st_mtime_ns
        file.seek(state.read)
        while piece := file.read(PIECE):
            whole = piece[: piece.rfind(b"\n") + 1]
            if not whole:
                break
            _take(whole, place, state)
            state.read += len(whole)
            state.tail = whole[-TAIL:].hex()
            file.seek(state.read)
    write_json(place / "state.json", asdict(state))
    return state


def _goes_on(file: Any, facts: os.stat_result, state: State) -> bool:
    """Return whether a file is the one that was read before, perhaps with more rows at its end."""
    if not state.read or facts.st_ino != state.inode or facts.st_size < state.read:
        return False
    tail = bytes.fromhex(state.tail)
    file.seek(state.read - len(tail))
    return file.read(len(tail)) == tail


def _take(piece: bytes, place: Path, state: State) -> None:
    """Append the whole lines of a piece to the columns."""
    if not state.header:
        first, _, piece = piece.partition(b"\n")
        state.header = next(csv.reader([first.decode("utf-8", errors="replace").strip("\r")]), [])
    if not piece.strip() or "step" not in state.header:
        return
    parsed = _by_python(piece, state.header) if len(piece) < FEW else _by_arrow(piece, state.header)
    steps = parsed.pop("step")
    known = np.isfinite(steps)
    for name, cells in parsed.items():
        there = known & ~cells[1]
        if not there.any():
            continue
        pairs = np.column_stack((steps[there], cells[0][there]))
        file, length = state.columns.get(name, [f"{len(state.columns)}.f64", 0])
        with (place / file).open("r+b" if length else "wb") as out:
            out.truncate(length)  # of what a crash left behind
            out.seek(length)
            out.write(pairs.tobytes())
        state.columns[name] = [file, length + pairs.nbytes]
        state.last[name] = float(pairs[-1, 1])
    if known.any():
        state.last["step"] = float(steps[known][-1])
    state.last = {name: number for name, number in state.last.items() if np.isfinite(number)}


def _by_python(piece: bytes, header: list[str]) -> dict[str, Any]:
    """Return {"step": numbers, other column: (numbers, whether each is empty)} of the lines of a piece."""
    rows = list(csv.reader(piece.decode("utf-8", errors="replace").splitlines()))
    parsed: dict[str, Any] = {}
    for place, name in enumerate(header):
        cells = [_number(row[place]) if place < len(row) else None for row in rows]
        numbers = np.array([np.nan if cell is None else cell for cell in cells], np.float64)
        parsed[name] = numbers if name == "step" else (numbers, np.array([cell is None for cell in cells], bool))
    return parsed


def _by_arrow(piece: bytes, header: list[str]) -> dict[str, Any]:
    """Return what `_by_python` does, quicker for many rows; a piece with cells that are no numbers goes there."""
    import pyarrow as pa
    from pyarrow import csv as arrow

    try:
        table = arrow.read_csv(
            pa.BufferReader(piece),
            read_options=arrow.ReadOptions(column_names=[str(place) for place in range(len(header))]),
            convert_options=arrow.ConvertOptions(
                column_types={str(place): pa.float64() for place in range(len(header))},
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
    except pa.ArrowInvalid:
        return _by_python(piece, header)
    parsed: dict[str, Any] = {}
    for place, name in enumerate(header):
        column = table.column(place)
        numbers = column.to_numpy()
        parsed[name] = numbers if name == "step" else (numbers, column.is_null().to_numpy())
    return parsed


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _ascending(steps: np.ndarray, values: np.ndarray) -> Points:
    """Sort by step, and keep the last of several values for one step."""
    if len(steps) > 1 and not (np.diff(steps) > 0).all():
        order = np.argsort(steps, kind="stable")
        steps, values = steps[order], values[order]
        last = np.append(np.diff(steps) > 0, True)
        steps, values = steps[last], values[last]
    return steps, values
