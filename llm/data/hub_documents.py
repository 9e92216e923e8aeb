"""Text of a data set on the Hugging Face hub: shards are fetched ahead of the one that is read."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from llm.data.documents import FileDocuments
from llm.data.download import HubFile, HubFolder
from llm.data.formats import KNOWN, check_file, check_one_kind, kind_of
from llm.errors import UserError
from llm.utils.format import in_bytes

AHEAD = 8  # shards that are fetched before they are needed
SPLITS = re.compile(r"(?:^|/)(train|validation|valid|val|dev|test)(?=[-_./\d])")


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
    ) -> None:
        self.folder = folder
        found = find_shards(folder, files, key)
        if len(found) == 1 and val_size is None:
            raise UserError(
                f"{folder} has one shard only, {found[0].name}, so none is left for validation: set "
                f"{key}.val_size=<documents> and the last ones of it are held out"
            )
        train = found[:-1]
        if shards is not None and shards > max(len(train), 1):
            raise UserError(f"{key}.shards={shards}: {folder} has {len(train)} shards to train on, one validates")
        self.remote = [*train[:shards], found[-1]]
        self._number = {folder.path(file): number for number, file in enumerate(self.remote)}
        self._ahead = AHEAD if int(os.environ.get("LOCAL_RANK", 0)) == 0 else 0  # one process of a machine is enough
        super().__init__(list(self._number), str(folder), column, val_size, key)

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
            f"validation: {self._held_out()}"
        )

    def present(self, path: Path) -> Path:
        """Wait for the shard and return its path, while the shards behind it are fetched too."""
        number = self._number[path]
        return self.folder.request(self.remote[number : number + 1 + self._ahead])[0].result()


def find_shards(folder: HubFolder, pattern: str | None, key: str) -> list[HubFile]:
    """Return the shards that `pattern` names. Raises UserError if there are none, or files of several kinds or splits.

    Only a `pattern` may name files of several splits.
    """
    found = [file for file in folder.matching(pattern or "*") if kind_of(file.name)]
    if not found:
        asked = f"no file that matches {key}.files={pattern} and is {KNOWN}" if pattern else f"no {KNOWN} file"
        raise UserError(f"{folder}: there is {asked}; it holds {_examples([file.name for file in folder.files()])}")
    names = [file.name for file in found]
    check_one_kind(names, f"{folder}: the data set", f"{key}.files='*%s'")
    splits = {match[1] for name in names if (match := SPLITS.search(name))}
    if pattern is None and len(splits) > 1:
        raise UserError(
            f"{folder} holds several splits ({', '.join(sorted(splits))}: {_examples(names)}): name the shards to "
            f"read, such as {key}.files='*train*', with {key}.val_size=<documents> if the last is not to validate"
        )
    return found


def _examples(names: Sequence[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more
