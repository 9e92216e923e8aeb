"""Stages of post-training, killed with several processes: they end as ones that were left alone, under every strategy.

Real trainings of a small network with random weights. They are held after a step between two updates of a rollout,
where the stage has such, and once its checkpoint is on the disk every process is killed.
"""

import csv
import shutil

import pytest
import torch
from chaos_trainings import table
from conftest import REPO, compose, run_cli
from holding import FOLDER, TESTS, held, hold_at
from processes import offspring_of, start_warm, wait_until
from safetensors.torch import load_file
from test_resume_chains import kill

from llm.checkpoint.model_folder import save_model_folder
from llm.checkpoint.resume import MANIFEST, checkpoint_path
from llm.model.gpt import GPT
from llm.run.stage_folder import write_manifest
from llm.scaling.rules import model_config
from llm.tokenizer.bpe import Tokenizer

pytestmark = pytest.mark.slow
SMALL = ("experiment=tiny", "trainer=cpu", "precision.compute=fp32", "save_every=1", "max_steps=5")
SMALL += ("stage.eval_every=4",)
PAIRS = ("stage.pairs_per_step=6", "stage.preferences=[politeness]", "data.preferences.politeness.size=40")
PAIRS += ("data.preferences.politeness.test_size=12", "batch.micro_batch_size=4")
FREE = ("stage.eval_examples=3", "stage.max_new_tokens=8")
ANSWERS = ("stage.prompts_per_step=3", "stage.max_new_tokens=8", "stage.reward=length", "stage.eval_examples=3")
ANSWERS += ("stage.reward_options={length: {words: 5}}", "stage.rehearsal=3", "batch.micro_batch_size=2")
TWICE = ("stage.updates_per_rollout=2",)
TAUGHT = ("stage.teacher=large/sft", "stage.rehearsal_weight=0.01")
CASES = {
    "reward": ("reward", *PAIRS),
    **{loss: ("dpo", *PAIRS, *FREE, f"stage.loss={loss}") for loss in ("dpo", "ipo", "orpo", "kto", "simpo")},
    "grpo": ("grpo", *ANSWERS, *TWICE, "stage.loss=dapo", "stage.kl=0.1", "stage.filter_equal=resample"),
    "ppo": ("ppo", *ANSWERS, "stage.kl=0.1"),
    "best_of_n": ("best_of_n", *ANSWERS, *TWICE, "stage.min_reward=0"),
    "distill": ("distill", *ANSWERS, *TWICE, *TAUGHT),
    "sampled": ("distill", *ANSWERS, *TAUGHT, "stage.divergence=sampled"),
    "offline": ("distill", *ANSWERS, *TWICE, *TAUGHT, "stage.source=data", "stage.divergence=forward_kl"),
}
SEVERAL = [("muon", 2), ("ddp", 2), ("fsdp", 2)]
STAGES = ("reward", "dpo", "kto", "grpo", "ppo", "best_of_n", "distill", "offline")
MATRIX = [
    *((case, "single", 1) for case in CASES),
    *((case, *how) for case in STAGES for how in SEVERAL),
    *((case, "fsdp", 3) for case in ("reward", "grpo", "ppo", "distill")),
]
ADAPTERS = [("reward", "muon", 2), ("dpo", "ddp", 2), ("ppo", "fsdp", 2), ("grpo", "ddp", 2), ("kto", "fsdp", 2)]
ADAPTERS += [("distill", "muon", 2), ("best_of_n", "fsdp", 2), ("ppo", "single", 1)]
DRAWS_NOTHING = ("reward", "dpo", "kto", "offline")  # trains the rows that one process trains
LORA = ("model.lora.rank=2", "model.lora.targets=[attention,mlp,head,embedding]")


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


def line(runs, case: str, run: str, strategy: str, n: int, *more: str) -> list[str]:
    stage, *own = CASES[case]
    layout = (f"strategy={strategy}", f"trainer.devices={n}", f"paths.runs={runs}", f"run={run}")
    return [*SMALL, f"stage={stage}", "init_from=tiny/sft", *own, *layout, *more, *hold_at(3)]


def train(*line: str) -> str:
    done = run_cli("train.py", *line, PYTHONPATH=TESTS)
    assert done.returncode == 0, done.stderr
    return done.stdout


def killed_after(step: int, n: int, folder, checkpoints, *line: str) -> None:
    """Train until every process stands behind a step and its checkpoint is on the disk; kill them all."""
    folder.mkdir()
    launcher = start_warm(REPO / "train.py", *line, env={"PYTHONPATH": TESTS, FOLDER: str(folder)})
    wait_until(lambda: all(held(folder, rank) for rank in range(n)), launcher)
    wait_until(lambda: checkpoint_path(checkpoints, step).name in (checkpoints / MANIFEST).read_text(), launcher)
    workers = offspring_of(launcher.pid)
    kill(launcher, [launcher.pid, *workers], workers)


def weights(runs, run: str, stage: str) -> dict[str, torch.Tensor]:
    return load_file(runs / run / stage / "model" / "model.safetensors")


def check(runs, tmp_path, case: str, strategy: str, n: int, *more: str) -> None:
    """Train alone and killed: the weights and metrics are the same, and have changed."""
    stage, name = CASES[case][0], "-".join((case, strategy, str(n), *(["lora"] if more else [])))
    straight, stopped = f"{name}-straight", f"{name}-killed"
    train(*line(runs, case, straight, strategy, n, *more))
    killed = line(runs, case, stopped, strategy, n, *more)
    killed_after(3, n, tmp_path / name, runs / stopped / stage / "checkpoints", *killed)
    assert "resuming at step 3 of 5" in train(*killed)
    a, b, parent = (weights(runs, run, of) for run, of in ((straight, stage), (stopped, stage), ("tiny", "sft")))
    assert all(torch.equal(a[key], b[key]) for key in a) and a.keys() == b.keys()
    assert any(not torch.equal(a[key], parent[key]) for key in parent)
    assert table(runs / straight / stage / "metrics.csv") == table(runs / stopped / stage / "metrics.csv")


def losses(runs, case: str, strategy: str, n: int) -> list[float]:
    """Losses of the steps of a training that was left alone."""
    with open(runs / f"{case}-{strategy}-{n}-straight" / CASES[case][0] / "metrics.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


@pytest.mark.parametrize(("case", "strategy", "n"), MATRIX)
def test_a_killed_stage_ends_as_one_left_alone(runs, tmp_path, case, strategy, n):
    check(runs, tmp_path, case, strategy, n)
    if case in DRAWS_NOTHING and (runs / f"{case}-single-1-straight").exists():
        assert losses(runs, case, strategy, n) == pytest.approx(losses(runs, case, "single", 1), rel=1e-5)


@pytest.mark.parametrize(("case", "strategy", "n"), ADAPTERS)
def test_so_does_an_adapter(runs, tmp_path, case, strategy, n):
    check(runs, tmp_path, case, strategy, n, *LORA)
