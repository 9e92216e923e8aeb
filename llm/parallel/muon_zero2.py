"""The optimizer over several processes: each holds the state of its share only (ZeRO-2, arXiv 1910.02054).

Weights and gradients are whole everywhere. In a step gradients are summed into shares (reduce-scatter), each process
updates its share, and the new weights go to all (all-gather): the bytes of one all-reduce. How a parameter is divided
follows from its update rule. A matrix rule, such as Muon, needs matrices whole: each has one owner, and the owners'
loads are even. Parameters of an elementwise rule, such as AdamW, are cut into equal parts of a flat view; small ones
are summed and updated everywhere. All sums start at once, so one part travels while another is computed; with
`sum_early` they start during the backward pass. `state_dict` is that of `GroupOptimizer`, whole, so that any number of
processes can go on.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from llm.optim.optimizer import GroupOptimizer, rule_of, squares
from llm.optim.update_rules import MatrixRule
from llm.parallel import collectives
from llm.parallel.early_sums import Arrival, EarlySums

SMALL = 1 << 14  # parameters of at most so many numbers are updated by every process
# Matrices that travel together, about: one bucket is summed while another is updated and a third is sent.
BUCKET_BYTES = {"cpu": 1 << 22}
OTHER_BUCKET_BYTES = 1 << 25  # a GPU's link wants more at a time

# The old names warn from torch 2.13 on, the new ones are missing before it.
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def total_squares(own: list[torch.Tensor], everywhere: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares () over all processes: of what is their `own`, and once of what all of them hold.

    like: a tensor of the device and the format of the gradients.
    """
    total = squares(own).to(like)
    dist.all_reduce(total)
    return total + squares(everywhere).to(like)


@dataclass
class Matrices:
    """Matrices that travel together. Process k owns `owned[k]`, which lie end to end in part k of a flat buffer."""

    group: int
    owned: list[list[torch.Tensor]]

    @property
    def params(self) -> list[torch.Tensor]:
        """Return the matrices of all processes."""
        return [p for share in self.owned for p in share]

    @property
    def chunk(self) -> int:
        """Return how many numbers travel per process: those of the largest share."""
        return max(sum(p.numel() for p in share) for share in self.owned)

    def of_others(self, rank: int) -> list[torch.Tensor]:
        """Return the matrices that other processes own."""
        return [p for owner, params in enumerate(self.owned) if owner != rank for p in params]


@dataclass
class FlatShard:
    """One large parameter, cut into equal parts of its flat view; the last ones may be short or empty."""

    group: int
    param: torch.Tensor
    chunk: int

    @property
    def params(self) -> list[torch.Tensor]:
        """Return the parameter in a list of its own."""
        return [self.param]

    def share(self, flat: torch.Tensor, rank: int) -> torch.Tensor:
        """Return the part of a flat view that falls to process `rank`."""
        return flat[rank * self.chunk : (rank + 1) * self.chunk]

    def is_empty(self, rank: int) -> bool:
        """Return whether nothing falls to process `rank`."""
        return rank * self.chunk >= self.param.numel()


@dataclass
class Small:
    """Parameters that every process updates."""

    group: int
    params: list[torch.Tensor]


