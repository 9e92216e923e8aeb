"""Forms of the files of a run: run.json, eval.json, and the small notes. They may come from anybody.

Values that are used anywhere have a type and a range here; unknown keys pass, as a later release may write more.
"""

from pathlib import Path
from typing import Any

from llm import __version__
from llm.errors import UserError
from llm.utils.files import read_json
from llm.utils.shapes import Kind, either, listing, mapping, maybe, one_of, real, text, truth, whole

# Of run.json and of checkpoints. A release reads its own number and all lower ones. It rises when a release writes what
# the one before would misread; a new key that may be ignored does not count.
FORMAT = 1

_scalar = maybe(either(truth, text, real()))
_number = maybe(real())
_group = maybe(mapping())
_entry = maybe(mapping(others=_group))

CONFIG = mapping(
    {
        **dict.fromkeys("stage model arch optim batch precision trainer strategy paths watch estimate".split(), _group),
        "gpu": _group,
        "data": maybe(mapping({"tasks": _entry, "mixture": _entry, "sources": _entry, "eval": maybe(listing(text))})),
        "device_price": maybe(real(0)),
        "init_from": maybe(text),
        "callbacks": _group,
        "logger": _group,
        "plugins": maybe(listing(text, (0, 1000))),
        "trust": maybe(listing(text, (0, 1000))),
    }
)

_task_of_data = mapping({"type": maybe(text), "_target_": maybe(text), "source": text}, needs=("type", "source"))
# What an evaluation needs of the configuration.
EVALUATED = mapping(
    {
        "seed": whole(),
        "stage": mapping({"train_on": maybe(one_of("assistant", "all")), "prompts": maybe(listing(text))}),
        "trainer": mapping({"accelerator": text}, needs=("accelerator",)),
        "precision": mapping({"compute": one_of("auto", "fp32", "bf16", "fp16")}, needs=("compute",)),
        "data": mapping(
            {
                "name": text,
                "tasks": mapping(others=_task_of_data),
                "mixture": mapping(others=maybe(mapping(others=maybe(real(0, 1e9))))),
                "eval": listing(text),
            },
            needs=("name", "tasks", "mixture", "eval"),
        ),
    },
    needs=("seed", "stage", "data", "trainer", "precision"),
)

_counts = mapping(others=real())
_read = mapping(
    {"held_out_text": maybe(text), "read": _counts, "expected": _counts, "skipped": _counts, "unit": text}
    | {"near_duplicates": maybe(_counts)}
)
_gpu = mapping({"name": text, "memory_gb": real(0)}, needs=("name", "memory_gb"))


def _parent(value: Any, where: str) -> None:
    """Take the path of a model/ folder, and its identity or null."""
    listing(maybe(text), (2, 2))(value, where)
    text(value[0], f"{where}[0]")


CODE = ("changed", "files", "lines", "characters", "dependencies")
RUN = mapping(
    {
        "format": whole(1, FORMAT),
        "stage": text,
        "status": one_of("running", "interrupted", "finished"),
        "parent": maybe(text),
        "parent_id": maybe(text),
        "further": maybe(mapping(others=_parent)),
        "fingerprints": maybe(mapping(others=maybe(text))),
        "parents": maybe(mapping(others=maybe(mapping(others=maybe(text))))),
        "texts": maybe(listing(listing(text, (2, 2)))),
        "config": maybe(CONFIG),
        "options": maybe(mapping(others=maybe(either(text, listing(text))))),
        "commit": maybe(text),
        "environment": maybe(mapping({"gpus": maybe(listing(_gpu)), "cpu": maybe(text)})),
        "version": maybe(text),
        "started": maybe(text),
        "finished": maybe(text),
        **dict.fromkeys(("seconds", "device_seconds"), maybe(real(0))),
        "code": maybe(mapping({"branch": maybe(text)} | dict.fromkeys(CODE, maybe(whole())))),
        "steps": maybe(whole()),
        "tokens": maybe(real(0)),
        "flops": maybe(real(0)),
        "signal": maybe(whole(0, 255)),
        "horizons": maybe(listing(whole())),
        "metrics": maybe(mapping(others=_scalar)),
        "derived": maybe(
            mapping(
                {
                    **dict.fromkeys(("steps", "tokens_per_step"), whole(1)),
                    "epochs": real(0),
                    "packing": text,
                    "text_passes": _number,
                    "text_tokens": maybe(whole()),
                },
                others=_scalar,
            )
        ),
        "weights": maybe(mapping({"step": whole(), "bpb": _number})),
        "data": maybe(_read),
    }
)

