"""Time and memory of the loss head against the plain form, which holds all logits in fp32.

    python bench/loss_head.py [--tokens 4096] [--width 128] [--vocab 768] [--dtype fp32] [--repeats 20]

Covers the forward and backward pass of head, soft cap and cross-entropy; the two forms take turns in one process.
Memory is the most in use beyond the inputs. Prints a table and a last line of JSON.
"""

import _bench  # isort: skip  (puts the project on the path)
import torch
import torch.nn.functional as F

from llm.model.cross_entropy import linear_cross_entropy, softcapped

SOFTCAP = 15.0


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the summed loss by way of all logits."""
    logits = softcapped(F.linear(hidden, weight.to(hidden.dtype)), SOFTCAP)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")


def chunked(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the summed loss by the loss head of the model."""
    return linear_cross_entropy(hidden, weight, targets, SOFTCAP)


def main() -> None:
    """Measure both forms and print the results."""
    args = _bench.arguments(__doc__, {"tokens": 4096, "width": 128, "vocab": 768, "repeats": 20})
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.width, device=_bench.DEVICE, dtype=args.dtype, requires_grad=True)
    weight = (torch.randn(args.vocab, args.width, device=_bench.DEVICE) / args.width**0.5).requires_grad_()
    targets = torch.randint(0, args.vocab, (args.tokens,), device=_bench.DEVICE)
    forms, losses = {"plain": plain, "chunked": chunked}, {}

    def step(name: str) -> None:
        hidden.grad = weight.grad = None
        loss = forms[name](hidden, weight, targets)
        loss.backward()
        losses[name] = loss.item()

    steps = {name: lambda name=name: step(name) for name in forms}
    seconds = _bench.alternating(steps, args.repeats)
    result = vars(args)
    for name, one in steps.items():
        result[f"{name}_ms"], result[f"{name}_peak_mb"] = 1000 * seconds[name], _bench.peak_bytes(one) / 1e6
    result["time_ratio"] = seconds["chunked"] / seconds["plain"]
    result["loss_difference"] = abs(losses["chunked"] / losses["plain"] - 1)
    _bench.show(result)


if __name__ == "__main__":
    main()
