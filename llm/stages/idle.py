"""Settings that a command gives beside others that leave them without effect: refused, and not half honoured."""

from collections.abc import Callable
from typing import Any

from llm.config.check import shown
from llm.config.said import names_key
from llm.errors import UserError

# dpo alone has stage.beta; other stages may have further keys of its names.
# (keys, what leaves them unread, whether the configuration has that)
IDLE: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (
        ("arch.ngram_rows", "arch.ngram_into", "optim.ngram_lr", "optim.ngram_betas", "optim.ngram_decay"),
        "arch.ngrams=[]",
        lambda c: not c.arch.get("ngrams"),
    ),
    (("optim.copy_lr",), "arch.copy_candidate=false", lambda c: not c.arch.get("copy_candidate")),
    (
        ("arch.gate_range", "optim.value_lr", "optim.value_betas", "optim.value_decay"),
        "arch.value_embeds=false",
        lambda c: not c.arch.get("value_embeds"),
    ),
    (
        ("arch.gate_channels",),
        "arch.value_embeds=false and arch.attention_gate=false",
        lambda c: not _any(c, "value_embeds", "attention_gate"),
    ),
    (
        ("arch.gate_init",),
        "arch.value_embeds=false and arch.smear=false",
        lambda c: not _any(c, "value_embeds", "smear"),
    ),
    (
        ("arch.x0_init", "arch.resid_init", "optim.x0_lr", "optim.x0_betas"),
        "arch.residual_scalars=false",
        lambda c: not c.arch.get("residual_scalars"),
    ),
    (
        ("optim.smear_lr",),
        "arch.smear, arch.backout and arch.exclusive_attention off",
        lambda c: not _any(c, "smear", "backout", "exclusive_attention"),
    ),
    (("arch.softcap",), "arch.asymmetric_cap=true", lambda c: bool(c.arch.get("asymmetric_cap"))),
    (
        ("arch.window_divisor", "arch.window_multiple"),
        "arch.window_pattern=L",
        lambda c: set(c.arch.get("window_pattern") or "S") == {"L"} and c.stage.get("window_ramp") is None,
    ),
    (("stage.warmdown_power",), "stage.warmdown_ratio=0", lambda c: c.stage.get("warmdown_ratio") == 0),
    (("optim.momentum_overlap",), "optim.momentum_final=null", lambda c: c.optim.get("momentum_final") is None),
    (
        ("optim.weight_decay", "optim.cautious", "optim.coupled_decay", "optim.decay_schedule"),
        "optim.hyperball=true",
        lambda c: bool(c.optim.get("hyperball")),
    ),
    (
        ("optim.orthogonalizer", "optim.ns_steps", "optim.norm_margin", "optim.row_normalize", "optim.renormalize")
        + ("optim.normuon_beta2", "optim.cautious", "optim.coupled_decay"),
        "optim.dion_rank",
        lambda c: c.optim.get("dion_rank") is not None,
    ),
    (("stage.gamma",), "a stage.loss other than simpo", lambda c: "beta" in c.stage and c.stage.loss != "simpo"),
    (("stage.odds_weight",), "a stage.loss other than orpo", lambda c: "beta" in c.stage and c.stage.loss != "orpo"),
    (
        ("stage.desirable_weight", "stage.undesirable_weight"),
        "a stage.loss other than kto",
        lambda c: "beta" in c.stage and c.stage.loss != "kto",
    ),
    (
        ("stage.label_smoothing",),
        "a stage.loss other than dpo and simpo",
        lambda c: c.stage.get("loss") in ("ipo", "orpo", "kto"),
    ),
    (("data.size", "data.seed"), "text that is not generated", lambda c: c.data.get("name") != "embedded"),
    (("stage.curriculum",), "stage.source=data", lambda c: c.stage.get("source") == "data"),
)


def _any(cfg: Any, *names: str) -> bool:
    """Return whether one of these switches of the architecture is on."""
    return any(cfg.arch.get(name) for name in names)


def check_idle(cfg) -> None:
    """Raise UserError for a key that the command names, and that another setting leaves without a reader."""
    of_optim = tuple(f"optim.{name}" for name in cfg.optim)
    adapter = (of_optim, "model.lora.rank, whose rate is model.lora.lr", lambda c: c.model.lora.rank is not None)
    for keys, why, is_so in (*IDLE, adapter):
        for key in keys:
            group, _, name = key.partition(".")
            if names_key(cfg, key) and name in cfg[group] and cfg[group][name] is not None and is_so(cfg):
                raise UserError(f"{key}={shown(cfg[group][name])}: nothing reads it with {why}; leave it out")
