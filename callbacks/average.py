"""A running average of the weights, which is evaluated and handed over in place of the last weights."""

import lightning as L
import torch

from llm.checkpoint.parts import facts

SHARE = 0.6  # of the average in what is read out


class AverageReadOut(L.Callback):
    """Keeps a = a + (w - a) / min(step, `steps`) beside the weights w, and reads out (1 - share) w + share a.

    Evaluations and the final weights are of the read-out; training goes on from w. Under a falling rate w circles
    around a point that a lags behind: a part of each does better than either. Source: tail average of modded-nanogpt's
    track 3, 2026-06-11 (steps 150, share 0.6). Every process holds all of a, in fp32.
    """

    def __init__(self, steps: int, share: float | None = None):
        self.steps, self.share = steps, SHARE if share is None else share
        self.average: dict[str, torch.Tensor] = {}
        self.trained: list[torch.Tensor] | None = None  # the weights of training while others stand in their place

    def on_train_start(self, trainer, module) -> None:
        """Begin with the weights themselves; evaluations that a killed run repeats here are of the read-out."""
        self._pairs(module)
        self.read_out(module)

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.put_back(module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        average, weights = self._pairs(module)
        torch._foreach_lerp_(average, weights, 1 / min(module.global_step, self.steps))

    def on_validation_epoch_start(self, trainer, module) -> None:
        self.read_out(module)

    def on_validation_epoch_end(self, trainer, module) -> None:
        self.put_back(module)

    def on_save_checkpoint(self, trainer, module, checkpoint) -> None:
        """Save the weights of training, also where a checkpoint is made in the middle of an evaluation."""
        if self.trained is not None:
            names = module.net.named_parameters(remove_duplicate=False)  # shared matrices stand at every place
            trained = dict(zip(self.average, self.trained, strict=True))
            own = {id(p): trained[name] for name, p in module.net.named_parameters() if name in trained}
            weights = {f"net.{name}": own[id(p)] for name, p in names if id(p) in own}
            checkpoint["state_dict"] = checkpoint["state_dict"] | weights

    def on_fit_end(self, trainer, module) -> None:
        """Leave the read-out in the network once the last checkpoint is made."""
        self.read_out(module)
        self.trained = None

    @torch.no_grad()
    def read_out(self, module) -> None:
        """Put the read-out in the place of the weights."""
        if self.trained is None:
            average, weights = self._pairs(module)
            self.trained = [w.clone() for w in weights]
            torch._foreach_lerp_(weights, average, self.share)

    @torch.no_grad()
    def put_back(self, module) -> None:
        """Put the weights of training back, if the read-out stands in their place."""
        if self.trained is not None:
            torch._foreach_copy_(self._pairs(module)[1], self.trained)
            self.trained = None

    def _pairs(self, module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return averages and weights in one order. Raises ValueError where a checkpoint's averages do not fit."""
        weights = {name: p.detach() for name, p in module.net.named_parameters() if p.requires_grad}
        if not self.average and not module.global_step:
            self.average = {name: w.clone() for name, w in weights.items()}
        if facts(self.average) != facts(weights):
            raise ValueError("the averages of weights in it are not of this network")
        self.average = {name: self.average[name].to(w.device) for name, w in weights.items()}
        return list(self.average.values()), list(weights.values())

    def state_dict(self) -> dict:
        return {"average": self.average}

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over the averages of a checkpoint as copies: what is loaded may be a file mapped into memory."""
        self.average = {name: value.clone() for name, value in state_dict["average"].items()}
