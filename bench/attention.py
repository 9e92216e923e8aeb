"""Causal attention with and without sliding windows: time and peak memory of forward and backward pass.

    python bench/attention.py [--rows 4] [--heads 4] [--head-dim 128] [--window 512] [--dtype bf16] [--repeats 5]

sdpa = torch's causal attention; full = ours by its best backend; masked = torch's with the window as a (T, T) mask;
banded = ours with the window. Prints a table and a last line of JSON.
"""

import _bench  # isort: skip  (puts the project on the path)
import torch
import torch.nn.functional as F

from llm.model.attention import attention_masks, causal_attention, choose_backend

LENGTHS = (512, 1024, 2048, 4096)


def main() -> None:
    """Measure every form at every length and print the results."""
    defaults = {"rows": 4, "heads": 4, "head-dim": 128, "window": 512, "repeats": 5}
    args = _bench.arguments(__doc__, defaults)
    asked = ("auto", _bench.DEVICE, args.dtype, args.head_dim)
    full, windowed = (choose_backend(*asked, windows, documents=False) for windows in (False, True))
    result, scale = vars(args) | {"full": full, "banded": windowed}, args.head_dim**-0.5
    torch.manual_seed(0)
    for length in LENGTHS:
        shape = (args.rows, length, args.heads, args.head_dim)
        q, k, v, grad = (torch.randn(shape, device=_bench.DEVICE, dtype=args.dtype) for _ in range(4))
        inputs = [t.requires_grad_() for t in (q, k, v)]
        distance = torch.arange(length, device=_bench.DEVICE).unsqueeze(1) - torch.arange(length, device=_bench.DEVICE)

        def masked(q, k, v, distance=distance):
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            mask = (distance >= 0) & (distance <= args.window)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)

        mask = attention_masks([args.window], length, None, windowed, _bench.DEVICE)[args.window]
        forms = {
            "sdpa": lambda q, k, v: causal_attention(q, k, v, scale, backend="sdpa"),
            "full": lambda q, k, v: causal_attention(q, k, v, scale, backend=full),
            "masked": masked,
            "banded": lambda q, k, v, mask=mask: causal_attention(q, k, v, scale, args.window, mask, windowed),
        }
        steps = {
            name: lambda form=form, inputs=inputs, grad=grad: torch.autograd.grad(form(*inputs), inputs, grad)
            for name, form in forms.items()
        }
        difference = (masked(*inputs) - forms["banded"](*inputs)).abs().max().item()
        seconds = _bench.alternating(steps, args.repeats, warmup=1)
        for name, step in steps.items():
            result[f"{length}_{name}_ms"] = 1000 * seconds[name]
            result[f"{length}_{name}_peak_mb"] = _bench.peak_bytes(step) / 1e6
        result[f"{length}_full_to_sdpa"] = seconds["full"] / seconds["sdpa"]
        result[f"{length}_banded_to_full"] = seconds["banded"] / seconds["full"]
        result[f"{length}_difference"] = difference
    _bench.show(result)


if __name__ == "__main__":
    main()
