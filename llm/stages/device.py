"""A network made ready for the device it trains on, and what a Lightning Trainer may ask of its module."""

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from llm.errors import UserError
from llm.model.compile import compile_training, decide
from llm.model.fp8 import HeadProducts, can_fp8
from llm.model.gpt import GPT
from llm.model.joint_qkv import enable_joint_qkv
from llm.model.linear import choose_fp32_products, enable_bf16_tables, enable_fp8, resolve_compute_dtype
from llm.optim import muon_gpu
from llm.stages.plan import check_fp8


@dataclass
class DeviceOptions:
    """Choices of the configuration that depend on the device: number formats, attention kernel, compilation.

    draws_answers: whether the stage trains on answers that an engine draws, which must agree with the network.
    joint_qkv, tuned_products, fp8_head, bf16_tables, early_check, muon_kernels: keys of `gpu`.
    """

    compute: str
    fp8: bool
    attention: str
    compile: Any
    activation_checkpointing: bool
    fixed_shapes: bool
    draws_answers: bool
    joint_qkv: bool = False
    tuned_products: bool = False
    fp8_head: bool = False
    bf16_tables: bool = False
    early_check: bool = False
    muon_kernels: bool = False

    def prepare(
        self, net: GPT, device: torch.device, is_fsdp: bool, stage: str, steps: int, by_block: bool = False
    ) -> str:
        """Set up the network of a stage of `steps` steps for a device; return what was chosen, in words.

        by_block: compile each block by itself, as under FSDP.
        """
        net.compute_dtype = resolve_compute_dtype(self.compute, device, self.draws_answers)
        if device.type == "cpu":
            choose_fp32_products(by_onednn=self.draws_answers)
        chosen = [str(net.compute_dtype).removeprefix("torch.")]
        if self.fp8:
            check_fp8(net.compute_dtype, is_fsdp)
            chosen.append(use_fp8(net, device, self.fp8_head))
        if self.joint_qkv and not self.draws_answers:  # the engine multiplies one after the other
            chosen.append(f"q, k, v in one product: {enable_joint_qkv(net)} layers")
        if self.bf16_tables:
            if net.compute_dtype != torch.bfloat16:
                raise UserError(
                    f"gpu.bf16_tables=true: this trains in {chosen[0]}; set precision.compute=bf16, or this to false"
                )
            chosen.append(f"rows in bf16: {enable_bf16_tables(net)} tables")
        muon_gpu.turn_on(self.muon_kernels)
        if self.muon_kernels:
            chosen.append(tells_muon(device))
        net.activation_checkpointing = self.activation_checkpointing
        attention = net.set_attention(self.attention, device, self.fixed_shapes)
        compiled, why = decide(self.compile, stage, device, steps)
        if compiled:
            compile_training(net, is_fsdp or by_block, self.tuned_products and device.type == "cuda", device)
            if self.tuned_products:
                chosen.append(tells_tuned(device))
        return ", ".join([*chosen, f"attention {attention}", f"{'compiled' if compiled else 'eager'} ({why})"])


def use_fp8(net, device, with_head: bool = False) -> str:
    """Turn fp8 on where the device has it, in the head's products too if asked; return what was done, for the log."""
    if not can_fp8(device):
        return f"precision.fp8=true: {device} has no fp8 (Hopper GPUs and newer do), so this trains in bf16"
    if with_head:
        net.head_products = HeadProducts
    return f"fp8: {enable_fp8(net)} matrices{' and the head' if with_head else ''}"


def tells_tuned(device: torch.device) -> str:
    """Return what becomes of `gpu.tuned_products` in a compiled training on a device, in words for the log."""
    if device.type != "cuda":
        return f"gpu.tuned_products=true: {device.type} has one form of each product, so nothing is tuned"
    return "products tuned: the first step takes minutes"


def tells_muon(device: torch.device) -> str:
    """Return what becomes of `gpu.muon_kernels` on a device, in words. Raises UserError where a GPU has no Triton."""
    if device.type != "cuda":
        return f"gpu.muon_kernels=true: they are for GPUs, and this is {device.type}"
    if muon_gpu.load() is None:
        raise UserError("gpu.muon_kernels=true: Triton is missing; pip install triton, or set it to false")
    return "Muon by Triton kernels"


def take_over(trainer) -> float | None:
    """Return the Trainer's `gradient_clip_val`, which the module's step applies in Lightning's place.

    Raises MisconfigurationException, Lightning's own kind, for settings that contradict one batch = one step.
    """
    if trainer.precision not in ("32-true", 32, "32"):
        raise MisconfigurationException(
            f"Trainer(precision={trainer.precision!r}): the network decides its number format; leave it out and build "
            "the stage with precision.compute=bf16 (auto, fp32, fp16)"
        )
    if trainer.accumulate_grad_batches != 1:
        raise MisconfigurationException(
            f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}): a batch is a whole optimizer step of "
            "several micro-batches; raise batch.tokens_per_step"
        )
    if trainer.gradient_clip_algorithm not in (None, "norm"):
        raise MisconfigurationException("Trainer(gradient_clip_algorithm='value'): gradients are clipped by norm only")
    clip, trainer.gradient_clip_val = trainer.gradient_clip_val or None, None
    return clip
