"""Reports and curves from synthetic run folders."""

import math
import re

import pytest
from PIL import Image

from llm.errors import UserError
from llm.report import plots, report
from llm.report.plots import draw_curves, smoothed, spaced
from llm.report.report import build_report, fenced
from llm.run.stage_folder import RunDir, write_manifest
from llm.utils.files import write_json
from llm.utils.format import amount, duration, markdown_table, percent, value

MACHINE = {"platform": "Linux", "cpu": "Test CPU", "cpu_threads": 2, "memory_gb": 8.0, "gpus": [], "python": "3.11.7"}
COMMIT = f"{'c0ffee' * 7}-dirty"
TASKS = ("choice", "arithmetic", "spelling", "identity")


def add_stage(root, run, stage, steps=60, status="finished", depth=4, scores=True, **extra):
    """run.json, metrics.csv and eval.json as training and evaluation leave them."""
    folder = RunDir(root, run).stage_dir(stage)
    metrics = (
        {"bytes_per_token_news": 4.851}
        if stage == "tokenizer"
        else {"loss": 1.25, "bpb": 0.8765432, "chat/choice": 0.5, "lr": 0.125, "tok_per_s": 12345.6}
    )
    config = {"stage": {"name": stage}, "model": {"depth": depth}, "seed": 42, "run": run, "data": {"path": None}}
    facts = {"stage": stage, "status": status, "parent": None, "config": config, "commit": COMMIT, "steps": steps}
    facts |= {"tokens": 245_760, "flops": 7.5e12, "seconds": 61.5, "metrics": metrics, "environment": MACHINE}
    write_manifest(folder, facts | {"derived": {"params_total": 3_211_264, "tokens_per_step": 4096}} | extra)
    if stage == "tokenizer":
        return folder
    lines = ["step,loss,bpb,chat/choice,reward,pass@1,pass@8"]
    for step in range(steps + 1):
        loss = 1 + 5 * math.exp(-step / 15)
        seldom = f"{loss / 3},{1 - math.exp(-step / 30)}" if step % 10 == 0 else ","
        rl = f"{step / steps},{step / steps / 2 if step % 10 == 0 else ''},{step / steps if step % 10 == 0 else ''}"
        lines.append(f"{step},{loss},{seldom},{rl if stage == 'grpo' else ',,'}")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    if scores:
        chat = {task: {"accuracy": 0.8125, "n": 256, "stderr": 0.0244} for task in TASKS} if stage != "pretrain" else {}
        samples = [{"prompt": "Who are you?", "completion": f"I am {run}.\n```\ncode | in | it"}]
        write_json(folder / "eval.json", {"bpb": 0.75, "chat": chat, "samples": samples})
    return folder


@pytest.fixture
def figures(draw_figure, monkeypatch):
    """Draw figures, which are empty files in other tests."""
    monkeypatch.setattr(plots, "_figure", draw_figure)


@pytest.fixture
def full_run(tmp_path):
    for stage in ("tokenizer", "pretrain", "midtrain", "sft", "grpo"):
        add_stage(tmp_path, "demo", stage)
    return tmp_path / "demo"


def section(text, title):
    return text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_samples_show_calculator_calls_as_calculations(full_run):
    call = "It is <|python_start|>12*3<|python_end|><|output_start|>36<|output_end|>36."
    write_json(full_run / "sft/eval.json", {"samples": [{"prompt": "12 times 3?", "completion": call}]})
    samples = section(build_report(full_run).read_text(), "Samples")
    assert "> 12 times 3?\nIt is [12*3 = 36]36." in samples and "<|" not in samples


def test_the_balance_of_tokens_has_a_section(full_run):
    assert "## Data" not in build_report(full_run).read_text()
    read = {"documents": 1_000, "read": 60_000, "trained": 45_000, "cut": 15_000, "padded": 15_000}
    add_stage(full_run.parent, "demo", "pretrain", data={"unit": "documents", "read": read})
    answers = {"documents": 60, "documents_cut": 60, "answers": 60, "answers_cut": 60, "read": 500, "cut": 500}
    expected = {"unit": "conversations", "expected": answers, "skipped": {"empty answer": 3}}
    add_stage(full_run.parent, "demo", "sft", status="interrupted", data=expected)
    rl = {"answers": 8, "answers_cut": 8, "documents": 8, "read": 99, "trained": 99}
    add_stage(full_run.parent, "demo", "grpo", data={"unit": "answers and conversations", "read": rl})
    data = section(build_report(full_run).read_text(), "Data")
    assert "| tokens | pretrain | sft | grpo |" in data and "| trained | 45.00K (75.0 %) | 0 (0.0 %) |" in data
    assert "| padding of the rows | 25.0 % | 0.0 % |" in data and "| answers cut | - | 60 of 60 | 8 of 8 |" in data
    assert (
        "| rows skipped: empty answer | - | 3 | - |" in data
        and "**grpo:**" not in data
        and "> **sft:** 60 of 60 answers are cut (100%)" in data
    )


