"""save_mirror: copies of a run at an address, and a start from them on a machine that has none of its files."""

import os
import shutil
import signal
from pathlib import Path

import fsspec
import pytest
from conftest import REPO, run_cli
from holding import FOLDER, TESTS, held, hold_at
from processes import start_warm, wait_until

from llm.errors import UserError
from llm.run.mirror import Mirror, fetch, fetch_named, mirrored, read_list
from llm.run.stage_folder import RunDir


@pytest.fixture
def run(tmp_path):
    """A run `one` whose stage `pretrain` has two checkpoints."""
    run = RunDir(tmp_path / "runs", "one")
    write(run, "run.json", "{}")
    write(run, "metrics.csv", "step\n2\n")
    for step in (2, 4):
        save(run, step)
    return run


@pytest.fixture
def address():
    """An address in the memory of this process, empty before and after."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield "memory://bucket/runs"
    store.store.clear()


def write(run: RunDir, name: str, text: str) -> None:
    path = run.path / "pretrain" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def save(run: RunDir, step: int) -> None:
    """Write a checkpoint and the manifest, keeping two."""
    write(run, f"checkpoints/step_{step:06d}.ckpt", f"weights {step}")
    (run.path / f"pretrain/checkpoints/step_{step - 4:06d}.ckpt").unlink(missing_ok=True)
    write(run, "checkpoints/manifest.json", f"steps up to {step}")


def at(address: str) -> list[str]:
    """Files of the stage at the address."""
    root = "/bucket/runs/one/pretrain/"
    return sorted(path.removeprefix(root) for path in fsspec.filesystem("memory").find(root))


def mirror_of(run: RunDir, address: str) -> Mirror:
    return Mirror(f"{address}/one/pretrain", run.path / "pretrain")


FILES = ["checkpoints/manifest.json", "checkpoints/step_000002.ckpt", "checkpoints/step_000004.ckpt", "metrics.csv"]
FILES += ["mirror.json", "run.json"]


def test_a_stage_comes_back_from_its_copy(run, address):
    write(run, ".lock", "not a file of the run")
    mirror_of(run, address).copy()
    assert at(address) == FILES
    state = os.stat(run.path / "pretrain/run.json")
    shutil.rmtree(run.path)
    fetch(address, run)
    assert (run.path / "pretrain/checkpoints/step_000004.ckpt").read_text() == "weights 4"
    assert os.stat(run.path / "pretrain/run.json").st_mtime_ns == state.st_mtime_ns
    assert sorted(path.name for path in run.path.iterdir()) == ["pretrain"]


def test_linked_folders_are_copied_and_one_that_leads_back_ends(run, address, parent, tmp_path):
    """Checkpoints lie on another disk, two names lead to one folder, and so does the whole parent."""
    stage, disk = run.path / "pretrain", tmp_path / "disk"
    disk.mkdir()
    (stage / "checkpoints").rename(disk / "checkpoints")
    parent.rename(disk / "parent")
    for link, target in {
        stage / "checkpoints": disk / "checkpoints",
        stage / "copy": disk / "checkpoints",
        disk / "checkpoints/back": stage,
        parent: disk / "parent",
    }.items():
        link.symlink_to(target)
    with mirrored(address, run, "pretrain", [parent / "model"]):
        pass
    copies = [name.replace("checkpoints", "copy") for name in FILES if "/" in name]
    assert at(address) == sorted(FILES + copies)
    assert len(read_list(fsspec.filesystem("memory"), "/bucket/runs/base/pretrain")) == 2
    shutil.rmtree(run.path)
    fetch(address, run)
    assert (run.path / "pretrain/checkpoints/step_000004.ckpt").read_text() == "weights 4"


def test_files_that_are_there_already_are_not_mixed_with_those_of_the_copy(run, address):
    mirror_of(run, address).copy()
    (run.path / "pretrain/run.json").unlink()
    with pytest.raises(UserError, match="save_mirror=memory://bucket/runs: cannot be read"):
        fetch(address, run)
    assert not (run.path / "pretrain/run.json").exists() and len(list(run.path.iterdir())) == 1


def test_only_what_changed_is_copied_and_what_is_gone_is_removed(run, address, monkeypatch):
    mirror_of(run, address).copy()
    save(run, 6)
    mirror, sent = mirror_of(run, address), []  # as after a new start: it knows from mirror.json what is there
    put = mirror.store.put_file
    monkeypatch.setattr(
        mirror.store, "put_file", lambda source, target: (sent.append(Path(source).name), put(source, target))
    )
    mirror.copy()
    assert sent == ["step_000006.ckpt", "manifest.json"]
    assert at(address) == sorted(name.replace("000002", "000006") for name in FILES)


@pytest.fixture
def parent(run):
    """A finished stage `pretrain` of the run `base`, with its checkpoint."""
    folder = Path(run.root) / "base" / "pretrain"
    for name in ("run.json", "model/model.safetensors", "checkpoints/step_000002.ckpt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def test_the_parent_in_another_run_is_copied_without_checkpoints_and_fetched(run, address, parent, tmp_path):
    with mirrored(address, run, "pretrain", [parent / "model"]):
        pass
    store = fsspec.filesystem("memory")
    found = {path.removeprefix("/bucket/runs/base/pretrain/") for path in store.find("/bucket/runs/base")}
    assert found == {"run.json", "model/model.safetensors", "mirror.json"} and at(address) == FILES
    for value in ("base/pretrain", "base", str(tmp_path / "new/base/pretrain/model")):
        fetch_named(address, tmp_path / "new", value)
        assert (tmp_path / "new/base/pretrain/model/model.safetensors").is_file()
        shutil.rmtree(tmp_path / "new")


def test_what_is_no_parent_of_the_mirror_is_not_looked_for(address, tmp_path):
    for value in ("elsewhere", "/some/folder/model", "../other/model", "nanochat:d20", "."):
        fetch_named(address, tmp_path, value)
    assert not list(tmp_path.iterdir())


def test_copying_a_parent_leaves_the_checkpoints_of_its_own_mirror(run, address, parent):
    whole = Mirror(f"{address}/base/pretrain", parent)
    whole.copy()
    (parent / "run.json").write_text('{"seconds": 1}')
    with mirrored(address, run, "pretrain", [parent / "model"]):
        pass
    store = fsspec.filesystem("memory")
    assert store.exists("/bucket/runs/base/pretrain/checkpoints/step_000002.ckpt")
    assert store.cat_file("/bucket/runs/base/pretrain/run.json") == b'{"seconds": 1}'
    assert len(read_list(store, "/bucket/runs/base/pretrain")) == 3


def test_a_parent_outside_of_all_runs_is_said(run, address, tmp_path, capsys):
    with mirrored(address, run, "pretrain", [tmp_path / "elsewhere" / "model"]):
        pass
    assert f"mirror: {tmp_path}/elsewhere/model is no stage of a run in" in capsys.readouterr().err
    assert at(address) == FILES


def test_a_folder_that_was_deleted_does_not_empty_its_copy(run, address):
    mirror = mirror_of(run, address)
    mirror.copy()
    shutil.rmtree(run.path)
    mirror.copy()
    assert at(address) == FILES


def test_failures_are_said_and_counted_and_end_nothing(run, address, monkeypatch, capsys):
    mirror = mirror_of(run, address)

    def refuse(source, target):
        raise PermissionError("Access Denied")

    with monkeypatch.context() as patch:
        patch.setattr(mirror.store, "put_file", refuse)
        assert not mirror.try_copy() and not mirror.try_copy()
    assert "failed (Access Denied), for the 2. time" in capsys.readouterr().err
    assert mirror.try_copy() and at(address) == FILES


def test_the_last_copy_is_awaited_and_said_if_it_is_missing(run, address, monkeypatch, capsys):
    with mirrored(address, run, "pretrain"):
        write(run, "model/config.json", "{}")
    assert "model/config.json" in at(address) and capsys.readouterr().err == ""
    monkeypatch.setattr(Mirror, "copy", lambda self: 1 / 0)
    with mirrored(address, run, "pretrain"):
        pass
    assert "lacks the newest files" in capsys.readouterr().err
    with mirrored(None, run, "pretrain"):
        pass


def test_a_complete_checkpoint_is_copied_while_the_training_goes_on(run, address, monkeypatch):
    monkeypatch.setattr("llm.run.mirror.LOOK_SECONDS", 0.01)
    with mirrored(address, run, "pretrain"):
        wait_until(lambda: "checkpoints/step_000004.ckpt" in at(address))
        save(run, 6)
        wait_until(lambda: "checkpoints/step_000006.ckpt" in at(address))


def test_what_cannot_be_used_is_said_before_the_start(run, address):
    with pytest.raises(UserError, match="save_mirror=nowhere://a/one: cannot be used"):
        fetch("nowhere://a", run)
    fetch(address, run)  # nothing there: a new run
    mirror_of(run, address).copy()
    store = fsspec.filesystem("memory")
    store.pipe_file("/bucket/runs/one/pretrain/mirror.json", b'{"../../../outside": [1, 1]}')
    assert read_list(store, "/bucket/runs/one/pretrain") == {"../../../outside": [1, 1]}
    shutil.rmtree(run.path)
    with pytest.raises(UserError, match="outside of its folder"):
        fetch(address, run)
    assert not run.path.exists() or not any(run.path.iterdir())


@pytest.fixture
def bucket(monkeypatch):
    """Address in a bucket of an S3 server on this machine."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
    yield "s3://bucket/runs"
    server.stop()


