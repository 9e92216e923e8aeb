"""Shared by all tests: small configurations, a small tokenizer and model, and entry points run as real processes."""

import copy
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import processes
import pytest
from processes import REPO

pytest.register_assert_rewrite("judging", "openai_server")
# Before torch is imported anywhere: many small matrices on few cores are fastest on one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TESTS = Path(__file__).parent
SHARED = Path(os.environ.get("FATHOM_SHARED") or "FATHOM_SHARED-is-not-set")  # data from outside the repository
TEXT = "The red fox of Ember Hill has 12 apples and 3 friends. How many apples does the fox have? 12 apples!\n"


def pytest_configure(config):
    """Nothing that tests start outlives pytest, nor do the workers of pytest-xdist."""
    if hasattr(config, "workerinput"):
        processes.die_with_parent()
    else:
        processes.mark_all()


# What takes longest begins, so that both workers of `make test` end together: what is left for the end is short.
LONGEST = (
    *("stages/test_pipeline.py", "parallel/test_strategies.py", "parallel/test_launch.py", "eval/test_judges.py"),
    *("test_processes.py", "eval/test_lm_eval_harness.py", "config/test_schema.py", "config/test_dead_keys.py"),
    *("callbacks/test_damage_and_watch.py", "eval/test_core.py", "optim/test_muon_adamw.py", "model/test_attention.py"),
    *("cli/test_command_line.py", "data/test_hub_documents.py", "serving/test_serve.py", "tasks/test_hub_tasks.py"),
)


def pytest_collection_modifyitems(items):
    def rank(item) -> int:
        name = item.path.relative_to(TESTS).as_posix() if item.path.is_relative_to(TESTS) else ""
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=rank)


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


@pytest.fixture(scope="module")
def composed_once():
    """Composing takes 0.2 s: the checks that begin with the same configuration share it."""
    from llm.cli import compose, overrides
    from llm.cli.options import OURS

    cached = functools.cache(compose.compose_all)

    def compose_copy(config_name, lines=(), sources=OURS):
        return copy.deepcopy(cached(config_name, tuple(lines), sources))

    with pytest.MonkeyPatch.context() as patch:
        for module in (compose, overrides):
            patch.setattr(module, "compose_all", compose_copy)
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
