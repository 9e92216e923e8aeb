"""Text read over the network: the same documents and positions as from files, whatever the connection does."""

import threading

import pytest
from conftest import compose
from data_files import read, words, write
from hub_server import REPO, Hub, point_to
from omegaconf import OmegaConf

from llm.data import blocks
from llm.data.blocks import Blocks
from llm.data.download import HubFolder
from llm.data.hub_documents import HubDocuments
from llm.data.sources import build_source
from llm.data.streaming import StreamedDocuments
from llm.errors import UserError
from llm.stages.run_stage import run_stage

KINDS = ["parquet", "jsonl", "jsonl.gz", "jsonl.zst", "txt"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub; blocks are small, so that files have several. What is read ahead comes before the next test's hub."""
    with Hub({}) as hub:
        point_to(hub, monkeypatch, tmp_path / "hf")
        monkeypatch.setattr(blocks, "BLOCK_BYTES", 500)
        yield hub
        all_blocks_come()


def all_blocks_come():
    """Wait for the threads that fetch blocks: a late one would ask the hub of another test."""
    for thread in threading.enumerate():
        if thread.name == "fathom-stream":
            thread.join()


def fill(hub, tmp_path, suffix="parquet", count=3, n=60):
    for i in range(count):
        path = write(tmp_path / "made" / f"shard_{i}.{suffix}", words(n, 100 * i))
        hub.files[path.name] = path.read_bytes()


def folder(tmp_path, name="cache"):
    return HubFolder(REPO, "main", tmp_path / name, workers=1)


@pytest.mark.parametrize("suffix", KINDS)
def test_documents_and_positions_are_those_of_the_files(hub, tmp_path, suffix):
    fill(hub, tmp_path, suffix)
    stored, streamed = HubDocuments(folder(tmp_path, "stored")), StreamedDocuments(folder(tmp_path))
    assert "3 shards of data.repo=fathom/test" in streamed.check() and "shard_2" in streamed.check()
    for split in ("train", "val"):
        expected = list(stored.iterate(split, loop=False))
        assert list(streamed.iterate(split, loop=False)) == expected
        assert list(streamed.iterate(split, expected[25][1], loop=False)) == expected[26:]
    kept = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert "files.json" in kept and not any("shard" in name for name in kept)


def test_what_is_cut_refused_or_late_is_asked_for_again(hub, tmp_path, monkeypatch):
    fill(hub, tmp_path)
    source = StreamedDocuments(folder(tmp_path))
    hub.faults = [("shard_0", ("cut", 100)), ("shard_0", 500), ("shard_1", (429, 0)), ("shard_1", ("stall", None))]
    hub.faults += [("shard_1", 503)]
    monkeypatch.setattr("llm.data.download.READ_SECONDS", 2.0)
    assert read(source) == words(60) + words(60, 100) and not hub.faults
    hub.faults = [("shard_0", 500)] * 100
    with pytest.raises(UserError, match="data.repo=fathom/test: the hub cannot be reached or fails, tried 6 times"):
        read(source)
    hub.faults = []
    del hub.files["shard_1.parquet"]
    with pytest.raises(UserError, match=r"no such data set or file \(404\)"):
        read(source)


def test_a_server_that_sends_whole_files_is_refused(hub, tmp_path, monkeypatch):
    fill(hub, tmp_path, "jsonl")
    monkeypatch.setattr(type(hub), "ignores_ranges", True)
    with pytest.raises(UserError, match="tried 6 times .*the server sends the whole file instead of a part"):
        read(StreamedDocuments(folder(tmp_path)))


def test_a_position_is_found_without_reading_what_comes_before(hub, tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(blocks, "BLOCK_BYTES", 10_000)
    path, table = tmp_path / "a.parquet", pa.table({"text": [text * 200 for text in words(400)]})
    pq.write_table(table, path, row_group_size=50, compression="none", use_dictionary=False)
    hub.files = {"a.parquet": path.read_bytes(), "b.parquet": path.read_bytes()}
    source = StreamedDocuments(folder(tmp_path))
    whole = list(source.iterate("train", loop=False))
    hub.requests.clear()
    assert list(source.iterate("train", whole[379][1], loop=False)) == whole[380:]
    read_bytes = 10_000 * len(hub.downloads("a.parquet"))
    assert read_bytes < len(hub.files["a.parquet"]) / 3  # the last of eight row groups, and what was read ahead


def test_blocks_are_fetched_ahead(hub, tmp_path):
    hub.files = {"a.txt": bytes(range(256)) * 40}
    remote = folder(tmp_path)
    (file,) = remote.files()
    blocks = Blocks(remote, file)
    assert blocks.read(3) == b"\0\1\2"
    all_blocks_come()
    assert sorted(start for _, start in hub.downloads()) == [0, 500, 1000, 1500, 2000]
    assert blocks.seek(-6, 2) == len(hub.files["a.txt"]) - 6
    assert blocks.read() == bytes(range(250, 256)) and blocks.read() == b"" and blocks.tell() == file.size


def test_a_single_shard_and_val_size(hub, tmp_path):
    fill(hub, tmp_path, count=1)
    with pytest.raises(UserError, match="has one shard only.*set data.val_size=<documents>"):
        StreamedDocuments(folder(tmp_path))
    source = StreamedDocuments(folder(tmp_path), val_size=7)
    assert read(source) == words(60)[:53] and read(source, "val") == words(60)[53:]


def test_settings_that_do_not_go_together(hub, tmp_path):
    fill(hub, tmp_path)
    local = {"name": "local", "path": str(tmp_path / "made"), "streaming": True, "workers": 1}
    with pytest.raises(UserError, match="data.streaming=true is for data sets of the hub, not for data=local"):
        build_source(OmegaConf.create(local), tmp_path)
    sources = {"a": {"path": str(tmp_path / "made"), "streaming": True}}
    mixture = {"name": "mixture", "streaming": False, "workers": 1, "sources": sources}
    with pytest.raises(UserError, match="data.sources.a.streaming=true is for data sets of the hub"):
        build_source(OmegaConf.create(mixture), tmp_path)


@pytest.mark.slow
def test_a_run_from_the_network(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100_000)
    fill(hub, tmp_path, n=400)
    args = ["experiment=tiny", "data=hub", f"data.repo={REPO}", "data.streaming=true", "data.val_size=null"]
    args += [f"paths.data={tmp_path}/cache", f"paths.runs={tmp_path}/runs", "trainer=cpu", "max_steps=4"]
    for stage in ("tokenizer", "pretrain"):
        run_stage(compose("train", f"stage={stage}", *args))
    assert "read over the network" in capsys.readouterr().out and not list((tmp_path / "cache").rglob("shard_*"))
    fetched = [arg for arg in args if "streaming" not in arg]
    run_stage(compose("train", "stage=pretrain", *fetched))
    assert "tiny/pretrain is finished" in capsys.readouterr().out  # the same run, from files or streamed
    with pytest.raises(UserError, match="data.token_cache"):
        more = ["run=other", "init_from=tiny/tokenizer", "data.token_cache=true"]
        run_stage(compose("train", "stage=pretrain", *args, *more))