def test_report_of_a_whole_run(full_run):
    text = build_report(RunDir(full_run.parent, "demo")).read_text()
    metrics = section(text, "Metrics by stage")
    assert "| metric | pretrain | midtrain | sft | grpo |" in metrics
    assert "| bpb | 0.7500 | 0.7500 | 0.7500 | 0.7500 |" in metrics  # eval.json wins over the training's last value
    assert "| choice | 50.0 % | 81.2 ± 2.4 % | 81.2 ± 2.4 % | 81.2 ± 2.4 % |" in metrics
    assert "| arithmetic | - | 81.2 ± 2.4 % |" in metrics and "lr" not in metrics
    assert "| 1 min 02 s | 12.35K |" in section(text, "Stages")
    assert "Total wall-clock: **5 min 08 s**, total compute 37.50T FLOPs." in section(text, "Stages")
    assert "| news | 4.85 |" in section(text, "Tokenizer")
    assert "Test CPU" in section(text, "Environment")
    configuration = section(text, "Configuration")
    assert configuration.count("model.depth: 4") == 1 and "stage.name: grpo" in configuration
    assert "I am demo." in section(text, "Samples")
    numbers = section(text, "Numbers of each stage")
    assert "| params_total | 3,211,264 | 3,211,264 |" in numbers and "| c0ffeec0ff-dirty |" in numbers


@pytest.mark.usefixtures("figures")
def test_methods_are_compared_with_the_stage_they_began_with(full_run):
    parent = {"parent": str(full_run / "sft" / "model")}
    add_stage(full_run.parent, "demo", "grpo", **parent)
    folder = add_stage(full_run.parent, "demo", "dpo", scores=False, **parent)
    lines = ["step,bpb,bpb_text,preference/win_rate,preference/win_rate_judge_lc", "0,0.5,2.0,0.5,0.5"]
    (folder / "metrics.csv").write_text("\n".join([*lines, "60,0.6,1.5,0.75,0.7"]) + "\n")
    facts = {"bpb": 0.6, "bpb_text": 1.5, "preference/win_rate": 0.75, "preference/win_rate_judge_lc": 0.7}
    config = {"stage": {"name": "dpo", "loss": "orpo"}}
    write_manifest(folder, {"stage": "dpo", "status": "finished", "metrics": facts, "config": config} | parent)
    text = section(build_report(full_run).read_text(), "Methods")
    header, _, *rows = [line.strip("| ").split(" | ") for line in text.strip().split("\n\n")[0].splitlines()]
    found = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert list(found) == ["pretrain", "midtrain", "sft", "dpo (orpo)", "grpo"]
    dpo = found["dpo (orpo)"]
    assert (dpo["wins by rule"], dpo["wins by judge, equal length"]) == ("75.0 % (+25.0)", "70.0 % (+20.0)")
    assert (dpo["bpb"], dpo["bpb of text"], dpo["choice"]) == ("0.6000 (+0.1000)", "1.5000 (-0.5000)", "-")
    assert found["grpo"]["choice"] == "81.2 % (+0.0)" and found["sft"]["choice"] == "81.2 %"
    assert found["pretrain"]["bpb of text"] == "0.7500" and found["pretrain"]["bpb"] == "-"
    assert Image.open(full_run / "report" / "methods.png").width > 600


def test_a_run_without_methods_has_no_such_section(tmp_path):
    add_stage(tmp_path, "demo", "sft")
    assert "## Methods" not in build_report(tmp_path / "demo").read_text()


@pytest.mark.usefixtures("figures")
def test_figures_exist_where_the_report_links_them(full_run):
    text = build_report(full_run).read_text()
    links = re.findall(r"!\[.+?\]\((.+?)\)", text)
    names = [link.split("/")[1].removesuffix(".png") for link in links]
    assert names == ["methods", "loss", "bpb", "chat", "reward", "pass"]
    for link in links:
        with Image.open(full_run / link) as image:
            assert image.width >= 700 and image.height >= 300
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 20  # something is drawn
    assert sorted(path.name for path in (full_run / "report").iterdir()) == sorted(link.split("/")[1] for link in links)


def test_report_grows_with_the_run(tmp_path):
    run = tmp_path / "demo"
    with pytest.raises(UserError, match="no stage"):
        build_report(run)
    add_stage(tmp_path, "demo", "tokenizer")
    text = build_report(run).read_text()
    assert "Nothing has been measured yet" in text and "## Curves" not in text and "## Samples" not in text
    add_stage(tmp_path, "demo", "pretrain", status="interrupted", scores=False)
    text = build_report(run).read_text()
    assert "| pretrain | interrupted |" in text and "| bpb | 0.8765 |" in text and "report/loss.png" in text
    assert "chat.png" in text and "reward.png" not in text


