"""Stages of post-training under every strategy: a killed one ends as one that was left alone, with equal bits.

A network of random weights is trained for five steps with several processes, and once more from the checkpoint of the
third, which lies between two updates of a rollout where the stage has such. tests/chaos.py kills real trainings.
"""

import csv
import json
import shutil
import subprocess
from functools import cache

import pytest
import torch
from chaos_trainings import table
from conftest import REPO, compose
from processes import finish, start_warm
from safetensors.torch import load_file

from llm.checkpoint.model_folder import save_model_folder
from llm.model.gpt import GPT
from llm.parallel.launch import child_env, free_port
from llm.run.stage_folder import write_manifest
from llm.scaling.rules import model_config
from llm.tokenizer.bpe import Tokenizer

pytestmark = pytest.mark.slow
SMALL = ("experiment=tiny", "trainer=cpu", "precision.compute=fp32", "save_every=1", "max_steps=5")
SMALL += ("stage.eval_every=4", "keep_last=5", "init_from=tiny/sft")
STRATEGIES = [("single", 1), *((strategy, n) for strategy in ("muon", "ddp", "fsdp") for n in (2, 3))]
PAIRS = ("stage.pairs_per_step=6", "stage.preferences=[politeness]", "data.preferences.politeness.size=40")
PAIRS += ("data.preferences.politeness.test_size=12", "batch.micro_batch_size=4")
FREE = ("stage.eval_examples=3", "stage.max_new_tokens=8")
ANSWERS = ("stage.prompts_per_step=3", "stage.max_new_tokens=8", "stage.reward=length", "stage.eval_examples=3")
ANSWERS += ("stage.reward_options={length: {words: 5}}", "stage.rehearsal=3", "batch.micro_batch_size=2")
TWICE = ("stage.updates_per_rollout=2",)
TAUGHT = ("stage.teacher=large/sft", "stage.rehearsal_weight=0.01")
CASES = {
    "grpo": ("grpo", *ANSWERS, *TWICE, "stage.loss=dapo", "stage.kl=0.1", "stage.filter_equal=resample"),
    "ppo": ("ppo", *ANSWERS, "stage.kl=0.1"),
    "best_of_n": ("best_of_n", *ANSWERS, *TWICE, "stage.min_reward=0"),
    "distill": ("distill", *ANSWERS, *TWICE, *TAUGHT),
    "sampled": ("distill", *ANSWERS, *TAUGHT, "stage.divergence=sampled"),
    "offline": ("distill", *ANSWERS, *TWICE, *TAUGHT, "stage.source=data", "stage.divergence=forward_kl"),
    "reward": ("reward", *PAIRS),
    **{loss: ("dpo", *PAIRS, *FREE, f"stage.loss={loss}") for loss in ("dpo", "ipo", "orpo", "kto", "simpo")},
}
DRAWS_NOTHING = ("reward", "dpo", "ipo", "orpo", "kto", "simpo", "offline")  # trains the rows that one process trains
LORA = ("model.lora.rank=2", "model.lora.targets=[attention,mlp,head,embedding]")
CASES |= {f"{name}-lora": (*CASES[name], *LORA) for name in ("reward", "kto", "grpo", "ppo", "best_of_n", "distill")}


@pytest.fixture(scope="module")
def runs(tokenizer_runs, tmp_path_factory):
    """runs/ with networks of random weights: the stage sft of the run `tiny`, and of `large`, a teacher."""
    root = shutil.copytree(tokenizer_runs, tmp_path_factory.mktemp("post") / "runs")
    tokenizer = Tokenizer.load(root / "tiny" / "tokenizer" / "model")
    for seed, (run, depth) in enumerate({"tiny": 2, "large": 3}.items()):
        cfg = compose("train", "experiment=tiny", f"model.depth={depth}")
        net = GPT(model_config(cfg.model, cfg.arch, tokenizer.vocab_size)).init_weights(seed)
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=g))
        save_model_folder(root / run / "sft" / "model", net, tokenizer)
        write_manifest(root / run / "sft", {"status": "finished", "finished": "now", "stage": "sft"})
    return root


@pytest.fixture(scope="module")
def trained(runs, tmp_path_factory):
    """trained(strategy, n): runs/ in which all cases were trained twice by `n` processes, done once."""

    @cache
    def train(strategy: str, n: int):
        root, port = shutil.copytree(runs, tmp_path_factory.mktemp(strategy) / "runs"), free_port()
        layout = (f"strategy={strategy}", f"trainer.devices={n}")
        lines = {name: [*SMALL, f"stage={stage}", *own, *layout] for name, (stage, *own) in CASES.items()}
        file = root / "cases.json"
        file.write_text(json.dumps(lines))
        environments = [child_env(k, n, port) for k in range(n)] if n > 1 else [{}]
        command = (REPO / "tests" / "resumed_job.py", str(root), str(file))
        ended = finish(*(start_warm(*command, env=env, stdout=subprocess.DEVNULL) for env in environments))
        assert [status for status, *_ in ended] == [0] * n, ended
        return root

    return train


def weights(runs, run: str, stage: str) -> dict[str, torch.Tensor]:
    return load_file(runs / run / stage / "model" / "model.safetensors")


def losses(runs, case: str) -> list[float]:
    """Losses of the steps of a training that was left alone."""
    with open(runs / f"{case}-straight" / CASES[case][0] / "metrics.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("strategy", "n"), STRATEGIES)
def test_a_killed_stage_ends_as_one_left_alone(trained, strategy, n, case):
    runs, stage = trained(strategy, n), CASES[case][0]
    straight, killed, parent = (
        weights(runs, run, of) for run, of in ((f"{case}-straight", stage), (f"{case}-killed", stage), ("tiny", "sft"))
    )
    assert straight.keys() == killed.keys() and all(torch.equal(straight[key], killed[key]) for key in straight)
    assert any(not torch.equal(straight[key], parent[key]) for key in parent)
    assert table(runs / f"{case}-straight" / stage / "metrics.csv") == table(
        runs / f"{case}-killed" / stage / "metrics.csv"
    )
    assert len(losses(runs, case)) == 5


@pytest.mark.parametrize("case", DRAWS_NOTHING)
@pytest.mark.parametrize(("strategy", "n"), STRATEGIES[1:])
def test_stages_that_draw_nothing_make_the_steps_of_one_process(trained, strategy, n, case):
    assert losses(trained(strategy, n), case) == pytest.approx(losses(trained("single", 1), case), rel=1e-5)
