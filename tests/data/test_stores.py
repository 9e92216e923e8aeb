"""Text at addresses: the documents, order and positions of a store are those of the same files on disk."""

import gzip
import json
import zipfile
from itertools import islice

import pytest
from data_files import read, words, write
from hub_server import REPO, Hub, point_to
from store_server import BUCKET, put_folder, s3_server

from llm.data import blocks, download
from llm.data.documents import LocalDocuments
from llm.data.download import shown
from llm.data.files import find_data_files
from llm.data.shuffle import Shuffle
from llm.data.stores import StoredFile, upload
from llm.errors import BadData, UserError


@pytest.fixture(scope="module")
def s3():
    with s3_server() as client:
        yield client


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 700)  # so that small files have several


@pytest.fixture
def folder(tmp_path):
    """Files of every kind of reader: packed lines, parquet, plain lines, an archive, two for validation."""
    made = tmp_path / "made"
    write(made / "a/one.jsonl.gz", words(60))
    write(made / "b/two.jsonl.zst", words(50, 100))
    write(made / "c/three.parquet", words(80, 200))
    write(made / "val/four.parquet", words(20, 300))
    write(tmp_path / "five.jsonl", words(30, 400))
    with zipfile.ZipFile(made / "packed.zip", "w") as archive:
        archive.write(tmp_path / "five.jsonl", "five.jsonl")
    (made / "notes.pdf").write_bytes(b"%PDF")
    (made / ".hidden").mkdir()
    write(made / ".hidden/six.jsonl", words(5, 900))
    return made


def one_kind(folder, suffix):
    """Return the folder with only the files of a suffix among its training files."""
    for path in [*folder.rglob("*.jsonl.*"), *folder.rglob("*.parquet"), *folder.rglob("*.zip")]:
        if not path.name.endswith(suffix):
            path.unlink()
    return folder


@pytest.mark.parametrize("suffix", [".parquet", ".gz", ".zst", ".zip"])
def test_documents_and_positions_are_those_of_the_files(s3, folder, tmp_path, suffix):
    one_kind(folder, suffix)
    write(folder / f"val/four{'.parquet' if suffix == '.parquet' else '.jsonl'}", words(20, 300))
    address = put_folder(s3, folder, tmp_path.name)
    here, there = LocalDocuments(folder), LocalDocuments(address)
    for split in ("train", "val"):
        assert read(there, split) == read(here, split)
    documents = list(islice(here.iterate("train"), 150))
    middle = documents[20][1]
    assert list(islice(there.iterate("train", middle), 100)) == documents[21:121]
    assert list(islice(there.iterate("train", middle, 1, 3), 20)) == list(
        islice(here.iterate("train", middle, 1, 3), 20)
    )
    assert here.check().replace(str(folder), "X").split(";")[0] == there.check().replace(address, "X").split(";")[0]


def test_shuffled_text_has_one_order(s3, folder, tmp_path):
    address = put_folder(s3, one_kind(folder, ".parquet"), tmp_path.name)
    here, there = LocalDocuments(folder), LocalDocuments(address)
    here.shuffle, there.shuffle = Shuffle(7, whole=True), Shuffle(7, whole=True)
    assert list(islice(here.iterate("train"), 90)) == list(islice(there.iterate("train"), 90))


def test_a_file_a_pattern_and_a_list(s3, tmp_path):
    for name in ("x/part-1.jsonl", "x/part-2.jsonl", "x/val.jsonl"):
        write(tmp_path / name, words(8, len(name)))
    address = put_folder(s3, tmp_path, tmp_path.name)
    pattern = find_data_files(f"{address}/x/part-*.jsonl", "data.path")
    assert [file.name for file in pattern.files] == ["part-1.jsonl", "part-2.jsonl"] == pattern.names
    mixed = LocalDocuments(
        None, train=[f"{address}/x/part-1.jsonl", str(tmp_path / "x/part-2.jsonl")], val=f"{address}/x/val.jsonl"
    )
    assert len(read(mixed)) == 16 and len(read(mixed, "val")) == 8
    alone = LocalDocuments(f"{address}/x/val.jsonl")  # named by the user: its name need not say anything
    assert len(read(alone)) == 7 and len(read(alone, "val")) == 1


def test_what_is_left_out_is_said_as_on_disk(s3, folder, tmp_path):
    one_kind(folder, ".parquet")
    address = put_folder(s3, folder, tmp_path.name)
    assert find_data_files(address, "data.path").left_out == find_data_files(folder, "data.path").left_out != ""


def test_a_wrong_suffix_is_told_by_the_content(s3, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(9))))
    address = put_folder(s3, tmp_path, tmp_path.name)
    assert len(read(LocalDocuments(f"{address}/rows.jsonl"))) == 8


