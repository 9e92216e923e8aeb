"""The published mixtures of conversations as they are composed: how many rows of what, with stand-ins for the rows."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from conftest import SHARED, compose, needs_shared

from llm.errors import UserError
from llm.stages.common import eval_tasks, task_cache
from llm.tokenizer.chat_format import validate_conversation
from tasks import build_mixture, held_out_mixture
from tasks.base import dialogue
from tasks.registry import fetched_tasks

DATA = SHARED / "data"
CHAT = {"messages": dialogue("Hi!", "Hello!")}
ARC = {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}
MMLU = {"question": "Q?", "choices": ["w", "x", "y", "z"], "answer": 2, "subject": "law"}
GSM = {"question": "How many?", "answer": "3*4 = <<3*4=12>>12\n#### 12"}
# (data set, subset): rows of the splits as they are published, and one that stands for all
SETS = {
    ("HuggingFaceTB/smol-smoltalk", None): (
        {"train": 460_341, "test": 24_229},
        {"messages": dialogue("Hi!", "Hello!")},
    ),
    ("cais/mmlu", "all"): ({"auxiliary_train": 99_842, "test": 14_042}, MMLU),
    ("openai/gsm8k", "main"): ({"train": 7_473, "test": 1_319}, GSM),
    ("allenai/ai2_arc", "ARC-Easy"): ({"train": 2_251, "test": 2_376}, ARC),
    ("allenai/ai2_arc", "ARC-Challenge"): ({"train": 1_119, "test": 1_172}, ARC),
}


class StandIn(Sequence):
    """Stand-in for `HubRows`: as many rows as the data set has, all equal."""

    def __init__(self, source, split, which, check, shuffle_seed=None, limit=None):
        assert shuffle_seed == 42
        sizes, self.row = SETS[source.repo, source.subset]
        self.size = sizes[split]
        check.read_and_check(self.row, "stand-in")

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return self.row


@pytest.fixture
def published(tmp_path, monkeypatch):
    """No network: rows are stand-ins, the list of words is short."""
    words = tmp_path / "words.txt"
    words.write_text("".join(f"word{chr(97 + i)}{chr(97 + j)}\n" for i in range(26) for j in range(26)))
    monkeypatch.setattr("tasks.registry.HubRows", StandIn)
    monkeypatch.setattr("tasks.hub.HubTask.overlap", lambda self, train, test: False)  # what is named apart here
    monkeypatch.setattr("tasks.files.web_file", lambda entry, where, cache: words)


def counts(mixture):
    """Rows of every task of a mixture, and of all."""
    per_task = {task.name: int(n) for task, n in zip(mixture.tasks, np.diff(mixture.starts), strict=True)}
    assert sum(per_task.values()) == len(mixture)
    return per_task, len(mixture)


def train_rows(cfg, stage):
    return counts(build_mixture(cfg.data.tasks, dict(cfg.data.mixture[stage]), "train", cfg.seed, task_cache(cfg)))


ARC_AND_SUMS = {"arc_easy": 2_251, "arc_challenge": 1_119, "gsm8k": 7_473, "chat": 10_000}
BIG = {"chat": 460_341, "mmlu": 99_842, "gsm8k": 7_473}
SPELLING = {"spelling": 80_000, "spell_words": 200_000}


@pytest.mark.parametrize(
    ("lines", "stage", "rows"),
    [
        (["experiment=speedrun_2025", "mixture=nanochat_2025_10_13"], "midtrain", BIG),
        (["experiment=speedrun_2025", "mixture=nanochat_2025_10_13"], "sft", ARC_AND_SUMS),
        (["experiment=speedrun_2025"], "midtrain", BIG | SPELLING | {"identity": 2_000}),
        (["experiment=speedrun_2025"], "sft", ARC_AND_SUMS | {"identity": 1_000, "spelling": 300, "spell_words": 300}),
        (["data=hub"], "midtrain", BIG | SPELLING | {"identity": 2_000}),
        (
            ["experiment=speedrun"],
            "sft",
            {"chat": 460_341, "mmlu": 3 * 99_842, "gsm8k": 4 * 7_473, "identity": 2_000} | SPELLING,
        ),
    ],
)
def test_rows_of_the_published_mixtures(published, lines, stage, rows):
    cfg = compose("train", f"stage={stage}", *lines)
    assert train_rows(cfg, stage) == (rows, sum(rows.values()))


@pytest.mark.parametrize(
    ("mixture", "stage", "thousands"),
    [
        ("nanochat_2025_10_13", "midtrain", 568),
        ("nanochat_2025_10_13", "sft", 21.4),
        ("nanochat_2025_10_24", "midtrain", 848),
        ("nanochat_2025_10_24", "sft", 23),
    ],
)
def test_totals_are_those_that_nanochat_names(published, mixture, stage, thousands):
    """It rounds every task, GSM8K to 8K, and leaves identity out of the 848K."""
    rows, total = train_rows(compose("train", "experiment=speedrun_2025", f"mixture={mixture}"), stage)
    counted = total - rows.get("identity", 0) if stage == "midtrain" else total + 8_000 - rows["gsm8k"]
    assert counted / 1000 == pytest.approx(thousands, abs=0.5 if stage == "midtrain" else 0.05)


def test_2026_has_no_midtraining(published):
    cfg = compose("train", "stage=sft", "experiment=speedrun")
    assert not any(cfg.data.mixture.midtrain.values())
    assert counts(build_mixture(cfg.data.tasks, cfg.data.mixture.midtrain, "train")) == ({}, 0)


@pytest.mark.parametrize("experiment", ["speedrun_2025", "speedrun"])
def test_held_out_rows_and_evaluations(published, experiment):
    cfg = compose("train", "stage=sft", f"experiment={experiment}")
    first = {"speedrun_2025": "midtrain", "speedrun": "sft"}[experiment]
    held_out = held_out_mixture(cfg.data, first, cfg.seed, task_cache(cfg))
    assert counts(held_out) == ({"chat": 24_229, "mmlu": 5_200, "gsm8k": 420}, 29_849)
    if experiment == "speedrun_2025":
        assert counts(held_out_mixture(cfg.data, "sft", cfg.seed, task_cache(cfg)))[0] == {"chat": 24_229}
    evaluated = {name: len(task) for name, task in eval_tasks(cfg).items()}
    assert evaluated["mmlu"] == 14_042 and evaluated["arc_easy"] == 2_376
    assert {task.kind for task in eval_tasks(cfg).values()} == {"categorical"}


def test_all_kinds_come_early_in_the_mixture(published):
    cfg = compose("train", "stage=midtrain", "experiment=speedrun_2025")
    mixture = build_mixture(cfg.data.tasks, dict(cfg.data.mixture.midtrain), "train", cfg.seed, task_cache(cfg))
    found = Counter(mixture.tasks[mixture.locate(i)[0]].name for i in range(8_000))
    assert found["chat"] == pytest.approx(8_000 * 460_341 / 849_656, rel=0.05) and found["identity"] > 5
    for i in range(200):
        validate_conversation(mixture[i])


def test_what_download_fetches():
    assert fetched_tasks(compose("train", "stage=download", "experiment=speedrun_2025").data) == {
        **dict.fromkeys(("chat", "mmlu", "arc_easy", "arc_challenge", "gsm8k", "spelling"), ["train", "test"]),
        "humaneval": ["test"],
        "spell_words": ["train"],
    }
    lines = ["stage=download", "experiment=speedrun", "mixture=nanochat_2026", "data.eval=[]", "data.rl=null"]
    assert list(fetched_tasks(compose("train", *lines).data)) == ["chat", "mmlu", "gsm8k", "spelling", "spell_words"]
    assert fetched_tasks(compose("train", "stage=download", "data=local", "data.path=x").data) == {}


@needs_shared("data")
def test_mixtures_of_local_files():
    def rows(*lines):
        lines = ["data=local", "data.path=x", f"data.tasks_path={DATA}", "mixture=nanochat_2025_10_24", *lines]
        return train_rows(compose("train", "stage=sft", *lines), "sft")[0]

    assert rows("data.mixture.sft.chat=1") == {
        **ARC_AND_SUMS,
        **{"chat": 22_593, "identity": 1_000, "spelling": 300, "spell_words": 300},
    }
    with pytest.raises(UserError, match=r"data\.tasks\.mmlu.train: no file matches .*mmlu/auxiliary_train\.jsonl"):
        rows("data.mixture.sft.mmlu=1")
