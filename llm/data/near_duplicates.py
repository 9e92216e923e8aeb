"""Near-duplicates among training documents, found in one pass before training and left out of it.

Documents are near-duplicates where they share most of their runs of five words: the runs of both, over the runs of
either, reach a threshold. The share is estimated from 128 hashes of a document (MinHash), and only documents that agree
in a band of hashes are compared. A training document is left out where one before it that is kept, or a held-out one,
is a near-duplicate of it; held-out text stays as it is. So everything that is left out stands elsewhere.

The numbers of the rows left out are kept in a file, named after what the text was, so that every process of a run and
every resume leaves out the same ones. Memory: about 2 kB per document that is kept, while the pass goes on.
"""

import hashlib
import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock

from llm.data.documents import FileDocuments, Shard
from llm.data.records import DAMAGE
from llm.data.streaming import StreamedDocuments
from llm.data.text_mixture import MixedDocuments
from llm.errors import UserError
from llm.utils.files import write_atomic
from llm.utils.format import duration
from llm.utils.source import pip_install
from llm.utils.words import words_or_signs

VERSION = 3  # of the rules below: another number finds the rows anew
WORDS = 5  # in a run
CHARS = 13  # in a run of text that is written without spaces
HASHES, SEED = 128, 42
FOUND = 0.85  # share of the pairs right at the threshold that agree in a band, at least
NEWS_SECONDS = 30.0


class NearDuplicates:
    """Rows of the training text of `sources` that are left out as near-duplicates, found when first asked for.

    sources: all that training reads, in order; they share one set of documents. threshold: least share of common runs,
    0.5 to 1. folder: where the rows are kept. Raises UserError where the package `rensa` is missing, or a source is
    read over the network.
    """

    def __init__(self, sources: Sequence[FileDocuments], threshold: float, folder: Path) -> None:
        self.sources, self.threshold, self.folder = list(sources), threshold, folder
        if any(isinstance(source, StreamedDocuments) for source in self.sources):
            raise UserError(
                f"{self} needs the text in files, as it is read once before training; leave data.streaming=true out"
            )
        _rensa()
        self._rows: dict[tuple, np.ndarray] | None = None
        self.documents = self.leaked = 0  # training documents in all; those left out as they resemble held-out ones

    def __str__(self) -> str:
        return f"data.near_duplicates={self.threshold}"

    def rows(self, source: FileDocuments, shard: Shard) -> np.ndarray:
        """Return the rows of a training shard to leave out, counted from its start, ascending."""
        return self._found()[_place(source, shard)]

    def by_file(self, source: FileDocuments) -> dict[str, int]:
        """Return the number of documents left out of each training file of a source that has any."""
        counts = {str(shard.path): len(self.rows(source, shard)) for shard in source.shards("train")}
        return {name: count for name, count in counts.items() if count}

    def identity(self) -> str:
        """Return a name for the rows that are left out: equal ones mean equal rows."""
        return hashlib.sha256(b"|".join(rows.tobytes() for rows in self._found().values())).hexdigest()[:16]

    def share_kept(self) -> float:
        """Return the share of the training documents that is kept."""
        return 1 - sum(map(len, self._found().values())) / max(1, self.documents)

    def _found(self) -> dict[tuple, np.ndarray]:
        """Return the rows of every training shard: from the file of an earlier pass, else by a pass over the text."""
        if self._rows is None:
            shards = [(source, shard) for source in self.sources for shard in source.shards("train")]
            path = self.folder / f"{self._text_identity()}.npz"
            with _locked(path):  # one process searches, the others wait for its file
                if (arrays := _read(path, len(shards))) is None:
                    arrays = self._search(shards)
                    _write(path, arrays)
            self.documents, self.leaked = arrays.pop().tolist()
            if sum(map(len, arrays)) == self.documents:
                raise UserError(f"{self}: all training documents are near-duplicates of held-out ones. Name other text")
            self._rows = {_place(*at): rows for at, rows in zip(shards, arrays, strict=True)}
            print(self._summary(), flush=True)
        return self._rows

    def _summary(self) -> str:
        """Return in one line how many documents are left out."""
        count = sum(map(len, self._rows.values()))
        leaked = f", {self.leaked:,} of them like held-out ones" if self.leaked else ""
        return f"near-duplicates: {count:,} of {self.documents:,} training documents are left out{leaked} ({self})"

    def _text_identity(self) -> str:
        """Return a digest of the files, of how they are read and of the threshold."""
        parts: list = [VERSION, self.threshold]
        for source in self.sources:
            parts.append(source.column.identity())
            for split in ("train", "val"):
                parts += [(split, at.start, at.stop, *source.stamp(at.path)) for at in source.shards(split)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]

    def _search(self, shards: Sequence[tuple[FileDocuments, Shard]]) -> list[np.ndarray]:
        """Read all text once; return the rows to leave out of each shard, then (training documents, leaked ones)."""
        begin = said = time.monotonic()
        print(f"near-duplicates: reading the text once to find them ({self})", flush=True)
        held_out, kept = Sketches(self.threshold), Sketches(self.threshold)
        for source in self.sources:
            for shard in source.shards("val"):
                for _, text in _documents(source, shard):
                    held_out.add(sketch(text))
        arrays, documents, leaked = [], 0, 0
        for source, shard in shards:
            left_out = []
            for row, text in _documents(source, shard):
                hashes = sketch(text)
                documents += 1
                if leak := held_out.resemble(hashes):
                    leaked += 1
                if leak or kept.resemble(hashes):
                    left_out.append(row)
                else:
                    kept.add(hashes)
                if time.monotonic() - said > NEWS_SECONDS:
                    said = time.monotonic()
                    print(f"near-duplicates: {documents:,} documents, {duration(said - begin)}", flush=True)
            arrays.append(np.array(left_out, np.int64))
        return [*arrays, np.array([documents, leaked])]


