"""Text as token ids: folders of stage=write_tokens on disk and in a store, and token files of other programs."""

import json
from itertools import islice

import numpy as np
import pytest
from data_files import words, write
from store_server import put_folder, s3_server

from llm.data.documents import LocalDocuments, texts
from llm.data.foreign_tokens import DOCUMENT_IDS, ForeignFile
from llm.data.loader import StepLayout, TextSteps
from llm.data.sample import sample_balance
from llm.data.shuffle import Shuffle
from llm.data.stores import Store
from llm.data.text_size import passes_over
from llm.data.token_documents import INDEX, VERSION, read_index, token_source, write_index
from llm.data.token_files import RECORD, TokenFolder, read_record
from llm.data.tokens import CachedDocuments
from llm.errors import BadData, UserError

EOT = 256  # the first id behind the ordinary tokens of Bytes


class Bytes:
    """A tokenizer of single bytes."""

    tokens, bos_id, vocab_size, fingerprint = tuple(bytes([i]) for i in range(256)), 256, 260, "bytes"

    def encode_document(self, text):
        return np.array([self.bos_id, *text.encode()], np.int32)

    def decode(self, ids):
        return bytes(ids).decode()


@pytest.fixture(scope="module")
def s3():
    with s3_server() as client:
        yield client


@pytest.fixture
def text(tmp_path):
    """Two training files with empty rows, and one that validates."""
    write(tmp_path / "text/a.jsonl", ["", *words(30), None, " "])
    write(tmp_path / "text/b.jsonl.gz", words(40, 100))
    write(tmp_path / "text/val.jsonl", words(20, 300))
    return tmp_path / "text"


def write_tokens(text, folder, whole=True):
    cached = CachedDocuments(LocalDocuments(text), Bytes(), folder)
    shards = {split: list(cached.text.shards(split)) for split in ("train", "val")}
    index = {split: [cached.name_of(shard) for shard in of] for split, of in shards.items()}
    facts = {"version": VERSION, "fingerprint": Bytes().fingerprint, "vocab_size": Bytes().vocab_size, "whole": whole}
    write_index(cached.folder, facts | index)
    return [cached.make(shard) for of in shards.values() for shard in of]


def written(path, seed=None):
    source = token_source(str(path), None, None, None, seed)
    source.use(Bytes())
    return source


def documents(source, split="train", count=100, **options):
    return [(ids.tolist(), cursor) for ids, cursor in islice(source.iterate(split, **options), count)]


def of_text(source, split="train", count=100, **options):
    return [
        (Bytes().encode_document(text).tolist(), cursor)
        for text, cursor in islice(source.iterate(split, **options), count)
    ]


@pytest.mark.parametrize("seed", [None, 7])
def test_documents_order_and_positions_are_those_of_the_text(text, tmp_path, s3, seed):
    assert write_tokens(text, tmp_path / "tokens") == [True] * 3
    address = put_folder(s3, tmp_path / "tokens", tmp_path.name)
    source = LocalDocuments(text)
    source.shuffle = None if seed is None else Shuffle(seed, whole=True)
    for tokens in (written(tmp_path / "tokens", seed), written(address, seed)):
        found = documents(tokens)
        assert found == of_text(source)
        assert documents(tokens, cursor=found[49][1], count=30) == found[50:80]
        assert documents(tokens, rank=1, world=3, count=20) == of_text(source, rank=1, world=3, count=20)
        assert documents(tokens, "val", loop=False) == of_text(source, "val", loop=False)
        assert list(texts(tokens, "val")) == list(texts(source, "val"))
        assert tokens.tokens("train") == sum(len(ids) for ids, _ in documents(tokens, loop=False))
        assert "2 token files" in tokens.check()


def test_steps_are_the_same_to_the_bit_and_go_on_from_text(text, tmp_path):
    def steps(source, state=None):
        layout = StepLayout(32, 3, 2)
        loader = TextSteps(source, Bytes(), layout, state=state, buffer=20, packing="best_fit")
        return list(islice(loader.steps(), 12))

    write_tokens(text, tmp_path / "tokens")
    straight, tokens = steps(LocalDocuments(text)), written(tmp_path / "tokens")
    for one, other in zip(straight[5:], steps(tokens, straight[4]["state"]()), strict=False):
        assert all((x["inputs"] == y["inputs"]).all() for x, y in zip(one["micro"], other["micro"], strict=True))
    assert sample_balance(tokens, Bytes(), 33, "crop", 20) == sample_balance(
        LocalDocuments(text), Bytes(), 33, "crop", 20
    )
    size, passes = passes_over(tokens, Bytes(), 10_000)
    assert size == tokens.tokens("train") and passes == 10_000 / size


