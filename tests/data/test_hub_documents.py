"""Data sets on the hub, against a small hub of our own: fetched ahead, continued, checked; and what goes wrong."""

import threading
import time

import pytest
from conftest import compose, run_cli
from data_files import read, words, write
from hub_server import REPO, Hub, point_to
from processes import HANG, wait_until

from llm.data import download
from llm.data.download import HubFolder
from llm.data.hub_documents import HubDocuments
from llm.errors import UserError
from llm.stages.run_stage import run_stage


def shards(tmp_path, count=5, suffix="parquet", n=40):
    """`count` files of n documents each by name, and a README."""
    files = {}
    for i in range(count):
        path = write(tmp_path / "made" / f"shard_{i:05d}.{suffix}", words(n, 100 * i))
        files[path.name] = path.read_bytes()
    return files | {"README.md": b"about the data"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with five shards; waits between tries are short."""
    with Hub(shards(tmp_path)) as hub:
        point_to(hub, monkeypatch, tmp_path / "hf")
        yield hub


@pytest.fixture
def folder(hub, tmp_path):
    return HubFolder(REPO, "main", tmp_path / "cache", workers=3)


def documents(folder, **options):
    return HubDocuments(folder, **options)


def test_shards_in_name_order_and_the_last_validates(hub, folder):
    source = documents(folder)
    assert source.check().startswith(f"5 shards of data.repo={REPO}")
    assert read(source) == [text for i in range(4) for text in words(40, 100 * i)]
    assert read(source, "val") == words(40, 400)
    first_two = documents(folder, shards=2)
    assert read(first_two) == words(40) + words(40, 100) and read(first_two, "val") == words(40, 400)
    assert [path for path, _ in hub.downloads()] == list(dict.fromkeys(path for path, _ in hub.downloads()))
    assert not hub.downloads("README")


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "txt"])
def test_other_kinds_of_files(hub, folder, tmp_path, suffix):
    hub.files = shards(tmp_path, 2, suffix)
    source = documents(folder, files=f"*.{suffix}")
    assert read(source) == words(40) and read(source, "val") == words(40, 100)


def test_training_waits_for_its_next_shard_only(hub, folder, monkeypatch):
    monkeypatch.setattr("llm.data.hub_documents.AHEAD", 1)
    come, got = threading.Event(), []
    hub.faults = [("shard_00002", ("wait", come.wait))]
    source = documents(folder)
    source.check()
    assert len(hub.downloads()) == 2  # both ends
    stream = source.iterate("train")
    for _ in range(80):
        next(stream)
    wait_until(lambda: len(hub.downloads()) == 4)
    assert not hub.downloads("shard_00003")
    reader = threading.Thread(target=lambda: got.append(next(stream)[0]), daemon=True)
    reader.start()
    reader.join(0.2)
    assert reader.is_alive() and not got
    come.set()
    reader.join(HANG)
    assert got == words(1, 200)


def test_workers_fetch_in_parallel(hub, folder):
    """The first three files come only once all three have been asked for."""
    meeting = threading.Barrier(3, timeout=HANG)
    hub.faults = [(f"shard_0000{i}", ("wait", meeting.wait)) for i in range(3)]
    folder.fetch_all(folder.matching("*.parquet"))
    assert hub.most_open == 3 and all(map(folder.is_here, folder.matching("*.parquet")))


def test_what_a_broken_connection_left_is_continued(hub, folder):
    file = folder.matching("shard_00000*")[0]
    hub.faults = [("shard_00000", ("cut", 500))]
    assert folder.fetch(file).read_bytes() == hub.files[file.name]
    assert [start for _, start in hub.downloads()] == [0, 500]
    part = folder.root / ".parts" / "shard_00001.parquet.part"  # of a process that was killed
    part.write_bytes(hub.files["shard_00001.parquet"][:300])
    folder.fetch(folder.matching("shard_00001*")[0])
    assert hub.downloads("shard_00001")[0][1] == 300 and not part.exists()


def test_what_passes_is_tried_again(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 2)
    hub.faults = [("/tree/", 500), ("/revision/", (429, 1)), ("shard_00001", 500), ("shard_00001", 503)]
    hub.faults += [("shard_00002", (429, 0)), ("shard_00003", ("stall", None))]
    begin = time.monotonic()
    files = folder.matching("*.parquet")
    assert time.monotonic() - begin > 1  # as long as the hub asked for
    folder.fetch_all(files)
    assert not hub.faults
    for file in files:
        assert folder.path(file).read_bytes() == hub.files[file.name]


def test_nothing_of_a_garbled_file_is_kept(hub, folder):
    hub.faults = [("shard_00000", "garble")]
    file = folder.matching("shard_00000*")[0]
    assert folder.fetch(file).read_bytes() == hub.files[file.name] and not hub.faults
    assert [start for _, start in hub.downloads("shard_00000")] == [0, 0]


def test_a_file_that_lost_its_end_is_fetched_again(hub, folder):
    file = folder.matching("shard_00000*")[0]
    path = folder.fetch(file)
    path.write_bytes(path.read_bytes()[:-9])
    assert read(documents(folder, shards=1)) == words(40)


def test_two_processes_fetch_a_file_once(hub, folder, tmp_path):
    hub.speed = 2 * max(map(len, hub.files.values()))
    file = folder.matching("shard_00000*")[0]
    others = [HubFolder(REPO, "main", tmp_path / "cache", 1) for _ in range(3)]
    threads = [threading.Thread(target=other.fetch, args=[file]) for other in others if other.files()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(hub.downloads()) == 1 and folder.is_here(file)


def test_what_is_here_needs_no_hub(hub, folder, tmp_path):
    documents(folder).check()
    folder.fetch_all(folder.matching("*.parquet"))
    count = len(hub.requests)
    again = documents(HubFolder(REPO, "main", tmp_path / "cache", 3))
    assert len(read(again)) == 160 and "5 of them in" in again.check() and len(hub.requests) == count


def test_cursor_continues_in_another_process(hub, folder, tmp_path):
    stream = documents(folder).iterate("train", rank=1, world=2)
    straight = [next(stream) for _ in range(120)]
    again = documents(HubFolder(REPO, "main", tmp_path / "other", 2)).iterate("train", straight[70][1], 1, 2)
    assert [next(again) for _ in range(49)] == straight[71:]


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_errors_name_key_and_fix(hub, folder, tmp_path, monkeypatch):
    def at(repo=REPO, revision="main"):
        return HubFolder(repo, revision, tmp_path / "errors", 1)

    with pytest.raises(UserError, match=r"data.repo=no/such: .*\(401\): .*private or gated.*HF_TOKEN"):
        at("no/such").files()
    with pytest.raises(UserError, match="data.revision=v9: fathom/test has no such branch"):
        at(revision="v9").files()
    with pytest.raises(UserError, match="data.repo=a/b/c: write data.repo=<owner>/<name>"):
        at("a/b/c").files()
    for status, message in [(403, "HF_TOKEN"), (404, r"no such data set or file \(404\)"), (400, "answers 400")]:
        hub.faults = [("/revision/", status)]
        with pytest.raises(UserError, match=message):
            at().files()
    hub.faults = [("/revision/", 500)] * 6
    with pytest.raises(UserError, match=r"tried 6 times .*Check the network or HF_ENDPOINT"):
        at().files()
    assert not hub.faults
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"data.repo=fathom/test: the hub cannot be reached"):
        at().files()


def test_an_error_while_reading_reaches_the_reader(hub, folder):
    source = documents(folder)
    source.check()
    del hub.files["shard_00001.parquet"]
    with pytest.raises(UserError, match=r"data.repo=fathom/test: the hub has no such data set or file \(404\)"):
        read(source)


def test_data_sets_that_cannot_be_split_or_read(hub, folder, tmp_path):
    def fresh(files):
        hub.files = files
        return HubFolder(REPO, "main", tmp_path / f"cache{time.monotonic_ns()}", 2)

    one = fresh(shards(tmp_path, 1))
    with pytest.raises(UserError, match="has one shard only, shard_00000.parquet.*set data.val_size=<documents>"):
        documents(one)
    assert read(documents(one, val_size=5), "val") == words(40)[35:]
    assert read(documents(one, val_size=5)) == words(40)[:35]
    five = fresh(shards(tmp_path, 5))
    with pytest.raises(UserError, match="data.shards=5: .* has 4 shards to train on"):
        documents(five, shards=5)
    with pytest.raises(UserError, match="data.column=body does not exist. Text columns here: text"):
        documents(five, column="body").check()
    with pytest.raises(UserError, match=r"no file that matches data.files=x\* .*it holds README.md, shard_00000"):
        documents(five, files="x*")
    splits = fresh({f"data/{split}-0.jsonl": b'{"text": "a"}\n' for split in ("train", "test", "validation")})
    divided = documents(splits)  # by the rule of local files
    assert [path.name for path in divided.files] == ["train-0.jsonl", "validation-0.jsonl"]
    assert "left out: 1 shards, the test split by name" in divided.check()
    with pytest.raises(UserError, match="has one shard only, data/train-0.jsonl"):
        documents(splits, files="*train*")
    with pytest.raises(UserError, match=r"mixes 1 jsonl and 1 txt files.*data.files='\*.jsonl'"):
        documents(fresh({"a.jsonl": b"{}", "b.txt": b"b"}))
    with pytest.raises(UserError, match=r"shard_\d.parquet is no readable parquet file on the hub itself"):
        documents(fresh({"shard_0.parquet": b"PAR1", "shard_1.parquet": b"PAR1 and no footer"}), files="*_*").check()


def test_a_full_disk_is_seen_before(hub, folder, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match="are to be fetched, but .*choose another paths.data or fewer data.shards"):
        documents(folder).check()


# ---- the command line -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stage_download_fetches_ahead_and_makes_no_run(hub, tmp_path, capsys):
    args = ["stage=download", "data=mixture", f"data.sources={{web: {{repo: {REPO}, shards: 2}}}}"]
    args += [f"paths.data={tmp_path}/cache", f"paths.runs={tmp_path}/runs"]
    run_stage(compose("train", *args, "dry_run=true"))
    assert "0 of 3 shards are in" in capsys.readouterr().out and not hub.downloads()
    done = run_cli("train.py", *args, fresh=True, HF_ENDPOINT=hub.url)
    assert done.returncode == 0 and "3/3 files" in done.stdout and "validation: shard_00004" in done.stdout
    run_stage(compose("train", *args))
    assert "3 of 3 shards are in" in capsys.readouterr().out
    assert len(hub.downloads()) == 3 and not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match="data=embedded names nothing on the hub"):
        run_stage(compose("train", "stage=download"))


@pytest.mark.slow
def test_two_processes_train_while_shards_come(hub, tmp_path):
    hub.files = shards(tmp_path, 5, n=3000)
    hub.speed = max(map(len, hub.files.values()))
    args = ["experiment=tiny", "data=hub", f"data.repo={REPO}", "data.val_size=null", f"paths.data={tmp_path}/cache"]
    args += [
        f"paths.runs={tmp_path}/runs",
        "trainer=cpu",
        "trainer.devices=2",
        "batch.micro_batch_size=2",
        "max_steps=4",
    ]
    for stage in ("tokenizer", "pretrain"):
        done = run_cli("train.py", f"stage={stage}", *args, fresh=True, HF_ENDPOINT=hub.url)
        assert done.returncode == 0, done.stderr
    names = [path for path, _ in hub.downloads()]
    assert len(names) == len(set(names)) >= 2  # each file once
