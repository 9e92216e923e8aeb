"""Parts of gpu_check: compilation, whole training steps, fp8, the keys of `gpu`, the size of micro-batches."""

import _bench  # isort: skip  (puts the project on the path)
import copy
import math
import time
from types import SimpleNamespace

import lightning as L
import torch
import train_step
from _gpu_kernels import relative
from _gpu_profile import memory_gib, traced

from llm.cli.overrides import compose
from llm.model.compile import compile_training
from llm.model.config import flops_per_token
from llm.model.fp8 import HeadProducts, can_fp8, fp8_linear
from llm.model.gpt import GPT
from llm.model.joint_qkv import enable_joint_qkv
from llm.model.linear import enable_bf16_tables, enable_fp8, resolve_compute_dtype
from llm.optim.build import build_optimizer
from llm.scaling.gpu_estimate import memory_bytes, peak_of
from llm.scaling.rules import model_config
from llm.stages.micro_batch import kept_bytes, kept_unbuilt, largest_by_arithmetic, resolve_rows
from llm.stages.step_module import StepModule
from llm.stages.trainer import quiet_lightning


def arguments(small: bool, depth: int, micro: int = 2, steps: int = 5) -> SimpleNamespace:
    """Return the arguments of bench/train_step.py for a network of `depth`, with the windows of the recipe.

    `micro` micro-batches a step; on a GPU as many rows of 2048 tokens as its memory holds, at most 32.
    """
    sizes = {"depth": depth, "seq_len": 2048, "rows": 32, "vocab": 32768, "micro": micro, "steps": steps}
    if small:
        sizes |= {"depth": 2, "seq_len": 64, "rows": 2, "vocab": 300, "steps": 2}
    elif _bench.DEVICE.type == "cuda":
        cfg = compose("train", [f"model=d{depth}", "model.seq_len=2048"])
        config, free = model_config(cfg.model, cfg.arch, sizes["vocab"]), torch.cuda.mem_get_info()[0]
        sizes["rows"] = largest_by_arithmetic(
            [32, 16, 8, 4, 2, 1], config, kept_unbuilt(config, cfg), 0.85 * free, False
        )
    choices = {"arch": "modern", "optim": "muon_adamw", "window": "SSSL", "attention": "auto", "plain_logits": "false"}
    dtype = torch.float32 if small else torch.bfloat16
    return SimpleNamespace(**sizes, **choices, dtype=dtype, compile="false" if small else "true")


def one_batch(args) -> dict:
    """Return the data of one step; the loader is closed."""
    feed = train_step.loader_of(args)
    batch = next(iter(feed))
    feed.close()
    return batch


# ---- Compilation ----------------------------------------------------------------------------------------------------


def compilation(found, small: bool) -> None:
    """Time compilation as a whole and block by block, with windows and without, and the passes that come of it.

    Compare gradients on the device, compiled and eager, with those of the CPU. The part step_d12 compiles the network
    again: its first pass shows the savings of a warm cache.
    """
    args = arguments(small, 12, micro=1)
    batch = one_batch(args)
    for name, window, by_block in (("whole", "SSSL", False), ("by_block", "SSSL", True), ("full_by_block", "L", True)):
        args.window, args.attention = window, "auto"
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        net, _ = train_step.build(args)
        if not small:
            compile_training(net, by_block)
        first = _bench.seconds_of(lambda net=net: train_step.passes(net, batch))
        graphs = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
        seconds = _bench.alternating({name: lambda net=net: train_step.passes(net, batch)}, 2 if small else 8)[name]
        again = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0) - graphs
        breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
        found.note(**{f"{name}_first_step_s": first, f"{name}_passes_ms": 1000 * seconds})
        found.note(**{f"{name}_graphs": graphs, f"{name}_graph_breaks": breaks, f"{name}_recompiled": again})
        found.note(**{f"{name}_attention": args.attention})
        if args.attention in ("flex", "sdpa"):  # wheels of FlashAttention 3 of before autumn 2025 break the graph
            found.check(f"{name}_breaks_and_recompilations", float(breaks + again), 0.0)
        del net
    for name, error in gradient_errors(compiles=not small).items():
        found.check(name, error, 1e-3)


