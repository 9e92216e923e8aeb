"""The number formats of exported weights, and what they cannot hold."""

import torch

from llm.errors import UserError
from llm.model.linear import DTYPES


def check_range(name: str, value: torch.Tensor, dtype: str) -> None:
    """Raise UserError where a number of a tensor is too large for the format `dtype` (a key of DTYPES)."""
    if not torch.equal(value.to(DTYPES[dtype]).isfinite(), value.isfinite()):
        raise UserError(
            f"dtype={dtype}: {name} holds numbers up to {value.abs().max():.3g}, which would become infinite (fp16 "
            "ends at 65,504); take dtype=bf16 or dtype=fp32"
        )
