"""The CORE metric: accuracy of a base model on 22 tasks, each centred so that guessing is 0 and perfection is 1.

Choices are compared by the mean loss of their tokens, continuations must be greedy in every token (Li et al. 2024,
arXiv 2406.11794). Tokens that sequences share are computed once: the prompt of an example's choices, the story of
several questions. Only the answers' logits are made. Rounding differs from that of a pass over one example, so a
decision that hangs on less than `MARGIN` is taken again by that plain pass: verdicts do not depend on batches.
"""

import csv
import json
import math
import time
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from llm.eval.core_bundle import CoreTask, prompts
from llm.eval.task_scores import own_share
from llm.inference.weights import in_compute_dtype
from llm.parallel import collectives
from llm.utils.files import write_atomic
from llm.utils.format import duration, percent, print_table, value

# A decision must be clear by so many nats or logits: twice the largest difference of batched and plain passes.
MARGIN = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
CHUNK = 1024  # examples tokenised at a time
ENOUGH = {"cpu": 1024}  # a batch of so many tokens takes no more rows that would need padding
ENOUGH_ELSEWHERE = 1 << 14
LOGITS = 1 << 24  # numbers in the logits held at a time
MOST_SHARING = 8  # sequences that share one computed prefix


class Row(NamedTuple):
    """One sequence to score: tokens `ids` (T,) int64, of which those from `start` on are the answer."""

    example: int
    choice: int
    ids: np.ndarray
    start: int
    cut: int  # tokens lost on the left because the context is shorter


class Group(NamedTuple):
    """Rows whose first `shared` tokens are equal."""

    shared: int
    rows: list[Row]


class Scored(NamedTuple):
    """Scores of one row.

    loss: mean nats of the answer's tokens; min_margin: smallest logit margin over these tokens; predicted: the most
    likely token at each place of the answer; greedy: the argmax equals every answer token.
    """

    loss: float
    min_margin: float
    predicted: list[int]
    greedy: bool


def core_metric(tasks: Sequence[CoreTask]) -> Any:
    """Return the metric, an `llm.eval.metrics.Core`, that `evaluate_core_task` fills task by task."""
    from llm.eval.metrics import Core  # torchmetrics takes as long to import as torch

    return Core({task.name: task.baseline for task in tasks})


def evaluate_core_task(
    net: Any, tokenizer: Any, task: CoreTask, batch_size: int = 32, metric: Any = None
) -> dict[str, Any]:
    """Return {"accuracy", "n", "stderr", "centered", "centered_stderr", "shots", "cut", "records"} of a task.

    All processes call it together. batch_size: sequences evaluated together. cut: number of examples whose prompt was
    longer than the model's context and lost its beginning. records: one dict per example, with its scores and verdict.
    metric: of several tasks, to which the examples are added.
    """
    from llm.eval.metrics import numbers

    was_training = net.training
    twin = in_compute_dtype(net.eval())
    records = []
    for start in range(0, len(task.examples), CHUNK):
        records += _evaluate(twin, tokenizer, task, range(start, min(start + CHUNK, len(task.examples))), batch_size)
    net.train(was_training)
    metric = metric or core_metric([task])
    metric.update(task.name, own_share([record["correct"] for record in records]))
    return numbers(metric.task(task.name)) | {
        "shots": task.shots_used,
        "cut": sum(record["cut"] > 0 for record in records),
        "records": records,
    }


