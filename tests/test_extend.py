"""The recipes of docs/extend.md, taken from the page and run in a folder outside the repository, as a newcomer would.

By default the recipes of training run together, in as few processes as possible; `slow` tests run every command of the
page, and the optimizer's under each strategy.
"""

import csv
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import types
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from conftest import REPO
from omegaconf import OmegaConf
from safetensors.torch import load_file

from llm.cli.compose import compose as compose_of
from llm.cli.compose import whole_mixtures
from llm.cli.overrides import check_overrides
from llm.config.plugins import load_plugins
from llm.config.targets import check_arguments
from llm.data.sources import build_source
from llm.errors import UserError
from llm.eval.judges import judges
from llm.stages.own_parts import check_part
from llm.stages.rollout_stage import score_of
from llm.stages.train_model import builder
from llm.stages.trainer import instantiate_part

PAGE = REPO / "docs" / "extend.md"
MOST_LINES = 40
# Files of a recipe: a line with the name in backticks, then the block. Commands: a block of bash.
FILE = re.compile(r"^`([\w./]+)`\n```\w+\n(.*?)^```$", re.M | re.S)
COMMANDS = re.compile(r"^```bash\n(.*?)^```$", re.M | re.S)
RECIPES = ("task type", "optimizer", "architecture", "callback", "logger", "source of text", "judge", "reward", "stage")
TINY = ("--config-dir", ".", "experiment=tiny", "trainer=cpu")
LION = ("plugins=[lion]", "optim=lion", "stage=pretrain", "init_from=tiny/tokenizer")
TWO = ("trainer.devices=2", "batch.micro_batch_size=2")


@cache
def sections() -> dict[str, str]:
    """{title without its article: text} of the page."""
    parts = re.split(r"^## (?:An? )?", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]
    return {part.partition("\n")[0]: part for part in parts}


def files_of(title: str) -> dict[str, str]:
    """{name: content} of the files of a recipe."""
    return dict(FILE.findall(sections()[title]))


def shell(script: str, folder: Path) -> subprocess.CompletedProcess:
    """Run commands of the page in `folder`, with what its introduction exports."""
    env = os.environ | {"FATHOM": str(REPO), "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    exports = "\n".join(re.findall(r"^export .*$", PAGE.read_text(encoding="utf-8"), re.M))
    done = subprocess.run(
        ["bash", "-euc", f"{exports}\n{script}"], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def run(script: str, folder: Path, *args: str) -> str:
    return shell(f"python $FATHOM/{script} " + " ".join(f"'{arg}'" for arg in args), folder).stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with the files of all recipes, and the tokenizer of the introduction's run."""
    folder = tmp_path_factory.mktemp("newcomer")
    for title in RECIPES:
        for name, content in files_of(title).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content, encoding="utf-8")
    rows = "".join(f"Story {i} tells of {i * i} foxes.\n" for i in range(200))
    (folder / "stories.csv").write_text("story\n" + rows, encoding="utf-8")
    run("train.py", folder, *TINY, "stage=tokenizer")
    return folder


@pytest.fixture(scope="module")
def trained(home) -> Path:
    """`home` after one training that follows five recipes at once: run=all."""
    chosen = ("plugins=[lion,parallel_blocks]", "optim=lion", "arch=parallel", "data=csv")
    more = ("callbacks=weight_norm", "logger=json_lines", "stage=pretrain", "init_from=tiny/tokenizer", "run=all")
    run("train.py", home, *TINY, *chosen, *more)
    return home


# ---- the page -------------------------------------------------------------------------------------------------------


def test_every_door_has_a_short_recipe():
    assert set(RECIPES) < set(sections())
    for title in RECIPES:
        lines = sum(len(content.splitlines()) for content in files_of(title).values())
        assert 0 < lines <= MOST_LINES, f"the recipe of a {title} has {lines} lines"
        assert COMMANDS.search(sections()[title]), f"the recipe of a {title} says no command"


def test_links_and_paths_of_the_page_exist():
    page = PAGE.read_text(encoding="utf-8")
    for anchor in re.findall(r"\]\(#([\w-]+)\)", page):
        assert re.search(rf"^## {anchor.replace('-', ' ')}$", page, re.M | re.I), anchor
    own = {name for title in RECIPES for name in files_of(title)}
    for path in set(re.findall(r"`((?:llm|tasks|conf|callbacks|tests)/[\w./]+)`", page)) - own:
        assert (REPO / path).exists(), path


# ---- in this process ------------------------------------------------------------------------------------------------


@pytest.fixture
def module(home, monkeypatch):
    """module("lion"): a recipe's Python file, imported; what it registered is forgotten after the test."""
    from llm.config import registries, schema

    tables = [thing for thing in vars(registries).values() if isinstance(thing, registries.Registry)]
    for table in tables:
        monkeypatch.setattr(table, "entries", dict(table.entries))
    for group, variants in schema.VARIANTS.items():
        monkeypatch.setitem(schema.VARIANTS, group, dict(variants))
    monkeypatch.syspath_prepend(str(home))
    yield importlib.import_module
    for name in ("lion", "word_problems", "brief"):
        sys.modules.pop(name, None)
    schema._known_keys.cache_clear()


@pytest.mark.slow
def test_rows_of_a_task_type_are_checked_as_ours_are(home, module, tmp_path):
    from tasks import build_task

    spec = {"_target_": "word_problems.WordProblems", "source": "local"}
    spec |= {split: str(home / f"{split}.jsonl") for split in ("train", "test")}
    train, test = (build_task("problems", spec, split) for split in ("train", "test"))
    assert [len(train), len(test), len(build_task("problems", spec | {"limit": 1}, "train"))] == [2, 1, 1]
    assert train.rewards([train[1]] * 3, ["2 x 6 = 12", "13", "none"]) == [1.0, 0.0, 0.0]
    row = {"Body": "A", "Question": "B?", "Answer": "two"}
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"bad.jsonl row 1: 'Answer' must be int or float, found str"):
        build_task("problems", spec | {"train": str(tmp_path / "bad.jsonl")}, "train")
    with pytest.raises(UserError, match="source=embedded: WordProblems has no rows of that source"):
        build_task("problems", {"_target_": spec["_target_"], "source": "embedded"}, "train")


