"""Scores of a model on tasks: accuracy and pass@k.

Functions take a network, an engine and tasks, never a configuration, so that callbacks during training and
`evaluate.py` measure with one code. Batches are formed across items of similar length and shared out among the
processes, which all call the function together and get one result; verdicts depend on neither.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from llm.errors import UserError
from llm.eval.samples import last_question
from llm.inference.sampling import SamplingParams
from llm.parallel import collectives
from llm.tokenizer.chat_format import render_prompt

# (engine, conversations, prompts, sampling, n) -> for each prompt n pairs: conversation as it is judged, last answer.
Draw = Callable[[Any, Sequence[dict], Sequence[list[int]], SamplingParams, int], list[list[tuple[dict, str]]]]
TOO_LONG = "too_long"  # verdict on a prompt that leaves no room for an answer


def evaluate_task(
    engine: Any,
    task: Any,
    max_items: int | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    sampling: SamplingParams | None = None,
    num_samples: int = 1,
    ks: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return the scores of a task: {"accuracy", "n", "stderr", "baseline", "too_long", "verdicts", "records"}.

    Categorical tasks compare the letters' logits at the answer position. Generative ones judge a greedy completion, or
    `num_samples` drawn by `sampling`: then accuracy is the mean share of right ones, and "pass@k" is added for each k
    (default 1 and `num_samples`). "subjects" is added where items name theirs. `max_items` takes that many items evenly
    spread over the task; `batch_size` counts sequences. A prompt that leaves no room for an answer in the model's
    context counts as wrong. verdicts: how many answers ended how; records: one dict per answer, in task order. Raises
    UserError for a task that cannot be evaluated.
    """
    check_task(task)
    indices = spread(len(task), max_items)
    conversations = [task[i] for i in indices]
    if task.kind == "categorical":
        answers, num_samples = _chosen_letters(engine, conversations, batch_size), 1
    else:
        params = sampling or SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens)
        per_batch = max(1, batch_size // num_samples)
        answers = _judged_completions(engine, task, conversations, params, num_samples, per_batch)
    right = [sum(verdict == "pass" for _, verdict in item) for item in answers]
    shares = [n / len(item) for n, item in zip(right, answers, strict=True)]
    verdicts = Counter(verdict for item in answers for _, verdict in item)
    scores = score(own_share(shares)) | {
        "baseline": _baseline(conversations) if task.kind == "categorical" else 0.0,
        "too_long": sum(item[0][1] == TOO_LONG for item in answers),
        "verdicts": dict(verdicts.most_common()),
    }
    if num_samples > 1:
        scores |= pass_at_ks(num_samples, own_share(right), ks)
    scores |= _subject_scores(conversations, shares)
    scores["records"] = [
        record
        for index, conversation, item in zip(indices, conversations, answers, strict=True)
        for record in _records(index, conversation, item)
    ]
    return scores


def check_task(task: Any) -> None:
    """Raise UserError for a task that cannot be evaluated."""
    if task.kind not in ("categorical", "generative"):
        raise UserError(f"task {task.name} is only for training (kind {task.kind}): remove it from data.eval")
    if not len(task):
        raise UserError(f"task {task.name} has no items to evaluate: check its data and limit")


def _subject_scores(conversations: Sequence[dict], shares: Sequence[float]) -> dict[str, Any]:
    """Return {"subjects": {subject: score}}; empty if no item names its subject."""
    by_subject = defaultdict(list)
    for conversation, share in zip(conversations, shares, strict=True):
        by_subject[conversation.get("subject")].append(share)
    if by_subject.keys() == {None}:
        return {}
    return {"subjects": {str(one): score(own_share(by_subject[one])) for one in sorted(by_subject, key=str)}}


def _records(index: int, conversation: dict, answers: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Yield one record per answer of an item, for a line of jsonl."""
    subject = {"subject": conversation["subject"]} if conversation.get("subject") else {}
    for output, verdict in answers:
        yield {"index": index, "prompt": last_question(conversation), "output": output, "verdict": verdict} | subject


def score(shares: Sequence[float]) -> dict[str, float | int]:
    """Return {"accuracy", "n", "stderr"} of the items of all processes, given this one's shares of right answers."""
    from llm.eval.metrics import TaskAccuracy, numbers  # torchmetrics takes as long to import as torch

    metric = TaskAccuracy()
    metric.update(shares)
    found = numbers(metric)
    return {name: found[name] for name in ("accuracy", "n", "stderr")}


def pass_at_ks(n: int, right: Sequence[int], ks: Sequence[int] | None) -> dict[str, float]:
    """Return {"pass@k": mean over the items of all processes}; of this one's, `right` among n answers each are right.

    ks: default 1 and n.
    """
    from llm.eval.metrics import PassAtK, numbers

    metric = PassAtK(ks or (1, n))
    metric.update(n, right)
    return numbers(metric)


def own_share(things: Sequence) -> Sequence:
    """Return the part of a sequence that this process counts, measures or draws."""
    return things[collectives.rank() :: collectives.world_size()]


def chat_core(results: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Return the mean over tasks of (accuracy - baseline) / (1 - baseline): 0 = guessing, 1 = all right.

    Returns None if no task has a baseline.
    """
    known = [result for result in results.values() if result.get("baseline") is not None]
    centred = [(result["accuracy"] - result["baseline"]) / (1 - result["baseline"]) for result in known]
    return sum(centred) / len(centred) if centred else None


def _baseline(conversations: Sequence[dict]) -> float:
    """Return the chance of guessing: one in the usual number of choices."""
    return 1 / Counter(len(conversation["letters"]) for conversation in conversations).most_common(1)[0][0]


def spread(n: int, max_items: int | None) -> list[int]:
    """Return the indices of at most `max_items` of n items at even distances.

    Files are often sorted by subject or difficulty. Raises UserError for a maximum below 1.
    """
    if max_items is not None and max_items < 1:
        raise UserError(f"eval.max_per_task={max_items} must be at least 1 (or null for all items)")
    count = n if max_items is None else min(n, max_items)
    return [i * n // count for i in range(count)]


def batches_by_length(rows: Sequence[int], prompts: Sequence[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Yield groups of rows with prompts of similar length, the longest first: memory runs out early if at all."""
    order = sorted(rows, key=lambda i: (-len(prompts[i]), i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def own_batches(rows: Sequence[int], prompts: Sequence[list[int]], batch_size: int) -> list[tuple[int, list[int]]]:
    """Return this process's share of the batches, as (number of the batch among all, rows)."""
    return own_share(list(enumerate(batches_by_length(rows, prompts, batch_size))))


def _fitting_prompts(engine: Any, conversations: Sequence[dict]) -> tuple[list[list[int]], list[int]]:
    """Return all prompts, and the numbers of those with room for an answer in the model's context."""
    prompts = [render_prompt(engine.tokenizer, conversation) for conversation in conversations]
    return prompts, [i for i, prompt in enumerate(prompts) if len(prompt) < engine.net.config.seq_len]


def _shared_out(n: int, own: dict[int, list[tuple[str, str]]], num_samples: int) -> list[list[tuple[str, str]]]:
    """Return the answers of all processes by item; items that nobody answered were too long."""
    everywhere = {i: answers for part in collectives.all_gather_object(own) for i, answers in part.items()}
    return [everywhere.get(i, [("", TOO_LONG)] * num_samples) for i in range(n)]


def draw_answers(
    engine: Any,
    conversations: Sequence[dict],
    prompts: Sequence[list[int]],
    params: SamplingParams,
    num_samples: int,
) -> list[list[tuple[dict, str]]]:
    """Return `num_samples` answers to each prompt, as pairs (conversation, answer)."""
    drawn = engine.generate(prompts, params, num_samples)
    return [
        [(conversation, engine.tokenizer.decode(sample.ids)) for sample in samples]
        for conversation, samples in zip(conversations, drawn, strict=True)
    ]


def _judged_completions(
    engine: Any,
    task: Any,
    conversations: list[dict],
    params: SamplingParams,
    num_samples: int,
    prompts_per_batch: int,
    draw: Draw = draw_answers,
) -> list[list[tuple[str, str]]]:
    """Return [(completion, verdict), ...] of each item. Each batch draws with its own seed, from `params.seed` on."""
    prompts, fits = _fitting_prompts(engine, conversations)
    own = {}
    for number, rows in own_batches(fits, prompts, prompts_per_batch):
        asked, seeded = [conversations[i] for i in rows], replace(params, seed=params.seed + number)
        drawn = draw(engine, asked, [prompts[i] for i in rows], seeded, num_samples)
        judged, texts = zip(*(pair for pairs in drawn for pair in pairs), strict=True)
        verdicts = task.verdicts(judged, texts)
        pairs = list(zip(texts, verdicts, strict=True))
        own |= {i: pairs[k * num_samples : (k + 1) * num_samples] for k, i in enumerate(rows)}
    return _shared_out(len(prompts), own, num_samples)


@torch.no_grad()
def _chosen_letters(engine: Any, conversations: list[dict], batch_size: int) -> list[list[tuple[str, str]]]:
    """Return [(letter, verdict)] of each item: the letter with the largest logit, by one forward pass per batch."""
    net, own = engine.net, {}
    prompts, fits = _fitting_prompts(engine, conversations)
    for _, rows in own_batches(fits, prompts, batch_size):
        lengths = torch.tensor([len(prompts[i]) for i in rows])
        ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
        for row, i in enumerate(rows):
            ids[row, : len(prompts[i])] = torch.tensor(prompts[i])
        logits = net(ids.to(net.device), lengths=lengths.to(net.device), last_only=True)[:, 0].cpu()  # (B, V)
        for row, i in enumerate(rows):
            letters = conversations[i]["letters"]
            best = letters[int(logits[row, _letter_ids(engine.tokenizer, letters)].argmax())]
            own[i] = [(best, "pass" if best == conversations[i]["messages"][-1]["content"] else "fail")]
    return _shared_out(len(prompts), own, 1)


def _letter_ids(tokenizer: Any, letters: Sequence[str]) -> list[int]:
    """Return the token id of each letter. Raises UserError for letters of several tokens."""
    ids = [tokenizer.encode(letter) for letter in letters]
    if any(len(one) != 1 for one in ids):
        raise UserError(f"answer letters {list(letters)} must be one token each; the tokenizer gives {ids}")
    return [one[0] for one in ids]


# ---------------------------------------------------------------------------------------------------------------------
# pass@k


def evaluate_pass_at_k(
    engine: Any,
    task: Any,
    num_samples: int,
    params: SamplingParams,
    ks: Sequence[int] | None = None,
    max_items: int | None = None,
    batch_size: int = 8,
    draw: Draw = draw_answers,
) -> dict[str, float]:
    """Return {"pass@k": mean over items} from `num_samples` completions per item.

    ks: default 1 and `num_samples`. `batch_size` counts prompts. Each batch draws with its own seed, derived from
    `params.seed`. draw: of conversations of several turns each is one sample, which its last answer decides.
    """
    conversations = [task[i] for i in spread(len(task), max_items)]
    answers = _judged_completions(engine, task, conversations, params, num_samples, batch_size, draw)
    correct = [sum(verdict == "pass" for _, verdict in item) for item in answers]
    return pass_at_ks(num_samples, own_share(correct), ks)
