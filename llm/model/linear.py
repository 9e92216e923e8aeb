"""Explicit precision: fp32 master weights, one compute dtype, and a `Linear` that casts; no autocast.

`Linear` and `Table` may hold a low-rank adapter (see `llm.model.lora`), or several (`llm.model.adapters`).
"""

import torch
import torch.nn.functional as F
from torch import nn

from llm.errors import UserError
from llm.model.fp8 import MULTIPLE, fp8_linear, takes_fp8
from llm.model.table_rows import KeptRows, add_rows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LowRank(nn.Module):
    """Part of a layer with a matrix `weight` (out, in) to which a product of thin matrices may be added.

    lora_A: (rank, in), lora_B: (out, rank), None without an adapter; lora_scale: factor on their product.
    """

    lora_scale = 1.0
    by_row = None  # products of several adapters, an llm.model.adapters.RowProducts

    def hold_adapter(self) -> None:
        """Make room for an adapter; names of weights do not change before there is one."""
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)

    def merged_weight(self) -> torch.Tensor:
        """Return the weight (out, in) with the adapter's product added, or without an adapter the weight itself."""
        if self.lora_A is None:
            return self.weight
        return torch.addmm(self.weight, self.lora_B, self.lora_A, alpha=self.lora_scale)


class Linear(nn.Linear, LowRank):
    """Linear layer that multiplies in the dtype of its input, whatever dtype its weight is stored in.

    `GPT.init_weights` fills the weights, so building a layer draws no random numbers.
    """

    fp8 = False  # set by llm.model.linear.enable_fp8

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias=bias)
        self.hold_adapter()

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fp8 and torch.is_grad_enabled() and takes_fp8(x):
            return fp8_linear(x, self.weight)
        y = F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        if self.by_row is not None:
            y = y + self.by_row.of_inputs(x)
        if self.lora_A is None:
            return y
        return y + F.linear(F.linear(x, self.lora_A.to(x.dtype)) * self.lora_scale, self.lora_B.to(x.dtype))


class Table(nn.Embedding, LowRank):
    """Embedding table (rows, width) whose weights are left to `GPT.init_weights`.

    Where `keeps_gradient` is set, a backward pass adds the gradients of rows to `weight.grad`, one tensor for the whole
    training. Only for strategies that leave `.grad` to the backward pass.
    """

    in_bf16 = False  # set by `enable_bf16_tables`
    keeps_gradient = False
    kept: torch.Tensor | None = None

    def __init__(self, rows: int, width: int):
        super().__init__(rows, width, _weight=torch.empty(rows, width))
        self.hold_adapter()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.rows_of(ids)
        if self.by_row is not None:
            rows = rows + self.by_row.of_ids(ids)
        if self.lora_A is None:
            return rows
        return rows + F.embedding(ids, self.lora_B) * self.lora_scale @ self.lora_A

    def rows_of(self, ids: torch.Tensor) -> torch.Tensor:
        """Return rows of the weights (..., width) for ids (...), without adapters."""
        if torch.is_grad_enabled() and self.weight.requires_grad:
            if self.keeps_gradient:
                return KeptRows.apply(self.weight, ids, self, torch.bfloat16 if self.in_bf16 else self.weight.dtype)
            if self.in_bf16:
                return _RowsInBF16.apply(self.weight, ids)
        return F.embedding(ids, self.weight)

    def add_gradient(self, ids: torch.Tensor, grads: torch.Tensor) -> None:
        """Add grads (n, width) to the rows ids (n,) of the gradient, which begins a step as zeros."""
        if self.weight.grad is None:
            if self.kept is None or self.kept.device != grads.device:
                self.kept = torch.zeros_like(self.weight, requires_grad=False)
            else:
                self.clear_kept()
            self.weight.grad = self.kept
        add_rows(self.weight.grad, ids, grads)

    def clear_kept(self) -> None:
        """Fill the kept gradient with zeros."""
        self.kept.zero_()


class _RowsInBF16(torch.autograd.Function):
    """Rows of a table (V, C) for ids, in bf16, and from their gradient in bf16 that of the table."""

    @staticmethod
    def forward(ctx, weight, ids):
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        return F.embedding(ids, weight.bfloat16())

    @staticmethod
    def backward(ctx, grad):
        grad = grad.float() if grad.device.type == "cpu" else grad  # a GPU's kernel adds bf16 in fp32, a CPU's does not
        total = torch.ops.aten.embedding_dense_backward(grad, ctx.saved_tensors[0], ctx.shape[0], -1, False)
        return total.to(ctx.dtype), None


def enable_bf16_tables(net) -> int:
    """Let the tables of a network hand out rows in bf16 while training; return how many do.

    Weights and optimizer stay as they are. In a network that computes in bf16, rows are rounded no more than before;
    gradients of rows, already bf16, are added up and rounded once for each micro-batch. Tables of n-grams have far more
    rows than a micro-batch asks for, and tables with adapters or frozen weights have no such gradient: they stay.
    """
    tables = [m for m in net.modules() if type(m) is Table and m.lora_A is None and m.weight.requires_grad]
    for table in tables:
        table.in_bf16 = True
    return len(tables)


def has_fast_bf16(device: torch.device) -> bool:
    """Return True where bf16 matrix products run natively: CUDA from Ampere on, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return False


def resolve_compute_dtype(choice: str, device: torch.device | str, draws_answers: bool = False) -> torch.dtype:
    """Return the dtype for `precision.compute` = auto | fp32 | bf16 | fp16; auto takes bf16 where it is fast.

    draws_answers: an engine and a training pass have to give every token one probability. In bf16 each rounds it by
    some thousandths in a way of its own, so on a CPU, where fp32 costs little more, auto takes that. Raises UserError
    for any other value.
    """
    device = torch.device(device)
    if choice == "auto":
        in_fp32 = draws_answers and device.type == "cpu"
        return torch.bfloat16 if has_fast_bf16(device) and not in_fp32 else torch.float32
    if choice not in DTYPES:
        raise UserError(f"precision.compute={choice}: choose one of auto, {', '.join(DTYPES)}")
    return DTYPES[choice]


def enable_fp8(net) -> int:
    """Let the large matrices of the blocks multiply in fp8 while training; return how many they are."""
    layers = [m for m in net.transformer.h.modules() if isinstance(m, Linear) and m.bias is None]
    layers = [m for m in layers if not (m.in_features % MULTIPLE or m.out_features % MULTIPLE)]
    for layer in layers:
        layer.fp8 = True
    return len(layers)


def choose_fp32_products(by_onednn: bool) -> None:
    """Let fp32 products on a CPU go through oneDNN, or through torch's choice, which is MKL.

    oneDNN is twice as fast on processors of AMD with AVX-512, and as fast on those without. torch goes there only with
    permission to round to bf16, of which processors with AMX make use: where a trial shows that, it is taken back.
    """
    torch.set_float32_matmul_precision("medium" if by_onednn else "highest")
    if by_onednn and not _is_exact():
        torch.set_float32_matmul_precision("highest")


def _is_exact() -> bool:
    """Return whether a product of numbers that neither bf16 nor TF32 can hold is what fp32 makes of them."""
    fine = torch.full((128, 128), 1 + 2.0**-12)
    return bool((fine @ torch.ones(128, 128) == 128 + 2.0**-5).all())
