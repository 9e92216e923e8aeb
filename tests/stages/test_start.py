"""What a stage says when it begins: six lines, what differs from the defaults, and the whole with verbose=true."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import compose, run_cli

from callbacks.stopwatch import Stopwatch
from llm.cli.changes import changes
from llm.cli.compose import compose_all
from llm.config.said import note_origin
from llm.scaling.duration import Estimate
from llm.scaling.machine import Parts, earlier_runs
from llm.stages import start
from llm.stages.expect import Expected, expect, measured_tokens, note, work_of
from llm.stages.plan import held_out_tokens
from llm.stages.run_stage import run_stage
from llm.stages.shape import set_arch, set_model
from llm.stages.start import data_words, gpu_words, held_out_words, labelled, step_words, time_words
from llm.utils.format import amount

DERIVED = {
    "windows": "full full",
    "n_embd": 128,
    "n_head": 1,
    "seq_len": 128,
    "params_total": 540_713,
    "params_blocks": 393_228,
}
DERIVED |= {"flops_per_token": 3_000_000, "micro_batches": 2, "tokens_per_step": 1024, "steps": 10}
DERIVED |= {"planned_tokens": 10_240}


def composed(*lines):
    """Compose as an entry point does: with a note of what the configuration consists of."""
    cfg, own = compose_all("train", lines)
    from llm.cli.options import OURS

    note_origin(cfg, "train", own["runtime"]["choices"], OURS)
    return cfg


@pytest.fixture
def runs(tokenizer_runs, tmp_path, monkeypatch):
    """runs/ with a tokenizer, and a machine of which nothing is known."""
    monkeypatch.setenv("FATHOM_MACHINE", str(tmp_path / "machine.json"))
    shutil.copytree(tokenizer_runs, tmp_path / "runs")
    return tmp_path / "runs"


def lines_of(out: str) -> dict[str, str]:
    """Return the labelled lines of a start."""
    found = (
        re.match(r"(model|machine|parent|data|steps|time|changed|on a GPU) +(.*)", one) for one in out.splitlines()
    )
    return {match[1]: match[2] for match in found if match}


def test_a_stage_begins_with_six_lines(runs, capsys):
    run_stage(composed("experiment=tiny", "stage=pretrain", f"paths.runs={runs}", "max_steps=3", "seed=7"))
    out = capsys.readouterr().out
    lines = lines_of(out)
    assert list(lines) == ["model", "machine", "parent", "data", "steps", "time", "changed"]
    assert lines["model"] == "modern, 2 layers, 128 wide, context 128: 540,713 parameters"
    assert "attention cpu, eager (fewer than 500 steps on a CPU)" in lines["machine"]
    assert lines["parent"] == f"{runs}/tiny/tokenizer/model: tokenizer (384 tokens); the weights are fresh"
    assert lines["data"] == (
        "about 25.17K tokens of text; 0.1 passes, 1.54K tokens, packing crop; bpb of 896 held-out tokens, fewer than "
        "stage.eval_tokens=2048"
    )
    assert lines["steps"] == "3 steps of 512 tokens (1 micro-batch of 4 rows)"
    assert re.match(
        r"about [\d.]+ (s|min .*) on this machine.*\(from matrix rate, [\d.]+ [GT]FLOP/s.*\)", lines["time"]
    )
    assert lines["changed"].startswith("experiment=tiny model=d2 ")
    for text in ("derived:", "taken from", "device cpu", "rope_base", "lr/head", "expected"):
        assert text not in out
    (one,) = earlier_runs()
    assert one.stage == "pretrain" and one.took.step > 0 and one.took.rest > 0
    manifest = json.loads((runs / "tiny" / "pretrain" / "run.json").read_text())
    assert {"lr/head", "lr/embedding", "lr/matrices"} <= manifest["derived"].keys()
    assert manifest["derived"]["buffer"] == 100 and manifest["data"]["read"]["documents"] < 200  # of 400
    run_stage(composed("experiment=tiny", "stage=pretrain", f"paths.runs={runs}", "run=b", "init_from=tiny/tokenizer"))
    assert "(from 1 earlier run here" in lines_of(capsys.readouterr().out)["time"]


def test_verbose_prints_all_of_it(runs, capsys):
    keys = ("stage=pretrain", f"paths.runs={runs}", "dry_run=true", "verbose=true")
    run_stage(composed("experiment=tiny", *keys))
    out = capsys.readouterr().out
    for text in ("  rope_base: 100000.0", "derived:", "  lr/embedding: ", "data, packed by crop, a sample:"):
        assert text in out


def test_a_dry_run_speaks_of_this_machine_and_then_of_a_gpu(runs, capsys):
    run_stage(composed("experiment=tiny", "stage=pretrain", f"paths.runs={runs}", "dry_run=true"))
    out = capsys.readouterr().out
    lines = lines_of(out)
    assert list(lines)[-3:] == ["time", "changed", "on a GPU"]
    assert re.match(
        r"about [\d.]+ s and \$0.00 on 8 x h100 at 45% of 989 TFLOP/s; [\d.]+ GiB .*fits", lines["on a GPU"]
    )
    assert "  lr/embedding: " in out and "rope_base" not in out
    assert not (runs / "tiny" / "pretrain").exists() and earlier_runs() == []


def test_a_dry_run_without_a_tokenizer_says_what_follows_from_the_keys(tmp_path, capsys):
    run_stage(composed("experiment=speedrun", f"paths.runs={tmp_path}", "dry_run=true"))
    lines = lines_of(capsys.readouterr().out)
    assert lines["steps"].startswith("5,568 steps of 1,048,576 tokens")
    assert "about 2 h 10 min and $52.20 on 8 x h100" in lines["on a GPU"] and "(fits)" in lines["on a GPU"]
    assert re.match(r"about [\d,.]+ (days|h \d+ min) on this machine", lines["time"])


def test_a_dry_run_without_a_tokenizer_guesses_the_tokens_of_files(tmp_path, capsys):
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text("The red fox. " * 200)
    keys = ("experiment=own", "stage=pretrain", "model=d2", "model.vocab_size=512", "model.seq_len=128", "dry_run=true")
    keys += ("batch.tokens_per_step=1024", f"data.path={tmp_path}", f"paths.runs={tmp_path}/runs")
    run_stage(composed(*keys))
    out = capsys.readouterr().out
    lines, tokens = lines_of(out), 9 * (1 + 13 * 200 // 4)  # the last file validates
    assert lines["data"].startswith(f"about {amount(tokens)} tokens of text, guessed at 4 bytes a token; 3.0 passes, ")
    assert lines["steps"].startswith(f"{3 * tokens // 1024} steps of 1,024 tokens") and "not looked at" not in out
    run_stage(composed(*keys, "max_steps=100"))
    out = capsys.readouterr().out
    assert lines_of(out)["steps"].startswith("100 steps") and "WARNING: the run makes 17 passes over its text" in out


def test_a_dry_run_without_a_tokenizer_says_that_text_elsewhere_may_shorten_it(tmp_path, capsys):
    keys = ("experiment=own", "stage=pretrain", "data=fineweb_edu", "model.vocab_size=512", f"paths.runs={tmp_path}")
    run_stage(composed(*keys, "dry_run=true"))
    assert (
        "; fewer where that is more than stage.max_passes=3 over the text" in lines_of(capsys.readouterr().out)["steps"]
    )
    run_stage(composed(*keys, "dry_run=true", "max_steps=3"))
    assert "max_passes" not in lines_of(capsys.readouterr().out)["steps"]


def test_a_tokenizer_says_its_size(tmp_path, capsys):
    run_stage(composed("experiment=tiny", "stage=tokenizer", f"paths.runs={tmp_path}", "dry_run=true"))
    out = capsys.readouterr().out
    assert "384 tokens, from at most 200.00K characters of text\nchanged  experiment=tiny" in out
    assert "vocab_size:" not in out


# ----- what differs from the defaults


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ((), []),
        (("stage=sft",), []),
        (("dry_run=true", "verbose=true"), []),
        (("model=d8", "data=hub", "data.repo=a/b", "seed=7"), ["model=d8", "data=hub", "data.repo=a/b", "seed=7"]),
        (("data.tasks.choice={limit: 3}",), ["data.tasks.choice.limit=3"]),
        (("~callbacks.samples",), ["~callbacks.samples._target_", "~callbacks.samples.every"]),
        (("stage.eval_every=3",), ["stage.eval_every=3"]),  # and no callback that follows it
        (
            ("data.path=https://me:hush@host/a.txt?key=hush", "data=local"),
            ["data=local", "data.path=https://host/a.txt"],
        ),
    ],
)
def test_only_what_differs_from_the_defaults_is_listed(lines, found):
    lines = [line.replace("=https", "='https") + ("'" if "https" in line else "") for line in lines]
    assert changes(composed(*lines)) == found


def test_what_an_experiment_sets_is_listed():
    found = changes(composed("experiment=tiny", "stage=sft"))
    assert found[:2] == ["experiment=tiny", "model=d2"] and {"model.seq_len=128", "max_steps=4"} <= set(found)


def test_changes_behind_the_command_do_not_count():
    cfg = composed("stage=sft", "seed=7")
    cfg.batch.micro_batch_size = 1
    assert changes(cfg) == ["seed=7"]
    assert changes(compose("train", "stage=sft", "seed=7").copy()) == []  # it is not known what a copy consists of


def test_a_shape_that_the_parent_replaced_is_not_listed():
    """Keep what the command says of the shape, and values of a preset that the parent has too."""
    shape = {"n_layer": 1, "n_head": 2, "n_kv_head": 2, "head_dim": 32, "n_embd": 64, "seq_len": 512, "arch": "gpt"}
    for lines, found in (
        (("experiment=own", "stage=dpo"), {"model.seq_len=512"}),
        (
            ("experiment=own", "stage=dpo", "model=d6", "arch.softcap=9"),
            {"model=d6", "model.seq_len=512", "arch.softcap=9.0"},
        ),
    ):
        cfg = composed(*lines)
        set_model(cfg, shape)
        set_arch(cfg, shape | {"arch": cfg.arch.name, "softcap": 15.0})
        assert {line for line in changes(cfg) if line.startswith(("model", "arch"))} == found


def test_many_changes_are_cut_and_wrapped(monkeypatch):
    monkeypatch.setattr(start, "changes", lambda cfg: [f"data.tasks.task_{n}=1" for n in range(100)])
    lines = start.change_lines(None)
    assert max(map(len, lines)) <= 120 and all(line.startswith(" " * 9) for line in lines[1:])
    assert " ".join(" ".join(lines).split()).endswith("task_39=1 and 60 more (verbose=true)")
    monkeypatch.setattr(start, "changes", lambda cfg: [])
    assert start.change_lines(None) == []


# ----- the words of the lines


def test_the_data_of_each_kind_of_stage():
    text = {"text_tokens": 2_000_000, "text_passes": 1.25, "packing": "best_fit"}
    assert data_words(DERIVED | text) == "about 2.00M tokens of text; 1.2 passes, 10.24K tokens, packing best_fit"
    assert data_words(DERIVED | {"packing": "crop"}) == "text of unknown size; 10.24K tokens of it, packing crop"
    assert data_words(DERIVED | {"conversations": 130, "epochs": 40.0}) == (
        "130 conversations; 40 passes, 10.24K tokens"
    )
    answers = {"questions": 8000, "samples_per_step": 64, "rollouts": 5}
    assert data_words(DERIVED | answers) == "8,000 questions; 320 answers to them"


def test_the_steps_of_several_devices():
    cfg = compose("train", "experiment=tiny", "trainer.devices=2", "trainer=cpu")
    assert step_words(DERIVED, cfg) == "10 steps of 1,024 tokens (2 micro-batches of 4 rows on each of 2 devices)"


def test_the_time_is_said_with_its_source():
    def words(runs=0, share=1.0, pauses=0.0, minutes=None):
        parts = Parts(10.0, 20.0, pauses, 0.0)
        return time_words(Expected(None, 4.53e11, share, "", Estimate(parts, 11, runs)), minutes)

    assert words() == "about 2 min 00 s on this machine (from matrix rate, 453 GFLOP/s)"
    assert words(1) == "about 2 min 00 s on this machine (from 1 earlier run here)"
    assert words(3, pauses=60.0).startswith(
        "about 3 min 00 s on this machine, 1 min 00 s of it evaluations (from 3 earl"
    )
    assert words(share=0.2).endswith("; the machine is busy: 20% of its time is free)")
    assert words(minutes=1.5).endswith("GFLOP/s); max_minutes=1.5 ends it earlier, with fewer steps")
    assert words(minutes=2.5) == words()


def test_a_gpu_that_is_too_small():
    found = {"estimate_gpu": "1 x a100", "estimate_hours": 26.5, "estimate_dollars": 1234.5}
    found |= {"estimate_memory_gib": 99.5, "estimate_fits": "no: 80 GiB; lower batch.micro_batch_size"}
    assert gpu_words(found) == (
        "about 26 h 30 min and $1,234.50 on 1 x a100; 99.5 GiB of memory "
        "(does not fit, 80 GiB; lower batch.micro_batch_size)"
    )


def test_lines_are_wrapped_in_a_terminal_only(monkeypatch):
    text = {"model": "word " * 40}
    assert len(labelled(text)) == 1
    monkeypatch.setattr(start, "can_redraw", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, labelled(text))) <= 60 and len(labelled(text)) == 4


# ----- what is expected


def test_the_work_of_a_stage_follows_its_keys():
    cfg = compose("train", "experiment=tiny", "stage=pretrain", "stage.eval_every=5", "stage.eval_tokens=2000")
    context = SimpleNamespace(prompts=["a"] * 4, eval_tasks={}, val_batches=None, text_batches=None)
    work = work_of(cfg, DERIVED, context, 0, compiled=False)
    assert (work.steps, work.flops, work.drawn, work.layers) == (10, 1024 * 3e6, 0, 4)
    assert work.evaluated == pytest.approx(3 * 2000 * 1e6)  # before the first step, at 5, at 10
    assert work.sampled == pytest.approx(3 * 4 * 48 * 1e6)  # at 4, 8 and 10
    assert work.blocks == DERIVED["params_blocks"] and work_of(cfg, DERIVED, context, 8, False).steps == 2
    plain = compose("train", "experiment=tiny", "stage=pretrain", "optim=adamw", "callbacks=none")
    work = work_of(plain, DERIVED, context, 0, compiled=False)
    assert (work.blocks, work.evaluated, work.sampled) == (0, 0, 0)


@pytest.mark.parametrize("keys", [(), ("dry_run=true",)])
@pytest.mark.parametrize(
    ("rows", "positions", "words"),
    [
        ({"val_batches": 8}, 1024, "; bpb of 1,016 held-out tokens, fewer than stage.eval_tokens=2000"),
        ({"val_batches": 16}, 2000, ""),
        ({"val_batches": 16, "text_batches": 8}, 3024, "; bpb_text of 1,016 held-out tokens, fewer than"),
    ],
)
def test_an_evaluation_is_as_large_as_the_held_out_rows(keys, rows, positions, words):
    cfg = compose("train", "experiment=tiny", "stage=pretrain", "stage.eval_every=5", "stage.eval_tokens=2000", *keys)
    targets = torch.ones(4, 128, dtype=torch.long)
    targets[:, 0] = -1
    batches = {name: [{"targets": targets}] * (count // 4) for name, count in rows.items()}
    context = SimpleNamespace(prompts=[], eval_tasks={}, **{"val_batches": None, "text_batches": None} | batches)
    work = work_of(cfg, DERIVED, context, 0, compiled=False)
    assert work.evaluated == pytest.approx(3 * positions * 1e6)
    assert held_out_words(cfg, context).startswith(words) and bool(words) == bool(held_out_words(cfg, context))


def test_a_dry_run_looks_at_a_part_of_much_held_out_text():
    cfg = compose("train", "stage=pretrain", "dry_run=true")
    assert held_out_tokens(cfg) < cfg.stage.eval_tokens
    context = SimpleNamespace(val_batches=[{"targets": torch.ones(1, held_out_tokens(cfg))}], text_batches=None)
    assert measured_tokens(cfg, context) == cfg.stage.eval_tokens and held_out_words(cfg, context) == ""


def test_answers_that_are_drawn_are_work():
    cfg = compose("train", "experiment=tiny", "stage=grpo")
    work = work_of(cfg, DERIVED | {"samples_per_step": 4}, None, 0, compiled=False)
    assert work.drawn == pytest.approx(4 * 32 * 1e6) and work.flops == pytest.approx(4 * 96 * 3e6)
    twice = compose("train", "experiment=tiny", "stage=grpo", "stage.loss=dapo", "stage.updates_per_rollout=2")
    work = work_of(twice, DERIVED | {"samples_per_step": 4}, None, 0, compiled=False)
    assert work.drawn == pytest.approx(2 * 32 * 1e6) and work.flops == pytest.approx(4 * 96 * 3e6)


def test_what_a_run_took_is_known_by_the_next(monkeypatch, tmp_path):
    monkeypatch.setenv("FATHOM_MACHINE", str(tmp_path / "machine.json"))
    cfg = compose("train", "experiment=tiny", "stage=pretrain", "trainer=cpu")
    first = expect(cfg, DERIVED)
    watch = Stopwatch()
    note(first, watch, 100.0)  # nothing was trained
    assert earlier_runs() == []
    watch.steps, watch.first_seconds, watch.step_seconds, watch.pauses = 10, 8.0, 4.0, 20.0
    note(first, watch, 8 + 36 + 20 + 6.0)
    second = expect(cfg, DERIVED)
    assert second.estimate.runs == 1
    assert second.estimate.seconds * second.share == pytest.approx(8 + 36 + 20 + 6.0)


def test_every_job_of_a_sweep_lists_its_own_changes(runs):
    args = ("-m", "experiment=tiny", "stage=pretrain", f"paths.runs={runs}", "dry_run=true", "seed=7,8")
    done = run_cli("train.py", *args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("changed  experiment=tiny") == 2
    assert [line.split()[-1] for line in done.stdout.splitlines() if re.match(" {9}.*seed=", line)] == [
        "seed=7",
        "seed=8",
    ]
