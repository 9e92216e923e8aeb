"""Values of the configuration: every number has bounds, and whatever is drawn composes or is one line of error."""

import math
import random
from collections.abc import Iterator
from dataclasses import Field, dataclass, fields
from typing import Any, get_args, get_origin

import pytest

from llm.cli import overrides
from llm.cli.overrides import check_overrides
from llm.config.check import MOST_PARAMETERS, structured
from llm.config.data_schema import SourceSpec
from llm.config.key import key
from llm.config.schema import VARIANTS, known_keys
from llm.config.stages import stage_row
from llm.errors import UserError
from llm.utils.registry import resolved

ENTRY_POINTS = ("train", "evaluate", "serve", "export")
BOUNDS = ("low", "above", "high", "below")


def all_keys() -> Iterator[tuple[str, str, Field]]:
    """Yield entry point, dotted key and field of every key, those of data.sources included."""
    for config_name in ENTRY_POINTS:
        for name, spec in known_keys(config_name).items():
            yield config_name, name, spec
    for spec in fields(SourceSpec):
        yield "train", f"data.sources.<name>.{spec.name}", spec


def kinds(kind: Any) -> set:
    """Return the plain types within a type: of list[int] | None these are int and NoneType."""
    inner = get_args(kind)
    return set().union(*map(kinds, inner)) if inner else {kind}


# ---------------------------------------------------------------------------------------------------------------------
# What the schemas state


def test_every_number_has_both_bounds():
    lacking = []
    for config_name, name, spec in all_keys():
        bounds = {bound for bound in BOUNDS if spec.metadata.get(bound) is not None}
        is_number = kinds(spec.type) & {int, float} or "words" in spec.metadata
        if is_number and not (bounds & {"low", "above"} and bounds & {"high", "below"}):
            lacking.append(f"{config_name}: {name}")
    assert lacking == []


def test_every_list_of_betas_has_a_length():
    found = {name: spec.metadata.get("length") for _, name, spec in all_keys() if name.endswith("betas")}
    assert len(found) == 6 and set(found.values()) == {2}


