"""Strategies of Lightning's trainer: the ways in which several processes train one network.

muon    every process holds all weights and the optimizer state of its share (llm.parallel.muon_zero2); the default
ddp     Lightning's: gradients are summed during the last backward pass, every process does the whole update
fsdp    FSDP2: weights, gradients and optimizer state in shares (llm.parallel.muon_fsdp); gathered to compute.
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
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from llm.model.gpt import GPT, build_network
from llm.model.lora import add_adapter
from llm.parallel.collectives import world_size
from llm.parallel.env import is_launched
from llm.parallel.launch import check_strategy
from llm.parallel.muon_fsdp import FullyShardedOptimizer
from llm.parallel.muon_zero2 import ShardedOptimizer


@StrategyRegistry.register("muon", description="gradients, optimizer state and updates in shares (ZeRO-2)")
class MuonStrategy(DDPStrategy):
    """Sends weights once, at the start, and leaves the sum of the gradients to the optimizer (ZeRO-2)."""

    strategy_name = "muon"
    optimizer_kind = ShardedOptimizer

    def __init__(self, early_sums: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.early_sums = early_sums  # whether sums begin during a step's last backward pass

    def configure_ddp(self) -> None:
        """No wrapper, so no all-reduce during the backward pass."""
        _sync_module_states(self.model)


class SummingDDPStrategy(DDPStrategy):
    """Sums gradients and does not average them: the losses are divided by the tokens of all processes already.

    DDP lays gradients out anew after its first step, unless it looks for unused parameters. The layout decides in which
    order three and more processes are summed, so a resumed training would end with other weights. Two have one order.
    """

    def __init__(self, **kwargs):
        keeps_layout = world_size() > 2  # costs about 2 % of a step of d4 with 512 tokens per process
        options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
        super().__init__(find_unused_parameters=keeps_layout, **options, **kwargs)

    def configure_ddp(self) -> None:
        super().configure_ddp()
        self.model.register_comm_hook(None, _summed)


def _summed(_, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


# Lightning's own "fsdp" is FSDP1, which neither runs on a CPU nor keeps matrices apart.
@StrategyRegistry.register("fsdp2", description="weights, gradients, optimizer state in shares (ZeRO-3)")
class FSDPStrategy(ModelParallelStrategy):
    """Cuts all weights, and gathers a block, or all else together, for its forward and backward pass.

    Gradients are summed. Checkpoints are those of the other strategies: whole tensors in one file, which rank 0 writes.
    """

    optimizer_kind = FullyShardedOptimizer
    restore_checkpoint_after_setup = Strategy.restore_checkpoint_after_setup
    lightning_restore_optimizer = Strategy.lightning_restore_optimizer
    optimizer_state = Strategy.optimizer_state
    load_optimizer_state_dict = Strategy.load_optimizer_state_dict
    save_checkpoint = Strategy.save_checkpoint
    load_checkpoint = Strategy.load_checkpoint

    def __init__(self):
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes  # "auto" is the number of machines
        super().setup_environment()

    def shard(self, net: GPT) -> None:
        """Cut the weights, which are equal on all processes, by rows."""
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))  # of the processes as they have met
        for part in (*net.transformer.h, net):
            fully_shard(part, mesh=mesh)
            part.set_gradient_divide_factor(1.0)  # the losses are divided by the tokens of all processes already
            part.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply

    def load_model_state_dict(self, checkpoint: dict, strict: bool = True) -> None:
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)

    def teardown(self) -> None:
        """Wait for the checkpoint that is being written too; Lightning's other strategies do so by themselves."""
        super().teardown()
        self.checkpoint_io.teardown()


@torch.no_grad()
def full_model(net: GPT) -> GPT:
    """Return the network, or where it is cut a copy with all weights, for use without the other processes.

    All processes call it together.
    """
    if not isinstance(net, FSDPModule):
        return net
    whole = build_network(net.config)
    if net.lora is not None:
        add_adapter(whole, net.lora)
    whole.load_state_dict({name: p.full_tensor() for name, p in net.state_dict().items()}, assign=True)
    whole.compute_dtype = net.compute_dtype
    return whole.to(net.device)


def layout_of_processes() -> dict[str, int]:
    """Return `devices` of this machine and `num_nodes`, as `lightning.Trainer` takes them."""
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if world_size() > 1 else 1
    return {"devices": here, "num_nodes": world_size() // here}


def cluster_environment() -> ClusterEnvironment:
    """Return the place where Lightning reads this process's rank; by itself it would take any SLURM job for its own."""
    return TorchElasticEnvironment() if is_launched() else LightningEnvironment()


def make_strategy(name: str, early_sums: bool = False) -> str | Strategy:
    """Build the strategy `strategy.name` for the processes there are.

    early_sums: `strategy.early_sums`. Raises UserError for single with several processes, and for sums that other
    strategies make.
    """
    if world_size() == 1:
        return "auto"
    check_strategy(name, world_size(), early_sums)
    if name in ("ddp", "fsdp"):
        return SummingDDPStrategy() if name == "ddp" else FSDPStrategy()
    return MuonStrategy(early_sums)
