"""Bits per byte on the stage's fixed validation batches, which the processes share out."""

import torch

from callbacks.cadence import Periodic
from llm.eval.bits_per_byte import bits_per_byte
from llm.parallel.strategy import full_model


class BitsPerByte(Periodic):
    """Logs `bpb`, before the first step too: the value that training has to bring down.

    Stages behind finetuning have `bpb_text` beside it, of held-out text: what their parent knew and should stay.
    """

    def __init__(self, every: int):
        super().__init__(every, at_start=True)

    def names(self, module) -> list[str]:
        return [] if module.context.val_batches is None or not self.every else ["bpb"]

    def act(self, trainer, module, step) -> None:
        context = module.context
        for name, batches in (("bpb", context.val_batches), ("bpb_text", context.text_batches)):
            if batches is not None:
                with torch.no_grad():
                    module.row[name] = bits_per_byte(full_model(module.net), batches, context.token_bytes)
