"""A run that cannot be lost: checkpoints on damaged and full disks, rows of metrics, bad losses, data that stalls."""

import json
import math
import resource
import shutil
import signal
import sys
import threading
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPO, run_cli
from processes import HANG, run, run_python, wait_until
from small_training import OPTIM, STAGE, STEPS, StopAt, fit, net, rows

from callbacks.cadence import Periodic
from callbacks.checkpoint import StepCheckpoint, check_same_weights
from callbacks.watch import LossGuard, slow_processes
from llm.checkpoint.resume import CheckpointWriter, HostCopy, inspect, list_checkpoints, newest_checkpoint
from llm.data.loader import StepLayout, StepLoader, TextSteps
from llm.errors import BadLoss, UserError
from llm.parallel import collectives
from llm.stages.step_module import StageContext, StepModule
from llm.stages.step_state import Votes
from llm.stages.trainer import roll_back


def checkpoint_of(step: int, n: int = 3) -> dict:
    """The parts of a checkpoint that a stage goes on from, with `n` weights."""
    states = [{"state": {}, "param_groups": []}]
    state = {"state_dict": {"w": torch.full((n,), float(step))}, "optimizer_states": states}
    return state | {"StepData": {"positions": [None]}, "global_step": step, "loops": {}}


@pytest.fixture
def saved(tmp_path):
    """Three checkpoints of one number each, steps 1 to 3."""
    writer = CheckpointWriter(keep=3)
    for step in (1, 2, 3):
        writer.save_checkpoint(checkpoint_of(step, 1000), tmp_path / f"step_{step:06d}.ckpt")
    writer.finish()
    return tmp_path


DAMAGED_ROWS = {
    "more cells than columns": ("\n4,", "\n4," + 20 * "1,"),
    "zeros of a lost page": ("\n4,", "\n" + "\0" * 9 + "\n4,"),
    "no letters of UTF-8": ("\n4,", "\n\udcff\n4,"),
    "numbers as a spreadsheet writes them": ("\n4,", "\n4.0,"),
}


@pytest.mark.parametrize("kind", DAMAGED_ROWS)
def test_a_damaged_row_of_metrics_stops_no_resume(tmp_path, kind):
    fit(tmp_path, extra=[StopAt(4)])
    path = tmp_path / "metrics.csv"
    before, after = DAMAGED_ROWS[kind]
    path.write_bytes(path.read_text().replace("\r", "").replace(before, after).encode(errors="surrogateescape"))
    fit(tmp_path, ckpt=newest_checkpoint(tmp_path / "checkpoints")[1])
    assert [row["step"] for row in rows(tmp_path)] == [str(step) for step in range(1, STEPS + 1)]


def test_metrics_without_steps_are_a_line(tmp_path):
    (tmp_path / "metrics.csv").write_text("loss\n1\n")
    with pytest.raises(UserError, match="no column step"):
        fit(tmp_path)


