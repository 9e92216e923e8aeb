"""Typed schemas of number formats, of what is meant for GPUs, and of how processes share the work."""

from dataclasses import dataclass

from llm.config.key import key


@dataclass
class PrecisionConfig:
    """Number formats of training."""

    compute: str = key(
        "arithmetic of the network: auto = bf16 where the hardware has it, but fp32 on a CPU where answers are drawn",
        choices=("auto", "fp32", "bf16", "fp16"),
        main=True,
    )
    fp8: bool = key("matrix products of the blocks in 8 bits, on Hopper GPUs and newer; elsewhere bf16 and a message")


@dataclass
class GPUConfig:
    """Config group `gpu`: other forms of a training step, for speed, that no GPU has run yet."""

    joint_qkv: bool = key("queries, keys and values of training steps by one matrix product; untested on a GPU")
    tuned_products: bool = key(
        "let torch.compile time Triton products, what follows fused in, against the library's: minutes at the first "
        "start; untested on a GPU"
    )
    bf16_tables: bool = key(
        "embeddings hand out rows in bf16, and add up gradients in it, beside precision.compute=bf16; untested on a GPU"
    )
    fp8_head: bool = key("the head's products in 8 bits too, beside precision.fp8=true; untested on a GPU")
    early_check: bool = key(
        "read the loss of a step before the last backward pass, so that the update is launched during that pass; "
        "untested on a GPU"
    )
    muon_kernels: bool = key(
        "Muon's passes over memory by Triton kernels of our own, beside optim=muon_adamw; untested on a GPU"
    )


@dataclass
class EstimateConfig:
    """GPUs for which dry_run estimates memory, time and cost."""

    gpu: str = key("GPU whose memory, time and cost dry_run estimates")
    devices: int = key("number of GPUs in the estimate", low=1, high=10**6)
    mfu: float = key("share of the GPUs' bf16 peak that the estimate assumes", above=0, high=1)


@dataclass
class StrategyConfig:
    """Config group `strategy`: how processes share the work."""

    name: str = key(
        "how devices share the work; auto = by the number of devices",
        choices=("auto", "single", "muon", "ddp", "fsdp"),
        fixed=True,
    )
    early_sums: bool = key(
        "muon sums gradients over processes during a step's last backward pass; blocks are compiled one by one; "
        "untested on a GPU"
    )
