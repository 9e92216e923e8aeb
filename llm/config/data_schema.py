"""Typed schemas of the config group `data`: sources of text, tasks and mixtures."""

from dataclasses import dataclass, field
from typing import Any

from llm.config.key import ITEMS, SEED, VOCABULARY, key
from llm.config.registries import TASK_TYPES, TEXT_SOURCES


@dataclass
class TaskSpec:
    """One task of `data.tasks`. `source` must be given, and either `type` or `_target_`."""

    source: str = key(
        "embedded = generated, template = identity of your own model, local = files, hub = data set on the hub",
        choices=("embedded", "template", "local", "hub"),
    )
    type: str | None = field(default=None, metadata={"help": "kind of task", "choices": TASK_TYPES})
    _target_: str | None = field(
        default=None, metadata={"help": "task of your own instead of a type: package.module.Class (docs/extend.md)"}
    )
    train: Any = field(
        default=None,
        metadata={"help": "training rows: file, part as rows.json[:700], folder, pattern, address, list; hub: split"},
    )
    test: Any = field(
        default=None,
        metadata={
            "help": "held-out rows: file, folder, pattern, address, list, share of train as 5%; hub: split; "
            "null = by names in train"
        },
    )
    question: str | None = field(
        default=None, metadata={"help": "template of the question for rows of other columns, as in '{Body} {Question}'"}
    )
    answer: str | None = field(
        default=None, metadata={"help": "template of the answer for rows of other columns, as in '{Answer}'"}
    )
    repo: str | None = field(default=None, metadata={"help": "hub: data set, <owner>/<name>"})
    subset: str | None = field(
        default=None, metadata={"help": "hub: configuration of the data set, where there are several"}
    )
    revision: str | None = field(
        default=None, metadata={"help": "hub: branch, tag or commit of the data set; null = main"}
    )
    shuffle_seed: int | None = field(
        default=None,
        metadata={"help": "hub: seed of the order of the rows; null = as published", "low": 0, "high": SEED},
    )
    size: int | None = field(
        default=None,
        metadata={"help": "training items to generate (embedded, template, spelling)", "low": 0, "high": 10**7},
    )
    test_size: int | None = field(
        default=None,
        metadata={"help": "held-out items to generate (embedded, template, spelling)", "low": 0, "high": 10**7},
    )
    limit: int | None = field(
        default=None,
        metadata={"help": "items of a split that are used, from the first on; null = all", "low": 1, "high": ITEMS},
    )
    answer_form: str | None = field(
        default=None,
        metadata={
            "help": "gsm8k, second_try: think = <think>...</think><answer>42</answer> in rows, prompt and reward; "
            "null = #### 42"
        },
    )
    fields: Any = field(
        default=None,
        metadata={"help": "chat rows: columns of other names, as in {user: question, assistant: response}"},
    )
    roles: Any = field(default=None, metadata={"help": "chat rows: roles of other names, as in {bot: assistant}"})
    ignore: list[str] | None = field(
        default=None, metadata={"help": "chat rows: further keys of rows and messages that mean nothing"}
    )
    encoding: str | None = field(
        default=None, metadata={"help": "encoding of local files of rows, such as cp1252 or utf-16; null = utf-8"}
    )
    merge_neighbours: bool | None = field(
        default=None,
        metadata={"help": "chat rows: true = join neighbouring messages of one role; null = refuse such rows"},
    )
    empty_answers: str | None = field(
        default=None,
        metadata={"help": "chat rows with an empty answer: stop or drop; null = stop", "choices": ("stop", "drop")},
    )
    false_labels: str | None = field(
        default=None,
        metadata={"help": "chat rows marked label: false: stop or drop; null = stop", "choices": ("stop", "drop")},
    )
    options: dict[str, Any] = field(default_factory=dict, metadata={"help": "arguments of the task's type"})


@dataclass
class MixtureConfig:
    """Tasks of the chat stages. Its keys, <stage> and <stage>_val, come from the table of stages: see `root_schema`."""


