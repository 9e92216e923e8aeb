"""Rules by which an optimizer updates parameters, in the two forms that every strategy can divide among processes.

A parameter group names its rule by `kind`, a key of `llm.config.registries.UPDATE_RULES`; the rule reads its
hyperparameters from the group, where schedules write them before each step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Group = dict  # a parameter group: kind, params, lr and the rule's hyperparameters
State = dict[str, torch.Tensor]  # what the optimizer remembers of one parameter


@dataclass(frozen=True)
class ElementwiseRule:
    """A rule that updates every number of a parameter by itself, as AdamW does: parameters may be cut anywhere.

    update(group, params, grads, states): changes params, and the tensors in states, in place. With several processes it
    gets flat pieces of the large parameters, always the same piece of a parameter, its gradient and its state.
    state: names of the tensors, one number per number of the parameter, that begin at 0 and are cut as it is.
    scalars: names of fp32 numbers per parameter (shape ()) that begin at 0 and are equal in all processes.
    needs: hyperparameters that a group must have beside lr.
    """

    update: Callable[[Group, list[torch.Tensor], list[torch.Tensor], list[State]], None]
    state: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    def new_state(self, group: Group, piece: torch.Tensor) -> State:
        """Return the state of a parameter, or of a piece of it, before its first step."""
        numbers = {name: torch.zeros((), dtype=torch.float32) for name in self.scalars}
        return numbers | {name: torch.zeros_like(piece) for name in self.state}


def unwaited(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return numbers of the host on the device, for which the host does not wait."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)


def decay_and_add(group: Group, params: list[torch.Tensor], step: torch.Tensor) -> None:
    """Shrink n matrices (r, c), or some of their rows, by lr x weight_decay and add step (n, r, c), in place."""
    decay = group["lr"] * group["weight_decay"]
    if decay:
        torch._foreach_mul_(params, 1 - decay)
    torch._foreach_add_(params, list(step.unbind(0)))


def momentum_buffer(group: Group, matrix: torch.Tensor) -> State:
    """Return the state of a rule that remembers one tensor of the matrix's shape, `momentum_buffer`, zeros at first."""
    return {"momentum_buffer": torch.zeros_like(matrix)}


@dataclass(frozen=True)
class MatrixRule:
    """A rule that needs whole 2-D gradients, as Muon does: each matrix is updated by one process, its owner.

    step(group, grads, states): what is added to n matrices (r, c) of one shape, as (n, r, c), with the learning rate
    and without weight decay; changes states in place. It does not see the weights: an owner may hold some rows only.
    new_state(group, like): state of a matrix before its first step, for a tensor of its shape.
    apply(group, params, step): changes the weights in place; with strategy=fsdp it gets rows of params and of step. The
    group then also has `shape`, (r, c) of the whole matrices.
    needs: hyperparameters that a group must have beside lr. defaults: values of those that a group may leave out.
    """

    step: Callable[[Group, list[torch.Tensor], list[State]], torch.Tensor]
    new_state: Callable[[Group, torch.Tensor], State] = momentum_buffer
    apply: Callable[[Group, list[torch.Tensor], torch.Tensor], None] = decay_and_add
    needs: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)


UpdateRule = ElementwiseRule | MatrixRule
