"""Task files of every format, plain and packed: their rows, their splits, their mistakes."""

import bz2
import gzip
import json
import lzma
import tracemalloc
import zipfile

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from omegaconf import OmegaConf

from llm.errors import UserError
from tasks import build_mixture, build_task
from tasks.base import dialogue
from tasks.files import count_rows
from tasks.registry import has_split, held_out_weights, local_files

ROWS = [{"question": f'What, "is" {i}?\né', "answer": f"A {i}"} for i in range(5)]
TALKS = [{"messages": dialogue(f"Q {i}", "A")} for i in range(5)]


def lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows, write) -> bytes:
    sink = pa.BufferOutputStream()
    write(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def arrow(rows, opened) -> bytes:
    def write(data, sink):
        with opened(sink, data.schema) as file:
            file.write_table(data)

    return table(rows, write)


FORMATS = {
    ".jsonl": lines,
    ".json": lambda rows: json.dumps(rows, indent=2).encode(),
    ".csv": lambda rows: table(rows, pa.csv.write_csv),
    ".tsv": lambda rows: table(rows, lambda t, s: pa.csv.write_csv(t, s, pa.csv.WriteOptions(delimiter="\t"))),
    ".parquet": lambda rows: table(rows, lambda t, s: pa.parquet.write_table(t, s, row_group_size=2)),
    ".arrow": lambda rows: arrow(rows, pa.ipc.new_file),
    ".stream.arrow": lambda rows: arrow(rows, pa.ipc.new_stream),
}
PACKINGS = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


def build(path, split="train", **keys):
    spec = {"type": "chat", "source": "local", "train": str(path), "test": None}
    bad_rows = keys.pop("bad_rows", "stop")
    return build_task("talk", spec | keys, split, bad_rows=bad_rows)


def exchanges(task) -> list[tuple]:
    return [tuple(message["content"] for message in talk["messages"]) for talk in task]


WANT = [(row["question"], row["answer"]) for row in ROWS]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("suffix", FORMATS)
def test_rows_of_every_format_and_packing(tmp_path, suffix, packing):
    path = tmp_path / f"rows{suffix}{packing}"
    path.write_bytes(PACKINGS[packing](FORMATS[suffix](ROWS)))
    task = build(path)
    assert exchanges(task) == WANT
    assert [task[i]["messages"][0]["content"] for i in (4, 0, 3)] == [WANT[i][0] for i in (4, 0, 3)]
    assert count_rows([path]) == 5


@pytest.mark.parametrize(
    ("suffix", "pack", "name"),
    [
        *[(suffix, bytes, name) for suffix in (".jsonl", ".parquet", ".arrow") for name in ("rows.txt", "rows")],
        *[(suffix, bytes, "rows.jsonl") for suffix in (".json", ".parquet", ".arrow")],
        *[(suffix, gzip.compress, "rows.jsonl") for suffix in (".jsonl", ".json")],
        *[(".jsonl", gzip.compress, name) for name in ("rows.txt", "rows")],
    ],
)
def test_the_first_bytes_tell_a_wrong_name(tmp_path, suffix, pack, name):
    (tmp_path / name).write_bytes(pack(FORMATS[suffix](ROWS)))
    assert exchanges(build(tmp_path / name)) == WANT


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_archive_of_every_format(tmp_path, suffix):
    with zipfile.ZipFile(tmp_path / "rows.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"folder/rows{suffix}", FORMATS[suffix](ROWS))
    assert exchanges(build(tmp_path / "rows.zip")) == WANT


def test_an_archive_gives_the_rows_of_its_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        archive.writestr("b.csv", FORMATS[".csv"](ROWS[3:]))
        archive.writestr("a.jsonl.gz", gzip.compress(lines(ROWS[:3]), mtime=0))
        archive.writestr("readme.md", "no rows")
        archive.writestr("__MACOSX/._a.jsonl", "junk")
    assert exchanges(build(tmp_path / "rows.zip")) == WANT
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as archive:
        archive.writestr("readme.md", "no rows")
    with pytest.raises(UserError, match=r"^data\.tasks\.talk\.train: .*none.zip: the archive holds no file of rows"):
        build(tmp_path / "none.zip")


def test_lists_of_messages_per_line_are_no_array_of_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    talk = dialogue("Q", "A" * 70_000)  # longer than what is looked at
    for rows in ([talk], [talk, talk], [dialogue("Q", "A")], [dialogue("Q", "A")] * 2):
        path.write_bytes(lines(rows))
        assert [row["messages"] for row in build(path)] == rows
    path.write_text(json.dumps([talk, talk]))  # one array of them
    assert len(build(path)) == 2
    path.write_text(json.dumps(TALKS))
    assert len(build(path)) == 5


@pytest.mark.parametrize("write", [lambda row: f"{row}\n{row}\n", lambda row: f"[{row}, {row}]"])
def test_half_a_surrogate_pair_is_a_replacement_character(tmp_path, write):
    """UTF-8 cannot hold it: a sample that showed the question ended the training."""
    path = tmp_path / "rows.json"
    path.write_text(write(json.dumps({"messages": dialogue("Hi \ud83d", "\ude00 \U0001f600")})))
    assert [row["messages"] for row in build(path)] == [dialogue("Hi \ufffd", "\ufffd \U0001f600")] * 2


def test_an_array_of_long_rows_is_read_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("llm.data.records.CHUNK", 7)
    rows = [{"prompt": "é" * 50, "completion": "x" * i + "]", "score": i} for i in range(1, 30)]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8-sig")
    assert exchanges(build(tmp_path / "rows.json")) == [(row["prompt"], row["completion"]) for row in rows]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("rows.jsonl", b"", "the file holds no rows"),
        ("rows.json", b"[]\n", "at least one message"),
        ("rows.json", b'[{"question": "Q", "answer": "A"}, {"que', "row 2 is not valid JSON"),
        ("rows.json", b'[{"question": "Q", "answer": "A"} 3]', "row 2: a row must be a JSON object"),
        ("rows.json", b'{\n "data": []\n}\n', "no conversation .found: data."),
        ("rows.json", '[\n{"question": "\u00e9"}]'.encode("latin-1"), "not UTF-8 text"),
        ("rows.csv", b"question,question\na,b\n", "names a column twice"),
        ("rows.csv", b"question,answer\na,b,c\n", "has 3 fields, the head line 2"),
        ("rows.csv", b"question,answer\na\n", "has 1 fields, the head line 2"),
        ("rows.csv", b'question,answer\na,"b\n', "is no valid row"),
        ("rows.parquet", FORMATS[".parquet"](ROWS)[:-9], "damaged after row 0"),
        ("rows.jsonl.gz", gzip.compress(lines(ROWS), mtime=0)[:-9], "damaged after line .*Fetch it again"),
        ("rows.jsonl.xz", lzma.compress(lines(ROWS))[:-30], "damaged after line .*Fetch it again"),
        ("rows.jsonl.zst", PACKINGS[".zst"](lines(ROWS))[:-30], "damaged after line .*Fetch it again"),
        ("rows.jsonl", b'{"messages": ' + b"[" * 100_000 + b"\n", "not valid JSON .nested too deeply"),
        ("rows.jsonl", b"\xff\xfe{\x00", "not UTF-8 text: convert"),
    ],
)
def test_broken_files_end_in_one_sentence(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^data\.tasks\.talk\.train: .*{name}.*{problem}") as error:
        build(tmp_path / name)
    assert "\n" not in str(error.value)


def test_bad_rows_of_every_format_are_left_out_and_counted(tmp_path):
    bad = {"question": "Q", "answer": ""}
    for suffix, write in FORMATS.items():
        path = tmp_path / f"rows{suffix}"
        path.write_bytes(write([ROWS[0], bad, ROWS[1]]))
        task = build(path, bad_rows="skip")
        assert exchanges(task) == WANT[:2] and task.skipped == {f"bad rows of {path.name}": 1}
        with pytest.raises(UserError, match="row 2: .*is empty"):
            build(path)


def test_files_that_change_or_vanish_are_noticed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(TALKS))
    task = build(path)
    path.write_bytes(lines(TALKS[::-1] + TALKS))
    with pytest.raises(UserError, match=r"data\.tasks\.talk\.train: .*rows.jsonl was changed while it was in use"):
        task[0]
    path.unlink()
    with pytest.raises(UserError, match=r"data\.tasks\.talk\.train: .*rows.jsonl row 2: cannot be read \(no such file"):
        task[1]
    (tmp_path / "kept.json").write_text(json.dumps(TALKS))
    task = build(tmp_path / "kept.json")
    (tmp_path / "kept.json").unlink()
    assert task[4] == TALKS[4]