def test_report_survives_missing_keys_and_names_unreadable_files(tmp_path):
    write_manifest(tmp_path / "r" / "pretrain", {"stage": "pretrain"})
    add_stage(tmp_path, "r", "sft")
    (tmp_path / "r" / "midtrain").mkdir()
    (tmp_path / "r" / "midtrain" / "run.json").write_text("{broken")
    (tmp_path / "r" / "sft" / "eval.json").write_text("")
    text = build_report(tmp_path / "r").read_text()
    problems = [line for line in text.splitlines() if line.startswith("> **Problem:**")]
    assert len(problems) == 2 and "midtrain/run.json" in problems[0] and "sft/eval.json" in problems[1]
    assert "| sft | finished |" in text and "| pretrain |  |" in text


def test_figures_that_no_longer_apply_are_removed(full_run):
    build_report(full_run)
    (full_run / "grpo" / "run.json").unlink()
    build_report(full_run)
    assert not (full_run / "report" / "reward.png").exists() and (full_run / "report" / "loss.png").exists()


@pytest.mark.usefixtures("figures")
def test_curves_need_no_display_and_few_points_are_enough(tmp_path):
    drawn = draw_curves(tmp_path, "one point", {"pretrain": [{"step": 0, "loss": 3.0}]})
    assert [path.name for _, path in drawn] == ["loss.png"]
    assert draw_curves(tmp_path / "none", "empty", {"pretrain": []}) == []
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("figures")
def test_figures_are_kept_on_request_and_drawn_where_missing(tmp_path):
    rows = {"pretrain": [{"step": 0, "loss": 3.0, "bpb": 2.0}]}
    draw_curves(tmp_path, "kept", rows)
    (tmp_path / "loss.png").write_bytes(b"kept")
    (tmp_path / "bpb.png").unlink()
    assert [path.name for _, path in draw_curves(tmp_path, "kept", rows, redraw=False)] == ["loss.png", "bpb.png"]
    assert (tmp_path / "loss.png").read_bytes() == b"kept" and (tmp_path / "bpb.png").stat().st_size > 1000
    draw_curves(tmp_path, "kept", rows)
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_smoothing_keeps_start_and_constants():
    assert smoothed([5.0, 1.0, 1.0, 1.0, 1.0], 2)[0] == 5.0
    assert smoothed([2.0] * 10, 3) == [2.0] * 10
    assert smoothed([0.0, 0.0, 0.0, 3.0], 1)[-1] == 1.5


def test_labels_are_moved_apart_and_stay_below_the_top():
    assert spaced([10, 50, 90], 5, 100) == [10, 50, 90]
    assert spaced([50, 51, 52], 5, 100) == [50, 55, 60]
    assert spaced([99, 100, 100], 5, 102) == [92, 97, 102]
    assert spaced([], 5, 100) == []


def test_command_errors_are_one_line(tmp_path, capsys):
    assert report.main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("error: ") == 1
    add_stage(tmp_path, "demo", "pretrain")
    assert report.main([str(tmp_path / "demo")]) == 0
    assert (tmp_path / "demo" / "report.md").is_file()


# ----- forms of numbers


def test_number_forms():
    assert [value(x) for x in (None, 3, 12345.0, 0.5, 1.2e-5, 3.3e9 + 0.5)] == [
        "-",
        "3",
        "12,345",
        "0.5000",
        "1.200e-05",
        "3.300e+09",
    ]
    assert [amount(x) for x in (None, 12, 1536, 560_988_160, 2.5e12, 3.75e18)] == [
        "-",
        "12",
        "1.54K",
        "560.99M",
        "2.50T",
        "3.75e18",
    ]
    assert [duration(x) for x in (None, 4.21, 192, 7500)] == ["-", "4.2 s", "3 min 12 s", "2 h 05 min"]
    assert percent(0.8125, 0.0244) == "81.2 ± 2.4 %"


def test_markdown_cells_and_code_blocks_cannot_be_broken_out_of():
    assert markdown_table(["a"], [["x | y\nz"]]).splitlines()[-1] == "| x \\| y z |"
    block = fenced("a ```` b")
    assert block.startswith("`````\n") and block.endswith("\n`````")


def test_cells_of_a_table_load_nothing_and_move_no_cursor():
    row = ["![a](http://127.0.0.1/z)\n# X", "\x1b[31mred", "a|b <img src=x>"]
    assert markdown_table(["a", "b", "c"], [row]).splitlines()[2] == (
        "| !\\[a](http://127.0.0.1/z) # X |  [31mred | a\\|b \\<img src=x> |"
    )
