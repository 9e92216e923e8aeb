"""`GroupOptimizer`: one optimizer whose parameter groups are each updated by the rule that their `kind` names."""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch

from llm.config.registries import UPDATE_RULES
from llm.errors import UserError
from llm.optim.update_rules import ElementwiseRule, MatrixRule, State, UpdateRule

# Matrices stacked for one update: on a CPU as many as stay in a core's cache between the passes over them.
STACK_BYTES = {"cpu": 1 << 21}
OTHER_STACK_BYTES = 1 << 32

KEPT = ("name", "in_bf16")  # by a group, whatever the loaded file says

Pieces = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # (parameter, whole or piece of it, gradient of that)


class GroupOptimizer(torch.optim.Optimizer):
    """Updates every parameter group by the rule of its `kind`, with the hyperparameters that stand in the group.

    groups: dicts with kind, params, lr, what the rule needs, and perhaps weight_decay (decoupled) and decays (whether
    the weight decay follows its schedule). State is kept per parameter, so a checkpoint does not depend on how
    parameters are grouped or divided among processes.

    Raises UserError for a kind that does not exist, and for a group that lacks a hyperparameter of its rule or gives
    vectors to a rule for matrices.
    """

    holds_rows = False  # whether a process has some rows of the weights only

    def __init__(self, groups: list[dict]):
        for group in groups:
            group.setdefault("weight_decay", 0.0)
            group.setdefault("decays", False)
            group["initial_lr"], group["initial_decay"] = group["lr"], group["weight_decay"]
            rule = rule_of(group)
            set_defaults(group)
            if missing := [name for name in rule.needs if name not in group]:
                raise UserError(f"a parameter group of kind={group['kind']} needs {', '.join(missing)}")
            if isinstance(rule, MatrixRule) and any(p.ndim != 2 for p in group["params"]):
                raise UserError(f"a parameter group of kind={group['kind']} takes 2-D matrices only")
        super().__init__(groups, {})
        self.max_norm: float | None = None  # of all gradients together, to which they are scaled down

    def step(self, closure=None):
        """Update all parameters that have a gradient; `closure`, if given, computes the gradients first."""
        loss = None
        if closure is not None:  # Lightning runs forward and backward in here
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._update()
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over a saved state as copies of its own, since what is loaded may be a file mapped into memory.

        Groups keep their names, which older files lack, and their number format, which follows from the network.
        Hyperparameters that the file lacks have their defaults.
        """
        own = [{name: group[name] for name in KEPT if name in group} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, kept in zip(self.param_groups, own, strict=True):
            set_defaults(group)
            group.update(kept)
        for state in self.state.values():
            state.update({name: value.clone() for name, value in state.items()})

    def _update(self) -> None:
        if self.max_norm is not None:
            grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            self._clip(grads, squares(grads))
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if isinstance(rule_of(group), ElementwiseRule):
                self._update_pieces(group, [(p, p, p.grad) for p in params])
            else:
                self._update_matrices(group, params)

    def _clip(self, grads: list[torch.Tensor], total: torch.Tensor) -> None:
        """Scale gradients in place to a norm of at most `max_norm`; `total` () is the sum of all squares."""
        factor = (self.max_norm / (total.sqrt() + 1e-6)).clamp(max=1.0)
        if grads:
            torch._foreach_mul_(grads, factor.to(grads[0].dtype))

    def _update_pieces(self, group: dict, pieces: Pieces) -> None:
        """Update parameters, or pieces of them, by an elementwise rule."""
        if not pieces:
            return
        rule, states = rule_of(group), [self.state[p] for p, _, _ in pieces]
        for (_, piece, _), state in zip(pieces, states, strict=True):
            if not state:
                state.update(rule.new_state(group, piece))
        rule.update(group, [piece for _, piece, _ in pieces], [grad for _, _, grad in pieces], states)

    def _update_matrices(self, group: dict, params: list[torch.Tensor]) -> None:
        """Update whole matrices, which hold their gradients, by a matrix rule."""
        for stack in stacks(params):
            step = self._matrix_step(group, stack, [p.grad for p in stack])
            rule_of(group).apply(group | {"shape": stack[0].shape}, stack, step)

    def _matrix_step(self, group: dict, params: list[torch.Tensor], grads: list[torch.Tensor]) -> torch.Tensor:
        """Return what a matrix rule adds to n matrices (r, c) of one shape: (n, r, c). params: whose state it is."""
        rule, states = rule_of(group), [self.state[p] for p in params]
        for grad, state in zip(grads, states, strict=True):
            if not state:
                state.update(rule.new_state(group, grad))
        return rule.step(group, grads, states)


def rule_of(group: dict) -> UpdateRule:
    """Return the rule that updates a parameter group."""
    return UPDATE_RULES.get(group["kind"], "kind")


def first_states(groups: list[dict]) -> list[State]:
    """Return the state of every parameter before its first step, in the order of the groups, without its numbers."""
    return [
        rule_of(group).new_state(group, torch.empty_like(parameter, device="meta"))
        for group in groups
        for parameter in group["params"]
    ]


def set_defaults(group: dict) -> None:
    """Give a parameter group the hyperparameters of its rule that it leaves out."""
    for name, value in getattr(rule_of(group), "defaults", {}).items():
        group.setdefault(name, value)


def squares(grads: list[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the squares of all numbers of some tensors, () in their format; 0 of none."""
    return torch.stack(torch._foreach_norm(grads)).square().sum() if grads else torch.zeros(())


def stacks(params: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield the matrices in lists of one shape that are updated together."""
    by_shape: dict[torch.Size, list[torch.Tensor]] = {}
    for p in params:
        by_shape.setdefault(p.shape, []).append(p)
    for shape, params in by_shape.items():
        size = STACK_BYTES.get(params[0].device.type, OTHER_STACK_BYTES) // (4 * shape.numel())
        yield from batched(params, max(size, 1))


def batched(items: list, size: int) -> Iterator[list]:
    """Yield consecutive parts of at most `size` items (itertools has it from Python 3.12 on)."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part