def test_rows_that_lie_in_their_file_take_little_memory(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines([{"prompt": "Q", "completion": "A"}]) * 5_000)
    tracemalloc.start()
    task = build(path)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(task) == 5_000 and size < 200_000


# ---------------------------------------------------------------------------------------------------------------------
# Splits


@pytest.fixture
def folder(tmp_path):
    for name, count in (("train.jsonl", 3), ("more.csv", 2), ("validation.json", 2), ("test.parquet", 1), ("x.md", 0)):
        write = FORMATS.get(f".{name.split('.')[1]}", lambda rows: b"# words")
        (tmp_path / "chats" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "chats" / name).write_bytes(write([{"prompt": name, "completion": f"{i}"} for i in range(count)]))
    return tmp_path / "chats"


def files_of(task) -> set[str]:
    return {talk["messages"][0]["content"] for talk in task}


def test_a_folder_is_divided_by_the_names_of_its_files(folder, capsys):
    assert files_of(build(folder)) == {"train.jsonl", "more.csv"}
    assert "data.tasks.talk.train: left out by their names: test.parquet, validation.json" in capsys.readouterr().out
    assert files_of(build(folder, "test")) == {"validation.json"}
    (folder / "validation.json").unlink()
    assert files_of(build(folder, "test")) == {"test.parquet"}
    assert files_of(build(folder / "*.*[vlt]", "test")) == {"test.parquet"}


