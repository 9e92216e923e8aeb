"""Text at addresses: the documents, order and positions of a store are those of the same files on disk."""

import gzip
import json
import os
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice

import fsspec
import pytest
from conftest import compose
from data_files import read, words, write
from hub_server import REPO, Hub, point_to
from store_server import BUCKET, Breaking, put_folder, s3_server

from llm.config.stages import stage_row
from llm.data import blocks, download, text_size
from llm.data.documents import LocalDocuments
from llm.data.download import shown
from llm.data.files import find_data_files, list_files
from llm.data.shuffle import Shuffle
from llm.data.sources import document_source, is_remote
from llm.data.stores import Store, StoredFile, upload
from llm.data.tokens import CachedDocuments
from llm.errors import BadData, UserError
from llm.stages.data_check import check_data


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


@pytest.mark.parametrize("suffix, whole", [(".parquet", True), (".gz", False)])
def test_shuffled_text_has_one_order(s3, folder, tmp_path, suffix, whole):
    write(one_kind(folder, suffix) / f"d/more.{'parquet' if suffix == '.parquet' else 'jsonl'}", words(30, 500))
    write(folder / f"val/four{'.parquet' if suffix == '.parquet' else '.jsonl'}", words(20, 300))
    address = put_folder(s3, folder, tmp_path.name)
    here, there = LocalDocuments(folder), LocalDocuments(address)
    here.shuffle, there.shuffle = Shuffle(7, whole), Shuffle(7, whole)
    documents = list(islice(here.iterate("train"), 250))
    assert list(islice(there.iterate("train"), 250)) == documents
    assert list(islice(there.iterate("train", documents[40][1]), 200)) == documents[41:241]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_the_size_of_much_text_costs_few_requests(s3, tmp_path, monkeypatch, tiny_tokenizer, suffix):
    for number in range(12):
        write(tmp_path / f"{number}{suffix}", words(300, number))
    address = put_folder(s3, tmp_path, tmp_path.name)
    monkeypatch.setattr(text_size, "EXACT_BYTES", 100)
    monkeypatch.setattr(text_size, "SAMPLE_DOCUMENTS", 20)
    monkeypatch.setattr(blocks, "BLOCKS_AHEAD", 0)
    read, seen = Store.read, []
    monkeypatch.setattr(Store, "read", lambda self, file, *part: seen.append(file.name) or read(self, file, *part))
    size = text_size.text_tokens(LocalDocuments(address), tiny_tokenizer)
    assert set(seen) == {f"0{suffix}"}
    assert size == pytest.approx(text_size.text_tokens(LocalDocuments(tmp_path), tiny_tokenizer), rel=0.1)


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


