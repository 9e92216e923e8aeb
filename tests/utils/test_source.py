"""Fathom in its source tree and from a wheel: where its files lie, and what its messages tell a user to type."""

from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from conftest import REPO

from llm.errors import UserError
from llm.utils import source

REQUIRES = ["torch>=2.9", "gradio<7,>=6; extra == 'serve'", "uvicorn>=0.30; extra == 'serve'", "h5py; extra == 'hdf5'"]


@pytest.fixture
def from_wheel(tmp_path, monkeypatch):
    """The folder of packages into which a wheel was installed, and an empty folder to work in."""
    packages = tmp_path / "site-packages"
    (packages / "llm/conf").mkdir(parents=True)
    (packages / "llm/conf/train.yaml").touch()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(source, "PACKAGE", packages / "llm")
    monkeypatch.setattr(source.sys, "argv", ["/home/me/.local/bin/fathom-train"])
    monkeypatch.setattr(source.metadata, "requires", lambda name: REQUIRES)
    source.pip_install.cache_clear()
    yield packages
    source.pip_install.cache_clear()


def test_the_configuration_and_defaults_of_a_user_are_found_in_both(from_wheel, tmp_path, monkeypatch):
    here = tmp_path / "work"
    assert source.conf_folder() == from_wheel / "llm/conf" and source.local_folders() == []
    (here / "conf/local").mkdir(parents=True)
    mine = [here / "conf", here / "conf/local"]
    assert source.local_folders() == mine
    tree = tmp_path / "checkout"
    for folder in ("llm", "conf/local"):
        (tree / folder).mkdir(parents=True)
    (tree / "conf/train.yaml").touch()
    monkeypatch.setattr(source, "PACKAGE", tree / "llm")
    assert source.conf_folder() == tree / "conf"
    assert source.local_folders() == [*mine, tree / "conf", tree / "conf/local"]  # an editable install has both
    monkeypatch.chdir(tree)
    assert source.local_folders() == [tree / "conf", tree / "conf/local"]


def test_started_processes_find_the_source_tree_and_what_the_user_set(from_wheel, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert source.python_path() == {}  # site-packages would come before the standard library
    monkeypatch.setattr(source, "PACKAGE", REPO / "llm")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    assert source.python_path() == {"PYTHONPATH": f"{REPO}:/mine"}


def test_messages_name_the_command_and_the_packages_that_are_there(from_wheel, monkeypatch):
    assert source.command("serve") == "fathom-serve"
    assert source.pip_install("serve") == "pip install 'gradio<7,>=6' 'uvicorn>=0.30'"
    monkeypatch.setattr(source, "PACKAGE", REPO / "llm")
    source.pip_install.cache_clear()
    assert source.command("serve") == "fathom-serve"  # of an editable install, in any folder
    monkeypatch.setattr(source.sys, "argv", ["train.py"])
    assert source.command("serve") == "python serve.py"
    assert source.pip_install("serve") == "pip install -e '.[serve]'"


def test_a_foreign_package_of_a_generic_name_is_one_line(monkeypatch):
    source.check_packages()
    foreign = ModuleSpec("tasks", None, origin="/mine/tasks/__init__.py")
    known = source.find_spec
    monkeypatch.setattr(source, "find_spec", lambda name: foreign if name == "tasks" else known(name))
    with pytest.raises(UserError, match="^/mine/tasks/__init__.py is imported in place of Fathom's package 'tasks'"):
        source.check_packages()
    monkeypatch.setattr(source, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="^nothing named callbacks is imported"):
        source.check_packages()


def test_the_tree_is_this_one():
    assert source.source_tree() == REPO and Path(source.conf_folder()) == REPO / "conf"
