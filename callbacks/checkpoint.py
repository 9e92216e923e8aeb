"""Step-based checkpoints."""

from pathlib import Path

from callbacks.cadence import Periodic
from llm.checkpoint import checkpoint_path, remove_old


class StepCheckpoint(Periodic):
    """Saves every `every` steps, after the last step, and whenever a clean stop was asked for; keeps the newest two.

    Stands before the evaluations in the list of callbacks: a failing evaluation must not cost the steps before it.
    """

    def __init__(self, every: int, folder: str | Path, keep: int = 2):
        super().__init__(every)
        self.folder, self.keep = Path(folder), keep

    def act(self, trainer, module, step) -> None:
        trainer.save_checkpoint(checkpoint_path(self.folder, step))
        if trainer.is_global_zero:
            remove_old(self.folder, self.keep)
