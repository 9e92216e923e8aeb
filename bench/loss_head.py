"""Time and memory of the loss head against the plain form, which holds all logits in fp32.

    python bench/loss_head.py [--tokens 4096] [--width 128] [--vocab 768] [--dtype fp32] [--repeats 20]

Forward and backward of head, soft cap and cross-entropy; the two forms alternate in one process. Memory is the most in
use beyond the inputs: measured on a GPU, counted by the profiler on a CPU. Prints a table and a last line of JSON.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from llm.loss_head import linear_cross_entropy, softcapped  # noqa: E402
from llm.precision import resolve_compute_dtype  # noqa: E402

SOFTCAP = 15.0


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = softcapped(F.linear(hidden, weight.to(hidden.dtype)), SOFTCAP)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")


def chunked(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return linear_cross_entropy(hidden, weight, targets, SOFTCAP)


def peak_bytes(step, device: torch.device) -> int:
    """Most memory in use during `step` beyond what was in use before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("tokens", 4096), ("width", 128), ("vocab", 768), ("repeats", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="auto", help="auto, fp32 or bf16")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sync = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    dtype = resolve_compute_dtype(args.dtype, device)
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.width, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(args.vocab, args.width, device=device) / args.width**0.5).requires_grad_()
    targets = torch.randint(0, args.vocab, (args.tokens,), device=device)
    forms = {"plain": plain, "chunked": chunked}
    seconds, losses, peaks = {name: [] for name in forms}, {}, {}

    def step(form) -> torch.Tensor:
        hidden.grad = weight.grad = None
        loss = form(hidden, weight, targets)
        loss.backward()
        return loss.detach()

    for name, form in forms.items():
        step(form)
        peaks[name] = peak_bytes(lambda form=form: step(form), device)
    for _ in range(args.repeats):
        for name, form in forms.items():
            sync()
            start = time.perf_counter()
            losses[name] = step(form)
            sync()
            seconds[name].append(time.perf_counter() - start)
    result = vars(args) | {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    for name in forms:
        result[f"{name}_ms"] = 1000 * sorted(seconds[name])[args.repeats // 2]
        result[f"{name}_peak_mb"] = peaks[name] / 1e6
    result["time_ratio"] = result["chunked_ms"] / result["plain_ms"]
    result["loss_difference"] = abs(losses["chunked"] / losses["plain"] - 1).item()
    for key, value in result.items():
        print(f"{key:18} {value:,.4g}" if isinstance(value, float) else f"{key:18} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
