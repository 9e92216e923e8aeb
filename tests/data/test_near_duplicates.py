"""Near-duplicates of training documents: which are left out, counts, files of their rows, ranks and resumes."""

import random
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest
from conftest import compose
from data_files import read, write
from hub_server import REPO, Hub, point_to
from omegaconf import OmegaConf

from llm.data.balance import Reading
from llm.data.near_duplicates import NearDuplicates, bands, runs
from llm.data.shuffle import Shuffle
from llm.data.sources import build_source
from llm.data.text_size import text_tokens
from llm.data.tokens import CachedDocuments
from llm.errors import UserError
from llm.stages.text_plan import left_out

VOCABULARY = [f"word{number}" for number in range(3_000)]


def document(seed: int, edits: int = 0, length: int = 200) -> str:
    """`length` words of a seed; `edits` of them, at the end, are of another seed."""
    base, other = random.Random(seed), random.Random(-1 - seed)
    words = [base.choice(VOCABULARY) for _ in range(length)]
    return " ".join(words[: length - edits] + [other.choice(VOCABULARY) for _ in range(edits)])


# Rows of the first file that stay: the first of every group. Row 5 is 4 of the held-out file with two other words.
FIRST = [document(1), document(2), document(1, 3), document(3).upper(), document(3), document(54, 2), " ", document(4)]
SECOND = [document(5), document(2, 2), document(6, 0, 4), document(6, 0, 4), document(5, 120)]
KEPT = [FIRST[0], FIRST[1], FIRST[3], FIRST[7], SECOND[0], SECOND[2], SECOND[4]]


@pytest.fixture
def folder(tmp_path):
    """Two files to train on with seven near-duplicates, one of them of the file that validates."""
    write(tmp_path / "text" / "a.jsonl", FIRST)
    write(tmp_path / "text" / "b.parquet", SECOND)
    write(tmp_path / "val.jsonl", [document(seed) for seed in range(50, 60)] + [document(50)])
    return tmp_path


def settings(folder, **values):
    text = {"name": "local", "near_duplicates": 0.8, "val": f"{folder}/val.jsonl"}
    text["train"] = [f"{folder}/text/a.jsonl", f"{folder}/text/b.parquet"]
    return OmegaConf.merge(OmegaConf.load("conf/data/_text.yaml"), text | values)


def source(folder, **values):
    return build_source(settings(folder, **values), str(folder / "cache"))


def test_the_first_of_each_group_is_kept_and_leaks_are_left_out(folder, capsys):
    text = source(folder)
    assert "validation: val.jsonl" in text.check() and not (folder / "cache").exists()  # not looked for yet
    assert read(text) == KEPT
    assert read(text, "val") == read(source(folder, near_duplicates=None), "val")
    assert text.left_out == {f"{folder}/text/a.jsonl": 3, f"{folder}/text/b.parquet": 2}
    line = "5 of 12 training documents are left out, 1 of them like held-out ones (data.near_duplicates=0.8)"
    assert line in capsys.readouterr().out
    assert len(read(source(folder, near_duplicates=None))) == 12


def test_a_cursor_continues_with_exactly_what_would_have_followed(folder):
    stream = source(folder).iterate("train")
    straight = list(islice(stream, 20))
    assert [text for text, _ in straight[:7]] == KEPT and straight[7][0] == KEPT[0]
    for at in range(14):
        assert list(islice(source(folder).iterate("train", straight[at][1]), 5)) == straight[at + 1 : at + 6]


