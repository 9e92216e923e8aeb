"""`StepModule`: one Lightning batch is one optimizer step.

A batch is a dict `{"micro": [{"inputs", "targets", ["weights"]}, ...], "n_trained", "n_tokens", "state", ["metrics"]}`,
whose state is the loader's position or a function that returns it.
The gradient is that of the summed loss over all micro-batches divided by the number of trained tokens of the whole
step, so neither the split into micro-batches nor uneven masks change it, and a step without trained tokens is a step of
zeros. With several processes the step is that of all their batches together.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import cycle, islice

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from llm.data.loader import positions_for
from llm.errors import BadLoss
from llm.eval.metrics import BitsPerByte
from llm.model.config import flops_per_token
from llm.model.gpt import GPT
from llm.model.linear import Table
from llm.model.lora import is_trained
from llm.model.ngrams import RowTable
from llm.optim.build import build_optimizer
from llm.optim.optimizer import GroupOptimizer
from llm.optim.schedules import decay_multiplier, lr_multiplier, muon_momentum, ramp_share, warmdown_progress
from llm.parallel import collectives
from llm.parallel.strategy import FSDPStrategy, MuonStrategy
from llm.scaling.batch_ramp import BatchSchedule
from llm.stages.device import DeviceOptions, take_over
from llm.stages.from_checkpoint import saved_module
from llm.stages.loss_scaler import LossScaler
from llm.stages.ramps import short_windows, shorter_rows
from llm.stages.step_state import Budget, LossWatch, Progress, Sent, StepLog, Sums, Votes
from llm.stages.text_loss import TextLoss
from llm.stages.warm_start import take_state


@dataclass
class StageContext:
    """Facts that callbacks need to know about the stage besides the network."""

    name: str
    tokenizer: object
    token_bytes: torch.Tensor  # (V,) bytes per token, specials 0
    total_steps: int
    seq_len: int
    lr_scale: float = 1.0  # on the optimizer's rates, from lr_frac and the batch
    decay_scale: float = 1.0  # on its weight decay
    fixed_lr_scale: float | None = None  # on rates that do not follow the batch; None = lr_scale on these too
    batch: BatchSchedule | None = None  # tokens of every step, where they are planned
    loss_jump: float = math.inf  # nats above the median of the last steps that no sound training has
    val_batches: list | None = None  # [{"inputs", "targets"}] of this process; None: bits per byte are not measured
    text_batches: list | None = None  # the same of held-out text, beside conversations; None: not measured
    eval_tasks: dict = field(default_factory=dict)  # name -> tasks.base.Task
    optimizer_state: dict | None = None  # by number of the parameter, to begin with; None = fresh
    prompts: list = field(default_factory=list)  # text to continue, or chat questions
    max_minutes: float | None = None  # after which training ends, with its schedules; None = after total_steps
    config: dict = field(default_factory=dict)  # the resolved configuration, without secrets
    options: DeviceOptions | None = None  # how the network is made ready for a device; None = it is ready


# Weights in a checkpoint; beside an average of Lightning's callbacks, which is the state_dict, those being trained.
WEIGHTS = {"state_dict", "current_model_state"}
# (net, micro-batch) -> the summed loss over its units, and sums to be logged, tensors () without gradient by name.
Objective = Callable[[GPT, dict], tuple[torch.Tensor, dict[str, torch.Tensor]]]


class StepModule(L.LightningModule):
    """Trains a GPT on step batches with a learning rate and momentum that are pure functions of `global_step`.

    objective: what is minimised instead of the cross-entropy. Its loss and its sums are divided by the step's
    `n_trained` units, unless it has a method `summary(sums, n_trained)` that makes other numbers of the sums; of a
    name that ends in _max the largest is taken in place of the sum. Both are over all micro-batches of all processes.
    """

    def __init__(self, net: GPT, optim, stage, context: StageContext, objective: Objective | None = None):
        super().__init__()
        self.objective, self.sums = objective, Sums()
        self.net, self.optim_config, self.stage_config, self.context = net, optim, stage, context
        self.text_loss = TextLoss.of(stage, context.tokenizer)
        self.automatic_optimization = False
        self.strict_loading = net.lora is None  # checkpoints hold an adapter without its base
        self.flops_per_token = flops_per_token(net.config, context.seq_len)
        self.scaler = None  # set where the network computes in fp16
        self.step_log, self.progress, self.votes = StepLog(), Progress(), Votes()
        self.loss_watch, self.budget = LossWatch(context.loss_jump), Budget(context.max_minutes)
        self.planned_steps = context.total_steps
        self.checks_early = context.options is not None and context.options.early_check
        self.sent_sum: Sent | None = None  # the losses of a step, where it is checked early
        self.rate: float | None = None  # the share of the learning rates in the last step
        self.gradient_clip_val: float | None = None  # the Trainer's
        self.device_ready: torch.device | None = None
        self.made_ready: str | None = None  # how, in words
        self.origin: dict = {}  # keys of run.json that checkpoints repeat, see Job.origin
        self.has_begun = False  # the first step since this process loaded a checkpoint, if any
        self.is_updating = False  # while weights, optimizer and position are of no one step

    @property
    def row(self) -> dict[str, float | None]:
        """Values of the current step by column of metrics.csv: callbacks add theirs, `MetricsLog` writes them."""
        return self.step_log.row

    @property
    def tokens_seen(self) -> int:
        """Return the number of positions trained on so far, by all processes."""
        return self.progress.tokens

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path, *args, **parts) -> "StepModule":
        """Return a module with the weights of a checkpoint of a stage, built as its configuration says.

        With `net`, `optim`, `stage` and `context` given it is Lightning's own method.
        """
        if args or parts:
            return super().load_from_checkpoint(checkpoint_path, *args, weights_only=True, **parts)
        saved = saved_module(checkpoint_path)
        cfg, sizes = saved.cfg, torch.from_numpy(saved.tokenizer.token_bytes())
        steps = max(saved.step, cfg.max_steps or 1)
        context = StageContext(cfg.stage.name, saved.tokenizer, sizes, steps, cfg.model.seq_len)
        module = cls(saved.net, cfg.optim, cfg.stage, context)
        module.save_hyperparameters(saved.hparams)
        return module

    def configure_model(self) -> None:
        if self._trainer is not None and isinstance(self.trainer.strategy, FSDPStrategy):
            self.trainer.strategy.shard(self.net)

    def configure_callbacks(self) -> list:
        """Take from the Trainer what this module does itself, before Lightning refuses it; adds no callback."""
        self.gradient_clip_val = take_over(self.trainer)
        return []

    def setup(self, stage: str) -> None:
        if self.make_ready(self.trainer):
            print(f"device {self.device_ready}: {self.made_ready}", flush=True)

    def make_ready(self, trainer: L.Trainer) -> bool:
        """Make the network ready for a trainer's device: number format, attention kernel, compilation.

        Returns False where it is ready already.
        """
        device = trainer.strategy.root_device
        if self.context.options is None or self.device_ready == device:
            return False
        self.device_ready, is_fsdp = device, isinstance(trainer.strategy, FSDPStrategy)
        options, steps = self.context.options, self.context.total_steps
        by_block = getattr(trainer.strategy, "early_sums", False)
        self.made_ready = options.prepare(self.net, device, is_fsdp, self.context.name, steps, by_block)
        # Other strategies wait for every gradient to be made anew; Muon's, with several processes, for that of an
        # embedding, whose sum may begin early, and which is then made as without.
        keeps = isinstance(trainer.strategy, SingleDeviceStrategy), isinstance(trainer.strategy, MuonStrategy)
        for module in self.net.modules():
            if isinstance(module, Table):
                module.keeps_gradient = device.type == "cpu" and any(keeps[: 1 + isinstance(module, RowTable)])
        return True

    def on_train_start(self) -> None:
        self.budget.start()
        if self.context.optimizer_state is not None and self.global_step == 0:  # a resumed one has loaded its own
            take_state(self.trainer, self.context.optimizer_state)

    def micro_loss(self, micro: dict) -> torch.Tensor:
        """Return the summed loss of a micro-batch in nats; `weights` (B, T), if there, multiply every token's loss.

        With an objective: its loss, whose sums are added to those of the step. Else switches of the stage may make it
        another loss (`llm.stages.text_loss`).
        """
        if self.objective is not None:
            loss, sums = self.objective(self.net, micro)
            self.sums.add(sums)
            return loss
        if self.text_loss is not None:
            done = self.budget.place(self.global_step, self.planned_steps) / self.planned_steps
            return self.text_loss(self.net, micro, done, self.global_step)
        return self.net(micro["inputs"], micro["targets"], reduction="sum", token_weights=micro.get("weights"))

    def training_step(self, batch: dict, batch_idx: int) -> None:
        self.has_begun = True
        optimizer = self.optimizers()
        self.apply_schedules(optimizer.param_groups)
        own = batch.get("metrics", {})
        n_trained, n_tokens, *metrics = collectives.all_reduce_sum(
            [batch["n_trained"], batch["n_tokens"], *own.values()]
        )
        micro_batches = [shorter_rows(micro, self.ramp_share("row_ramp")) for micro in batch["micro"]]
        with short_windows(self.net, self.ramp_share("window_ramp")):
            losses = self.passes(micro_batches, (1.0 if self.scaler is None else self.scaler.scale) / max(n_trained, 1))
        nats = self.checked_sum(losses, batch, int(n_trained))
        if self.budget.used >= 1.0:  # all callbacks take this step for the last one
            self.context.total_steps, self.trainer.should_stop = self.global_step + 1, True
        if self.scaler is not None:
            self.scaler.unscale(list(self.parameters()))  # without gradients the update changes nothing
        means = (value / collectives.world_size() for value in metrics)
        numbers = dict(zip(own, means, strict=True)) | self.objective_numbers(max(n_trained, 1))  # known: no wait
        self.is_updating = True
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.step_log.add_step(nats, int(n_trained), numbers)
        self.progress.tokens += int(n_tokens)
        if self.trainer.datamodule is not None:
            self.trainer.datamodule.position = batch["state"]
        self.is_updating = False
        if not self.step_log.is_written:  # a Trainer without our callbacks
            values = {"loss": nats / max(n_trained, 1), "lr": self.rate} | numbers
            self.log_dict({name: torch.tensor(value) for name, value in values.items()}, prog_bar=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, T, V) of token ids (B, T)."""
        return self.net(ids.to(self.net.device))

    def on_validation_epoch_start(self) -> None:
        self.bpb = BitsPerByte(self.context.token_bytes).to(self.device)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Add a batch {"inputs", "targets"} to the bits per byte that are logged as `bpb`."""
        self.bpb.update(self.net(batch["inputs"], batch["targets"], reduction="none"), batch["targets"])

    def on_validation_epoch_end(self) -> None:
        self.log("bpb", self.bpb.compute().float(), prog_bar=True)

    on_test_epoch_start, test_step = on_validation_epoch_start, validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        """Return the most likely next tokens (B, T) of a batch {"inputs"}."""
        return self.net(batch["inputs"]).argmax(-1)

    def objective_numbers(self, n_trained: float) -> dict[str, float]:
        """Return the numbers to be logged of what the objective has summed in a step of `n_trained` units."""
        if self.objective is None:
            return {}
        sums = self.sums.total()
        if own := getattr(self.objective, "summary", None):
            return own(sums, n_trained)
        return {name: value if name.endswith("_max") else value / n_trained for name, value in sums.items()}

    def passes(self, micro_batches: list[dict], factor: float) -> list[torch.Tensor]:
        """Run forward and backward of all micro-batches, the losses times `factor`; returns the losses."""
        ddp, losses, self.sums = self.trainer.model, [], Sums()
        early = getattr(self.optimizers(use_pl_optimizer=False), "early_sums", None)
        if isinstance(self.net, FSDPModule):
            micro_batches = pad_micro_batches(micro_batches)
        for i, micro in enumerate(micro_batches):
            loss, is_last = self.micro_loss(micro), i + 1 == len(micro_batches)
            losses.append(loss.detach())
            if is_last and self.checks_early:
                self.sent_sum = Sent(torch.stack(losses).sum())
                self.sums.send()
            if isinstance(ddp, DistributedDataParallel):
                with nullcontext() if is_last else ddp.no_sync():
                    self.manual_backward(loss * factor)
            else:
                with early.last_pass() if early and is_last else nullcontext():
                    (loss * factor).backward()
        return losses

    def checked_sum(self, losses: list[torch.Tensor], batch: dict, n_trained: int) -> float:
        """Sum the losses of all processes. Raises `BadLoss`, before the weights are touched, if the sum is bad.

        The one wait for the device in a step, by which no step can spoil the weights. It leaves the launches of the
        update uncovered, about a millisecond on a GPU; with `gpu.early_check` it ends when the last forward pass has,
        and they are made during the backward pass.
        """
        spent, sent = self.budget.spent() / collectives.world_size(), self.sent_sum
        total, self.sent_sum = torch.stack(losses).sum().item() if sent is None else sent.get().item(), None
        nats, spent, *votes = collectives.all_reduce_sum([total, spent, *self.votes.cast()])
        self.votes.count(votes)
        self.budget.used = spent / self.budget.seconds
        if not math.isfinite(nats):
            own = [i for i, loss in enumerate(losses) if not math.isfinite(loss.item())]
            documents = batch["micro"][own[0]]["inputs"].cpu() if own else None
            found = [(k, its[0]) for k, its in enumerate(collectives.all_gather_object(own)) if its]
            several = collectives.world_size() > 1
            places = [f"micro-batch {i} of process {k}" if several else f"micro-batch {i}" for k, i in found]
            where = ", ".join(places) or "in the sum of all micro-batches"
            problem = f"the training loss became {nats} in step {self.global_step + 1}, {where}"
            raise BadLoss(self.global_step + 1, problem, False, documents)
        self.loss_watch.check(nats / max(n_trained, 1), self.global_step + 1)
        return nats

    @property
    def row_is_missing(self) -> bool:
        """True if this step is still to be evaluated and logged: the first one, or the one of a killed run."""
        return self.global_step == 0 or self.global_step not in self.step_log.logged_steps

    def lr_frac(self, step: int) -> float:
        """Return the learning rate at `step` as a share of the stage's base learning rates."""
        stage = self.stage_config
        shape = (stage.warmup_steps, stage.warmdown_ratio, stage.final_lr_frac, getattr(stage, "warmdown_power", None))
        total = self.planned_steps
        return lr_multiplier(self.budget.place(step, total), total, *shape)

    def ramp_share(self, key: str) -> float:
        """Return the share that the stage's ramp `key` allows in this step; 1 where the stage has none."""
        place = self.budget.place(self.global_step, self.planned_steps)
        return ramp_share(place, self.planned_steps, getattr(self.stage_config, key, None))

    def whole_steps(self, first: int, last: int) -> float:
        """Return how many whole steps have the tokens of the steps from `first` to before `last`, with a ramp fewer."""
        batch, total = self.context.batch, self.planned_steps
        return last - first if batch is None else (batch.total(total, last) - batch.total(total, first)) / batch.tokens

    def rate_at(self, step: int) -> float:
        """Return the learning rate at `step` as such a share, with the factor of the step's batch."""
        return self.lr_frac(step) * self.batch_factors(step)[0]

    def batch_factors(self, step: int) -> tuple[float, float]:
        """Return the factors on rates and on decay of a step, for which the rules have another batch in a ramp."""
        batch, optim, place = self.context.batch, self.optim_config, (step, self.planned_steps)
        if batch is None:
            return 1.0, 1.0
        return (
            batch.lr_factor(*place) if optim.scale_lr else 1.0,
            batch.decay_factor(*place) if optim.scale_decay else 1.0,
        )

    def apply_schedules(self, groups: list[dict]) -> None:
        step, total, optim = self.global_step, self.planned_steps, self.optim_config
        place = self.budget.place(step, total)
        multiplier, (by_batch, decay_by_batch) = self.lr_frac(step), self.batch_factors(step)
        self.rate = multiplier * by_batch
        decay = decay_multiplier(optim.decay_schedule, place, total) * decay_by_batch
        warmdown = warmdown_progress(place, total, self.stage_config.warmdown_ratio)
        for group in groups:
            group["lr"] = group["initial_lr"] * (multiplier if group.get("fixed_lr") else self.rate)
            if group["decays"]:
                group["weight_decay"] = group["initial_decay"] * decay
            if "momentum" in group and "momentum_warmup" in optim:
                end = optim.momentum
                final = end if optim.momentum_final is None else optim.momentum_final
                rise = (optim.momentum_warmup, optim.momentum_start, end)
                group["momentum"] = muon_momentum(step, *rise, final, warmdown, optim.momentum_overlap)

    def configure_optimizers(self):
        if self.net.compute_dtype == torch.float16 and self.scaler is None:  # a resumed one has been loaded before
            self.scaler = LossScaler()
        kind = getattr(self.trainer.strategy, "optimizer_kind", GroupOptimizer)
        scales = (self.context.lr_scale, self.context.decay_scale)
        optimizer = build_optimizer(self.net, self.optim_config, *scales, kind, self.context.fixed_lr_scale)
        optimizer.max_norm = self.gradient_clip_val
        if getattr(self.trainer.strategy, "early_sums", False):
            optimizer.sum_early()
        return optimizer

    def transfer_batch_to_device(self, batch: dict, device: torch.device, dataloader_idx: int) -> dict:
        if "micro" not in batch:  # one to evaluate
            return {key: value.to(device) for key, value in batch.items()}
        waits = device.type != "cuda"  # elsewhere the copy may read memory that has been freed
        micro = [{k: v.to(device, non_blocking=not waits) for k, v in m.items()} for m in batch["micro"]]
        return batch | {"micro": micro}  # the loader's state stays on the host

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        for key in WEIGHTS & checkpoint.keys():
            checkpoint[key] = self.kept(checkpoint[key])
        checkpoint["fathom"] = {
            "tokens": self.progress.tokens,
            "window": self.step_log.state_dict(),
            "recent": list(self.loss_watch.recent),
            "origin": self.origin,
            "seconds": self.budget.spent(),
        }
        if self.scaler is not None:
            checkpoint["fathom"]["scaler"] = self.scaler.state_dict()

    def kept(self, weights: dict) -> dict:
        """Return the weights that a checkpoint holds: of a network with an adapter, those that are trained.

        The base is the parent, by its fingerprint in `origin`.
        """
        if self.net.lora is None:
            return weights
        return {name: weight for name, weight in weights.items() if is_trained(name.removeprefix("net."))}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        averages = self._trainer is None or any(isinstance(one, WeightAveraging) for one in self._trainer.callbacks)
        if not averages and "current_model_state" in checkpoint:  # the callback is gone, and its average with it
            checkpoint["state_dict"] = checkpoint.pop("current_model_state")
        if self.net.lora is not None and checkpoint.keys() >= WEIGHTS:  # an average is loaded whole, with its base
            checkpoint |= {key: self.state_dict() | checkpoint[key] for key in WEIGHTS}
        state = checkpoint["fathom"]
        self.progress.tokens = state["tokens"]
        self.step_log.load_state_dict(state["window"])
        self.loss_watch.recent.extend(state["recent"])
        self.budget.resume(state.get("seconds", 0.0))
        if "scaler" in state:
            self.scaler = LossScaler()
            self.scaler.load_state_dict(state["scaler"])


