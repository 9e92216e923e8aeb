"""Meeting of the processes of a training: `join` sets up torch.distributed."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from llm.errors import UserError
from llm.parallel.env import is_launched

TIMEOUT = timedelta(minutes=30)  # of a collective: rank 0 may evaluate or write while the others wait


def join(on_gpu: bool) -> None:
    """Meet the other processes, if a launcher started this one beside others. Once per process: stages share it."""
    if is_launched() and not dist.is_initialized():
        if on_gpu:
            here = int(os.environ["LOCAL_WORLD_SIZE"])
            if torch.cuda.device_count() < here:
                raise UserError(
                    f"{here} processes run on this node, and this one sees {torch.cuda.device_count()} GPUs: start one "
                    "per GPU and let each see all of them (SLURM: --gpus-per-node, not --gpus-per-task)"
                )
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
        from llm.parallel import heartbeat

        heartbeat.start()
