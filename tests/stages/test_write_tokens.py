"""stage=write_tokens: parts by several jobs, again and after a kill; training on the result equals that on text."""

import json

import numpy as np
import pytest
from conftest import compose
from data_files import words, write

from llm.errors import UserError
from llm.stages.run_stage import run_stage

TINY = ["experiment=tiny", "trainer=cpu", "logger=csv"]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A folder with text in three files, and a run that has a tokenizer for it."""
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        write(tmp_path / f"text/part{number}.jsonl", [word * 20 for word in words(150, 200 * number)])
    write(tmp_path / "text/val.jsonl", [word * 20 for word in words(30, 900)])
    run("data=local", "data.path=text", "stage=tokenizer")
    return tmp_path


def run(*arguments):
    run_stage(compose("train", *TINY, "run=a", "paths.runs=runs", *arguments))


def write_part(part, parts, *more):
    run(
        "data=local",
        "data.path=text",
        "stage=write_tokens",
        "data.token_cache=t",
        f"stage.part={part}",
        f"stage.parts={parts}",
        *more,
    )


@pytest.mark.slow
def test_parts_again_and_a_part_that_is_missing(made, capsys):
    write_part(1, 2)
    assert "1 token files written, 0 were up to date" in capsys.readouterr().out
    with pytest.raises(UserError, match="2 of 3 token files are missing or damaged: part0.jsonl"):
        run("data=tokens", "data.path=t", "stage=pretrain")
    write_part(0, 2)
    write_part(0, 1)
    assert "0 token files written, 3 were up to date" in capsys.readouterr().out
    run("data=local", "data.path=text", "stage=pretrain", "run=b", "init_from=a", "data.shuffle=3", "max_steps=3")
    run("data=tokens", "data.path=t", "stage=pretrain", "data.shuffle=3", "max_steps=3")
    weights = [(made / f"runs/{name}/pretrain/model/model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_tokens_are_checked_as_text_is(made, capsys):
    write_part(0, 1)
    chars = []
    for source in (["data=local", "data.path=text"], ["data=tokens", "data.path=t"]):
        run(*source, "stage=check", "stage.parts=[text]")
        files = json.loads((made / "runs/data_check.json").read_text())["files"]
        chars.append({split: sum(f["chars"] for f in files if f["split"] == split) for split in ("train", "held out")})
    assert chars[0] == chars[1] and all(chars[0].values())
    with pytest.raises(UserError, match="1 files or tasks that cannot be read"):
        run("data=tokens", "data.path=t", "stage=check", "stage.parts=[text]", "run=none")
    assert "data=tokens holds token ids and no text" in capsys.readouterr().out


@pytest.mark.parametrize("shuffle", ["", " data.shuffle=42"])
def test_what_is_printed_trains_in_the_order_of_the_text(made, capsys, shuffle):
    write_part(0, 1, *shuffle.split())
    assert f"once all parts are written: data=tokens data.path=t{shuffle}\n" in capsys.readouterr().out


def test_near_duplicates_are_left_out_of_the_files(made, capsys):
    rows = [" ".join(f"w{i}x{j}" for j in range(30)) for i in range(60)]
    write(made / "text/part0.jsonl", [*rows, *(row + " more" for row in rows[:7])])
    write_part(0, 1, "data.near_duplicates=0.7")
    assert "near-duplicates: 7 of" in capsys.readouterr().out
    settings = ["stage=pretrain", "data.packing=best_fit", "max_steps=3"]
    run("data=local", "data.path=text", "data.near_duplicates=0.7", "run=b", "init_from=a", *settings)
    run("data=tokens", "data.path=t", *settings)
    weights = [(made / f"runs/{name}/pretrain/model/model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_settings_that_cannot_be_kept(made):
    with pytest.raises(UserError, match="stage.part=2: with stage.parts=2 the parts are 0 to 1"):
        write_part(2, 2)
    with pytest.raises(UserError, match="data.token_cache is not set"):
        write_part(0, 1, "data.token_cache=null")
    with pytest.raises(UserError, match="data.token_cache is for files of text"):
        write_part(0, 1, "data=embedded", "data.path=null")
    with pytest.raises(UserError, match="starts from none/tokenizer, which is missing"):
        write_part(0, 1, "run=none")
    with pytest.raises(UserError, match="data.end_of_text=5 is not read by this option of data"):
        write_part(0, 1, "data.end_of_text=5")
    write_part(0, 1, "dry_run=true")
    assert not (made / "t").exists()


def test_token_files_of_others_train_with_their_tokenizer(made, capsys):
    from tokenizers import Tokenizer

    source = made / "runs/a/tokenizer/model/tokenizer.json"
    run("stage=tokenizer", "run=c", f"stage.pretrained={source}")
    theirs = Tokenizer.from_file(str(source))
    end = theirs.get_vocab_size() - len(theirs.get_added_tokens_decoder())
    for name, first in (("train", 0), ("val", 900)):
        ids = [id for word in words(90, first) for id in [*theirs.encode(word * 20, add_special_tokens=False).ids, end]]
        np.array(ids, np.uint16).tofile(made / f"{name}.bin")
    run("data=tokens", "data.train=train.bin", "data.val=val.bin", "stage=pretrain", "run=c", "max_steps=2")
    out = capsys.readouterr().out
    assert "1 bin files" in out and "bpb" in out
    (made / "big.bin").write_bytes(np.array([end + 7], np.uint16).tobytes())
    with pytest.raises(UserError, match="is none of the .* ordinary tokens"):
        run("data=tokens", "data.train=big.bin", "data.val=val.bin", "stage=pretrain", "run=c", "overwrite=true")


def test_without_a_tokenizer_the_message_names_this_stage(tmp_path):
    with pytest.raises(UserError, match="stage=write_tokens of run=a starts from a/tokenizer, which is missing"):
        run("stage=write_tokens", f"data.token_cache={tmp_path}/t", f"paths.runs={tmp_path}")