def gradient_errors(compiles: bool, names: tuple[str, ...] = ("device", "compiled")) -> dict[str, float]:
    """Return relative errors, by name, of a small network's gradients in fp32 on the device.

    names: device = eager; compiled; or a key of `gpu`, switched on and compiled. The reference is the eager network on
    the CPU.
    """
    cfg = compose("train", ["model=d4", "model.head_dim=64", "model.seq_len=256", "arch.window_divisor=4"])
    net = GPT(model_config(cfg.model, cfg.arch, 1000)).init_weights(0)
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):  # nothing stays zero
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.02)
    ids = torch.randint(1000, (2, 257), generator=torch.Generator().manual_seed(0))
    nets = {"cpu": net} | {
        name: copy.deepcopy(net).to(_bench.DEVICE) for name in names if compiles or name != "compiled"
    }
    for name in nets.keys() - {"cpu", "device"}:
        switch(nets[name], name, compiles)
    grads = {}
    for name, one in nets.items():
        one.set_attention("auto", one.device, fixed_shapes=True)
        one(ids[:, :-1].to(one.device), ids[:, 1:].to(one.device)).backward()
        grads[name] = torch.cat([p.grad.flatten().cpu() for p in one.parameters()])
    others = [name for name in grads if name != "cpu"]
    return {f"gradients_{name}_and_cpu": relative(grads[name], grads["cpu"]) for name in others}


def switch(net: GPT, name: str, compiles: bool, by_block: bool = False) -> None:
    """Switch the key `name` of `gpu` on, if it is one, and compile the network, if `compiles`."""
    if name == "joint_qkv":
        enable_joint_qkv(net)
    if name == "bf16_tables":
        enable_bf16_tables(net)
    if compiles:
        compile_training(net, by_block, tuned=name == "tuned_products")


# ---- A whole step ---------------------------------------------------------------------------------------------------


class Watch(L.Callback):
    """Callback that times undisturbed steps of a stage, then traces one: tokens per second, peak memory, host waits."""

    def __init__(self, found, first: int, steps: int, tokens: int):
        self.found, self.first, self.last, self.tokens = found, first, first + steps, tokens
        self.trace = None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        step = module.global_step
        if step == self.first:
            _bench.sync()
            self.start = time.perf_counter()
        elif step == self.last:
            _bench.sync()
            seconds = (time.perf_counter() - self.start) / (self.last - self.first)
            self.found.note(step_ms=1000 * seconds, tok_per_s=self.tokens / seconds)
            if _bench.DEVICE.type == "cuda":
                self.found.note(peak_gib=memory_gib())
            self.trace = traced()
            self.trace.__enter__()
        elif step == self.last + 1 and self.trace is not None:
            self.trace.__exit__(None, None, None)
            self.found.note(**self.trace.summary())


def step(found, small: bool, depth: int) -> None:
    """Time a training step as a stage does it, against the matrix product rate, the data sheet and the estimate."""
    args = arguments(small, depth)
    quiet_lightning()
    net, cfg = train_step.build(args)
    tokens = args.rows * args.seq_len * args.micro
    found.note(tokens_per_step=tokens, rows=args.rows, attention=args.attention)
    if not small:
        compile_training(net)
    rate = _bench.matmul_rate(args.dtype, 0.1 if small else 1.0)
    batch = one_batch(args)
    found.note(first_passes_s=_bench.seconds_of(lambda: train_step.passes(net, batch)))
    net.zero_grad(set_to_none=True)
    parts = train_step.plain_loop(net, cfg, iter(feed := train_step.loader_of(args)), args.steps)
    feed.close()
    found.note(**{f"{name}_ms": 1000 * seconds for name, seconds in parts.items()})
    if _bench.DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    watch = Watch(found, train_step.WARMUP, args.steps, tokens)
    steps = train_step.WARMUP + args.steps + 3
    train_step.run_lightning(net, cfg, train_step.loader_of(args), steps, StepModule, watch)
    flops = flops_per_token(net.config, args.seq_len) * found.values["tok_per_s"]
    sheet = peak_of(torch.cuda.get_device_name()) if _bench.DEVICE.type == "cuda" else None
    found.note(tflops=flops / 1e12, share_of_matmul_rate=flops / rate, mfu=flops / sheet if sheet else None)
    estimate = memory_bytes(net.config, args.rows, kept_bytes(net, cfg)) / 2**30
    found.note(estimated_gib=estimate, peak_to_estimate=found.values.get("peak_gib", 0.0) / estimate)