# ---------------------------------------------------------------------------------------------------------------------
# Single values


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.betas=[0.9]", "optim.betas=[0.9]: must be a list of 2 numbers"),
        ("optim.embedding_betas=[.9,.9,.9]", "must be a list of 2 numbers"),
        ("optim.value_betas=[]", "must be a list of 2 numbers"),
        ("optim.betas=[0.9,1.5]", "optim.betas.1=1.5: must be less than 1"),
        ("optim.x0_betas=[-0.1,0.5]", "optim.x0_betas.0=-0.1: must be at least 0"),
        ("stage.lr_frac=inf", "stage.lr_frac=inf: must be a finite number"),
        ("stage.lr_frac=nan", "must be a finite number"),
        ("arch.softcap=inf", "must be a finite number"),
        ("arch.qk_dim=1", "arch.qk_dim=1: must be at least 2"),
        ("arch.paired_heads=true", "arch.paired_heads=True: must be one of short, all"),
        ("arch.resid_init=[1,-inf]", "arch.resid_init.1=-inf: must be a finite number"),
        ("optim.eps=inf", "must be a finite number"),
        ("optim.ns_steps=100000000", "optim.ns_steps=100000000: must be at most 100"),
        ("seed=99999999999999999999", "seed=99999999999999999999: must be at most 9223372036854775807"),
        ("max_steps=100000000000000000000", "must be at most 1000000000"),
        ("seed=" + "9" * 400, "must be at most 9223372036854775807"),
        ("seed=" + "9" * 5000, "cannot be read"),
        ("optim.matrix_lr=" + "9" * 400, "expected a number"),
        ("optim.betas=[" + "9" * 400 + ",0]", "expected a list of numbers"),
        ("max_steps=1e20", "max_steps=1e+20: expected a whole number or null"),
        ("batch.tokens_per_step=100000000000000000000", "must be at most 1073741824"),
        ("batch.micro_batch_size=0", "batch.micro_batch_size=0: must be at least 1"),
        ("batch.micro_batch_size=true", "must be a whole number, or auto"),
        ("batch.micro_batch_size=many", "must be a whole number, or auto"),
        ("trainer.devices=1.5", "trainer.devices=1.5: must be a whole number, or auto"),
        ("compile=maybe", "compile=maybe: must be one of auto, true, false"),
        ("paths.runs=''", "paths.runs=: must be a text that is not empty"),
        ("data.mixture.sft={choice: inf}", "data.mixture.sft.choice=inf: must be a finite number"),
        ("+callbacks.mine.every=inf", "callbacks.mine.every=inf: must be a finite number"),
        ("+callbacks.mine.every=-99999999999999999999", "must be at least -9223372036854775807"),
        ("+data.tasks.choice.options.distractors=inf", "must be a finite number"),
        ("data.tasks.choice.size=99999999999", "must be at most 10000000"),
        ("model.depth=100000000", "model.depth=100000000: must be at most 1000"),
        ("model.depth=1000", "model.depth=1000 with model.aspect_ratio=64 is 64,000 wide and has about 4.9e+13"),
        ("stage.eval_every='${seed.x}'", "stage.eval_every=${seed.x}: Error trying to access seed.x"),
        ("seed='${oc.env:NOPE}'", "seed=${oc.env:NOPE}: \"Environment variable 'NOPE' not found\""),
        ("seed='${nope:1}'", "seed=${nope:1}: Unsupported interpolation type nope"),
        ("run='${run}'", "run=${run}: Recursive interpolation detected"),
        ("paths.runs='a/${paths.runs}'", "Recursive interpolation detected"),
        ("optim.betas=['${oc.env:NOPE}',0.9]", "optim.betas.0=${oc.env:NOPE}: "),
        ("optim.betas='${paths}'", "must be a list"),
        ("callbacks.bpb.every='${nothing.here}'", "callbacks.bpb.every=${nothing.here}: "),
    ],
)
def test_a_value_outside_its_bounds_is_one_line(setting, message):
    with pytest.raises(UserError) as caught:
        check_overrides("train", ["experiment=tiny", setting])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("{a: {path: x, weight: inf}}", "data.sources.a.weight=inf: must be a finite number"),
        ("{a: {path: x, weight: -1}}", "data.sources.a.weight=-1.0: must be at least 0"),
        ("{a: {path: x, wieght: 1}}", "Keys: weight, path"),
        ("{a: x}", "data.sources.a=x: "),
    ],
)
def test_sources_of_a_mixture_are_checked_with_the_command_line(sources, message):
    with pytest.raises(UserError) as caught:
        check_overrides("train", ["data=mixture", f"data.sources={sources}"])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config_name", "setting", "message"),
    [
        ("evaluate", "eval.ks=[1,0]", "eval.ks.1=0: must be at least 1"),
        ("evaluate", "eval.temperature=inf", "eval.temperature=inf: must be a finite number"),
        ("serve", "temperature=inf", "temperature=inf: must be a finite number"),
        ("serve", "max_new_tokens=99999999999", "must be at most 4194304"),
        ("serve", "host=''", "host=: must be a text that is not empty"),
        ("serve", "run='${oc.env:NOPE}'", "run=${oc.env:NOPE}: "),
    ],
)
def test_values_of_the_other_entry_points(config_name, setting, message):
    with pytest.raises(UserError) as caught:
        check_overrides(config_name, [setting])
    assert message in str(caught.value)


def test_the_largest_models_that_are_offered_pass():
    for option in ("d1", "d64"):
        check_overrides("train", [f"model={option}"])
    with pytest.raises(UserError, match="must be at most 1e"):
        check_overrides("train", ["model=d64", "model.aspect_ratio=4096"])
    assert 12 * 64 * 4096**2 < MOST_PARAMETERS


@dataclass
class Own:
    """A schema as a plugin writes it, without bounds."""

    rate: float = key("rate")
    names: list[str] = key("names")


def test_numbers_of_a_plugin_without_bounds_are_finite_and_texts_not_empty():
    good = {"rate": 1.0, "names": ["a"]}
    assert structured(good, Own, "mine") == good
    for wrong in ({"rate": math.inf}, {"names": [""]}, {"rate": "fast"}, {"more": 1}):
        with pytest.raises(UserError, match="mine"):
            structured(good | wrong, Own, "mine")


# ---------------------------------------------------------------------------------------------------------------------
# Drawn values

ODD_TEXTS = (
    *(
        "",
        " ",
        "x",
        "ä",
        "日本",
        "a b",
        "../x",
        "~",
        "'",
        '"',
        "\\",
        "\\'",
        "a=b",
        "{",
        "[1",
        "1e5",
        "null",
        "true",
        "???",
    ),
    *("${oc.env:NOPE}", "${run}", "${nope:1}", "${seed.x}", "${paths}", "${oc.decode:'['}", "${", "x" * 300),
)
ODD_NUMBERS = (
    "9" * 400,
    "-" + "9" * 400,
    "9" * 5000,
    "inf",
    "-inf",
    "nan",
    "0",
    "-1",
    "1e20",
    "-1e20",
    str(10**20),
    str(-(10**20)),
    "1e-320",
    "1e400",
    "0.5",
)
ODD_LISTS = ("[]", "[1]", "[[1]]", "[null]", "[inf]", "[x]", "[0.5,0.5,0.5]", "{}", "{a: 1}", "{a: [1]}", "null")