def _evaluate(net: Any, tokenizer: Any, task: CoreTask, indices: Sequence[int], batch_size: int) -> list[dict]:
    """Return the records of some examples, in their order."""
    rows = encode(task, tokenizer, indices, net.config.seq_len)
    found = score_rows(net, rows, batch_size)
    by_example: dict[int, list[Row]] = {i: [] for i in indices}
    for row in rows:
        by_example[row.example].append(row)
    margin = MARGIN.get(net.compute_dtype, 0.0)
    close = [
        i for i, own_rows in by_example.items() if is_close(task, [found[i, row.choice] for row in own_rows], margin)
    ]
    rescored: dict[tuple[int, int], Scored] = {}
    for i in own_share(close):
        rescored |= {(i, choice): one for choice, one in enumerate(score_plain(net, by_example[i]))}
    found |= _gather(rescored)
    return [
        record(task, i, [found[i, row.choice] for row in own_rows], max(row.cut for row in own_rows), tokenizer)
        for i, own_rows in by_example.items()
    ]


def score_rows(net: Any, rows: Sequence[Row], batch_size: int) -> dict[tuple[int, int], Scored]:
    """Return {(example, choice): scores} of all rows, computed by all processes together."""
    found: dict[tuple[int, int], Scored] = {}
    enough = ENOUGH.get(net.device.type, ENOUGH_ELSEWHERE)
    for groups in own_share(batches(group(rows), batch_size, enough)):
        members = [row for one in groups for row in one.rows]
        is_shared = len(groups[0].rows) > 1 and net.can_share_prefix
        scored = score_shared(net, groups) if is_shared else score_plain(net, members)
        found |= {(row.example, row.choice): one for row, one in zip(members, scored, strict=True)}
    return _gather(found)


def _gather(found: dict) -> dict:
    """Return the entries of all processes in one dict."""
    return {key: value for part in collectives.all_gather_object(found) for key, value in part.items()}


# ---------------------------------------------------------------------------------------------------------------------
# From examples to batches


def encode(task: CoreTask, tokenizer: Any, indices: Sequence[int], seq_len: int) -> list[Row]:
    """Return the rows of the examples, cut on the left to the model's context."""
    texts = [prompts(task, i) for i in indices]
    encoded = iter(tokenizer.encode_batch([text for one in texts for text in one]))
    rows = []
    for i, one in zip(indices, texts, strict=True):
        ids = [np.array([tokenizer.bos_id, *next(encoded)]) for _ in one]
        for choice, (sequence, start) in enumerate(answers(task.kind, ids)):
            cut = max(0, len(sequence) - seq_len)
            rows.append(Row(i, choice, sequence[cut:], max(1, start - cut), cut))
    return rows


def answers(kind: str, ids: list[np.ndarray]) -> list[tuple[np.ndarray, int]]:
    """Return the sequences to score and where their answers start, never at the first token or behind the last.

    multiple_choice: where the choices first differ; schema: where the ending common to all begins; language_modeling:
    behind the prompt alone, ids[0].
    """
    shortest = min(map(len, ids))
    if kind == "multiple_choice":
        start = min(min(common(ids[0], other) for other in ids[1:]), shortest - 1)
        return [(one, start) for one in ids]
    if kind == "schema":
        length = min(common(ids[0][::-1], other[::-1]) for other in ids[1:])
        return [(one, len(one) - max(1, min(length, shortest - 1))) for one in ids]
    return [(ids[1], min(common(*ids), len(ids[1]) - 1))]


