"""The parts of a resume checkpoint, and how it differs from what a stage needs: in words, before anything is loaded.

A checkpoint may come from anybody. It is unpickled as tensors and primitives only; here the primitives get types and
ranges, and the tensors the names, shapes and types that the stage's own network and optimizer have.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llm.errors import UserError
from llm.utils.shapes import Kind, listing, mapping, maybe, real, refuse, whole

Facts = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and type of tensors by name
COUNT = whole(0, 2**53)


def tensor(value: Any, where: str) -> None:
    """Take a dense tensor that has all of its numbers in memory: none that repeats a few by strides."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        refuse(value, where, "a tensor")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        refuse(f"{tuple(value.shape)} in {value.untyped_storage().nbytes()} bytes", where, "a whole tensor")


def plain(value: Any, where: str) -> None:
    """Take nested mappings and lists of texts, numbers and whole tensors."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            plain(item, f"{where}.{str(key)[:80]}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            plain(item, f"{where}[{number}]")
    elif isinstance(value, torch.Tensor):
        tensor(value, where)
    elif value is not None and not isinstance(value, bool | int | float | str):
        refuse(value, where, "plain data")


def number(value: Any, where: str) -> None:
    """Take any number, also one that is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse(value, where, "a number")


def counts(value: Any, where: str) -> None:
    """Take nested mappings of counts and truths."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            counts(item, f"{where}.{str(key)[:80]}")
    elif not isinstance(value, bool):
        COUNT(value, where)


def states(value: Any, where: str) -> None:
    """Take {number of a parameter: {name: tensor}}."""
    if not isinstance(value, dict):
        refuse(value, where, "a mapping")
    for place, state in value.items():
        COUNT(place, f"{where}, a key")
        mapping(others=tensor)(state, f"{where}.{place}")


def cursor(value: Any, where: str) -> None:
    """Take a position in data: counts by name, and those of several sources below `sources`."""
    fields: dict[str, Kind] = dict.fromkeys(("epoch", "shard", "row", "index", "size"), COUNT)
    fields |= {"sources": mapping(others=maybe(cursor)), "consumed": listing(listing(COUNT))}
    mapping(fields, others=plain)(value, where)


def packing(value: Any, where: str) -> None:
    """Take the documents that wait to be packed: as many tokens, and marks, as their lengths say."""
    fields: dict[str, Kind] = {"placed": COUNT, "lost": COUNT, "row_len": whole(1, 2**31)}
    mapping(fields, others=plain, needs=("placed", "row_len", "lengths", "tokens"))(value, where)
    for name in ("lengths", "tokens"):
        tensor(value[name], f"{where}.{name}")
        if value[name].ndim != 1 or value[name].is_floating_point() or value[name].is_complex():
            refuse(tuple(value[name].shape), f"{where}.{name}", "a list of whole numbers")
    if (value["lengths"] < 0).any():
        refuse(int(value["lengths"].min()), f"{where}.lengths", "0 or more each")
    size = int(value["lengths"].clamp(max=value["row_len"]).sum())
    for name in ("tokens", *(("mask",) if "mask" in value else ())):
        if not isinstance(value[name], torch.Tensor) or value[name].shape != (size,):
            refuse(tuple(getattr(value[name], "shape", ())), f"{where}.{name}", f"of shape ({size},), by its lengths")


_steps_done = "epoch_loop.manual_optimization.optim_step_progress"
_progress = ("epoch_loop.batch_progress", _steps_done, "epoch_progress")
_done = mapping({"total": mapping({"completed": COUNT}, others=counts, needs=("completed",))}, needs=("total",))
_position = mapping(
    {"cursor": maybe(cursor), "packer": packing, "balance": mapping(others=number), "step": COUNT}, others=plain
)
_window: dict[str, Kind] = {"nats": number, "trained": COUNT, "metrics": mapping(others=listing(number))}
_fathom: dict[str, Kind] = {
    "tokens": COUNT,
    "window": mapping(_window, needs=tuple(_window)),
    "recent": listing(number),
    "seconds": real(0, 1e15),
    "scaler": mapping({"scale": real(1e-300, 1e300), "good_steps": number}, needs=("scale", "good_steps")),
}
_group = mapping({"params": listing(COUNT)}, others=plain, needs=("params",))
_optimizer = mapping({"state": states, "param_groups": listing(_group)}, needs=("state", "param_groups"))
_fields: dict[str, Kind] = {
    "state_dict": mapping(others=tensor),
    "optimizer_states": listing(_optimizer, (1, 1)),
    "StepData": mapping({"positions": listing(maybe(_position), (1, 1 << 20))}, needs=("positions",)),
    "global_step": COUNT,
    "epoch": COUNT,
    "loops": mapping(
        {"fit_loop": mapping(dict.fromkeys(_progress, _done), others=plain, needs=_progress)}, needs=("fit_loop",)
    ),
    "callbacks": mapping({"Throughput": mapping({"train_seconds": real(0, 1e15)}, needs=("train_seconds",))}),
    "fathom": mapping(_fathom, needs=("tokens", "window", "recent")),
}
CHECKPOINT = mapping(_fields, others=plain, needs=tuple(name for name in _fields if name != "callbacks"))


def wrong_part(checkpoint: Any) -> str | None:
    """Say in words which part a checkpoint lacks or holds wrongly; None if all are as a stage goes on from."""
    try:
        CHECKPOINT(checkpoint, "in it: ")
    except UserError as error:
        return str(error).removeprefix("in it: .").partition("; restore the file")[0]
    if not checkpoint["state_dict"]:
        return "state_dict holds no weights"
    done = checkpoint["loops"]["fit_loop"][_steps_done]["total"]["completed"]
    if done != checkpoint["global_step"]:
        return f"global_step is {checkpoint['global_step']}, but loops counts {done} steps"
    return None


@dataclass(frozen=True)
class Needed:
    """The checkpoint that a stage can go on from: its steps, weights, and its optimizer's groups and state.

    groups: the hyperparameters that each group of parameters must have, and `params`, as many as the group has. states:
    of every parameter, in the order of the groups.
    """

    steps: int
    weights: Facts
    groups: list[dict]
    states: list[Facts]

    def misfit(self, checkpoint: Any) -> str | None:
        """Say in words why a stage cannot go on from a checkpoint; None if it can."""
        if (problem := wrong_part(checkpoint)) is not None:
            return problem
        if checkpoint["global_step"] > self.steps:
            return f"global_step is {checkpoint['global_step']}, but the stage has {self.steps} steps"
        problem = differs(checkpoint["state_dict"], self.weights, "state_dict")
        return problem or self._other_groups(checkpoint) or self._other_states(checkpoint)

    def _other_groups(self, checkpoint: dict) -> str | None:
        """Say in words how the optimizer's groups differ. Their numbers may: schedules and other releases set them."""
        saved, where = checkpoint["optimizer_states"][0]["param_groups"], "optimizer_states[0].param_groups"
        if len(saved) != len(self.groups):
            return f"{where} has {len(saved)} groups, but the stage {len(self.groups)}"
        for i, (old, new) in enumerate(zip(saved, self.groups, strict=True)):
            if len(old["params"]) != len(new["params"]):
                return f"{where}[{i}].params has {len(old['params'])} entries, but the stage {len(new['params'])}"
            for name in new.keys() - {"params"}:
                is_same = name != "kind" or old.get(name) == new[name]
                if name not in old or not is_same or not _is_like(old[name], new[name]):
                    return f"{where}[{i}].{name} is {str(old.get(name))[:60]}, but must be like {new[name]}"
        if [place for old in saved for place in old["params"]] != list(range(len(self.states))):
            return f"{where}: the places of the parameters are not 0, 1, 2, ..."
        return None

    def _other_states(self, checkpoint: dict) -> str | None:
        """Say in words how what the optimizer remembers differs.

        A parameter that has never had a gradient has no state. In fp16 the first steps may have left all out.
        """
        saved, where = checkpoint["optimizer_states"][0]["state"], "optimizer_states[0].state"
        if surplus := sorted(set(saved) - set(range(len(self.states)))):
            return f"{where}.{surplus[0]} is of no parameter of this stage"
        is_empty = not any(saved.values())
        if is_empty and ("scaler" in checkpoint["fathom"] or not checkpoint["global_step"]):
            return None
        problems = (
            differs(saved.get(place, {}), needed, f"{where}.{place}", surplus=True)
            for place, needed in enumerate(self.states)
            if is_empty or saved.get(place)
        )
        return next((problem for problem in problems if problem is not None), None)


