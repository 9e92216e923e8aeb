"""`llm.train`, `llm.evaluate` and `llm.list_runs`: what they return, what they refuse, and what they leave behind."""

import gc
import inspect
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import typing
import warnings
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
import torch._functorch.config
from conftest import run_cli
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from processes import REPO

import llm
from llm.checkpoint.model_folder import load_model_folder
from llm.checkpoint.resume import list_checkpoints
from llm.errors import UserError
from llm.stages.step_module import StepModule
from llm.utils.restore import process_as_it_was

TINY = "experiment=tiny trainer=cpu stage.eval_every=0"


def words(folder: Path, more: str) -> list[str]:
    return [*f"{TINY} {more}".split(), f"paths.runs={folder}"]


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Variables of all Python of docs/python.md, run in order in one folder: the run `tiny`, not to be changed."""
    blocks = re.findall(r"```python\n(.*?)```", (REPO / "docs/python.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict = {"blocks": blocks}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("examples"))
        for block in blocks:
            exec(compile(block, "docs/python.md", "exec"), names)
    return names


@pytest.fixture(scope="module")
def chain(examples):
    """Tokenizer and pretrain of the run `tiny`, trained by one call; not to be changed."""
    return examples["last"]


@pytest.fixture
def runs(chain, tmp_path) -> Path:
    """A copy of the runs folder with the tokenizer alone."""
    shutil.copytree(chain.folder.parents[1], tmp_path / "runs", ignore=shutil.ignore_patterns("pretrain"))
    return tmp_path / "runs"


# ----- what is returned


@pytest.mark.slow
def test_the_examples_of_the_documentation_run(examples):
    assert len(examples["blocks"]) == 5 and examples["stage"] == examples["last"]
    assert 0 < examples["scores"]["bpb"].value < 20
    assert len(examples["inside"].tokens) == examples["inside"].logits.shape[0]


def test_a_chain_returns_its_stages_and_the_last_one_itself(chain):
    assert [one.stage for one in chain.chain] == ["tokenizer", "pretrain"] and chain.chain[-1] == chain
    assert (chain.run, chain.stage, chain.status) == ("tiny", "pretrain", "finished")
    assert (chain.folder / "model").is_dir() and chain.manifest["steps"] == 4
    frame = chain.metrics()
    assert frame.index.name == "step" and list(frame.index) == [0, 1, 2, 3, 4]
    assert frame["loss"].dropna().iloc[-1] == pytest.approx(chain.scores["loss"].value)
    assert "bytes_per_token_val" in chain.chain[0].scores and len(chain.chain[0].metrics()) == 0


@pytest.mark.slow
def test_words_in_a_list_train_what_the_command_trains(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "other" / "runs")
    before = state()
    made = llm.train(words(runs, "stage=pretrain max_steps=2 trainer.deterministic=true"))
    assert changed(before) == set()
    done = run_cli("train.py", *words(tmp_path / "other/runs", "stage=pretrain max_steps=2 trainer.deterministic=true"))
    assert done.returncode == 0, done.stderr
    other = tmp_path / "other" / "runs" / "tiny" / "pretrain"
    assert (made.folder / "model/model.safetensors").read_bytes() == (other / "model/model.safetensors").read_bytes()
    saved = [json.loads((folder / "run.json").read_text())["config"] for folder in (made.folder, other)]
    assert saved[0] | {"paths": None} == saved[1] | {"paths": None}


def test_a_dry_run_within_hydra_of_a_notebook(runs, tmp_path, capsys):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mine.yaml").write_text("value: 3\n")
    with hydra.initialize_config_dir(str(tmp_path / "conf"), version_base="1.3"):
        planned = llm.train(words(runs, "stage=pretrain dry_run=true"))
        assert hydra.compose("mine").value == 3
    assert planned.status == "missing" and planned.scores == {} and "params_total" in capsys.readouterr().out


def test_a_stage_without_a_run(runs, monkeypatch):
    monkeypatch.setattr("llm.stages.check.run", lambda cfg: None)
    checked = llm.train(f"experiment=tiny stage=check paths.data='{runs}/data'")
    assert (checked.run, checked.stage, checked.folder) == ("", "check", runs / "data")


@pytest.mark.slow
def test_a_sweep_over_values_returns_all_its_runs_and_knows_folders_of_the_users_own(runs, tmp_path):
    own = tmp_path / "conf" / "experiment" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# @package _global_\ndefaults: [tiny]\nrun: mine\ndry_run: true\n")
    more = "-m experiment=mine stage=pretrain stage.lr_frac=0.5,1 init_from=tiny/tokenizer trainer=cpu"
    last = llm.train([*more.split(), f"paths.runs={runs}"], config_dir=tmp_path / "conf")
    assert [one.run for one in last.chain] == ["mine-lr_frac=0.5", "mine-lr_frac=1"]


def test_evaluate_returns_scores_with_their_errors(chain):
    found = chain.evaluate("eval=bpb eval.tokens=512")
    assert found["bpb"].stderr is None and 0 < found["bpb"].value < 20
    assert chain.scores["bpb"] == found["bpb"]
    with pytest.raises(UserError, match="scores one stage"):
        llm.evaluate("tiny", overrides="-m eval.tokens=1,2")
    with pytest.raises(UserError, match=r"unknown key 'eval.token'; did you mean 'eval.tokens'"):
        llm.evaluate("tiny", overrides="eval.token=1")


def test_a_frame_of_all_runs(chain, tmp_path):
    shutil.copytree(chain.folder.parents[1], tmp_path / "runs")
    scores = {"chat": {"choice": {"accuracy": 0.5, "n": 4, "stderr": 0.25}}, "bpb": 1.5}
    (tmp_path / "runs/tiny/pretrain/eval.json").write_text(json.dumps(scores))
    frame = llm.list_runs(tmp_path / "runs")
    assert list(frame.columns[:8]) == ["run", "stage", "status", "seed", "parent", "steps", "tokens", "flops"]
    row = frame.set_index("stage").loc["pretrain"]
    assert (row["run"], row["status"], row["parent"], row["steps"]) == ("tiny", "finished", "tiny/tokenizer", 4)
    assert (row["tokens"], row["depth"], row["bpb"]) == (4 * 512, 2, 1.5)
    assert (row["choice"], row["choice_stderr"]) == (0.5, 0.25)
    assert row["params"] == chain.manifest["derived"]["params_total"]
    assert 0 < (row["finished"] - row["started"]).total_seconds() <= row["seconds"] + 60
    (tmp_path / "runs/tiny/pretrain/run.json").write_text("{")
    with pytest.warns(UserWarning, match="run.json"):
        assert list(llm.list_runs(tmp_path / "runs")["stage"]) == ["tokenizer"]
    assert {"run", "steps", "folder"} <= set(llm.list_runs(tmp_path / "nothing").columns)


# ----- what is refused


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        ("stage=pretrian", "stage=pretrian does not exist; did you mean stage=pretrain"),
        ("max_stps=3", "unknown key 'max_stps'; did you mean 'max_steps'"),
        ("stage=tokenizer,pretrain", "several values make a sweep, which needs -m"),
        ("run='a", "cannot be read: No closing quotation"),
        (
            "-m stage=tokenizer hydra/launcher=submitit_local",
            "submitit_local starts jobs elsewhere: give it to train.py",
        ),
        ("--cfg job", "--cfg job: this trains nothing"),
        ("--help", "--help: this trains nothing"),
    ],
)
def test_a_mistake_is_the_line_of_the_command(overrides, error, tmp_path):
    with pytest.raises(UserError, match=error):
        llm.train(f"experiment=tiny paths.runs={tmp_path} {overrides}")


@pytest.mark.parametrize("shown", ["--help", "--cfg job"])
def test_what_scores_nothing_is_the_line_of_the_command(shown, tmp_path):
    with pytest.raises(UserError, match=f"{shown}: this scores nothing"):
        llm.evaluate(overrides=f"paths.runs={tmp_path} {shown}")


def test_a_job_that_fails_is_named(runs):
    with pytest.raises(UserError, match=r"is missing.*\[job 1 of 2: stage=sft; later jobs were not started\]"):
        llm.train(words(runs, "-m stage=sft,grpo"))


def test_an_error_in_a_notebook_is_one_line():
    assert UserError("max_steps=-1: below 0")._render_traceback_() == ["error: max_steps=-1: below 0"]


def test_it_is_called_in_the_main_thread_and_without_torchrun(monkeypatch):
    found = []

    def call():
        try:
            llm.train(TINY)
        except UserError as error:
            found.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "main thread" in found[0]
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(UserError, match="trainer.devices"):
        llm.train(TINY)
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UserError, match="trainer.devices"):
        llm.train(TINY)


def test_a_checkpoint_of_a_longer_context_makes_its_network_again(runs, chain):
    longer = f"stage=pretrain run=longer init_from={chain.folder}/model model.seq_len=256 arch.rope_scaling=yarn"
    made = llm.train(words(runs, f"{longer} batch.tokens_per_step=1024 max_steps=1 stage.sample_every=0"))
    again = StepModule.load_from_checkpoint(list_checkpoints(made.folder / "checkpoints")[-1][1]).net
    kept = load_model_folder(made.folder / "model")[0]
    assert again.config == kept.config and again.config.rope_factor == 2.0
    ids = torch.arange(200)[None]
    assert torch.equal(again(ids), kept(ids))


# ----- signals


def test_ctrl_c_saves_and_returns_and_the_same_call_goes_on(runs):
    command = words(runs, "stage=pretrain max_steps=3 +callbacks.stop={_target_:small_training.StopAt,step:2,signum:2}")
    before = state()
    made = llm.train(command)
    assert made.status == "interrupted" and list(made.metrics().index)[-1] == 2
    assert changed(before) == set()
    with pytest.raises(UserError, match="interrupted"):
        made.load()
    again = llm.train(command)
    assert again == made and again.status == "finished" and list(again.metrics().index)[-1] == 3


def test_no_further_stage_begins_where_a_signal_came_in_the_last_step(runs, capsys):
    """The stage is finished; a sweep went on with the next one after it had said that it stops."""
    stop = "+callbacks.stop={_target_:small_training.StopAt,step:2,signum:2}"
    made = llm.train(words(runs, f"-m stage=pretrain,midtrain max_steps=2 {stop}"))
    assert [(one.stage, one.status) for one in made.chain] == [("pretrain", "finished")]
    assert "not begun: SIGINT came before; the same command goes on here" in capsys.readouterr().out
    again = llm.train(words(runs, f"-m stage=pretrain,midtrain max_steps=2 {stop}"))
    assert [one.stage for one in again.chain] == ["pretrain", "midtrain"]


@pytest.mark.slow
def test_two_devices_are_processes_of_their_own(runs):
    made = llm.train(words(runs, "stage=pretrain max_steps=4 trainer.devices=2 strategy=ddp batch.micro_batch_size=2"))
    assert made.status == "finished" and made.manifest["steps"] == 4


# ----- what is left behind


def state() -> dict:
    """All that a call must leave as it was."""
    loggers = [logging.getLogger(), *map(logging.getLogger, ("lightning.pytorch", "lightning.fabric", "hydra"))]
    return {
        "environment": dict(os.environ),
        "arguments": list(sys.argv),
        "folder": os.getcwd(),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "filters": list(warnings.filters),
        "logging": [(one.level, list(one.handlers), one.propagate, one.disabled) for one in loggers],
        "garbage": gc.isenabled(),
        "hydra": (GlobalHydra.instance().hydra, HydraConfig.instance().cfg),
        "random": (random.getstate(), torch.get_rng_state().tolist(), str(np.random.get_state())),
        "torch": (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
        "compiler": torch._functorch.config.autograd_cache_allow_custom_autograd_functions,
        "streams": (sys.stdout, sys.stderr, sys.excepthook),
        "threads": {thread.name for thread in threading.enumerate() if not thread.daemon},
    }


def changed(before: dict) -> set[str]:
    after = state()
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ("max_steps=-1", UserError),
        ("max_steps=2 +callbacks.fails._target_=test_api.failing", RuntimeError),
        ("max_steps=2 +callbacks.stop={_target_:small_training.StopAt,step:1,signum:15}", SystemExit),
    ],
)
def test_the_process_is_as_it_was_after_an_error_and_a_stop_signal(runs, more, error):
    before = state()
    with pytest.raises(error) as found:
        llm.train(words(runs, f"stage=pretrain {more}"))
    assert changed(before) == set() and (error is not SystemExit or found.value.code == 143)


def failing():
    import lightning as L

    class Failing(L.Callback):
        def on_train_batch_end(self, *args) -> None:
            raise RuntimeError("on purpose")

    return Failing()


def test_a_block_puts_back_what_is_changed_in_it():
    before = state()
    with pytest.raises(KeyError), process_as_it_was():
        os.environ["FATHOM_OF_A_TEST"], os.environ["HOME"] = "1", "elsewhere"
        os.environ.pop("PATH", None)
        sys.argv.append("more")
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        warnings.simplefilter("ignore")
        logging.getLogger().addHandler(logging.NullHandler())
        logging.getLogger("lightning.pytorch").setLevel(50)
        gc.disable()
        random.random(), np.random.rand(), torch.rand(1)
        torch.set_num_threads(2)
        torch.set_float32_matmul_precision("medium")
        torch.use_deterministic_algorithms(True)
        torch.set_default_dtype(torch.float64)
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
        torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
        raise KeyError
    assert changed(before) == set()


# ----- the package


def test_importing_it_is_light():
    code = """
import sys, llm
heavy = {"torch", "lightning", "hydra", "omegaconf", "pandas", "numpy"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
assert set(llm.__all__) <= set(dir(llm))
llm.train, llm.list_runs
assert not {"torch", "lightning", "pandas"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_public_names_are_typed_and_documented():
    for name in llm.__all__:
        found = getattr(llm, name)
        assert found.__doc__, name
        functions = [found] if inspect.isfunction(found) else [f for _, f in inspect.getmembers(found) if callable(f)]
        for function in functions:
            if inspect.isfunction(function) and not function.__name__.startswith("_"):
                missing = [
                    one.name
                    for one in inspect.signature(function).parameters.values()
                    if one.annotation is one.empty and one.name not in ("self", "cls")
                ]
                assert not missing and "return" in function.__annotations__, f"{name}.{function.__name__}: {missing}"
    assert typing.get_type_hints(llm.train, {"TrainedStage": llm.TrainedStage})["return"] is llm.TrainedStage
