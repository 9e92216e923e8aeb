"""Weighted mixture of text sources in one stream, each with a share of the characters."""

from collections.abc import Iterator, Mapping

from llm.data.documents import Cursor, FileDocuments, share


class MixedDocuments:
    """Documents of several sources, in an order that their lengths and weights alone decide.

    The next document comes from the source that has given the fewest characters for its weight; the first named one
    wins a tie. So all ranks see one global order, and the cursor holds the position and the characters of each source.
    In training every source starts over when it ends; in a single pass the others go on without it.
    """

    def __init__(self, sources: Mapping[str, tuple[FileDocuments, float]]) -> None:
        self.sources = {name: source for name, (source, _) in sources.items()}
        total = sum(weight for _, weight in sources.values())
        self.weights = {name: weight / total for name, (_, weight) in sources.items()}

    @property
    def skipped(self) -> dict[str, int]:
        """Bad rows that were left out, by file."""
        return {name: count for source in self.sources.values() for name, count in source.skipped.items()}

    @property
    def left_out(self) -> dict[str, int]:
        """Near-duplicates that training leaves out, by file."""
        return {name: count for source in self.sources.values() for name, count in source.left_out.items()}

    @property
    def near_duplicates(self):
        """The llm.data.near_duplicates.NearDuplicates that the sources share, or None."""
        return next(iter(self.sources.values())).near_duplicates

    def check(self) -> str:
        """Check every source; return one line per source with its share. Raises UserError for the first mistake."""
        lines = [f"{self.weights[name]:.1%} {name}: {source.check()}" for name, source in self.sources.items()]
        return "a mixture of\n  " + "\n  ".join(lines)

    def iterate(
        self, split: str, cursor: Cursor | None = None, rank: int = 0, world: int = 1, loop: bool = True
    ) -> Iterator[tuple[str, Cursor]]:
        """Yield this rank's documents from `cursor` on, each with the cursor behind it."""
        return share(self._in_order(split, cursor, loop), cursor, rank, world)

    def _in_order(self, split: str, cursor: Cursor | None, loop: bool) -> Iterator[tuple[str, Cursor]]:
        state = cursor or {"index": 0, "chars": dict.fromkeys(self.sources, 0), "sources": {}}
        index, chars, positions = state["index"], dict(state["chars"]), dict(state["sources"])
        streams = {name: source.in_order(split, positions.get(name), loop) for name, source in self.sources.items()}
        while streams:
            name = min(streams, key=lambda name: chars[name] / self.weights[name])
            document = next(streams[name], None)
            if document is None:
                del streams[name]
                continue
            text, positions[name] = document
            chars[name] += len(text)
            index += 1
            yield text, {"index": index, "chars": dict(chars), "sources": dict(positions)}
