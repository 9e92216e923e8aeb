"""The model card, README.md of an exported folder: what it is, how to load it, its numbers, data, cost and licence."""

import math
import os
from pathlib import Path

from llm import __version__
from llm.checkpoint.hf_config import has_program
from llm.config.stages import row_or_stranger
from llm.export.hub import NAME
from llm.model.config import num_params
from llm.model.gpt import GPT
from llm.report.report import read_stages
from llm.report.results import results_table
from llm.run.cost import cost, device_hours
from llm.run.stage_folder import MANIFEST
from llm.utils.addresses import without_secrets
from llm.utils.format import in_markdown, markdown_table

TAG = "fathom"  # in the head of every card
UNLICENSED = "Not stated. The licences of the training data may limit what the model can be used for."
NUMBERS = (
    "Measured by Fathom on held-out data. ± is one standard error, brackets are a 95 % interval, and - means not "
    "measured. Other harnesses prompt otherwise, so their numbers differ."
)


def model_card(stage: Path, net: GPT, to: str, licence: str | None) -> str:
    """Return the card of the model of a finished stage folder. licence: an SPDX identifier, or None = not stated."""
    from huggingface_hub.utils import yaml_dump

    c, trail = net.config, trail_of(stage)
    before, on_hub = started_from(next(iter(trail.values()), {}))
    head = {"license": licence, "library_name": "transformers" if to == "hf" else "gguf"}
    head |= {"pipeline_tag": "text-generation", "base_model": before if on_hub else None, "tags": [TAG, c.arch]}
    head = {key: content for key, content in head.items() if content}
    parts = [
        f"---\n{yaml_dump(head, sort_keys=False, width=math.inf)}---",
        f"# {in_markdown(stage.parent.name)}/{in_markdown(stage.name)}",
        f"A language model of {num_params(c)['total']:,} parameters (`arch={c.arch}`, {c.n_layer} layers, {c.n_embd} "
        f"wide, context {c.seq_len:,}, vocabulary {c.vocab_size:,}), trained and exported by Fathom {__version__}.",
        "## Use",
        usage(has_program(c), to),
        "## Results",
        results_table({name: facts for name, facts in trail.items() if row_or_stranger(Path(name).name).makes_model}),
        NUMBERS,
        "## Training, data and cost",
        training(trail),
        *([f"It started from {in_markdown(before)}, whose data and cost are not in the table."] if before else []),
        "## Licence",
        in_markdown(licence or UNLICENSED),
    ]
    return without_secrets("\n\n".join(parts)) + "\n"


def trail_of(stage: Path) -> dict[str, dict]:
    """Return the stages that led to a stage by their parents, itself last, as `read_stages` gives them.

    Those of other runs are named <run>/<stage>.
    """
    trail, runs, folder = {}, {}, stage
    while folder is not None:
        run = folder.parent
        name = folder.name if run.samefile(stage.parent) else f"{run.name}/{folder.name}"
        runs[run] = runs.get(run) or read_stages(run)[0]
        if name in trail or folder.name not in runs[run]:
            break
        trail = {name: runs[run][folder.name]} | trail
        folder = _stage_of(trail[name].get("parent"), stage.parent.parent)
    return trail


def _stage_of(model: str | None, root: Path) -> Path | None:
    """Return the stage folder of the model/ folder in a run.json, or of its name below `root`; None for neither."""
    if model is None:
        return None
    folder = Path(model).parent
    places = (folder, root / folder.parent.name / folder.name)
    return next((place for place in places if os.path.isfile(place / MANIFEST)), None)


def started_from(facts: dict) -> tuple[str | None, bool]:
    """Return the name of the model that a stage started from, None for none, and whether it is one of the hub."""
    parent, (kind, _, name) = facts.get("parent"), str((facts.get("config") or {}).get("init_from")).partition(":")
    if parent is None or kind not in ("hf", "nanochat"):
        return parent and "/".join(Path(parent.removesuffix("/model")).parts[-2:]), False
    on_hub = kind == "hf" and NAME.fullmatch(name) is not None and not Path(name).is_dir()
    return name if on_hub else Path(name).name, on_hub


def usage(needs_program: bool, to: str) -> str:
    """Return the section on how to load the model."""
    if to == "gguf":
        return "Load the file with llama.cpp or a program built on it. The chat template is in the file."
    trust = ", trust_remote_code=True" if needs_program else ""
    note = "\n\n`modeling_fathom.py` in this folder is the program that this runs." if needs_program else ""
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained(folder{trust})\n"
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})\n```{note}"
    )


def training(trail: dict[str, dict]) -> str:
    """Return a table of the stages: data, steps, tokens, hours of a device, dollars."""
    rows = []
    for name, facts in trail.items():
        data = (facts.get("config") or {}).get("data") or {}
        path = data.get("path")
        source = str(data.get("name", "-")) + (f" ({Path(path).name})" if isinstance(path, str) else "")
        hours, dollars = device_hours(facts), cost(facts)
        rows.append(
            [
                name,
                source,
                *(f"{facts[count]:,}" if isinstance(facts.get(count), int) else "-" for count in ("steps", "tokens")),
                "-" if hours is None else f"{hours:.2f}",
                "-" if dollars is None else f"${dollars:.2f}",
            ]
        )
    return markdown_table(["stage", "data", "steps", "tokens", "device hours", "cost"], rows, numeric=range(2, 6))