def test_named_files_win_over_names(folder):
    assert files_of(build(folder / "test.parquet")) == {"test.parquet"}
    assert files_of(build(folder / "test.*")) == {"test.parquet"}
    task = build(folder, "test", test=str(folder / "more.csv"))
    assert files_of(task) == {"more.csv"}
    assert files_of(build(folder, test=str(folder / "more.csv"))) == {"train.jsonl"}
    spec = OmegaConf.create({"type": "chat", "source": "local", "train": str(folder / "test.*"), "test": None})
    assert not has_split("talk", spec, "test"), "or it would be trained on and held out at once"


def test_the_names_of_folders_speak_too(folder):
    for name in ("train", "dev"):
        (folder / name).mkdir()
    for old, new in (("more.csv", "train/1.csv"), ("validation.json", "dev/1.json")):
        (folder / old).rename(folder / new)
    for name in ("train.jsonl", "test.parquet"):
        (folder / name).unlink()
    assert (files_of(build(folder)), files_of(build(folder, "test"))) == ({"more.csv"}, {"validation.json"})


def test_a_stage_holds_out_what_a_folder_names_so(folder):
    spec = {"type": "chat", "source": "local", "train": str(folder), "test": None}
    data = OmegaConf.create({"tasks": {"talk": spec}, "mixture": {"sft": {"talk": 1}}})
    assert held_out_weights(data, "sft") == {"talk": 1}
    assert len(build_mixture(data.tasks, {"talk": 1}, "test")) == 2
    for name in ("validation.json", "test.parquet"):
        (folder / name).unlink()
    assert not has_split("talk", data.tasks.talk, "test")
    with pytest.raises(UserError, match=r"data\.tasks\.talk\.test is null"):
        build(folder, "test")


def test_a_share_is_held_out_where_no_name_does_so(folder, tmp_path):
    assert files_of(build(folder, "test", test="5%")) == {"validation.json"}  # names go before the share
    assert files_of(build(folder, test="5%")) == {"train.jsonl", "more.csv"}
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "talks.jsonl").write_bytes(lines(ROWS))
    (alone / "more.csv").write_bytes(FORMATS[".csv"](ROWS[:1]))
    parts = {split: exchanges(build(alone, split, test="5%")) for split in ("train", "test")}
    assert (parts["train"], parts["test"]) == ([WANT[0], *WANT[:4]], WANT[4:])  # 5 % of 6 rows are one row
    assert len(build(alone / "talks.jsonl", "test", test="40%")) == 2
    spec = OmegaConf.create({"type": "chat", "source": "local", "train": str(alone), "test": "5%"})
    assert has_split("talk", spec, "test")
    local_files({"talk": spec}, ["talk"], "test")
    for train in ([str(alone)], f"{alone}/talks.jsonl[:3]", None):
        with pytest.raises(UserError, match=r"data\.tasks\.talk\.test=5%: a share is held out of one file"):
            build(alone, train=train, test="5%")


