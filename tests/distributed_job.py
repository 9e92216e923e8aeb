"""A process of tests/parallel/test_strategies.py: `distributed_job.py <strategy> <folder> <kinds> [<checkpoint>]`.

Trains a small network in fp64 on each kind of step, `<kind>,<kind>...`, and saves the weights and the checkpoint of
half the steps; alone on all micro-batches of a step, with others on its share of them. `lora` in a kind trains an
adapter, `averaged` hands over an average of the weights, `ngrams` has tables of n-grams and copy candidates, `switched`
has switches of the objective, `ramped` steps of two, four and six micro-batches, `looped` blocks that run twice. The
strategy muon-early is muon with `early_sums`. With a checkpoint it goes on from there.
"""

# ruff: noqa: E402  before the imports, which take seconds: a parent that is gone by then would not be missed
from llm.utils.environment import die_with_parent

die_with_parent()

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import torch
import torch.distributed as dist
from conftest import compose
from omegaconf import OmegaConf

from callbacks.average import AverageReadOut
from callbacks.checkpoint import StepCheckpoint, check_same_weights
from llm.checkpoint.resume import CheckpointWriter
from llm.errors import UserError
from llm.eval.metrics import BitsPerByte, TaskAccuracy, numbers
from llm.model.config import GPTConfig
from llm.model.gpt import GPT
from llm.model.lora import LoRA, add_adapter
from llm.objectives import PREFERENCE_LOSSES, PreferenceSettings
from llm.parallel import collectives
from llm.parallel.env import end
from llm.parallel.process_group import join
from llm.parallel.strategy import full_model, layout_of_processes, make_strategy
from llm.scaling.batch_ramp import BatchSchedule
from llm.scaling.rules import model_config
from llm.stages.best_of_n import BestObjective, BestSteps
from llm.stages.distill import DistillObjective
from llm.stages.dpo import PreferenceObjective
from llm.stages.grpo import GroupSteps, PolicyObjective, SignalWatch
from llm.stages.ppo import ActorCriticObjective
from llm.stages.reward import RewardObjective
from llm.stages.rollouts import Answer, Group, Questions, RolloutSteps, at_least_one
from llm.stages.step_module import StageContext, StepData, StepModule

STEPS, VOCAB, MICRO = 4, 301, 6
CFG = compose("train", "model=d4", "model.seq_len=64", "model.aspect_ratio=16", "model.head_dim=32", "optim.eps=1e-4")
# Even in the lengths and numbers of micro-batches.
EVEN = ("pretrain", "clipped", "sft", "lora", "ngrams", "switched", "ramped", "looped")
SWITCHED = {"sampled_softmax": 0.3, "multi_token": 0.5, "window_ramp": 0.8}  # keys of stage=pretrain
RAMP = BatchSchedule(3 * 2**19, 0.4, 3)  # so large that rates and decay follow the batch
PAIRED = ("reward", *PREFERENCE_LOSSES)


def micro_batch(kind: str, step: int, number: int) -> dict:
    """Rows of one length, all trained; with uneven masks; or of uneven lengths, with weights, or as a pair."""
    g = torch.Generator().manual_seed(1000 * step + number)
    length = 24 if kind in EVEN else 8 + int(torch.randint(0, 16, (), generator=g))
    ids = torch.randint(0, VOCAB, (2, length + 1), generator=g)
    micro = {"inputs": ids[:, :-1], "targets": ids[:, 1:].clone()}
    if kind not in ("pretrain", "clipped", "ngrams"):
        micro["targets"][torch.rand(micro["targets"].shape, generator=g) < 0.2 * number] = -1
    if kind == "grpo":
        micro["weights"] = torch.randn(2, 1, generator=g).expand(2, length).contiguous()
    if kind in PAIRED:
        micro["last"] = torch.full((2,), length - 1)
        micro["logprobs_ref"] = -6 * torch.rand(2, length, generator=g)
        micro |= (
            {"labels": torch.tensor([number % 2 == 0, True]), "baseline": torch.tensor(0.2)} if kind == "kto" else {}
        )
    if kind in ("ppo", "policy", "distill", "forward_kl", "sampled", "best_of_n") and number:  # the first is rehearsed
        micro["advantages"] = torch.randn(2, 1, generator=g).expand(2, length).contiguous()
        for name in ("returns", "values_old"):
            micro[name] = torch.randn(2, length, generator=g)
        for name in ("logprobs_old", "logprobs_engine", "logprobs_ref"):
            micro[name] = -6 * torch.rand(2, length, generator=g)
    return micro