def test_a_second_job_writes_what_is_missing_only(text, tmp_path):
    assert write_tokens(text, tmp_path / "tokens") == [True] * 3
    file = next((tmp_path / "tokens").glob("b.jsonl.gz-*.tokens"))
    file.write_bytes(file.read_bytes()[:-5])  # a disk that lost its end
    with pytest.raises(UserError, match="1 of 3 token files are missing or damaged: b.jsonl.gz"):
        written(tmp_path / "tokens").check()
    assert write_tokens(text, tmp_path / "tokens") == [False, True, False]


def test_what_a_killed_job_left_is_written_over(text, tmp_path):
    cached = CachedDocuments(LocalDocuments(text), Bytes(), tmp_path / "tokens")
    name = cached.name_of(cached.text.shards("train")[0])
    write(tmp_path / f"tokens/.{name}.new", [])
    assert write_tokens(text, tmp_path / "tokens") == [True] * 3
    assert not list((tmp_path / "tokens").glob(".*.new"))

    def fails(path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(UserError, match="x: cannot be written .disk full"):
        cached.folder.put("x", fails)
    assert not list((tmp_path / "tokens").glob(".*.new"))


def test_the_longest_names_have_room(tmp_path):
    write(tmp_path / "text" / f"{'é' * 123}.jsonl", words(5))
    write(tmp_path / "text/val.jsonl", words(5))
    assert write_tokens(tmp_path / "text", tmp_path / "tokens") == [True] * 2
    assert len(documents(written(tmp_path / "tokens"), loop=False)) == 5


def test_the_end_of_a_far_file_is_read_alone(text, tmp_path, s3, monkeypatch):
    write_tokens(text, tmp_path / "tokens")
    source, sizes, read = written(put_folder(s3, tmp_path / "tokens", tmp_path.name)), [], Store.read

    def counted(store, file, start, stop):
        sizes.append(stop - start)
        return read(store, file, start, stop)

    monkeypatch.setattr(Store, "read", counted)
    source.check()
    assert sizes == [RECORD.size] * 3


def test_text_that_was_copied_is_recognised_and_changed_text_is_not(text, tmp_path):
    write_tokens(text, tmp_path / "tokens")
    copy = tmp_path / "elsewhere"
    for path in text.iterdir():
        write(copy / path.name, [])
        (copy / path.name).write_bytes(path.read_bytes())
    assert write_tokens(copy, tmp_path / "tokens") == [False] * 3
    content = bytearray((copy / "val.jsonl").read_bytes())
    content[12] ^= 1
    (copy / "val.jsonl").write_bytes(content)
    assert write_tokens(copy, tmp_path / "tokens") == [False, False, True]


def test_a_folder_of_another_text_or_tokenizer_is_refused(text, tmp_path):
    write_tokens(text, tmp_path / "tokens")
    folder = TokenFolder(tmp_path / "tokens", "data.token_cache")
    index = read_index(folder)
    with pytest.raises(UserError, match="tokens.json there is of another text, .* or delete that tokens.json"):
        write_index(folder, index | {"val": []})

    class Other(Bytes):
        fingerprint = "another"

    with pytest.raises(UserError, match=r"its ids are of another tokenizer .*init_from=<run>/tokenizer"):
        token_source(str(tmp_path / "tokens"), None, None, None, None).use(Other())
    for damage in ("{", "[]", json.dumps({"version": 1}), json.dumps(index | {"version": 9})):
        (tmp_path / "tokens" / INDEX).write_text(damage)
        with pytest.raises(UserError, match=r"tokens.json.*(cannot be read|missing|must be).*stage=write_tokens"):
            written(tmp_path / "tokens")


# ---- token files of others ------------------------------------------------------------------------------------------


def ids_of(rows, before=True):
    """Ids of documents with the end-of-text token before each (llm.c) or behind each (nanoGPT)."""
    parts = [[EOT, *row.encode()] if before else [*row.encode(), EOT] for row in rows]
    return np.array([id for part in parts for id in part])


def save(path, ids):
    import h5py

    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, ids.astype(np.int32))
    elif path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            file.create_dataset("tokens", data=ids.astype(np.int32), chunks=(100,))
    elif path.stem.endswith("header"):
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, len(ids)
        path.write_bytes(header.tobytes() + ids.astype("<u2").tobytes())
    else:
        path.write_bytes(ids.astype("<u2").tobytes())


