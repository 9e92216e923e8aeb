"""Document sources: shards and splits, cursors, ranks, text files, bad input."""

import errno
import gzip
import json
import os
import re
import zipfile
import zlib
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import compose
from data_files import read, words, write
from omegaconf import OmegaConf

from llm.data.documents import LocalDocuments, texts
from llm.data.embedded_documents import EmbeddedDocuments
from llm.data.records import broken
from llm.data.sources import build_source
from llm.data.text_mixture import MixedDocuments
from llm.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Three parquet shards: 40 and 25 training documents, 30 for validation."""
    for shard, (n, first) in enumerate([(40, 0), (25, 100), (30, 200)]):
        write(tmp_path / f"shard_{shard}.parquet", words(n, first))
    return tmp_path


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst", "txt", "txt.gz", "txt.zst"])
def test_shards_in_name_order_and_the_last_validates(tmp_path, suffix):
    for name, first in [("b", 100), ("a", 0), ("c", 200)]:
        write(tmp_path / "sub" / f"{name}.{suffix}", words(20, first))
    source = LocalDocuments(tmp_path)
    assert read(source) == words(20) + words(20, 100) == list(texts(source))
    assert read(source, "val") == words(20, 200)
    assert f"validation: c.{suffix}, the last file, as no name says what validates" in source.check()
    assert read(LocalDocuments(f"{tmp_path}/sub/[ab].{suffix}"), "val") == words(20, 100)  # a glob of two


def test_a_large_file_that_nobody_chose_to_hold_out_is_said(tmp_path):
    for name, count in [("a", 60), ("b", 40)]:
        write(tmp_path / f"{name}.txt", ["a word " * 40] * count)
    (share,) = re.findall(r"this is (\d+)% of the bytes and not trained on", LocalDocuments(tmp_path).check())
    assert 39 <= int(share) <= 41
    assert "with data.val_size=20 only the last 20 documents of it would be" in LocalDocuments(tmp_path).check()
    assert "of the bytes" not in LocalDocuments(tmp_path, val_size=20).check()
    write(tmp_path / "a.txt", ["a word " * 40] * 400)  # one in eleven is no surprise
    assert "of the bytes" not in LocalDocuments(tmp_path).check()
    (tmp_path / "b.txt").rename(tmp_path / "val.txt")  # and a name is a choice
    write(tmp_path / "a.txt", ["a word " * 40] * 10)
    assert "of the bytes" not in LocalDocuments(tmp_path).check()


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "txt"])
@pytest.mark.parametrize("count, held_out", [(2, 1), (50, 3)])
def test_a_single_file_lends_its_last_rows_to_validation(tmp_path, suffix, count, held_out):
    source = LocalDocuments(write(tmp_path / f"all.{suffix}", words(count)))
    assert read(source) == words(count)[:-held_out]
    assert read(source, "val") == words(count)[-held_out:]
    assert f"the last {held_out} of {count} documents of" in source.check()


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "txt"])
def test_val_size_documents_of_the_last_file_validate(tmp_path, suffix):
    path = write(tmp_path / f"b.{suffix}", words(20))
    alone = LocalDocuments(path, val_size=7)
    assert (read(alone), read(alone, "val")) == (words(13), words(7, 13))
    write(tmp_path / f"a.{suffix}", words(5, 100))
    two = LocalDocuments(tmp_path, val_size=7)
    assert (read(two), read(two, "val")) == (words(5, 100) + words(13), words(7, 13))
    assert f"the last 7 of 20 documents of b.{suffix}" in two.check()
    assert read(LocalDocuments(tmp_path, val_size=20)) == words(5, 100)
    with pytest.raises(UserError, match="data.val_size=21: .* holds 20 documents"):
        LocalDocuments(tmp_path, val_size=21).check()
    with pytest.raises(UserError, match="holds 20 documents, and data.val_size=20 are to validate"):
        LocalDocuments(path, val_size=20).check()


def test_empty_documents_are_skipped(tmp_path):
    write(tmp_path / "a.parquet", ["", "one", None, " \n", "two", ""])
    write(tmp_path / "b.parquet", ["", "three"])
    source = LocalDocuments(tmp_path)
    assert read(source) == ["one", "two"] and read(source, "val") == ["three"]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "txt"])
def test_cursor_continues_after_every_document(tmp_path, suffix):
    for name, first in [("a", 0), ("b", 100), ("c", 200)]:
        write(tmp_path / f"{name}.{suffix}", words(20, first))
    source = LocalDocuments(tmp_path)
    stream = source.iterate("train")
    straight = [next(stream) for _ in range(100)]  # two and a half epochs
    assert [cursor["epoch"] for _, cursor in straight] == [0] * 40 + [1] * 40 + [2] * 20
    for i in (0, 15, 19, 20, 39, 40, 77):
        continued = source.iterate("train", straight[i][1])
        assert [next(continued) for _ in range(5)] == straight[i + 1 : i + 6]


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_read_disjoint_documents(folder, world):
    source = LocalDocuments(folder)
    parts = [read(source, rank=rank, world=world) for rank in range(world)]
    assert Counter(text for part in parts for text in part) == Counter(read(source))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_more_ranks_than_documents_starve_nobody(tmp_path):
    source = LocalDocuments(write(tmp_path / "two.jsonl", ["only one", "held out"]))
    for rank in range(3):
        stream = source.iterate("train", rank=rank, world=3)
        assert [next(stream)[1]["epoch"] for _ in range(2)] == [rank, rank + 3]


def test_text_files_are_cut_at_paragraphs_lines_and_marks(tmp_path):
    paragraph = "A line of some length, written again and again.\n" * 10 + "\n"  # 481 characters
    write(tmp_path / "v.txt", ["validation"])
    (tmp_path / "a.txt").write_text(paragraph * 12)
    cut = read(LocalDocuments(tmp_path))
    assert len(cut) == 3 and {len(text) for text in cut} == {5 * 481 - 2, 2 * 481 - 2}
    (tmp_path / "a.txt").write_bytes(b"first story\r\n\r\nstill the first\r\n<|endoftext|>\r\nsecond\r\n")
    assert read(LocalDocuments(tmp_path)) == ["first story\n\nstill the first", "second"]
    line = "no blank line anywhere\n"
    (tmp_path / "a.txt").write_text(line * 1000)
    assert [len(text) for text in read(LocalDocuments(tmp_path))] == [348 * 23 - 1, 348 * 23 - 1, 304 * 23 - 1]
    (tmp_path / "a.txt").write_text("é" * 100_000)  # one line: cut, but never inside a character
    assert "".join(read(LocalDocuments(tmp_path))) == "é" * 100_000


def test_embedded_documents_are_a_source_like_any_other():
    source = EmbeddedDocuments(size=30, seed=1, val_size=10)
    train, val = read(source), read(source, "val")
    assert len(train) == 30 and len(val) == 10 and not set(train) & set(val)
    assert train == read(EmbeddedDocuments(size=30, seed=1, val_size=10)) != read(EmbeddedDocuments(30, 2, 10))
    stream = source.iterate("train")
    first = [next(stream) for _ in range(40)]
    assert next(source.iterate("train", first[33][1]))[0] == first[34][0] == train[4]
    assert "30 generated documents" in source.check()
    with pytest.raises(UserError, match="data.size=0"):
        EmbeddedDocuments(size=0)


# ---- mixtures -------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixture(tmp_path):
    """60 long and 200 short training documents; the short ones are to give a quarter of the characters."""
    write(tmp_path / "long" / "a.jsonl", [f"L{i:03d}" + "." * (i % 90) for i in range(60)])
    write(tmp_path / "long" / "b.jsonl", ["Lval"] * 5)
    write(tmp_path / "short" / "a.parquet", [f"S{i:03d}" + "." * (i % 9) for i in range(200)])
    write(tmp_path / "short" / "b.parquet", ["Sval"] * 5)
    weights = {"long": 3.0, "short": 1.0}
    return MixedDocuments({name: (LocalDocuments(tmp_path / name), weight) for name, weight in weights.items()})


def test_a_mixture_follows_its_weights_from_the_start(mixture):
    assert "75.0% long: 2 jsonl files" in mixture.check() and "25.0% short: 2 parquet files" in mixture.check()
    stream = mixture.iterate("train")
    for count in (20, 200, 1000):
        documents = [next(stream) for _ in range(count)]
        chars = documents[-1][1]["chars"]
        assert chars["long"] / 3 == pytest.approx(chars["short"], abs=100)
    assert documents[-1][1]["sources"]["long"]["epoch"] > documents[-1][1]["sources"]["short"]["epoch"]


def test_sources_of_a_mixture_leave_out_bad_rows_where_all_are_to(tmp_path):
    for name, row in {"good": '{"text": "one"}', "bad": '{"text": 1}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text((row + '\n{"text": "two"}\n') * 4)
    sources = f"{{good: {{path: {tmp_path}/good}}, bad: {{path: {tmp_path}/bad, BAD}}}}"

    def mixed(own: str, *more: str):
        lines = ["data=mixture", f"data.sources={sources.replace(', BAD', own)}", *more]
        return build_source(compose("train", *lines).data, str(tmp_path))

    for source in (mixed("", "data.bad_rows=skip"), mixed(", bad_rows: skip")):
        source.check()
        assert set(read(source)) == {"one", "two"}
    for own in ("", ", bad_rows: stop"):
        more = ["data.bad_rows=skip"] if own else []
        with pytest.raises(UserError, match=r"data.sources.bad.bad_rows=skip"):
            mixed(own, *more).check()


def test_one_pass_over_a_mixture_delivers_every_document(mixture):
    assert len(set(read(mixture))) == len(read(mixture)) == 260
    assert Counter(read(mixture, "val")) == {"Lval": 5, "Sval": 5}


def test_a_mixture_resumes_exactly_on_any_number_of_ranks(mixture):
    stream = mixture.iterate("train")
    straight = [next(stream) for _ in range(700)]
    for i in (0, 33, 399):
        cursor = json.loads(json.dumps(straight[i][1]))
        continued = mixture.iterate("train", cursor)
        assert [next(continued) for _ in range(50)] == straight[i + 1 : i + 51]
    texts_in_order = [text for text, _ in straight]
    parts = [mixture.iterate("train", rank=rank, world=3) for rank in range(3)]
    taken = [[next(part) for _ in range(40 + rank)] for rank, part in enumerate(parts)]
    assert [text for text, _ in taken[1]] == texts_in_order[1::3][:41]
    positions = [{"cursor": part[-1][1], "packer": {}} for part in taken]
    behind = min(positions, key=lambda position: position["cursor"]["index"])["cursor"]
    cursor = behind | {"consumed": [[position["cursor"]["index"] for position in positions]]}  # as positions_for does
    rest = [next(mixture.iterate("train", cursor, rank, 2))[0] for rank in range(2)]
    seen = {i for rank, part in enumerate(taken) for i in range(rank, 3 * len(part), 3)}
    unseen = [i for i in range(700) if i not in seen]
    assert rest == [texts_in_order[next(i for i in unseen if i % 2 == rank)] for rank in range(2)]


def test_mixtures_by_configuration(tmp_path):
    def built(**sources):
        return build_source(
            OmegaConf.create({"name": "mixture", "streaming": False, "workers": 1, "sources": sources}), tmp_path
        )

    write(tmp_path / "a.txt", ["one", "two"])
    path = str(tmp_path / "a.txt")
    assert read(built(a={"path": path, "weight": 2}, b={"path": path}, off={"weight": 0})) == ["one", "one"]
    with pytest.raises(UserError, match="data.sources: no source has a weight above 0"):
        built(a={"path": path, "weight": 0})
    for values, message in [
        ({"weihgt": 2}, "Key 'weihgt' not in 'SourceSpec'. Keys: weight, path"),
        ({"weight": "x"}, "Value 'x' of type 'str' could not be converted to Float"),
        ({"weight": -1}, "data.sources.a.weight=-1.0: must be at least 0"),
        (path, "Keys: weight, path"),
    ]:
        with pytest.raises(UserError, match=message):
            built(a=values)
    for values in ({}, {"path": path, "repo": "a/b"}):
        with pytest.raises(UserError, match="data.sources.a: set either path"):
            built(a=values)
    with pytest.raises(UserError, match="data.sources.a.path=nowhere: no such file"):
        built(a={"path": "nowhere"})
    assert read(built(a={"train": path})) == ["one"]
    for values in ({"path": path, "shards": 1}, {"path": path, "revision": "v1"}, {"repo": "a/b", "val": path}):
        other = list(values)[1]
        with pytest.raises(UserError, match=rf"data.sources.a.{other}=.* is not read with data.sources.a"):
            built(a=values)
    write(tmp_path / "c.parquet", words(4))
    with pytest.raises(UserError, match="data.sources.c.column=body does not exist"):
        built(c={"path": str(tmp_path / "c.parquet"), "column": "body"}).check()


# ---- bad input ------------------------------------------------------------------------------------------------------


def corrupt_parquet(path):
    write(path, words(200))
    content = bytearray(path.read_bytes())
    content[200:1500] = bytes(1300)  # a page, not the footer
    path.write_bytes(content)


BAD_FILES = {  # name of the training file -> how it is made, what the error says, whether check() finds it
    "cut.parquet": (
        lambda p: p.write_bytes(write(p, words(99)).read_bytes()[:-50]),
        r"cut.parquet: damaged after row 0 \(no parquet follows\)",
        True,
    ),
    "zero.parquet": (lambda p: p.write_bytes(b""), "zero.parquet is empty", True),
    "page.parquet": (corrupt_parquet, "page.parquet: damaged after row", False),
    "column.parquet": (
        lambda p: pq.write_table(pa.table({"content": ["a"], "n": [1]}), p),
        "data.column=text does not exist. Text columns here: content",
        True,
    ),
    "type.parquet": (
        lambda p: pq.write_table(pa.table({"text": [1, 2]}), p),
        "data.column=text is of type int64. Text columns here: none",
        True,
    ),
    "utf.parquet": (
        lambda p: pq.write_table(pa.table({"text": pa.array([b"ok", b"\xff\xfe"]).view(pa.string())}), p),
        "utf.parquet: row 2: not utf-8|utf.parquet: row 2: not UTF-8",
        True,
    ),
    "json.jsonl": (lambda p: p.write_text('{"text": "a"}\n{"text": \n'), "json.jsonl: line 2: not valid JSON", True),
    "key.jsonl": (lambda p: p.write_text('{"body": "a"}\n'), "line 1: no data.column=text: its keys are body", True),
    "list.jsonl": (lambda p: p.write_text("[1]\n"), "line 1: no data.column=text: it is not an object", True),
    "kind.jsonl": (lambda p: p.write_text('{"text": 3}\n'), "line 1: text is a int, not text", True),
    "utf.jsonl": (
        lambda p: p.write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n'),
        r"utf.jsonl: line 2: not UTF-8 text.*data.encoding=utf-16, or by language .*cp1253 \(Greek\)",
        True,
    ),
    "cut.jsonl.gz": (
        lambda p: p.write_bytes(write(p, words(500)).read_bytes()[:-200]),
        "cut.jsonl.gz: damaged after line",
        False,
    ),
    "cut.jsonl.zst": (
        lambda p: p.write_bytes(write(p, words(500)).read_bytes()[:-200]),
        "cut.jsonl.zst: damaged after line",
        False,
    ),
    "nozst.jsonl.zst": (lambda p: p.write_text("plain"), "nozst.jsonl.zst: damaged after line 0", True),
    "nogz.jsonl.gz": (lambda p: p.write_text("plain"), "nogz.jsonl.gz: damaged after line 0", True),
    "utf.txt": (lambda p: p.write_bytes(b"one\ntwo\n\n" + "drei\n".encode("utf-16")), "utf.txt: line 4", True),
    "blank.txt": (lambda p: p.write_text("\n \n"), r"\(train split: blank.txt\): there is no document", True),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named_with_their_row(tmp_path, name):
    make, message, cheap = BAD_FILES[name]
    make(tmp_path / name)
    write(tmp_path / f"z.{name.split('.', 1)[1]}", words(3))
    with pytest.raises(UserError, match=message):
        LocalDocuments(tmp_path).check()
        assert not cheap
        read(LocalDocuments(tmp_path))


@pytest.mark.parametrize(
    "error,said",
    [
        (OSError(errno.EIO, "Input/output error"), "cannot be read after line 3: the device reports an error."),
        (OSError("Failed to open. Detail: [errno 24] Too many open files"), "after line 3: too many open files"),
        (EOFError("Compressed file ended before ..."), r"damaged after line 3 \(the file ends too early\). Fetch it"),
        (zlib.error("Error -3 while decompressing data"), r"damaged after line 3 \(no gz follows\). Fetch it again."),
    ],
)
def test_a_broken_read_is_explained_in_words_of_ours(tmp_path, error, said):
    """Words of libraries stay in the cause; only damage asks to fetch the file again."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"x"))
    problem = str(broken(path, error, "line 3"))
    assert re.search(said, problem) and str(error) not in problem
    assert ("Fetch" in problem) == ("damaged" in problem)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "jsonl.gz"])
