"""stage=check: all data read once, with what is wrong in it."""

import json
import random
import tracemalloc

import pytest
from conftest import compose

from llm.data.checking import CHARS, GRAM, Checker, Rows
from llm.errors import UserError
from llm.stages import check
from llm.stages.run_stage import run_stage
from tasks.registry import build_task

WORDS = [f"word{i}" for i in range(2_000)]


def sentence(generator: random.Random, length: int = 40) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(length))


def write_rows(path, rows) -> None:
    path.write_text("".join(row if row.startswith("{") else json.dumps({"text": row}) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    """Text with two broken lines, a marker, an empty and a repeated row; two of 30 held-out rows leak into training."""
    generator = random.Random(0)
    train, val = ([sentence(generator) for _ in range(count)] for count in (200, 30))
    val[0] = train[5].upper()
    val[1] = f"{sentence(generator, 9)} {' '.join(train[6].split()[3 : 3 + GRAM])} {sentence(generator, 9)}"
    val[2] = f"{sentence(generator, 9)} {' '.join(train[7].split()[3 : 2 + GRAM])} {sentence(generator, 9)}"
    train[10] += " <|im_end|>"
    train[11] = train[12]
    train[13] = " "
    train[20] = train[21] = '{"text": "broken\n'
    write_rows(tmp_path / "train.jsonl", train)
    write_rows(tmp_path / "val.jsonl", val)
    return tmp_path


def args(folder, *more):
    return compose("train", "stage=check", "data=local", f"data.path={folder}", f"paths.runs={folder}/runs", *more)


def test_text_with_every_kind_of_mistake(folder, capsys):
    with pytest.raises(UserError, match="2 bad rows are listed above; .*data.bad_rows=skip"):
        run_stage(args(folder, "stage.parts=[text]"))
    out = capsys.readouterr().out
    assert "train.jsonl: line 21: not valid JSON" in out and "line 22" in out
    assert "rows with <|im_end|> in 1" in out and "1 of 198 rows stand in this split more than once" in out
    assert "1 held-out rows are trained on, word for word" in out
    assert "2 held-out rows share 13 words in a row with training" in out and "lengths are in characters" in out
    found = {file["split"]: file for file in json.loads((folder / "runs" / "data_check.json").read_text())["files"]}
    assert (found["train"]["read"], found["train"]["bad"], found["train"]["empty"]) == (198, 2, 1)
    assert (found["held out"]["leaked"], found["held out"]["overlapping"]) == (1, 2)


def test_text_without_spaces_is_compared_by_characters():
    """Find a held-out row within a training row of Chinese, and no leak in a phrase that many texts have."""
    generator = random.Random(0)
    han = [chr(generator.randrange(0x4E00, 0x9000)) for _ in range(800)]

    def text(length: int) -> str:
        return "".join(generator.choices(han, k=length))

    leaked, other, phrase = text(200), text(200), text(CHARS - 1)
    listed = "\n".join(f"{number}. {text(9)}" for number in range(9))  # few characters a word
    checker, val, train = Checker(), Rows("val", "held out"), Rows("train", "train")
    for row in (leaked, f"{text(80)}{phrase}。", other, listed):
        checker.add(val, row)
    for row in (f"{text(50)}\n{leaked[:120]}\n{leaked[120:]}", f"{text(80)}{phrase}！", other, listed + text(9)):
        checker.add(train, row)
    checker.finish()
    assert (val.overlapping, val.leaked) == (3, 1)


def test_blanks_between_words_do_not_make_text_without_spaces():
    """Compare indented code and padded tables by words: one line of code is no leak, other padding hides none."""
    code = "class {}:\n            def test_{}(self):\n                self.assertEqual(response.status_code, 200)\n"
    table = [(f"person{number}", str(number)) for number in range(20)]
    checker, val, train = Checker(), Rows("val", "held out"), Rows("train", "train")
    checker.add(val, code.format("A", "one"))
    checker.add(val, "\n".join(name.ljust(30) + age.ljust(30) for name, age in table))
    checker.add(train, code.format("B", "two"))
    checker.add(train, "\n".join(f"{name} {age}" for name, age in table))
    checker.finish()
    assert (val.overlapping, val.leaked) == (1, 1)


def test_clean_data_ends_well_and_tasks_are_read(tmp_path, capsys):
    run_stage(compose("train", "stage=check", "data.size=50", "data.val_size=5", f"stage.out={tmp_path}/out.json"))
    files = json.loads((tmp_path / "out.json").read_text())["files"]
    assert {file["name"] for file in files} >= {"data=embedded", "data.tasks.choice", "data.tasks.smalltalk"}
    assert all(file["read"] > 0 and not file["bad"] for file in files)


def test_bad_rows_of_tasks_are_counted_and_the_others_are_read(tmp_path, capsys):
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(9)
    ]
    rows[3]["messages"][1]["content"] = ""
    rows[4]["label"] = False
    (tmp_path / "chat").mkdir()
    for name in ("train", "val"):
        (tmp_path / "chat" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["data=own", f"data.tasks_path={tmp_path}", "stage.parts=[tasks]", f"paths.runs={tmp_path}"]
    with pytest.raises(UserError, match="4 bad rows"):
        run_stage(compose("train", "stage=check", *settings))
    out = capsys.readouterr().out
    assert "chat/train.jsonl row 4" in out and "row 5" in out
    files = json.loads((tmp_path / "data_check.json").read_text())["files"]
    assert [(file["read"], file["bad"]) for file in files] == [(7, 2), (7, 2)]
    assert [file["name"] for file in files] == [
        f"data.tasks.chat: {tmp_path}/chat/{name}.jsonl" for name in ("val", "train")
    ]


def test_every_row_of_a_task_that_holds_only_bad_ones_is_counted(tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "chat").mkdir()
    for name, count in (("train", 12), ("val", 5)):
        line = json.dumps({"messages": messages, "label": False}) + "\n"
        (tmp_path / "chat" / f"{name}.jsonl").write_text(line * count)
    settings = ["data=own", f"data.tasks_path={tmp_path}", "stage.parts=[tasks]", f"paths.runs={tmp_path}"]
    with pytest.raises(UserError, match="17 bad rows"):
        run_stage(compose("train", "stage=check", *settings))
    with pytest.raises(UserError, match="2 files or tasks that cannot be read"):  # training would not begin
        run_stage(compose("train", "stage=check", "data.bad_rows=skip", *settings))


def talk(answer: str = "a", **keys) -> str:
    return json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]} | keys)


