"""Drift: what a stage behind finetuning costs elsewhere. Its parent's values are those before the first step."""

from omegaconf import OmegaConf

from llm.config.stages import stage_row
from llm.data.loader import ConversationSteps, StepLayout, TextSteps, validation_batches
from llm.data.sources import build_source, is_remote, read_with
from llm.errors import UserError
from llm.eval.samples import questions
from llm.parallel import collectives
from llm.stages.common import task_cache
from llm.stages.plan import evaluates, held_out_tokens
from tasks.registry import held_out_mixture, held_out_weights


def drift_context(cfg, tokenizer, chat_tasks: dict) -> dict:
    """Return fields of `StageContext` by which drift is measured: held-out conversations and text, and tasks.

    `bpb` is that of the mixture that the stage's row names, as the parent's validation gives it; `bpb_text` that of
    held-out text, which is not fetched for it. What cannot be read is told in a line and not measured.
    """
    more: dict = {"eval_tasks": chat_tasks}
    measured = evaluates(cfg)
    name = stage_row(cfg.stage.name).mixture_key
    try:
        if any(held_out_weights(cfg.data, name).values()):
            held_out = held_out_mixture(cfg.data, name, cfg.seed, task_cache(cfg))
            more["prompts"] = questions(held_out)
            if measured:
                steps = ConversationSteps(held_out, tokenizer, _layout(cfg), seed=cfg.seed, loop=False)
                more["val_batches"] = _batches(cfg, steps)
    except UserError as error:
        _say(f"bpb is not measured: {error}")
    if measured and not is_remote(cfg.data):
        try:
            data = OmegaConf.merge(cfg.data, {"near_duplicates": None})  # of the training text, which is not read
            source = read_with(build_source(data, cfg.paths.data), tokenizer)
            more["text_batches"] = _batches(cfg, TextSteps(source, tokenizer, _layout(cfg), split="val"))
        except UserError as error:
            _say(f"bpb_text is not measured: {error}")
    return more


def _layout(cfg) -> StepLayout:
    return StepLayout(cfg.model.seq_len, cfg.batch.micro_batch_size)


def _batches(cfg, steps) -> list[dict]:
    return validation_batches(steps, held_out_tokens(cfg), collectives.rank(), collectives.world_size())


def _say(text: str) -> None:
    if collectives.is_main():
        print(text, flush=True)