def test_a_file_that_changes_while_it_is_read(s3, tmp_path):
    write(tmp_path / "rows.jsonl", words(400))
    address = put_folder(s3, tmp_path, tmp_path.name)
    documents = LocalDocuments(f"{address}/rows.jsonl").iterate("train", loop=False)
    next(documents)
    s3.put_object(Bucket=BUCKET, Key=f"{tmp_path.name}/rows.jsonl", Body=(tmp_path / "rows.jsonl").read_bytes() + b"\n")
    with pytest.raises(BadData, match="has changed while it was read"):
        list(documents)


@pytest.mark.parametrize(
    "entry, message",
    [
        ("s3://bucket/nothing", "data.path=s3://bucket/nothing: there is no such file, folder or bucket"),
        ("s3://no-such-bucket/x.jsonl", "there is no such file, folder or bucket"),
        ("s3://bucket/nothing/*.jsonl", "no file matches it as a glob"),
        ("nosuch://bucket/x", "Protocol not known: nosuch"),
        ("http://127.0.0.1:9/folder/", "a server of the web lists no folder"),
    ],
)
def test_what_is_not_there_is_one_line(s3, entry, message):
    with pytest.raises(UserError, match=message) as error:
        find_data_files(entry, "data.path")
    assert "\n" not in str(error.value)


def test_a_package_that_is_missing_is_named(monkeypatch):
    import sys

    import fsspec

    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(fsspec.registry, "gs", raising=False) if "gs" in fsspec.registry else None
    with pytest.raises(UserError, match=r"gs:// needs a package of its own: pip install -e '.\[gcs\]'"):
        find_data_files("gs://bucket/x.jsonl", "data.path")


def test_credentials_that_are_refused_or_missing(s3, monkeypatch):
    import s3fs
    from botocore.exceptions import NoCredentialsError

    def refuse(error):
        async def call(*_args, **_kwargs):
            raise error

        monkeypatch.setattr(s3fs.S3FileSystem, "_info", call)
        s3fs.S3FileSystem.clear_instance_cache()  # a file system keeps the methods that it was made with

    refuse(PermissionError("Forbidden"))
    with pytest.raises(UserError, match="refuses access"):
        find_data_files("s3://bucket/x.jsonl", "data.path")
    refuse(NoCredentialsError())
    with pytest.raises(UserError, match="no credentials"):
        find_data_files("s3://bucket/x.jsonl", "data.path")
    s3fs.S3FileSystem.clear_instance_cache()


def test_secrets_are_not_shown():
    assert shown("https://me:key@host/a.txt?X-Amz-Signature=abc") == "https://host/a.txt"
    assert shown(["s3://b/x*?.txt", "https://h/a?b=c"]) == "['s3://b/x*?.txt', 'https://h/a']"
    assert shown("data/a@b?.txt") == "data/a@b?.txt"


def test_files_of_the_web_and_a_server_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "FIRST_WAIT", 0.01)
    path = write(tmp_path / "rows.jsonl.gz", words(200))
    with Hub({}) as web:
        web.web["/data/rows.jsonl.gz"] = path.read_bytes()
        address = f"{web.url}/data/rows.jsonl.gz?token=hush"
        web.faults += [("rows", 500), ("rows", ("cut", 100))]
        there = LocalDocuments(address)
        assert there.files[0].name == "rows.jsonl.gz" and "hush" not in there.check()
        assert read(there) == read(LocalDocuments(path))
        web.ignores_ranges = True
        with pytest.raises(UserError, match="sends the whole file instead of a part|does not tell"):
            read(LocalDocuments(address))


def test_data_sets_of_the_hub_by_address(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.parquet", words(90))
    with Hub({"data/rows.parquet": path.read_bytes()}) as hub:
        point_to(hub, monkeypatch, tmp_path)
        assert read(LocalDocuments(f"hf://datasets/{REPO}/data/rows.parquet")) == read(LocalDocuments(path))


def test_an_upload_is_whole(s3, tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 1000)
    upload(tmp_path / "x", f"s3://{BUCKET}/{tmp_path.name}/deep/x", "data.path")
    assert s3.get_object(Bucket=BUCKET, Key=f"{tmp_path.name}/deep/x")["Body"].read() == b"abc" * 1000


def test_rows_in_the_store_are_json(s3, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"text": w} for w in words(20)], indent=1))
    address = put_folder(s3, tmp_path, tmp_path.name)
    source = LocalDocuments(f"{address}/rows.json")
    assert isinstance(source.files[0], StoredFile) and len(read(source)) == 19
