"""Several processes on one machine (gloo): the same weights as one process, one reader of every document, one end."""

import os
import shutil
import signal
import subprocess
from functools import cache
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import REPO, run_cli
from holding import FOLDER, TESTS, held, hold_at
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.accelerators import CPUAccelerator
from processes import children_of, finish, is_alive, start_warm, wait_until

from llm.checkpoint.model_folder import load_model_folder
from llm.checkpoint.resume import CheckpointWriter, load_checkpoint
from llm.data.documents import walk
from llm.data.loader import positions_for
from llm.data.packing import BestFit, BestFitCrop, BestFitPad, Document, Stream, deal
from llm.parallel.launch import child_env, free_port
from llm.parallel.muon_zero2 import BUCKET_BYTES, OTHER_BUCKET_BYTES, even_shares
from llm.parallel.strategy import FSDPStrategy, MuonStrategy, SummingDDPStrategy

KINDS = ("pretrain", "clipped", "sft", "grpo", "reward", "dpo", "ppo", "distill")
USUAL = (*KINDS, "lora")
MORE = ("policy", "best_of_n", "forward_kl", "sampled", "ipo", "orpo", "kto", "simpo")
SWITCHED = ("ngrams", "switched", "ramped")  # what is off by default, by kinds of step
ADAPTERS = tuple(f"{kind}-lora" for kind in ("reward", "dpo", "kto", "ppo", "policy", "distill", "best_of_n"))


