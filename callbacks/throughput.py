"""Speed: tokens per second, milliseconds per step, FLOP/s as a share of what this machine's matrix products reach."""

import time

import lightning as L
import torch

from llm.scaling.gpu_estimate import peak_of
from llm.scaling.machine import matmul_rate


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the peak FLOP/s: of the data sheet for known GPUs in bf16, else that of square products here."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        if peak := peak_of(torch.cuda.get_device_name(device)):
            return peak
    return matmul_rate(device, dtype)


class Throughput(L.Callback):
    """Adds tok_per_s, ms_per_step, mfu, data_wait, tokens, flops and seconds to every logged row.

    data_wait is the share of the time in which this process had to wait for its next step of data.

    The time of periodic callbacks (evaluation, checkpoints) is left out, waiting for data is not. flops and mfu count
    the training passes; what reinforcement learning spends on sampling is in the seconds only. A first step that waits
    for torch.compile counts in the seconds but not in the rates, and is printed. Tokens and FLOPs are of all processes.
    """

    def __init__(self, log_every: int, peak_flops: float | None = None):
        self.log_every, self.peak, self.train_seconds = log_every, peak_flops, 0.0
        self.progress = None  # the module's, once training has begun

    def on_train_start(self, trainer, module) -> None:
        self.peak = self.peak or peak_flops(module.device, module.net.compute_dtype)
        self.seconds_before = self.train_seconds
        self.compiles = module.net.training_forward_blocks is not None
        if module.row_is_missing and self._due(module):
            self._write(module, None, None, None, None)
        self._open_window(module)

    def _open_window(self, module) -> None:
        self.progress = module.progress
        self.start, self.paused = time.perf_counter(), module.progress.paused_seconds
        self.first_step, self.first_token = module.global_step, module.progress.tokens
        self.waited = _wait_seconds(module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        compiles, self.compiles = self.compiles, False
        if not (self._due(module) or compiles):
            return
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = self._open_seconds()
        rate = (module.progress.tokens - self.first_token) / seconds
        self.train_seconds += seconds
        if compiles:
            print(f"first step: {seconds:.1f} s with compilation", flush=True)
            rates = (None, None, None, None)
        else:
            mfu = rate * module.flops_per_token / (self.peak * trainer.world_size)
            share = (_wait_seconds(module) - self.waited) / seconds
            rates = (rate, 1000 * seconds / (module.global_step - self.first_step), mfu, share)
        if self._due(module):
            self._write(module, *rates)
        self._open_window(module)

    def _open_seconds(self) -> float:
        """Return the seconds since the window began, without those of periodic callbacks."""
        if self.progress is None:
            return 0.0
        return time.perf_counter() - self.start - (self.progress.paused_seconds - self.paused)

    def _due(self, module) -> bool:
        step = module.global_step
        return step > 0 and (step % self.log_every == 0 or step == module.context.total_steps)

    def _write(
        self, module, tok_per_s: float | None, ms_per_step: float | None, mfu: float | None, data_wait: float | None
    ) -> None:
        module.row.update(tok_per_s=tok_per_s, ms_per_step=ms_per_step, mfu=mfu, data_wait=data_wait)
        module.row.update(tokens=module.progress.tokens)
        module.row.update(flops=float(module.progress.tokens * module.flops_per_token), seconds=self.train_seconds)

    def on_train_end(self, trainer, module) -> None:
        if not trainer.is_global_zero:
            return
        waited = _wait_seconds(module)
        share = waited / max(self.train_seconds - self.seconds_before, 1e-9)
        print(f"waited {waited:.2f} s for data, {share:.2%} of the time", flush=True)

    def state_dict(self) -> dict:
        """Return the seconds of training, those since the last row included."""
        return {"train_seconds": self.train_seconds + self._open_seconds()}

    def load_state_dict(self, state: dict) -> None:
        self.train_seconds = state["train_seconds"]


def _wait_seconds(module) -> float:
    """Return the seconds that this process has waited for data since training began or went on."""
    return getattr(module.trainer.datamodule.loader, "wait_seconds", 0.0)
