"""Text that exists as token ids only: folders of stage=write_tokens, and token files of other programs (data=tokens).

A folder of ours holds tokens.json beside its token files (llm.data.token_files): the tokenizer, and the files of each
split in the order of the text. So documents, their order and their positions equal those of the text.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.documents import Cursor, held_out_all, in_order, share
from llm.data.files import Listed, list_files
from llm.data.foreign_tokens import SUFFIXES, ForeignFile
from llm.data.shuffle import Shuffle
from llm.data.splits import divide
from llm.data.stores import is_address
from llm.data.token_files import TokenFolder, read_record, read_token_file
from llm.data.tokens import Ids
from llm.errors import UserError, reason_of
from llm.utils.addresses import without_secrets as shown
from llm.utils.files import MOST_BYTES, parse_json
from llm.utils.shapes import Kind, listing, mapping, text, truth, whole

INDEX = "tokens.json"
VERSION = 1
FACTS: dict[str, Kind] = {
    "version": whole(VERSION, VERSION),
    "fingerprint": text,
    "vocab_size": whole(1),
    "whole": truth,
    "train": listing(text),
    "val": listing(text),
}


class TokenDocuments:
    """Base of the sources of token ids. `shards(split)` are files of ids, `_rows(shard, start)` reads one.

    The ids of a document are int32 and begin with BOS. `use` must be called with a tokenizer first.
    """

    gives_ids = True
    where = ""
    shuffle: Shuffle | None = None
    tokenizer: Any = None

    def shards(self, split: str) -> Sequence:
        """Return the files of "train" or "val", in the order in which they are read."""
        raise NotImplementedError

    def use(self, tokenizer) -> None:
        """Read the ids as those of `tokenizer`. Raises UserError if they are not."""
        self.tokenizer = tokenizer

    def iterate(
        self, split: str, cursor: Cursor | None = None, rank: int = 0, world: int = 1, loop: bool = True
    ) -> Iterator[tuple[np.ndarray, Cursor]]:
        """Yield the ids of this rank's documents from `cursor` on, each with the cursor behind it."""
        order = in_order
        if self.shuffle is not None and split == "train" and loop:
            order = self.shuffle.in_order
        documents = order(self.shards(split), self._rows, cursor, loop, f"{self.where} ({split} split)")
        for row, behind in share(documents, cursor, rank, world):
            yield row.ids, behind

    def texts(self, split: str) -> Iterator[str]:
        """Yield the documents of a split once, as text."""
        return (self.tokenizer.decode(ids[1:].tolist()) for ids, _ in self.iterate(split, loop=False))

    def _rows(self, shard: Any, start: int) -> Iterator[Ids | None]:
        raise NotImplementedError


class WrittenTokens(TokenDocuments):
    """Folder that stage=write_tokens wrote, on disk or in a store. seed: of the order that `data.shuffle` asks for."""

    def __init__(self, path: str | Path, key: str, seed: int | None = None) -> None:
        self.folder, self.key, self.where = TokenFolder(path, key), key, f"{key}={shown(path)}"
        self.index = read_index(self.folder)
        if self.index is None:
            raise UserError(f"{self.where}: there is no {INDEX}, as stage=write_tokens writes it")
        if seed is not None:
            self.shuffle = Shuffle(seed, self.index["whole"])

    def shards(self, split: str) -> list[str]:
        return self.index[split]

    def use(self, tokenizer) -> None:
        if tokenizer.fingerprint != self.index["fingerprint"]:
            raise UserError(
                f"{self.where}: its ids are of another tokenizer ({self.index['vocab_size']:,} tokens) than the run's "
                f"({tokenizer.vocab_size:,}). Name a run with that tokenizer: init_from=<run>/tokenizer"
            )
        super().use(tokenizer)

    def check(self) -> str:
        """Return one line on what is read. Raises UserError that names the files which are not written yet."""
        if missing := [name for name, record in self._records.items() if record is None]:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise UserError(
                f"{self.where}: {len(missing)} of {len(self._records)} token files are missing or damaged: "
                f"{', '.join(missing[:3])}{more}. Write them: stage=write_tokens, every stage.part of it"
            )
        return (
            f"{len(self.shards('train'))} token files, {self.tokens('train'):,} tokens, {self.where}; validation: "
            f"{len(self.shards('val'))} files, {self.tokens('val'):,} tokens"
        )

    def tokens(self, split: str) -> int:
        """Return the number of tokens of a split."""
        return sum(self._records[name].tokens for name in self.shards(split))

    @cached_property
    def _records(self) -> dict:
        files = {name: self.folder.find(name) for name in [*self.index["train"], *self.index["val"]]}
        return {name: None if file is None else read_record(file) for name, file in files.items()}

    def _rows(self, shard: str, start: int) -> Iterator[Ids | None]:
        file = self.folder.find(shard)
        if file is None or read_record(file) is None:
            raise UserError(f"{self.folder}/{shard}: is missing or damaged. Write it again: stage=write_tokens")
        return (None if ids is None else Ids(ids) for ids in read_token_file(file, start))


