"""Estimates how long a training will take on this machine, by the rate of its matrix products and earlier runs."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from llm.scaling.machine import NAMES, Parts, Run

# Shares of the rate of large square products that the parts of a training reach, as measured (docs/lab_notebook.md).
TRAINING, EVALUATION, MUON, DRAWING = 0.45, 0.5, 0.3, 0.1
MUON_PASSES = 5 * 6  # its iterations, each three products of 2 r^2 c for a matrix (r, c), r <= c
LAYER_SECONDS = 1e-3  # of a layer in a micro-batch beside its products, forward and backward
COMPILED_SHARE = 0.8  # of the time of an eager step
COMPILE_SECONDS = 40.0  # that the first step waits for the compiler
REST_SECONDS = 2.0  # the trainer, the hand-over, the report
LIKE = 8.0  # largest ratio of FLOPs per step at which an earlier run says something
MOST_LIKE = 5  # earlier runs that are asked


@dataclass(frozen=True)
class Work:
    """Work of one process of a training.

    flops: of a step's training passes. drawn: FLOPs of the answers drawn in a step. width, blocks: channels, and
    parameters in matrices of the blocks, which Muon updates (0 without it). layers: that go through in a step, all
    micro-batches together. evaluated, sampled: FLOPs of all evaluations, without and with answers drawn.
    """

    stage: str
    steps: int
    flops: float
    drawn: float
    layers: int
    width: int
    blocks: int
    evaluated: float
    sampled: float
    compiled: bool


def expected(work: Work, rate: float) -> Parts:
    """Return what a training takes by the matrix rate (FLOP/s) alone."""
    muon = MUON_PASSES * work.width * work.blocks
    step = (work.flops / TRAINING + muon / MUON + work.drawn / DRAWING) / rate + work.layers * LAYER_SECONDS
    step *= COMPILED_SHARE if work.compiled else 1.0
    pauses = (work.evaluated / EVALUATION + work.sampled / DRAWING) / rate
    return Parts(step, step + (COMPILE_SECONDS if work.compiled else 0.0), pauses, REST_SECONDS)


@dataclass(frozen=True)
class Estimate:
    """Seconds that a training of `steps` steps takes, of which `evaluations`, and the number of runs they rest on."""

    parts: Parts
    steps: int
    runs: int

    @property
    def seconds(self) -> float:
        p = self.parts
        return p.first + p.step * max(self.steps - 1, 0) + p.pauses + p.rest


def estimate(work: Work, rate: float, share: float, on: str, earlier: Sequence[Run]) -> Estimate:
    """Return the estimate by the rate, each part times what it took of that in the runs most like this one.

    These are runs of the same stage on the same device, and of a similar size; the median counts. share: of the
    processors' time that is free for this training.
    """
    by_rate = expected(work, rate)
    like = [run for run in earlier if (run.on, run.stage) == (on, work.stage) and distance(run, work) <= math.log(LIKE)]
    nearest = sorted(reversed(like), key=lambda run: round(distance(run, work)))[:MOST_LIKE]  # of equal ones, the last
    parts = {name: getattr(by_rate, name) * factor(nearest, name) / share for name in NAMES}
    return Estimate(Parts(**parts), work.steps, len(nearest))


def distance(run: Run, work: Work) -> float:
    """Return how far an earlier run is from `work` in size: the logarithm of the ratio of their FLOPs per step."""
    return abs(math.log(max(run.flops, 1.0) / max(work.flops + work.drawn, 1.0)))


def factor(runs: Sequence[Run], name: str) -> float:
    """Return the median, over some runs, of how often a part took the time that was expected; 1 without any."""
    pairs = [(getattr(run.took, name), getattr(run.expected, name)) for run in runs]
    ratios = [took / wanted for took, wanted in pairs if wanted > 0 and took > 0]
    return statistics.median(ratios) if ratios else 1.0
