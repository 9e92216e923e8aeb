"""Evaluations of preferences during training: held-out pairs, and free answers compared with the parent's."""

import math
from collections.abc import Callable, Sequence

from callbacks.cadence import Periodic
from llm.checkpoint.model_folder import load_model_folder
from llm.eval.preferences import Rewards, free_scores, preference_scores
from llm.eval.task_scores import score
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
    """Logs `preference/win_rate`: how often a rule finds greedy answers better than those of the stage's parent.

    Ties count half; `preference/rule` is the mean score by the rule. rows: (source, row) pairs whose source has one.
    """

    def __init__(self, every: int, rows: Sequence[tuple], parent, max_new_tokens: int):
        super().__init__(every, at_start=True)
        self.rows, self.parent, self.max_new_tokens = (
            rows[collectives.rank() :: collectives.world_size()],
            parent,
            max_new_tokens,
        )
        self.before: list[float] | None = None

    def act(self, trainer, module, step) -> None:
        net, tokenizer = full_model(module.net), module.context.tokenizer
        if self.before is None:
            other, _ = load_model_folder(self.parent, net.device, verify=False)
            other.compute_dtype = net.compute_dtype
            self.before = free_scores(other, tokenizer, self.rows, self.max_new_tokens)
        now = free_scores(net, tokenizer, self.rows, self.max_new_tokens)
        own = [(0.5 + 0.5 * ((a > b) - (a < b)), a) for a, b in zip(now, self.before, strict=True)]
        every = [one for part in collectives.all_gather_object(own) for one in part]
        wins = score([win for win, _ in own])
        module.row["preference/win_rate"], module.row["preference/win_rate_stderr"] = wins["accuracy"], wins["stderr"]
        module.row["preference/rule"] = math.fsum(value for _, value in every) / len(every)
        module.net.train()