def test_a_missing_file_hints_at_another_format(folder):
    with pytest.raises(UserError, match=r"no file matches .*train.csv .*; there is train.jsonl$"):
        build(folder / "train.csv")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_rows_in_another_encoding(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    written = FORMATS[suffix](ROWS).decode() if suffix != ".json" else json.dumps(ROWS, ensure_ascii=False)
    path.write_bytes(written.encode("cp1252"))
    assert exchanges(build(path, encoding="cp1252")) == WANT
    with pytest.raises(
        UserError, match="no valid row" if suffix == ".csv" else r"UTF-8 text.*data.tasks.<name>.encoding"
    ):
        build(path)
    with pytest.raises(UserError, match="nonsense: Python knows no such encoding"):
        build(path, encoding="nonsense")
    with pytest.raises(UserError, match="encoding=cp1252: only rows of local files have an encoding"):
        build(path, source="embedded", encoding="cp1252")


def test_slices_of_rows_lose_none_of_them(tmp_path):
    rows = [json.dumps({"messages": dialogue(f"q{n}", "A")}) for n in range(10)]
    for place in (2, 3, 5, 7):
        rows.insert(place, "null")
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    found = []
    for split in ("train", "test"):
        cuts = {"train": f"{tmp_path}/rows.jsonl[:-3]", "test": f"{tmp_path}/rows.jsonl[-3:]"}
        spec = {"type": "chat", "source": "local"} | cuts
        task = build_task("talk", spec, split, bad_rows="skip")
        found += [task[i]["messages"][0]["content"] for i in range(len(task))]
    assert sorted(found) == [f"q{n}" for n in range(10)]


@pytest.mark.parametrize("place", ["rows.zip", ".", "*.zip"])
def test_names_in_an_archive_divide_its_rows(tmp_path, capsys, place):
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        for name, rows in (("train/a.jsonl", TALKS[:2]), ("b.jsonl", TALKS[2:3]), ("test/a.jsonl", TALKS[3:])):
            archive.writestr(name, lines(rows))
    spec = OmegaConf.create({"type": "chat", "source": "local", "train": f"{tmp_path}/{place}", "test": None})
    assert has_split("talk", spec, "test")
    assert held_out_weights(OmegaConf.create({"tasks": {"talk": spec}, "mixture": {"sft": {"talk": 1}}}), "sft")
    parts = {split: build_task("talk", spec, split) for split in ("train", "test")}
    asked = {split: [row["messages"][0]["content"] for row in part] for split, part in parts.items()}
    assert asked["test"] == ["Q 3", "Q 4"] and sorted(asked["train"]) == ["Q 0", "Q 1", "Q 2"]
    assert "left out by their names: a.jsonl" in capsys.readouterr().out
    if place == "rows.zip":
        cuts = {**spec, "train": f"{spec.train}[:-2]", "test": f"{spec.train}[-2:]"}
        with pytest.raises(
            UserError, match=r"cut files that their names divide already; give train=.*rows.zip with test"
        ):
            build_task("talk", cuts, "train")


@pytest.mark.parametrize("form", ["rows.jsonl", "rows.jsonl.gz", "rows.json"])
@pytest.mark.parametrize(
    "bad,reason", [("null", "null is no row"), ('{"a": {"b": 1, "b": 2}}', "'b' stands there twice")]
)
def test_null_and_a_key_that_stands_twice_are_bad_rows(tmp_path, form, bad, reason):
    rows = [json.dumps({"messages": dialogue(f"q{n}", "A")}) for n in range(3)]
    rows.insert(1, bad)
    text = f"[{','.join(rows)}]" if form.endswith(".json") else "\n".join(rows)
    (tmp_path / form).write_bytes(gzip.compress(text.encode()) if form.endswith(".gz") else text.encode())
    spec = {"type": "chat", "source": "local", "train": f"{tmp_path}/{form}"}
    with pytest.raises(UserError, match=f"(line|row) 2.*{reason}"):
        build_task("talk", spec, "train")
    task = build_task("talk", spec, "train", bad_rows="skip")
    assert len(task) == 3 and task.skipped == {f"bad rows of {form}": 1}


def test_a_file_that_two_entries_match_is_read_once(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(TALKS[0]))
    spec = {"type": "chat", "source": "local", "train": [f"{tmp_path}/rows.jsonl", f"{tmp_path}/r*.jsonl"]}
    assert len(build_task("talk", spec, "train")) == 1
