"""Scores of a model: bits per byte, accuracy on tasks, pass@k and samples.

Functions take a network, an engine and tasks, never a configuration, so that callbacks during training and
`evaluate.py` measure with the same code. Batches are formed across items of similar length and shared out among the
processes, which all call the same function and get the same result; verdicts do not depend on either.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from llm import distributed
from llm.chat import render_prompt
from llm.errors import UserError
from llm.sampling import SamplingParams

# ---------------------------------------------------------------------------------------------------------------------
# Bits per byte


@torch.no_grad()
def nats_and_bytes(
    net: Callable[..., torch.Tensor],
    batches: Iterable[dict[str, torch.Tensor]],
    token_bytes: np.ndarray | torch.Tensor,
    device: torch.device | str | None = None,
) -> tuple[float, int]:
    """Summed loss in nats and summed bytes of the targets: what ranks add up before dividing.

    net: `(ids (B, T), targets=(B, T), reduction="none") -> (B, T)` nats, a GPT or its compiled forward (then give
    `device`). batches: {"inputs", "targets"}, -1 = ignored. token_bytes: (vocab,) bytes per token, specials 0: targets
    without bytes count on neither side.
    """
    device = device or getattr(net, "device", "cpu")
    sizes = torch.as_tensor(token_bytes, device=device)
    sums = []  # one small tensor per batch, copied to the host once at the end
    for batch in batches:
        inputs, targets = batch["inputs"].to(device), batch["targets"].to(device)
        nats = net(inputs, targets=targets, reduction="none")
        n_bytes = sizes[targets.clamp(min=0)] * (targets >= 0)  # (B, T)
        sums.append(torch.stack((torch.where(n_bytes > 0, nats, 0.0).sum(), n_bytes.sum().float())))
    if not sums:
        return 0.0, 0
    nats_sum, bytes_sum = torch.stack(sums).cpu().double().sum(0).tolist()
    return nats_sum, int(bytes_sum)


def bits_per_byte(
    net: Callable[..., torch.Tensor],
    batches: Iterable[dict[str, torch.Tensor]],
    token_bytes: np.ndarray | torch.Tensor,
    device: torch.device | str | None = None,
) -> float:
    """Summed nats / (ln 2 x summed bytes), comparable across vocabularies; inf if the targets have no bytes.

    Every process brings its share of the batches. Arguments as `nats_and_bytes`.
    """
    nats, n_bytes = distributed.total(nats_and_bytes(net, batches, token_bytes, device))
    return nats / (math.log(2) * n_bytes) if n_bytes else math.inf


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


def evaluate_task(
    engine: Any,
    task: Any,
    max_items: int | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Accuracy of a task: {"accuracy", "n", "stderr", "verdicts", "too_long"}.

    Categorical tasks compare the letters' logits at the answer position; generative ones judge a greedy completion.
    `max_items` takes that many items evenly spread over the task. A prompt that leaves no room for an answer in the
    model's context counts as wrong and in "too_long". verdicts: one bool per item, in task order.
    """
    conversations = [task[i] for i in spread(len(task), max_items)]
    if not conversations:
        raise UserError(f"task {task.name} has no items to evaluate: check its data and limit")
    prompts = [render_prompt(engine.tokenizer, conversation) for conversation in conversations]
    limit = engine.net.config.seq_len
    fits = [i for i, prompt in enumerate(prompts) if len(prompt) < limit]
    verdicts = [False] * len(prompts)
    for _, rows in own_batches(fits, prompts, batch_size):
        if task.kind == "categorical":
            judged = _judge_letters(engine, [prompts[i] for i in rows], [conversations[i] for i in rows])
        elif task.kind == "generative":
            texts = _complete(engine, [prompts[i] for i in rows], max_new_tokens)
            judged = [task.evaluate(conversations[i], text) for i, text in zip(rows, texts, strict=True)]
        else:
            raise UserError(f"task {task.name} is only for training (kind {task.kind}): remove it from data.eval")
        for i, verdict in zip(rows, judged, strict=True):
            verdicts[i] = bool(verdict)
    verdicts = [verdict > 0 for verdict in distributed.total(verdicts)]
    return {**score(verdicts), "verdicts": verdicts, "too_long": len(prompts) - len(fits)}


def score(verdicts: Sequence[bool]) -> dict[str, float | int]:
    """{"accuracy", "n", "stderr"}; the standard error of a proportion, sqrt(p (1 - p) / n)."""
    n = len(verdicts)
    accuracy = sum(verdicts) / n
    return {"accuracy": accuracy, "n": n, "stderr": math.sqrt(accuracy * (1 - accuracy) / n)}


