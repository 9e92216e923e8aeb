"""Program of each process of test_update_rules.py: `update_rule_job.py <folder>`, launched in two processes or more.

Updates the same parameters by the optimizers of every strategy, with an elementwise and a matrix rule that no optimizer
of ours has, and with every switch of Muon and the rules
beside it. After every step but the last, the state is gathered and
new optimizers that load it go on.
"""

import copy
import sys
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from llm.config.extend import register_update_rule
from llm.optim import ElementwiseRule, GroupOptimizer, MatrixRule
from llm.optim import optimizer as optimizers
from llm.parallel import collectives, muon_zero2
from llm.parallel.env import end
from llm.parallel.muon_fsdp import FullyShardedOptimizer
from llm.parallel.muon_zero2 import ShardedOptimizer

STEPS = 4
# Of (1,) and (1, 12) the last processes hold nothing with strategy=fsdp; of (4,) the third one, with strategy=muon too.
SHAPES = {"matrices": [(12, 7), (7, 12), (12, 7), (5, 3)], "others": [(300, 70), (9,), (1,), (1, 12), (4,)]}
SELDOM = [(6, 5), (40, 30), (2,)]  # have a gradient in even steps only, and on the first process only
NEVER = [(6, 4), (41, 30), (3,)]
for some in (SELDOM, NEVER):  # a matrix, a large and a small one
    SHAPES = {"matrices": [*SHAPES["matrices"], some[0]], "others": [*SHAPES["others"], *some[1:]]}

MUON = {
    "kind": "muon",
    "lr": 0.1,
    "weight_decay": 0.1,
    "momentum": 0.9,
    "ns_steps": 3,
    "orthogonalizer": "polar_express",
}
MUON |= {"norm_margin": None, "in_bf16": False, "row_normalize": True, "normuon_beta2": 0.9, "renormalize": True}
MUON |= {"cautious": True, "coupled_decay": True}
RULES = {  # name: hyperparameters beside the above; None = the two rules here
    "own": None,
    "soap": {"soap_beta": 0.8, "soap_every": 2},
    "muon2": {"muon2_beta": 0.8},
    "averages": {"slow_momentum": 0.98, "slow_share": 0.6},
    "rows": {"normuon_rows": True, "row_floor": 0.4, "cautious_update": True},
    "heads": {"head_rows": 1, "soap_beta": 0.8},
    "hyperball": {"hyperball": True},
    "adamh": {"kind": "adamh", "betas": (0.8, 0.9), "eps": 1e-8},
    "dion": {"kind": "dion", "dion_rank": 0.5},
}
WHOLE = ("hyperball", "adamh")  # not with fsdp


def signs(group, params, grads, states) -> None:
    """Step by the sign of a sum of all gradients."""
    for p, grad, state in zip(params, grads, states, strict=True):
        state["summed"] += grad
        state["steps"] += 1
        p.sub_(state["summed"].sign(), alpha=group["lr"])


def normed_step(group, grads, states) -> torch.Tensor:
    """Step of one length per matrix, along its momentum: no part of a matrix could be updated alone."""
    for grad, state in zip(grads, states, strict=True):
        state["momentum_buffer"].lerp_(grad, group["share"])
    return torch.stack([-group["lr"] * s["momentum_buffer"] / s["momentum_buffer"].norm() for s in states])


def register() -> None:
    register_update_rule("signs", ElementwiseRule(signs, state=("summed",), scalars=("steps",)))
    register_update_rule("normed", MatrixRule(normed_step, needs=("share",)))


