"""Keep the weights with the lowest bits per byte beside the newest ones."""

import shutil
from pathlib import Path

import lightning as L

from llm.checkpoint.model_folder import save_model_folder
from llm.parallel import collectives
from llm.parallel.strategy import full_model
from llm.run.formats import BEST as BEST_NOTE
from llm.run.formats import read_form
from llm.utils.files import put_back_folder, replaced_folder, write_json

BEST, NOTE, WEIGHTS = "best", "best.json", "model"


class BestWeights(L.Callback):
    """Replaces best/ whenever an evaluation brings a lower `bpb` than all before it; stands behind the evaluations.

    The folder holds the weights, model/, and their step and bpb, best.json. It is replaced as a whole, so the two
    always agree, whenever the process is killed.
    """

    def __init__(self, stage_dir: Path):
        self.stage_dir = stage_dir
        self.lowest = float("inf")

    def on_train_start(self, trainer, module) -> None:
        """Take up the best of the steps done so far, and an evaluation that was made before this step or again."""
        known = best_note(self.stage_dir) if collectives.is_main() and module.global_step > 0 else None
        self.lowest = (collectives.broadcast_object(known) or {}).get("bpb", float("inf"))
        self.keep_if_better(module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.keep_if_better(module)

    def keep_if_better(self, module) -> None:
        """Write the weights if the row of this step holds a lower bpb; all processes take part."""
        bpb = module.row.get("bpb")
        if bpb is None or not bpb < self.lowest:
            return
        self.lowest = bpb
        net = full_model(module.net)
        if collectives.is_main():
            with replaced_folder(self.stage_dir / BEST) as new:
                save_model_folder(new / WEIGHTS, net, module.context.tokenizer)
                write_json(new / NOTE, {"step": module.global_step, "bpb": bpb})


def best_note(stage_dir: Path) -> dict | None:
    """Return {"step", "bpb"} of the best weights of a stage, None where there are none."""
    put_back_folder(stage_dir / BEST)
    return read_form(stage_dir / BEST / NOTE, BEST_NOTE)


def hand_over_best(stage_dir: Path) -> dict | None:
    """Copy the best weights to model/; return their step and bpb, None where no evaluation was made."""
    note = best_note(stage_dir)
    if note is not None:
        with replaced_folder(stage_dir / "model") as new:
            shutil.copytree(stage_dir / BEST / WEIGHTS, new, dirs_exist_ok=True)
    return note
