"""Text and task files that the tests of evaluation share."""

import json

import numpy as np

WORDS = "the red fox of ember hill lives near a river and likes green apples more than old stones".split()
TEXT = "The red fox of the north lives in a house near the river and likes apples. " * 3


def phrase(seed: int, n: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, n))


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def data_config(folder):
    """data=local with text and three kinds of task."""
    for shard in range(2):
        jsonl(folder / "text" / f"{shard}.jsonl", [{"text": f"Page {shard}.{i}. {TEXT}"} for i in range(12)])
    labels = ["A", "B", "C", "D"]
    choices = {"text": ["red", "blue", "green", "white"], "label": labels}
    choice = [
        {"question": f"Fox {i}?", "choices": choices, "answerKey": labels[i % 4], "subject": f"fox{i // 2 % 2}"}
        for i in range(9)
    ]
    sums = [
        {"question": f"What is {i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"} for i in range(8)
    ]
    chats = [[{"role": "user", "content": f"Hello {i}"}, {"role": "assistant", "content": "Hi."}] for i in range(5)]
    files = {
        "choice": ("multiple_choice", choice),
        "sums": ("gsm8k", sums),
        "talk": ("chat", [{"messages": messages} for messages in chats]),
    }
    tasks = {}
    for name, (kind, rows) in files.items():
        file = jsonl(folder / f"{name}.jsonl", rows)
        spec = {"type": kind, "source": "local", "train": file, "test": file, "size": None, "test_size": None}
        tasks[name] = spec | {"limit": None, "options": {}}
    return {
        "name": "local",
        "path": str(folder / "text"),
        "column": "text",
        "workers": 4,
        "tasks_path": str(folder),
        "seed": 42,
        "size": 1,
        "val_size": 1,
        "tasks": tasks,
        "mixture": {"midtrain": {"talk": 1, "sums": 1}, "sft": {"talk": 1, "choice": 1}},
        "rl": "sums",
        "eval": ["choice", "sums"],
    }
