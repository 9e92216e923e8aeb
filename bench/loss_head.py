"""Time and memory of the loss head against the plain form, which holds all logits in fp32.

    python bench/loss_head.py [--tokens 4096] [--width 128] [--vocab 768] [--dtype fp32] [--repeats 20] [--sample 20]

Covers the forward and backward pass of head, soft cap and cross-entropy; the forms take turns in one process. A third
form is over a sample of the vocabulary, at first of `--sample` percent. Targets are as frequent as words: the chance of
the n-th is about 1 / n. Memory is the most in use beyond the inputs. Prints a table and a last line of JSON.
"""

from functools import partial

import _bench  # isort: skip  (puts the project on the path)
import torch
import torch.nn.functional as F

from llm.model.cross_entropy import linear_cross_entropy, softcapped
from llm.model.sampled_softmax import sample_vocabulary, sampled_head

SOFTCAP = 15.0


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the summed loss by way of all logits."""
    logits = softcapped(F.linear(hidden, weight.to(hidden.dtype)), SOFTCAP)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")


def chunked(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the summed loss by the loss head of the model."""
    return linear_cross_entropy(hidden, weight, targets, SOFTCAP)


def sampled(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, share: float) -> torch.Tensor:
    """Return the summed loss over a sample that begins with `share` of the vocabulary."""
    ids = sample_vocabulary(targets, len(weight), share, step=0)
    rows, places = (weight, targets) if ids is None else sampled_head(weight, targets, ids)
    return linear_cross_entropy(hidden, rows, places, SOFTCAP)


def main() -> None:
    """Measure the forms and print the results."""
    args = _bench.arguments(__doc__, {"tokens": 4096, "width": 128, "vocab": 768, "repeats": 20, "sample": 20})
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.width, device=_bench.DEVICE, dtype=args.dtype, requires_grad=True)
    weight = (torch.randn(args.vocab, args.width, device=_bench.DEVICE) / args.width**0.5).requires_grad_()
    targets = (args.vocab ** torch.rand(args.tokens, device=_bench.DEVICE)).long() - 1
    forms, losses = {"plain": plain, "chunked": chunked, "sampled": partial(sampled, share=args.sample / 100)}, {}

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
    result["sampled_ratio"] = seconds["sampled"] / seconds["chunked"]
    result["loss_difference"] = abs(losses["chunked"] / losses["plain"] - 1)
    _bench.show(result)


if __name__ == "__main__":
    main()