@pytest.mark.parametrize(
    "entry",
    ["", "/", "/*", "/**/*.txt", "/*/*.txt", "/[a-f]*.txt", "/f[1].txt", "/f?.txt", "/a*/b.txt", "/a", "/none*"],
)
def test_files_are_listed_as_on_disk(s3, tmp_path, entry):
    for name in ("a/b.txt", "a.x/b.txt", "a/c/d.txt", "a/.h.txt", "f[1].txt", "f1.txt", "a b/ü.txt", "top.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("words")
    address = put_folder(s3, tmp_path, "listed")

    def listing(root):
        found = list_files(f"{root}{entry}", "data.path")
        return found.kind, [(str(path).removeprefix(str(root)), name) for path, name in found.files]

    assert listing(address) == listing(tmp_path)


def test_other_kinds_of_addresses(tmp_path):
    path = write(tmp_path / "rows.jsonl", words(30))
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/texts/rows.jsonl", path.read_bytes())
    try:
        for address in (f"file://{path}", f"file://{tmp_path}", "memory://texts/rows.jsonl", "memory://texts"):
            assert read(LocalDocuments(address)) == read(LocalDocuments(path))
            assert find_data_files(address, "data.path").files[0].as_posix().endswith("rows.jsonl")
    finally:
        memory.rm("/texts", recursive=True)


def test_an_archive_is_opened_once(s3, tmp_path):
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        for number in range(30):
            archive.writestr(f"{number:02}.jsonl", json.dumps({"text": f"row {number}"}) + "\n")
    address = put_folder(s3, tmp_path, tmp_path.name)
    source = LocalDocuments(f"{address}/many.zip")
    assert read(source) == read(LocalDocuments(tmp_path / "many.zip"))
    assert len({id(file.archive.as_zip) for file in source.files}) == 1


def test_an_archive_that_changes_while_it_is_read(tmp_path):
    def pack(count):
        with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
            archive.writestr("rows.jsonl", "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(count)))

    pack(50)
    documents = LocalDocuments(tmp_path / "rows.zip").iterate("train", loop=False)
    next(documents)
    (tmp_path / "rows.zip").unlink()
    pack(49)
    with pytest.raises(BadData, match="has changed while it was read"):
        list(documents)


def test_the_token_cache_keeps_text_of_a_store(s3, tmp_path, tiny_tokenizer):
    write(tmp_path / "text/rows.jsonl", words(60))
    address = put_folder(s3, tmp_path / "text", tmp_path.name)
    direct = [
        (tiny_tokenizer.encode_document(text).tolist(), cursor)
        for text, cursor in islice(LocalDocuments(address).iterate("train"), 90)
    ]
    cached = CachedDocuments(LocalDocuments(address), tiny_tokenizer, tmp_path / "cache")
    assert [(ids.tolist(), cursor) for ids, cursor in islice(cached.iterate("train"), 90)] == direct
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.tokens")}
    again = CachedDocuments(LocalDocuments(address), tiny_tokenizer, tmp_path / "cache")
    assert len(list(islice(again.iterate("train"), 90))) == 90 and len(before) == 1
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.tokens")} == before


def test_bad_rows_of_a_small_text_are_found_at_the_start(s3, tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", words(40))
    path.write_text(path.read_text() + '{"text": 7}\n' * 3 + json.dumps({"text": "end"}))
    address = put_folder(s3, tmp_path, tmp_path.name)
    with pytest.raises(BadData, match="rows.jsonl: line 41: text is a int.*line 43.*data.bad_rows=skip"):
        LocalDocuments(address).check()
    assert "skipped: 3 bad rows" in LocalDocuments(address, bad_rows="skip").check()
    monkeypatch.setattr("llm.data.documents.SCAN_BYTES_STORE", 100)
    assert "not yet searched for bad rows: all of the file" in LocalDocuments(address, bad_rows="skip").check()


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


def test_a_file_that_changes_after_it_was_listed(s3, tmp_path):
    path = write(tmp_path / "text/train.jsonl", words(400))
    write(tmp_path / "text/val.jsonl", words(4))
    address = put_folder(s3, tmp_path / "text", tmp_path.name)
    for content in (path.read_bytes()[:-200], path.read_bytes() * 2):
        documents = LocalDocuments(address)
        s3.put_object(Bucket=BUCKET, Key=f"{tmp_path.name}/train.jsonl", Body=content)
        with pytest.raises(BadData, match="train.jsonl: has changed"):
            list(documents.iterate("train", loop=False))
        put_folder(s3, tmp_path / "text", tmp_path.name)


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


def test_a_mixture_reads_stores(s3, tmp_path):
    write(tmp_path / "rows.jsonl", words(40))
    address = put_folder(s3, tmp_path, tmp_path.name)
    far, near = (f"{{path: '{root}/rows.jsonl'}}" for root in (address, tmp_path))
    key = f"data.sources={{far: {far}, near: {near}}}"
    source = document_source(compose("train", "experiment=tiny", "data=mixture", key).data, str(tmp_path))
    documents = [text for text, _ in islice(source.iterate("train"), 60)]
    assert {documents.count(text) for text in read(LocalDocuments(tmp_path / "rows.jsonl"))[:20]} == {2}


@pytest.mark.parametrize("key", ["path", "train", "val"])
def test_a_dry_run_does_not_look_at_addresses(key, monkeypatch):
    settings = ("experiment=tiny", "data=local", "data.path=somewhere", f"data.{key}=['s3://bucket/none.txt']")
    monkeypatch.setattr(Store, "__init__", None)  # whoever looks fails
    data = compose("train", *settings[:-1], settings[-1] if key != "path" else "data.path=s3://bucket/none.txt")
    assert is_remote(data.data)
    data.dry_run = True
    check_data(data, stage_row("pretrain"))
    assert not is_remote(compose("train", *settings[:-1]).data)


def test_secrets_are_not_shown(capsys):
    from omegaconf import OmegaConf

    from llm.stages.job import show_config

    show_config(OmegaConf.create({"data": {"path": "https://me:pass@host/a.txt?key=hush", "train": None}}))
    assert "path: https://host/a.txt\n  train: null" in capsys.readouterr().out
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


class _Packing(BaseHTTPRequestHandler):
    """Web server that packs what it sends for clients that accept it, and counts ranges in what it sends."""

    protocol_version = "HTTP/1.1"
    content = b""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        packs = "gzip" in self.headers.get("Accept-Encoding", "")
        body = gzip.compress(self.content) if packs else self.content
        start, stop = 0, len(body)
        if asked := self.headers.get("Range"):
            start, stop = (int(part) for part in asked.removeprefix("bytes=").split("-"))
            stop = min(stop + 1, len(body))
        self.send_response(206 if asked else 200)
        if packs:
            self.send_header("Content-Encoding", "gzip")
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(body)}")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[start:stop])


def test_a_web_server_that_packs_its_answers(tmp_path):
    path = write(tmp_path / "rows.jsonl", words(200))
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Packing,), {"content": path.read_bytes()}))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}/rows.jsonl"
        assert read(LocalDocuments(address)) == read(LocalDocuments(path))
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def broken(s3, monkeypatch):
    """A proxy before the S3 server, which s3:// goes through."""
    import s3fs

    monkeypatch.setattr(download, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # its own patience comes before ours
    with Breaking(os.environ["AWS_ENDPOINT_URL"], cuts=0, after=600) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_connections_that_break_in_the_middle_of_a_file(s3, broken, tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}", words(300))
    put_folder(s3, tmp_path, tmp_path.name)
    there = LocalDocuments(f"s3://{BUCKET}/{tmp_path.name}/rows{suffix}")
    broken.cuts = 3
    assert read(there) == read(LocalDocuments(path))
    assert broken.cuts == 0


def test_a_store_that_stays_away_is_one_line(s3, broken, tmp_path):
    write(tmp_path / "rows.jsonl", words(300))
    put_folder(s3, tmp_path, tmp_path.name)
    documents = LocalDocuments(f"s3://{BUCKET}/{tmp_path.name}/rows.jsonl").iterate("train")
    next(documents)
    broken.cuts = 10_000
    with pytest.raises(UserError, match=r"data.path=s3://.*cannot be reached or fails, tried 6 times") as error:
        list(islice(documents, 280))
    assert "\n" not in str(error.value) and "secret" not in str(error.value)


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