def numbers(spec: Field, draw: random.Random) -> list[str]:
    """Return numbers within the bounds of a key, on them and just outside, as they are written on a command line."""
    low, above, high, below = (spec.metadata.get(bound) for bound in ("low", "above", "high", "below"))
    first, last = (low if above is None else above), (high if below is None else below)
    if first is None or last is None:
        return []
    step = 1 if int in kinds(spec.type) or "words" in spec.metadata else draw.choice((1, 1e-6))
    at = [first, last, first - step, last + step, first + step, last - step, draw.uniform(first, last)]
    at.append(first + math.exp(draw.uniform(0, math.log(2 + last - first))) - 1)  # most numbers in use are small
    return [str(int(number) if step == 1 else number) for number in at]


def values(spec: Field, draw: random.Random) -> Iterator[str]:
    """Yield values for a key by its type and bounds, and others that it cannot have, in no order."""
    plain = kinds(spec.type)
    found = [*ODD_NUMBERS, *ODD_TEXTS, *ODD_LISTS]
    for _ in range(4):
        own = [*numbers(spec, draw), *map(str, spec.metadata.get("choices") or ()), *spec.metadata.get("words", ())]
        own += ["true", "false"] if bool in plain else []
        if list in map(get_origin, (spec.type, *get_args(spec.type))):
            length = spec.metadata.get("length") or draw.randint(1, 3)
            own = [f"[{','.join(draw.choices(own or ODD_TEXTS, k=length))}]" for _ in range(4)]
        found += own
    draw.shuffle(found)
    yield from found


def settings(name: str) -> list[str] | None:
    """Return the options with which a key of train.py exists; None for a group, which takes names of options."""
    group, _, rest = name.partition(".")
    owners = [option for option, schema in VARIANTS.get(group, {}).items() if rest in schema.__dataclass_fields__]
    if group in VARIANTS and not rest:
        return None
    return [f"{group}={owners[0]}"] if owners and group != "data" else []


def drawn(draw: random.Random, each: int) -> Iterator[tuple[str, list[str]]]:
    """Yield entry points and command lines in which one key has a drawn value, `each` of them for every key."""
    for config_name, name, spec in all_keys():
        options = settings(name) if config_name == "train" else []
        if options is None or spec.metadata.get("fixed"):
            continue
        lines = [*options, "data=mixture"] if name.startswith("data.sources") else options
        for value, _ in zip(values(spec, draw), range(each), strict=False):
            if name.startswith("data.sources."):
                yield config_name, [*lines, f"data.sources={{a: {{path: x, {spec.name}: {value}}}}}"]
            else:
                data = ["data=embedded"] if config_name == "evaluate" and name.startswith("data.") else []
                yield config_name, [*lines, *data, f"{name.replace('<name>', 'choice')}={value}"]


def problem(config_name: str, argv: list[str], deep: bool) -> str | None:
    """Return what is wrong with how a command line is taken: neither composed nor refused in one line; else None.

    deep: compose what is accepted as Hydra does, and derive the numbers of its stage.
    """
    try:
        check_overrides(config_name, argv)
        if deep:
            cfg = overrides.compose(config_name, argv)
            derive = stage_row(cfg.stage.name).derive if config_name == "train" else ""
            if derive:
                cfg.model.vocab_size = cfg.model.vocab_size or 512
                resolved(derive, "derive")(cfg)
    except UserError as error:
        lines = str(error).splitlines()
        return None if len(lines) == 1 and len(lines[0]) < 1000 else f"{argv}: {error}"
    except Exception as error:
        return f"{argv}: {type(error).__name__}: {error}"
    return None


def check_drawn(seed: int, each: int, share: float) -> tuple[int, list[str]]:
    """Return how many values were drawn, and all problems; `share` of the accepted ones are looked at more closely."""
    draw = random.Random(seed)
    lines = list(drawn(draw, each))
    found = [problem(config_name, argv, draw.random() < share) for config_name, argv in lines]
    return len(lines), [text for text in found if text]


def test_some_drawn_values_compose_or_are_one_line():
    draw = random.Random(1)
    lines = draw.sample(list(drawn(draw, 1)), 60)
    assert [text for config_name, argv in lines if (text := problem(config_name, argv, False))] == []


@pytest.mark.slow
def test_all_drawn_values_compose_or_are_one_line():
    seed = random.SystemRandom().randrange(10**6)
    count, problems = check_drawn(seed, each=8, share=0.05)
    print(f"{count} values drawn with seed {seed}")
    assert problems == [], f"seed {seed}"
    assert count > 2000
