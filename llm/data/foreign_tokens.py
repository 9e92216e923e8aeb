"""Token files of other programs, read in parts: nanoGPT and llm.c (.bin), NumPy arrays (.npy) and HDF5 arrays (.h5).

.bin   ids of 2 bytes; or behind 256 int32 of a header, (20240520, 1, count): ids of 2 bytes by GPT-2's vocabulary,
       (20240801, 7, count): ids of 4 bytes by Llama 3's. Formats of llm.c's data files.
.npy   an array of one dimension, of any kind of integers
.h5    the only array of one dimension with integers, or the one called tokens
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm.errors import BadData, UserError
from llm.utils.source import pip_install

SUFFIXES = (".bin", ".npy", ".h5", ".hdf5")
HEADER_BYTES = 256 * 4
MAGIC = {  # magic number and version of a header -> ids, vocabulary, its ordinary tokens
    (20240520, 1): (np.dtype("<u2"), "GPT-2", 50_256),
    (20240801, 7): (np.dtype("<u4"), "Llama 3", 128_000),
}
CHUNK = 1 << 20  # ids that are read at a time
DOCUMENT_IDS = 1 << 16  # longer documents are cut: text without any end would be one
CHECKED = 1 << 28  # ids that are looked at before training, in about a second; the others while they are read


@dataclass(frozen=True)
class ForeignFile:
    """File of `count` ids of `dtype` that begin at byte `offset`.

    key: name of the array in an HDF5 file. ordinary: tokens without the special ones, where the header tells.
    """

    path: Any
    kind: str
    dtype: np.dtype
    offset: int
    count: int
    key: str = ""
    vocabulary: str = ""
    ordinary: int | None = None

    @classmethod
    def open(cls, path: Any) -> "ForeignFile":
        """Return the file at `path`. Raises UserError for a file that holds no ids."""
        suffix = Path(path.name).suffix.lower()
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty. Write it again.")
        try:
            return {".bin": cls._bin, ".npy": cls._npy}.get(suffix, cls._hdf5)(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error})") from error

    @classmethod
    def _bin(cls, path: Any) -> "ForeignFile":
        size = path.stat().st_size
        with path.open("rb") as file:
            head = np.frombuffer(file.read(HEADER_BYTES)[: size // 4 * 4], "<i4")
        known = MAGIC.get(tuple(head[:2].tolist()))
        if known is None:
            if head[:1].tolist() in ([20240520], [20240801]):
                raise UserError(f"{path}: version {head[1]} of its header is not known")
            if size % 2:
                raise UserError(f"{path}: {size:,} bytes are no whole number of ids of 2 bytes. Write it again.")
            return cls(path, "bin", np.dtype("<u2"), 0, size // 2)
        dtype, vocabulary, ordinary = known
        count = int(head[2])
        if HEADER_BYTES + count * dtype.itemsize != size:
            raise UserError(f"{path}: the header says {count:,} ids, but the file has {size:,} bytes. Write it again.")
        return cls(path, "bin", dtype, HEADER_BYTES, count, "", vocabulary, ordinary)

    @classmethod
    def _npy(cls, path: Any) -> "ForeignFile":
        from numpy.lib import format as npy

        with path.open("rb") as file:
            try:
                read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(file)]
                shape, _, dtype = read(file)
            except (ValueError, KeyError) as error:
                raise UserError(f"{path}: is no array of NumPy that can be read ({error})") from error
            offset = file.tell()
        _check_array(path, shape, dtype)
        if offset + shape[0] * dtype.itemsize != path.stat().st_size:
            raise UserError(f"{path}: holds fewer or more than the {shape[0]:,} ids that it says. Write it again.")
        return cls(path, "npy", dtype, offset, shape[0])

    @classmethod
    def _hdf5(cls, path: Any) -> "ForeignFile":
        with _open_hdf5(path) as file:
            arrays = {name: item for name, item in file.items() if getattr(item, "shape", None) is not None}
            flat = [name for name, array in arrays.items() if array.ndim == 1 and array.dtype.kind in "iu"]
            if "tokens" not in arrays and len(flat) != 1:
                raise UserError(f"{path}: needs one array of ids called tokens, found {', '.join(file) or 'nothing'}")
            key = "tokens" if "tokens" in arrays else flat[0]
            _check_array(path, file[key].shape, file[key].dtype)
            return cls(path, "h5", file[key].dtype, 0, file[key].shape[0], key)

    def __str__(self) -> str:
        return str(self.path)

    def isspace(self) -> bool:
        return False

    def chunks(self, start: int = 0) -> Iterator[np.ndarray]:
        """Yield the ids from number `start` on, CHUNK at a time."""
        places = range(start, self.count, CHUNK)
        if self.kind == "h5":
            with _open_hdf5(self.path) as file:
                for at in places:
                    yield file[self.key][at : at + CHUNK]
        elif isinstance(self.path, Path):
            ids = np.memmap(self.path, self.dtype, "r", self.offset, (self.count,))
            for at in places:
                yield np.asarray(ids[at : at + CHUNK])
        else:
            with self.path.open("rb") as file:
                file.seek(self.offset + start * self.dtype.itemsize)
                for at in places:
                    size = min(CHUNK, self.count - at) * self.dtype.itemsize
                    yield np.frombuffer(file.read(size), self.dtype)

    def check_ids(self, ordinary: int, end_of_text: int, files: int) -> None:
        """Raise BadData for an id that is neither below `ordinary` nor `end_of_text`, among the first ones.

        files: number of files that share CHECKED; of a file in a store the first CHUNK ids are looked at.
        """
        at, limit = 0, CHECKED // files if isinstance(self.path, Path) else 0
        for ids in self.chunks():
            self._check(ids, at, ordinary, end_of_text)
            at += len(ids)
            if at >= limit:
                return

    def documents(self, end_of_text: int, start: int, ordinary: int) -> Iterator[np.ndarray]:
        """Yield the ids (n,) int32 of the documents from number `start` on, without `end_of_text`; some are empty.

        Documents are cut at `end_of_text`, longer ones after DOCUMENT_IDS. Raises BadData for an id that is neither
        below `ordinary` nor `end_of_text`.
        """
        number, at, held = 0, 0, np.zeros(0, np.int32)
        for raw in self.chunks():
            self._check(raw, at, ordinary, end_of_text)
            at += len(raw)
            ids = np.concatenate((held, raw.astype(np.int32)))
            begin = 0
            for end in [*np.flatnonzero(ids == end_of_text).tolist(), len(ids)]:
                while end - begin > DOCUMENT_IDS:
                    if number >= start:
                        yield ids[begin : begin + DOCUMENT_IDS]
                    number, begin = number + 1, begin + DOCUMENT_IDS
                if end < len(ids):
                    if number >= start:
                        yield ids[begin:end]
                    number, begin = number + 1, end + 1
            held = ids[begin:]
        if len(held) and number >= start:
            yield held

    def _check(self, ids: np.ndarray, at: int, ordinary: int, end_of_text: int) -> None:
        wrong = np.flatnonzero((ids < 0) | (ids >= ordinary) & (ids != end_of_text))
        if len(wrong):
            raise BadData(
                f"{self}: id {ids[wrong[0]]} at place {at + wrong[0]:,} is none of the {ordinary:,} ordinary tokens of "
                f"the tokenizer, and not data.end_of_text={end_of_text}. Take over the tokenizer of these files "
                "(stage=tokenizer stage.pretrained=...), or set data.end_of_text"
            )


def _check_array(path: Any, shape: tuple, dtype: np.dtype) -> None:
    if len(shape) != 1 or dtype.kind not in "iu":
        raise UserError(f"{path}: an array of {len(shape)} dimensions of {dtype}; needed is one dimension of integers")


@contextmanager
def _open_hdf5(path: Any) -> Iterator[Any]:
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"{path}: needs the package h5py: {pip_install('hdf5')}") from error
    try:
        with h5py.File(path if isinstance(path, Path) else path.open("rb"), "r") as file:
            yield file
    except OSError as error:  # also of a damaged part that is reached later
        raise UserError(f"{path}: cannot be read as HDF5 ({str(error).splitlines()[0]})") from error
