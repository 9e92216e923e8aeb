"""Rows of a data set on the Hugging Face hub, read by the library datasets: memory-mapped, never held as objects.

    <paths.data>/tasks/<owner>--<name>/<revision>/<subset>/   Arrow files of all splits   fathom.json: commit, rows

The folder is made once, under a lock that all processes of a machine share, and is whole when it has its fathom.json.
Later starts need no network. The files as the hub has them stay in the library's own cache (HF_HUB_CACHE).
"""

import contextlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from llm.data.download import HubRepo, first_line, hub_folder, patiently
from llm.errors import UserError
from llm.utils.files import read_json, sync, write_json
from llm.utils.shapes import mapping, whole
from tasks.rows import RowCheck

CHECKED = 1000  # rows that are checked before anything runs; the others are when they are read
FACTS = "fathom.json"


@dataclass(frozen=True)
class Cache:
    """Folder of fetched data (paths.data), and whether data that is missing may be fetched: not in a dry run."""

    folder: str | Path
    may_fetch: bool = True


class HubTask(HubRepo):
    """The data set that a task's `repo`, `subset` and `revision` name; `key` is the task's place in the config."""

    def __init__(self, repo: str, subset: str | None, revision: str | None, key: str, cache: Cache) -> None:
        revision = revision or "main"
        root = hub_folder(Path(cache.folder) / "tasks", repo, revision) / (subset or "default").replace("/", "--")
        super().__init__(repo, revision, key, root)
        self.subset, self.may_fetch = subset, cache.may_fetch

    def __str__(self) -> str:
        return super().__str__() + (f" subset {self.subset}" if self.subset else "")

    def is_here(self) -> bool:
        """Return whether the data set was fetched, and completely."""
        return (self.root / FACTS).is_file()

    def splits(self) -> dict[str, int]:
        """Return the number of rows of every split, after fetching them if they are not here."""
        if not self.is_here():
            if not self.may_fetch:
                raise UserError(
                    f"{self}: it is not in {self.root}, and dry_run=true fetches nothing: run stage=download first"
                )
            with self.lock("rows") as part:
                if not self.is_here():
                    self._fetch(part)
        facts = read_json(self.root / FACTS)
        mapping({"rows": mapping(others=whole())}, needs=("rows",))(facts, str(self.root / FACTS))
        return facts["rows"]

    def load(self, split: str, which: str):
        """Return the rows of `split`, a split, a slice of it (`train[:10%]`) or a sum, as a `datasets.Dataset`.

        which: the task's key that holds `split`, "train" or "test".
        """
        from datasets import concatenate_datasets, load_from_disk

        wanted = self._parts(split, which)
        parts = [load_from_disk(str(self.root / part.splitname)).select(range(part.from_, part.to)) for part in wanted]
        return parts[0] if len(parts) == 1 else concatenate_datasets(parts)

    def overlap(self, train: str, test: str) -> bool:
        """Return whether the rows of two splits overlap; a `test` that does not exist is told when it is read."""
        trained = self._parts(train, "train")
        try:
            held_out = self._parts(test, "test")
        except UserError:
            return False
        return any(a.splitname == b.splitname and a.from_ < b.to and b.from_ < a.to for a in trained for b in held_out)

    def _parts(self, split: str, which: str) -> list:
        """Return the rows that `split` names as parts of splits, from a row to another."""
        from datasets import ReadInstruction

        rows = self.splits()
        try:
            return ReadInstruction.from_spec(split).to_absolute(rows)
        except (ValueError, AssertionError):
            some = next(iter(rows))
            raise UserError(
                f"{self.key}.{which}={split}: {self.repo} has no such rows. Its splits: {', '.join(rows)}; a part of "
                f"one is written {some}[:1000] or {some}[-10%:]"
            ) from None

    def _fetch(self, part: Path) -> None:
        """Have the library read all splits of the subset, and keep them as Arrow files."""
        from huggingface_hub import HfApi

        commit = patiently(lambda: HfApi().dataset_info(self.repo, revision=self.revision).sha, self)
        print(f"{self}: fetching it into {self.root}", flush=True)
        work, done = part.with_name("work"), part.with_name("done")
        for folder in (work, done):  # of a process that was killed
            shutil.rmtree(folder, ignore_errors=True)
        with quiet_bars():
            splits = patiently(lambda: self._read(commit, work), self)
            rows = {name: len(split) for name, split in splits.items()}
            try:
                splits.save_to_disk(done)
                for name in rows:
                    for file in (done / name).iterdir():
                        sync(file)
                    shutil.rmtree(self.root / name, ignore_errors=True)
                    (done / name).replace(self.root / name)
            except OSError as error:
                raise UserError(self.unwritable(error)) from error
        for folder in (work, done):
            shutil.rmtree(folder, ignore_errors=True)
        write_json(self.root / FACTS, {"repo": self.repo, "subset": self.subset, "commit": commit, "rows": rows})
        print(f"{self}: " + ", ".join(f"{count:,} rows {name}" for name, count in rows.items()), flush=True)

    def _read(self, commit: str, work: Path):
        """Read all splits of a commit as a `datasets.DatasetDict` in `work`; UserError for faults that stay."""
        import datasets
        import pyarrow as pa
        from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError, DatasetsError

        try:
            # The prefix: a folder of that name below the present one is not meant.
            path = f"hf://datasets/{self.repo}"
            builder = datasets.load_dataset_builder(path, self.subset, revision=commit, cache_dir=str(work))
            builder.download_and_prepare()
            return builder.as_dataset()
        except (DatasetGenerationError, pa.ArrowException) as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            problem = first_line(error.__cause__ or error)
            raise UserError(f"{self}: its files cannot be read as rows ({problem})") from error
        except DatasetNotFoundError as error:
            raise UserError(
                f"{self}: {first_line(error)} Correct {self.key}.repo, or accept its terms on its page and set HF_TOKEN"
            ) from error
        except DatasetsError as error:
            raise UserError(f"{self}: {first_line(error)}") from error
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            raise UserError(
                f"{self}: it is made by a program, which is not run. Try {self.key}.revision=refs/convert/parquet, "
                "where the hub keeps the rows of many such data sets"
            ) from error
        except ValueError as error:
            if type(error) is not ValueError or "onfig" not in str(error):
                raise
            lines = " ".join(str(error).split("Example of usage")[0].split())
            raise UserError(f"{self.key}.subset={self.subset}: {self.repo}: {lines}") from error


