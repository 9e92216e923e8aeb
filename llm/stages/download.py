"""stage=download: fetch the text that `data` names on the hub before, or while, something is trained on it."""

from llm.data.documents import build_source
from llm.data.hub import HubDocuments
from llm.data.mixture import MixedDocuments
from llm.errors import UserError
from llm.format import in_bytes


def run(cfg) -> None:
    """Fetch every shard of the sources of `cfg.data` that are on the hub; with dry_run say how much that is."""
    source = build_source(cfg.data, cfg.paths.data)
    parts = source.sources.values() if isinstance(source, MixedDocuments) else [source]
    from_hub = [part for part in parts if isinstance(part, HubDocuments)]
    if not from_hub:
        raise UserError(
            f"stage=download: data={cfg.data.name} names nothing on the hub; choose data=fineweb_edu, for one"
        )
    for part in from_hub:
        missing = [file for file in part.remote if not part.folder.is_here(file)]
        size = in_bytes(sum(file.size for file in missing))
        print(
            f"{part.where}: {len(part.remote) - len(missing)} of {len(part.remote)} shards are in {part.folder.root}, "
            f"{size} are to be fetched",
            flush=True,
        )
        if not cfg.dry_run:
            part.folder.fetch_all(part.remote)
            print(f"text: {part.check()}", flush=True)
