"""Finds Fathom's own files, in its source tree or in a wheel, and writes commands in messages accordingly."""

import os
import re
import sys
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from llm.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]


def source_tree() -> Path | None:
    """Return the folder that holds llm/ and conf/; None where Fathom was installed from a wheel."""
    return PACKAGE.parent if (PACKAGE.parent / "conf/train.yaml").is_file() else None


def conf_folder() -> Path:
    """Return the folder of the configuration: conf/ of the source tree, in a wheel llm/conf/."""
    return (source_tree() or PACKAGE) / "conf"


def local_folders() -> list[Path]:
    """Return the folders with a user's own options: conf/local/ here and that of the source tree, where they exist.

    Each comes after the conf/ that it lies in, from which its files of defaults are read as local/<name>.yaml.
    """
    places = dict.fromkeys([Path.cwd() / "conf", conf_folder()])
    return [folder for place in places if (place / "local").is_dir() for folder in (place, place / "local")]


def python_path() -> dict[str, str]:
    """Return PYTHONPATH for a Python that this process starts: the source tree before what is set. {} for neither."""
    paths = [*filter(None, [source_tree(), os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(map(str, paths))} if paths else {}


def check_packages() -> None:
    """Raise UserError where another package `callbacks` or `tasks` comes before Fathom's on Python's path."""
    for name in ("callbacks", "tasks"):
        found = getattr(find_spec(name), "origin", None) or f"nothing named {name}"
        if Path(found).resolve() != PACKAGE.parent / name / "__init__.py":
            raise UserError(
                f"{found} is imported in place of Fathom's package {name!r}: take its folder off PYTHONPATH, or "
                "install Fathom into an environment of its own"
            )


def command(name: str) -> str:
    """Return how a user calls the entry point `name`: `python train.py`, or `fathom-train` where that is installed."""
    if name == "export":
        return "python -m llm.export"
    by_name = Path(sys.argv[0]).name.startswith("fathom-")
    return f"fathom-{name}" if by_name or source_tree() is None else f"python {name}.py"


def program(name: str) -> list[str]:
    """Return the words that start the entry point `name` (train, evaluate, serve, export) in a process of its own.

    `export` is a module: its process finds it by `python_path`.
    """
    if name == "export":
        return [sys.executable, "-m", "llm.export"]
    tree = source_tree()
    script = tree / f"{name}.py" if tree else Path(sys.executable).with_name(f"fathom-{name}")
    return [sys.executable, str(script)]


@cache
def pip_install(extra: str) -> str:
    """Return the command that installs the packages of an optional part: an extra of pyproject.toml.

    Outside the source tree it names the packages: the package index has another project of Fathom's name.
    """
    if source_tree() is not None:
        return f"pip install -e '.[{extra}]'"
    lines = [line for line in metadata.requires("fathom") or () if re.search(rf"extra == ['\"]{extra}['\"]", line)]
    return "pip install " + " ".join(f"'{line.partition(';')[0].strip()}'" for line in lines)
