"""Batch ramp of pretraining: the first steps are smaller than the others, by whole parts of a step.

A horizon in tokens, passes or FLOPs keeps its tokens, and the run has more steps, as with the batch ramp of Megatron-LM
(there for sample-based training only) and of GPT-3 (arXiv 2005.14165, appendix B: linear from 32,000 tokens).
`max_steps` is a number of steps, whose tokens are fewer. Sizes follow from the configuration alone, never from the
devices or the size of a micro-batch.
"""

from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from llm.scaling.rules import lr_batch_factor

PARTS = 4  # of a step, where stage.batch_parts is null: the first step is one


@dataclass(frozen=True)
class BatchSchedule:
    """Tokens of every step, over all devices: `tokens`, but fewer over the first `share` of the steps.

    The first step has one of `parts` equal parts of `tokens`. Parts are added one at a time, and each size but the
    whole one lasts equally long, as closely as whole steps allow. The default has no ramp. Steps count from 0.
    """

    tokens: int
    share: float = 0.0
    parts: int = 1

    def grows_at(self, steps: int) -> tuple[int, ...]:
        """Return the steps, of a training of `steps`, from which on there is one part more; parts - 1 of them."""
        share = Fraction(str(self.share))  # as it is written: 0.1 is a tenth
        return tuple(ceil(n * share * steps / (self.parts - 1)) for n in range(1, self.parts))

    def tokens_of(self, step: int, steps: int) -> int:
        """Return the tokens of the step `step` of `steps`."""
        return self.tokens // self.parts * (1 + bisect_right(self.grows_at(steps), step))

    def total(self, steps: int, done: int | None = None) -> int:
        """Return the tokens of a training of `steps`, or of the first `done` of its steps."""
        done = steps if done is None else done
        missing = sum(min(step, done) for step in self.grows_at(steps))
        return self.tokens * done - self.tokens // self.parts * missing

    def steps_within(self, tokens: int) -> int:
        """Return the largest number of steps that have at most `tokens` together."""
        low, high = tokens // self.tokens, tokens * self.parts // self.tokens
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.total(middle) <= tokens else (low, middle - 1)
        return low

    def lr_factor(self, step: int, steps: int) -> float:
        """Return the factor on rates that follow the batch: the rule of `optim.scale_lr` for this step's tokens.

        The rule is a square root with a floor (`llm.scaling.rules.lr_batch_factor`); modded-nanogpt's track 1 raises
        its rates by 1.73 as its batch grows threefold.
        """
        return lr_batch_factor(self.tokens_of(step, steps)) / lr_batch_factor(self.tokens)

    def decay_factor(self, step: int, steps: int) -> float:
        """Return the factor on a decay that follows the batch: the square root in the rule of `optim.scale_decay`."""
        return (self.tokens_of(step, steps) / self.tokens) ** 0.5


def batch_schedule(cfg, tokens: int) -> BatchSchedule:
    """Return the sizes of the steps of the stage in `cfg`, whose whole steps have `tokens`."""
    share = cfg.stage.get("batch_ramp")
    return BatchSchedule(tokens) if share is None else BatchSchedule(tokens, share, cfg.stage.batch_parts or PARTS)
