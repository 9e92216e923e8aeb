"""The wheel: what it holds, and a pipeline by it from an empty folder."""

import os
import sys
import tomllib
import zipfile

import pytest
from conftest import REPO
from processes import run

wheel = pytest.importorskip("hatchling.builders.wheel", reason="needs pip install -e '.[dev]'")
FOLDERS = {"llm": "llm", "callbacks": "callbacks", "tasks": "tasks", "conf": "llm/conf"}
ENTRY = "import sys; sys.argv[0] = 'fathom-{0}'; from llm.cli.main import {0}; {0}()"


def wanted() -> set[str]:
    """Files of the repository that belong into the wheel, by their places there."""
    found = set()
    for folder, place in FOLDERS.items():
        for path in (REPO / folder).rglob("*"):
            inner = path.relative_to(REPO / folder)
            if path.is_file() and "__pycache__" not in path.parts and not (folder, inner.parts[0]) == ("conf", "local"):
                found.add(f"{place}/{inner}")
    return found


def test_the_wheel_holds_every_file_of_the_packages_and_of_conf():
    listed = {file.distribution_path for file in wheel.WheelBuilder(str(REPO)).recurse_included_files()}
    assert {"llm/conf/train.yaml", "llm/conf/experiment/tiny/sft.yaml", "llm/model/decode_cpu.cpp"} <= wanted()
    assert listed == wanted()


def test_entry_points_and_the_supported_pythons_are_declared():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {f"fathom-{name}": f"llm.cli.main:{name}" for name in ("train", "evaluate", "serve")}
    tested = [line.rpartition(" ")[2] for line in project["classifiers"] if "Python :: 3." in line]
    ci = (REPO / ".github/workflows/ci.yml").read_text()
    assert all(f'"{version}"' in ci for version in tested) and tested == ["3.11", "3.12", "3.13"]


@pytest.mark.slow
def test_a_pipeline_runs_from_the_wheel_in_an_empty_folder(tmp_path):
    """Two processes too. The user's folder has modules of the names that Fathom's packages have."""
    built = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist"), cwd=REPO)
    assert built.returncode == 0, built.stderr
    packages, here = tmp_path / "packages", tmp_path / "here"
    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))) as archive:
        archive.extractall(packages)
    (here / "conf/local").mkdir(parents=True)
    (here / "conf/local/train.yaml").write_text("log_every: 7\n")
    for name in ("tasks", "callbacks"):
        (here / f"{name}.py").write_text("raise ImportError('a module of the user')\n")
    env = {"PYTHONPATH": str(packages), "HOME": str(tmp_path)}

    def fathom(name: str, *args: str) -> str:
        done = run(sys.executable, "-P", "-c", ENTRY.format(name), *args, cwd=here, env=env)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        return done.stdout

    assert "log_every: 7" in fathom("train", "stage=pretrain", "--cfg", "job")
    assert "    fathom-serve run=demo ui=cli" in fathom("serve", "--help")
    fathom("train", "-m", "experiment=tiny", "stage=tokenizer,pretrain", "max_steps=1")
    two = ("run=two", "init_from=tiny/tokenizer", "trainer=cpu", "trainer.devices=2", "batch.tokens_per_step=1024")
    fathom("train", "experiment=tiny", "stage=pretrain", "max_steps=1", *two)
    assert "bpb" in fathom("evaluate", "run=tiny", "stage=pretrain", "eval=[bpb]", "eval.tokens=2048")
    assert fathom("serve", "run=tiny", "prompt=The fox", "max_new_tokens=2")
    assert sorted(os.listdir(here / "runs")) == ["tiny", "two"] and not (packages / "runs").exists()