@contextlib.contextmanager
def quiet_bars() -> Iterator[None]:
    """Turn off the progress bars of the library datasets, which are for terminals, elsewhere."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    if not sys.stdout.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


class HubRows(Sequence):
    """The rows of a split in the order of `shuffle_seed` (None: as published), each checked when it is read.

    The order is that of `datasets.Dataset.shuffle(seed)`. The first `CHECKED` rows, of the first `limit`, are checked
    here; all, where `check` may leave rows out. skipped: number of rows left out, by reason; bad and problems: those of
    `check`.
    """

    def __init__(
        self,
        source: HubTask,
        split: str,
        which: str,
        check: RowCheck,
        shuffle_seed: int | None = None,
        limit: int | None = None,
    ) -> None:
        self._rows = source.load(split, which)
        if not len(self._rows):
            raise UserError(f"{source.key}.{which}={split}: {source} has no rows there")
        self._where, self._check = f"{source.repo} {split}", check
        size = len(self._rows)
        order = np.arange(size) if shuffle_seed is None else np.random.default_rng(shuffle_seed).permutation(size)
        count = size if check.may_skip else min(size, CHECKED)
        kept = []
        for i in range(count):
            if limit is not None and len(kept) >= limit:
                break
            number = int(order[i])
            if check.accepts(partial(self._read, number), self._where, number + 1):
                kept.append(i)
        check.finish(len(kept))
        self._order = order[kept] if check.may_skip else order
        self.skipped, self.bad, self.problems = dict(check.skipped), check.bad, check.problems

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict:
        return self._read(int(self._order[index]))

    def _read(self, number: int) -> dict:
        row = self._rows[number]
        if list(row) == ["train"] and isinstance(row["train"], dict):  # MMLU's auxiliary rows in one of its subsets
            row = row["train"]
        return self._check.read_and_check(row, self._check.where(self._where, number + 1))
