"""Bytes of a far file, read in blocks of which threads fetch a few ahead."""

import io
import threading
from concurrent.futures import Future
from typing import Any

from llm.data.download import patiently

BLOCK_BYTES = 1 << 22
BLOCKS_AHEAD = 4


class Blocks(io.RawIOBase):
    """Bytes of a file of `source`. Threads fetch the blocks behind the one that is read.

    source: `read(file, start, stop)` gives bytes, and `llm.data.download.patiently` can say what fails; file: has
    `size` in bytes.
    """

    def __init__(self, source: Any, file: Any) -> None:
        self.source, self.file, self.at = source, file, 0
        self._blocks: dict[int, Future] = {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.file.size}[whence]
        return self.at

    def readinto(self, buffer) -> int:
        if self.at >= self.file.size:
            return 0
        number, inside = divmod(self.at, BLOCK_BYTES)
        last = (self.file.size - 1) // BLOCK_BYTES
        wanted = range(number, min(number + BLOCKS_AHEAD, last) + 1)
        self._blocks = {i: self._blocks.get(i) or self._request(i) for i in wanted}
        data = self._blocks[number].result()[inside : inside + len(buffer)]
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def _request(self, number: int) -> Future:
        future: Future = Future()
        threading.Thread(target=self._fetch, args=(number, future), name="fathom-stream", daemon=True).start()
        return future

    def _fetch(self, number: int, future: Future) -> None:
        start = number * BLOCK_BYTES
        stop = min(start + BLOCK_BYTES, self.file.size)
        try:
            future.set_result(patiently(lambda: self.source.read(self.file, start, stop), self.source))
        except BaseException as error:
            future.set_exception(error)


def opened(source: Any, file: Any) -> io.BufferedReader:
    """Return a reader of the bytes of a file of `source`."""
    return io.BufferedReader(Blocks(source, file), BLOCK_BYTES)