def test_ranks_read_disjoint_parts_and_one_of_them_searches(folder, monkeypatch):
    searched, search = [], NearDuplicates._search
    monkeypatch.setattr(NearDuplicates, "_search", lambda self, shards: searched.append(1) or search(self, shards))
    with ThreadPoolExecutor(3) as pool:
        parts = list(pool.map(lambda rank: read(source(folder), rank=rank, world=3), range(3)))
    assert searched == [1]
    assert [parts[number % 3][number // 3] for number in range(7)] == KEPT


def test_rows_are_found_again_where_text_or_threshold_change_or_their_file_is_damaged(folder):
    first = source(folder)
    assert read(first) == KEPT
    (file,) = (folder / "cache" / "near_duplicates").glob("*.npz")
    file.write_bytes(file.read_bytes()[:100])
    assert read(source(folder)) == KEPT
    assert len(read(source(folder, near_duplicates=1.0))) == 10  # copies alone: that in capitals, that of four words
    write(folder / "text" / "a.jsonl", [*FIRST, document(4, 1)])
    again = source(folder)
    assert read(again) == KEPT and again.left_out[f"{folder}/text/a.jsonl"] == 4
    assert again.near_duplicates.identity() != first.near_duplicates.identity()


def test_sources_of_a_mixture_share_one_set_of_documents(folder):
    parts = {name: {"path": f"{folder}/text/{name}", "val_size": 1} for name in ("a.jsonl", "b.parquet")}
    text = source(folder, name="mixture", train=None, val=None, sources=parts)
    # One row of each file validates: FIRST[7] and SECOND[4], which resembles SECOND[0] too little.
    assert text.left_out == {f"{folder}/text/a.jsonl": 2, f"{folder}/text/b.parquet": 2}
    assert sorted(read(text)) == sorted([FIRST[0], FIRST[1], FIRST[3], FIRST[5], SECOND[0], SECOND[2]])


def test_shuffled_and_cached_text_leaves_out_the_same(folder, tiny_tokenizer):
    text = source(folder)
    text.shuffle = Shuffle(1, whole=True)
    assert sorted(text for text, _ in islice(text.iterate("train"), 7)) == sorted(KEPT)
    everything = CachedDocuments(source(folder, near_duplicates=None), tiny_tokenizer, folder / "tokens")
    assert len(read(everything)) == 12
    kept = CachedDocuments(source(folder), tiny_tokenizer, folder / "tokens")  # the files of tokens hold every row
    assert [ids.tolist() for ids in read(kept)] == [tiny_tokenizer.encode_document(text).tolist() for text in KEPT]
    assert len(list((folder / "tokens").glob("*.tokens"))) == 2


def test_text_of_the_hub(folder, monkeypatch):
    files = {path.name: path.read_bytes() for path in (write(folder / "a.jsonl", FIRST), folder / "val.jsonl")}
    with Hub(files) as hub:
        point_to(hub, monkeypatch, folder / "hf")
        options = {"name": "hub", "train": None, "val": None, "repo": REPO}
        text = source(folder, **options)
        assert read(text) == KEPT[:4] and list(text.left_out.values()) == [3]
        with pytest.raises(UserError, match="data.near_duplicates=0.8 needs the text in files.*leave data.streaming"):
            source(folder, **options, streaming=True)


def test_counts_stand_in_run_json_and_the_first_lines(folder):
    reading = Reading("documents", parts=[source(folder)])
    assert reading.to_dict()["near_duplicates"] == {f"{folder}/text/a.jsonl": 3, f"{folder}/text/b.parquet": 2}
    (line,) = reading.start_lines()
    assert line.startswith(f"data: dropped as near-duplicates: 5 documents, 3 of {folder}/text/a.jsonl, 2 of ")


def test_a_resumed_run_leaves_out_the_rows_it_began_with(folder):
    cfg = compose("train", "experiment=tiny", "stage=pretrain", "run=one", f"paths.runs={folder}/runs")
    facts = left_out(cfg, source(folder))
    assert facts["near_duplicates"] == 5 and left_out(cfg, source(folder, near_duplicates=None)) == {}
    stage = folder / "runs" / "one" / "pretrain"
    (stage / "checkpoints").mkdir(parents=True)
    (stage / "checkpoints" / "step.ckpt").touch()
    (stage / "run.json").write_text(
        f'{{"config": {{}}, "derived": {{"near_duplicates_id": "{facts["near_duplicates_id"]}"}}}}'
    )
    assert left_out(cfg, source(folder)) == facts
    with pytest.raises(UserError, match="other documents are near-duplicates now than when the run began"):
        left_out(cfg, source(folder, near_duplicates=1.0))


def test_the_size_of_a_text_does_not_count_them(folder, monkeypatch, tiny_tokenizer):
    exact = text_tokens(source(folder), tiny_tokenizer)
    assert exact == sum(len(tiny_tokenizer.encode_document(text)) for text in KEPT)
    monkeypatch.setattr("llm.data.text_size.EXACT_BYTES", 1)
    assert text_tokens(source(folder), tiny_tokenizer) == pytest.approx(exact, rel=0.3)
    assert source(folder).near_duplicates.share_kept() == pytest.approx(7 / 12)  # by which an estimate is scaled


def test_what_cannot_be_done_ends_in_one_line(folder, tmp_path, monkeypatch):
    write(folder / "text" / "copy.jsonl", [document(50), document(51)])
    with pytest.raises(UserError, match="all training documents are near-duplicates of held-out ones"):
        read(source(folder, train=f"{folder}/text/copy.jsonl"))
    with pytest.raises(UserError, match="data.near_duplicates=0.8 is not read by this option of data"):
        build_source(OmegaConf.merge(settings(folder), {"name": "embedded", "train": None, "val": None}), "cache")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written.*choose another paths.data"):
        read(build_source(settings(folder), str(tmp_path / "file")))
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(
        UserError, match=r"data.near_duplicates needs a package of its own: pip install -e '.\[dedup\]'"
    ):
        source(folder)


def test_runs_of_words_and_of_characters():
    assert runs("A b  c\nd e f") == ["a b c d e", "b c d e f"] and runs("Two words") == ["two words"]
    written = "人工知能は計算機科学の一分野である"  # no spaces
    assert runs(written) == [written[start : start + 13] for start in range(len(written) - 12)]
    assert runs("1. 保持健康饮食习惯\n2. 每天运动")[0] == "1.保持健康饮食习惯2.每"  # a list
    assert runs("half \ud800 a character")


@pytest.mark.parametrize("text", ["\ud800 " + document(1), "語" * 40, "x"])
def test_any_text_can_be_compared(folder, text):
    write(folder / "text" / "a.jsonl", [text, text])
    assert read(source(folder, train=f"{folder}/text/a.jsonl")) == [text]


@pytest.mark.parametrize("threshold, count", [(0.5, 32), (0.8, 16), (1.0, 4)])
def test_fewer_bands_are_enough_where_documents_must_be_more_alike(threshold, count):
    assert bands(threshold) == count