def test_long_rows_are_read_one_by_one_up_to_a_limit(tmp_path, monkeypatch, suffix):
    rows = ["a short one", "b" * 3_000, "c" * 900, "another short one"]
    write(tmp_path / f"a.{suffix}", rows)
    write(tmp_path / f"z.{suffix}", words(3))
    monkeypatch.setattr("llm.data.formats.READ_BYTES", 1_000)  # less than one row
    assert read(LocalDocuments(tmp_path)) == rows
    for module in ("formats", "records"):
        monkeypatch.setattr(f"llm.data.{module}.DOCUMENT_BYTES", 2_000)
    with pytest.raises(UserError, match=rf"a.{suffix}: (row|line) 2: longer than .*Cut it"):
        read(LocalDocuments(tmp_path))


def test_paths_without_data_are_refused(tmp_path):
    with pytest.raises(UserError, match="data.path=None is not set"):
        LocalDocuments(None)
    with pytest.raises(UserError, match="data.path=.*/nowhere: no such file or folder"):
        LocalDocuments(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no parquet, arrow"):
        LocalDocuments(tmp_path)
    write(tmp_path / "a.parquet", ["a", "b"])
    write(tmp_path / "README.txt", ["not data"])
    with pytest.raises(UserError, match=r"mixes 1 parquet and 1 txt files.*data.path='.*/\*\*/\*.parquet'"):
        LocalDocuments(tmp_path)
    assert read(LocalDocuments(tmp_path / "*.parquet")) == ["a"]


@pytest.mark.parametrize("rows", [[], ["alone"]])
def test_a_validation_split_that_would_be_empty(tmp_path, rows):
    for suffix in ("parquet", "jsonl"):
        path = tmp_path / f"{len(rows)}.{suffix}"
        pq.write_table(pa.table({"text": pa.array(rows, pa.string())}), path) if suffix == "parquet" else write(
            path, rows
        )
        with pytest.raises(UserError, match="is empty|a split would be empty"):
            LocalDocuments(path).check()
    write(tmp_path / "set" / "a.parquet", words(5))
    write(tmp_path / "set" / "b.parquet", ["", " "])
    with pytest.raises(UserError, match=r"\(val split: b.parquet\): there is no document"):
        LocalDocuments(tmp_path / "set").check()


def test_a_cursor_past_the_shards_that_are_left(folder):
    with pytest.raises(UserError, match="position is in shard 2, but there are 2 shards now"):
        next(LocalDocuments(folder).iterate("train", {"epoch": 0, "shard": 2, "row": 0, "index": 9}))


def test_the_name_of_an_archive_says_what_its_members_are(tmp_path):
    for name in ("train", "test", "val"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr("data/rows.jsonl", f'{{"text": "{name}"}}\n' * 3)
    source = LocalDocuments(str(tmp_path))
    assert {*read(source)} == {"train"} and {*read(source, "val")} == {"val"}
    assert source.size_of(source.files[0]) == 3 * len('{"text": "train"}\n'), "and not that of the archive"
    with zipfile.ZipFile(tmp_path / "test.zip", "a") as archive:
        archive.writestr("data/more.jsonl", '{"text": "more"}\n')
    alone = LocalDocuments(str(tmp_path / "test.zip"))
    assert len({*read(alone), *read(alone, "val")}) == 2, "named by the user, whatever its name"
    other = LocalDocuments(os.path.relpath(tmp_path), val=str(tmp_path / "test.zip"))
    assert {*read(other)} == {"train"} and {*read(other, "val")} == {"test", "more"}


def test_a_folder_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", ["one", "two"])

    def walk(root, followlinks, onerror):
        onerror(PermissionError(13, "Permission denied", f"{root}/sub"))

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(UserError, match="sub: cannot be read .Permission denied"):
        LocalDocuments(str(tmp_path))