def spread(n: int, max_items: int | None) -> list[int]:
    """Indices of at most `max_items` of n items at even distances: files are often sorted by subject or difficulty."""
    if max_items is not None and max_items < 1:
        raise UserError(f"eval.max_per_task={max_items} must be at least 1 (or null for all items)")
    count = n if max_items is None else min(n, max_items)
    return [i * n // count for i in range(count)]


def batches_by_length(rows: Sequence[int], prompts: Sequence[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Groups of rows with prompts of similar length, the longest first: memory runs out early if at all."""
    order = sorted(rows, key=lambda i: (-len(prompts[i]), i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def own_batches(rows: Sequence[int], prompts: Sequence[list[int]], batch_size: int) -> list[tuple[int, list[int]]]:
    """This process's share of those batches, with their numbers among all."""
    numbered = list(enumerate(batches_by_length(rows, prompts, batch_size)))
    return numbered[distributed.rank() :: distributed.world_size()]


@torch.no_grad()
def _judge_letters(engine: Any, prompts: list[list[int]], conversations: list[dict]) -> list[bool]:
    """Whether the right letter has the largest logit among the item's letters, one forward pass for all rows."""
    net = engine.net
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    logits = net(ids.to(net.device), lengths=lengths.to(net.device), last_only=True)[:, 0].cpu()  # (B, V)
    verdicts = []
    for row, conversation in enumerate(conversations):
        letters = conversation["letters"]
        best = letters[int(logits[row, _letter_ids(engine.tokenizer, letters)].argmax())]
        verdicts.append(best == conversation["messages"][-1]["content"])
    return verdicts


def _letter_ids(tokenizer: Any, letters: Sequence[str]) -> list[int]:
    ids = [tokenizer.encode(letter) for letter in letters]
    if any(len(one) != 1 for one in ids):
        raise UserError(f"answer letters {list(letters)} must be one token each; the tokenizer gives {ids}")
    return [one[0] for one in ids]


def _complete(engine: Any, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    params = SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens)
    return [engine.tokenizer.decode(samples[0].ids) for samples in engine.generate(prompts, params)]


# ---------------------------------------------------------------------------------------------------------------------
# pass@k


def pass_at_k(n: int, n_correct: int, k: int) -> float:
    """Chance that at least one of k samples, drawn from n of which `n_correct` are right, is right.

    The unbiased estimate 1 - C(n - c, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374).
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= {n} samples")
    return 1.0 - math.comb(n - n_correct, k) / math.comb(n, k)


def evaluate_pass_at_k(
    engine: Any,
    task: Any,
    num_samples: int,
    params: SamplingParams,
    ks: Sequence[int] | None = None,
    max_items: int | None = None,
    batch_size: int = 8,
) -> dict[str, float]:
    """{"pass@k": mean over items} for each k (default 1 and `num_samples`), from `num_samples` completions per item.

    `batch_size` counts prompts. Each batch draws with its own seed, derived from `params.seed`.
    """
    conversations = [task[i] for i in spread(len(task), max_items)]
    prompts = [render_prompt(engine.tokenizer, conversation) for conversation in conversations]
    fits = [i for i, prompt in enumerate(prompts) if len(prompt) < engine.net.config.seq_len]
    correct = [0] * len(prompts)
    for number, rows in own_batches(fits, prompts, batch_size):
        drawn = engine.generate([prompts[i] for i in rows], replace(params, seed=params.seed + number), num_samples)
        for i, samples in zip(rows, drawn, strict=True):
            texts = [engine.tokenizer.decode(sample.ids) for sample in samples]
            correct[i] = sum(bool(task.evaluate(conversations[i], text)) for text in texts)
    correct = [int(c) for c in distributed.total(correct)]
    ks = sorted({1, num_samples} if ks is None else set(ks))
    return {f"pass@{k}": sum(pass_at_k(num_samples, c, k) for c in correct) / len(correct) for k in ks}


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def questions(mixture, n: int = 4) -> list[dict]:
    """The first turns of the first n held-out conversations, to be answered as samples."""
    firsts = []
    for i in range(min(n, len(mixture))):
        messages = mixture[i]["messages"]
        end = next(k for k, m in enumerate(messages) if m["role"] == "assistant")
        firsts.append({"messages": messages[:end]})
    return firsts


def text_prompts(documents: Iterable[str], n: int = 4, n_words: int = 6) -> list[str]:
    """The first words of n held-out documents: prompts that suit whatever language and subject a run was trained on.

    Cut before the end of a sentence, where a model could rightly stop.
    """
    prompts = []
    for document in documents:
        words = document.split()[: n_words + 1]
        if len(words) <= n_words:
            continue
        del words[n_words:]
        while words and words[-1].endswith((".", "!", "?", "。")):
            words.pop()
        if words:
            prompts.append(" ".join(words))
        if len(prompts) == n:
            break
    return prompts


def draw_samples(engine: Any, prompts: Sequence[str | dict], max_new_tokens: int = 64) -> list[dict[str, str]]:
    """Greedy completions as [{"prompt", "completion"}]. A string is continued, a conversation is answered."""
    tokenizer = engine.tokenizer
    ids = [
        [tokenizer.bos_id, *tokenizer.encode(prompt)] if isinstance(prompt, str) else render_prompt(tokenizer, prompt)
        for prompt in prompts
    ]
    room = [i for i, one in enumerate(ids) if len(one) < engine.net.config.seq_len]
    texts = _complete(engine, [ids[i] for i in room], max_new_tokens) if room else []
    shown = [prompts[i] if isinstance(prompts[i], str) else _last_question(prompts[i]) for i in room]
    return [{"prompt": prompt, "completion": text} for prompt, text in zip(shown, texts, strict=True)]


def _last_question(conversation: dict) -> str:
    """Text of the last user turn: what a sample of a chat model answers."""
    return next(m["content"] for m in reversed(conversation["messages"]) if m["role"] == "user")
