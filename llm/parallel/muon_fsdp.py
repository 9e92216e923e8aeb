"""The optimizer where weights and gradients lie in shares too (strategy=fsdp; ZeRO-3, arXiv 1910.02054).

FSDP2 cuts every parameter by rows (DTensors) and sums gradients into shares cut alike during the backward pass. An
elementwise rule, such as AdamW, updates the rows at hand. A matrix rule, such as Muon, needs whole matrices: each has
one owner, dealt out by `llm.parallel.muon_zero2`, who is sent the rows of its gradient, keeps its state, computes its
step and sends the rows of the step back: two all-to-all exchanges. No process holds more weights than its share. State
is cut, gathered and saved by `ShardedOptimizer`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from llm.optim.optimizer import rule_of, stacks
from llm.optim.update_rules import MatrixRule
from llm.parallel.muon_zero2 import FlatShard, Matrices, ShardedOptimizer, end_to_end, total_squares


class FullyShardedOptimizer(ShardedOptimizer):
    """Updates the parameters of a network that `llm.parallel.strategy.FSDPStrategy` has cut."""

    holds_rows = True

    def _cut(self, number: int) -> Iterable[Matrices | FlatShard]:
        group = self.param_groups[number]
        if isinstance(rule_of(group), MatrixRule):
            return super()._cut(number)
        return [FlatShard(number, p, rows_of(p, self.world)[0] * (p.numel() // p.size(0))) for p in group["params"]]

    def _update(self) -> None:
        trained = {p for p in self._params() if p.grad is not None}  # on all processes alike: FSDP2 has summed it
        if not trained:
            return  # a step that overflowed
        if self.max_norm is not None:
            local = [p.grad.to_local() for p in self._params() if p in trained]
            grads = [grad for grad in local if grad.numel()]  # a process of many may have none
            self._clip(grads, total_squares(grads, [], local[0]))
        parts = [part for part in self.parts if isinstance(part, Matrices)]
        matrices = [replace(part, owned=[[p for p in own if p in trained] for own in part.owned]) for part in parts]
        gradients = [self._send_gradients(part) for part in matrices]
        for group in self.param_groups:
            here = [p for p in group["params"] if p in self.flat_shards and p in trained and p.to_local().numel()]
            self._update_pieces(group, [(p, p.to_local().view(-1), p.grad.to_local().view(-1)) for p in here])
        steps = [self._send_steps(part, *sent) for part, sent in zip(matrices, gradients, strict=True)]
        for part, sent in zip(matrices, steps, strict=True):
            self._take_steps(part, *sent)

    def _send_gradients(self, part: Matrices) -> tuple[dist.Work, list[list[torch.Tensor]]]:
        """Start to send each owner this process's rows of gradients; arriving: [k][i], process k's rows of matrix i.

        Matrices are numbered among those that this process owns.
        """
        sent = [[p.grad.to_local() for p in owned] for owned in part.owned]
        own = [(rows_of(p, self.world), p.size(1)) for p in part.owned[self.rank]]
        return exchange(sent, [[(rows[k], cols) for rows, cols in own] for k in range(self.world)], self._like(part))

    def _send_steps(
        self, part: Matrices, work: dist.Work, gradients: list[list[torch.Tensor]]
    ) -> tuple[dist.Work, list[list[torch.Tensor]]]:
        """Start to send each process its rows of the steps of this one's matrices; arriving: [k][i], from owner k."""
        work.wait()
        own, steps = part.owned[self.rank], {}
        grads = {p: torch.cat([rows[i] for rows in gradients]) for i, p in enumerate(own)}
        for stack in stacks(own):
            step = self._matrix_step(self.param_groups[part.group], stack, [grads[p] for p in stack])
            steps |= zip(stack, step.unbind(0), strict=True)
        rows = [steps[p].split(rows_of(p, self.world)) for p in own]
        shapes = [[p.to_local().shape for p in owned] for owned in part.owned]
        return exchange([[r[k] for r in rows] for k in range(self.world)], shapes, self._like(part))

    def _take_steps(self, part: Matrices, work: dist.Work, arrived: list[list[torch.Tensor]]) -> None:
        """Write this process's rows of all matrices once the rows of their steps have arrived."""
        work.wait()
        steps, group = {}, self.param_groups[part.group]
        for owned, rows in zip(part.owned, arrived, strict=True):
            steps |= zip(owned, rows, strict=True)
        for stack in stacks(steps):
            weights = [p.to_local() for p in stack]
            shaped = group | {"shape": stack[0].shape}  # of the whole matrices
            rule_of(group).apply(shaped, weights, torch.stack([steps[p] for p in stack]))

    def _like(self, part: Matrices) -> torch.Tensor:
        """Return a tensor with the dtype and device of what travels."""
        return self.param_groups[part.group]["params"][0].to_local()


def rows_of(p: torch.Tensor, world: int) -> list[int]:
    """Return how many rows of a parameter each process holds: equal parts, of which the last may be short or empty."""
    part = -(-p.size(0) // world)
    return [max(0, min(part, p.size(0) - k * part)) for k in range(world)]


def exchange(
    sent: list[list[torch.Tensor]], shapes: list[list[Sequence[int]]], like: torch.Tensor
) -> tuple[dist.Work, list[list[torch.Tensor]]]:
    """Start to send the tensors sent[k] to process k.

    Returns (work to wait for, tensors in which those of shapes[k] arrive from process k). like: dtype and device.
    """
    counts = [sum(t.numel() for t in tensors) for tensors in sent]
    end_to_end((t for tensors in sent for t in tensors), flat := like.new_empty(sum(counts)))
    sizes = [[torch.Size(shape).numel() for shape in of_one] for of_one in shapes]
    received = like.new_empty(sum(map(sum, sizes)))
    work = dist.all_to_all_single(received, flat, [sum(of_one) for of_one in sizes], counts, async_op=True)
    parts = iter(received.split([size for of_one in sizes for size in of_one]))
    return work, [[next(parts).view(shape) for shape in of_one] for of_one in shapes]
