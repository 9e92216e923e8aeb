"""Shared by all tests: small configurations, a small tokenizer and model, and entry points run as real processes."""

import copy
import functools
import gc
import itertools
import os
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

import processes
import pytest
from processes import REPO

pytest.register_assert_rewrite("judging", "openai_server")
# Before torch is imported anywhere: many small matrices on few cores are fastest on one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What tests train says nothing of this machine to its user.
os.environ["FATHOM_MACHINE"] = str(Path(tempfile.gettempdir()) / f"fathom_tests_{os.getuid()}" / "machine.json")

TESTS = Path(__file__).parent
SHARED = Path(os.environ.get("FATHOM_SHARED") or "FATHOM_SHARED-is-not-set")  # data from outside the repository
TEXT = "The red fox of Ember Hill has 12 apples and 3 friends. How many apples does the fox have? 12 apples!\n"


def pytest_configure(config):
    """Nothing that tests start outlives pytest, nor do the workers of pytest-xdist."""
    if hasattr(config, "workerinput"):
        processes.die_with_parent()
    else:
        processes.mark_all()


# What takes longest begins, so that the workers of `make test` end together: what is left for the end is short.
LONGEST = (
    *("parallel/test_strategies.py", "stages/test_pipeline.py", "config/test_schema.py", "test_api.py"),
    *("stages/test_lightning_habits.py", "config/test_dead_keys.py", "cli/test_command_line.py"),
    *("callbacks/test_damage_and_watch.py", "stages/test_training_steps.py", "serving/test_conformance_of_texts.py"),
    *("cli/test_hydra_habits.py", "stages/test_ramped_batches.py", "stages/test_init_from.py"),
    *("serving/test_terminal.py", "tasks/test_sandbox.py", "stages/test_identity.py", "stages/test_start.py"),
    *("callbacks/test_average.py", "test_extend.py", "stages/test_write_tokens.py", "data/test_streaming.py"),
    *("data/test_stores.py", "eval/test_core.py", "serving/test_conformance.py", "data/test_hub_documents.py"),
    *("tasks/test_hub_tasks.py", "test_processes.py", "test_prose.py"),
)


def pytest_sessionstart():
    """Look for no garbage while tests are collected: a quarter of that time, for objects nearly all of which stay."""
    gc.disable()


def pytest_collection_finish():
    gc.enable()


def compose_sooner() -> None:
    """Parse a YAML text once in this process: a sixth of the time of a composition."""
    import omegaconf.omegaconf as module

    parse, parsed = module.yaml.load, {}

    def load(stream, Loader):
        text = stream if isinstance(stream, str) else stream.read()
        if text not in parsed:
            if stream is not text:
                stream.seek(0)
            parsed[text] = parse(stream, Loader=Loader)  # of a file, whose name stands in an error
        return copy.deepcopy(parsed[text])

    module.yaml = types.SimpleNamespace(**{**vars(module.yaml), "load": load})


def pytest_collection_modifyitems(items):
    def rank(item) -> int:
        name = item.path.relative_to(TESTS).as_posix() if item.path.is_relative_to(TESTS) else ""
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=rank)


begun = itertools.count(1)
thaw = gc.unfreeze


def pytest_runtest_setup(item):
    """Set aside what is there, all that was imported above all: every training in this process looks for garbage when
    it begins, which takes 0.3 s and more with it. What the last test left is looked through before that; what becomes
    garbage later, as objects of a module's tests do, is found after a thousand tests: it takes 1.5 s to look for it.
    So a training that ends must not bring all of it back: `gc.unfreeze` does nothing in tests, `thaw` does.
    """
    gc.unfreeze = lambda: None
    if next(begun) % 1000 == 0:
        thaw()
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config):
    processes.end_started()


@pytest.fixture(autouse=True)
def nothing_left_running():
    """A test that fails or is interrupted leaves no process: what fixtures of a wider scope started goes on."""
    before = len(processes.started)
    yield
    processes.end_started(before)


def needs_shared(*paths: str):
    """Mark for tests that read files from outside the repository, below the folder that FATHOM_SHARED names."""
    missing = [path for path in paths if not (SHARED / path).exists()]
    return pytest.mark.skipif(bool(missing), reason=f"set FATHOM_SHARED to a folder with {', '.join(missing)}")


