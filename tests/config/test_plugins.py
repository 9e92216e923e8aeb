"""Plugins: modules that are imported before the configuration is composed."""

import sys

import pytest

from llm.config.plugins import load_plugins, plugins_in
from llm.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder on the path; modules that come from it are forgotten after the test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_an_installed_package_names_its_plugin_by_an_entry_point(folder):
    """The folder is as pip leaves it: the module, and beside it the package's metadata."""
    (folder / "deep_plugin.py").write_text("LOADED = True\n")
    info = folder / "deep_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: deep-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fathom.plugins]\ndeep = deep_plugin\n")
    load_plugins([])
    assert sys.modules["deep_plugin"].LOADED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_this_name\n", r"plugins=\[own\]: no module 'nothing_of_this_name'; install that"),
        ("1 / 0\n", r"plugins=\[own\]: importing it failed \(ZeroDivisionError: division by zero\)"),
    ],
)
def test_a_plugin_that_fails_is_named(folder, text, message):
    (folder / "own.py").write_text(text)
    with pytest.raises(UserError, match=message):
        load_plugins(["own"])


def test_a_plugin_that_does_not_exist_says_where_it_is_looked_for():
    with pytest.raises(UserError, match=r"plugins=\[absent\]: no module 'absent'; put its folder on PYTHONPATH"):
        load_plugins(["absent"])


@pytest.mark.parametrize(
    ("argv", "names"),
    [(["plugins=[one, two.three]"], ["one", "two.three"]), (["plugins=[]"], []), (["seed=1"], [])],
)
def test_the_command_line_names_plugins(argv, names):
    assert plugins_in(argv) == names