def tiny_matrices() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.randn(8, 5, generator=torch.Generator().manual_seed(i))) for i in range(3)]


def test_lion_is_lion(module):
    """Against the published update in float64, one number at a time, with a state that is saved and loaded between."""
    from llm.optim import GroupOptimizer

    module("lion")
    group = {"kind": "lion", "lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}
    params = tiny_matrices()
    weights, momenta = [p.detach().double() for p in params], [0.0] * 3
    optimizer = GroupOptimizer([group | {"params": params}])
    for step in range(4):
        for i, p in enumerate(params):
            p.grad = torch.randn(8, 5, generator=torch.Generator().manual_seed(10 * step + i))
            grad = p.grad.double()
            weights[i] = weights[i] - 0.01 * (torch.sign(0.9 * momenta[i] + 0.1 * grad) + 0.1 * weights[i])
            momenta[i] = 0.99 * momenta[i] + 0.01 * grad
        optimizer.step()
        state = optimizer.state_dict()
        optimizer = GroupOptimizer([group | {"params": params}])
        optimizer.load_state_dict(state)
    for p, w in zip(params, weights, strict=True):
        torch.testing.assert_close(p.detach().double(), w, atol=1e-6, rtol=0)


def test_an_optimizer_that_does_not_exist_is_an_error_and_never_muon(module):
    from conftest import compose

    from llm.model import GPT, GPTConfig
    from llm.optim import GroupOptimizer, build_optimizer

    net, optim = GPT(GPTConfig(1, 1, 1, 16, 16, 8, 300)).init_weights(0), compose("train").optim
    optim.name = "muon_adam"
    with pytest.raises(UserError, match="optim.name=muon_adam does not exist; did you mean muon_adamw"):
        build_optimizer(net, optim)
    with pytest.raises(UserError, match="kind=lyon does not exist"):
        GroupOptimizer([{"kind": "lyon", "params": tiny_matrices(), "lr": 0.1}])
    with pytest.raises(UserError, match="kind=adamw needs betas, eps"):
        GroupOptimizer([{"kind": "adamw", "params": tiny_matrices(), "lr": 0.1}])
    from llm.config.registries import OPTIMIZERS

    OPTIMIZERS.entries["half"] = lambda net, optim: [{"kind": "adamw", "params": [net.head_weight], "lr": 0.1}]
    optim.name = "half"
    with pytest.raises(UserError, match="every parameter must be in one group.*transformer.wte.weight is in 0"):
        build_optimizer(net, optim)


# ---- each door from each place --------------------------------------------------------------------------------------

PLACES = {"folder": "", "package": "my_package.", "notebook": "__main__."}
CODE = ("word_problems", "lion", "parallel_blocks", "weight_norm", "json_lines", "csv_text", "variety", "brief")


class Placed:
    """The code of all recipes in one place, and what is composed with it: the same lines wherever it lies."""

    def __init__(self, place: str, home: Path, folder: Path, patch: pytest.MonkeyPatch):
        self.prefix, self.conf = PLACES[place], folder / "conf"
        modules = {name: content for title in RECIPES for name, content in files_of(title).items()}
        for name, content in modules.items():
            path = self.conf / name if name.endswith(".yaml") else folder / self.prefix.strip(".") / name
            if not (place == "notebook" and name.endswith(".py")):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(self.moved(content), encoding="utf-8")
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        (folder / "stories.csv").write_text("story\none\ntwo\nthree\nfour\n", encoding="utf-8")
        plugins = [f"{self.prefix}{name}" for name in ("lion", "parallel_blocks", "my_stage")]
        if place == "notebook":
            notebook = types.ModuleType("__main__")
            patch.setitem(sys.modules, "__main__", notebook)
            for name in sorted(name for name in modules if name.endswith(".py")):
                cell = self.moved(modules[name])
                exec(compile(cell, f"<cell {name}>", "exec"), vars(notebook))
            plugins = ["__main__"]
        load_plugins(plugins)
        pretrain = ("optim=lion", "arch=parallel", "data=csv", "callbacks=weight_norm", "logger=json_lines")
        self.pretrain = self.composed("train", "stage=pretrain", *pretrain)
        self.anneal = self.composed("train", "stage=anneal")
        brief = f"stage.reward_options={{brief:{{_target_:{self.prefix or 'brief.'}reward,half:3}}}}"
        brief = brief.replace("my_package.reward", "my_package.brief.reward")
        self.grpo = self.composed("train", "stage=grpo", "data=problems", "stage.reward=brief", brief)
        self.evaluate = self.composed("evaluate", "run=x", "eval=[variety]")

    def moved(self, content: str) -> str:
        """Return a file of a recipe with the names of its modules as they are in this place."""
        into = "__main__." if self.prefix == "__main__." else rf"{self.prefix}\1."
        return re.sub(rf"\b({'|'.join((*CODE, 'my_stage.anneal'))})\.(?!py)(?=\w)", into, content)

    def composed(self, config_name: str, *lines: str):
        argv = ["--config-dir", str(self.conf), *(("experiment=tiny",) if config_name == "train" else ()), *lines]
        command = check_overrides(config_name, argv)
        return compose_of(config_name, whole_mixtures(config_name, command.argv, command.sources), command.sources)

    def is_home_of(self, thing: object, module: str) -> bool:
        return thing.__module__ == (self.prefix.strip(".") if self.prefix == "__main__." else self.prefix + module)


@pytest.fixture(scope="module", params=PLACES)
def placed(request, home, tmp_path_factory):
    from llm.config import registries, schema, stages

    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        for table in (thing for thing in vars(registries).values() if isinstance(thing, registries.Registry)):
            patch.setattr(table, "entries", dict(table.entries))
        for group in ("optim", "arch"):
            patch.setitem(schema.VARIANTS, group, dict(schema.VARIANTS[group]))
        patch.setattr(stages, "_TABLE", dict(stages._TABLE))
        schema._known_keys.cache_clear()
        yield Placed(request.param, home, tmp_path_factory.mktemp(request.param), patch)
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in (*CODE, "my_stage", "my_package"):
            del sys.modules[name]
    schema._known_keys.cache_clear()


def door_of_callbacks(placed, tmp_path):
    built = instantiate_part("callbacks.weight_norm", placed.pretrain.callbacks.weight_norm)
    assert placed.is_home_of(type(built), "weight_norm") and built.every == 2


def door_of_loggers(placed, tmp_path):
    built = instantiate_part("logger.json_lines", placed.pretrain.logger.json_lines, save_dir=str(tmp_path))
    assert placed.is_home_of(type(built), "json_lines") and built.path == tmp_path / "metrics.jsonl"


def door_of_tasks(placed, tmp_path):
    from tasks import build_task

    for file in ("train.jsonl", "test.jsonl"):
        Path(file).write_text(files_of("task type")[file])
    task = build_task("problems", placed.grpo.data.tasks.problems, "train")
    assert placed.is_home_of(type(task), "word_problems") and len(task) == 2


def door_of_sources(placed, tmp_path):
    source = build_source(placed.pretrain.data, "")
    assert placed.is_home_of(type(source), "csv_text") and source.check() == "2 rows train, 2 rows val"


def door_of_rewards(placed, tmp_path):
    from tasks.rewards import build_rewards

    rewards = build_rewards([], {"brief": 1.0}, placed.grpo.stage.reward_options)
    assert rewards([{}, {}], ["", "abc"]) == [[1.0], [0.5]]


def door_of_judges(placed, tmp_path):
    subject = types.SimpleNamespace(samples=lambda: {"samples": [{"completion": "a b b"}]})
    assert judges(placed.evaluate.eval)["variety"](subject) == {"judges": {"variety": {"different": 2 / 3, "words": 3}}}


def door_of_optimizers(placed, tmp_path):
    from llm.model import GPT, GPTConfig
    from llm.optim import build_optimizer

    optimizer = build_optimizer(GPT(GPTConfig(1, 1, 1, 16, 16, 8, 300)).init_weights(0), placed.pretrain.optim)
    assert {group["kind"] for group in optimizer.param_groups} == {"lion"}


def door_of_architectures(placed, tmp_path):
    from llm.config.registries import ARCHITECTURES

    entry = ARCHITECTURES.get(placed.pretrain.arch.name)
    assert placed.pretrain.arch.parallel is True
    assert placed.is_home_of(entry.network_class, "parallel_blocks")
    assert placed.is_home_of(entry.config_class, "parallel_blocks")


def door_of_stages(placed, tmp_path):
    from llm.config.stages import stage_row

    assert placed.is_home_of(builder(stage_row("anneal")), "my_stage.anneal") and placed.anneal.stage.tokens == 10**8


DOORS = [one for name, one in list(globals().items()) if name.startswith("door_of_")]


def test_every_recipe_is_a_door_of_the_tests():
    assert len(DOORS) == len(RECIPES)


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__.removeprefix("door_of_"))
def test_a_door_is_the_same_from_a_folder_a_package_and_a_notebook(placed, door, tmp_path):
    door(placed, tmp_path)