def leave_out(source: FileDocuments | MixedDocuments, threshold: float, cache: str) -> None:
    """Make training leave out the near-duplicates of a source, or of all sources of a mixture; cache: paths.data."""
    parts = list(source.sources.values()) if isinstance(source, MixedDocuments) else [source]
    found = NearDuplicates(parts, threshold, Path(cache) / "near_duplicates")
    for part in parts:
        part.near_duplicates = found


class Sketches:
    """Hashes of documents, among which those that resemble another document are looked up."""

    def __init__(self, threshold: float) -> None:
        self.threshold, self._kept = threshold, []
        self._index = _rensa().RMinHashLSH(threshold, HASHES, bands(threshold))

    def add(self, hashes) -> None:
        """Keep the hashes of a document."""
        self._index.insert(len(self._kept), hashes)
        self._kept.append(hashes)

    def resemble(self, hashes) -> bool:
        """Return whether a document that was added is a near-duplicate of the one with these hashes."""
        return any(self._kept[key].jaccard(hashes) >= self.threshold for key in self._index.query(hashes))


def sketch(text: str):
    """Return the hashes of the set of runs of a text."""
    hashes = _rensa().RMinHash(HASHES, SEED)
    try:
        hashes.update(runs(text))
    except UnicodeEncodeError:  # half a character of UTF-16, which JSON can hold
        hashes.update(runs(text.encode("utf-8", "replace").decode()))
    return hashes


def runs(text: str) -> list[str]:
    """Return the runs of words of a text in small letters, of characters where it is written without spaces.

    A text shorter than a run is one.
    """
    parts = words_or_signs(text)
    size, glue = (CHARS, "") if isinstance(parts, str) else (WORDS, " ")
    found = list(map(glue.join, zip(*(parts[start:] for start in range(size)), strict=False)))
    return found or [glue.join(parts)]


def bands(threshold: float) -> int:
    """Return the fewest bands, a power of 2, in one of which `FOUND` of the pairs at the threshold agree."""
    counts = [2**power for power in range(2, 7)]
    enough = (n for n in counts if 1 - (1 - threshold ** (HASHES // n)) ** n >= FOUND)
    return next(enough, counts[-1])


def _rensa():
    try:
        import rensa
    except ModuleNotFoundError as error:
        raise UserError(f"data.near_duplicates needs a package of its own: {pip_install('dedup')}") from error
    return rensa


def _documents(source: FileDocuments, shard: Shard) -> Iterator[tuple[int, str]]:
    """Yield (row, text) of the documents of a shard, near-duplicates too."""
    return ((row, text) for row, text in enumerate(source._rows(shard, 0)) if text and not text.isspace())


def _place(source: FileDocuments, shard: Shard) -> tuple:
    return source.key, str(shard.path), shard.start


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, and make its folder. Raises UserError if the disk refuses."""
    lock = FileLock(path.with_suffix(".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); choose another paths.data") from error
    try:
        yield
    finally:
        lock.release()


def _read(path: Path, count: int) -> list[np.ndarray] | None:
    """Return the arrays of an earlier pass over `count` shards; None where there are none or they are damaged."""
    try:
        with np.load(path) as saved:
            return [saved[f"arr_{number}"] for number in range(count + 1)]
    except (ValueError, KeyError, *DAMAGE):
        return None


def _write(path: Path, arrays: Sequence[np.ndarray]) -> None:
    packed = io.BytesIO()
    np.savez_compressed(packed, *arrays)
    write_atomic(path, packed.getvalue())
