"""The page of `--help`: groups with their options, main keys, and how to see all keys."""

from dataclasses import Field
from typing import Any

from llm.cli.options import CONF, config_groups, group_options
from llm.config.schema import known_keys
from llm.utils.source import command

EXAMPLES = {
    "train": [
        "experiment=demo stage=tokenizer",
        "-m experiment=demo stage=tokenizer,pretrain,midtrain,sft,grpo",
        "-m experiment=demo stage=pretrain model=d2,d4",
    ],
    "evaluate": [
        "run=demo stage=sft eval=[bpb,chat,samples] eval.max_per_task=100",
        "run=demo stage=pretrain eval=lm_eval eval.tasks=[arc_easy,hellaswag]",
        "model=hf:openai-community/gpt2 eval=[core] eval.bundle=eval_bundle.zip",
    ],
    "export": ["run=demo to=hf", "run=demo to=gguf dtype=bf16", "run=demo licence=mit push=me/my-model"],
    "serve": ["run=demo", "run=demo ui=cli", 'run=demo prompt="Hi!"'],
}
PURPOSE = {
    "train": "Train one phase, or several as a sweep (-m).",
    "evaluate": "Measure a finished stage, or a model of Hugging Face; prints a table and writes eval.json.",
    "export": "Write a finished stage for transformers or llama.cpp, and push it to the Hugging Face hub.",
    "serve": "Chat with a finished stage.",
}


def help_text(config_name: str, *, every_key: bool = False) -> str:
    """Return the help page of an entry point; `every_key` lists the keys of all groups, not only the main ones."""
    call = command(config_name)
    lines = [PURPOSE[config_name], "", "Usage: settings are key=value; a group takes the name of an option.", ""]
    lines += [f"    {call} {line}" for line in EXAMPLES[config_name]]
    lines += ["", f"Groups (files in {CONF.name}/<group>/; * = default):", ""]
    fields = known_keys(config_name)
    for group, default in config_groups(config_name).items():
        chosen = default if isinstance(default, list) else [default]
        options = [f"{name}*" if name in chosen else name for name in group_options(group)]
        lines.append(f"    {group:<11} {_shorten(options)}")
    lines += ["", "Keys:" if every_key else "Main keys:", ""]
    shown = {name: f for name, f in fields.items() if _is_leaf(f) and (every_key or f.metadata.get("main"))}
    shown = {name: f for name, f in shown.items() if not f.metadata.get("fixed")}
    width = max(map(len, shown))
    lines += [f"    {name:<{width}}  {_describe(f)}" for name, f in sorted(shown.items(), key=_top_level_first)]
    more = {"--help all": "every key", "<settings> --cfg job": "the composed configuration, without running it"}
    if config_name == "train":
        more["<settings> dry_run=true"] = "the derived numbers too"
    more_files = {"conf/local/default.yaml": "your own defaults on this machine, weaker than experiments"}
    lines += ["", "More:", ""]
    lines += [f"    {call} {settings:<24}{text}" for settings, text in more.items()]
    lines += [f"    {file:<{len(call) + 25}}{text}" for file, text in more_files.items()]
    return "\n".join(lines)


def _is_leaf(spec: Field) -> bool:
    """Return whether the field holds a value and not a section of further keys."""
    kinds = (spec.type, *getattr(spec.type, "__args__", ()))
    return not any(hasattr(kind, "__dataclass_fields__") for kind in kinds)


def _describe(spec: Field) -> str:
    choices = spec.metadata.get("choices")
    return spec.metadata["help"] + (f" ({', '.join(choices)})" if choices else "")


def _top_level_first(item: tuple[str, Any]) -> tuple[bool, str]:
    return "." in item[0], item[0].split(".")[0]


def _shorten(options: list[str]) -> str:
    """Join option names for one line: of more than twelve only the first two and the last, as in d1 d2 ... d64."""
    default = [name for name in options if name.endswith("*")]
    if len(options) <= 12:
        return " ".join(options)
    return f"{options[0]} {options[1]} ... {options[-1]}" + (f" ({default[0]})" if default else "")
