"""The generated reference: each key of each command with its meaning, default and bounds, and the public API."""

import importlib.util
from pathlib import Path

import pytest

import llm
from llm.cli.help import PURPOSE
from llm.config.schema import known_keys

FILE = Path(__file__).resolve().parents[1] / "docs/reference.py"


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("reference", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def written(reference, tmp_path_factory):
    return {page.stem: page.read_text() for page in reference.write(tmp_path_factory.mktemp("reference"))}


@pytest.mark.parametrize("name", PURPOSE)
def test_every_key_has_its_line(reference, written, name):
    keys = {key: spec for key, spec in known_keys(name).items() if reference.is_leaf(spec)}
    missing = [key for key, spec in keys.items() if f"| `{key}` |" not in written[name]]
    assert keys and not missing
    assert all(reference.prose(spec.metadata["help"]) in written[name] for spec in keys.values())


def test_a_line_has_type_default_meaning_and_bounds(written):
    assert (
        "| `model.seq_len` | int | `2048` | context length in tokens | at least 8, at most 4,194,304 |"
        in written["train"]
    )
    assert "| `attention` | str | `auto` |" in written["train"]
    sft, pretrain = (
        written["train"].partition(f"## `stage={name}`")[2].partition("\n## ")[0] for name in ("sft", "pretrain")
    )
    assert "| `stage.lr_frac` | float | `0.02` |" in sft and "| `stage.lr_frac` | float | `1.0` |" in pretrain


def test_the_public_names_have_their_docstrings(written):
    page = written["python_api"]
    assert [name for name in llm.__all__ if f"## `llm.{name}`" not in page] == []
    assert llm.load.__doc__.strip().partition("\n")[0] in page and "### `Model.chat`" in page