def job(n: int, strategy: str, folder, kinds, checkpoint=None) -> dict[str, dict]:
    """Results of distributed_job.py with `n` processes, by kind of step."""
    script, port = REPO / "tests" / "distributed_job.py", free_port()
    environments = [child_env(k, n, port) for k in range(n)] if n > 1 else [{}]
    command = (script, strategy, str(folder), ",".join(kinds), *([] if checkpoint is None else [str(checkpoint)]))
    processes = [start_warm(*command, env=env, stdout=subprocess.DEVNULL) for env in environments]
    ended = finish(*processes)
    assert [status for status, *_ in ended] == [0] * n, ended
    return {kind: torch.load(folder / f"{kind}.pt") for kind in kinds}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(strategy, n, *kinds): folder and results of 4 steps of each of these kinds (else the usual), run once."""

    @cache
    def run(strategy: str, n: int, *kinds: str):
        folder = tmp_path_factory.mktemp(strategy)
        return folder, job(n, strategy, folder, kinds or USUAL)

    return run


@pytest.mark.parametrize("kind", [MuonStrategy, SummingDDPStrategy, FSDPStrategy])
def test_the_checkpoint_under_way_is_awaited_at_the_end(kind, monkeypatch):
    """A training under fsdp that was stopped ended while its last checkpoint was being written, and lost it."""
    writer, awaited = CheckpointWriter(), []
    monkeypatch.setattr(writer, "teardown", lambda: awaited.append(True))
    strategy = kind()
    strategy.accelerator, strategy.checkpoint_io = CPUAccelerator(), writer
    strategy.cluster_environment = LightningEnvironment()
    strategy.teardown()
    assert awaited == [True]


@pytest.mark.parametrize(
    ("n", "strategy"),
    [
        *((2, name) for name in ("muon", "ddp", "fsdp")),
        *(pytest.param(3, name, marks=pytest.mark.slow) for name in ("muon", "ddp", "fsdp")),
    ],
)
def test_processes_train_the_weights_of_one(trained, n, strategy):
    """Four steps on full rows, uneven masks, and uneven lengths in uneven numbers of micro-batches."""
    (_, alone), (_, results) = trained("auto", 1), trained(strategy, n)
    for kind in KINDS:
        for name, weight in alone[kind]["weights"].items():
            torch.testing.assert_close(results[kind]["weights"][name], weight, atol=1e-7, rtol=0)
        assert results[kind]["tokens"] == alone[kind]["tokens"]
        assert results[kind]["measured"] == alone[kind]["measured"]
        shares = [held / alone[kind]["held"][0] for held in results[kind]["held"]]
        assert shares == [1.0] * n if strategy == "ddp" else max(shares) < 1 / n + 0.01
        assert strategy == "fsdp" or results[kind]["noticed"]


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_sums_that_begin_during_the_backward_pass_are_the_same(trained, n):
    """Also where processes have uneven numbers of micro-batches."""
    kinds = ("clipped", "grpo", "ngrams")
    (_, early), (_, late) = trained("muon-early", n, *kinds), trained("muon", n, *kinds)
    assert all(same_weights(early[kind]["weights"], late[kind]["weights"]) for kind in kinds)


@pytest.mark.slow
def test_sums_that_begin_during_the_backward_pass_are_the_same_after_a_resume(trained, tmp_path):
    """The order in which they begin is found anew, which changes no sum."""
    folder, resumed = trained("muon-early", 2, "grpo")[0] / "grpo", []
    for strategy in ("muon", "muon-early"):
        (tmp_path / strategy).mkdir()
        resumed.append(job(2, strategy, tmp_path / strategy, ("grpo",), folder / "step_000002.ckpt")["grpo"]["weights"])
    assert same_weights(*resumed)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["muon", "ddp", "fsdp"])
@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("kinds", [MORE, ADAPTERS], ids=["losses", "adapters"])
def test_processes_train_the_weights_of_one_in_every_stage(trained, kinds, n, strategy):
    """Further losses, and an adapter of every stage."""
    (_, alone), (_, results) = trained("auto", 1, *kinds), trained(strategy, n, *kinds)
    for kind in kinds:
        for name, weight in alone[kind]["weights"].items():
            torch.testing.assert_close(results[kind]["weights"][name], weight, atol=1e-7, rtol=0, msg=f"{kind} {name}")
        assert results[kind]["tokens"] == alone[kind]["tokens"]
        assert strategy == "fsdp" or results[kind]["noticed"]


@pytest.mark.parametrize("strategy", ["muon", "ddp", "fsdp"])
def test_processes_train_the_adapter_of_one(trained, strategy):
    """Its small parts are updated everywhere, so only fsdp keeps state in shares; the base stays as it was."""
    (folder, alone), (others, results) = trained("auto", 1), trained(strategy, 2)
    for name, weight in alone["lora"]["weights"].items():
        torch.testing.assert_close(results["lora"]["weights"][name], weight, atol=1e-7, rtol=0)
    for path in (folder, others):
        saved = load_checkpoint(path / "lora" / "step_000002.ckpt")["state_dict"]
        assert {name.rpartition(".")[2] for name in saved} == {"lora_A", "lora_B"}
        assert all(weight.any() for name, weight in saved.items() if name.endswith("lora_B"))


@pytest.mark.parametrize(("strategy", "other"), [("muon", "ddp"), pytest.param("ddp", "muon", marks=pytest.mark.slow)])
def test_processes_hand_over_the_average_of_one(trained, strategy, other, tmp_path):
    """Also one that went on, under another strategy, from a checkpoint of half the steps."""
    (_, alone), (folder, results) = trained("auto", 1, "averaged"), trained(strategy, 2, "averaged")
    (tmp_path / "resumed").mkdir()
    checkpoint = folder / "averaged" / "step_000002.ckpt"
    resumed = job(2, other, tmp_path / "resumed", ("averaged",), checkpoint)
    for name, weight in alone["averaged"]["weights"].items():
        torch.testing.assert_close(results["averaged"]["weights"][name], weight, atol=1e-7, rtol=0)
        torch.testing.assert_close(resumed["averaged"]["weights"][name], weight, atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("strategy", "other"),
    [("muon", "auto"), *(pytest.param(*of, marks=pytest.mark.slow) for of in (("ddp", "muon"), ("fsdp", "ddp")))],
)
def test_processes_train_the_tables_and_copies_of_one(trained, strategy, other, tmp_path):
    """Rows that a step does not use stand still with their state; also in one that went on under another strategy."""
    (_, alone), (folder, results) = trained("auto", 1, *SWITCHED), trained(strategy, 2, *SWITCHED)
    checkpoint = folder / "ngrams" / "step_000002.ckpt"
    resumed = job(1 if other == "auto" else 2, other, tmp_path, ("ngrams",), checkpoint)
    table = alone["ngrams"]["weights"]["ngrams.tables.3.weight"]
    assert 0 < (table != 0).any(1).float().mean() < 1
    assert all(
        alone["ngrams"]["weights"][f"copies.{place}.{name}"].any() for place in "01" for name in ("scale", "bias")
    )
    for name, weight in alone["ngrams"]["weights"].items():
        torch.testing.assert_close(results["ngrams"]["weights"][name], weight, atol=1e-7, rtol=0, msg=name)
        torch.testing.assert_close(resumed["ngrams"]["weights"][name], weight, atol=1e-7, rtol=0, msg=name)


@pytest.mark.parametrize("strategy", ["muon", pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_switches_of_objective_and_heads_train_as_in_one_process(trained, strategy):
    alone, found = (trained(*of, *SWITCHED)[1]["switched"]["weights"] for of in (("auto", 1), (strategy, 2)))
    for name, weight in alone.items():
        torch.testing.assert_close(found[name], weight, atol=1e-7, rtol=0)


@pytest.mark.parametrize("strategy", ["muon", pytest.param("ddp", marks=pytest.mark.slow)])
def test_blocks_that_run_twice_train_as_in_one_process(trained, strategy):
    alone, found = (trained(*of, "looped")[1]["looped"]["weights"] for of in (("auto", 1), (strategy, 2)))
    for name, weight in alone.items():
        torch.testing.assert_close(found[name], weight, atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("strategy", "other"), [("muon", "auto"), ("fsdp", "ddp"), pytest.param("ddp", "muon", marks=pytest.mark.slow)]
)
def test_steps_that_grow_train_as_in_one_process(trained, strategy, other, tmp_path):
    """Also one that went on, under another strategy, from a checkpoint amid the ramp."""
    (_, alone), (folder, results) = trained("auto", 1, *SWITCHED), trained(strategy, 2, *SWITCHED)
    checkpoint = folder / "ramped" / "step_000002.ckpt"
    resumed = job(1 if other == "auto" else 2, other, tmp_path, ("ramped",), checkpoint)
    assert alone["ramped"]["tokens"] == (2 + 4 + 6 + 6) * 2 * 24
    for found in (results, resumed):
        assert found["ramped"]["tokens"] == alone["ramped"]["tokens"]
        for name, weight in alone["ramped"]["weights"].items():
            torch.testing.assert_close(found["ramped"]["weights"][name], weight, atol=1e-7, rtol=0, msg=name)


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_muon_sends_no_more_than_the_gradients_and_the_weights(trained, n):
    """A reduce-scatter of the gradients and an all-gather of the weights, but for what pads uneven shares."""
    results = trained("muon", n)[1]
    for kind in KINDS:
        assert 2 <= results[kind]["sent"] / sum(w.numel() for w in results[kind]["weights"].values()) < 2.1


@pytest.mark.parametrize(("saved", "strategy", "n"), [("fsdp", "auto", 1), ("muon", "fsdp", 2)])
def test_a_checkpoint_of_one_strategy_goes_on_under_another(trained, saved, strategy, n, tmp_path):
    checkpoint = trained(saved, 2)[0] / "pretrain" / "step_000002.ckpt"
    weights = job(n, strategy, tmp_path, ("pretrain",), checkpoint)["pretrain"]["weights"]
    for name, weight in trained("auto", 1)[1]["pretrain"]["weights"].items():
        torch.testing.assert_close(weights[name], weight, atol=1e-7, rtol=0)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_matrices_are_dealt_out_evenly(world):
    params = [torch.empty(256, 256, device="meta")] * 16 + [torch.empty(1024, 256, device="meta")] * 8
    buckets = even_shares(params, world)
    loads = [sum(p.numel() for owned in buckets for p in owned[k]) for k in range(world)]
    total = sum(p.numel() for p in params)
    assert sum(loads) == total and max(loads) <= 1.1 * total / world
    travelling = sum(world * max(sum(p.numel() for p in share) for share in owned) for owned in buckets)
    assert travelling <= 1.1 * total  # what is summed and sent, padding included
    for device, limit in (("cpu", BUCKET_BYTES["cpu"]), ("meta", OTHER_BUCKET_BYTES)):
        many = [torch.empty(512, 512, device=device)] * 70
        sizes = [4 * sum(p.numel() for share in owned for p in share) for owned in even_shares(many, 2)]
        assert limit / 2 < sizes[0] == max(sizes) <= limit and len(sizes) > 1


# ---- the number of processes changes --------------------------------------------------------------------------------


def documents(n: int = 400):
    return [f"document {i}" for i in range(n)]


def read(cursor, rank: int, world: int, count: int):
    found = islice(walk([0], lambda shard, row: iter(documents()[row:]), cursor, rank, world, False, "here"), count)
    return list(found)


@pytest.mark.parametrize("worlds", [(2, 3, 1), (3, 1, 2), (1, 4, 3)])
def test_every_document_is_read_once_whatever_the_ranks(worlds):
    positions, seen = [None] * worlds[0], []
    for stage, world in enumerate(worlds):
        positions = positions_for(positions, world) if stage else positions
        moved = []
        for rank, position in enumerate(positions):
            count = 1000 if stage == len(worlds) - 1 else 20 + 13 * rank
            got = read(None if position is None else position["cursor"], rank, world, count)
            seen += [text for text, _ in got]
            cursor = got[-1][1] if got else position["cursor"]
            moved.append({"cursor": cursor, "packer": BestFitCrop(8).state_dict(), "rank": rank, "world": world})
        positions = moved
    assert sorted(seen) == sorted(documents())


@pytest.mark.parametrize("packer", [BestFit, BestFitCrop, BestFitPad, Stream])
def test_what_waits_is_dealt_out_whole(packer):
    rng, states, lengths = np.random.default_rng(0), [], []
    for _ in range(3):
        p = packer(32, buffer=20)
        sizes = rng.integers(1, 32, 20)
        feed = (Document(np.full(n, n, np.int32), np.ones(n, bool)) for n in sizes)
        p._refill(feed)
        lengths += sizes[: len(p)].tolist()
        p.placed = 5
        states.append(p.state_dict())
    dealt = deal(states, 2)
    assert sorted(n for state in dealt for n in state["lengths"]) == sorted(lengths)
    assert [state["placed"] for state in dealt] == [15, 0]
    for state in dealt:
        p = packer(32, buffer=1)
        p.load_state_dict(state)
        assert len(p) == len(state["lengths"])
        assert all((d.ids == len(d.ids)).all() and len(d.ids) == len(d.mask) for d in p._waiting.values())


# ---- from the command line ------------------------------------------------------------------------------------------

TINY = ("experiment=tiny", "batch.tokens_per_step=1024", "trainer=cpu", "trainer.devices=2", "precision.compute=fp32")


def tiny(root, *args: str, **options):
    return run_cli("train.py", *TINY, f"paths.runs={root}", *args, PYTHONPATH=TESTS, **options)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_runs, tmp_path_factory):
    """runs/ with a tokenizer of the run `tiny`."""
    return shutil.copytree(tokenizer_runs, tmp_path_factory.mktemp("strategies") / "runs")


def columns(root, run: str) -> list[tuple]:
    """The rows of metrics.csv without what the clock says."""
    lines = [line.split(",") for line in (root / run / "pretrain" / "metrics.csv").read_text().splitlines()]
    timed = {lines[0].index(name) for name in ("tok_per_s", "ms_per_step", "mfu", "data_wait", "seconds")}
    return [tuple(cell for i, cell in enumerate(line) if i not in timed) for line in lines]


LONG = ("stage=pretrain", "init_from=tiny/tokenizer", "max_steps=14", "stage.eval_every=5", "stage.sample_every=0")
LONG += (*hold_at(7),)


def start_training(root, run: str, folder, *args: str):
    """The launcher of a training of two processes that stands still after step 7."""
    env = {"PYTHONPATH": TESTS, FOLDER: str(folder)}
    launcher = start_warm(REPO / "train.py", *TINY, f"paths.runs={root}", *LONG, f"run={run}", *args, env=env)
    wait_until(lambda: held(folder, 0) and held(folder, 1), launcher)
    return launcher


def test_two_processes_resume_bit_for_bit(tokenizer, tmp_path):
    straight = tiny(tokenizer, *LONG, "run=straight", fresh=True)
    assert straight.returncode == 0 and straight.stdout.count("straight/pretrain finished") == 1, straight.stderr
    launcher = start_training(tokenizer, "killed", tmp_path)
    workers = children_of(launcher.pid)
    assert len(workers) == 2
    launcher.kill()
    wait_until(lambda: not any(map(is_alive, workers)))  # the system tells them to stop: they save and end
    assert launcher.wait() == -signal.SIGKILL
    resumed = tiny(tokenizer, *LONG, "run=killed")
    assert resumed.returncode == 0 and "resuming at step" in resumed.stdout, resumed.stderr
    assert columns(tokenizer, "killed") == columns(tokenizer, "straight")
    a, b = (
        (tokenizer / run / "pretrain" / "model" / "model.safetensors").read_bytes() for run in ("straight", "killed")
    )
    assert a == b


def test_a_stopped_training_goes_on_with_another_number_of_processes(tokenizer, tmp_path):
    launcher = start_training(tokenizer, "moved", tmp_path, "strategy=fsdp")
    launcher.send_signal(signal.SIGTERM)
    ((status, *_),) = finish(launcher)
    assert status == 128 + signal.SIGTERM
    resumed = tiny(tokenizer, *LONG, "run=moved", "trainer.devices=1")
    assert resumed.returncode == 0 and "resuming at step 8 of 14" in resumed.stdout, resumed.stderr
    assert columns(tokenizer, "moved")[-1][0] == "14"
    # what generates, evaluates and saves under fsdp needs whole weights
    done = tiny(tokenizer, "strategy=fsdp", "stage=grpo", "init_from=moved/pretrain", "run=moved", "max_steps=1")
    assert done.returncode == 0 and "pass@1" in done.stdout, done.stderr
    before, after = (load_model_folder(tokenizer / "moved" / s / "model")[0].head_weight for s in ("pretrain", "grpo"))
    assert before.shape == after.shape and (before - after).abs().max() < 0.1


@pytest.mark.parametrize("when", ["starting", "training"])
def test_a_dead_process_ends_the_training(tokenizer, when):
    """One that dies before the processes have met leaves the first one waiting for it."""
    run = f"dead-{when}"
    line = [*TINY, f"paths.runs={tokenizer}", *LONG, f"run={run}", "max_steps=100000", "compile=false"]
    launcher = start_warm(REPO / "train.py", *line, env={"PYTHONPATH": TESTS})
    if when == "training":
        wait_until(lambda: list((tokenizer / run).glob("pretrain/checkpoints/*.ckpt")), launcher)
    wait_until(lambda: len(children_of(launcher.pid)) == 2, launcher)
    os.kill(children_of(launcher.pid)[-1], signal.SIGKILL)
    ((status, _, errors),) = finish(launcher)
    assert status == 128 + signal.SIGKILL and "was ended by SIGKILL" in errors


def test_a_mistake_is_said_once(tokenizer):
    done = tiny(tokenizer, "stage=pretrain", "init_from=tiny/tokenizer", "run=odd", "batch.tokens_per_step=512")
    assert done.returncode == 2 and done.stderr.count("error:") == 1 and "x devices = 4 x 128 x 2" in done.stderr
    done = tiny(tokenizer, "stage=pretrain", "init_from=tiny/tokenizer", "run=odd", "strategy=single")
    assert done.returncode == 2 and "strategy=single: there are 2 processes" in done.stderr
