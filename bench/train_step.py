"""Milliseconds of one training step, split into data, forward + backward, optimizer and the Lightning loop.

    python bench/train_step.py [--depth 4] [--seq-len 512] [--rows 4] [--vocab 8192] [--steps 20] [--dtype auto]

Everything runs in one process: the plain loop, the same steps through Lightning, and the matrix product rate that the
share of the peak refers to. Prints a table and a last line of JSON.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lightning as L  # noqa: E402
import torch  # noqa: E402

from callbacks.metrics import MetricsLog  # noqa: E402
from callbacks.throughput import Throughput, measured_matmul_rate  # noqa: E402
from llm.gpt import GPT, GPTConfig, flops_per_token, num_params  # noqa: E402
from llm.optim import build_optimizer  # noqa: E402
from llm.precision import resolve_compute_dtype  # noqa: E402
from llm.stages.step import StageContext, StepData, StepModule  # noqa: E402
from llm.trainer import quiet_lightning  # noqa: E402

OPTIM = SimpleNamespace(
    name="muon_adamw",
    matrix_lr=0.02,
    embedding_lr=0.2,
    unembedding_lr=0.004,
    betas=[0.8, 0.95],
    eps=1e-10,
    weight_decay=0.0,
    momentum=0.95,
    momentum_start=0.85,
    momentum_warmup=300,
    ns_steps=5,
)
STAGE = SimpleNamespace(lr_frac=1.0, warmup_ratio=0.0, warmdown_ratio=0.0, final_lr_frac=1.0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("depth", 4), ("seq-len", 512), ("rows", 4), ("vocab", 8192), ("steps", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="auto", help="auto, fp32 or bf16")
    return parser.parse_args()


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def plain_loop(net: GPT, batch: dict, steps: int, sync) -> tuple[float, float]:
    """Median seconds of forward + backward and of the optimizer, after two warm-up steps."""
    optimizer = build_optimizer(net, OPTIM)
    passes, updates = [], []
    for _ in range(steps + 2):
        sync()
        start = time.perf_counter()
        for micro in batch["micro"]:
            (net(micro["inputs"], micro["targets"], reduction="sum") / batch["n_trained"]).backward()
        sync()
        middle = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sync()
        passes.append(middle - start)
        updates.append(time.perf_counter() - middle)
    return median(passes[2:]), median(updates[2:])


def lightning_loop(net: GPT, batch: dict, steps: int) -> float:
    """Seconds per step of the same work as a stage does it: Lightning, metrics and throughput callbacks."""

    class Same:
        def __len__(self):
            return 10**9

        def __iter__(self):
            while True:
                yield batch

    class Clock(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            marks.append(time.perf_counter())

    marks: list[float] = []
    module = StepModule(net, OPTIM, STAGE, StageContext("bench", None, torch.ones(1), steps + 3, net.config.seq_len))
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="auto",
            devices=1,
            max_steps=steps + 3,
            max_epochs=-1,
            logger=False,
            callbacks=[Clock(), Throughput(10), MetricsLog(Path(folder) / "metrics.csv", 10)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, datamodule=StepData(lambda position: Same()))
    return median([b - a for a, b in zip(marks[2:], marks[3:], strict=False)])


def main() -> None:
    args = arguments()
    quiet_lightning()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sync = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    dtype = resolve_compute_dtype(args.dtype, device)
    heads = -(-64 * args.depth // 128)
    config = GPTConfig(args.depth, heads, heads, 128, 128 * heads, args.seq_len, args.vocab)
    net = GPT(config).init_weights(0).to(device)
    net.compute_dtype = dtype
    ids = torch.randint(0, args.vocab, (args.rows, args.seq_len + 1), device=device)
    micro = {"inputs": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}
    tokens = args.rows * args.seq_len
    batch = {"micro": [micro], "n_trained": tokens, "n_tokens": tokens, "state": None}
    peak = measured_matmul_rate(device, dtype, n=2048, seconds=1.0)
    passes, update = plain_loop(net, batch, args.steps, sync)
    framework = lightning_loop(net, batch, args.steps) - passes - update
    total = passes + update + max(framework, 0.0)
    rate = tokens * flops_per_token(config) / total
    result = {
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "params": num_params(config)["total"],
        "forward_backward_ms": 1000 * passes,
        "optimizer_ms": 1000 * update,
        "framework_ms": 1000 * framework,
        "tok_per_s": tokens / total,
        "flops_per_s": rate,
        "matmul_flops_per_s": peak,
        "share_of_matmul_rate": rate / peak,
        "optimizer_share": update / total,
        "framework_share": framework / total,
    }
    for key, value in result.items():
        print(f"{key:22} {value:,.4g}" if isinstance(value, float) else f"{key:22} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
