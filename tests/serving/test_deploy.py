"""Files of deploy/: they name settings, files and packages that exist."""

import re
import shlex

import pytest
import yaml
from processes import REPO

from llm.cli.overrides import check_overrides
from llm.model import native

DEPLOY = REPO / "deploy"


def test_the_settings_of_every_file_exist():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["fathom"]
    unit = re.search(r"^ExecStart=\S+ serve\.py (.*)$", (DEPLOY / "fathom.service").read_text(), re.MULTILINE)[1]
    image = " ".join(re.findall(r'"([\w.]+=[\w.]+)"', (DEPLOY / "Dockerfile").read_text()))
    for settings in (compose["command"], shlex.split(unit), image.split()):
        assert settings
        check_overrides("serve", [re.sub(r"\$\{RUN:-(\w+)\}", r"\1", one) for one in settings])


def test_the_image_is_built_from_files_that_exist():
    text = (DEPLOY / "Dockerfile").read_text()
    sources = [name for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for name in line.split()[:-1]]
    assert len(sources) > 8 and all((REPO / name).exists() for name in sources)
    allowed = (REPO / ".dockerignore").read_text()
    assert all(f"!{name}" in allowed or name.endswith(".py") for name in sources)
    project = (REPO / "pyproject.toml").read_text()
    for extra in re.search(r"ARG EXTRAS=(\S+)", text)[1].split(","):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE)


def test_answers_have_longer_to_end_than_the_server_gives_them():
    drain = yaml.safe_load((REPO / "conf" / "serve.yaml").read_text())["api"]["drain"]
    unit = int(re.search(r"TimeoutStopSec=(\d+)", (DEPLOY / "fathom.service").read_text())[1])
    grace = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["fathom"]["stop_grace_period"]
    assert drain < unit and drain < int(grace.removesuffix("s"))


@pytest.mark.parametrize("key", ["KillMode=mixed", "EnvironmentFile=-/etc/fathom.env"])
def test_the_unit_ends_the_server_before_its_workers_and_keeps_the_key_in_a_file(key):
    assert key in (DEPLOY / "fathom.service").read_text()


def test_the_units_kernels_are_kept_where_it_may_write(monkeypatch):
    text = (DEPLOY / "fathom.service").read_text()
    cache = "/var/cache/" + re.search(r"^CacheDirectory=(\S+)$", text, re.MULTILINE)[1]
    for setting in re.search(r"^Environment=(.*)$", text, re.MULTILINE)[1].split():
        monkeypatch.setenv(*setting.split("=", 1))
    assert str(native.folder()).startswith(f"{cache}/")
