"""CORE one example at a time, as plainly as can be: what llm/eval/core.py must agree with, and is timed against.

Every sequence is rendered, tokenised and fed whole, padded to the longest choice; all logits are made. Follows the
published definition (DataComp-LM, arXiv 2406.11794; nanochat's seeds and prompts), independently of llm/eval/core.py.
"""

import random

import torch
import torch.nn.functional as F

DELIMITER = "continuation_delimiter"


def load(rows):
    rows = list(rows)
    random.Random(1337).shuffle(rows)
    return rows


def render(entry, data, index):
    """Texts of one example; `entry` is the task's entry of core.yaml."""
    kind, delimiter = entry["icl_task_type"], entry.get(DELIMITER, " ")
    others = [i for i in range(len(data)) if i != index]
    wanted = min(entry["num_fewshot"][0], len(others))
    shots = [data[i] for i in random.Random(1234 + index).sample(others, wanted)]
    item, text = data[index], ""
    for shot in shots:
        if kind == "multiple_choice":
            text += f"{shot['query']}{delimiter}{shot['choices'][shot['gold']]}\n\n"
        elif kind == "schema":
            text += f"{shot['context_options'][shot['gold']]}{delimiter}{shot['continuation']}\n\n"
        else:
            text += f"{shot['context'].strip()}{delimiter}{shot['continuation']}\n\n"
    if kind == "multiple_choice":
        return [f"{text}{item['query']}{delimiter}{choice}" for choice in item["choices"]]
    if kind == "schema":
        return [f"{text}{context}{delimiter}{item['continuation']}" for context in item["context_options"]]
    prompt = f"{text}{item['context'].strip()}{delimiter}"
    return [prompt.strip(), prompt + item["continuation"]]


def same_tokens(sequences):
    """Count the tokens that all sequences have in common from their first on."""
    n = 0
    while n < min(map(len, sequences)) and len({one[n] for one in sequences}) == 1:
        n += 1
    return n


@torch.no_grad()
def judge(net, tokenizer, entry, data, index):
    """(whether the example is right, the mean losses of its choices or the predicted tokens)."""
    kind, item = entry["icl_task_type"], data[index]
    ids = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in render(entry, data, index)]
    if kind == "multiple_choice":
        starts = [same_tokens(ids)] * len(ids)
    elif kind == "schema":
        starts = [len(one) - same_tokens([one[::-1] for one in ids]) for one in ids]
    else:
        assert ids[1][: len(ids[0])] == ids[0]
        starts, ids = [len(ids[0])], ids[1:]
    too_long = [max(0, len(one) - net.config.seq_len) for one in ids]
    starts = [start - n for start, n in zip(starts, too_long, strict=True)]
    ids = [one[n:] for one, n in zip(ids, too_long, strict=True)]
    batch = torch.full((len(ids), max(map(len, ids))), tokenizer.bos_id)
    for row, one in zip(batch, ids, strict=True):
        row[: len(one)] = torch.tensor(one)
    logits = net(batch.to(net.device))
    if kind == "language_modeling":
        predicted = logits[0, starts[0] - 1 : -1].argmax(-1).tolist()
        return predicted == ids[0][starts[0] :], predicted
    targets = batch.roll(-1, dims=1).to(net.device)
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(batch.shape)
    losses = [
        nats[i, start - 1 : len(one) - 1].mean().item() for i, (one, start) in enumerate(zip(ids, starts, strict=True))
    ]
    return losses.index(min(losses)) == item["gold"], losses
