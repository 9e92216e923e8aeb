"""The whole pipeline as real processes: every stage of experiment=tiny, its files, and what goes wrong how."""

import csv
import json
import re
import shutil
import signal

import pytest
import torch
from conftest import REPO, compose, run_cli
from holding import FOLDER, TESTS, held, hold_at
from processes import finish, start_warm, wait_until

from llm.data.balance import Balance
from llm.errors import UserError
from llm.run.content import read_content, wrong_file
from llm.stages.run_stage import run_stage

CHAT = ("midtrain", "sft")
STAGES = ("tokenizer", "pretrain", "midtrain", "sft", "grpo")


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory):
    """runs/ with all stages of the run `tiny`, made by one sweep as the README shows it."""
    root = tmp_path_factory.mktemp("pipeline") / "runs"
    done = train("-m", f"stage={','.join(STAGES)}", root=root, fresh=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root


def train(*args, root, **options):
    """Train in a process of its own."""
    return run_cli("train.py", "experiment=tiny", f"paths.runs={root}", *args, **options)


def train_here(*args, root) -> None:
    """Train in this process."""
    run_stage(compose("train", "experiment=tiny", f"paths.runs={root}", *args))


def refusal(*args, root) -> str:
    """Why a stage is not started."""
    with pytest.raises(UserError) as caught:
        train_here(*args, root=root)
    return str(caught.value)


def manifest(root, stage, run="tiny"):
    return json.loads((root / run / stage / "run.json").read_text())


def metrics(root, stage, run="tiny"):
    with open(root / run / stage / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("stage", ["pretrain", "midtrain", "sft", "grpo"])
def test_every_stage_says_what_became_of_its_tokens(tiny_runs, stage):
    block = manifest(tiny_runs, stage)["data"]
    read = Balance.from_dict(block["read"])
    assert read.missing == 0 and read.documents > 0 and read.partial == 0
    if stage == "grpo":
        assert "expected" not in block and read.answers > 0 and read.waiting == 0
    else:
        positions = 4 * 512 * 129 // 128  # four steps of 512 targets; a row holds one token more
        assert read.trained + read.masked + read.padded == positions and read.waiting > 0
        assert Balance.from_dict(block["expected"]).missing == 0
    assert (block["unit"] == "documents") == (stage == "pretrain") and ("median_length" in block) == (stage in CHAT)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_leaves_its_files(tiny_runs, stage):
    record, folder = manifest(tiny_runs, stage), tiny_runs / "tiny" / stage
    for key in (
        "stage",
        "status",
        "parent",
        "config",
        "derived",
        "commit",
        "seconds",
        "metrics",
        "started",
        "finished",
    ):
        assert key in record
    assert record["stage"] == stage and record["status"] == "finished" and record["seconds"] > 0
    assert (folder / "config.yaml").read_text().startswith("stage:")
    names = {p.name for p in (folder / "model").iterdir()}
    assert {"tokenizer.tiktoken", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    if stage == "tokenizer":
        assert record["parent"] is None and "| val " in (folder / "compression.md").read_text()
        return
    assert {"model.safetensors", "config.json", "generation_config.json"} <= names
    assert ("examples.json" in names) == (stage != "pretrain") and wrong_file(folder / "model") is None
    assert set(read_content(folder / "model")) == names - {"manifest.json"}
    assert record["parent"].endswith(f"{STAGES[STAGES.index(stage) - 1]}/model")
    table = metrics(tiny_runs, stage)
    assert list(table[0])[0] == "step" and int(table[-1]["step"]) == record["steps"] > 0
    assert record["tokens"] > 0 and record["flops"] > 0 and record["derived"]["params_total"] > 0
    wanted = {"reward", "pass@1"} if stage == "grpo" else {"loss", "bpb"}
    assert wanted | {"lr", "tok_per_s", "ms_per_step", "mfu", "data_wait"} <= set(table[0])
    assert wanted <= set(record["metrics"])
    if stage == "grpo":  # engine and trainer agree
        assert all(float(row["logprob_gap"]) <= 1e-5 for row in table if row["logprob_gap"])


def test_report_shows_all_stages(tiny_runs):
    report = (tiny_runs / "tiny" / "report.md").read_text()
    assert all(stage in report for stage in STAGES)
    images = re.findall(r"\((report/[^)]+\.png)\)", report)
    assert images and all((tiny_runs / "tiny" / image).stat().st_size > 5000 for image in images)


def test_running_again_changes_nothing(tiny_runs):
    before = {p: p.stat().st_mtime_ns for p in tiny_runs.rglob("*") if p.is_file()}
    done = train("-m", "stage=tokenizer,pretrain,grpo", root=tiny_runs)
    assert done.returncode == 0 and done.stdout.count("is finished") == 3
    assert before == {p: p.stat().st_mtime_ns for p in tiny_runs.rglob("*") if p.is_file()}


def test_another_config_is_an_error_that_names_the_keys(tiny_runs):
    said = refusal("stage=sft", "seed=7", "optim.matrix_lr=0.5", root=tiny_runs)
    assert "seed: 42 -> 7" in said and "optim.matrix_lr: 0.02 -> 0.5" in said
    assert "run=<new name>" in said and "overwrite=true" in said
    assert manifest(tiny_runs, "sft")["status"] == "finished"


def test_a_missing_parent_lists_what_exists(tiny_runs):
    said = refusal("stage=sft", "run=other", root=tiny_runs)
    assert "tiny/midtrain" in said and "init_from" in said
    assert not (tiny_runs / "other").exists()


def test_a_parent_of_another_architecture_is_refused(tiny_runs):
    said = refusal("stage=sft", "run=other", "init_from=tiny/midtrain", "model=d4", root=tiny_runs)
    assert "model.depth: configured 4, found 2" in said


def test_a_new_tokenizer_makes_the_model_out_of_date(tokenizer_runs, tmp_path):
    root = shutil.copytree(tokenizer_runs, tmp_path / "runs")
    train_here("stage=pretrain", "max_steps=2", root=root)
    train_here("stage=tokenizer", "stage.vocab_size=300", "overwrite=true", root=root)
    said = refusal("stage=pretrain", "max_steps=2", root=root)
    assert "earlier version" in said and "overwrite=true" in said


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["stage=pretrain", "batch.tokens_per_step=500"], "batch.tokens_per_step=500"),
        (["stage=pretrain", "trainer.devices=0"], "trainer.devices=0"),
        (["stage=tokenizer", "stage.vocab_size=100"], "stage.vocab_size"),
        (["stage=tokenizer", "stage.vocab_size=100000"], "vocab_size"),
        (["stage=pretrain", "data=local"], "data.path"),
        (["stage=pretrain", "data=local", "data.path=no/such/folder"], "data.path=no/such/folder"),
        (["stage=sft", "data.mixture.sft.choice=0.0", "data.tasks.identity.size=100000"], "data.tasks.identity"),
        (["stage=grpo", "stage.task=smalltalk"], "stage.task=smalltalk"),
        (["stage=grpo", "stage.task=nothing"], "stage.task=nothing"),
        (["stage=sft", "data.tasks.choice.source=local", "data.tasks.choice.train=gone.jsonl"], "gone.jsonl"),
    ],
)
def test_mistakes_end_before_work_starts(tiny_runs, args, says):
    stage = args[0].removeprefix("stage=")
    parent = [] if stage == "tokenizer" else [f"init_from=tiny/{STAGES[STAGES.index(stage) - 1]}"]
    run = "mistake-" + "".join(c if c.isalnum() else "-" for c in says)
    assert says in refusal(f"run={run}", *args, *parent, root=tiny_runs)
    left = {p.name for p in (tiny_runs / run).rglob("*")}
    trains_first = "stage.vocab_size=100000" in args  # too large for the text: known only once the text was read
    assert left == ({"tokenizer", "run.json", "config.yaml"} if trains_first else set())


