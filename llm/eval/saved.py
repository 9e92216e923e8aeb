"""The configuration of a saved run, checked before an evaluation uses any of it."""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from llm.config.saved import kind_of_schema
from llm.config.schema import root_schema
from llm.config.trust import check_plain, check_trusted
from llm.data.download import HubFolder
from llm.errors import UserError
from llm.run.formats import EVALUATED
from llm.run.stage_folder import read_manifest
from tasks import Cache
from tasks.registry import remotes


def saved_config(stage_dir: Path, cache: str | None) -> dict[str, Any]:
    """Return the parts of the configuration in run.json that an evaluation needs, checked and without interpolation.

    cache: folder of fetched data (paths.data) where the saved data is read, so that the code it names must be trusted,
    and what is to be fetched too; None where other data is read, or none. Raises UserError that names the file and the
    key.
    """
    where, config = f"{stage_dir / 'run.json'}: config", (read_manifest(stage_dir) or {}).get("config")
    if not config:
        raise UserError(f"{stage_dir / 'run.json'} has no config: the stage was not written by train.py")
    EVALUATED(config, where)
    needed = {name: config[name] for name in ("seed", "stage", "data", "trainer", "precision")}
    schema = root_schema("train").__dataclass_fields__["data"].type
    kind_of_schema(schema)(config["data"], f"{where}.data")
    for name, part in needed.items():
        check_plain(part, f"{where}.{name}")
    if cache is not None:
        check_trusted(config["data"], f"{where}.data", partial(was_fetched, cache))
    return needed


@contextlib.contextmanager
def saved_keys(stage_dir: Path) -> Iterator[None]:
    """Turn a key of the saved configuration that is missing, or has no such value, into a UserError with its file."""
    try:
        yield
    except OmegaConfBaseException as error:
        key, reason = error.full_key or error.key, str(error).splitlines()[0]
        reason = "is missing" if isinstance(error, ConfigAttributeError | ConfigKeyError) else f"is wrong ({reason})"
        raise UserError(
            f"{stage_dir / 'run.json'}: config: {key} {reason}; restore the file, or give other data (data=...)"
        ) from error


def was_fetched(cache: str, group: Mapping[str, Any]) -> bool:
    """Return whether all that a task or a source of text takes from the network was fetched into `cache` before.

    Of a data set of text its list of files is enough: a command has named it then.
    """
    with contextlib.suppress(ValueError, TypeError, OSError):  # wrong values: said where they are used
        if "type" in group:
            needed = remotes("task", group, Cache(cache))
            return bool(needed) and all(remote.is_here() for remote in needed)
        if group.get("repo") is not None and all(group.get(key) is None for key in ("path", "train", "val")):
            return (HubFolder(group["repo"], group.get("revision") or "main", cache, 1).root / "files.json").is_file()
    return False
