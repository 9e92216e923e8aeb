"""Run training and decoding steps on a GPU that does nothing, and tell what would be wrong or waited for on a real one.

    python tests/gpu_stand_in.py FOLDER        (run by test_gpu_stand_in.py, once per FOLDER of compiled code)

Tensors have shapes, strides, formats and devices, and no numbers. Prints a line of JSON: for every case the error, or
the places at which the host waits for the device in the second step: reading a number, choosing by a mask, or copying
without `non_blocking`. A training step there is two micro-batches and an update, without the one wait for the loss.
"""

import ctypes
import dataclasses
import json
import subprocess
import sys
import sysconfig
import traceback
from importlib.util import find_spec
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def load(folder: Path) -> None:
    """Compile the GPU that does nothing into a folder, if it is not there, and load it. Torch is imported later."""
    source, built = REPO / "tests/gpu_stand_in.cpp", folder / "gpu_stand_in.so"
    if not built.exists():
        torch_dir = Path(find_spec("torch").origin).parent
        libraries = [f"-L{torch_dir / 'lib'}", f"-Wl,-rpath,{torch_dir / 'lib'}", "-lc10", "-ltorch_cpu"]
        include = [f"-I{torch_dir / 'include'}", f"-I{sysconfig.get_path('include')}"]
        flags = ["-O0", "-std=c++20", "-fPIC", "-shared"]
        subprocess.run(["g++", *flags, *include, str(source), "-o", str(built), *libraries], check=True)
    ctypes.CDLL(str(built), mode=ctypes.RTLD_GLOBAL)


load(Path(sys.argv[1]))
sys.path.insert(0, str(REPO))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

T, VOCAB = 64, 1024
READS = ("_local_scalar_dense", "nonzero", "equal", "unique_dim", "_unique2", "masked_select")
CASES = {  # name: settings
    "modern": (),
    "fp32": ("precision.compute=fp32",),
    "classic": ("arch=classic",),
    "gpt2": ("arch=gpt2",),
    "qwen3": ("arch=qwen3",),
    "documents": ("arch.document_masks=true", "arch.key_offset=true", "arch.window_pattern=SL"),
    "tables": ("arch.ngrams=[2,3]", "arch.copy_candidate=true", "arch.attention_gate=true"),
    "heads": ("arch.exclusive_attention=true", "arch.paired_heads=all", "arch.qk_dim=16"),
    "loops": ("model.depth=4", "arch.loops=2"),
    "checkpointing": ("trainer.activation_checkpointing=true",),
    "gpu keys": ("gpu.joint_qkv=true", "gpu.bf16_tables=true"),
    "fp8": ("precision.fp8=true", "gpu.fp8_head=true"),
    "adamw": ("optim=adamw",),
    "adamh": ("optim=adamw", "optim.hyperball=true"),
    "dion": ("optim.dion_rank=0.25",),
    "muon switches": ("optim.muon2_beta=0.9", "optim.slow_momentum=0.98", "optim.cautious_update=true"),
    "hyperball": ("optim.hyperball=true", "optim.per_head=true", "optim.row_floor=0.4"),
    "further goals": ("stage.multi_token=0.5",),
    "sampled softmax": ("stage.sampled_softmax=0.5",),
}


class Waits(TorchDispatchMode):
    """Collects the lines of the project at which the host would wait for the device."""

    def __init__(self):
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if what := waits_for(str(func).removeprefix("aten.").split(".")[0], args, kwargs):
            own = [frame for frame in traceback.extract_stack() if f"{REPO}/llm" in frame.filename]
            place = f"{Path(own[-1].filename).relative_to(REPO)}:{own[-1].lineno}" if own else "outside"
            self.places.append(f"{what} at {place}")
        return func(*args, **kwargs)


def waits_for(name: str, args: tuple, kwargs: dict) -> str | None:
    """Say what an operation makes the host wait for; None where it does not."""
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    if name in READS and tensors and tensors[0].is_cuda:
        return name
    if name == "_to_copy" and kwargs.get("device") is not None and not kwargs.get("non_blocking"):
        to = torch.device(kwargs["device"]).type
        return f"copy to {to}" if to != tensors[0].device.type else None
    if name == "copy_" and tensors[0].device.type != tensors[1].device.type:
        return None if kwargs.get("non_blocking") or len(args) > 2 and args[2] else "copy_"
    if name.startswith("index") and len(args) > 1 and isinstance(args[1], list | tuple):
        masks = (t for t in args[1] if isinstance(t, torch.Tensor) and t.is_cuda and t.dtype == torch.bool)
        return "a mask" if next(masks, None) is not None else None
    return None