def test_each_file_of_a_task_has_a_line_of_its_own(tmp_path, capsys):
    (tmp_path / "chat").mkdir()
    parts = {"train-0": [talk("é")] * 3, "train-1": [talk(""), *[talk()] * 4], "train-2": [talk(label=False)] * 2}
    for name, lines in (parts | {"val": [talk("other")]}).items():
        (tmp_path / "chat" / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    settings = [
        f"data.tasks.chat.train={tmp_path}/chat/train-*.jsonl",
        f"data.tasks.chat.test={tmp_path}/chat/val.jsonl",
    ]
    settings += ["data=own", "stage.parts=[tasks]", f"paths.runs={tmp_path}"]
    run_stage(compose("train", "stage=check", *settings, "data.bad_rows=skip"))
    assert "3 bad rows are left out of training (data.bad_rows=skip)" in capsys.readouterr().out
    files = json.loads((tmp_path / "data_check.json").read_text())["files"]
    found = {file["name"].rsplit("/")[-1]: (file["read"], file["bad"], file["chars"], file["bytes"]) for file in files}
    assert found == {
        "val.jsonl": (1, 0, 8, 8),
        "train-0.jsonl": (3, 0, 12, 15),
        "train-1.jsonl": (4, 1, 16, 16),
        "train-2.jsonl": (0, 2, 0, 0),
    }


def test_a_limit_cuts_the_rows_of_the_last_file(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(f"{talk()}\n" * 5)
    spec = {"type": "chat", "source": "local", "train": str(tmp_path), "limit": 7}
    parts = check.by_file(build_task("talk", spec, "train"))
    assert parts == {f"{tmp_path}/a.jsonl": range(5), f"{tmp_path}/b.jsonl": range(5, 7)}


def test_text_with_bad_rows_that_are_skipped_ends_well(folder, capsys):
    run_stage(args(folder, "stage.parts=[text]", "data.bad_rows=skip"))
    assert "2 bad rows are left out of training (data.bad_rows=skip)" in capsys.readouterr().out


def test_near_duplicates_are_counted_by_file(folder, capsys):
    settings = ["stage.parts=[text]", "data.bad_rows=skip", "data.near_duplicates=0.8", f"paths.data={folder}/cache"]
    run_stage(args(folder, *settings))
    assert f"{folder}/train.jsonl (train): 2 near-duplicates, which training leaves out" in capsys.readouterr().out
    found = {file["split"]: file for file in json.loads((folder / "runs" / "data_check.json").read_text())["files"]}
    assert (found["train"]["near_duplicates"], found["held out"]["near_duplicates"]) == (2, 0)


def test_every_bad_row_is_written_down(tmp_path):
    write_rows(tmp_path / "train.jsonl", ["fine", *['{"text": 1}\n'] * 40])
    write_rows(tmp_path / "val.jsonl", ["other"])
    with pytest.raises(UserError, match="40 bad rows"):
        run_stage(args(tmp_path, "stage.parts=[text]"))
    found = {file["split"]: file for file in json.loads((tmp_path / "runs" / "data_check.json").read_text())["files"]}
    assert len(found["train"]["first_bad"]) == 40


def test_many_small_rows_take_little_memory():
    """Twelve bytes of a row stay, in arrays; of lengths as many counters as there are different ones."""
    checker, held_out, train = Checker(), Rows("val", "held out"), Rows("file", "train")
    for number in range(10_000):
        checker.add(held_out, f"held {number}")
    tracemalloc.start()
    for number in range(100_000):
        checker.add(train, f"row {number}" if number >= 500 else f"held {number % 400}")
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    checker.finish()
    assert kept < 20 * 100_000 and len(train.lengths) < 10
    assert (train.repeated, held_out.leaked) == (100, 400)


def test_programs_that_fail_their_own_tests_are_bad(tmp_path, capsys):
    rows = [
        {
            "task_id": f"t/{body}",
            "prompt": 'def double(x):\n    """Return twice x."""\n',
            "entry_point": "double",
            "canonical_solution": f"    return {body}\n",
            "test": "def check(candidate):\n    assert candidate(3) == 6\n",
        }
        for body in ("2 * x", "x + 1")
    ]
    path = tmp_path / "programs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"data.tasks.humaneval.test={path}", "data.eval=[humaneval]", "data.path=x", "data.rl=null"]
    empty = [f"data.mixture.{stage}={{}}" for stage in ("midtrain", "sft")]
    settings += [*empty, "stage.parts=[tasks]", f"paths.runs={tmp_path}"]
    for bad_rows in ("skip", "stop"):  # nothing leaves them out
        with pytest.raises(UserError, match="1 bad rows are listed above"):
            run_stage(compose("train", "stage=check", "data=local", f"data.bad_rows={bad_rows}", *settings))
    assert "data.tasks.humaneval.test row 2: its own answer" in capsys.readouterr().out


def test_files_that_are_not_there_are_bad(tmp_path):
    with pytest.raises(UserError, match="^1 files or tasks that cannot be read are listed above; correct them$"):
        run_stage(args(tmp_path / "none", "stage.parts=[text]", f"stage.out={tmp_path}/out.json"))
    with pytest.raises(UserError, match=r"stage.parts=\['nothing'\]: name one or both of text, tasks"):
        run_stage(args(tmp_path, "stage.parts=[nothing]"))


def test_too_many_hashes_are_said(monkeypatch):
    monkeypatch.setattr("llm.data.checking.MAX_ROWS", 2)
    checker, rows = Checker(), Rows("file", "train")
    for text in "abcc":
        checker.add(rows, text)
    checker.finish()
    assert not checker.is_complete and rows.repeated == 0 and rows.read == 4


def test_words_that_several_held_out_rows_share_count_for_each():
    checker, held_out, train = Checker(), Rows("val", "held out"), Rows("file", "train")
    shared = " ".join(WORDS[:GRAM])
    for text in (f"a {shared} b", f"c {shared} d"):
        checker.add(held_out, text)
    for text in (f"e {shared} f", f"g {shared} h"):
        checker.add(train, text)
    assert held_out.overlapping == 2


def test_short_leaks_do_not_hide_rows_that_overlap():
    checker, held_out, train = Checker(), Rows("val", "held out"), Rows("file", "train")
    shared = " ".join(WORDS[:GRAM])
    for text in ("a short row", f"a {shared}"):
        checker.add(held_out, text)
    for text in ("a short row", f"b {shared}"):
        checker.add(train, text)
    checker.finish()
    assert (held_out.leaked, held_out.overlapping) == (1, 1)
    assert len(list(check.warnings(held_out))) == 2


def test_one_long_row_stays_within_the_bound(monkeypatch):
    monkeypatch.setattr("llm.data.checking.MAX_GRAMS", 100)
    checker = Checker()
    checker.add(Rows("val", "held out"), " ".join(WORDS))
    assert len(checker._grams) == 100 and not checker.is_complete


def test_lengths_are_in_tokens_of_the_tokenizer():
    checker, rows = Checker(encode=str.split), Rows("file", "train")
    for count in (1, 2, 3, 40):
        checker.add(rows, "word " * count)
    assert (rows.quantile(0.5), rows.longer_than(2), max(rows.lengths)) == (3, 2, 40)
    assert list(check.warnings(rows)) == []