class ForeignTokens(TokenDocuments):
    """Token files of other programs: .bin, .npy and .h5. The id `end_of_text` stands between their documents.

    end_of_text: None = the first id behind the ordinary tokens of the tokenizer, as in the vocabulary of GPT-2. The
    names of the files say what validates, else the last one does; `val` names it. What data.train names is trained on,
    whatever its name.
    """

    def __init__(
        self, path: Any, key: str, val: Any = None, end_of_text: int | None = None, seed: int | None = None
    ) -> None:
        self.key, self.where, self.end_of_text = key, f"{key}={shown(path)}", end_of_text
        found = token_files(path, key)
        parts = [[found.files[i][0] for i in part] for part in divide([name for _, name in found.files])]
        if key.endswith(".train"):  # named by the user: the names need not say anything
            parts = [[file for file, _ in found.files], [], []]
        train, held = parts[0], parts[1]
        if val is not None:
            held = [file for file, _ in token_files(val, "data.val").files]
            validates = {str(file.resolve()) for file in held}
            named = train or parts[1]
            train = [file for file in named if str(file.resolve()) not in validates]
            if named and not train:
                raise held_out_all(key, path, "data.val", val)
        elif not held:
            train, held = train[:-1], train[-1:]
        if not train or not held:
            raise UserError(
                f"{self.where}: {len(found.files)} token file(s), and none is left to "
                f"{'train on' if held else 'validate'}. Name them: data.train=... data.val=..."
            )
        self._split = {
            split: [ForeignFile.open(file) for file in files] for split, files in (("train", train), ("val", held))
        }
        if seed is not None:
            self.shuffle = Shuffle(seed, whole=False)

    def shards(self, split: str) -> list[ForeignFile]:
        return self._split[split]

    def use(self, tokenizer) -> None:
        ordinary = len(tokenizer.tokens)
        self.end_of_text = ordinary if self.end_of_text is None else self.end_of_text
        files = [*self.shards("train"), *self.shards("val")]
        for file in files:
            if file.ordinary not in (None, ordinary):
                raise UserError(
                    f"{file}: its header says the ids are {file.vocabulary}'s, with {file.ordinary:,} ordinary tokens; "
                    f"the run's tokenizer has {ordinary:,}. Take that one over: stage=tokenizer stage.pretrained="
                )
            file.check_ids(ordinary, self.end_of_text, len(files))
        super().use(tokenizer)

    def check(self) -> str:
        """Return one line on what is read."""
        counts = {split: sum(file.count for file in self.shards(split)) for split in ("train", "val")}
        kinds = "/".join(sorted({file.kind for file in self.shards("train")}))
        return (
            f"{len(self.shards('train'))} {kinds} files, {counts['train']:,} tokens, {self.where}; validation: "
            f"{len(self.shards('val'))} files, {counts['val']:,} tokens"
        )

    def tokens(self, split: str) -> int:
        """Return the number of tokens of a split."""
        return sum(file.count for file in self.shards(split))

    def _rows(self, shard: ForeignFile, start: int) -> Iterator[Ids | None]:
        bos = np.array([self.tokenizer.bos_id], np.int32)
        for ids in shard.documents(self.end_of_text, start, len(self.tokenizer.tokens)):
            yield Ids(np.concatenate((bos, ids))) if len(ids) else None


def token_source(path: Any, train: Any, val: Any, end_of_text: int | None, seed: int | None) -> TokenDocuments:
    """Build the source of data=tokens: a folder of ours where it holds tokens.json, else token files of others."""
    key = "data.train" if train else "data.path"
    if not (train or path):
        raise UserError("data.path is not set: data=tokens needs a folder of stage=write_tokens, or token files")
    if isinstance(train or path, str) and not train and holds_index(str(path)):
        if val is not None or end_of_text is not None:
            raise UserError(f"data.path={shown(path)} holds {INDEX}, so data.val and data.end_of_text mean nothing")
        return WrittenTokens(path, key, seed)
    return ForeignTokens(train or path, key, val, end_of_text, seed)


def holds_index(path: str) -> bool:
    """Return whether a path or address is a folder of stage=write_tokens."""
    if not is_address(path) and not Path(path).expanduser().is_dir():
        return False
    return Path(path).suffix.lower() not in SUFFIXES and TokenFolder(path, "data.path").find(INDEX) is not None


def token_files(paths: Any, key: str) -> Listed:
    """Return the token files that entries of the configuration name. Raises UserError where there are none."""
    entries, files = [paths] if isinstance(paths, str | Path) else list(paths), []
    for entry in entries:
        listed = list_files(entry, key).files
        files += [(file, name) for file, name in listed if Path(name).suffix.lower() in SUFFIXES]
    if not files:
        raise UserError(f"{key}={shown(paths)}: there is no {INDEX} and no token file ({', '.join(SUFFIXES)})")
    return Listed("files", files)


def read_index(folder: TokenFolder) -> dict | None:
    """Return the content of tokens.json of a folder, None where there is none. Raises UserError if it is damaged."""
    if (file := folder.find(INDEX)) is None:
        return None
    try:
        with file.open("rb") as opened:
            index = parse_json(opened.read(MOST_BYTES), f"{folder}/{INDEX}")
        mapping(FACTS, needs=tuple(FACTS))(index, f"{folder}/{INDEX}")
    except OSError as error:
        reason = reason_of(error, f"{folder}/{INDEX}")
        raise UserError(f"{folder}/{INDEX}: cannot be read ({reason}). Write it again: stage=write_tokens") from error
    except UserError as error:
        raise UserError(f"{error}: stage=write_tokens") from error
    return index


def write_index(folder: TokenFolder, index: dict) -> None:
    """Write tokens.json. Raises UserError if the folder holds tokens of another text or tokenizer."""
    with folder.only_one(INDEX):
        present = read_index(folder)
        if present == index:
            return
        if present is not None:
            what = "tokenizer" if present["fingerprint"] != index["fingerprint"] else "text"
            raise UserError(
                f"{folder}: {INDEX} there is of another {what}, or the text has changed. Name another folder in "
                f"{folder.key}, or delete that {INDEX}: tokens of files that are as they were are not written again"
            )
        folder.put(INDEX, lambda path: path.write_text(json.dumps(index, indent=1) + "\n"))
