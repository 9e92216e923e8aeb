"""Sums over processes that begin during the backward pass, as soon as a part of the gradients is ready."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from llm.parallel import collectives

Arrival = Callable[[], torch.Tensor]  # waits for what was started, returns what arrived


class EarlySums:
    """Starts the sums of parts of the parameters, on all processes in one order, during a step's last backward pass.

    That order is the one in which rank 0's gradients were ready in the first step, which starts all sums at its end. A
    part that is ready sooner waits for those before it; a part whose gradients did not come by autograd, as other
    processes' may, or rows that are added in place, is started at the end of the pass. So all processes have begun the
    same sums before they exchange anything else.

    parts: the parameters of each part; start: begins the sum of the part of that number.
    """

    def __init__(self, parts: Sequence[Sequence[torch.Tensor]], start: Callable[[int], Arrival]):
        self.sizes, self.start = [len(params) for params in parts], start
        self.order: list[int] | None = None
        self.is_last = False  # whether the backward pass that runs is the last of its step
        self._begin_step()
        for number, params in enumerate(parts):
            for p in params:
                p.register_post_accumulate_grad_hook(lambda _, number=number: self._add(number))

    def _begin_step(self) -> None:
        self.missing, self.ready, self.begun = list(self.sizes), [], {}

    @contextmanager
    def last_pass(self) -> Iterator[None]:
        """Start sums during the backward pass within, after which no gradient changes until `take`."""
        for summed in self.begun.values():  # of a step that was given up
            summed()
        self._begin_step()
        self.is_last = True
        try:
            yield
        finally:
            self.is_last = False
        if self.order is not None:
            self._begin_all()

    def _add(self, number: int) -> None:
        """Take notice of one more gradient of a part."""
        if not self.is_last:
            return
        self.missing[number] -= 1
        if self.missing[number] == 0:
            self.ready.append(number)
            while self.order and len(self.begun) < len(self.order) and not self.missing[self._next]:
                self.begun[self._next] = self.start(self._next)

    @property
    def _next(self) -> int:
        return self.order[len(self.begun)]

    def _begin_all(self) -> None:
        while len(self.begun) < len(self.order):
            self.begun[self._next] = self.start(self._next)

    def take(self) -> list[Arrival]:
        """Return the sums of all parts, in the order of `parts`; start those that have not begun."""
        if self.order is None:
            never = [number for number in range(len(self.sizes)) if number not in self.ready]
            self.order = collectives.broadcast_object(self.ready + never)
        self._begin_all()
        sums = [self.begun[number] for number in range(len(self.sizes))]
        self._begin_step()
        return sums
