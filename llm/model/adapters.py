"""Several adapters beside one base: every row of a pass has an adapter of its own, or none.

The base lies in memory once. To each product of a matrix W that some adapter changes, `Linear` and `Table` add that of
the row's own thin matrices A (rank, in) and B (out, rank), which are gathered by the row's number. Adapters of lower
rank, and rows without one, have zeros there. Our kernel reads the same tensors (`llm.model.decode_cpu`).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from llm.errors import UserError
from llm.model.gpt import GPT, with_weights
from llm.model.linear import LowRank
from llm.model.lora import Adapter, targeted


class Tables(NamedTuple):
    """Matrices that adapters have for one module: A of each in `down` (1 + n, rank, in), (alpha / rank) B^T in `up`.

    up: (1 + n, rank, out). ranks: of each adapter, 0 where it does not change the module.
    """

    down: torch.Tensor
    up: torch.Tensor
    ranks: list[int]


class Adapters:
    """Adapters of a network by number, 1 for the first one; 0 stands for none.

    rows: (B,) int64 on the network's device, the number of each row of the next pass, as `choose` sets it. tables: by
    name of the module.
    """

    def __init__(self, net: GPT, adapters: Mapping[str, Adapter], dtype: torch.dtype):
        self.names, self._device = list(adapters), net.device
        self._numbers = {name: number for number, name in enumerate(adapters, 1)}
        self.rows = torch.zeros(1, dtype=torch.long, device=net.device)
        ranks: dict[str, list[int]] = {}
        for number, adapter in enumerate(adapters.values(), 1):
            for name, _ in targeted(net, adapter.lora):
                ranks.setdefault(name, [0] * (1 + len(adapters)))[number] = adapter.lora.rank
        self.tables = {name: self._table(net, name, list(adapters.values()), of, dtype) for name, of in ranks.items()}
        for name, table in self.tables.items():
            net.get_submodule(name).by_row = RowProducts(self, table)

    @staticmethod
    def _table(net: GPT, name: str, adapters: list[Adapter], ranks: list[int], dtype: torch.dtype) -> Tables:
        out, width = net.get_submodule(name).weight.shape
        like = {"dtype": dtype, "device": net.device}
        down, up = (torch.zeros(len(ranks), max(ranks), size, **like) for size in (width, out))
        for number, (adapter, rank) in enumerate(zip(adapters, ranks[1:], strict=True), 1):
            if rank:
                down[number, :rank].copy_(adapter.weights[f"{name}.lora_A"])
                up[number, :rank].copy_(adapter.weights[f"{name}.lora_B"].T * adapter.lora.scale)
        return Tables(down, up, ranks)

    def numbers(self, names: Sequence[str | None]) -> torch.Tensor:
        """Return the numbers (B,) of adapters, on the host; those of names that are None are 0."""
        return torch.tensor([0 if name is None else self._numbers[name] for name in names])

    def choose(self, numbers: torch.Tensor) -> None:
        """Let row i of the passes that follow have the adapter numbers[i]; numbers: (B,) int64."""
        self.rows = numbers.to(self._device)


class RowProducts:
    """Products that the adapters add to those of one matrix."""

    def __init__(self, adapters: Adapters, table: Tables):
        self._adapters, self._down, self._up = adapters, table.down, table.up

    def of_inputs(self, x: torch.Tensor) -> torch.Tensor:
        """Return x A^T B^T (..., out) for x (..., in), of which row i of the pass is the i-th equal part."""
        down, up = self._gathered(x.dtype)
        y = x.reshape(len(down), -1, x.size(-1)) @ down.transpose(1, 2) @ up
        return y.view(*x.shape[:-1], -1)

    def of_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows `ids` (B, T) of the product of B and A, for a table: (B, T, width)."""
        down, up = self._gathered(self._down.dtype)
        picked = up.gather(2, ids.unsqueeze(1).expand(-1, up.size(1), -1))  # (B, rank, T)
        return picked.transpose(1, 2) @ down

    def _gathered(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self._adapters.rows
        return self._down[rows].to(dtype), self._up[rows].to(dtype)


def check_fits(net: GPT, name: str, adapter: Adapter) -> None:
    """Raise UserError where a network cannot have the adapter called `name`: no rows of its own, or other shapes."""
    if not (isinstance(net, GPT) and net.has_slots):
        raise UserError(f"adapters: {name} needs a model that Fathom has trained as its base; serve a run of yours")
    if net.lora is not None:
        raise UserError(f"adapters: the base of {name} is still being trained as an adapter; take a finished model")
    wanted, rank = {}, adapter.lora.rank
    for module_name, module in targeted(net, adapter.lora):
        if not isinstance(module, LowRank):  # of a plugin, which would not add the products
            raise UserError(f"adapters: {name} changes {module_name}, which is no Linear or Table of llm.model.linear")
        out, width = module.weight.shape
        wanted |= {f"{module_name}.lora_A": (rank, width), f"{module_name}.lora_B": (out, rank)}
    found = {key: tuple(weight.shape) for key, weight in adapter.weights.items()}
    if wrong := [key for key in wanted | found if wanted.get(key) != found.get(key)]:
        is_there, needed = found.get(wrong[0], "missing"), wanted.get(wrong[0], "no such matrix")
        raise UserError(f"adapters: {name} does not fit its base: {wrong[0]} is {is_there}, and there it is {needed}")


def with_adapters(net: GPT, adapters: Mapping[str, Adapter], dtype: torch.dtype) -> GPT:
    """Return a network that shares all weights with `net` and has adapters, their matrices in `dtype`."""
    copy = with_weights(net, net.state_dict())
    copy.adapters = Adapters(copy, adapters, dtype)
    return copy