# ---- what is refused ------------------------------------------------------------------------------------------------


def of_reward(part):
    from tasks.rewards import build_rewards

    build_rewards([], {"mine": 1.0}, {"mine": part})


def of_task(part):
    from tasks.registry import task_class

    task_class(part, "data.tasks.mine")


def of_source(part):
    build_source(OmegaConf.merge(OmegaConf.create({"name": "custom", "source": part})), "")


def of_judge(part):
    judges(OmegaConf.create({"judges": {"mine": part}}))


# Key of a door, what looks at it, something that exists and does not fit, and what is said of that.
CHECKED = {
    "callbacks.mine": (partial(check_part, "callbacks.mine"), "json.JSONDecoder", "callback.Callback"),
    "logger.mine": (partial(check_part, "logger.mine"), "json.JSONDecoder", "logger.Logger"),
    "data.tasks.mine": (of_task, "json.dumps", "must be a class that extends tasks.base.Task"),
    "data.source": (of_source, "collections.Counter", "it has no check and no iterate"),
    "stage.reward_options.mine": (of_reward, "json.JSONDecoder", "must be a class that extends tasks.rewards.Reward"),
    "eval.judges.mine": (of_judge, "json.__name__", "must be a class or a function, not str"),
}


@pytest.mark.parametrize("key", CHECKED)
def test_what_is_wrong_with_a_target_is_one_line(key):
    look, unfit, said = CHECKED[key]
    for part, problem in (
        ({"_target_": "nowhere.Thing"}, f"{key}._target_=nowhere.Thing: no module 'nowhere'; put its folder on PYTHON"),
        ({"_target_": "json.dump5"}, f"{key}._target_=json.dump5: json has no 'dump5'; did you mean dump"),
        ({"_target_": "Mine"}, f"{key}._target_=Mine: write package.module.Name"),
        ({"_target_": "__main__.Gone"}, "other processes do not see a class of a notebook: put it into a file"),
        ({"_target_": unfit}, said),
    ):
        with pytest.raises(UserError) as caught:
            look(part)
        assert problem in str(caught.value) and key in str(caught.value) and "\n" not in str(caught.value)


