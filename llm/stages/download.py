"""Fetch what `data` takes from the hub and the web: stage=download. Others may train on it meanwhile."""

from llm.data.hub_documents import HubDocuments
from llm.data.sources import build_source, is_remote
from llm.data.text_mixture import MixedDocuments
from llm.errors import UserError
from llm.stages.common import task_cache
from llm.utils.format import in_bytes
from tasks.base import Task
from tasks.hub import HubRows
from tasks.registry import all_specs, build_task, fetched_tasks, place, remotes


def run(cfg) -> None:
    """Fetch the text and the tasks of `cfg.data` that come over the network; with dry_run say which these are."""
    text, tasks = texts_of_hub(cfg), fetched_tasks(cfg.data)
    if not text and not tasks:
        raise UserError(
            f"stage=download: data={cfg.data.name} names nothing on the hub; choose data=fineweb_edu, for one"
        )
    for part in text:
        if not part.is_stored:
            print(f"{part.where}: read over the network while training, nothing to fetch", flush=True)
            continue
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
    for name, splits in tasks.items():
        spec, cache = all_specs(cfg.data)[name], task_cache(cfg)
        if cfg.dry_run:
            for remote in remotes(name, spec, cache):
                print(f"{remote} " + (f"is in {remote.root}" if remote.is_here() else "is to be fetched"), flush=True)
            continue
        parts = {split: build_task(name, spec, split, cache, cfg.data.bad_rows) for split in splits}
        for task in parts.values():
            check_rows(task)
        rows = [f"{len(task):,} {split}" for split, task in parts.items()]
        print(f"{place(name, spec)}: {', '.join(rows)}", flush=True)


def check_rows(task: Task) -> None:
    """Look at every row of a data set of the hub: here is the time for it, a stage looks at the first ones only."""
    if isinstance(task.rows, HubRows):
        for index in task.indices:
            task.rows[index]


def texts_of_hub(cfg) -> list[HubDocuments]:
    """Return the sources of text that are data sets of the hub."""
    if not is_remote(cfg.data):
        return []
    source = build_source(cfg.data, cfg.paths.data)
    parts = source.sources.values() if isinstance(source, MixedDocuments) else [source]
    return [part for part in parts if isinstance(part, HubDocuments)]
