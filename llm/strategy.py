"""How several processes train one network, as strategies of Lightning's trainer.

muon    every process holds all weights and the optimizer state of its share (llm.optim_sharded); the default
ddp     Lightning's: gradients are summed during the last backward pass, every process does the whole update
"""

import os

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy, Strategy, StrategyRegistry

from llm.distributed import world_size
from llm.errors import UserError
from llm.launch import is_launched


@StrategyRegistry.register("muon", description="gradients, optimizer state and updates in shares (ZeRO-2)")
class MuonStrategy(DDPStrategy):
    """Weights are sent once, at the start. Gradients stay where they are until the optimizer sums them in its step."""

    strategy_name = "muon"

    def configure_ddp(self) -> None:
        """No wrapper, so no all-reduce during the backward pass."""
        _sync_module_states(self.model)


class SummingDDPStrategy(DDPStrategy):
    """Gradients are summed and not averaged: the losses are divided by the tokens of all processes already."""

    def __init__(self, **kwargs):
        super().__init__(broadcast_buffers=False, gradient_as_bucket_view=True, **kwargs)

    def configure_ddp(self) -> None:
        super().configure_ddp()
        self.model.register_comm_hook(None, _summed)


def _summed(_, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


def holds_all_weights(strategy: Strategy) -> bool:
    """Whether every process has the whole network."""
    return True


def layout_of_processes() -> dict[str, int]:
    """`devices` of this machine and `num_nodes`, as `lightning.Trainer` takes them."""
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if world_size() > 1 else 1
    return {"devices": here, "num_nodes": world_size() // here}


def cluster_environment() -> ClusterEnvironment:
    """Where Lightning reads this process's rank. It is told, as it would take any SLURM job for one of its own."""
    return TorchElasticEnvironment() if is_launched() else LightningEnvironment()


def make_strategy(name: str) -> str | Strategy:
    """The strategy `strategy.name` for the processes there are, as `lightning.Trainer` takes it."""
    if world_size() == 1:
        return "auto"
    if name == "single":
        raise UserError(f"strategy=single: there are {world_size()} processes; choose strategy=auto, muon or ddp")
    if name == "ddp":
        return SummingDDPStrategy()
    return MuonStrategy()
