"""Every format of text in every compression, splits by name, what is left out, and rows that cannot be used."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import time
import zipfile
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import torch
from conftest import compose
from data_files import read, words, write
from omegaconf import OmegaConf

from callbacks.checkpoint import StepCheckpoint
from llm.data.documents import LocalDocuments
from llm.data.files import find_data_files, format_of
from llm.data.formats import Column, count_rows, read_rows
from llm.data.records import BadRow, bad_rows_error, parse, read_records
from llm.data.sources import build_source
from llm.data.splits import divide, split_of
from llm.data.text_mixture import MixedDocuments
from llm.errors import UserError
from llm.stages.run_stage import run_stage

ROWS = ["one, two", 'three "four"\nfive', "sechs äöü", "七"]


def table(rows, delimiter):
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([["id", "text"], *enumerate(rows)])
    return out.getvalue().encode()


def arrow(rows, new):
    out, made = io.BytesIO(), pa.table({"id": range(len(rows)), "text": rows})
    with new(out, made.schema) as writer:
        writer.write_table(made)
    return out.getvalue()


def parquet(rows):
    out = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(rows)), "text": rows}), out)
    return out.getvalue()


def objects(rows):
    return [{"id": number, "text": row} for number, row in enumerate(rows)]


FORMATS = {  # name of a file -> its content
    "lines.jsonl": lambda rows: "\n".join(map(json.dumps, objects(rows))).encode(),
    "lines.json": lambda rows: "\n".join(map(json.dumps, objects(rows))).encode(),
    "array.json": lambda rows: json.dumps(objects(rows)).encode(),
    "array.jsonl": lambda rows: json.dumps(objects(rows)).encode(),
    "pretty.json": lambda rows: json.dumps(objects(rows), indent=2).encode(),
    "table.csv": lambda rows: table(rows, ","),
    "table.tsv": lambda rows: table(rows, "\t"),
    "table.parquet": parquet,
    "file.arrow": lambda rows: arrow(rows, pa.ipc.new_file),
    "stream.arrow": lambda rows: arrow(rows, pa.ipc.new_stream),
    **{f"text.{suffix}": lambda rows: "\n<|endoftext|>\n".join(rows).encode() for suffix in ("txt", "md", "py", "c")},
}
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("packed", [*PACK, ".zip"])
@pytest.mark.parametrize("name", FORMATS)
def test_text_in_every_format_and_compression(tmp_path, name, packed):
    content = FORMATS[name](ROWS)
    if packed == ".zip":
        with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
            archive.writestr(f"data/{name}", content)
            archive.writestr("__MACOSX/x.txt", "no data")
    else:
        (tmp_path / (name + packed)).write_bytes(PACK[packed](content))
    source = LocalDocuments(tmp_path, val_size=1)
    source.check()
    assert (read(source), read(source, "val")) == (ROWS[:3], ROWS[3:])
    stream = source.iterate("train")
    straight = [next(stream) for _ in range(5)]
    assert next(source.iterate("train", straight[1][1])) == straight[2]


@pytest.mark.parametrize("name", [name for name in FORMATS if not name.startswith("text")])
def test_records_of_every_format_have_their_keys_and_numbers(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FORMATS[name](ROWS))
    found = list(read_records(path, 2))
    assert [row["text"] for _, row in found] == ROWS[2:] and [number for number, _ in found][0] == 3
    assert str(found[0][1]["id"]) == "2"


def test_a_conversation_alone_on_a_line_is_one_row(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for name, content in [("a.jsonl", json.dumps(turns)), ("b.json", json.dumps(turns, indent=1))]:
        (tmp_path / name).write_text(content)
        assert list(read_records(tmp_path / name)) == [(1, turns)]


def test_an_array_over_several_chunks_and_one_that_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("llm.data.records.CHUNK", 7)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(objects(words(50)), indent=1))
    assert [row["text"] for _, row in read_records(path)] == words(50)
    path.write_text(json.dumps(objects(words(50)))[:-300])
    with pytest.raises(UserError, match=r"a.json: row \d+ is not valid JSON"):
        list(read_records(path))


@pytest.mark.parametrize("between", ["", "\n", ",\n", "\n\n"])
@pytest.mark.parametrize("indent", [None, 1])
def test_arrays_that_follow_each_other_are_all_read(tmp_path, monkeypatch, between, indent):
    monkeypatch.setattr("llm.data.records.CHUNK", 7)
    arrays = [objects(ROWS), [], objects(words(9)), objects(words(5, 9))]
    path = tmp_path / "a.jsonl"
    path.write_text(between.join(json.dumps(rows, indent=indent) for rows in arrays))
    rows = list(read_rows(path, Column("text"), 0))
    assert rows == [*ROWS, *words(14)] and count_rows(path, Column("text")) == len(rows)
    path.write_text(path.read_text() + '\n{"text": "lost"}\n')
    with pytest.raises(UserError, match="a.jsonl: behind row 18, the last of an array, stands .* no array of rows"):
        list(read_records(path))


def test_conversations_over_several_lines_that_follow_each_other_are_a_row_each(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "a.json").write_text("\n".join([json.dumps(turns, indent=1)] * 2))
    assert list(read_records(tmp_path / "a.json")) == [(1, turns), (2, turns)]


def test_nested_columns_and_columns_of_bytes(tmp_path):
    docs = [{"doc": {"text": row, "n": 1}} for row in ROWS]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, docs)))
    pq.write_table(pa.Table.from_pylist(docs), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert read(LocalDocuments(tmp_path / name, "doc.text", val_size=1)) == ROWS[:3]
    pq.write_table(pa.table({"text": [row.encode("cp1252") for row in ROWS[:3]]}), tmp_path / "b.parquet")
    assert read(LocalDocuments(tmp_path / "b.parquet", val_size=1, encoding="cp1252")) == ROWS[:2]
    with pytest.raises(UserError, match="data.column=text does not exist. Text columns here: doc.text"):
        LocalDocuments(tmp_path / "a.parquet").check()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "cp1252", "utf-16", "utf-32"])
def test_encodings(tmp_path, encoding):
    rows = ["über den Wolken", "déjà vu"]
    (tmp_path / "a.txt").write_bytes("\n<|endoftext|>\n".join(rows).encode(encoding))
    lines = "\n".join(json.dumps({"text": row}, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_bytes(lines.encode(encoding))
    for name in ("a.txt", "a.jsonl"):
        source = LocalDocuments(tmp_path / name, encoding=encoding)
        assert (read(source), read(source, "val")) == (rows[:1], rows[1:])


@pytest.mark.parametrize("name", ["array.json", "lines.jsonl", "table.csv", "text.txt"])
@pytest.mark.parametrize("encoding, reason", [("utf-16", "does not start with BOM"), ("utf-32", "not in range")])
def test_a_file_of_another_encoding_is_named(tmp_path, name, encoding, reason):
    path = tmp_path / name
    path.write_bytes(FORMATS[name](ROWS))
    with pytest.raises(UserError, match=f"{name}: not {encoding}.* text .*{reason}.* data.encoding=utf-8"):
        LocalDocuments(path, encoding=encoding).check()
    with pytest.raises(UserError, match=f"{name}: not {encoding}"):
        list(read_records(path, encoding=encoding))


@pytest.mark.parametrize("encoding", ["nonsense", "base64", "rot13", "undefined", "idna", "punycode"])
def test_an_encoding_that_is_none_of_text_is_named(tmp_path, encoding):
    (tmp_path / "a.txt").write_text("text")
    pq.write_table(pa.table({"text": [b"text"]}), tmp_path / "a.parquet")
    for name in ("a.txt", "a.parquet"):
        with pytest.raises(UserError, match=f"data.encoding={encoding}: Python knows no such encoding of text"):
            LocalDocuments(tmp_path / name, encoding=encoding).check()


def test_separators_stand_inside_lines_or_are_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("llm.data.formats.TXT_LINE_BYTES", 5)  # a separator lies across pieces
    (tmp_path / "a.txt").write_text("one</s>two\n\nstill two</s>" + "x" * 9_000 + "</s>\nlast")
    assert read(LocalDocuments(tmp_path, val_size=1, separator="</s>")) == ["one", "two\n\nstill two", "x" * 9_000]
    (tmp_path / "a.txt").write_text("a\nb\nc")
    assert read(LocalDocuments(tmp_path, val_size=1, separator="\\n")) == ["a", "b"]


# ---- files and splits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, split",
    [
        ("data/train-00000-of-00005.parquet", "train"),
        ("train/x.jsonl", "train"),
        ("wiki.valid.txt", "val"),
        ("validation.jsonl", "val"),
        ("dev/part1.csv", "val"),
        ("train/test.jsonl", "test"),
        ("my_train.jsonl.gz", "train"),
        ("test00.txt", "test"),
        ("latest.txt", None),
        ("数据val.txt", "val"),
        ("데이터test한.txt", "test"),
        ("festéval.txt", None),
        ("feste\u0301val.txt", None),
        ("training/contest.txt", None),
        ("src/test_x.py", None),
        ("test/x.py", "test"),
    ],
)
def test_splits_by_name(name, split):
    assert split_of(name) == split


def test_names_divide_a_folder(tmp_path):
    for number, name in enumerate(("test", "train", "validation")):
        write(tmp_path / f"{name}.jsonl", words(5, 100 * number))
    source = LocalDocuments(tmp_path)
    assert (read(source), read(source, "val")) == (words(5, 100), words(5, 200))
    assert "validation: validation.jsonl, by its name; left out: test.jsonl, the test split" in source.check()
    fewer = LocalDocuments(tmp_path, val_size=2)
    assert (read(fewer), read(fewer, "val")) == (words(5, 100), words(2, 203))
    assert "validation: the last 2 of 5 documents of validation.jsonl, by its name" in fewer.check()
    assert read(LocalDocuments(tmp_path, val_size=9), "val") == words(5, 200)
    (tmp_path / "validation.jsonl").unlink()
    source = LocalDocuments(tmp_path)  # the test file does not validate either
    assert (read(source), read(source, "val")) == (words(4, 100), words(1, 104))
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(UserError, match="test.jsonl: by their names none .* is to be trained on"):
        LocalDocuments(tmp_path)
    assert divide(["b", "val/a", "test.txt"]) == ([0], [1], [2])


def test_named_files_win_over_names(tmp_path):
    for number, name in enumerate(("a", "b", "test")):
        write(tmp_path / f"{name}.jsonl", words(5, 100 * number))
    source = LocalDocuments(tmp_path, val=str(tmp_path / "a.*"))
    assert (read(source), read(source, "val")) == (words(5, 100), words(5))
    assert "validation: a.jsonl, by data.val; left out" in source.check()
    some = LocalDocuments(tmp_path, key="data.sources.x", val=str(tmp_path / "a.*"), val_size=2)
    assert "validation: the last 2 of 5 documents of a.jsonl, by data.sources.x.val" in some.check()
    both = LocalDocuments(None, train=f"{tmp_path}/test.jsonl", val=[f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"])
    assert "validation: 2 files, by data.val" in both.check()
    source = LocalDocuments(None, train=[f"{tmp_path}/test.jsonl", f"{tmp_path}/a.jsonl"], val=f"{tmp_path}/b.jsonl")
    assert (read(source), read(source, "val")) == (words(5) + words(5, 200), words(5, 100))


def test_files_for_validation_that_data_val_passes_over_are_told(tmp_path):
    for number, name in enumerate(("a", "val", "b")):
        write(tmp_path / f"{name}.jsonl", words(5, 100 * number))
    said = "left out: val.jsonl, for validation by name, as data.val names other files"
    assert said in LocalDocuments(tmp_path, val=str(tmp_path / "b.jsonl")).check()
    assert "left out" not in LocalDocuments(tmp_path, val=str(tmp_path / "val.jsonl")).check()


def test_files_that_all_validate_leave_none_to_train_on(tmp_path):
    write(tmp_path / "a.jsonl", words(5))
    file = str(tmp_path / "a.jsonl")
    for key, named in (("data.train", {"path": None, "train": [file]}), ("data.path", {"path": tmp_path})):
        with pytest.raises(UserError, match=f"^{key}=.*: every file of it is also in data.val=.*Leave out data.val"):
            LocalDocuments(val=file, **named)


def test_what_is_left_out_is_said_and_links_are_followed(tmp_path):
    folder, other = tmp_path / "data", tmp_path / "other"
    write(folder / "a.txt", words(3))
    write(other / "b.txt", words(3, 100))
    write(folder / ".hidden.txt", ["hidden"])
    for number in range(3):
        (folder / f"{number}.md").write_text("# notes")
    os.symlink(other, folder / "linked")
    os.symlink(folder, other / "circle")
    os.symlink("nowhere", folder / "gone.txt")
    found = find_data_files(folder, "data.path")
    assert found.names == ["a.txt", "linked/b.txt"]
    assert found.left_out == "left out: 3 .md files, 1 broken link"
    assert found.left_out in LocalDocuments(folder).check()
    for path in (folder / "a.txt", other / "b.txt"):
        path.unlink()
    assert len(find_data_files(folder, "data.path").files) == 3  # nothing but .md


def test_the_larger_kind_is_proposed(tmp_path):
    write(tmp_path / "README.txt", ["about the data"])
    write(tmp_path / "sub" / "a.jsonl.gz", words(99))
    with pytest.raises(UserError, match=r"mixes 1 jsonl and 1 txt files.*data.path='.*/\*\*/\*.jsonl.gz'") as error:
        LocalDocuments(tmp_path)
    assert read(LocalDocuments(str(error.value).split("'")[1], val_size=9)) == words(90)
    write(tmp_path / "csv" / "notes.txt", ["small"])
    (tmp_path / "csv" / "a.csv").write_bytes(table(words(99), ","))
    with pytest.raises(UserError, match=r"mixes 1 csv and 1 txt files.*\*.csv'"):
        LocalDocuments(tmp_path / "csv")


def test_content_wins_over_a_wrong_suffix(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(parquet(words(9)))
    (tmp_path / "b.jsonl").write_bytes(gzip.compress(FORMATS["lines.jsonl"](words(9, 100))))
    source = LocalDocuments(tmp_path)
    assert (read(source), read(source, "val")) == (words(9), words(9, 100))
    assert "a.jsonl is parquet by its content" in source.check()
    assert format_of(tmp_path / "b.jsonl").compression == "gz"


# ---- bad rows -------------------------------------------------------------------------------------------------------


BAD_LINES = [b'{"text": "cut', b'{"body": 1}', b'{"text": 7}', b"[1]", b'{"text": "\xff"}']


def test_all_bad_rows_are_found_before_training(tmp_path):
    good = [json.dumps({"text": row}).encode() for row in words(20)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*good[:10], *BAD_LINES * 3, *good[10:]]))
    write(tmp_path / "b.jsonl", words(3, 100))
    with pytest.raises(UserError) as error:
        LocalDocuments(tmp_path).check()
    message = str(error.value)
    assert message.count("a.jsonl: line") == 10 and "; and 5 more" in message and "data.bad_rows=skip" in message
    source = LocalDocuments(tmp_path, bad_rows="skip")
    assert "skipped: 15 bad rows" in source.check()
    assert read(source) == words(20) == read(source)
    assert source.skipped == {str(tmp_path / "a.jsonl"): 15} == MixedDocuments({"a": (source, 1.0)}).skipped


def test_a_bad_row_counts_once_wherever_reading_begins(tmp_path):
    good = [json.dumps({"text": row}).encode() for row in words(6)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*good[:2], BAD_LINES[0], *good[2:4], BAD_LINES[1], *good[4:]]))
    write(tmp_path / "b.jsonl", words(3, 100))
    source = LocalDocuments(tmp_path, bad_rows="skip")
    cursors = [cursor for _, cursor in source.iterate("train", loop=False)]
    for cursor in cursors[:-1]:
        assert list(source.iterate("train", cursor, loop=False))
    assert source.skipped == {str(tmp_path / "a.jsonl"): 2}


def test_a_key_that_stands_twice_in_a_packed_file_spoils_its_row_only(tmp_path):
    """Go on behind the row; a conversation of which one turn is bad is bad as a whole."""
    turns = ['{"role": "user", "content": "a"}', '{"role": "assistant", "content": "b", "content": "c"}']
    for name, text, rows in (
        ("array", '[{"text": "a", "text": "b"}, {"text": "c"}]', [BadRow, dict]),
        ("lines", '{\n"text": "a",\n"text": "b"}\n{"text": "c"}', [BadRow, dict]),
        ("turns", f"[{', '.join(turns)}][{turns[0]}]", [BadRow, list]),
    ):
        (tmp_path / f"{name}.json").write_text(text)
        found = [row for _, row in read_records(tmp_path / f"{name}.json")]
        assert [type(row) for row in found] == rows, name
        assert "stands there twice" in found[0].reason


def test_a_wide_row_with_a_key_twice_is_refused_fast():
    line = ",".join(f'"k{number}": 1' for number in range(50_000))
    start = time.process_time()
    assert "the key 'k49999' stands there twice" in parse(f'{{{line}, "k49999": 2}}', "a.jsonl", 1).reason
    assert time.process_time() - start < 2


@pytest.mark.parametrize("limit", ["SCAN_SECONDS", "SCAN_BYTES"])
def test_the_search_for_bad_rows_is_bounded_and_says_so(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(f"llm.data.documents.{limit}", -1)
    for name in "abc":
        write(tmp_path / f"{name}.jsonl", words(3))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "one"}\n{"text": 7}\n')
    source = LocalDocuments(tmp_path)
    line = source.check()
    assert "not yet searched for bad rows: 3 of 3 files (python train.py stage=check reads every row)" in line
    (tmp_path / "c.jsonl").unlink()
    assert source.check() == line  # asked again, the files are not read again


def test_only_the_first_process_searches_for_bad_rows(tmp_path, monkeypatch):
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", words(300))
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"text": 7}\n')
    monkeypatch.setenv("RANK", "1")
    assert "searched" not in LocalDocuments(tmp_path).check()
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="line 301"):
        LocalDocuments(tmp_path).check()


def test_a_position_behind_skipped_rows_is_exact(tmp_path, monkeypatch):
    monkeypatch.setattr("llm.data.documents.SCAN_BYTES", 0)
    good = [json.dumps({"text": row}).encode() for row in words(6)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*good[:3], BAD_LINES[0], *good[3:]]))
    write(tmp_path / "b.jsonl", words(3, 100))
    stream = LocalDocuments(tmp_path, bad_rows="skip").iterate("train")
    straight = [next(stream) for _ in range(9)]
    assert straight[3][1] == {"epoch": 0, "shard": 0, "row": 5, "index": 4}
    for number in (1, 2, 3, 7):
        continued = LocalDocuments(tmp_path, bad_rows="skip")
        assert next(continued.iterate("train", straight[number][1])) == (straight + [next(stream)])[number + 1]
    late = LocalDocuments(tmp_path)
    late.check()  # only the first rows: the file counts as large
    with pytest.raises(UserError, match="a.jsonl: line 4: not valid JSON.*data.bad_rows=skip"):
        read(late)


def test_bad_rows_of_tables_and_text(tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n1,one\n2\n3,three\n4,four\n")
    (tmp_path / "b.txt").write_bytes(b"one\n<|endoftext|>\ntw\xffo\n<|endoftext|>\nthree\n<|endoftext|>\nfour")
    for name, kept in [("a.csv", ["one", "three"]), ("b.txt", ["one", "three"])]:
        source = LocalDocuments(tmp_path / name, val_size=1, bad_rows="skip")
        source.check()
        assert read(source) == kept and sum(source.skipped.values()) == 1
        with pytest.raises(UserError, match=f"{name}: line 3: "):
            LocalDocuments(tmp_path / name, val_size=1).check()
    assert "; and 2 more. Correct the rows" in str(bad_rows_error([BadRow("a", "b")] * 10, 12, "data.bad_rows"))


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_only_the_piece_of_a_long_line_with_a_bad_byte_is_lost(tmp_path, monkeypatch, encoding):
    monkeypatch.setattr("llm.data.formats.TXT_LINE_BYTES", 64)  # pieces end within characters
    text = "。字".join("甲乙丙丁戊己庚辛壬癸") * 20
    data = text.encode(encoding)
    (tmp_path / "a.txt").write_bytes(data[:240] + b"\xff" + data[240:])
    rows = list(read_rows(tmp_path / "a.txt", Column("text", encoding=encoding), 0))
    good = "".join(row for row in rows if isinstance(row, str))
    assert sum(isinstance(row, BadRow) for row in rows) == 1 and len(good) > len(text) - 64
    assert text.endswith(good[-400:])


@pytest.mark.parametrize("name, key", [("embedded", "path"), ("hub", "train"), ("local", "repo"), ("mixture", "path")])
def test_a_key_that_the_source_does_not_read_is_refused(tmp_path, name, key):
    with pytest.raises(UserError, match=f"data.{key}=x is not read by this option of data"):
        build_source(OmegaConf.create({"name": name, "streaming": False, key: "x"}), str(tmp_path))


def test_a_path_that_does_not_exist_is_named_before_the_missing_tokenizer(tmp_path):
    args = ("experiment=tiny", "stage=pretrain", "data=local", f"data.path={tmp_path}/gone", f"paths.runs={tmp_path}")
    with pytest.raises(UserError, match="data.path=.*/gone: no such file"):
        run_stage(compose("train", *args))


def test_the_last_step_before_a_bad_row_is_saved(tmp_path):
    saved = []
    io_of = SimpleNamespace(finish=lambda: saved.append("written"))
    trainer = SimpleNamespace(save_checkpoint=saved.append, strategy=SimpleNamespace(checkpoint_io=io_of))
    callback, error = StepCheckpoint(1000, tmp_path), bad_rows_error([BadRow("a", "b")], 1, "data.bad_rows")
    module = SimpleNamespace(global_step=7, is_updating=False, net=torch.nn.Linear(1, 1))
    callback.on_exception(trainer, module, ValueError("no data"))
    assert saved == []
    callback.on_exception(trainer, module, error)
    assert [str(saved[0]).endswith("step_000007.ckpt"), saved[1]] == [True, "written"]
    assert "Step 7 was saved; the same command resumes." in str(error)


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = write(tmp_path / "a.jsonl", words(50))
    write(tmp_path / "b.jsonl", words(3))
    stream = LocalDocuments(tmp_path).iterate("train", loop=False)
    next(stream)
    write(path, words(60, 500))
    with pytest.raises(UserError, match="a.jsonl: (has changed while|line)"):
        list(stream)


def test_several_kinds_in_a_zip_are_told_apart(tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("a.jsonl", '{"text": "one"}\n')
        archive.writestr("README.txt", "read me")
    with pytest.raises(UserError, match="mixes 1 jsonl and 1 txt files, some of them in a .zip. Unpack it"):
        find_data_files(str(tmp_path), "data.path")


@pytest.mark.parametrize("encoding, mark", [("utf-8", b""), ("utf-8", b"\xef\xbb\xbf"), ("utf-16", b"")])
@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_lines_are_counted_and_skipped_without_a_look_at_them(tmp_path, monkeypatch, suffix, encoding, mark, end):
    monkeypatch.setattr("llm.data.records.CHUNK", 100)
    lines = [json.dumps({"text": word}) for word in words(60)] + ["", "broken", *[json.dumps({"text": "é" * 500})] * 3]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACK[suffix](mark + ((end or "\n").join(lines) + end).encode(encoding)))
    column = Column("text", encoding=encoding)
    rows = list(read_rows(path, column, 0))
    assert len(rows) == count_rows(path, column) == 65
    assert rows[:60] == words(60) and rows[60] is None and rows[61].where.endswith("line 62")
    for start in (1, 7, 59, 60, 62, 64, 65, 70):
        assert list(read_rows(path, column, start)) == rows[start:]


@pytest.mark.parametrize("val_size", [None, 2])
@pytest.mark.parametrize("end", ["\n\n\n", "\r\n \t\r\n", "\n" * 300])
def test_blank_lines_at_the_end_are_no_documents(tmp_path, monkeypatch, end, val_size):
    monkeypatch.setattr("llm.data.records.CHUNK", 100)
    path = write(tmp_path / "a.jsonl", words(20))
    path.write_text(path.read_text().rstrip() + end)
    source = LocalDocuments(path, val_size=val_size)
    source.check()
    held = val_size or 1
    assert (read(source), read(source, "val")) == (words(20)[:-held], words(20)[-held:])


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_two_columns_of_one_name_are_refused(tmp_path, suffix):
    twice = pa.Table.from_arrays([pa.array(ROWS), pa.array(ROWS[::-1])], names=["text", "text"])
    path = tmp_path / f"a.{suffix}"
    pq.write_table(twice, path) if suffix == "parquet" else pa.feather.write_feather(twice, path)
    with pytest.raises(UserError, match=f"a.{suffix}: data.column=text is the name of 2 columns. Rename all but one."):
        LocalDocuments(path, val_size=1).check()
    with pytest.raises(UserError, match=f"a.{suffix}: names a column twice .text, text.. Name each once."):
        list(read_records(path))


PROSE = "A text of several words that a row may hold."


@pytest.mark.parametrize(
    "row, hint",
    [
        ({"id": "a" * 80, "doc": {"text": PROSE, "title": PROSE[:32]}}, "; for doc.text, set data.column=doc.text"),
        ({"content": PROSE * 2, "doc": {"text": PROSE}}, "; for content, set data.column=content"),
        ({"id": "a" * 80, "doc": {"title": "A short title"}, "n": 1}, ""),
        ([PROSE], ""),
    ],
)
def test_a_row_without_the_column_says_where_its_text_is(tmp_path, row, hint):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"text": "x"}) + "\n")
    (bad, _) = read_rows(tmp_path / "a.jsonl", Column("text"), 0)
    assert (
        bad.reason.startswith("no data.column=text: ")
        and bad.reason.partition("; for")[2] == hint.partition("; for")[2]
    )


def test_a_table_without_the_column_says_where_its_text_is(tmp_path):
    table = pa.table({"id": ["a"], "doc": [{"text": PROSE, "title": "b"}]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="Text columns here: id, doc.text, doc.title. Set data.column=doc.text."):
        list(read_rows(tmp_path / "a.parquet", Column("text"), 0))
    with pytest.raises(UserError, match="doc.title.$"):
        list(read_rows(tmp_path / "a.parquet", Column("other"), 0))