_accuracy: dict[str, Kind] = {"accuracy": real(), "stderr": _number, "n": maybe(whole())}
_subjects = maybe(mapping(others=mapping(_accuracy, needs=("accuracy",))))
_task = mapping(_accuracy | {"subjects": _subjects, "baseline": maybe(real(0, 0.999))}, needs=("accuracy",))
_sample = mapping({"prompt": text, "completion": text}, needs=("prompt", "completion"))
SAMPLED = mapping({"step": whole(), "samples": listing(_sample)}, needs=("step", "samples"))  # a line of samples.jsonl
_scored = mapping(
    {"data": text, "source": text, "tokens": whole(), "rows": whole(), "fingerprint": maybe(text), "text": maybe(text)},
    needs=("data", "source"),
)
_scores: dict[str, Kind] = {
    **dict.fromkeys(("bpb", "bpb_text", "chatcore", "core"), _number),
    "chat": mapping(others=_task),
    "core_tasks": mapping(others=mapping({"accuracy": _number, "centered": _number, "stderr": _number})),
    "lm_eval": mapping(others=mapping(others=_scalar)),
    "preferences": mapping(others=real()),
    "samples": listing(_sample),
    "scored": mapping(others=_scored),
    "judges": mapping(others=mapping()),
    "model": text,
    "seq_len": whole(1),
}
SCORES = mapping(_scores | {"other_data": mapping(others=mapping(_scores))})
BEST = mapping({"step": whole(), "bpb": real()}, needs=("step", "bpb"))
ADAPTER = mapping(
    {
        **dict.fromkeys(("format_version", "rank"), whole(1, 1 << 16)),
        **dict.fromkeys(("alpha", "lr"), real(1e-12, 1e12)),
        "targets": listing(one_of("attention", "mlp", "head", "embedding", "value_embeds"), (1, 5)),
        "base": maybe(text),
    },
    needs=("format_version", "rank", "alpha", "lr", "targets", "base"),
)
EXAMPLES = mapping({"questions": listing(text, (0, 20))}, needs=("questions",))  # of model/
ROLLBACKS = mapping({"count": whole(), "left_out": mapping(others=whole())}, needs=("count", "left_out"))
CHECKSUMS = mapping(others=mapping({"bytes": whole(), "sha256": text, "saved": text, "xxh3": text}, needs=("bytes",)))
MIRRORED = mapping(others=listing(whole(), (2, 2)))  # mirror.json: bytes and time of change, by file

_factor = real(-1e6, 1e6)
# What a saved shape may be: limits far above any model, so that a wrong number fills no memory before it is noticed.
SHAPE = mapping(
    {
        "n_layer": whole(1, 10_000),
        **dict.fromkeys(("n_head", "n_kv_head"), whole(1, 1 << 16)),
        "head_dim": whole(2, 1 << 16),
        "n_embd": whole(1, 1 << 20),
        "seq_len": whole(1, 1 << 24),
        "vocab_size": whole(1, 1 << 24),
        "vocab_multiple": whole(1, 1 << 16),
        "arch": text,
        "rope_base": real(1e-6, 1e15),
        "rope_scaling": maybe(text),
        "rope_original": maybe(whole(1, 1 << 24)),
        "softcap": maybe(real(1e-6, 1e9)),
        "qk_scale": _factor,
        "window_pattern": text,
        "window_divisor": whole(1, 1 << 24),
        "window_multiple": maybe(whole(1, 1 << 24)),
        **dict.fromkeys(("value_embeds", "residual_scalars", "smear", "backout", "tied", "scalar_head"), truth),
        "ngrams": listing(whole(2, 3), (0, 2)),
        "ngram_rows": whole(1, 1 << 16),
        "ngram_into": text,
        **dict.fromkeys(("ngram_bos", "copy_bos"), maybe(whole(0, 1 << 24))),
        **dict.fromkeys(("asymmetric_cap", "key_offset", "copy_candidate"), truth),
        "qk_dim": maybe(whole(2, 1 << 16)),
        "paired_heads": maybe(text),
        "loops": whole(1, 64),
        "gate_channels": whole(1, 1 << 20),
        "gate_range": _factor,
        "bos_id": maybe(whole(0, 1 << 24)),
        "mlp_width": maybe(whole(1, 1 << 24)),
        "qk_norm": truth,
        "norm_eps": real(1e-30, 1),
        **dict.fromkeys(("resid_init", "x0_init"), listing(_factor, (2, 2))),
        **dict.fromkeys(("backout_init", "gate_init", "embedding_std", "head_std", "fc_scale"), _factor),
    },
    needs=("n_layer", "n_head", "n_kv_head", "head_dim", "n_embd", "seq_len", "vocab_size"),
)


def check_format(content: Any, where: str) -> None:
    """Raise UserError where run.json, or a checkpoint, is of a later release than this one can read."""
    found = content.get("format") if isinstance(content, dict) else None
    if isinstance(found, int) and not isinstance(found, bool) and found > FORMAT:
        raise UserError(
            f"{where}: a later release of Fathom wrote it (format {found}; this one, {__version__}, reads up to "
            f"{FORMAT}): use that release, or run the stage again under another name"
        )


def read_form(path: str | Path, form: Kind) -> dict[str, Any] | None:
    """Return the object in a JSON file of a run, checked; None if there is no file.

    Raises UserError in one line that names the file and the key.
    """
    value = read_json(Path(path))
    if value is not None:
        form(value, str(path))
    return value


def read_scores(stage_dir: str | Path) -> dict[str, Any]:
    """Return eval.json of a stage folder; {} if nothing was measured. Raises UserError for a wrong one."""
    return read_form(Path(stage_dir) / "eval.json", SCORES) or {}