@pytest.mark.parametrize("name", ["x.bin", "x_header.bin", "x.npy", "x.h5"])
@pytest.mark.parametrize("before", [True, False])
def test_files_of_others_give_the_documents_of_their_text(tmp_path, s3, name, before, monkeypatch):
    monkeypatch.setattr("llm.data.foreign_tokens.CHUNK", 97)
    monkeypatch.setattr("llm.data.foreign_tokens.MAGIC", {(20240520, 1): (np.dtype("<u2"), "GPT-2", 256)})
    save(tmp_path / "t" / f"train_{name}", ids_of(words(60), before))
    save(tmp_path / "t" / f"val_{name}", ids_of(words(15, 200), before))
    address = put_folder(s3, tmp_path / "t", tmp_path.name)
    for source in (written(tmp_path / "t"), written(address)):
        found = documents(source, loop=False)
        assert [ids for ids, _ in found] == [Bytes().encode_document(word).tolist() for word in words(60)]
        assert documents(source, cursor=found[30][1], loop=False) == found[31:]
        assert list(texts(source, "val")) == words(15, 200)
        assert source.check().startswith("1 ") and source.tokens("train") == len(ids_of(words(60)))


def test_a_file_without_ends_is_cut_the_same_however_it_is_read(tmp_path, monkeypatch):
    ids = np.arange(3 * DOCUMENT_IDS + 100) % 256
    save(tmp_path / "t/train.bin", ids)
    file = ForeignFile.open(tmp_path / "t/train.bin")
    whole = [part.tolist() for part in file.documents(EOT, 0, 256)]
    assert [len(part) for part in whole] == [DOCUMENT_IDS] * 3 + [100]
    monkeypatch.setattr("llm.data.foreign_tokens.CHUNK", 50_000)
    assert [part.tolist() for part in file.documents(EOT, 0, 256)] == whole
    assert [part.tolist() for part in file.documents(EOT, 2, 256)] == whole[2:]


def test_what_cannot_be_the_ids_of_the_tokenizer_is_one_line(tmp_path, monkeypatch):
    def source(ids, name="train.bin", **options):
        save(tmp_path / "t" / name, np.array(ids))
        save(tmp_path / "t/val.bin", np.array([1, EOT, 2]))
        made = token_source(str(tmp_path / "t"), None, None, options.get("end"), None)
        made.use(Bytes())
        return made

    with pytest.raises(BadData, match="id 300 at place 2 is none of the 256 ordinary tokens .*data.end_of_text"):
        source([1, 2, 300])
    save(tmp_path / "t/val.bin", np.array([1, 300, 2]))
    with pytest.raises(BadData, match=r"val.bin: id 256"):
        source([1, 300, 2], end=300)
    monkeypatch.setattr("llm.data.foreign_tokens.CHECKED", 0)
    monkeypatch.setattr("llm.data.foreign_tokens.CHUNK", 4)
    late = source([1, 2, 3, 4, 5, 299])
    with pytest.raises(BadData, match="id 299 at place 5"):
        documents(late, loop=False)
    (tmp_path / "t/train.bin").unlink()
    with pytest.raises(UserError, match=r"header says the ids are GPT-2's, with 50,256 ordinary tokens; .* has 256"):
        source([1, 2], name="train_header.bin")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("train.bin", b"", "is empty"),
        ("train.bin", b"abc", "no whole number of ids"),
        ("train.bin", np.array([20240520, 1, 99] + [0] * 253, np.int32).tobytes(), "the header says 99 ids"),
        ("train.bin", np.array([20240520, 5, 0] + [0] * 253, np.int32).tobytes(), "version 5 of its header"),
        ("train.npy", b"nonsense", "no array of NumPy"),
        ("train.h5", b"nonsense", "cannot be read as HDF5"),
    ],
)
def test_damaged_files_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    save(tmp_path / "val.bin", np.array([1, 2]))
    with pytest.raises(UserError, match=message) as error:
        written(tmp_path)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_arrays_of_other_shapes_and_kinds_are_refused(tmp_path):
    import h5py

    save(tmp_path / "val.bin", np.array([1, 2]))
    for array in (np.zeros((2, 3), np.int32), np.zeros(3)):
        np.save(tmp_path / "train.npy", array)
        with pytest.raises(UserError, match="needed is one dimension of integers"):
            written(tmp_path)
    (tmp_path / "train.npy").unlink()
    with h5py.File(tmp_path / "train.h5", "w") as file:
        file["a"], file["b"] = np.zeros(3, np.int32), np.zeros(3, np.int32)
    with pytest.raises(UserError, match="needs one array of ids called tokens, found a, b"):
        written(tmp_path)
    with h5py.File(tmp_path / "train.h5", "w") as file:
        file.create_group("tokens")
    with pytest.raises(UserError, match="needs one array of ids called tokens, found tokens"):
        written(tmp_path)


