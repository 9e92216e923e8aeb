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
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import REPO
from safetensors.torch import load_file

from llm.errors import UserError

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
    chosen = ("plugins=[lion,parallel_blocks,csv_text]", "optim=lion", "arch=parallel", "data=csv", "data.val_size=2")
    more = ("callbacks=weight_norm", "logger=json_lines", "stage=pretrain", "init_from=tiny/tokenizer", "run=all")
    run("train.py", home, *TINY, *chosen, *more)
    return home


# ---- the page -------------------------------------------------------------------------------------------------------


def test_every_door_has_a_short_recipe():
    assert set(RECIPES) < set(sections()) and "stage" in sections()
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


def test_rows_of_a_task_type_are_checked_as_ours_are(home, module, tmp_path):
    from tasks import build_task

    spec = {"type": "word_problems.WordProblems", "source": "local"}
    spec |= {split: str(home / f"{split}.jsonl") for split in ("train", "test")}
    train, test = (build_task("problems", spec, split) for split in ("train", "test"))
    assert [len(train), len(test), len(build_task("problems", spec | {"limit": 1}, "train"))] == [2, 1, 1]
    assert train.rewards([train[1]] * 3, ["2 x 6 = 12", "13", "none"]) == [1.0, 0.0, 0.0]
    row = {"Body": "A", "Question": "B?", "Answer": "two"}
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"bad.jsonl row 1: 'Answer' must be int or float, found str"):
        build_task("problems", spec | {"train": str(tmp_path / "bad.jsonl")}, "train")
    with pytest.raises(UserError, match="source=embedded: WordProblems has no rows of that source"):
        build_task("problems", {"type": spec["type"], "source": "embedded"}, "train")


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("gsm9k", "data.tasks.mine.type=gsm9k does not exist; did you mean gsm8k.*multiple_choice, .*spelling_bee"),
        ("nowhere.Task", "no module 'nowhere'; put its folder on PYTHONPATH"),
        ("word_problems.Nothing", "word_problems has no 'Nothing'"),
        ("json.dumps", "is no task: it must be a subclass of tasks.base.Task"),
    ],
)
def test_an_unknown_task_type_says_what_there_is(module, kind, what):
    from tasks import build_task

    with pytest.raises(UserError, match=what):
        build_task("mine", {"type": kind, "source": "local"}, "train")


def test_names_are_registered_once(module):
    from llm.config.extend import register_reward, register_source, register_task
    from llm.config.registries import REWARDS
    from llm.config.schema import OptimConfig

    reward = module("brief").reward
    register_reward("brief", reward)
    register_reward("brief", reward)  # as a module does that is imported twice
    assert REWARDS.get("brief") is reward
    with pytest.raises(UserError, match="task type 'gsm8k' exists already"):
        register_task("gsm8k", "somewhere.Else")
    with pytest.raises(UserError, match="must be a dataclass and extend DataConfig"):
        register_source("mine", "somewhere.build", OptimConfig)
    with pytest.raises(UserError, match="stage.reward=breif does not exist; did you mean brief"):
        REWARDS.get("breif", "stage.reward")


def test_a_reward_of_ones_own_replaces_the_tasks(module, monkeypatch):
    from tasks.rewards import build_rewards

    brief = module("brief")
    assert build_rewards([], {"brief.reward": 1.0}, {})([{}, {}], ["", "abc"]) == [[1.0], [0.25]]
    monkeypatch.setattr(brief, "reward", lambda conversation, completion: float("nan"))
    with pytest.raises(UserError, match="reward brief.reward: gave nan; a reward must be a finite number"):
        build_rewards([], {"brief.reward": 1.0}, {})([{}], [""])


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


# ---- as processes ---------------------------------------------------------------------------------------------------


def test_recipes_of_training_work_together(trained):
    """The optimizer, the architecture, the source of text, the callback and the logger in one run of real processes."""
    stage = trained / "runs" / "all" / "pretrain"
    manifest = json.loads((stage / "run.json").read_text())
    assert manifest["status"] == "finished" and manifest["config"]["data"]["delimiter"] == ","
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
    named = f"{command.strip().replace('run=tiny', 'run=all')} plugins=[lion,parallel_blocks,csv_text]"
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
