"""The first page of a report: what the run is, what it cost, how large the code is, and the stages of the run."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm.config.stages import row_or_stranger
from llm.run.cost import cost, device_hours
from llm.utils.format import amount, dollars, duration, markdown_table, value

CHARACTERS_PER_TOKEN = 4  # of source code, roughly
Stages = Mapping[str, Mapping[str, Any]]  # {stage: its run.json with "eval" and "rows"}


def key_figures(stages: Stages) -> str:
    """Return a table of two columns: model, data, time, cost, code and machine of a run, one line each."""
    lines = {
        "model": _model(stages),
        "data": _data(stages),
        "training": _training(stages),
        "cost": _cost(stages),
        "machine": _of_last(stages, _machine),
        "code": _of_last(stages, code_state),
        "size of the code": _of_last(stages, code_size),
    }
    return markdown_table(["", "all stages"], [[key, text] for key, text in lines.items() if text])


def stage_table(stages: Stages, run: str) -> str:
    """Return the table of stages: what each has done, how long it took, and what it cost where a price is known.

    run: name of the run, which the stages of others stand behind.
    """
    costs = {stage: cost(facts) for stage, facts in stages.items()}
    priced = any(number is not None for number in costs.values())
    header = ["stage", "status", "steps", "tokens", "FLOPs", "time", "tok/s, last", *(["dollars"] if priced else [])]
    rows = []
    for stage, facts in stages.items():
        cells = [stage, str(facts.get("status", "")), value(facts.get("steps")), amount(facts.get("tokens"))]
        cells += [amount(facts.get("flops")), duration(facts.get("seconds"))]
        cells += [amount((facts.get("metrics") or {}).get("tok_per_s"))]
        cells += [dollars(costs[stage])] if priced else []
        rows.append([*cells, _parent_name(facts.get("parent"), run)])
    return markdown_table([*header, "started from"], rows, numeric=range(2, len(header)))


def _parent_name(parent: str | None, run: str) -> str:
    """Return `pretrain` for .../<run>/pretrain/model, `demo/pretrain` for that of a run `demo`, else the path."""
    if not parent:
        return "-"
    parts = Path(parent).parts
    if len(parts) < 3 or parts[-1] != "model":
        return f"`{parent}`"
    return f"`{parts[-2]}`" if parts[-3] == run else f"`{'/'.join(parts[-3:-1])}`"


def _model(stages: Stages) -> str:
    derived = next((facts["derived"] for facts in stages.values() if (facts.get("derived") or {}).get("depth")), {})
    total = derived.get("params_total")
    parts = [f"{amount(total)} parameters" if total else ""]
    parts += [f"{name} {value(derived[key])}" for key, name in SHAPE.items() if derived.get(key) is not None]
    return ", ".join(filter(None, parts))


SHAPE = {"depth": "depth", "n_embd": "width", "seq_len": "context", "vocab_size": "vocabulary"}


def _data(stages: Stages) -> str:
    """Return what text the run was trained on, and how many tokens all its stages have seen."""
    configs = [(facts.get("config") or {}).get("data") or {} for facts in stages.values()]
    named = dict.fromkeys(
        " ".join(str(data[key]) for key in ("name", "repo", "path") if data.get(key)) for data in configs
    )
    tokens = sum(facts.get("tokens") or 0 for facts in stages.values())
    return ", ".join([*filter(None, named), *([f"{amount(tokens)} tokens in all stages"] if tokens else [])])


def _training(stages: Stages) -> str:
    seconds = sum(facts.get("seconds") or 0 for facts in stages.values())
    flops = sum(facts.get("flops") or 0 for facts in stages.values())
    unfinished = [name for name, facts in stages.items() if facts.get("status", "finished") != "finished"]
    parts = [f"{duration(seconds)} in {len(stages)} stages", f"{amount(flops)} FLOPs" if flops else ""]
    return ", ".join(filter(None, parts)) + (f"; not finished: {', '.join(unfinished)}" if unfinished else "")


def _cost(stages: Stages) -> str:
    """Return the sum over the stages, with evaluations while training; not the time of evaluate.py."""
    hours, costs = ([of(facts) for facts in stages.values()] for of in (device_hours, cost))
    spent = sum(filter(None, hours))
    used = f"{value(spent, digits=2 if spent >= 1 else 4)} device-hours" if spent else "device-hours not known"
    missing = [name for name, one in zip(stages, costs, strict=True) if one is None]
    if len(missing) == len(stages):
        return f"{used}; no price given (`device_price`)"
    prices = dict.fromkeys((facts.get("config") or {}).get("device_price") for facts in stages.values())
    prices.pop(None, None)
    rates = " and ".join(map(dollars, prices))
    without = f"; no price or duration: {', '.join(missing)}" if missing else ""
    return f"{dollars(sum(filter(None, costs)))} dollars: {used} at {rates} an hour{without}"


def _machine(facts: Mapping[str, Any]) -> str | None:
    machine = facts.get("environment")
    if not machine:
        return None
    gpus = machine.get("gpus") or []
    if gpus:
        return f"{len(gpus)} x {gpus[0]['name']}"
    return ", ".join(filter(None, [machine.get("cpu"), f"{machine.get('cpu_threads', '?')} threads, no GPU"]))


def code_state(facts: Mapping[str, Any]) -> str | None:
    """Return version, commit, branch and uncommitted changes that a stage was run with; None where none is noted."""
    commit, code = facts.get("commit"), facts.get("code")
    if not (commit or code or facts.get("version")):
        return None
    parts = [f"Fathom {facts['version']}" if facts.get("version") else ""]
    if code and code.get("branch") is None and not commit:
        return ", ".join(filter(None, [*parts, "no git"]))
    parts += [f"branch {code['branch']}" if code and code.get("branch") else ""]
    parts += [f"commit {short_commit(commit)}" if commit else ""]
    if code and code.get("changed") is not None:
        number = code["changed"]
        parts += [f"{number:,} uncommitted change{'' if number == 1 else 's'}" if number else "no uncommitted changes"]
    return ", ".join(filter(None, parts))


def short_commit(commit: str | None) -> str:
    """Return the first ten characters of a commit, with a mark such as `-dirty` behind."""
    return re.sub(r"^([0-9a-f]{10})[0-9a-f]+", r"\1", commit or "")


def code_size(facts: Mapping[str, Any]) -> str | None:
    """Return the size of the code that a stage was run with; None where none is noted."""
    code = facts.get("code") or {}
    if not code.get("characters"):
        return None
    tokens = amount(code["characters"] / CHARACTERS_PER_TOKEN)
    parts = [f"{code.get(name) or 0:,} {name}" for name in ("characters", "lines", "files")]
    parts += [f"about {tokens} tokens", f"{value(code.get('dependencies'))} dependencies"]
    return ", ".join(parts)


def _of_last(stages: Stages, of: Any) -> str:
    """Return what the last stage that makes a model, or else the last one, says; and that others say something else."""
    said = {name: text for name, facts in stages.items() if (text := of(facts))}
    if not said:
        return ""
    models = [name for name in said if row_or_stranger(name).makes_model] or list(said)
    others = [name for name, text in said.items() if text != said[models[-1]]]
    return said[models[-1]] + (f"; another for {', '.join(others)}" if others else "")
