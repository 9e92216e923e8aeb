"""Communication of several H100s in a step of pretraining against their computation, on paper: nothing is measured.

    python bench/communication_model.py

Compute: the step's FLOPs at 45 % of 989 TFLOP/s. A ring moves its bytes at 80 % of the slowest link: 450 GB/s of NVLink
within a node; between nodes 8 adapters of 50 GB/s, through which 8 rings pass side by side. Latency, stragglers and the
host are left out. Update: the orthogonalisation's products, also at 45 %, and 28 bytes per parameter at 3.35 TB/s.
Exposed: transfer that no computation hides. muon exchanges after the backward pass, but with strategy.early_sums
(muon-early) sums gradients, half of its transfer, during the last micro-batch's backward pass (two thirds of its time),
as ddp does with all of its transfer, and fsdp during all of the computing. Prints a table and a last line of JSON.
"""

import _bench  # noqa: F401  isort: skip  (puts the project on the path)
import json

from llm.cli.overrides import compose
from llm.model.config import GPTConfig, flops_per_token, num_params
from llm.scaling.gpu_estimate import GPUS
from llm.scaling.rules import REFERENCE_DEPTH, auto_batch, model_config, training_tokens
from llm.utils.format import markdown_table

RATE = 0.45 * GPUS["h100"].flops
MEMORY_RATE, NVLINK, ADAPTERS, REACHED = 3.35e12, 450e9, 8 * 50e9, 0.8
NODE = 8
UPDATE_BYTES = 28  # per parameter: reads 4 and writes 3 fp32 values
ROWS = {"d24": 16, "d32": 8}  # largest number of rows in a micro-batch


def muon_flops(config: GPTConfig) -> float:
    """Return the FLOPs of orthogonalising all matrices: 5 times x x^T, its square, and its product with x."""
    c, outputs = config, []
    for heads in (config.n_head, config.n_kv_head):  # of queries and what the heads return, of keys and values
        outputs += [heads * c.key_dim, heads * c.head_dim]
    shapes = [sorted((n, c.n_embd)) for n in (*outputs, 4 * c.n_embd, 4 * c.n_embd)]
    return c.n_blocks * sum(5 * (4 * small**2 * large + 2 * small**3) for small, large in shapes)


def step_of(model: str, world: int, strategy: str) -> dict:
    """Return seconds and bytes of one step of experiment=speedrun with `model` on `world` GPUs."""
    cfg = compose("train", ["experiment=speedrun", f"model={model}"])
    config, reference = (
        model_config(dict(cfg.model) | {"depth": depth}, cfg.arch, cfg.model.vocab_size)
        for depth in (cfg.model.depth, REFERENCE_DEPTH)
    )
    horizons = [training_tokens(c, cfg.stage.tokens_per_param, cfg.stage.count_params) for c in (config, reference)]
    tokens, params, matrices = auto_batch(*horizons), *(num_params(config)[kind] for kind in ("total", "blocks"))
    rows = min(ROWS[model], tokens // config.seq_len // world)
    micro = tokens // (config.seq_len * world * rows)
    compute = tokens * flops_per_token(config) / world / RATE
    numbers = 2 * params  # gradients summed, weights gathered
    if strategy == "fsdp":  # blocks gathered twice, all else once, gradients summed; matrices to owners and back
        numbers = micro * (2 * params + matrices) + 2 * matrices
    sent = 4 * numbers * (world - 1) / world
    transfer = sent / (REACHED * (NVLINK if world <= NODE else ADAPTERS))
    backward = compute / micro * 2 / 3
    hidden = {"muon": 0.0, "muon-early": min(backward, transfer / 2), "ddp": backward, "fsdp": compute}[strategy]
    update = (muon_flops(config) / RATE + UPDATE_BYTES * params / MEMORY_RATE) / (1 if strategy == "ddp" else world)
    exposed = max(0.0, transfer - hidden)
    step = compute + exposed + update
    return {
        "model": model,
        "gpus": world,
        "strategy": strategy,
        "tokens": tokens,
        "micro": micro,
        "sent_gb": sent / 1e9,
        "compute_ms": 1e3 * compute,
        "transfer_ms": 1e3 * transfer,
        "exposed_ms": 1e3 * exposed,
        "update_ms": 1e3 * update,
        "step_ms": 1e3 * step,
        "efficiency": compute / step,
    }


def main() -> None:
    """Print the table of all models, numbers of GPUs and strategies."""
    steps = [step_of(m, w, s) for m in ROWS for w in (8, 64, 256) for s in ("muon", "muon-early", "ddp", "fsdp")]
    header = ("model", "GPUs", "strategy", "micro-batches", "sent, GB", "compute, ms", "transfer, ms", "exposed, ms")
    rows = [
        [s["model"], f"{s['gpus']}", s["strategy"], f"{s['micro']}", f"{s['sent_gb']:.1f}"]
        + [f"{s[f'{name}_ms']:.0f}" for name in ("compute", "transfer", "exposed", "update", "step")]
        + [f"{s['efficiency']:.0%}"]
        for s in steps
    ]
    print(markdown_table([*header, "update, ms", "step, ms", "computing"], rows, {1, *range(3, 11)}))
    print(json.dumps(steps))


if __name__ == "__main__":
    main()
