"""Keep the weights with the lowest bits per byte beside the newest ones."""

from pathlib import Path

import lightning as L

from llm.checkpoint.model_folder import save_model_folder
from llm.parallel import collectives
from llm.parallel.strategy import full_model
from llm.utils.files import read_json, write_json

BEST, NOTE = "best", "best.json"


class BestWeights(L.Callback):
    """Writes best/ and best.json whenever an evaluation brings a lower `bpb` than all before it.

    Stands behind the evaluations. best.json is written after the folder is complete: a run that was killed between the
    two does the same steps again and writes both anew.
    """

    def __init__(self, stage_dir: Path):
        self.stage_dir = stage_dir
        self.lowest: float | None = None

    def on_train_start(self, trainer, module) -> None:
        known = None
        if collectives.is_main() and module.global_step > 0:
            known = (read_json(self.stage_dir / NOTE) or {}).get("bpb")
        self.lowest = collectives.broadcast_object(known)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        bpb = module.row.get("bpb")
        if bpb is None or (self.lowest is not None and not bpb < self.lowest):
            return
        self.lowest = bpb
        net = full_model(module.net)
        if collectives.is_main():
            save_model_folder(self.stage_dir / BEST, net, module.context.tokenizer)
            write_json(self.stage_dir / NOTE, {"step": module.global_step, "bpb": bpb})