def flip(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("at", [0.0, 0.2, 0.5, 0.77, 1.0])
def test_a_flipped_bit_anywhere_makes_it_use_the_checkpoint_before(saved, at, caplog):
    flip(saved / "step_000003.ckpt", at)
    flip(saved / "step_000002.ckpt", at)
    assert newest_checkpoint(saved) == (1, saved / "step_000001.ckpt")
    assert caplog.text.count("is damaged (its checksum is wrong)") == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step_000003.ckpt": {"bytes": 1}}'])
def test_a_damaged_manifest_costs_a_warning_and_at_most_a_checkpoint(saved, text, caplog):
    (saved / "manifest.json").write_text(text)
    step, _ = newest_checkpoint(saved)
    assert step == (2 if "bytes" in text else 3) and caplog.text
    CheckpointWriter(3, False).save_checkpoint(checkpoint_of(4), saved / "step_000004.ckpt")
    assert newest_checkpoint(saved)[0] == 4 and "step_000004.ckpt" in json.loads((saved / "manifest.json").read_text())


def test_without_a_manifest_the_files_own_sums_are_checked(saved, caplog):
    (saved / "manifest.json").unlink()
    flip(saved / "step_000003.ckpt", 0.5)
    assert newest_checkpoint(saved)[0] == 2 and "not in the manifest, and the CRC of" in caplog.text


def test_a_checkpoint_that_was_not_listed_yet_is_used(saved):
    """Killed between the renaming and the manifest."""
    listed = json.loads((saved / "manifest.json").read_text())
    del listed["step_000003.ckpt"]
    (saved / "manifest.json").write_text(json.dumps(listed))
    assert newest_checkpoint(saved)[0] == 3


def test_the_newest_are_kept_and_listed(tmp_path):
    writer = CheckpointWriter(keep=2)
    (tmp_path / ".step_000000.ckpt.tmp").write_text("left by a crash")
    for step in range(1, 6):
        writer.save_checkpoint({"w": torch.zeros(5)}, tmp_path / f"step_{step:06d}.ckpt")
    writer.finish()
    names = {"step_000004.ckpt", "step_000005.ckpt"}
    assert {p.name for p in tmp_path.iterdir()} == names | {"manifest.json"}
    assert set(json.loads((tmp_path / "manifest.json").read_text())) == names


def test_a_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path):
    """The weights go on while it is written; buffers are used again; tied tensors stay one."""
    writer, w = CheckpointWriter(keep=9), torch.zeros(300_000)
    for step in range(4):
        w.fill_(step)
        state = {"w": w, "view": [w[:5], (w[:5], 3)], "tied": w, "size": torch.zeros(step), "name": "x"}
        writer.save_checkpoint(state, tmp_path / f"step_{step:06d}.ckpt")
        w.fill_(-1)
    writer.finish()
    for step, path in list_checkpoints(tmp_path):
        loaded = torch.load(path, weights_only=True)
        assert loaded["w"].eq(step).all() and loaded["view"][1][0].eq(step).all() and loaded["view"][1][1] == 3
        assert loaded["tied"].data_ptr() == loaded["w"].data_ptr() and len(loaded["size"]) == step
    copy = HostCopy()
    first = copy.of({"a": w})["a"]
    assert copy.of({"a": w})["a"].data_ptr() == first.data_ptr() != w.data_ptr()


def test_a_write_that_fails_in_the_thread_is_said_at_the_next_step(tmp_path):
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = CheckpointWriter()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        writer.save_checkpoint({"w": torch.zeros(100_000)}, tmp_path / "step_000003.ckpt")
        with pytest.raises(UserError, match="cannot write .*no earlier checkpoint exists"):
            wait_until(writer.check)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    writer.finish()  # said once
    assert not list(tmp_path.glob("*.ckpt"))


def test_inspect_tells_sound_from_damaged(tmp_path, capsys):
    run = tmp_path / "runs" / "a"
    fit(run / "pretrain")
    with pytest.raises(UserError, match="holds no stage"):
        inspect(run)
    (run / "pretrain" / "run.json").write_text('{"status": "running"}')
    assert inspect(run)
    out = capsys.readouterr().out
    assert "a/pretrain: running, metrics to step 6" in out and out.count("sound; 0.0 M weights") == 2
    flip(list_checkpoints(run / "pretrain" / "checkpoints")[-1][1], 0.3)
    done = run_cli("llm/checkpoint/__main__.py", str(run))
    assert done.returncode == 1 and done.stdout.count("DAMAGED: its checksum is wrong") == 1
    done = run_cli("llm/checkpoint/__main__.py")
    assert done.returncode == 2 and "the following arguments are required: run_dir" in done.stderr
    done = run_cli("llm/checkpoint/__main__.py", "--help")
    assert done.returncode == 0 and "run folder, such as runs/demo" in done.stdout