@dataclass
class SourceSpec:
    """One source of `data.sources`: files at a path or address (path), or a data set on the hub (repo)."""

    weight: float = field(
        default=1.0,
        metadata={
            "help": "share of the characters, relative to the weights of the other sources",
            "low": 0,
            "high": 10**9,
        },
    )
    path: str | None = field(
        default=None, metadata={"help": "folder, file, pattern or address of text in any format of docs/data.md"}
    )
    train: Any = field(default=None, metadata={"help": "text to train on: a path, a pattern or a list, before path"})
    val: Any = field(default=None, metadata={"help": "text that validates: a path, a pattern or a list"})
    bad_rows: str | None = field(
        default=None,
        metadata={"help": "rows that cannot be used: stop, or skip; null = data.bad_rows", "choices": ("stop", "skip")},
    )
    encoding: str | None = field(default=None, metadata={"help": "encoding of text files; null = utf-8"})
    separator: str | None = field(
        default=None, metadata={"help": "ends a document of a txt file; null = blank lines and <|endoftext|>"}
    )
    repo: str | None = field(default=None, metadata={"help": "data set on the Hugging Face hub, <owner>/<name>"})
    revision: str | None = field(
        default=None, metadata={"help": "branch, tag or commit of the data set on the hub; null = main"}
    )
    files: str | None = field(default=None, metadata={"help": "pattern of the shards on the hub; null = all"})
    shards: int | None = field(
        default=None,
        metadata={"help": "train on the first so many shards; null = all but the last", "low": 1, "high": 10**6},
    )
    column: str = field(default="text", metadata={"help": "column or field that holds the text"})
    val_size: int | None = field(
        default=None,
        metadata={
            "help": "documents for validation, the last ones of the last file; null = all of that file",
            "low": 1,
            "high": ITEMS,
        },
    )
    streaming: bool = field(
        default=False, metadata={"help": "read the shards over the network while training and store nothing"}
    )


@dataclass
class DataConfig:
    """Config group `data`: text, tasks and mixtures."""

    name: str = key("where text comes from", choices=TEXT_SOURCES, fixed=True)
    path: str | None = key(
        "folder, file, pattern or address of text in any format of docs/data.md (data=local), or of tokens",
        main=True,
    )
    train: Any = key("text to train on: a path, a pattern or a list, instead of data.path; null = by file names")
    val: Any = key("text that validates: a path, a pattern or a list of paths; null = by file names")
    bad_rows: str = key(
        "rows that cannot be used: stop = an error that lists bad rows | skip = leave out bad rows and count",
        choices=("stop", "skip"),
    )
    encoding: str | None = key("encoding of text files, such as cp1252 or utf-16; null = utf-8")
    separator: str | None = key("ends a document of a txt file, inline too; null = blank lines and <|endoftext|>")
    repo: str | None = key("data set on the Hugging Face hub, <owner>/<name>: parquet, jsonl or txt shards", main=True)
    revision: str | None = key("branch, tag or commit of data.repo; null = main")
    files: str | None = key("pattern of the shards of data.repo, such as 'data/train-*.parquet'; null = all")
    shards: int | None = key(
        "train on the first so many shards of data.repo; null = all but the last", low=1, high=10**6, main=True
    )
    workers: int = key("number of files fetched from the hub in parallel", low=1, high=256)
    streaming: bool = key("read the shards over the network while training and store nothing (data=hub)")
    sources: Any = key(
        "sources by name: {books: {path: ..., weight: 2}, web: {repo: ...}} (data=mixture)", items=SourceSpec
    )
    source: Any = key(
        "text of your own: {_target_: package.module.Class, ...} with all arguments (data=custom, docs/extend.md)"
    )
    column: str = key("column or field that holds the text")
    packing: str = key(
        "pretrain: best_fit = rows of whole documents, crops kept | crop = crops dropped | stream = one flat stream | "
        "auto = crop where a run then reads the text once at most, else best_fit",
        choices=("auto", "best_fit", "crop", "stream"),
    )
    shuffle: int | None = key(
        "pretrain: seed of an order of the documents that is new in every epoch; null = as in the files",
        low=0,
        high=SEED,
    )
    token_cache: Any = key(
        "pretrain, write_tokens: keep the tokens of text files in this folder or store; true = <paths.runs>/token_cache"
    )
    end_of_text: int | None = key(
        "id between documents in token files of others (data=tokens); null = the first behind the tokenizer's tokens",
        low=0,
        high=VOCABULARY,
    )
    near_duplicates: float | None = key(
        "drop training documents whose share of runs of five words with an earlier or a held-out document is at least "
        "so large, such as 0.8 (extra: dedup); null = read every document",
        low=0.5,
        high=1,
    )
    prompts: list[str] | None = key(
        "texts that samples of a pretrained model continue (stage.prompts); null = beginnings of held-out documents"
    )
    tasks_path: str = key("folder that the task files of data=local lie in", main=True)
    seed: int = key("seed of the generator (data=embedded)", low=0, high=SEED)
    size: int | None = key("documents to generate for training (data=embedded)", low=1, high=10**7)
    val_size: int | None = key(
        "documents for validation: generated, or the last ones of the last file", low=1, high=ITEMS
    )
    tasks: dict[str, TaskSpec] = key("all tasks by name")
    preferences: dict[str, TaskSpec] = key("sources of preferences by name, type=preference: stages reward and dpo")
    mixture: MixtureConfig = key("conversations that the chat stages train on")
    rl: str | None = key("task that grpo, ppo, distill and best_of_n train on")
    eval: list[str] = key("tasks of chat evaluations")