class Steps:
    def __init__(self, kind: str, position: dict | None):
        self.kind, self.step = kind, 0 if position is None else position["step"]

    def __len__(self):
        return 10**9

    def __iter__(self):
        while True:
            end = MICRO - (self.kind not in EVEN)
            if self.kind == "ramped":
                end = MICRO * RAMP.tokens_of(self.step, STEPS) // RAMP.tokens
            numbers = range(collectives.rank(), end, collectives.world_size())
            micro = [micro_batch(self.kind, self.step, number) for number in numbers]
            trained = len(micro) if self.kind in PAIRED else sum(int((m["targets"] >= 0).sum()) for m in micro)
            self.step += 1
            yield {
                "micro": micro,
                "n_trained": trained,
                "n_tokens": sum(m["inputs"].numel() for m in micro),
                "state": {"step": self.step},
            }


def teacher() -> GPT:
    """A network of another width and depth."""
    net = GPT(GPTConfig(3, 1, 1, 32, 32, seq_len=64, vocab_size=VOCAB)).init_weights(2).double()
    with torch.no_grad():
        net.lm_head.weight.normal_(generator=torch.Generator().manual_seed(3))
    return net


POLICY = {"loss": "dapo", "correction": "token_tis", "kl": 0.05, "clip_low": None, "clip_high": None}
OBJECTIVES = {
    "reward": RewardObjective(centre=0.1),
    "ppo": ActorCriticObjective(SimpleNamespace(clip=0.2, value_clip=0.2, value_coef=0.1)),
    "policy": PolicyObjective(SimpleNamespace(**POLICY)),
    "best_of_n": BestObjective(),
    "distill": DistillObjective(teacher(), "reverse_kl"),
    "forward_kl": DistillObjective(teacher(), "forward_kl"),
    "sampled": DistillObjective(teacher(), "sampled"),
    **{name: PreferenceObjective(loss, PreferenceSettings()) for name, loss in PREFERENCE_LOSSES.items()},
}