def test_a_mistake_is_one_line_and_status_2(tiny_runs):
    done = train(
        "stage=pretrain", "init_from=tiny/tokenizer", "run=mistake", "batch.tokens_per_step=500", root=tiny_runs
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: batch.tokens_per_step=500")
        and done.stderr.count("\n") == 1
    )


def test_overwrite_destroys_nothing_before_the_checks_are_done(tiny_runs):
    before = sorted(p for p in (tiny_runs / "tiny").rglob("*"))
    for args in (["stage=tokenizer", "data=local", "data.path=typo"], ["stage=sft", "trainer=gpu"]):
        if "trainer=gpu" in args and torch.cuda.is_available():
            continue
        with pytest.raises(UserError, match="typo|no GPU"):
            train_here("overwrite=true", *args, root=tiny_runs)
    assert before == sorted(p for p in (tiny_runs / "tiny").rglob("*"))


@pytest.mark.parametrize(
    "stage, parent, words",
    [
        ("pretrain", "tokenizer", "tokens of text"),
        pytest.param("midtrain", "pretrain", " conversations; ", marks=pytest.mark.slow),
        ("sft", "midtrain", " conversations; "),
        ("dpo", "sft", " preferences; "),
        pytest.param("reward", "sft", " preferences; ", marks=pytest.mark.slow),
        ("grpo", "sft", "8,000 questions; 16,000 answers to them"),
        pytest.param("ppo", "sft", "8,000 questions; 16,000 answers to them", marks=pytest.mark.slow),
        pytest.param("best_of_n", "sft", "8,000 questions; 16,000 answers to them", marks=pytest.mark.slow),
        ("distill", "sft", "8,000 questions; 16,000 answers to them"),
        ("distill", "sft stage.source=data", " conversations; 1 passes"),
    ],
)
def test_dry_run_prints_and_writes_nothing(tiny_runs, capsys, stage, parent, words):
    more = ["max_steps=null", "stage.teacher=tiny/midtrain"] if stage == "distill" else ["max_steps=null"]
    lines = f"stage={stage} run=dry dry_run=true init_from=tiny/{parent}".split()
    train_here(*lines, *more, root=tiny_runs)
    out = capsys.readouterr().out
    assert "params_total" in out and "flops_per_token" in out and words in out
    assert "on a GPU about " in out and " on 8 x h100 " in out
    assert not (tiny_runs / "dry").exists()