def run_cli(script: str, *args: str, cwd: Path | str = REPO, fresh: bool = False, **env: str):
    """Run an entry point (`run_cli("train.py", "stage=sft")`) in a process of its own and wait for it.

    fresh: in a new interpreter, for tests of what happens while it starts; else in one that has imported torch before
    (tests/warm.py), which saves six seconds. Returns `subprocess.CompletedProcess` with text in stdout and stderr; more
    environment variables as keywords.
    """
    if fresh:
        return processes.run(sys.executable, str(REPO / script), *args, cwd=cwd, env=env)
    return processes.run_warm(REPO / script, *args, cwd=cwd, env=env)


def compose(config_name: str = "train", *overrides: str):
    """The composed configuration of an entry point, checked like the command line."""
    from llm.cli.overrides import check_overrides
    from llm.cli.overrides import compose as compose_checked

    check_overrides(config_name, overrides)
    return compose_checked(config_name, overrides)


@pytest.fixture(scope="session", autouse=True)
def composed_once():
    """Composing takes 0.2 s: equal lines are composed once, and every test has a copy of its own.

    The folder of the runs, which most tests have for themselves, is set in the copy. What folders of users hold may
    change, and so may the stages that plugins add.
    """
    from llm.cli import compose, overrides
    from llm.cli.options import OURS
    from llm.config.said import note_settings
    from llm.config.stages import all_stages

    compose_sooner()
    compose_anew = compose.compose_all
    cached = functools.lru_cache(100)(lambda config_name, lines, stages: compose_anew(config_name, lines))

    def compose_copy(config_name, lines=(), sources=OURS):
        from omegaconf import OmegaConf

        if sources != OURS:
            return compose_anew(config_name, lines, sources)
        folders = [line for line in lines if line.startswith("paths.runs=/")]
        others = tuple(line for line in lines if line not in folders)
        cfg, own = copy.deepcopy(cached(config_name, others, all_stages()))
        for folder in compose.parse(folders):
            OmegaConf.update(cfg, folder.key_or_group, folder.value())
        note_settings(cfg, [o for o in compose.parse(lines) if not o.is_hydra_override()])
        return cfg, own

    with pytest.MonkeyPatch.context() as patch:
        for module in (compose, overrides):
            patch.setattr(module, "compose_all", compose_copy)
        yield


@pytest.fixture(scope="session")
def draw_figure():
    """The function that draws a figure of a report, as it is outside of tests."""
    from llm.report import plots

    return plots._figure


@pytest.fixture(scope="session", autouse=True)
def empty_figures(draw_figure):
    """Figures of a report take a second for each stage of the run, which trains for less: here they are empty files.

    tests/report draws them, and so do programs in new interpreters.
    """
    from llm.report import plots

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_figure", lambda path, *args, **options: path.touch())
        yield


@pytest.fixture
def tiny_config(tmp_path) -> Callable:
    """`tiny_config("sft", "max_steps=2")`: the configuration of a stage of experiment=tiny in a fresh folder."""

    def build(stage: str = "pretrain", *overrides: str):
        return compose("train", "experiment=tiny", f"stage={stage}", f"paths.runs={tmp_path / 'runs'}", *overrides)

    return build


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """300 tokens: all bytes, a few merges, the nine special tokens."""
    from llm.tokenizer.bpe import Tokenizer

    return Tokenizer.train([TEXT * 20], vocab_size=300)


@pytest.fixture
def tiny_net(tiny_tokenizer):
    """A network of two layers of width 32 with a context of 64 tokens, initial weights of seed 0."""
    from llm.model.config import GPTConfig
    from llm.model.gpt import GPT

    config = GPTConfig(2, 2, 1, 16, 32, 64, tiny_tokenizer.vocab_size)
    return GPT(config).init_weights(0).eval()


@pytest.fixture(scope="session")
def tokenizer_runs(tmp_path_factory) -> Path:
    """runs/ with the finished tokenizer of the run `tiny`, of experiment=tiny; to be copied, not to be changed."""
    from llm.stages.run_stage import run_stage

    root = tmp_path_factory.mktemp("tokenizer") / "runs"
    run_stage(compose("train", "experiment=tiny", "stage=tokenizer", f"paths.runs={root}"))
    return root