def _is_like(old: Any, new: Any) -> bool:
    """Return whether a saved hyperparameter is like the stage's own: a truth, or as many sane numbers."""
    if isinstance(new, list | tuple):
        return isinstance(old, list | tuple) and len(old) == len(new) and all(map(_is_like, old, new))
    if isinstance(new, bool) or new is None or isinstance(new, str):
        return isinstance(old, type(new)) or new is None
    return isinstance(old, int | float) and not isinstance(old, bool) and 0 <= old <= 1000 * max(abs(new), 1)


def differs(found: Mapping[str, torch.Tensor], needed: Facts, where: str, surplus: bool = False) -> str | None:
    """Say in words which tensor is missing, of another shape or type, or (unless `surplus`) too many; None if none."""
    for name, (shape, dtype) in needed.items():
        if name not in found:
            return f"tensor {where}.{name} is missing"
        has = found[name]
        if tuple(has.shape) != shape or has.dtype != dtype:
            return f"tensor {where}.{name} is {tuple(has.shape)} of {has.dtype}, but must be {shape} of {dtype}"
    unknown = [] if surplus else sorted(set(found) - set(needed))
    return f"tensor {where}.{unknown[0]} is not of this stage" if unknown else None


def facts(tensors: Mapping[str, torch.Tensor]) -> Facts:
    """Return shape and type of tensors by name."""
    return {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