def with_options(every, most=1):
    """Takes two arguments, for the test below."""


def test_arguments_beside_a_target_are_compared_with_what_it_takes():
    for part, problem in (
        ({"evry": 1}, "k.evry=1: with_options has no such argument; did you mean k.every? (it has every, most)"),
        ({"most": 1}, "k: with_options: missing a required argument: 'every'; give it as +k.<argument>=<value>"),
    ):
        with pytest.raises(UserError, match=re.escape(problem)):
            check_arguments(with_options, part, "k")
    check_arguments(with_options, {"_target_": "x", "_partial_": True, "most": 2}, "k")
    check_arguments(with_options, {"_args_": [1], "most": 2}, "k")


WRONG = {
    "stage=pretrain +callbacks.es={_target_:nomod.Mine}": "callbacks.es._target_=nomod.Mine: no module 'nomod'",
    "stage=pretrain +logger.l={_target_:lightning.pytorch.loggers.CSVLogger,nam:x}": "did you mean logger.l.name?",
    "stage=pretrain data=custom data.source={_target_:json.dump5}": "data.source._target_=json.dump5: json has no",
    "stage=sft data.tasks.choice.type=null": "data.tasks.choice: give either type=<name> or _target_=",
    "stage=grpo stage.reward=a stage.reward_options={a:{_target_:json.loads5}}": "stage.reward_options.a._target_=json",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_class_stops_a_stage_before_anything_is_built(line, tmp_path, monkeypatch):
    from llm.stages import run_stage

    monkeypatch.setattr(run_stage, "find_parents", lambda cfg, row, run: (tmp_path, {}))
    monkeypatch.setattr(run_stage, "check_data", lambda cfg, row: None)
    monkeypatch.setattr(run_stage, "runner", lambda row: pytest.fail("it went on"))
    with pytest.raises(UserError) as caught:
        run_stage.run_stage(composed(*line.split(), f"paths.runs={tmp_path}"))
    assert WRONG[line] in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("run.json"))