def drawn(shape: tuple, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters() -> dict[str, list[torch.nn.Parameter]]:
    return {name: [torch.nn.Parameter(drawn(s, i)) for i, s in enumerate(shapes)] for name, shapes in SHAPES.items()}


def optimizer_of(kind: type, params: dict[str, list], rules: str) -> GroupOptimizer:
    first = {"kind": "normed", "lr": 0.1, "share": 0.3, "weight_decay": 0.1}
    if RULES[rules] is not None:
        first = MUON | RULES[rules]
    return kind([first | {"params": params["matrices"]}, {"kind": "signs", "params": params["others"], "lr": 0.01}])


def gradients(step: int, world: int, rank: int | None) -> list[torch.Tensor | None]:
    """Return what one process computes in a step, or with rank=None the sum over all processes; None where nothing is.

    They are whole numbers: their sum is exact, in whatever order it is taken.
    """
    ranks, found = range(world) if rank is None else [rank], []
    for i, shape in enumerate(shape for shapes in SHAPES.values() for shape in shapes):
        have = [] if shape in NEVER else [r for r in ranks if shape not in SELDOM or step % 2 == r == 0]
        found.append(sum(drawn(shape, 1000 * step + 100 * r + i).mul_(8).round_() for r in have) if have else None)
    return found


def handed_over(optimizer: GroupOptimizer) -> dict:
    """Return the whole state of an optimizer, on all processes, as a checkpoint hands it to the next start."""
    if not isinstance(optimizer, ShardedOptimizer):
        return copy.deepcopy(optimizer.state_dict())
    optimizer.consolidate_state_dict()
    box = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]


def trained(kind: type, world: int, resumed: bool, rules: str = "own") -> tuple[list[torch.Tensor], dict]:
    """(weights, whole state) after all steps with the optimizer `kind`; resumed: a new one goes on after every step."""
    optimizers.STACK_BYTES["cpu"] = 1  # products of a stack depend on its size, in the last bit
    params, mesh = parameters(), None
    if kind is FullyShardedOptimizer:
        mesh = init_device_mesh("cpu", (world,))
        params = {
            n: [torch.nn.Parameter(distribute_tensor(p, mesh, [Shard(0)])) for p in ps] for n, ps in params.items()
        }
    optimizer = optimizer_of(kind, params, rules)
    for step in range(STEPS):
        if step and resumed:
            state, optimizer = handed_over(optimizer), optimizer_of(kind, params, rules)
            optimizer.load_state_dict(state)
        rank = dist.get_rank() if kind is ShardedOptimizer else None
        every = [p for ps in params.values() for p in ps]
        for p, grad in zip(every, gradients(step, world, rank), strict=True):
            p.grad = grad if mesh is None or grad is None else distribute_tensor(grad, mesh, [Shard(0)])
        optimizer.step()
    weights = [p.full_tensor() if mesh is not None else p.detach() for p in every]
    return weights, handed_over(optimizer)["state"]


def trained_in_passes(early: bool) -> list[torch.Tensor]:
    """Weights after steps in which the last process uses the middle matrix in the first one only.

    As in training, numbers are exchanged between the backward pass and the update.
    """
    params, rank = [torch.nn.Parameter(drawn((40, 40), i)) for i in range(3)], dist.get_rank()
    optimizer = ShardedOptimizer([{"kind": "signs", "params": params, "lr": 0.01}])
    if early:
        optimizer.sum_early()
    for step in range(STEPS):
        x, is_used = torch.ones(1, 40), step == 0 or rank + 1 < dist.get_world_size()
        for p in params if is_used else params[::2]:
            x = x @ p
        with optimizer.early_sums.last_pass() if early else nullcontext():
            x.sum().backward()
        assert collectives.all_reduce_sum([1.0, 2.0]) == [dist.get_world_size(), 2.0 * dist.get_world_size()]
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in params]


def main() -> None:
    muon_zero2.SMALL = 3  # or nothing here but (300, 70) would be cut
    dist.init_process_group("gloo")
    register()
    kinds, world = (ShardedOptimizer, FullyShardedOptimizer), dist.get_world_size()
    results = {
        (kind.__name__, resumed, rules): trained(kind, world, resumed, rules)
        for kind, resumed, rules in product(kinds, (False, True), RULES)
        if kind is ShardedOptimizer or rules not in WHOLE
    }
    results |= {early: trained_in_passes(early) for early in (True, False)}
    if dist.get_rank() == 0:
        torch.save(results, Path(sys.argv[1]) / "results.pt")
    dist.barrier()
    end(0)


if __name__ == "__main__":
    main()
