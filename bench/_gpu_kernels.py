"""Parts of gpu_check: the machine's ceilings, attention, the optimizer."""

import _bench  # isort: skip  (puts the project on the path)
import copy
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import optimizer as optimizer_bench
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm.cli.overrides import compose
from llm.errors import UserError
from llm.model.attention import attention_masks, causal_attention, choose_backend
from llm.model.gpt import GPT
from llm.model.linear import resolve_compute_dtype
from llm.optim import muon_gpu
from llm.optim.build import build_optimizer
from llm.scaling.gpu_estimate import peak_of
from llm.scaling.rules import model_config

KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}  # of torch's SDPA


def machine(found, small: bool) -> None:
    """Note the versions, the card, and two ceilings: FLOP/s of matrix products and bytes per second of a copy."""
    dtype, cuda = resolve_compute_dtype("auto", _bench.DEVICE), _bench.DEVICE.type == "cuda"
    found.note(torch=torch.__version__, python=sys.version.split()[0], cuda=torch.version.cuda, dtype=str(dtype))
    if cuda:
        card = torch.cuda.get_device_properties(0)
        found.note(card=card.name, memory_gib=card.total_memory / 2**30, data_sheet_flops=peak_of(card.name))
    found.note(matmul_flops=_bench.matmul_rate(dtype, 0.2 if small else 2.0), copy_bytes_per_s=_bench.copy_rate())


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the norm of got - want divided by the norm of want, in float64."""
    want = want.double()
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


# ---- Attention ------------------------------------------------------------------------------------------------------


def visible(length: int, window: int | None, starts: torch.Tensor | None) -> torch.Tensor:
    """Return a mask (1 or B, length, length), True where a query (dim 1) sees a key (dim 2), by the definition.

    `window`: how many tokens back a query sees, None for all; `starts`: (B, length), True where a document begins, None
    for one document a row.
    """
    at = torch.arange(length, device=_bench.DEVICE)
    distance = at.unsqueeze(1) - at
    seen = ((distance >= 0) & (distance <= (length if window is None else window))).unsqueeze(0)
    if starts is None:
        return seen
    documents = starts.cumsum(1)
    return seen & (documents.unsqueeze(2) == documents.unsqueeze(1))


def reference(tensors: list[torch.Tensor], grad: torch.Tensor, scale: float, seen: torch.Tensor) -> list[torch.Tensor]:
    """Return output and gradients (each (B, T, heads, width)) of softmax attention written out, in float64, row by row.

    `tensors`: q, k, v; `grad`: the gradient of the output; `seen`: a mask as `visible` returns it.
    """
    outputs = [[] for _ in range(4)]
    for row in range(len(grad)):
        q, k, v = (t[row].detach().double().transpose(0, 1).requires_grad_() for t in tensors)
        scores = (q @ k.mT * scale).masked_fill(~seen[row % len(seen)], -torch.inf)
        y = scores.softmax(-1) @ v
        parts = [y, *torch.autograd.grad(y, (q, k, v), grad[row].double().transpose(0, 1))]
        for kept, part in zip(outputs, parts, strict=True):
            kept.append(part.detach().transpose(0, 1))
    return [torch.stack(kept) for kept in outputs]


def attention(found, small: bool) -> None:
    """Compare every backend with the definition, forward and backward, and time it: full, window, documents."""
    dtype = torch.float32 if small else torch.bfloat16
    rows, length, heads, width, repeats = (2, 256, 2, 16, 2) if small else (8, 2048, 10, 128, 10)
    limit, window, scale = 1e-4 if small else 1e-2, length // 4, 1.2 / width**0.5
    ten = 1 if small else 10  # in a row: the launches of one are covered by the kernels of the one before
    torch.manual_seed(0)
    shape = (rows, length, heads, width)
    q, k, v, grad = (torch.randn(shape, device=_bench.DEVICE).to(dtype) for _ in range(4))
    tensors = [t.requires_grad_() for t in (q, k, v)]
    starts = torch.rand(rows, length, device=_bench.DEVICE) < 4 / length
    rate = _bench.matmul_rate(dtype, 0.1 if small else 0.5)
    found.note(shape=f"{rows} x {length} x {heads} x {width} {dtype}", window=window, matmul_flops=rate)
    cases = {"full": (None, None), "window": (window, None), "documents": (None, starts)}
    for case, (reach, apart) in (cases | {"window_documents": (window, starts)}).items():
        seen = visible(length, reach, apart)
        want = reference(tensors, grad, scale, seen)
        flops = 14 * heads * width * (seen.sum().item() * rows // len(seen))  # 2 products forward, 5 backward
        for backend, context in backends(dtype, width, reach, apart, found, case):
            name = f"{case}_{backend}"
            backend = backend.split("_")[0]
            mask = attention_masks([reach], length, apart, backend, _bench.DEVICE)[reach]  # made once for all layers

            def both(reach=reach, mask=mask, backend=backend, context=context):
                with context():
                    y = causal_attention(*tensors, scale, reach, mask, backend)
                    return [y, *torch.autograd.grad(y, tensors, grad)]

            found.check(name, max(relative(a, b) for a, b in zip(both(), want, strict=True)), limit)
            seconds = _bench.alternating({name: lambda both=both: times(ten, both)}, repeats)[name] / ten
            found.note(**{f"{name}_ms": 1000 * seconds, f"{name}_to_matmul_rate": flops / seconds / rate})


def times(n: int, step) -> None:
    """Call `step` n times."""
    for _ in range(n):
        step()


def backends(dtype, width: int, window, starts, found, case: str):
    """Yield (name, context) of every backend and kernel that can do this case; note the others as absent."""
    for name in ("cpu", "sdpa", "flex", "flash3"):
        try:
            choose_backend(name, _bench.DEVICE, dtype, width, window is not None, starts is not None)
        except UserError:
            found.note(**{f"{case}_{name}": "absent"})
            continue
        if name == "flex" and window is None and starts is None:
            continue  # without a mask it is SDPA
        yield name, nullcontext
        if name == "sdpa" and _bench.DEVICE.type == "cuda" and window is None and starts is None:
            for kernel, backend in KERNELS.items():
                yield f"sdpa_{kernel}", lambda backend=backend: sdpa_kernel(backend)


# ---- Optimizer ------------------------------------------------------------------------------------------------------


def optimizer(found, small: bool) -> None:
    """Compare the changes of the weights in some steps, device against CPU, for every optimizer; time a step.

    With products in bf16 the device may be 1.5 times as far from fp32 as the CPU is.
    """
    cpu, full, half = torch.device("cpu"), torch.float32, torch.bfloat16
    for name in ("muon_adamw", "muon_2025", "adamw"):
        exact = moves(name, full, cpu)
        found.check(f"{name}_fp32", worst(moves(name, full, _bench.DEVICE), exact), 1e-3)
        if name != "adamw":
            limit = 1.5 * worst(moves(name, half, cpu), exact)
            found.check(f"{name}_bf16", worst(moves(name, half, _bench.DEVICE), exact), limit)
    dtype = torch.float32 if small else torch.bfloat16
    depth, vocab, repeats = (2, 300, 1) if small else (12, 32768, 10)
    times = optimizer_bench.measure(SimpleNamespace(depth=depth, vocab=vocab, repeats=repeats, dtype=dtype))
    found.note(**{key: value for key, value in times.items() if key.endswith("_ms") or key in ("depth", "to_torch")})


def moves(name: str, dtype: torch.dtype, device: torch.device, steps: int = 3) -> list[torch.Tensor]:
    """Return the changes of the weights of a small network, on the CPU, after `steps` steps with given gradients.

    dtype: of the matrix products of Muon.
    """
    cfg = compose("train", [f"optim={name}", "model=d2", "model.seq_len=64"])
    start = GPT(model_config(cfg.model, cfg.arch, 300)).init_weights(0)
    net = copy.deepcopy(start).to(device)
    net.compute_dtype = dtype
    optimizer = build_optimizer(net, cfg.optim)
    for step in range(steps):
        for i, p in enumerate(net.parameters()):
            generator = torch.Generator().manual_seed(1000 * step + i)
            p.grad = torch.randn(p.shape, generator=generator).to(device)
        optimizer.step()
    return [(p.detach().cpu() - old.detach()) for p, old in zip(net.parameters(), start.parameters(), strict=True)]


def worst(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """Return the largest relative error among pairs of tensors."""
    return max(relative(a, b) for a, b in zip(got, want, strict=True))


def muon_kernels(found, small: bool) -> None:
    """Compare the changes of the weights by Muon's Triton kernels with the CPU's, and time an update without and with.

    With products in bf16 they may be 1.5 times as far from fp32 as the CPU is. On a CPU both forms are its own.
    """
    cpu, full, half = torch.device("cpu"), torch.float32, torch.bfloat16
    dtype, (depth, vocab, repeats) = full if small else half, (2, 300, 1) if small else (20, 32768, 10)
    if not small and _bench.DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 70 * 2**30:
        depth = 12  # six optimizers' states of d20 take 62 GB
    used, own = [], muon_gpu.computes
    muon_gpu.computes = lambda *given: used.append(own(*given)) or used[-1]
    try:
        for name in ("muon_adamw", "muon_2026_02"):  # rows, then columns, and cautious decay by both
            exact = moves(name, full, cpu)
            muon_gpu.turn_on(True)
            found.check(f"{name}_fp32", worst(moves(name, full, _bench.DEVICE), exact), 1e-3)
            limit = 1.5 * worst(moves(name, half, cpu), exact)
            found.check(f"{name}_bf16", worst(moves(name, half, _bench.DEVICE), exact), limit)
        for key, is_on in (("plain", False), ("kernels", True)):
            muon_gpu.turn_on(is_on)
            args = SimpleNamespace(depth=depth, vocab=vocab, repeats=repeats, dtype=dtype)
            times = optimizer_bench.measure(args)
            found.note(**{f"{key}_ms": times["2026_muon_ms"], "products_ms": times["muon_floor_ms"]})
        if _bench.DEVICE.type == "cuda":
            found.check("kernels_left_out", float(not any(used)), 0.0)
    finally:
        muon_gpu.computes = own
        muon_gpu.turn_on(False)