# ---- fp8 ------------------------------------------------------------------------------------------------------------


def fp8(found, small: bool) -> None:
    """Compare fp8 products with exact ones, and time passes of a network block by block in bf16, in fp8, and with the
    head in fp8 too.
    """
    sizes = (48, 64, 32) if small else (8192, 1280, 5120)
    if _bench.DEVICE.type == "cuda" and not can_fp8(_bench.DEVICE):
        return found.note(fp8="absent")
    for name, error in fp8_errors(*sizes).items():
        found.check(f"product_{name}", error, 0.05 if name == "output" else 0.08)
    args = arguments(small, 20, micro=1)
    args.dtype, batch, losses = torch.bfloat16, one_batch(args), {}
    for name in ("bf16", "fp8", "fp8_head"):
        torch._dynamo.reset()
        net, cfg = train_step.build(args)
        if name != "bf16":
            found.note(matrices=enable_fp8(net))
        if name == "fp8_head":
            net.head_products = HeadProducts
        if not small:
            compile_training(net, by_block=True)
        found.note(**{f"{name}_first_step_s": _bench.seconds_of(lambda net=net: train_step.passes(net, batch))})
        one = {name: lambda net=net: train_step.passes(net, batch)}
        found.note(**{f"{name}_passes_ms": 1000 * _bench.alternating(one, 2 if small else 8)[name]})
        losses[name] = trained_loss(net, cfg, batch)
        found.note(**{f"{name}_loss_after_10": losses[name]})
        del net, one  # which holds the network too
    learnt = abs(math.log(args.vocab) - losses["bf16"])
    for name in ("fp8", "fp8_head"):
        found.note(**{f"{name}_to_bf16": found.values[f"{name}_passes_ms"] / found.values["bf16_passes_ms"]})
        found.check(f"{name}_loss_after_10_steps", abs(losses[name] - losses["bf16"]) / learnt, 0.1)
    return None


def fp8_errors(tokens: int, inner: int, outer: int) -> dict[str, float]:
    """Return the relative errors of an fp8 product (tokens, inner) x (inner, outer) and of its two gradients."""
    torch.manual_seed(0)
    x, w, grad = (torch.randn(s, device=_bench.DEVICE) for s in ((tokens, inner), (outer, inner), (tokens, outer)))
    x, w = x.bfloat16().requires_grad_(), w.requires_grad_()
    y = fp8_linear(x, w)
    dx, dw = torch.autograd.grad(y, (x, w), grad.bfloat16())
    a, b, g = x.detach().double(), w.detach().double(), grad.double()
    return {"output": relative(y, a @ b.T), "dx": relative(dx, g @ b), "dw": relative(dw, g.T @ a)}


