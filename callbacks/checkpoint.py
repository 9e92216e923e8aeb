"""Save checkpoints while training."""

import gc
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch

from callbacks.cadence import Periodic
from llm.checkpoint.resume import checkpoint_path
from llm.errors import BadData, UserError, is_out_of_memory
from llm.parallel import collectives
from llm.parallel.strategy import FSDPStrategy


class StepCheckpoint(Periodic):
    """Saves every `every` steps and every `minutes`, after the last step, and whenever a clean stop was asked for.

    Stands before the evaluations in the list of callbacks: a failing evaluation must not cost the steps before it.
    """

    repeats = False
    doing = "saving"

    def __init__(self, every: int, folder: str | Path, minutes: float | None = None):
        super().__init__(every)
        self.folder, self.seconds, self.saved = Path(folder), 60 * (minutes or float("inf")), None

    def on_train_start(self, trainer, module) -> None:
        self.saved, self.saved_at = module.global_step or None, time.monotonic()  # a resumed step is on the disk

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        module.votes.checkpoint = time.monotonic() - self.saved_at > self.seconds

    def due(self, module, step: int) -> bool:
        return super().due(module, step) or module.votes.checkpoint_count > 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        trainer.strategy.checkpoint_io.check()
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def on_exception(self, trainer, module, exception) -> None:
        """Save the last step before data that cannot be read, and before a pass for which memory was short.

        Several processes cannot meet here, they lose the steps since the last checkpoint.
        """
        if module.is_updating or not module.global_step or collectives.world_size() > 1:
            return
        if isinstance(exception, BadData):
            self.save_now(trainer, module)
            exception.args = (f"{exception.args[0]} Step {module.global_step} was saved; the same command resumes.",)
        elif is_out_of_memory(exception):
            make_room(trainer, module, exception)
            with suppress(Exception):  # the first error is the one to be told
                self.save_now(trainer, module)

    def on_train_end(self, trainer, module) -> None:
        """Save the step at which a callback ended the training early."""
        if module.global_step:
            self.act(trainer, module, module.global_step)

    def act(self, trainer, module, step) -> None:
        if self.saved != step:
            compare_processes(trainer, module, step)
            check_finite(module.net, step, "Nothing was saved; the same command resumes from the last sound checkpoint")
            trainer.save_checkpoint(checkpoint_path(self.folder, step))
            self.saved, self.saved_at = step, time.monotonic()

    def save_now(self, trainer, module) -> None:
        """Save this step and return once the file and its line in the manifest are on the disk: then it can be said."""
        self.act(trainer, module, module.global_step)
        trainer.strategy.checkpoint_io.finish()


def compare_processes(trainer, module, step: int) -> None:
    """Raise UserError if processes that all have the whole weights hold different ones; all of them call it."""
    if collectives.world_size() > 1 and not isinstance(trainer.strategy, FSDPStrategy):
        check_same_weights(dict(module.net.named_parameters()), step)


def check_same_weights(params: dict[str, torch.Tensor], step: int) -> None:
    """Raise UserError if the fp32 bits of a parameter add up to another number in another process."""
    sums = torch.stack([p.detach().view(torch.int32).sum(dtype=torch.int64) for p in params.values()]).tolist()
    by_process = collectives.all_gather_object(sums)
    for number, its in enumerate(by_process):
        differing = [name for name, a, b in zip(params, by_process[0], its, strict=True) if a != b]
        if differing:
            raise UserError(
                f"after step {step} process {number} holds other weights than process 0 ({len(differing)} of "
                f"{len(params)} parameters, first {differing[0]}): a fault of memory, network or driver. Nothing was "
                "saved since the processes last agreed; the same command resumes from there"
            )


def check_finite(net: torch.nn.Module, step: int, then: str) -> None:
    """Raise UserError, which ends with `then`, if a weight is not finite; all processes call it together."""
    if spoilt := not_finite(net):
        raise UserError(
            f"the weights of step {step} are not finite (first {spoilt[0]}): a gradient was not, though the loss was. "
            f"{then}. Where it comes again, lower stage.lr_frac, with overwrite=true or run=<new name>"
        )


@torch.no_grad()
def not_finite(net: torch.nn.Module) -> list[str]:
    """Return the names of the trained parameters that are not finite in a process; all of them call it together."""
    named = {name: collectives.to_local(p) for name, p in net.named_parameters() if p.requires_grad}
    held = {name: p for name, p in named.items() if p.numel()}  # of few rows a process may have none
    norms = torch._foreach_norm(list(held.values()), float("inf")) if held else []
    is_finite = torch.stack(norms).isfinite().tolist() if held else []
    own = [name for name, is_sound in zip(held, is_finite, strict=True) if not is_sound]
    return [name for its in collectives.all_gather_object(own) for name in its]


def make_room(trainer, module, exception: BaseException) -> None:
    """Free what a pass that ran out of memory has left: the activations in the error's frames, and gradients."""
    traceback.clear_frames(exception.__traceback__)
    module.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trainer.strategy.checkpoint_io.asynchronous = False  # which would need a copy of the state
