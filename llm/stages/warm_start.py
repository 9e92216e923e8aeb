"""Continued pretraining with the optimizer state of its parent: `stage.warm_start=true`.

The weights of a parent come from its model/ folder, which has no optimizer state. The parent's last checkpoint has it.
"""

from pathlib import Path

from llm.checkpoint.parts import differs, facts
from llm.checkpoint.resume import load_checkpoint, newest_checkpoint
from llm.errors import UserError
from llm.model.gpt import GPT
from llm.optim.build import build_optimizer
from llm.optim.optimizer import first_states
from llm.run.stage_folder import read_manifest


def parent_optimizer(parent: Path, net: GPT, optim) -> dict:
    """Return the state by number of the parameter of the optimizer that trained the model/ folder `parent`.

    Its tensors are mapped into memory. Raises UserError where the last checkpoint is gone or has another optimizer.
    """
    stage, fix = parent.parent, "set stage.warm_start=false to begin with a fresh optimizer"
    newest = newest_checkpoint(stage / "checkpoints")
    steps = (read_manifest(stage) or {}).get("steps")
    if newest is None or newest[0] != steps:
        raise UserError(f"stage.warm_start=true: {stage / 'checkpoints'} has no checkpoint of the last step; {fix}")
    saved = load_checkpoint(newest[1])["optimizer_states"][0]
    groups = build_optimizer(net, optim).param_groups
    theirs = [(group["kind"], len(group["params"])) for group in saved["param_groups"]]
    ours = [(group["kind"], len(group["params"])) for group in groups]
    if theirs != ours:
        raise UserError(
            f"stage.warm_start=true: {stage} was trained by another optimizer than optim.name={optim.name} "
            f"(groups {_words(theirs)}, here {_words(ours)}); choose its optim, or {fix}"
        )
    for place, state in enumerate(map(facts, first_states(groups))):
        found = saved["state"].get(place)  # a parameter that never had a gradient has none
        if found and (problem := differs(found, state, f"state.{place}", surplus=True)):
            raise UserError(
                f"stage.warm_start=true: {stage} was trained with other keys of optim ({problem}); take these, or {fix}"
            )
    return saved["state"]


def take_state(trainer, state: dict) -> None:
    """Give the trainer's optimizer the state `state` of every parameter; rates and betas stay those configured."""
    groups = trainer.optimizers[0].state_dict()["param_groups"]
    trainer.strategy.load_optimizer_state_dict({"optimizer_states": [{"state": state, "param_groups": groups}]})


def _words(groups: list[tuple[str, int]]) -> str:
    return ", ".join(f"{kind} of {count}" for kind, count in groups)