def test_another_way_than_the_door_is_refused_with_the_door(tmp_path):
    from llm.config import extend
    from llm.config.check import check_values

    for way in ("data.tasks.choice.type=word_problems.WordProblems", "stage.reward=brief.reward"):
        with pytest.raises(UserError, match=r"_target_=package\.module\.(Class|Name)"):
            cfg = composed("stage=grpo", way)
            score_of([], cfg.stage)
    for way in ("stage.reward={_target_: brief.reward}", "stage.reward._target_=brief.reward"):
        with pytest.raises(UserError, match="comes in by stage.reward_options.<name>._target_ with"):
            composed("stage=grpo", way)
    for way in ("+optim._target_=torch.optim.Adam", "+data._target_=my.Text", "++callbacks={_target_: my.Callback}"):
        with pytest.raises(UserError, match="a class of your own comes in by"):
            composed("stage=pretrain", way)
    for name in ("register_task", "register_source", "register_reward"):
        with pytest.raises(UserError, match=f"{name} is no longer needed.*_target_=package"):
            getattr(extend, name)
    cfg = composed("stage=pretrain")
    cfg.optim.name = "lion.groups"
    with pytest.raises(UserError, match="optim.name=lion.groups: must be one of .*; a plugin registers yours"):
        check_values(cfg)


def composed(*lines: str):
    from conftest import compose

    return compose("train", "experiment=tiny", *lines)


