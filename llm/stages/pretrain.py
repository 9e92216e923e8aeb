"""Pretraining: next-token prediction on documents, packed into rows that begin with BOS."""

from pathlib import Path

from llm.data.documents import document_source, texts
from llm.data.loader import TextSteps, validation_batches
from llm.evaluation import text_prompts
from llm.gpt import GPT
from llm.scaling import model_config, pretrain_steps
from llm.stages.build import (
    BuiltStage,
    evaluates,
    learning_rates,
    model_facts,
    step_context,
    steps_layout,
)
from llm.stages.step import StepData, StepModule
from llm.tokenizer import Tokenizer


def build(cfg, parent: Path) -> BuiltStage:
    """A fresh network on the tokenizer of `parent`."""
    layout = steps_layout(cfg)
    tokenizer = Tokenizer.load(parent)
    config = model_config(cfg.model, cfg.arch, tokenizer.vocab_size)
    total = cfg.max_steps or pretrain_steps(config, cfg.batch.total, cfg.stage.ratio, cfg.stage.target_flops)
    source = document_source(cfg.data)
    net = GPT(config).init_weights(cfg.seed)

    def loader(split: str, position=None) -> TextSteps:
        return TextSteps(source, tokenizer, split=split, buffer=cfg.stage.buffer, state=position, **layout)

    context = step_context(
        cfg,
        tokenizer,
        total,
        val_batches=validation_batches(loader("val"), cfg.stage.eval_tokens) if evaluates(cfg) else [],
        prompts=text_prompts(texts(source, "val")),
    )
    derived = model_facts(config, cfg, total, cfg.batch.total, layout["micro_per_step"]) | learning_rates(net, cfg)
    module = StepModule(net, cfg.optim, cfg.stage, context)
    return BuiltStage(module, StepData(lambda position: loader("train", position)), derived)
