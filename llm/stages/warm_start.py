"""Continued pretraining with the optimizer state of its parent: `stage.warm_start=true`.

The weights of a parent come from its model/ folder, which has no optimizer state. The parent's last checkpoint has it.
"""

from pathlib import Path

import torch

from llm.checkpoint.parts import differs, facts
from llm.checkpoint.resume import load_checkpoint, newest_checkpoint
from llm.errors import UserError
from llm.model.gpt import GPT
from llm.optim.build import build_optimizer
from llm.optim.optimizer import first_states
from llm.run.stage_folder import read_manifest


def parent_optimizer(parent: Path, net: GPT, optim) -> dict:
    """Return the state by number of the parameter of the optimizer that trained the model/ folder `parent`.

    Its tensors are mapped into memory. Raises UserError where the last checkpoint is gone, has another optimizer, or
    is not of the weights in model/.
    """
    stage, fix = parent.parent, "set stage.warm_start=false to begin with a fresh optimizer"
    newest = newest_checkpoint(stage / "checkpoints")
    manifest = read_manifest(stage) or {}
    steps, handed = manifest.get("steps"), (manifest.get("weights") or {}).get("step")
    if newest is None or newest[0] != steps:
        raise UserError(f"stage.warm_start=true: {stage / 'checkpoints'} has no checkpoint of the last step; {fix}")
    if handed not in (None, steps):
        raise UserError(
            f"stage.warm_start=true: {stage} handed over the weights of step {handed} (stage.keep_best), but its last "
            f"checkpoint is of step {steps}; {fix}"
        )
    saved = load_checkpoint(newest[1])
    if averaged := ((manifest.get("config") or {}).get("stage") or {}).get("average_steps"):
        averaged = f"stage.average_steps={averaged}"
    elif "current_model_state" in saved:  # what a callback of Lightning left beside its average
        averaged = "a callback of `callbacks`"
    if averaged:
        raise UserError(
            f"stage.warm_start=true: {stage} handed over an average of weights ({averaged}), which its optimizer did "
            f"not train; {fix}"
        )
    saved = saved["optimizer_states"][0]
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
    groups = torch.optim.Optimizer.state_dict(trainer.optimizers[0])["param_groups"]  # on every process, none gathers
    trainer.strategy.load_optimizer_state_dict({"optimizer_states": [{"state": state, "param_groups": groups}]})


def _words(groups: list[tuple[str, int]]) -> str:
    return ", ".join(f"{kind} of {count}" for kind, count in groups)