def train(name: str, strategy: str, folder: Path, checkpoint: str | None) -> tuple[StepModule, L.Trainer]:
    kind, _, adapter = name.partition("-")
    config = replace(model_config(CFG.model, CFG.arch, VOCAB), scalar_head=kind in ("reward", "ppo"))
    if kind == "ngrams":
        config = replace(
            config, ngrams=(2, 3), ngram_rows=1, ngram_bos=VOCAB - 9, copy_candidate=True, copy_bos=VOCAB - 9
        )
    if kind == "looped":
        config = replace(config, loops=2)
    if kind == "switched":  # so that windows shorter than a row exist
        config = replace(config, window_multiple=None, qk_dim=16, paired_heads="all")
    net = GPT(config).init_weights(1).double()
    net.compute_dtype = torch.float64
    if "lora" in (kind, adapter):
        add_adapter(net, LoRA(2, targets=("attention", "mlp", "head", "embedding", "value_embeds")), seed=1)
    stage = OmegaConf.merge(CFG.stage, SWITCHED if kind == "switched" else {})
    context = StageContext(kind, None, torch.ones(VOCAB), STEPS, 64, batch=RAMP if kind == "ramped" else None)
    module = StepModule(net, CFG.optim, stage, context, OBJECTIVES.get(kind))
    trainer = L.Trainer(
        accelerator="cpu",
        **layout_of_processes(),
        strategy=make_strategy(strategy.removesuffix("-early"), strategy.endswith("-early")),
        precision="32-true",
        max_steps=STEPS,
        max_epochs=-1,
        logger=False,
        gradient_clip_val=0.05 if kind == "clipped" else None,
        use_distributed_sampler=False,
        callbacks=[*([AverageReadOut(3)] if kind == "averaged" else []), StepCheckpoint(STEPS // 2, folder / name)],
        plugins=[CheckpointWriter()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=StepData(lambda position: Steps(kind, position)), ckpt_path=checkpoint)
    return module, trainer


def measured() -> dict[str, float]:
    """Return metrics of seven items, which the processes share out; the last of many has none."""
    rights = [True, False, True, True, False, False, True]
    own = slice(collectives.rank(), None, max(collectives.world_size() - 1, 1))
    if collectives.world_size() > 1 and collectives.rank() == collectives.world_size() - 1:
        own = slice(0)
    accuracy, bits = TaskAccuracy(0.25), BitsPerByte(torch.arange(1, 8))
    accuracy.update(rights[own])
    bits.update(torch.arange(1.0, 8.0)[own], torch.arange(7)[own])
    return numbers(accuracy) | {"bpb": bits.compute().item(), "answers": answered()}


def answered() -> dict[str, dict[str, float]]:
    """Return what is logged of answers to four questions, which the processes share out, and the units of idle ones."""
    found: dict = {"units": collectives.all_reduce_sum([at_least_one(0)])}
    for kind in (GroupSteps, BestSteps):
        steps = kind.__new__(kind)
        steps.stage, steps.seconds, steps.questions = (
            SimpleNamespace(min_reward=1.0),
            {"rollout": 0.5},
            Questions([0], 0),
        )
        steps.score, steps.score_weights, steps.reward_weights = SimpleNamespace(names=["a", "b"]), torch.ones(2), None
        steps.stage.advantage, steps.signal, groups = "mean", SignalWatch("questions"), []
        for question in RolloutSteps.share(range(4)):
            length, rewards = (
                8 + 4 * question,
                torch.tensor([[0.0], [0.0]]) + (question == 1) * torch.tensor([[1.0], [3.0]]),
            )
            answers = [Answer([1] * length, [1] * length, [-1.0] * length, question > 0, length, 99)] * 2
            groups.append(Group(question, answers, rewards.repeat(1, 2), rewards[:, 0]))
        own = steps.metrics(groups, 0) if kind is GroupSteps else steps.answer_metrics(groups) | steps.chosen(groups)[1]
        del own["rollout_tok_per_s"]  # of one process
        assert all(other == own for other in collectives.all_gather_object(own))
        found[kind.__name__] = own
    return found


class Sent:
    """Counts the numbers that a ring sends for the collectives of an optimizer, in units of W / (W - 1)."""

    def __init__(self):
        self.numbers = 0
        for name, weight, source in (("all_to_all_single", 1, 1), ("all_reduce", 2, 0)):
            setattr(dist, name, self.counting(getattr(dist, name), weight, source))

    def counting(self, collective, weight: int, source: int):
        """source: which of the arguments is sent."""

        def counted(*args, **options):
            self.numbers += weight * args[source].numel()
            return collective(*args, **options)

        return counted


def notices_other_weights(module: StepModule) -> bool:
    """Return whether a bit that flips in the last process is named by all of them."""
    params = {name: p.detach().float() for name, p in module.net.named_parameters()}
    check_same_weights(params, STEPS)
    if collectives.rank() == collectives.world_size() - 1:
        params["lm_head.weight"].view(torch.int32)[3, 5] ^= 1
    try:
        check_same_weights(params, STEPS)
    except UserError as error:
        return f"process {collectives.world_size() - 1} holds other weights" in str(error) and "lm_head" in str(error)
    return False


def main() -> None:
    strategy, folder, kinds, checkpoint = (*sys.argv[1:], None)[:4]
    folder = Path(folder)
    join(on_gpu=False)
    sent = Sent()
    for kind in kinds.split(","):
        sent.numbers = 0
        module, trainer = train(kind, strategy, folder, checkpoint)
        held = sum(t.numel() for state in trainer.optimizers[0].state.values() for t in state.values())
        weights = full_model(module.net).state_dict()
        result = {"weights": weights, "held": collectives.all_gather_object(held), "tokens": module.progress.tokens}
        result["sent"] = sent.numbers / STEPS
        result["measured"] = measured()
        if collectives.world_size() > 1 and strategy != "fsdp":
            result["noticed"] = all(collectives.all_gather_object(notices_other_weights(module)))
        if collectives.is_main():
            torch.save(result, folder / f"{kind}.pt")
    collectives.barrier()
    end(0)


if __name__ == "__main__":
    main()