TINY = ("experiment=tiny", "trainer=cpu", "precision.compute=fp32", "compile=false", "stage=pretrain", "max_steps=14")
TINY += ("init_from=tiny/tokenizer", "stage.eval_every=0", "stage.sample_every=0", *hold_at(7))


@pytest.mark.slow
def test_a_machine_that_vanished_is_replaced(bucket, tokenizer_runs, tmp_path):
    root = shutil.copytree(tokenizer_runs, tmp_path / "runs")
    command = (*TINY, f"paths.runs={root}", "run=lost", f"save_mirror={bucket}")
    launcher = start_warm(REPO / "train.py", *command, env={"PYTHONPATH": TESTS, FOLDER: str(tmp_path)})
    store = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
    folder, kept = "bucket/runs/lost/pretrain", "checkpoints/step_000006.ckpt"
    wait_until(lambda: held(tmp_path) and kept in read_list(store, folder), launcher)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    shutil.rmtree(root / "lost")
    done = run_cli("train.py", *command, PYTHONPATH=TESTS)
    assert done.returncode == 0 and "lost/pretrain was fetched from the mirror" in done.stdout, done.stderr
    assert "resuming at step 6 of 14" in done.stdout and "mirror" not in done.stderr
    assert store.exists(f"{folder}/model/model.safetensors") and not store.exists(f"{folder}/{kept}")
