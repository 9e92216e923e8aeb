"""Times of the parts of a step of reinforcement learning."""

import time

import lightning as L
import torch


class StepTimes(L.Callback):
    """Adds rollout_share, update_share, rest_share and update_tok_per_s to the numbers of every step.

    Shares of a step's wall time without periodic callbacks: drawing answers; passes of other networks, forward,
    backward and optimizer; all else, such as rewards and making batches. A batch tells the `seconds` of its rollout and
    of further forward passes. The rate is of this process's real tokens (context included) in the update.
    """

    def on_train_start(self, trainer, module) -> None:
        self.end, self.paused = time.perf_counter(), module.progress.paused_seconds

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.begin, self.paused_before = time.perf_counter(), module.progress.paused_seconds

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        now, paused = time.perf_counter(), module.progress.paused_seconds
        whole = max(now - self.end - (paused - self.paused), 1e-9)
        training = now - self.begin - (paused - self.paused_before)
        rollout, update = batch["seconds"]["rollout"] / whole, (training + batch["seconds"]["forward"]) / whole
        self.end, self.paused = now, paused
        shares = {"rollout_share": rollout, "update_share": update, "rest_share": max(1 - rollout - update, 0.0)}
        module.step_log.add_numbers(shares | {"update_tok_per_s": batch["n_tokens"] / training})
