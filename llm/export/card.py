"""The model card, README.md of an exported folder: what it is, how to load it, its numbers, data, cost and licence."""

from pathlib import Path

from llm import __version__
from llm.checkpoint.hf_config import has_program
from llm.config.stages import row_or_stranger
from llm.model.config import num_params
from llm.model.gpt import GPT
from llm.report.report import read_stages
from llm.report.results import results_table
from llm.run.cost import cost, device_hours
from llm.utils.addresses import without_secrets
from llm.utils.format import in_markdown, markdown_table

TAG = "fathom"  # in the head of every card
NUMBERS = (
    "Measured by Fathom on held-out data. ± is one standard error, brackets are a 95 % interval, and - means not "
    "measured. Other harnesses prompt otherwise, so their numbers differ."
)


def model_card(stage: Path, net: GPT, to: str, licence: str | None) -> str:
    """Return the card of the model of a finished stage folder. licence: an SPDX identifier, or None = not stated."""
    c, trail = net.config, trail_of(stage)
    head = {"license": licence, "library_name": "transformers" if to == "hf" else "gguf"}
    head |= {"pipeline_tag": "text-generation"}
    front = [
        "---",
        *(f"{key}: {text}" for key, text in head.items() if text),
        "tags:",
        f"- {TAG}",
        f"- {c.arch}",
        "---",
    ]
    parts = [
        "\n".join(front),
        f"# {in_markdown(stage.parent.name)}/{in_markdown(stage.name)}",
        f"A language model of {num_params(c)['total']:,} parameters (`arch={c.arch}`, {c.n_layer} layers, {c.n_embd} "
        f"wide, context {c.seq_len:,}, vocabulary {c.vocab_size:,}), trained and exported by Fathom {__version__}.",
        "## Use",
        usage(has_program(c), to),
        "## Results",
        results_table({name: facts for name, facts in trail.items() if row_or_stranger(name).makes_model}),
        NUMBERS,
        "## Training, data and cost",
        training(trail),
        "## Licence",
        licence or "Not stated. The licences of the training data may limit what the model can be used for.",
    ]
    return without_secrets("\n\n".join(parts)) + "\n"


def trail_of(stage: Path) -> dict[str, dict]:
    """Return the stages of the run that led to a stage by their parents, itself last, as `read_stages` gives them."""
    stages, _ = read_stages(stage.parent)
    names, name = [], stage.name
    while name in stages and name not in names:
        names.insert(0, name)
        before = Path(stages[name].get("parent") or "").parent  # without /model
        name = before.name if before.parent.name == stage.parent.name else ""
    return {name: stages[name] for name in names}


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
