"""A reward model as a judge: a frozen network with a scalar head that gives answers to prompts a number each."""

from collections.abc import Mapping, Sequence

import torch

from llm.data.preferences import micro_batches_of, render_row
from llm.eval.preferences import scalar_rewards
from llm.tokenizer.chat_format import content_text, render_conversation
from tasks.base import visible


class RewardModel:
    """A frozen reward model; it moves to the device and computes in the format of the network `like`.

    rows: answers that are scored at a time. The network is not trained, and no process needs another one.
    """

    def __init__(self, net, tokenizer, like, rows: int):
        self.net, self.tokenizer = net.requires_grad_(False).eval(), tokenizer
        self.like, self.rows = like, rows

    def __call__(self, conversations: Sequence[Mapping], completions: Sequence[str]) -> list[float]:
        """Return the reward of each completion as the next answer of its conversation.

        What stands in calls of tools and their results is left out. The turns under "earlier" are part of the prompt.
        """
        pairs = zip(conversations, completions, strict=True)
        return self.scores([asked(conversation) | {"completion": said(text)} for conversation, text in pairs])

    @torch.no_grad()
    def scores(self, rows: Sequence[Mapping]) -> list[float]:
        """Return the reward of each row {"messages": prompt, "completion": messages}, in the order of the rows.

        A row that is longer than the context loses the beginning of its prompt, and then that of its answer. Equal rows
        are scored once: the rounding of a pass depends on its neighbours, and must tell no equal answers apart.
        """
        if not rows:
            return []
        self.net.to(self.like.device).compute_dtype = self.like.compute_dtype
        sequences = [self.sequence(row) for row in rows]
        keys = [tuple(ids) for ids, _ in sequences]
        different = sorted(dict(zip(keys, sequences, strict=True)).items(), key=lambda one: -len(one[0]))
        found: list[float] = []
        for micro in micro_batches_of([[one] for _, one in different], None, self.rows):  # it keeps this order
            moved = {key: value.to(self.net.device) for key, value in micro.items()}
            found += scalar_rewards(self.net, moved).float().tolist()
        scores = dict(zip((key for key, _ in different), found, strict=True))
        return [scores[key] for key in keys]

    def sequence(self, row: Mapping) -> tuple[list[int], list[int]]:
        """Return the ids of a row and their mask, at most as many as the context holds."""
        limit = self.net.config.seq_len
        sequences, _ = render_row(self.tokenizer, row, limit)
        if sequences is not None:
            return sequences[0]
        ids, mask = render_conversation(self.tokenizer, {"messages": [*row["messages"], *row["completion"]]})
        return ids[:1] + ids[1 - limit :], mask[:1] + mask[1 - limit :]


def said(text: str) -> list[dict]:
    """Return what a reader sees of an answer as the messages of a turn."""
    return [{"role": "assistant", "content": visible(text)}]


def asked(conversation: Mapping) -> dict:
    """Return {"messages"}: a conversation up to where its last answer begins, with the turns under "earlier"."""
    messages = list(conversation["messages"])
    if messages[-1]["role"] == "assistant":
        messages.pop()
    for answer, reply in conversation.get("earlier") or []:
        messages += [*said(answer), {"role": "user", "content": reply}]
    return {"messages": messages}


def data_answers(conversations: Sequence[Mapping]) -> list[dict]:
    """Return rows {"messages", "completion"} of better and worse answers that the data gives to conversations.

    Of pairs both answers, of labelled answers each; of tasks the own answer, and that of the next conversation.
    """
    rows = []
    for place, one in enumerate(conversations):
        names = [name for name in ("chosen", "rejected", "completion") if name in one]
        own = [one[name] for name in names]
        if not names:
            own = [other["messages"][-1:] for other in (one, conversations[(place + 1) % len(conversations)])]
        rows += [asked(one) | {"completion": _as_read(messages)} for messages in own]
    return rows


def _as_read(messages: Sequence[Mapping]) -> list[dict]:
    """Return messages as `said` makes them of texts."""
    return [{"role": m["role"], "content": visible(content_text(m["content"]))} for m in messages]
