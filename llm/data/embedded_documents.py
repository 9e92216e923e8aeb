"""Text of the generated world as a source of documents."""

from collections.abc import Iterator

from llm.data.documents import Cursor, walk
from llm.errors import UserError


class EmbeddedDocuments:
    """Documents of the generated world of llm.data.embedded: `size` to train on and `val_size` to validate."""

    def __init__(self, size: int, seed: int = 42, val_size: int | None = None) -> None:
        val_size = max(1, size // 20) if val_size is None else val_size
        if size < 1 or val_size < 1:
            raise UserError(f"data.size={size}, data.val_size={val_size}: both must be at least 1")
        self.seed, self._sizes = seed, {"train": size, "val": val_size}

    def shards(self, split: str) -> list[str]:
        """Return the one shard of a split, its name. Raises ValueError for an unknown split."""
        if split not in self._sizes:
            raise ValueError(f"split={split!r}: must be one of {list(self._sizes)}")
        return [split]

    def iterate(
        self, split: str, cursor: Cursor | None = None, rank: int = 0, world: int = 1, loop: bool = True
    ) -> Iterator[tuple[str, Cursor]]:
        """Yield this rank's documents from `cursor` on, each with the cursor behind it."""
        return walk(self.shards(split), self._rows, cursor, rank, world, loop, "data=embedded")

    def __len__(self) -> int:
        return self._sizes["train"]

    def check(self) -> str:
        """Return one line on what is read and held out."""
        return (
            f"{self._sizes['train']:,} generated documents, seed {self.seed}; validation: {self._sizes['val']:,} others"
        )

    def _rows(self, split: str, start: int) -> Iterator[str]:
        from llm.data.embedded import documents

        return documents({"train": "train", "val": "test"}[split], self._sizes[split], self.seed, start)