# ---- as processes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "python -m llm.experiments.queue add --queue queue.sqlite stage=tokenizer",
        "python -c 'import sys; from llm.experiments.scaling import _parse; _parse(sys.argv[1:])' --name s --depths 1"
        " --flops 1e11 --runs runs",
    ],
    ids=["queue", "scaling"],
)
def test_the_queue_and_the_series_import_plugins(home, command):
    """Both compose the settings before the process of train.py does."""
    shell(f"{command} experiment=tiny hydra.searchpath=[file://$PWD] optim=lion plugins=[lion]", home)


@pytest.mark.slow
def test_recipes_of_training_work_together(trained):
    """The optimizer, the architecture, the source of text, the callback and the logger in one run of real processes."""
    stage = trained / "runs" / "all" / "pretrain"
    manifest = json.loads((stage / "run.json").read_text())
    assert manifest["status"] == "finished" and manifest["config"]["data"]["source"]["val_size"] == 2
    with (stage / "metrics.csv").open() as file:
        norms = {row["step"]: row["weight_norm"] for row in csv.DictReader(file)}
    assert all(bool(norms[str(step)]) == (step % 2 == 0) for step in range(1, 5))
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines][-1] == 4 and "loss" in lines[-1]
    saved = torch.load(stage / "checkpoints" / "step_000004.ckpt", weights_only=True)["optimizer_states"][0]
    assert {group["kind"] for group in saved["param_groups"]} == {"lion"}
    assert {name for state in saved["state"].values() for name in state} == {"momentum"}
    shape = json.loads((stage / "model" / "config.json").read_text())["fathom"]["model"]
    assert shape["arch"] == "parallel" and shape["parallel"] is True


def test_judge_finds_the_architecture_of_a_run(trained):
    """The run remembers its plugins, and evaluate.py imports those that its command names again."""
    (command,) = COMMANDS.findall(sections()["judge"])
    named = f"{command.strip().replace('run=tiny', 'run=all')} plugins=[lion,parallel_blocks] trust=[csv_text]"
    output = shell(named, trained).stdout
    scores = json.loads((trained / "runs" / "all" / "pretrain" / "eval.json").read_text())
    assert set(scores["judges"]["variety"]) == {"different", "words"} and "variety different" in output


def again(home: Path, run_name: str, copy: str) -> None:
    """Copy a finished run and take away its result and last checkpoint, as the page says."""
    stage = home / "runs" / copy / "pretrain"
    shutil.copytree(home / "runs" / run_name, home / "runs" / copy)
    shutil.rmtree(stage / "model")
    (stage / "checkpoints" / "step_000004.ckpt").unlink()


def weights_of(home: Path, run_name: str) -> Path:
    return home / "runs" / run_name / "pretrain" / "model" / "model.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("title", RECIPES)
def test_commands_of_the_page(home, title):
    """Every command, as it stands there; the optimizer's end in a comparison to the bit."""
    if not (home / "runs" / "tiny" / "pretrain" / "model").is_dir():
        run("train.py", home, *TINY, "stage=pretrain")
    for script in COMMANDS.findall(sections()[title]):
        shell(script, home)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["muon", "fsdp"])
def test_an_optimizer_works_and_resumes_under_every_strategy(home, strategy):
    """Two processes train what two of strategy=ddp do, resume bit for bit, and one process takes over their state.

    That these are the weights of one process is shown by tests/parallel/test_update_rules.py: here processes read
    documents of their own, so one alone would see other batches.
    """
    line = (*TINY, *LION, "precision.compute=fp32")
    if not weights_of(home, "ddp").is_file():
        run("train.py", home, *line, *TWO, "strategy=ddp", "run=ddp")
    run("train.py", home, *line, *TWO, f"strategy={strategy}", f"run={strategy}")
    for copy in ("again", "alone"):
        again(home, strategy, f"{strategy}-{copy}")
    resumed = run("train.py", home, *line, *TWO, f"strategy={strategy}", f"run={strategy}-again")
    assert "resuming at step 2 of 4" in resumed
    assert weights_of(home, strategy).read_bytes() == weights_of(home, f"{strategy}-again").read_bytes()
    straight = load_file(weights_of(home, "ddp"))
    for key, weight in load_file(weights_of(home, strategy)).items():
        differs = (weight - straight[key]).abs() > 1e-6  # the sign of a momentum near 0 depends on rounding
        assert differs.float().mean() < 0.01, key
    assert "resuming at step 2 of 4" in run("train.py", home, *line, f"run={strategy}-alone")
