"""Fit a pretraining plan to the amount of text: passes over it, horizon and packing."""

from collections.abc import Callable
from typing import NamedTuple

from llm.config.said import names_key
from llm.data.balance import Balance
from llm.data.packing import PACKINGS
from llm.data.text_size import passes_over
from llm.errors import UserError
from llm.parallel.launch import processes
from llm.scaling.batch_ramp import BatchSchedule
from llm.stages.begun import has_begun, is_lengthened, kept

MANY_PASSES = 10
FEW_STEPS = 100  # that stage.max_passes leaves; in 304 a d4 overfits 1.5 MB, in 152 it does not
BUFFERED, LEAST_BUFFER = 1 / 4, 16  # of a small text that waits to be packed; documents
MOST_IN_TABLES = 1 / 4  # parameters of n-gram tables per token of a text that is read more than once


class TextPlan(NamedTuple):
    """Steps and packing of a run on its text, whose size (tokens) and passes are None where they are unknown.

    passes: how often the text is read, what packing drops of it included. buffer: documents (of best_fit: pieces) that
    packing chooses from where the text is too small for `stage.buffer`; None = that many.
    """

    steps: int
    packing: str
    tokens: int | None
    passes: float | None
    buffer: int | None = None

    def facts(self) -> dict:
        """Return the values that are printed and kept in run.json, from where a resumed run takes them."""
        known = {} if self.tokens is None else {"text_tokens": self.tokens, "text_passes": self.passes}
        smaller = {} if self.buffer is None else {"buffer": self.buffer}
        return known | {"packing": self.packing} | smaller


Sample = Callable[[str], Balance | None]  # what a packing makes of some of the text; None where there is none to read


def plan_text(
    cfg, source, tokenizer, steps: int, batch: BatchSchedule, in_tables: int = 0, sample: Sample = lambda packing: None
) -> TextPlan:
    """Return the plan of a run of `steps` steps, at most `stage.max_passes` over the text unless max_steps is given.

    in_tables: parameters of the network's tables of n-grams. A run with a checkpoint keeps the plan that its run.json
    holds. Warns where the text is read very often, where cropping loses text that is read again, where the tables are
    large for such a text, and where few steps are left.
    """
    found = _begun(cfg, steps, batch) or _measured(cfg, source, tokenizer, steps, batch, sample)
    if found.tokens is not None:
        for line in warnings_of(cfg, found, in_tables) + few_steps(cfg, found, steps, batch):
            print(f"WARNING: {line}", flush=True)
    return found


def warnings_of(cfg, found: TextPlan, in_tables: int = 0) -> list[str]:
    """Return what speaks against the plan, one sentence each."""
    lines = []
    if found.passes > MANY_PASSES:
        lines.append(
            f"the run makes {found.passes:.0f} passes over its text, more than {MANY_PASSES}: the model will know it "
            "by heart. Add text, or set stage.max_passes, stage.keep_best=bpb, a smaller model or fewer max_steps"
        )
    if found.passes > 1 and found.packing == "crop":
        lines.append(
            f"packing crop drops the ends of documents, yet the run reads its text {found.passes:.1f} times: "
            "data.packing=best_fit loses nothing"
        )
    if found.passes > 1 and in_tables > MOST_IN_TABLES * found.tokens:
        lines.append(
            f"arch.ngram_rows={cfg.arch.ngram_rows}: the tables have {in_tables:,} parameters, more than a quarter of "
            f"the {found.tokens:,} tokens of text, which the run reads {found.passes:.1f} times: too many. "
            "Set a smaller number, or arch.ngrams=[]; or add text, or set fewer max_steps"
        )
    return lines


def few_steps(cfg, found: TextPlan, planned: int, batch: BatchSchedule) -> list[str]:
    """Return a sentence where stage.max_passes leaves few of the `planned` steps: with smaller ones more is learnt."""
    limit, least = cfg.stage.get("max_passes"), cfg.model.seq_len * processes(cfg)
    smaller, more = batch.tokens, found.steps
    while more < FEW_STEPS and smaller % (2 * least) == 0:
        smaller, more = smaller // 2, 2 * more
    if limit is None or found.steps == planned or cfg.max_steps is not None or more == found.steps:
        return []
    rows = cfg.batch.micro_batch_size
    also = "" if rows == "auto" or rows <= smaller // least else f" batch.micro_batch_size={smaller // least}"
    return [
        f"stage.max_passes={limit:g} leaves {found.steps} steps of {batch.tokens:,} tokens. As many "
        f"tokens in {more} steps teach more, in hardly more time: batch.tokens_per_step={smaller}{also}"
    ]


