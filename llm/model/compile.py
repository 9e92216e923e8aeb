"""Compile training with torch.compile: the network from its embeddings to the last norm, and the loss head.

Only training steps of fixed shapes are compiled. The embeddings stay eager, because their compiled gradient adds with
atomics, one number after another, and is slower. Evaluation and generation stay eager because their shapes vary, and so
does reinforcement learning. Names of weights do not change. `compile=auto` compiles where it pays: on a GPU, and on a
CPU with a C++ compiler for long runs, because the first step waits for the compiler (20 to 60 seconds, less when its
cache on disk is warm).
"""

import contextlib
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from llm.config.stages import stage_row
from llm.errors import UserError
from llm.model.compile_cache import heal
from llm.model.cross_entropy import fused_chunk_loss

# Inductor times its own Triton products, with elementwise work behind them fused in where that is faster, against the
# library's, and keeps the fastest of each shape. Of the MLP's products that work is relu^2 and its gradient.
TUNED = {"max_autotune_gemm": True, "max_autotune_gemm_backends": "ATEN,TRITON", "epilogue_fusion": True}
# Forms of a block that compiled code is kept for: with and without windows, value embeddings, gradients, at every size
# that a ramp takes. Torch's own limit of 8 leaves a block that has more forms uncompiled.
BLOCK_FORMS = 64
LONG_RUN = 500  # steps from which compiling pays on a CPU


def decide(choice: str | bool, stage: str, device: torch.device, steps: int) -> tuple[bool, str]:
    """Return (compile or not, the reason for the log) for `compile` = auto | True | False.

    Raises UserError for another value, and for True where shapes vary or the compiler is missing.
    """
    if choice != "auto" and not isinstance(choice, bool):
        raise UserError(f"compile={choice}: choose one of auto, true, false")
    if choice is False:
        return False, "compile=false"
    if not stage_row(stage).fixed_shapes:
        if choice is True:
            raise UserError(f"compile=true: the shapes of stage={stage} change from step to step; set compile=auto")
        return False, f"the shapes of stage={stage} change"
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        if choice is True:
            raise UserError("compile=true: there is no C++ compiler (g++ or clang++); install one, or set compile=auto")
        return False, "there is no C++ compiler"
    if choice is True:
        return True, "compile=true"
    if device.type == "cuda" and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return False, "there is no C compiler"
    if device.type == "cuda":
        return True, "on a GPU"
    if device.type == "cpu" and steps >= LONG_RUN:
        return True, f"{steps:,} steps"
    return False, f"fewer than {LONG_RUN} steps on a CPU" if device.type == "cpu" else f"on {device.type}"


def compile_training(net, by_block: bool = False, tuned: bool = False, device: torch.device | None = None) -> None:
    """Make `net` run compiled whenever it gets targets and gradients are on.

    by_block: compile each block separately, for FSDP2, which gathers and frees weights between blocks, and for sums
    that begin when a block's gradients are ready; the blocks then run compiled everywhere. tuned: time several forms of
    every product of the blocks at the first step, which takes minutes, and keep the fastest (untested on a GPU).
    device: where `net` will be; None = where it is. The first step raises UserError, naming the part, if the compiler
    fails. What an interrupted compilation has left in the compile cache is deleted, here and when the compiler fails.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # one process of a machine: the others print nothing
        heal()
    options = TUNED if tuned else None
    ready = begin_sooner() if (device or net.device).type == "cpu" else None
    if by_block:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, BLOCK_FORMS)
        for block in net.transformer.h:
            block.forward = _named("a block", torch.compile(block.forward, dynamic=False, options=options), ready)
        net.training_forward_blocks = net.forward_blocks
    else:
        whole = torch.compile(net.forward_blocks, dynamic=False, options=options)
        net.training_forward_blocks = _named("the network", whole, ready)
    net.loss_kernel = _named("the loss head", torch.compile(fused_chunk_loss, dynamic=False), ready)


def begin_sooner() -> threading.Thread:
    """Prepare the first step on a CPU; return a thread that must end before something is compiled.

    The cache on disk may hold whole graphs with functions that have a gradient of their own, as the loss head does:
    what torch keeps is found by the traced graph, in which the body of such a function stands, so a changed one is
    compiled anew. Else torch would keep parts, and trace the gradient and divide the graph again at every start. The
    thread asks processes of its own which vector instructions there are, which takes a second of waiting.
    """
    from torch._functorch import config

    config.autograd_cache_allow_custom_autograd_functions = True
    thread = threading.Thread(target=_find_vector_instructions, name="fathom-compiler", daemon=True)
    thread.start()
    return thread


def _find_vector_instructions() -> None:
    """Let torch's compiler find out what it asks first, and keeps."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    with contextlib.suppress(Exception):  # the compiler will ask again, and say what is wrong
        pick_vec_isa()


def _named(part: str, compiled: Callable, ready: threading.Thread | None = None) -> Callable:
    """Return `compiled` with compiler errors turned into a UserError that names `part`; wait for `ready` first.

    Where the compile cache was damaged, it is healed and the compiler called again.
    """
    healed: set[Path] = set()

    def run(*args):
        if ready is not None:
            ready.join()
        try:
            return compiled(*args)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            found = set(heal(str(error))) - healed  # each file once: another failure is of another kind
            if found:
                healed.update(found)
                return run(*args)
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"compile: {part} could not be compiled ({reason}); set compile=false to train without"
            ) from error

    return run
