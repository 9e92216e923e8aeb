"""Text of a data set on the Hugging Face hub: shards are fetched ahead of the one that is read."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm.data.documents import FileDocuments
from llm.data.download import HubFile, HubFolder
from llm.data.files import CLASSES, KNOWN, check_one_kind, kind_of
from llm.data.formats import check_file
from llm.data.splits import Parts, divide
from llm.errors import UserError
from llm.utils.format import in_bytes

AHEAD = 8  # shards that are fetched before they are needed


class HubDocuments(FileDocuments):
    """Shards of a data set in name order; the last one validates, the first `shards` of the others are trained on.

    files: a pattern of shard names; None takes every parquet, jsonl or txt file. Raises UserError if none is left to
    validate, or if there are fewer than `shards`.
    """

    def __init__(
        self,
        folder: HubFolder,
        files: str | None = None,
        shards: int | None = None,
        column: str = "text",
        val_size: int | None = None,
        key: str = "data",
        **options: Any,
    ) -> None:
        self.folder = folder
        found, parts = find_shards(folder, files, key)
        train, val = ([found[i] for i in part] for part in parts[:2])
        if len(train) == 1 and not val and val_size is None:
            raise UserError(
                f"{folder} has one shard only, {train[0].name}, so none is left for validation: set "
                f"{key}.val_size=<documents> and the last ones of it are held out"
            )
        last = [] if val else train[-1:]
        train = train if val else train[:-1]
        if shards is not None and shards > max(len(train), 1):
            raise UserError(f"{key}.shards={shards}: {folder} has {len(train)} shards to train on, one validates")
        self.remote = [*train[:shards], *last, *val]
        self._number = {folder.path(file): number for number, file in enumerate(self.remote)}
        self._ahead = AHEAD if int(os.environ.get("LOCAL_RANK", 0)) == 0 else 0  # one process of a machine is enough
        paths, count = list(self._number), len(self.remote) - len(val)
        note = f"left out: {len(parts.test)} shards, the test split by name" if parts.test else ""
        super().__init__(paths[:count], str(folder), column, val_size, key, val=paths[count:], note=note, **options)
        self.names = {folder.path(file): file.name for file in self.remote}

    def check(self) -> str:
        """Fetch the first and the validation shard and look for column and documents; return one line on the source."""
        ends = list(dict.fromkeys([self.remote[0], self.remote[-1]]))
        self.folder.fetch_all(ends)
        for file in ends:
            check_file(self.folder.path(file), self.column)
        ahead, self._ahead = self._ahead, 0
        self._find_documents()
        self._ahead = ahead
        here, count = sum(map(self.folder.is_here, self.remote)), len(self.remote)
        size = sum(file.size for file in self.remote)
        return (
            f"{count} shards of {self.where}, {in_bytes(size)}, {here} of them in {self.folder.root}; "
            f"validation: {self._held_out()}{self._notes()}"
        )

    def size_of(self, path: Path) -> int:
        """Return the bytes of a shard, fetched or not."""
        return self.remote[self._number[path]].size

    def stamp(self, path: Path) -> tuple:
        """Return the address and the size of a shard: a version of a data set never changes."""
        return str(path), self.remote[self._number[path]].size

    def present(self, path: Path) -> Path:
        """Wait for the shard and return its path, while the shards behind it are fetched too."""
        number = self._number[path]
        return self.folder.request(self.remote[number : number + 1 + self._ahead])[0].result()


def find_shards(folder: HubFolder, pattern: str | None, key: str) -> tuple[list[HubFile], Parts]:
    """Return the shards that `pattern` names, and how their names divide them.

    A pattern that names shards of one split only is taken as it is. Raises UserError if there are none, none to train
    on, or files of several kinds.
    """
    known = [file for file in folder.matching(pattern or "*") if kind_of(file.name)]
    found = next((of for kinds in CLASSES if (of := [file for file in known if kind_of(file.name) in kinds])), [])
    if not found:
        asked = f"no file that matches {key}.files={pattern} and is {KNOWN}" if pattern else f"no {KNOWN} file"
        raise UserError(f"{folder}: there is {asked}; it holds {_examples([file.name for file in folder.files()])}")
    names = [file.name for file in found]
    check_one_kind(found, f"{folder}: the data set", f"{key}.files='*%s'")
    parts = divide(names)
    if pattern is not None and sum(map(bool, parts)) == 1:
        parts = Parts(list(range(len(found))), [], [])
    if not parts.train:
        raise UserError(
            f"{folder} holds no shard to train on by their names ({_examples(names)}): name them in {key}.files"
        )
    return found, parts


def _examples(names: Sequence[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more
