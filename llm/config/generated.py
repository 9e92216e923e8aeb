"""Options of configuration groups that are made by a loop and not written as files: model=d1 .. d64.

A file of the same name in `conf/model/`, or in the folder given by --config-dir, takes the place of a generated option.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

DEPTHS = range(1, 65)
# Group -> option -> what its file would hold. `_base` is conf/model/_base.yaml.
GENERATED: dict[str, dict[str, dict[str, Any]]] = {
    "model": {f"d{depth}": {"defaults": ["_base", "_self_"], "depth": depth} for depth in DEPTHS},
}


def register_generated(store: Any, folders: Iterable[Path]) -> None:
    """Put the options into Hydra's ConfigStore `store`, without those that are files in one of `folders`.

    Hydra takes a stored option for the schema of a file with its name, and refuses the file. What is there is not
    stored again: all of it takes 12 ms.
    """
    for group, options in GENERATED.items():
        files = {file.name for folder in folders for file in (folder / group).glob("*.yaml")}
        for name, content in options.items():
            if f"{name}.yaml" in files:
                store.repo.get(group, {}).pop(f"{name}.yaml", None)
            elif f"{name}.yaml" not in store.repo.get(group, {}):
                store.store(group=group, name=name, node=content, provider="fathom")
