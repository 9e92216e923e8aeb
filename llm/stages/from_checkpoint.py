"""Reading of resume checkpoints by hand: configuration, tokenizer and network of the module that saved one."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from llm.checkpoint.model_folder import read_config
from llm.checkpoint.resume import load_checkpoint
from llm.config.renamed import renamed_config
from llm.errors import UserError
from llm.model.gpt import GPT, build_network
from llm.run.config_diff import rules_before
from llm.scaling.rules import model_config
from llm.stages.plan import holds_weights
from llm.tokenizer.bpe import Tokenizer


class SavedModule(NamedTuple):
    """Configuration, tokenizer, step, `hparams` and a network with the saved weights."""

    cfg: DictConfig
    tokenizer: Tokenizer
    step: int
    hparams: dict
    net: GPT


def saved_module(path: str | Path) -> SavedModule:
    """Read a checkpoint of a stage. Raises UserError for one of an adapter, or that a Trainer by hand has saved."""
    saved: dict[str, Any] = load_checkpoint(Path(path))
    origin, weights = saved["fathom"]["origin"], saved["state_dict"]
    if not origin:
        raise UserError(f"{path}: saved by hand, it knows no configuration; give net, optim, stage and context")
    cfg = OmegaConf.create(renamed_config(origin["config"]), flags={"allow_objects": False})
    for key, value in rules_before(origin["config"]).items():
        OmegaConf.update(cfg, key, value)
    if (cfg.model.get("lora") or {}).get("rank"):
        raise UserError(f"{path}: holds an adapter without its base; load {Path(path).parents[1] / 'model'}")
    parent = Path(origin["parent"])
    tokenizer = Tokenizer.load(parent)
    config = model_config(cfg.model, cfg.arch, tokenizer.vocab_size)
    if holds_weights(parent):  # by the rule of `shape_from`, whose checks older configurations lack keys for
        found = read_config(parent)
        longer = found.seq_len if config.seq_len > found.seq_len else None
        config = replace(config, rope_original=found.rope_original or longer)
    net = build_network(replace(config, scalar_head="net.scalar_head.weight" in weights))
    net.load_state_dict({name.removeprefix("net."): value for name, value in weights.items()})
    hparams = saved.get("hyper_parameters") or origin["config"]  # a checkpoint from before there were any
    return SavedModule(cfg, tokenizer, saved["global_step"], hparams, net)
