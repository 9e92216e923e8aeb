"""Milliseconds of one optimizer step for a whole model, against torch's own optimizers and against the hardware.

    python bench/optimizer.py [--depth 4] [--vocab 8192] [--dtype bf16] [--repeats 10]

2026 and 2025 are ours with those settings; torch = torch.optim.Muon (matrix after matrix, its products in bf16) and
fused torch.optim.AdamW; adamw = fused AdamW for everything. They take turns in one process. Floors: the time of the
orthogonalisation's products at the measured matrix product rate, and of the bytes that AdamW must move at the measured
rate of a copy. Prints a table and a last line of JSON.
"""

import _bench  # isort: skip  (puts the project on the path)
import copy

import torch

from llm.cli.overrides import compose
from llm.model.gpt import GPT
from llm.optim.build import build_optimizer
from llm.optim.optimizer import GroupOptimizer
from llm.scaling.rules import model_config


def muon_flops(params: list[torch.Tensor], steps: int) -> float:
    """Return the FLOPs of orthogonalising matrices: per iteration x x^T, its square, and its product with x."""
    total = 0.0
    for p in params:
        small, large = sorted(p.shape)
        total += steps * (2 * small**2 * large * 2 + 2 * small**3)
    return total


def measure(args) -> dict:
    """Return the milliseconds of a step of every optimizer and the floors, for `args` as in `main`."""
    cfg = compose("train", [f"model=d{args.depth}"])
    net = GPT(model_config(cfg.model, cfg.arch, args.vocab)).init_weights(0).to(_bench.DEVICE)
    net.compute_dtype = args.dtype
    nets = {name: copy.deepcopy(net) for name in ("2026", "2025", "torch", "adamw")}
    for one in nets.values():
        for seed, p in enumerate(one.parameters()):
            generator = torch.Generator(_bench.DEVICE).manual_seed(seed)
            p.grad = torch.randn(p.shape, device=_bench.DEVICE, generator=generator)
    matrices = {name: [p for p in one.transformer.h.parameters() if p.ndim == 2] for name, one in nets.items()}
    chosen = {id(p) for p in matrices["torch"]}
    rest = [p for p in nets["torch"].parameters() if id(p) not in chosen]
    muon, adamw = torch.optim.Muon(matrices["torch"], lr=0.01), torch.optim.AdamW(rest, lr=0.01, fused=True)
    ours = {"2026": "muon_adamw", "2025": "muon_2025", "adamw": "adamw"}
    optimizers = {n: build_optimizer(nets[n], compose("train", [f"optim={o}"]).optim) for n, o in ours.items()}
    steps = {name: optimizer.step for name, optimizer in optimizers.items()}
    steps["torch"] = lambda: (muon.step(), adamw.step())
    for kind in ("muon", "adamw"):
        groups = [dict(group) for group in optimizers["2026"].param_groups if group["kind"] == kind]
        steps[f"2026_{kind}"] = GroupOptimizer(groups).step
    with torch.no_grad():
        seconds = _bench.alternating(steps, args.repeats)
    n_adamw = sum(p.numel() for p in rest)
    result = vars(args) | {f"{name}_ms": 1000 * value for name, value in seconds.items()}
    result["to_torch"] = seconds["2026"] / seconds["torch"]
    result["muon_floor_ms"] = 1000 * muon_flops(matrices["torch"], 5) / _bench.matmul_rate(args.dtype)
    # AdamW reads 4 and writes 3 fp32 values per parameter.
    result["adamw_floor_ms"] = 1000 * 28 * n_adamw / _bench.copy_rate()
    return result


def main() -> None:
    """Measure all optimizers and print the results."""
    _bench.show(measure(_bench.arguments(__doc__, {"depth": 4, "vocab": 8192, "repeats": 10})))


if __name__ == "__main__":
    main()
