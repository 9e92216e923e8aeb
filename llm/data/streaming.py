"""Text of a data set on the Hugging Face hub, read over the network while it is trained on: nothing is stored.

Files are read in blocks, a few of them ahead. Documents, their order and their positions equal those of fetched files,
so a run may change from one to the other. A position inside a parquet file is found without reading what comes before
its row group.
"""

import io
import threading
from concurrent.futures import Future
from types import SimpleNamespace

from llm.data.download import HubFile, HubFolder, patiently
from llm.data.formats import check_file
from llm.data.hub_documents import HubDocuments
from llm.utils.format import in_bytes

BLOCK_BYTES = 1 << 22
BLOCKS_AHEAD = 4


class StreamedDocuments(HubDocuments):
    """Shards of a data set on the hub, read over the network; the last one validates."""

    is_stored = False

    def check(self) -> str:
        """Look for column and documents in the first and the validation shard; return one line on what is read."""
        for path in dict.fromkeys((self.files[0], self.files[-1])):
            check_file(self.present(path), self.column)
        self._find_documents()
        size = sum(file.size for file in self.remote)
        return (
            f"{len(self.remote)} shards of {self.where}, {in_bytes(size)}, read over the network; "
            f"validation: {self._held_out()}{self._notes()}"
        )

    def present(self, path) -> "RemoteFile":
        """Return the shard as a file that is read over the network."""
        return RemoteFile(self.folder, self.remote[self._number[path]])


class RemoteFile:
    """File on the hub with the methods of a path that the readers of llm.data.formats call."""

    def __init__(self, folder: HubFolder, file: HubFile) -> None:
        self.folder, self.file, self.name = folder, file, file.name

    def __str__(self) -> str:
        return f"{self.folder}: {self.name}"

    def stat(self) -> SimpleNamespace:
        """Return the size in bytes as `st_size`."""
        return SimpleNamespace(st_size=self.file.size)

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Return a reader of the file's bytes."""
        return io.BufferedReader(Blocks(self.folder, self.file), BLOCK_BYTES)


class Blocks(io.RawIOBase):
    """Bytes of a file on the hub. Threads fetch the blocks behind the one that is read."""

    def __init__(self, folder: HubFolder, file: HubFile) -> None:
        self.folder, self.file, self.at = folder, file, 0
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
            future.set_result(patiently(lambda: self.folder.read(self.file, start, stop), self.folder))
        except BaseException as error:
            future.set_exception(error)