class ShardedOptimizer(GroupOptimizer):
    """Divides updates and state among the processes.

    Gradients are summed over them and not averaged: the losses were divided by the tokens of all processes before.
    """

    def __init__(self, groups: list[dict]):
        super().__init__(groups)
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        self.parts = [part for number in range(len(self.param_groups)) for part in self._cut(number)]
        self.flat_shards = {part.param: part for part in self.parts if isinstance(part, FlatShard)}
        self.whole_state: dict[int, dict] | None = None
        self.early_sums: EarlySums | None = None

    def sum_early(self) -> None:
        """Start sums during the backward passes that run within `early_sums.last_pass()`."""
        self.early_sums = EarlySums([part.params for part in self.parts], lambda n: self._sum(self.parts[n]))

    def _cut(self, number: int) -> Iterable[Matrices | FlatShard | Small]:
        """Divide a parameter group into parts. They know its number: loading a state replaces the group."""
        group = self.param_groups[number]
        if isinstance(rule_of(group), MatrixRule):
            return [Matrices(number, owned) for owned in even_shares(group["params"], self.world)]
        large, small = ([p for p in group["params"] if (p.numel() > SMALL) == is_large] for is_large in (True, False))
        tables = [FlatShard(number, p, -(-p.numel() // self.world)) for p in large]
        return [*tables, Small(number, small)] if small else tables

    def _trained(self) -> set[torch.Tensor]:
        """Return the parameters that have a gradient on any process; all others stand still, as in one process."""
        params = list(self._params())
        counts = collectives.all_reduce_sum([float(p.grad is not None) for p in params])
        return {p for p, count in zip(params, counts, strict=True) if count}

    def _update(self) -> None:
        if not (trained := self._trained()):
            return  # a step that overflowed
        sums = [self._sum(part) for part in self.parts] if self.early_sums is None else self.early_sums.take()
        arriving = []
        if self.max_norm is not None:
            sums = self._clipped([summed() for summed in sums])
        for part, summed in zip(self.parts, sums, strict=True):
            if isinstance(part, Small):
                shares = zip(part.params, part.params, split(summed(), part.params), strict=True)
                self._update_pieces(self.param_groups[part.group], [share for share in shares if share[0] in trained])
            else:
                arriving.append((part, self._update_share(part, summed(), trained)))
        for part, whole in arriving:
            self._take(part, whole())

    def _clipped(self, arrived: list[torch.Tensor]) -> list[Arrival]:
        """Scale the sums of all parts so that the norm over all processes is at most `max_norm`."""
        own, everywhere = [], []
        for part, summed in zip(self.parts, arrived, strict=True):
            if isinstance(part, Small):
                everywhere.append(summed)
            elif isinstance(part, Matrices):  # behind them the buffer holds anything
                own += split(summed, part.owned[self.rank])
            else:
                own.append(summed)
        self._clip([*own, *everywhere], total_squares(own, everywhere, arrived[0]))
        return [lambda summed=summed: summed for summed in arrived]

    def _sum(self, part: Matrices | FlatShard | Small) -> Arrival:
        """Start to sum the gradients of a part: this process's share arrives, or all of a small part."""
        if isinstance(part, Small):
            flat = torch.cat([grad_of(p).flatten() for p in part.params])
            return arrival(dist.all_reduce(flat, async_op=True), flat)
        if isinstance(part, FlatShard):
            flat = padded(grad_of(part.param).flatten(), self.world * part.chunk)
        else:
            flat = self.param_groups[part.group]["params"][0].new_empty(self.world * part.chunk)
            for owned, place in zip(part.owned, flat.split(part.chunk), strict=True):
                end_to_end(map(grad_of, owned), place)
        return summed_share(flat, self.world)

    def _update_share(self, part: Matrices | FlatShard, summed: torch.Tensor, trained: set[torch.Tensor]) -> Arrival:
        """Update what this process owns of `trained` and start to send the part, which arrives whole."""
        group = self.param_groups[part.group]
        if isinstance(part, FlatShard):
            flat = part.param.detach().flatten()
            share = part.share(flat, self.rank)
            if len(share) and part.param in trained:
                self._update_pieces(group, [(part.param, share, summed[: len(share)])])
            sent = padded(share, part.chunk)
        else:
            own = part.owned[self.rank]
            for p, grad in zip(own, split(summed, own), strict=True):
                p.grad = grad
            self._update_matrices(group, [p for p in own if p in trained])
            end_to_end(own, sent := torch.empty_like(summed))
        return all_shares(sent, self.world)

    def _take(self, part: Matrices | FlatShard, whole: torch.Tensor) -> None:
        """Write the weights that arrived."""
        if isinstance(part, FlatShard):
            part.param.copy_(whole[: part.param.numel()].view_as(part.param))
            return
        for owner, params in enumerate(part.owned):
            if owner != self.rank:
                torch._foreach_copy_(params, split(whole[owner * part.chunk :], params))

    def consolidate_state_dict(self) -> None:
        """Bring the whole state to rank 0's host memory. All processes call it before `state_dict`."""
        everywhere = {p for part in self.parts if isinstance(part, Small) for p in part.params}
        mine = {
            i: {name: value.cpu() for name, value in self.state[p].items()}
            for i, p in enumerate(self._params())
            if self.state.get(p) and not (self.rank > 0 and p in everywhere)
        }
        shapes = collectives.all_gather_object(
            {i: {n: t.to("meta") for n, t in state.items()} for i, state in mine.items()}
        )
        if self.rank > 0:
            for t in (t for state in mine.values() for t in state.values()):
                dist.send(t.contiguous(), 0)
            return
        self.whole_state, filled, cut = {}, Counter(), self._cut_state()
        params = list(self._params())
        for process, states in enumerate(shapes):
            for i, name, shape in ((i, name, t) for i, state in states.items() for name, t in state.items()):
                whole = self.whole_state.setdefault(i, {})
                if name in cut.get(i, ()):
                    flat = whole.setdefault(name, torch.empty(params[i].shape, dtype=shape.dtype)).view(-1)
                    place = flat[filled[i, name] :][: shape.numel()]
                    filled[i, name] += shape.numel()
                else:
                    place = whole[name] = torch.empty(shape.shape, dtype=shape.dtype)
                if process == 0:
                    place.copy_(mine[i][name])
                else:
                    dist.recv(place, process)

    def state_dict(self) -> dict:
        """Return the state of all processes, on rank 0 and after `consolidate_state_dict`, as GroupOptimizer has it."""
        if self.whole_state is None:
            raise RuntimeError("call consolidate_state_dict on all processes first, then state_dict on rank 0")
        whole, self.whole_state = self.whole_state, None
        return super().state_dict() | {"state": whole}

    def load_state_dict(self, state_dict: dict) -> None:
        """Keep this process's share of a whole state, which any number of processes may have saved.

        A process keeps nothing of a parameter that it never updates: a step count that stood still would be saved.
        """
        of_others = {p for p, shard in self.flat_shards.items() if shard.is_empty(self.rank)}
        of_others.update(p for part in self.parts if isinstance(part, Matrices) for p in part.of_others(self.rank))
        state, cut = {}, self._cut_state()
        for i, p in enumerate(self._params()):
            if i in state_dict["state"] and p not in of_others:
                state[i] = dict(state_dict["state"][i])
                for name in cut.get(i, ()):
                    state[i][name] = self.flat_shards[p].share(state[i][name].flatten(), self.rank)
        super().load_state_dict(state_dict | {"state": state})

    def _cut_state(self) -> dict[int, tuple[str, ...]]:
        """Return, by number of the parameter, the names of the state tensors that are cut into flat shards."""
        rules = {p: rule_of(self.param_groups[shard.group]) for p, shard in self.flat_shards.items()}
        return {i: rules[p].state for i, p in enumerate(self._params()) if p in rules}

    def _params(self) -> Iterable[torch.Tensor]:
        """Return all parameters, in the order in which states are numbered."""
        return (p for group in self.param_groups for p in group["params"])


def even_shares(params: Sequence[torch.Tensor], world: int) -> list[list[list[torch.Tensor]]]:
    """Return buckets of matrices, each dealt out to the processes: [bucket][process] -> its matrices.

    The largest matrix comes first, and each goes to the process with the fewest numbers so far.
    """
    largest_first, loads, buckets = sorted(params, key=lambda p: -p.numel()), [0] * world, []
    size = BUCKET_BYTES.get(params[0].device.type, OTHER_BUCKET_BYTES)
    while largest_first:
        count = world * max(1, size // (4 * world * largest_first[0].numel()))
        bucket, largest_first = largest_first[:count], largest_first[count:]
        owned: list[list[torch.Tensor]] = [[] for _ in range(world)]
        for p in bucket:
            owner = min(range(world), key=lambda k: (sum(q.numel() for q in owned[k]), loads[k]))
            owned[owner].append(p)
            loads[owner] += p.numel()
        buckets.append(owned)
    return buckets


def grad_of(p: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a parameter, zeros where it has none."""
    return torch.zeros_like(p) if p.grad is None else p.grad


def end_to_end(tensors: Iterable[torch.Tensor], out: torch.Tensor) -> None:
    """Write tensors one behind the other into the flat `out`, zeros behind the last."""
    at = 0
    for t in tensors:
        out[at : at + t.numel()] = t.flatten()
        at += t.numel()
    out[at:] = 0


def padded(flat: torch.Tensor, length: int) -> torch.Tensor:
    """Return a flat tensor with zeros behind it up to `length` numbers."""
    return flat if len(flat) == length else torch.nn.functional.pad(flat, (0, length - len(flat)))


def split(flat: torch.Tensor, params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return views of the beginning of `flat` in the shapes of `params`."""
    sizes = [p.numel() for p in params]
    return [part.view(p.shape) for part, p in zip(flat[: sum(sizes)].split(sizes), params, strict=True)]


# ---- communication --------------------------------------------------------------------------------------------------


def arrival(work: dist.Work, arriving: torch.Tensor) -> Arrival:
    """Return a function that waits for `work` and returns what arrived."""

    def wait() -> torch.Tensor:
        work.wait()
        return arriving

    return wait


def summed_share(flat: torch.Tensor, world: int) -> Arrival:
    """Start a reduce-scatter of the equal parts of `flat`: the sum of everybody's part `rank` arrives.

    gloo's own sums everything everywhere; sending each part to its owner moves half of that.
    """
    if flat.is_cpu:
        parts = torch.empty_like(flat)
        all_parts = arrival(dist.all_to_all_single(parts, flat, async_op=True), parts)
        return lambda: all_parts().view(world, -1).sum(0)
    share = flat.new_empty(len(flat) // world)
    return arrival(reduce_scatter(share, flat, async_op=True), share)


def all_shares(share: torch.Tensor, world: int) -> Arrival:
    """Start an all-gather: everybody's share arrives, end to end. gloo's own copies more than it sends."""
    whole = share.new_empty(world * len(share))
    if share.is_cpu:
        return arrival(dist.all_to_all_single(whole, share.repeat(world), async_op=True), whole)
    return arrival(all_gather(whole, share, async_op=True), whole)
