"""Every key of the configuration does something: real stages, evaluations and answers read it."""

import ast
import re
from functools import cache
from itertools import product

import pytest
from conftest import REPO, compose
from data_files import words, write
from hub_server import REPO as DATA_SET
from hub_server import Hub, point_to
from omegaconf import DictConfig

from llm.cli.compose import unwrap_names
from llm.cli.overrides import CONF
from llm.config.schema import known_keys
from llm.data.sources import build_source
from llm.errors import UserError
from llm.eval.evaluate import run_evaluation
from llm.export.run_export import run_export
from llm.serving import app
from llm.stages.run_stage import run_stage
from tasks import Cache, build_task

STAGES = ("tokenizer", "pretrain", "midtrain", "sft", "reward", "distill", "best_of_n", "dpo", "ppo", "grpo")
OWN_KEYS = {"tokenizer": (), "distill": ("max_steps=1", "stage.teacher=tiny/sft")}
ENTRY_POINTS = ("train", "evaluate", "serve", "export")


@pytest.fixture(scope="module")
def used(tmp_path_factory) -> set[str]:
    """Dotted names of all values that were asked for, by attribute, index or get, while real work was done."""
    found: set[str] = set()
    ask = DictConfig._get_impl

    def note_and_ask(self, key, *args, **kwargs):
        found.add(str(self._get_full_key(key)))
        return ask(self, key, *args, **kwargs)

    folder = tmp_path_factory.mktemp("keys")
    texts = [write(folder / "texts" / f"shard_{i}.jsonl", words(9)) for i in (0, 1)]
    work = [*stages(folder), *sources_and_tasks(folder)]
    with pytest.MonkeyPatch.context() as patch, Hub({path.name: path.read_bytes() for path in texts}) as hub:
        point_to(hub, patch, folder / "hf")
        patch.setattr(DictConfig, "_get_impl", note_and_ask)
        for do, config in work:
            do(config)
    return found


def stages(folder) -> list[tuple]:
    """All stages, what is measured of them, and an answer, each with the configuration that it is done with."""

    def train(stage, *lines):
        return run_stage, compose("train", "experiment=tiny", f"stage={stage}", f"paths.runs={folder}/runs", *lines)

    exported = compose("export", "run=tiny", "stage=sft", f"paths.runs={folder}/runs")
    unwrap_names(exported)
    measured = ("run=tiny", "eval.tokens=512", "eval.max_per_task=2", "eval.max_new_tokens=4", "eval.num_samples=2")
    return [
        *(train(stage, *OWN_KEYS.get(stage, ("max_steps=1",))) for stage in STAGES),
        train("pretrain", "run=other", "init_from=tiny/tokenizer", "optim=adamw", "arch=gpt2", "dry_run=true"),
        train("pretrain", "run=other", "init_from=tiny/tokenizer", "arch=qwen3", "dry_run=true"),
        (run_evaluation, compose("evaluate", *measured, f"paths.runs={folder}/runs")),
        (app.serve, compose("serve", "run=tiny", "prompt=Hello", "max_new_tokens=2", f"paths.runs={folder}/runs")),
        (run_export, exported),
    ]


def sources_and_tasks(folder) -> list[tuple]:
    """Text and conversations from files and from the hub."""

    def read(config):
        return build_source(config.data, str(folder / "cache")).check()

    def read_tasks(config):
        specs = {"smalltalk": config.data.tasks.smalltalk, "politeness": config.data.preferences.politeness}
        for source, name in product(("local", "hub"), specs):
            spec = specs[name]
            spec.source, spec.repo, spec.train, spec.options = source, "people/talk", "train", {}
            try:
                build_task(name, spec, "train", Cache(folder / "cache", may_fetch=False))
            except UserError:
                continue  # what is missing was asked for

    made = compose("train", "data=embedded")
    return [
        (read, compose("train", "data=local", f"data.path={folder}/texts")),
        (read, compose("train", "data=hub", f"data.repo={DATA_SET}")),
        (read, compose("train", "data=mixture", f"data.sources={{a: {{path: {folder}/texts}}}}")),
        (read_tasks, made),
    ]


def read_in_the_source(name: str) -> bool:
    """Return whether `<group>.<key>` stands in the source, for rare work; cfg.<key> at the top."""
    *parents, last = name.split(".")
    owners = {parents[-1]} if parents else {"cfg", "config"}
    return any((owner, last) in attributes() for owner in owners)


@cache
def attributes() -> set[tuple[str, str]]:
    """(a, b) of every a.b, x.a.b and x().a.b in the source."""
    found = set()
    for file in [*REPO.glob("llm/**/*.py"), *REPO.glob("callbacks/*.py"), *REPO.glob("tasks/**/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute | ast.Name):
                owner = node.value.attr if isinstance(node.value, ast.Attribute) else node.value.id
                found.add((owner, node.attr))
    return found


YAML = "\n".join(path.read_text() for path in CONF.rglob("*.yaml"))
# Read before there is a configuration, and by the processes of a training of several.
ELSEWHERE = {"plugins", "trust"}


@pytest.mark.parametrize("config_name", ENTRY_POINTS)
def test_no_key_is_dead(used, config_name):
    """A key that nothing reads is an error, even if something else of its name is read somewhere: `data.size` must not
    pass because tensors have a `.size`, nor `optim.momentum` because parameter groups have one.
    """
    dead = []
    for name in known_keys(config_name):
        pattern = re.escape(name).replace("<name>", "[^.]+")
        asked = any(re.fullmatch(pattern, one) for one in used)
        handed_on = f"{{oc.select:{name}," in YAML or f"${{{name}}}" in YAML
        if not (asked or handed_on or name in ELSEWHERE or read_in_the_source(name)):
            dead.append(name)
    assert dead == []
