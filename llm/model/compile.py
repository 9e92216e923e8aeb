"""torch.compile for the fixed shapes of training: the network from its embeddings to the last norm, and the loss head.

What loses stays eager: the embeddings themselves, whose compiled gradient adds atomically, one number after another.
So do evaluation and generation, whose shapes vary, and reinforcement learning. Names of weights
do not change. `compile=auto` compiles where it pays: on a GPU; on a CPU with a C++ compiler for long runs, because the
first step waits for the compiler (20 to 60 seconds, less when its cache on disk is warm).
"""

import shutil
from collections.abc import Callable

import torch

from llm.config.stages import stage_row
from llm.errors import UserError
from llm.model.cross_entropy import fused_chunk_loss

LONG_RUN = 500  # steps from which compiling pays on a CPU


def decide(choice: str | bool, stage: str, device: torch.device, steps: int) -> tuple[bool, str]:
    """Whether to compile for `compile` = auto | True | False, and why, in words for the log."""
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


def compile_training(net, by_block: bool = False) -> None:
    """From now on `net` runs compiled where it is given targets and gradients are on.

    by_block: every block by itself, for FSDP2, which gathers and frees weights between them; then the blocks are
    compiled wherever they run. Raises UserError, naming the part, where the compiler fails at the first step.
    """
    if by_block:
        for block in net.transformer.h:
            block.forward = _named("a block", torch.compile(block.forward, dynamic=False))
        net.training_forward_blocks = net.forward_blocks
    else:
        net.training_forward_blocks = _named("the network", torch.compile(net.forward_blocks, dynamic=False))
    net.loss_kernel = _named("the loss head", torch.compile(fused_chunk_loss, dynamic=False))


def _named(part: str, compiled: Callable) -> Callable:
    def run(*args):
        try:
            return compiled(*args)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"compile: {part} could not be compiled ({reason}); set compile=false to train without"
            ) from error

    return run