MEMORY = """
import threading, time, torch
from pathlib import Path
from llm.checkpoint.resume import load_checkpoint
from llm.optim import GroupOptimizer
def anonymous():
    return sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
net = torch.nn.Linear(4096, 4096, bias=False)
adamw = {"kind": "adamw", "lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-8}
optimizer = GroupOptimizer([adamw | {"params": list(net.parameters())}])
before, peak, done = anonymous(), 0.0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
loaded = load_checkpoint(Path(FILE))
net.load_state_dict(loaded["net"])
optimizer.load_state_dict(loaded["optimizer"])
del loaded
done = True
thread.join()
peak = max(peak, anonymous())  # if the thread had no time to look
assert all(not t.is_shared() for state in optimizer.state.values() for t in state.values())
print(peak - before)
"""


@pytest.mark.slow
def test_loading_takes_no_memory_beside_the_state(tmp_path):
    """64 MB of weights that are there already and 128 MB of state: the file is mapped, not read."""
    net = torch.nn.Linear(4096, 4096, bias=False)
    group = {"kind": "adamw", "params": list(net.parameters()), "lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-8}
    optimizer = torch.optim.AdamW(net.parameters())
    net.weight.grad = torch.zeros_like(net.weight)
    optimizer.step()
    state = {"state": optimizer.state_dict()["state"], "param_groups": [group | {"params": [0]}]}
    torch.save({"net": net.state_dict(), "optimizer": state}, tmp_path / "file")
    code = MEMORY.replace("FILE", repr(str(tmp_path / "file")))
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert 120 < float(done.stdout) < 128 + 16


# ---- when ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_also_written_by_the_clock(tmp_path):
    fit(tmp_path / "never", save_every=1000)
    assert [step for step, _ in list_checkpoints(tmp_path / "never" / "checkpoints")] == [STEPS]
    fit(tmp_path / "often", save_every=1000, minutes=1e-9)
    assert [step for step, _ in list_checkpoints(tmp_path / "often" / "checkpoints")] == [STEPS - 1, STEPS]


def test_the_clock_of_checkpoints_begins_anew_with_each(tmp_path, monkeypatch):
    clock, saved = SimpleNamespace(now=0.0), []
    monkeypatch.setattr("callbacks.checkpoint.time", SimpleNamespace(monotonic=lambda: clock.now))
    module, callback = SimpleNamespace(net=net(), global_step=3, votes=Votes()), StepCheckpoint(1000, tmp_path, 1.0)
    trainer = SimpleNamespace(save_checkpoint=saved.append)
    callback.on_train_start(trainer, module)
    wishes = []
    for clock.now in (59.0, 61.0, 100.0, 122.0):
        callback.on_train_batch_start(trainer, module, None, 0)
        wishes.append(module.votes.checkpoint)
        if module.votes.checkpoint:
            module.global_step += 1
            callback.act(trainer, module, module.global_step)
    assert wishes == [False, True, False, True]
    assert [path.name for path in saved] == ["step_000004.ckpt", "step_000005.ckpt"]


class Bits(Periodic):
    """An evaluation that can be told from others."""

    def __init__(self, every: int, at_start: bool):
        super().__init__(every, at_start)

    def act(self, trainer, module, step):
        module.row["bpb"] = sum(p.detach().sum().item() for p in module.net.parameters())


RARELY = {"log_every": 4, "save_every": 1}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a training that nobody stopped: rows every 4 steps, evaluations every 3."""
    folder = tmp_path_factory.mktemp("straight")
    fit(folder, extra=[Bits(3, True)], **RARELY)
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """killed(step): the folder of such a training that was killed after the step; to be copied."""

    @cache
    def make(step: int) -> Path:
        folder = tmp_path_factory.mktemp("killed")
        fit(folder, extra=[Bits(3, True), StopAt(step)], **RARELY)
        return folder

    return make


@pytest.mark.parametrize("killed_at", range(1, STEPS + 1))  # the last: before the stage is handed over
@pytest.mark.parametrize("row_written", [True, False])
def test_a_row_that_a_kill_cost_is_written_again(straight, killed, tmp_path, killed_at, row_written):
    """Killed right before or after the row of the checkpoint's step."""
    shutil.copytree(killed(killed_at), tmp_path / "killed")
    path = tmp_path / "killed" / "metrics.csv"
    lines = path.read_text().splitlines(keepends=True)
    if not row_written and lines[-1].startswith(f"{killed_at},"):
        path.write_text("".join(lines[:-1]) + lines[-1][:5])
    _, newest = newest_checkpoint(tmp_path / "killed" / "checkpoints")
    fit(tmp_path / "killed", extra=[Bits(3, True)], ckpt=newest, **RARELY)
    folders = (straight, tmp_path / "killed")
    tables = [[{k: v for k, v in row.items() if k not in TIMES} for row in rows(folder)] for folder in folders]
    assert tables[0] == tables[1] and [row["step"] for row in tables[0]] == ["0", "3", "4", "6"]
    assert [list(row) for row in tables[0]] == [list(row) for row in tables[1]]


TIMES = {"tok_per_s", "ms_per_step", "mfu", "data_wait", "seconds"}


# ---- watchdogs ------------------------------------------------------------------------------------------------------


def test_a_loss_that_jumps_is_bad_only_after_a_while():
    module = StepModule(net(), OPTIM, STAGE, StageContext("sft", None, torch.ones(70), STEPS, 8, loss_jump=2.0))
    for loss in [10.0, 1.0] * 25:
        module.loss_watch.check(loss, 1)
    module.loss_watch.check(7.4, 1)
    module.loss_watch.recent.extend([1.0] * 50)
    module.loss_watch.check(2.9, 1)
    with pytest.raises(BadLoss, match=r"jumped from 1.000 to 3.100 in step 1, by more than watch.loss_jump=2.0"):
        module.loss_watch.check(3.1, 1)
    checkpoint = {"state_dict": {}}
    module.on_save_checkpoint(checkpoint)
    again = StepModule(net(), OPTIM, STAGE, module.context)
    again.on_load_checkpoint(checkpoint)
    assert again.loss_watch.recent == module.loss_watch.recent and again.loss_watch.recent.maxlen == 50


def test_training_goes_back_and_leaves_bad_data_out(tmp_path, monkeypatch, tiny_config, capsys):
    """Step 5 of 6 is bad, the checkpoint before is of step 4: what remains is trained on the data after step 5."""
    from llm.stages import run_stage as llm_trainer
    from llm.stages import step_module as step_file

    llm_trainer.run_stage(tiny_config("tokenizer"))
    real = step_file.StepModule.checked_sum
    seen = []

    def checked_sum(self, losses, batch, n_trained):
        ids = batch["micro"][0]["inputs"]
        bad = int(ids.sum()) == seen[4] if len(seen) > 4 else False
        if len(seen) < 6:
            seen.append(int(ids.sum()))
            bad = len(seen) == 5
        return real(self, [loss * float("nan") for loss in losses] if bad else losses, batch, n_trained)

    monkeypatch.setattr(step_file.StepModule, "checked_sum", checked_sum)
    common = ("max_steps=6", "stage.sample_every=0", "init_from=tiny/tokenizer")
    with pytest.raises(UserError, match="became nan in step 5, micro-batch 0.*roll_back.*step 4 was saved"):
        llm_trainer.run_stage(tiny_config("pretrain", *common, "run=stops"))
    seen.clear()
    cfg = tiny_config("pretrain", *common, "run=back", "watch.bad_loss=roll_back")
    llm_trainer.run_stage(cfg)
    out = capsys.readouterr().out
    assert "in step 5, micro-batch 0: back to step 4, leaving out 1 steps of data" in out
    folder = Path(cfg.paths.runs) / "back" / "pretrain"
    assert json.loads((folder / "rollbacks.json").read_text()) == {"count": 1, "left_out": {"4": 1}}
    with pytest.raises(UserError, match=r"rolled back 1 times before \(watch.rollbacks=1\)"):
        roll_back(folder, BadLoss(6, "the loss", False), 1)


@pytest.mark.parametrize(("saves", "finite"), [(True, False), (True, True), (False, False)])
def test_a_bad_step_is_saved_before_only_where_training_stops_at_it(saves, finite, tmp_path):
    saved = []
    checkpoint = SimpleNamespace(save_now=lambda trainer, module: saved.append(module.global_step))
    error, module = BadLoss(5, "the loss is bad", finite), SimpleNamespace(net=net(), global_step=4)
    LossGuard(checkpoint, tmp_path, saves).on_exception(None, module, error)
    is_saved = saves and not finite
    assert saved == [4] * is_saved and str(error).endswith("; step 4 was saved") == is_saved


def test_data_left_out_is_that_of_the_steps():
    class Source:
        def iterate(self, split, cursor, rank, world, loop):
            start = 0 if cursor is None else cursor["index"]
            for i in range(start, 10**6):
                yield f"document {i} " * (1 + i % 5), {"index": i + 1}

    def loader(**more):
        return TextSteps(Source(), Words(), StepLayout(16, 2, 2), buffer=8, **more)

    steps = loader().steps()
    all_steps = [next(steps) for _ in range(6)]
    skipped = loader(state=all_steps[1]["state"]())
    skipped.skip(3)
    step = next(skipped.steps())
    for ours, theirs in zip(step["micro"], all_steps[5]["micro"], strict=True):
        assert torch.equal(ours["inputs"], theirs["inputs"])


class Words:
    """A tokenizer of words."""

    bos_id = 0

    @staticmethod
    def encode_document(text):
        return np.array([0, *(1 + hash(word) % 50 for word in text.split())], np.int32)


def test_data_that_does_not_come_is_named(monkeypatch, caplog):
    come = threading.Event()

    class Slow(StepLoader):
        def steps(self):
            come.wait()
            yield {"state": {}}

    monkeypatch.setattr("llm.data.loader.NEWS_SECONDS", 0.1)
    slow = iter(Slow(StepLayout(8, 1, timeout_s=0.35)))
    with pytest.raises(UserError, match=r"no training data for 0 s \(watch.data_seconds\)"):
        next(slow)
    assert caplog.text.count("process 0 waits for training data since 0 s") == 4
    come.set()
    assert next(iter(Slow(StepLayout(8, 1, timeout_s=HANG)))) == {"state": {}}


def test_a_slow_process_is_named(monkeypatch):
    monkeypatch.setattr(collectives, "all_gather_object", lambda mine: [mine, (100.0, "a"), (180.0, "b"), (90.0, "a")])
    assert slow_processes(110.0, 1.5) == "slow processes: process 2 on b 180 ms; the others 100 ms a step"
    assert slow_processes(110.0, 2.0) is None
    params = {"a": torch.zeros(4), "b": torch.zeros(4)}
    monkeypatch.setattr(collectives, "all_gather_object", lambda mine: [mine, mine, [mine[0], mine[1] + 1]])
    with pytest.raises(UserError, match="after step 7 process 2 holds other weights than process 0.*first b"):
        check_same_weights(params, 7)


def test_weights_that_have_come_apart_are_never_saved(monkeypatch, tmp_path):
    saved = []
    trainer = SimpleNamespace(strategy=None, save_checkpoint=saved.append)
    module = SimpleNamespace(net=torch.nn.Linear(2, 2), global_step=3)
    checkpoint = StepCheckpoint(10, tmp_path)
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(collectives, "all_gather_object", lambda mine: [mine, [one + 1 for one in mine]])
    with pytest.raises(UserError, match="after step 3 process 1 holds other weights"):
        checkpoint.on_train_end(trainer, module)  # a callback ended the training between two planned checkpoints
    assert saved == []
    monkeypatch.setattr(collectives, "all_gather_object", lambda mine: [mine, mine])
    checkpoint.on_train_end(trainer, module)
    assert len(saved) == 1


class Spoils(StepModule):
    """A gradient that is not finite in step 3, beside a finite loss."""

    def passes(self, *args):
        losses = super().passes(*args)
        if self.global_step == 2:
            self.net.lm_head.weight.grad[0, 0] = float("inf")
        return losses


def test_weights_that_a_gradient_has_spoilt_are_never_saved(tmp_path):
    def spoilt():
        words = SimpleNamespace(decode=str)
        return Spoils(net(), OPTIM, STAGE, StageContext("pretrain", words, torch.ones(70), STEPS, 8))

    with pytest.raises(UserError, match="weights of step 3 are not finite .first lm_head.weight.*Nothing was saved"):
        fit(tmp_path / "a", module=spoilt(), save_every=1)
    assert [step for step, _ in list_checkpoints(tmp_path / "a" / "checkpoints")] == [1, 2]
    module, checkpoint = spoilt(), StepCheckpoint(100, tmp_path / "b" / "checkpoints")
    with pytest.raises(BadLoss, match="loss became nan in step 4.*weights of step 3 are not finite either, so nothing"):
        fit(tmp_path / "b", module=module, save_every=100, extra=[LossGuard(checkpoint, tmp_path)])
    assert list_checkpoints(tmp_path / "b" / "checkpoints") == []


@pytest.mark.slow
def test_nothing_is_lost_when_trainings_are_killed(tmp_path):
    """`make chaos` in small: a training of every stage stopped once, one of them on two processes; two other faults."""
    cases = ("pretrain, 1 proc., mixture", "midtrain, 1 proc., local", "sft, 2 proc.", "grpo, 1 proc., local")
    chosen = ("--kills", "1", "--folder", str(tmp_path), "--only", *cases, "flipped_bits", "twins_at_once")
    done = run(sys.executable, str(REPO / "tests" / "chaos.py"), *chosen, hang=8 * HANG)  # minutes of work
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "| **all** |" in done.stdout


@pytest.mark.parametrize("part", ["state_dict", "optimizer_states", "StepData", "global_step", "loops"])
def test_a_readable_checkpoint_that_lacks_a_part_is_skipped(saved, part, caplog):
    content = checkpoint_of(3)
    del content[part]
    CheckpointWriter(3, False).save_checkpoint(content, saved / "step_000003.ckpt")
    assert newest_checkpoint(saved) == (2, saved / "step_000002.ckpt") and part in caplog.text


def test_the_step_is_the_one_in_the_file(saved):
    CheckpointWriter(3, False).save_checkpoint(checkpoint_of(2), saved / "step_000009.ckpt")
    assert newest_checkpoint(saved)[0] == 2


def test_a_bad_loss_of_another_process_is_named_with_its_file(monkeypatch, tmp_path):
    module = StepModule(net(), OPTIM, STAGE, StageContext("pretrain", None, torch.ones(70), STEPS, 8))
    monkeypatch.setattr(collectives, "world_size", lambda: 3)
    monkeypatch.setattr(collectives, "all_reduce_sum", lambda values: [math.nan, *values[1:]])
    monkeypatch.setattr(collectives, "all_gather_object", lambda own: [own, [1, 2], [0]])
    with pytest.raises(
        BadLoss, match="in step 1, micro-batch 1 of process 1, micro-batch 0 of process 2: lower"
    ) as bad:
        module.checked_sum([torch.tensor(1.0)], {}, 1)
    theirs = tmp_path / "bad_loss_step_1_process_1.txt"
    monkeypatch.setattr(collectives, "all_gather_object", lambda own: [own, theirs, None])
    LossGuard(None, tmp_path, saves=False).on_exception(None, module, bad.value)
    assert bad.value.args[0].endswith(f"; its text is in {theirs}")