def pad_micro_batches(micro_batches: list[dict]) -> list[dict]:
    """Pad with all-ignored micro-batches so that every rank runs equally many passes: FSDP collectives must match."""
    inputs = micro_batches[0]["inputs"][:1]
    idle = {"inputs": inputs, "targets": torch.full_like(inputs, -1)}
    return micro_batches + [idle] * (max(collectives.all_gather_object(len(micro_batches))) - len(micro_batches))


class FirstSteps:
    """The first `n` steps of a loader, again and again; `done` steps were trained before."""

    def __init__(self, loader, n: int, done: int = 0):
        self.loader, self.n, self.done, self.steps = loader, n, done, None

    def __len__(self) -> int:
        return 10**9

    def __iter__(self):
        if self.steps is None:
            self.steps = list(islice(self.loader, self.n))
        begin, self.done = self.done % self.n, 0  # of the first epoch; Lightning takes `n` steps for one
        yield from islice(cycle(self.steps), begin, None)

    def __getattr__(self, name: str):
        return getattr(self.loader, name)


class BatchList(list):
    """Batches that are made already, which Lightning takes for a loader."""


class StepData(L.LightningDataModule):
    """Serves an iterable of step batches and keeps the loader's position behind the last *trained* batch.

    `make_loader(position)` builds the iterable, from the start if position is None. The position rides with each batch
    and is stored here only after its step, so prefetching never runs ahead of a checkpoint.
    """

    def __init__(self, make_loader):
        super().__init__()
        self.make_loader, self.position, self.loader = make_loader, None, None
        self.module: StepModule | None = None  # of the stage, for use without a Trainer
        self.left_out = 0  # steps of data at the position that are not trained on

    def val_dataloader(self):
        """Return the stage's fixed validation batches; none where it does not measure bits per byte."""
        module = self.module if self.trainer is None else self.trainer.lightning_module
        return BatchList((module and module.context.val_batches) or [])

    test_dataloader = predict_dataloader = val_dataloader

    def train_dataloader(self):
        repeated = 0 if self.trainer is None else self.trainer.overfit_batches
        self.loader = self.make_loader(None if repeated else self.position)
        if repeated:
            self.loader = FirstSteps(self.loader, repeated, self.trainer.global_step)
        if self.left_out:
            self.loader.skip(self.left_out)
        return self.loader

    def state_dict(self) -> dict:
        """Return the positions of all processes, by rank; called on all of them."""
        position = self.position() if callable(self.position) else self.position
        return {"positions": collectives.all_gather_object(position)}

    def load_state_dict(self, state: dict) -> None:
        self.position = positions_for(state["positions"], collectives.world_size())[collectives.rank()]

    def teardown(self, stage: str) -> None:
        if hasattr(self.loader, "close"):
            self.loader.close()