def attention_of_a_gpu(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Stand for `scaled_dot_product_attention` by the memory-efficient kernel, with the strides of its results."""
    if enable_gqa:
        k, v = (t.repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v))
    if attn_mask is not None:
        bias = torch.zeros(attn_mask.shape, dtype=q.dtype, device=q.device)
        attn_mask = bias.masked_fill(~attn_mask, -1e9) if attn_mask.dtype == torch.bool else attn_mask
        attn_mask = attn_mask.expand(*q.shape[:3], k.size(2))
    needs = any(t.requires_grad for t in (q, k, v))
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(q, k, v, attn_mask, needs, dropout_p, is_causal, scale=scale)[0]


def network(cfg, **more):
    """Return the network of a configuration on the device, not compiled, without adding gradients to kept ones."""
    from llm.model.linear import resolve_compute_dtype
    from llm.scaling.rules import model_config
    from llm.stages.micro_batch import build_network

    with torch.device("cuda"):
        net = build_network(dataclasses.replace(model_config(cfg.model, cfg.arch, VOCAB), **more))
    net.compute_dtype = resolve_compute_dtype(cfg.precision.compute, torch.device("cuda"))
    if net.config.arch != "gpt2":  # the tables of angles are made of numbers, on the host
        net.cos, net.sin = (torch.empty(table.shape, device="cuda") for table in (net.cos, net.sin))
    net.activation_checkpointing = cfg.trainer.activation_checkpointing
    return net


def training_steps(settings: tuple[str, ...]) -> list[str]:
    """Return the waits of the second of two steps."""
    from llm.cli.overrides import compose
    from llm.model.fp8 import HeadProducts
    from llm.model.joint_qkv import enable_joint_qkv
    from llm.model.linear import enable_bf16_tables, enable_fp8
    from llm.optim.build import build_optimizer
    from llm.stages.text_loss import TextLoss

    shape = ("model=d3", "model.head_dim=32", f"model.seq_len={T}", "stage=pretrain")
    cfg = compose("train", [*shape, *settings])
    net = network(cfg)
    if cfg.gpu.joint_qkv:
        enable_joint_qkv(net)
    if cfg.gpu.bf16_tables:
        enable_bf16_tables(net)
    if cfg.precision.fp8:
        enable_fp8(net)
    if cfg.gpu.fp8_head:
        net.head_products = HeadProducts
    optimizer, text_loss = build_optimizer(net, cfg.optim), TextLoss.of(cfg.stage, None)
    optimizer.max_norm = 1.0
    ids = torch.zeros(4, T, dtype=torch.long, device="cuda")
    for step in range(2):
        with Waits() as waits:
            for _ in range(2):
                if text_loss is None:
                    loss = net(ids, ids, reduction="sum")
                else:
                    loss = text_loss(net, {"inputs": ids, "targets": ids}, 0.1, step)
                (loss * 0.1).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return waits.places


def decode_step(shared: int) -> list[str]:
    """Return the waits of a step that is recorded, where `shared` heads have the keys of one."""
    from llm.cli.overrides import compose
    from llm.model.cached_attention import StepPass

    cfg = compose("train", ["model=d2", "model.head_dim=32", f"model.seq_len={T}"])
    net = network(cfg, n_head=4, n_kv_head=4 // shared)
    rows = torch.zeros(4, dtype=torch.long, device="cuda")
    with torch.no_grad(), Waits() as waits:
        step = StepPass(net.new_cache(4, T), rows, torch.zeros((), dtype=torch.long, device="cuda"), T, "sdpa")
        net(rows.unsqueeze(1), cache=step, last_only=True)
    return waits.places


def main() -> None:
    """Run all cases and print what was found."""
    torch.set_num_threads(1)
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.Tensor.pin_memory = lambda tensor: tensor
    F.scaled_dot_product_attention = attention_of_a_gpu
    cases = {name: lambda words=words: training_steps(words) for name, words in CASES.items()}
    cases |= {f"decoding, {n} heads a key": lambda n=n: decode_step(n) for n in (1, 2, 4)}
    found = {}
    for name, case in cases.items():
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                found[name] = case()
        except Exception as error:
            own = [f"{one.filename}:{one.lineno}" for one in traceback.extract_tb(error.__traceback__)]
            found[name] = [f"{type(error).__name__}: {error} ({', '.join(own[-3:])})"]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
