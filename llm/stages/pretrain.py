"""Pretraining: next-token prediction on documents, packed into rows that begin with BOS.

`build` also continues the network of a parent that has one, on the text of `data`.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import OmegaConf

from callbacks.dropout import Dropout
from llm.data.balance import Balance, Reading
from llm.data.documents import DocumentSource, text_id, texts
from llm.data.loader import VAL_PACKING, StepLayout, TextSteps, validation_batches
from llm.data.sample import sample_balance
from llm.data.sources import document_source, is_remote
from llm.data.tokens import CachedDocuments
from llm.errors import UserError
from llm.eval.samples import text_prompts
from llm.model.config import num_params
from llm.model.gpt import GPT, Block, build_network
from llm.parallel.launch import processes
from llm.scaling.gpu_estimate import named_gpu
from llm.scaling.rules import micro_batches
from llm.stages.common import (
    BuiltStage,
    learning_rates,
    load_parent,
    load_tokenizer,
    model_facts,
    optimizer_state,
    step_context,
    steps_layout,
)
from llm.stages.ensemble import ensemble_objective
from llm.stages.micro_batch import SHARE, divisors, kept_bytes, largest_by_arithmetic
from llm.stages.plan import Plan, check_planned, evaluates, held_out_tokens, holds_weights, plan
from llm.stages.ramps import check_windows
from llm.stages.step_module import StepData, StepModule
from llm.stages.text_plan import Sample, left_out, plan_text
from llm.tokenizer.bpe import Tokenizer

BYTES_PER_TOKEN = 4  # of a text whose tokenizer is not trained yet


def build(cfg, parent: Path, tokens: int | None = None) -> BuiltStage:
    """Build the stage on the text of `data`: the parent's network goes on, or a fresh one takes the parent's tokenizer.

    The network is fresh where the parent holds no weights. tokens: see `plan`.
    """
    net, tokenizer = load_parent(parent, cfg) if holds_weights(parent) else (None, load_tokenizer(parent, cfg))
    planned = plan(cfg, tokenizer.vocab_size, tokens)
    check_planned(cfg, planned.config, planned.batch.tokens)
    text = find_text(cfg, tokenizer)  # before a network is built, also one to find the size of a micro-batch
    dropped = left_out(cfg, text.val)  # found before training waits for its first step
    layout = steps_layout(cfg, planned.config, planned.batch.tokens, planned.batch.parts)
    in_tables = num_params(planned.config).get("ngrams", 0)
    sample = packed_samples(cfg, text, tokenizer)
    fitted = plan_text(cfg, text.train, tokenizer, planned.steps, planned.batch, in_tables, sample)
    planned = planned._replace(steps=fitted.steps)
    growing = replace(layout, grows_at=planned.batch.grows_at(planned.steps))
    net = net or build_network(planned.config).init_weights(cfg.seed)
    check_dropout(cfg, net)
    check_windows(net, cfg.stage.get("window_ramp"))

    def loader(split: str, layout: StepLayout, position=None) -> TextSteps:
        reads, packing = (text.train, fitted.packing) if split == "train" else (text.val, VAL_PACKING)
        buffer = (fitted.buffer if split == "train" else None) or cfg.stage.buffer
        options = {"split": split, "packing": packing, "buffer": buffer}
        return TextSteps(reads, tokenizer, layout, position, **options)

    val_batches = None
    if evaluates(cfg) and text.val is not None:
        whole = loader("val", layout.undivided())
        val_batches = validation_batches(whole, held_out_tokens(cfg), layout.rank, layout.world)
    prompts = [] if text.val is None else text_prompts(texts(text.val, "val"))
    more = {"val_batches": val_batches, "prompts": prompts, "optimizer_state": optimizer_state(cfg, parent, net)}
    context = step_context(cfg, tokenizer, planned.steps, batch=planned.batch, **more, **planned.scales)
    module = StepModule(net, cfg.optim, cfg.stage, context, ensemble_objective(cfg, net, tokenizer))
    data, numbers = (
        StepData(lambda position: loader("train", growing, position)),
        derived(cfg, planned, net) | fitted.facts() | dropped,
    )
    dropout = [] if cfg.stage.dropout is None else [Dropout(cfg.stage.dropout, cfg.seed)]
    return BuiltStage(
        module, data, numbers, dropout, reading=reading(cfg, text, fitted.packing, sample(fitted.packing))
    )


def check_dropout(cfg, net: GPT) -> None:
    """Raise UserError where `stage.dropout` would change nothing: in blocks with a forward pass of their own."""
    if cfg.stage.dropout is not None and any(type(block).forward is not Block.forward for block in net.transformer.h):
        raise UserError(
            f"stage.dropout={cfg.stage.dropout}: the blocks of arch={net.config.arch} compute their own forward pass; "
            "set stage.dropout=null"
        )


def packed_samples(cfg, text: "Text", tokenizer: Tokenizer) -> Sample:
    """Return the function that says what a packing makes of a sample of the text; it packs it once."""

    @cache
    def sample(packing: str) -> Balance | None:
        if text.val is None:
            return None
        return sample_balance(text.val, tokenizer, cfg.model.seq_len + 1, packing, cfg.stage.buffer)

    return sample


def reading(cfg, text: "Text", packing: str, expected: Balance | None) -> Reading:
    """Return what packing makes of a sample of the text, and what was left out of the files."""
    if text.val is None:
        return Reading("documents")
    words = f"packed by {packing}, a sample"
    facts = {"seq_len": cfg.model.seq_len, "held_out_text": text_id(text.val)}
    return Reading("documents", expected, facts, [text.val], words)


class Text(NamedTuple):
    """Sources of documents to train and to validate on; both None in a dry run that must not fetch."""

    train: DocumentSource | CachedDocuments | None
    val: DocumentSource | None


class GuessedTokens:
    """Stands for a tokenizer that is not trained yet, where tokens are only counted."""

    def encode_document(self, text: str) -> range:
        """Return as many ids as a text has tokens, BOS included, at `BYTES_PER_TOKEN`."""
        return range(1 + len(text.encode("utf-8", "surrogatepass")) // BYTES_PER_TOKEN)


def find_text(cfg, tokenizer: Tokenizer) -> Text:
    """Open the sources of `data`, that of training through the cache of tokens where `data.token_cache` says so."""
    if cfg.dry_run and is_remote(cfg.data):  # numbers only: nothing is fetched
        return Text(None, None)
    source = read_text(cfg, tokenizer, cfg.dry_run)
    if not cfg.data.token_cache:
        return Text(source, source)
    folder = Path(cfg.paths.runs) / "token_cache" if cfg.data.token_cache is True else cfg.data.token_cache
    return Text(CachedDocuments(source, tokenizer, folder), source)


def read_text(cfg, tokenizer: Tokenizer | None, is_dry: bool) -> DocumentSource:
    """Open the text of `data`; near-duplicates, which take a pass over it, are not sought in a dry run (`is_dry`)."""
    sought = {"near_duplicates": None} if is_dry else {}
    return document_source(OmegaConf.merge(cfg.data, sought), cfg.paths.data, tokenizer)


def derived(cfg, planned: Plan, net: GPT) -> dict:
    """Return the numbers that are printed and saved."""
    _, batch, total, scales = planned
    micro = micro_batches(batch.tokens, cfg.batch.micro_batch_size, cfg.model.seq_len, processes(cfg))
    return model_facts(net, cfg, total, batch.tokens, micro) | learning_rates(net, cfg, **scales)


def derived_without_tokenizer(cfg) -> dict:
    """Return the numbers that follow from `model.vocab_size`, and from the size of your text where its files are here.

    There is no tokenizer: the tokens of the text are guessed from its bytes.
    """
    planned = plan(cfg, cfg.model.vocab_size)
    check_planned(cfg, planned.config, planned.batch.tokens)
    with torch.device("meta"):
        net = build_network(planned.config)
    if cfg.batch.micro_batch_size == "auto":
        choices = divisors(planned.batch.tokens // planned.batch.parts // cfg.model.seq_len // processes(cfg))
        budget, again = SHARE * named_gpu(cfg.estimate.gpu).memory_gib * 2**30, cfg.trainer.activation_checkpointing
        rows = largest_by_arithmetic(choices, planned.config, kept_bytes(net, cfg), budget, again)
        cfg.batch.micro_batch_size = rows
    facts = {}
    if cfg.data.name == "local" and not is_remote(cfg.data):
        source, guess = read_text(cfg, None, is_dry=True), GuessedTokens()
        in_tables, sample = num_params(planned.config).get("ngrams", 0), packed_samples(cfg, Text(None, source), guess)
        fitted = plan_text(cfg, source, guess, planned.steps, planned.batch, in_tables, sample)
        planned = planned._replace(steps=fitted.steps)
        facts = fitted.facts() | {"bytes_per_token": BYTES_PER_TOKEN}
    return derived(cfg, planned, net) | facts
