"""Evaluations of preferences during training: held-out pairs, and free answers compared with the parent's."""

import math
from collections.abc import Callable, Sequence

from callbacks.cadence import Periodic
from llm.checkpoint.model_folder import load_model_folder
from llm.eval.preferences import Rewards, free_answers, length_controlled, preference_scores, wins
from llm.eval.task_scores import own_share, score
from llm.parallel import collectives
from llm.parallel.strategy import full_model


class PreferenceEval(Periodic):
    """Logs `preference/accuracy` with its interval and `preference/margin` of held-out rows, before the first step too.

    batches: this process's micro-batches; prepare: adds what `rewards` needs of a reference, once.
    """

    def __init__(self, every: int, batches: Sequence[dict], rewards: Rewards, prepare: Callable | None = None):
        super().__init__(every, at_start=True)
        self.batches, self.rewards, self.prepare = batches, rewards, prepare

    def act(self, trainer, module, step) -> None:
        net = full_model(module.net)
        if self.prepare is not None:
            self.prepare(self.batches, net)
            self.prepare = None
        found = preference_scores(net, self.batches, self.rewards)
        found.pop("n", None)
        module.row.update({f"preference/{name}": value for name, value in found.items()})


class WinRate(Periodic):
    """Logs how often greedy answers to held-out prompts are better than those of the stage's parent; ties count half.

    `preference/win_rate` is by the rules of generated rows, whose mean score is `preference/rule`;
    `preference/win_rate_judge` is by the reward model `judge`, and `preference/win_rate_judge_lc` what that would be
    for answers of equal length (`llm.eval.preferences.length_controlled`), beside both mean lengths in characters.
    rows: (source, conversation) pairs; parent: a model folder.
    """

    def __init__(self, every: int, rows: Sequence[tuple], parent, max_new_tokens: int, judge: Callable | None = None):
        super().__init__(every, at_start=True)
        self.rows = own_share(rows)
        self.parent, self.max_new_tokens, self.judge = parent, max_new_tokens, judge
        self.before: list[dict] | None = None

    def act(self, trainer, module, step) -> None:
        net, tokenizer = full_model(module.net), module.context.tokenizer
        if self.before is None:
            other, _ = load_model_folder(self.parent, net.device, verify=False)
            other.compute_dtype = net.compute_dtype
            self.before = self.scored(other, tokenizer)
        own = list(zip(self.scored(net, tokenizer), self.before, strict=True))
        pairs = [one for part in collectives.all_gather_object(own) for one in part]
        for name, key in (("win_rate", "rule"), ("win_rate_judge", "judge")):
            known = [(now, before) for now, before in pairs if key in now]
            if known:
                module.row.update(rates(known, name, key))
        module.net.train()

    def scored(self, net, tokenizer) -> list[dict]:
        """Return of each answer of a network: its text, and its scores by the rule and by the judge, where known."""
        conversations = [conversation for _, conversation in self.rows]
        texts = free_answers(net, tokenizer, conversations, self.max_new_tokens)
        found: list[dict] = [{"text": text} for text in texts]
        for (source, conversation), text, one in zip(self.rows, texts, found, strict=True):
            if "rule" in conversation:
                one["rule"] = source.score(conversation, text)
        if self.judge is not None:
            for one, number in zip(found, self.judge(conversations, texts), strict=True):
                one["judge"] = number
        return found


def rates(pairs: Sequence[tuple[dict, dict]], name: str, key: str) -> dict[str, float]:
    """Return the columns `preference/<name>` of (answer, parent's answer) pairs with scores at `key`.

    Equal answers are a tie, whatever the rounding of their scores says.
    """
    now, before = ([pair[side][key] for pair in pairs] for side in (0, 1))
    equal = [a["text"] == b["text"] for a, b in pairs]
    won = [0.5 if same else win for same, win in zip(equal, wins(now, before), strict=True)]
    found = score(own_share(won))  # it adds up over processes, each of which has all pairs
    columns = {name: found["accuracy"], f"{name}_stderr": found["stderr"]}
    if key == "rule":
        columns["rule"] = math.fsum(now) / len(now)
    else:
        lengths, others = ([len(pair[side]["text"]) for pair in pairs] for side in (0, 1))
        longer = [a - b for a, b in zip(lengths, others, strict=True)]
        columns[f"{name}_lc"], columns[f"{name}_lc_stderr"] = length_controlled(won, longer)
        columns |= {"length": math.fsum(lengths) / len(pairs), "length_parent": math.fsum(others) / len(pairs)}
    return {f"preference/{column}": value for column, value in columns.items()}