def _measured(cfg, source, tokenizer, steps: int, batch: BatchSchedule, sample: Sample) -> TextPlan:
    """Return the plan by the size of the text as it is now."""
    planned, packing = batch.total(steps), cfg.data.packing
    tokens, passes = passes_over(source, tokenizer, planned)
    if packing == "auto":
        enough = passes is None or (passes <= 1 and passes * _read_per_trained(sample("crop")) <= 1)
        packing = "crop" if enough else "best_fit"
    if passes is None:
        return TextPlan(steps, packing, tokens, None)
    passes *= _read_per_trained(sample(packing))
    limit = cfg.stage.get("max_passes")
    if limit is not None and cfg.max_steps is None and passes > limit:
        steps = max(1, batch.steps_within(round(planned * limit / passes)))
        passes = passes * batch.total(steps) / planned
    given = has_begun(cfg) or names_key(cfg, "stage.buffer")  # by an older version, which had none, or the command
    buffer = None if given else small_buffer(cfg, tokens, sample(packing))
    return TextPlan(steps, packing, tokens, passes, buffer)


def small_buffer(cfg, tokens: int, balance: Balance | None) -> int | None:
    """Return a buffer of `BUFFERED` of a text of `tokens`, None where that is no less than `stage.buffer`.

    A buffer larger than the text is filled by several passes over it, and then lends its shortest documents, several
    times, while the others wait to the end. The buffers of all processes together are such a share.
    """
    if balance is None or not balance.documents:
        return None
    pieces = tokens * (balance.documents + balance.repeated) / balance.read
    buffer = max(LEAST_BUFFER, int(BUFFERED * pieces / processes(cfg)))
    return buffer if buffer < cfg.stage.buffer else None


def _read_per_trained(balance: Balance | None) -> float:
    """Return the tokens that are read for one that is trained: packing crop drops the ends of documents."""
    return 1.0 if balance is None or not balance.trained else 1 + balance.cut / balance.trained


def _begun(cfg, planned: int, batch: BatchSchedule) -> TextPlan | None:
    """Return the plan of a run that is resumed, None where there is none to keep.

    planned: steps by the configuration, to which stage.extend=true lengthens a finished run, within stage.max_passes.
    """
    before = kept(cfg)
    if not {"packing", "steps"} <= before.keys():
        return None
    if before["packing"] not in PACKINGS:
        raise UserError(
            f"run.json: derived.packing is {before['packing'][:60]!r}, but must be one of {', '.join(PACKINGS)}"
        )
    passes = before.get("text_passes")
    per_token = None if passes is None else passes / batch.total(before["steps"])
    steps = cfg.max_steps or before["steps"]
    if cfg.max_steps is None and is_lengthened(cfg):
        steps, limit = planned, cfg.stage.get("max_passes")
        if limit is not None and per_token and per_token * batch.total(planned) > limit:
            steps = max(1, batch.steps_within(round(limit / per_token)))
    passes = None if passes is None else per_token * batch.total(steps)
    return TextPlan(steps, before["packing"], before.get("text_tokens"), passes, before.get("buffer"))


def left_out(cfg, source) -> dict:
    """Return how many near-duplicates training leaves out, and a name of their rows, for run.json; {} for none sought.

    Raises UserError where a resumed run would leave out other rows than it began with.
    """
    found = getattr(source, "near_duplicates", None)
    if found is None:
        return {}
    facts = {"near_duplicates": sum(source.left_out.values()), "near_duplicates_id": found.identity()}
    before = kept(cfg).get("near_duplicates_id")
    if before not in (None, facts["near_duplicates_id"]):
        raise UserError(
            f"{found}: other documents are near-duplicates now than when the run began, so its text or the package "
            "rensa has changed. Restore it, or start another run with run=<new name>"
        )
    return facts