def trained_loss(net: GPT, cfg, batch: dict, steps: int = 10) -> float:
    """Return the loss per token on the first rows of a batch after `steps` steps of training on that batch."""
    net.zero_grad(set_to_none=True)
    optimizer, micro = build_optimizer(net, cfg.optim), batch["micro"][0]
    ids, targets = (micro[name].to(_bench.DEVICE) for name in ("inputs", "targets"))
    for _ in range(steps):
        train_step.passes(net, batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        return net(ids[:4], targets[:4]).item()


# ---- The keys of `gpu` ----------------------------------------------------------------------------------------------


def switches(found, small: bool, key: str) -> None:
    """Compare and time passes of a network, compiled block by block, with a key of `gpu` off and on.

    In bf16 what ten steps have learnt is compared, then gradients of a small network in fp32 with the CPU's.
    """
    args = arguments(small, 12, micro=1)
    batch, losses = one_batch(args), {}
    for name in ("plain", key):
        torch._dynamo.reset()
        net, cfg = train_step.build(args)
        switch(net, name, not small, by_block=True)
        found.note(**{f"{name}_first_step_s": _bench.seconds_of(lambda net=net: train_step.passes(net, batch))})
        one = {name: lambda net=net: train_step.passes(net, batch)}
        found.note(**{f"{name}_passes_ms": 1000 * _bench.alternating(one, 2 if small else 8)[name]})
        losses[name] = trained_loss(net, cfg, batch)
        del net, one  # which holds the network too
    found.note(on_to_off=found.values[f"{key}_passes_ms"] / found.values["plain_passes_ms"])
    learnt = abs(math.log(args.vocab) - losses["plain"])
    found.check("loss_after_10_steps", abs(losses[key] - losses["plain"]) / learnt, 0.05)
    torch._dynamo.reset()
    for what, error in gradient_errors(not small, (key,)).items():
        found.check(what, error, 1e-2 if key == "bf16_tables" else 1e-3)  # rows that fp32 would not round


def early_check(found, small: bool, depth: int) -> None:
    """Time steps of a stage whose loss is read after the last backward pass, and before it: `gpu.early_check`.

    One micro-batch of few rows a step, where the launches of the update weigh most. The losses must be equal.
    """
    args, losses = arguments(small, depth, micro=1), {}
    args.rows = min(args.rows, 8)
    quiet_lightning()
    for name, is_early in (("late", False), ("early", True)):
        torch._dynamo.reset()
        net, cfg = train_step.build(args)
        if not small:
            compile_training(net, by_block=True)
        losses[name] = []

        class Checked(StepModule):
            def checked_sum(self, *args, seen=losses[name]):
                seen.append(super().checked_sum(*args))
                return seen[-1]

            def setup(self, stage, is_early=is_early):
                super().setup(stage)
                self.checks_early = is_early

        steps, own = train_step.WARMUP + args.steps + 3, type(found)(found.path.with_suffix(f".{name}"))
        watch = Watch(own, train_step.WARMUP, args.steps, args.rows * args.seq_len)
        train_step.run_lightning(net, cfg, train_step.loader_of(args), steps, Checked, watch)
        found.note(**{f"{name}_step_ms": own.values["step_ms"]})
    found.note(early_to_late=found.values["early_step_ms"] / found.values["late_step_ms"])
    a, b = (torch.tensor(losses[name][:3]) for name in ("late", "early"))
    found.check("losses", relative(b, a), 1e-3)


# ---- Micro-batches --------------------------------------------------------------------------------------------------


def micro_batch(found, small: bool) -> None:
    """Let the size of a micro-batch be chosen, and train steps of two: peak memory, and its share of the card's."""
    args = arguments(small, 20, micro=2)
    words = [f"model=d{args.depth}", f"model.seq_len={args.seq_len}", "batch.micro_batch_size=auto"]
    cfg = compose("train", words)
    config = model_config(cfg.model, cfg.arch, args.vocab)
    begin = time.perf_counter()
    args.rows = resolve_rows(cfg, config, 4 if small else 256)
    found.note(rows=args.rows, trial_s=time.perf_counter() - begin)
    found.note(estimated_gib=memory_bytes(config, args.rows, kept_unbuilt(config, cfg)) / 2**30)
    if _bench.DEVICE.type == "cuda":
        found.note(trial_peak_gib=memory_gib())
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    args.dtype = resolve_compute_dtype("auto", _bench.DEVICE)
    net, cfg = train_step.build(args)
    if not small:
        compile_training(net, by_block=True)  # in seconds
    optimizer, batch = build_optimizer(net, cfg.optim), one_batch(args)
    for _ in range(2):
        train_step.passes(net, batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    _bench.sync()
    if _bench.DEVICE.type == "cuda":
        peak, total = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
        found.note(peak_gib=peak / 2**30, share_of_memory=peak / total)