def common(a: np.ndarray, b: np.ndarray) -> int:
    """Return the length of the common beginning."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n


def group(rows: Sequence[Row]) -> list[Group]:
    """Return groups of similar rows: neighbours in lexicographic order that share at least half of their tokens."""
    groups: list[Group] = []
    for row in sorted(rows, key=lambda row: row.ids.astype(">u4").tobytes()):
        if groups and len(groups[-1].rows) < MOST_SHARING:
            last = groups[-1]
            shared = min(last.shared, row.start, common(last.rows[-1].ids, row.ids))
            if 2 * shared >= max(len(row.ids), *(len(other.ids) for other in last.rows)):
                groups[-1] = Group(shared, [*last.rows, row])
                continue
        groups.append(Group(row.start, [row]))
    return groups


def batches(groups: Sequence[Group], batch_size: int, enough: int = ENOUGH_ELSEWHERE) -> list[list[Group]]:
    """Return batches of groups with equally many rows and similar lengths, at most `batch_size` rows each.

    A group with more rows is a batch by itself. enough: tokens from which on a batch takes no group that would be
    padded by more than a tenth.
    """
    formed: list[list[Group]] = []
    by_size = sorted(groups, key=lambda one: (len(one.rows), one.shared, len(one.rows[0].ids)), reverse=True)
    for one in by_size:
        last = formed[-1] if formed else [one]
        n, longest, length = len(last[0].rows), len(last[0].rows[0].ids), len(one.rows[0].ids)
        fits = len(one.rows) == n and (len(last) + 1) * n <= batch_size
        if formed and fits and (len(last) * longest < enough or 10 * length >= 9 * longest):
            last.append(one)
        else:
            formed.append([one])
    return formed


# ---------------------------------------------------------------------------------------------------------------------
# Passes through the network


@torch.no_grad()
def score_plain(net: Any, rows: Sequence[Row]) -> list[Scored]:
    """Score rows by one pass over the whole of them, without their last tokens, behind which nothing is predicted."""
    hidden = net.hidden(padded([row.ids[:-1] for row in rows]).to(net.device))
    return read(net, [hidden[i, row.start - 1 : len(row.ids) - 1] for i, row in enumerate(rows)], rows)


@torch.no_grad()
def score_shared(net: Any, groups: Sequence[Group]) -> list[Scored]:
    """Score groups of equally many rows: one pass over the tokens that a group shares, one over all that follow."""
    rows = [row for one in groups for row in one.rows]
    shared = [one.shared for one in groups for _ in one.rows]
    lengths = torch.tensor([one.shared for one in groups], device=net.device)
    prefixes = padded([one.rows[0].ids[: one.shared] for one in groups]).to(net.device)  # (B, S)
    rest = padded([row.ids[k:-1] for row, k in zip(rows, shared, strict=True)]).to(net.device)  # (B n, T)
    hidden = net.continue_prefixes(prefixes, lengths, len(groups[0].rows), rest)  # (B n, 1 + T, C)
    of_answers = (h[row.start - k : len(row.ids) - k] for h, row, k in zip(hidden, rows, shared, strict=True))
    return read(net, list(of_answers), rows)


def padded(sequences: Sequence[np.ndarray]) -> torch.Tensor:
    """Return sequences as (B, T) with zeros behind the shorter ones: no token sees what comes after it."""
    ids = np.zeros((len(sequences), max(map(len, sequences))), dtype=np.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    return torch.from_numpy(ids)


def read(net: Any, hidden: Sequence[torch.Tensor], rows: Sequence[Row]) -> list[Scored]:
    """Return the scores of each row's answer, from the outputs (t, C) that predict its tokens."""
    targets = torch.from_numpy(np.concatenate([row.ids[row.start :] for row in rows])).to(net.device)
    size = max(1, LOGITS // net.config.vocab_size)
    nats, margins, best = [], [], []
    for part, goal in zip(torch.cat(list(hidden)).split(size), targets.split(size), strict=True):
        logits, goal = net.logits(part), goal.unsqueeze(1)  # (N, V)
        at_goal = logits.gather(1, goal)
        nats.append((logits.logsumexp(1, keepdim=True) - at_goal).squeeze(1))
        best.append(logits.argmax(1))
        margins.append((at_goal - logits.scatter(1, goal, -math.inf).amax(1, keepdim=True)).squeeze(1))
    sizes = [len(one) for one in hidden]
    parts = zip(*(torch.cat(values).cpu().split(sizes) for values in (nats, margins, best, [targets])), strict=True)
    return [
        Scored(nats.mean().item(), margins.min().item(), best.tolist(), torch.equal(best, goal))
        for nats, margins, best, goal in parts
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts


def is_close(task: CoreTask, scored: Sequence[Scored], margin: float) -> bool:
    """Return True if a decision hangs on at most `margin` nats (or logits), so that rounding could change it."""
    if task.kind == "language_modeling":
        return abs(scored[0].min_margin) <= margin
    first, second = sorted(one.loss for one in scored)[:2]
    return second - first <= margin


def record(task: CoreTask, index: int, scored: Sequence[Scored], cut: int, tokenizer: Any) -> dict[str, Any]:
    """Return the verdict on an example, for a line of jsonl.

    index: number in the order of evaluation, on which its few-shot examples depend; line: number in the file; cut:
    tokens that the context could not hold; losses: nats per token.
    """
    item = task.examples[index]
    head = {"index": index, "line": item["line"], "cut": cut}
    if task.kind == "language_modeling":
        text = tokenizer.decode(scored[0].predicted)
        return head | {"prediction": text, "gold": item["continuation"], "correct": scored[0].greedy}
    losses = [one.loss for one in scored]
    best = losses.index(min(losses))
    return head | {"losses": losses, "prediction": best, "gold": item["gold"], "correct": best == item["gold"]}


# ---------------------------------------------------------------------------------------------------------------------
# What evaluate.py prints and writes

COLUMNS = ("task", "accuracy", "stderr", "centered", "n", "shots", "cut", "seconds")


def measure_core(
    net: Any,
    tokenizer: Any,
    tasks: Sequence[CoreTask],
    options: Any,
    folder: Path,
    keep: Callable[[dict], None] = lambda found: None,
) -> dict[str, Any]:
    """Measure CORE, print a table, write core.csv and core/<task>.jsonl; return the entries of eval.json.

    keep: takes those of each task as soon as it is measured. "core" is left out if only some tasks of the bundle were
    asked for (`eval.core_tasks`).
    """
    from llm.eval.metrics import numbers

    scores, rows, metric = {}, [], core_metric(tasks)
    for task in tasks:
        start = time.perf_counter()
        result = evaluate_core_task(net, tokenizer, task, options.batch_size, metric)
        rows.append({"task": task.name, **result, "seconds": round(time.perf_counter() - start, 2)})
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in result["records"])
        write_atomic(folder / "core" / f"{task.name}.jsonl", "".join(lines))
        shown = percent(result["accuracy"], result["stderr"])
        took = duration(rows[-1]["seconds"])
        print(f"{task.name}: {shown} ({result['n']} examples, {took}{notes(task, result)})", flush=True)
        scores[task.name] = {key: result[key] for key in ("accuracy", "centered", "n", "stderr")}
        keep({"core_tasks": scores})
    _write_csv(rows, folder / "core.csv")
    _print_table(rows)
    mean = numbers(metric)
    name = "CORE" if options.core_tasks is None else f"mean of {len(tasks)} tasks"
    print(
        f"{name}: {mean['core']:.4f} ± {mean['core_stderr']:.4f}   details: {folder / 'core.csv'}, {folder / 'core'}/"
    )
    found = {"core_tasks": scores}
    return found if options.core_tasks is not None else {"core": mean["core"]} | found


def _write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    table = StringIO(newline="")
    writer = csv.DictWriter(table, COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, table.getvalue())


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    shares = ("accuracy", "stderr", "centered")
    cells = [
        [
            row["task"],
            *(percent(row[k]) for k in shares),
            *(value(row[k]) for k in COLUMNS[4:7]),
            f"{row['seconds']:.1f}",
        ]
        for row in rows
    ]
    print_table(["task", "accuracy", "± 1 s.e.", *COLUMNS[3:]], cells, title="CORE")


def notes(task: CoreTask, result: dict[str, Any]) -> str:
    """Return remarks on an unusual result: fewer shots than wanted, prompts that were cut."""
    parts = [f", {result['shots']} shots of {task.n_shots}"] if result["shots"] < task.n_shots else []
    parts += [f", {result['cut']} prompts cut to model.seq_len"] if result["cut"] else []
    return "".join(parts)
