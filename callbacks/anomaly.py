"""Debugging: stop at the operation whose gradient is not a number."""

import lightning as L
import torch


class DetectAnomaly(L.Callback):
    """Turn autograd's anomaly mode on while a stage trains: a NaN in a backward pass is an error.

    The error names the operation; a warning before it shows the line of the forward pass that made it. Steps take
    longer, their numbers are those without.
    """

    def on_train_start(self, trainer, module) -> None:
        self.before = torch.is_anomaly_enabled()
        torch.autograd.set_detect_anomaly(True)

    def teardown(self, trainer, module, stage) -> None:
        torch.autograd.set_detect_anomaly(getattr(self, "before", False))