def test_a_damaged_part_of_an_array_is_one_line(tmp_path):
    import h5py

    save(tmp_path / "val.bin", np.array([1, 2]))
    with h5py.File(tmp_path / "train.h5", "w") as file:
        file.create_dataset("tokens", data=np.arange(20_000) % 256, chunks=(500,), compression="gzip")
    content = bytearray((tmp_path / "train.h5").read_bytes())
    half = len(content) // 2
    content[half : half + 2000] = bytes(2000)
    (tmp_path / "train.h5").write_bytes(content)
    with pytest.raises(UserError, match="train.h5: cannot be read as HDF5"):
        documents(written(tmp_path), loop=False)


def test_splits_by_names_by_place_and_by_key(tmp_path, monkeypatch):
    for name in ("shard_0.bin", "shard_1.BIN", "shard_2.bin"):
        save(tmp_path / name, ids_of(words(3, int(name[6]))))
    by_place = written(tmp_path)
    assert [len(by_place.shards(split)) for split in ("train", "val")] == [2, 1]
    named = token_source(str(tmp_path), None, str(tmp_path / "shard_0.bin"), None, None)
    assert [str(file).rsplit("_", 1)[1] for file in named.shards("train")] == ["1.BIN", "2.bin"]
    monkeypatch.chdir(tmp_path.parent)
    here = token_source(tmp_path.name, None, str(tmp_path / "shard_0.bin"), None, None)
    assert [str(file).rsplit("_", 1)[1] for file in here.shards("train")] == ["1.BIN", "2.bin"], "relative or not"
    save(tmp_path / "my_test.bin", ids_of(words(3, 7)))
    save(tmp_path / "b_val.bin", ids_of(words(3, 8)))
    chosen = [str(tmp_path / name) for name in ("my_test.bin", "b_val.bin")]
    said = token_source(None, chosen, str(tmp_path / "shard_0.bin"), None, None)
    assert sorted(str(file) for file in said.shards("train")) == sorted(chosen), "whatever their names say"
    with pytest.raises(UserError, match="^data.train=.*: every file of it is also in data.val="):
        token_source(None, chosen, chosen, None, None)
    with pytest.raises(UserError, match="none is left to train on|none is left to validate"):
        token_source(str(tmp_path / "shard_0.bin"), None, None, None, None)
    with pytest.raises(UserError, match="data.path is not set"):
        token_source(None, None, None, None, None)
    with pytest.raises(UserError, match="there is no tokens.json and no token file"):
        token_source(str(tmp_path / "none"), None, None, None, None)


def test_a_cache_in_a_store_is_written_once_and_read(text, s3, tmp_path, capsys):
    address = f"s3://bucket/{tmp_path.name}/cache"
    for count in (3, 0):
        cached = CachedDocuments(LocalDocuments(text), Bytes(), address)
        assert documents(cached, loop=False) == of_text(LocalDocuments(text), loop=False)
        documents(cached, "val", loop=False)
        assert capsys.readouterr().out.count("token cache: ") == count
    name = cached.name_of(cached.text.shards("val")[0])
    assert read_record(TokenFolder(address, "data.token_cache").find(name)).rows == 20
