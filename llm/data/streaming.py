"""Text of a data set on the Hugging Face hub, read over the network while it is trained on: nothing is stored.

Files are read in blocks, a few of them ahead. Documents, their order and their positions equal those of fetched files,
so a run may change from one to the other. A position inside a parquet file is found without reading what comes before
its row group.
"""

import io
from types import SimpleNamespace

from llm.data.blocks import opened
from llm.data.download import HubFile, HubFolder
from llm.data.formats import check_file
from llm.data.hub_documents import HubDocuments
from llm.utils.format import in_bytes


class StreamedDocuments(HubDocuments):
    """Shards of a data set on the hub, read over the network; the last one validates."""

    is_stored = is_cached = False

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
        return opened(self.folder, self.file)