def same_weights(a, b) -> bool:
    from safetensors.torch import load_file

    x, y = (load_file(folder / "model" / "model.safetensors") for folder in (a, b))
    return x.keys() == y.keys() and all(x[k].equal(y[k]) for k in x)


FAST_STOPS = {("sft", signal.SIGKILL)}


@pytest.mark.parametrize(
    ("stage", "signum", "status"),
    [
        pytest.param(stage, signum, status, marks=() if (stage, signum) in FAST_STOPS else pytest.mark.slow)
        for stage in STAGES[1:]
        for signum, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9))
    ],
)
def test_a_stopped_stage_resumes_to_the_same_weights(tiny_runs, tmp_path, stage, signum, status):
    """Straight run = run that is stopped by a signal and started again with the same command, bit for bit."""
    steps, parent = 8 if stage == "grpo" else 12, STAGES[STAGES.index(stage) - 1]
    args = [f"stage={stage}", f"init_from=tiny/{parent}", f"max_steps={steps}", "save_every=2", *hold_at(5)]
    straight, run = f"straight-{stage}", f"stopped-{stage}-{int(signum)}"
    if not (tiny_runs / straight).exists():
        assert train(*args, f"run={straight}", root=tiny_runs, PYTHONPATH=TESTS).returncode == 0
    line = ["experiment=tiny", f"paths.runs={tiny_runs}", *args, f"run={run}"]
    process = start_warm(REPO / "train.py", *line, env={"PYTHONPATH": TESTS, FOLDER: str(tmp_path)})
    wait_until(lambda: held(tmp_path), process)
    process.send_signal(signum)
    ((ended, out, err),) = finish(process)
    assert ended == status, out + err
    if signum != signal.SIGKILL:
        assert "the same command resumes" in out and manifest(tiny_runs, stage, run)["status"] == "interrupted"
    again = train(*args, f"run={run}", root=tiny_runs, PYTHONPATH=TESTS)
    assert again.returncode == 0 and "resuming at step" in again.stdout, again.stderr
    assert same_weights(tiny_runs / straight / stage, tiny_runs / run / stage)
    timing = {"tok_per_s", "ms_per_step", "mfu", "data_wait", "seconds"}
    timing |= {"rollout_tok_per_s", "update_tok_per_s", "rollout_share", "update_share", "rest_share"}
    tables = [metrics(tiny_runs, stage, name) for name in (straight, run)]
    a, b = ([{k: v for k, v in row.items() if k not in timing} for row in table] for table in tables)
    assert a == b


def test_evaluation_writes_the_agreed_json(tiny_runs):
    args = ["run=tiny", "stage=sft", "eval=[bpb,chat,samples]", f"paths.runs={tiny_runs}"]
    done = run_cli("evaluate.py", *args, "eval.max_per_task=6", "eval.tokens=1024", "eval.max_new_tokens=16")
    assert done.returncode == 0, done.stderr[-2000:]
    scores = json.loads((tiny_runs / "tiny" / "sft" / "eval.json").read_text())
    assert scores["bpb"] > 0 and set(scores["chat"]) == {"choice", "arithmetic", "spelling", "identity"}
    for result in scores["chat"].values():
        assert set(result) >= {"accuracy", "n", "stderr"} and result["n"] == 6
    assert scores["samples"] and {"prompt", "completion"} <= set(scores["samples"][0])
    assert "arithmetic" in done.stdout


def test_a_question_is_answered_once_from_the_command_line(tiny_runs):
    done = run_cli("serve.py", "run=tiny", "prompt=Who are you?", "max_new_tokens=8", f"paths.runs={tiny_runs}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout) > 1 and done.stdout.endswith("\n")
