"""Reports and curves from synthetic run folders."""

import math
import re

import pytest
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from PIL import Image

from llm.errors import UserError
from llm.report import plots, report
from llm.report.plots import draw_curves, plans, spaced
from llm.report.report import build_report, fenced
from llm.report.results import curve, final_metrics, is_held_out, smoothed
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
    assert "> 12 times 3?\nIt is ⟨python: 12*3 = 36⟩36." in samples and "<|" not in samples


def test_the_balance_of_tokens_has_a_section(full_run):
    assert "## Balance of tokens" not in build_report(full_run).read_text()
    read = {"documents": 1_000, "read": 60_000, "trained": 45_000, "cut": 15_000, "padded": 15_000}
    add_stage(full_run.parent, "demo", "pretrain", data={"unit": "documents", "read": read})
    answers = {"documents": 60, "documents_cut": 60, "answers": 60, "answers_cut": 60, "read": 500, "cut": 500}
    expected = {"unit": "conversations", "expected": answers, "skipped": {"empty answer": 3}}
    add_stage(full_run.parent, "demo", "sft", status="interrupted", data=expected)
    rl = {"answers": 8, "answers_cut": 8, "documents": 8, "read": 99, "trained": 99}
    add_stage(full_run.parent, "demo", "grpo", data={"unit": "answers and conversations", "read": rl})
    add_stage(full_run.parent, "demo", "dpo", data={"unit": "preferences"})  # counts none
    data = section(build_report(full_run).read_text(), "Balance of tokens")
    assert "dpo" not in data and "waiting |" not in data and "read + repeated = trained" in data
    assert "| tokens | pretrain | sft | grpo |" in data and "| trained | 45.00K (75.0 %) | 0 (0.0 %) |" in data
    assert "| padding of the rows | 25.0 % | 0.0 % |" in data and "| answers cut | - | 60 of 60 | 8 of 8 |" in data
    assert (
        "| rows skipped: empty answer | - | 3 | - |" in data
        and "**grpo:**" not in data
        and "> **sft:** 60 of 60 answers are cut (100%)" in data
    )


def cells(text):
    """{row: {column: cell}} of the first table in a text."""
    lines = [line for line in text.split("\n| ", 1)[1].split("\n\n")[0].splitlines()]
    header, _, *rows = [line.strip("| ").split(" | ") for line in lines]
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def test_report_of_a_whole_run(full_run):
    text = build_report(RunDir(full_run.parent, "demo")).read_text()
    results = cells("\n" + section(text, "Results"))
    assert list(results["choice"].values()) == ["50.0 %", *["81.2 ± 2.4 %"] * 3]  # what evaluate.py measured wins
    assert list(results["arithmetic"].values()) == ["-", *["81.2 ± 2.4 %"] * 3]
    assert list(results["bits per byte, text"].values()) == ["0.7500", "-", "-", "-"]
    assert list(results["bits per byte, chats"].values()) == ["-", *["0.7500"] * 3]
    training = cells("\n" + section(text, "Training"))
    assert training["reward"]["grpo"] == "0.9583" and training["reward"]["sft"] == "-"  # the mean of 55/60 to 60/60
    assert training["loss, of its own kind"]["grpo"] == training["loss"]["sft"] != "-" and "lr" not in training
    assert "| 1 min 02 s | 12.35K |" in section(text, "Stages")
    assert "| training | 5 min 08 s in 5 stages, 37.50T FLOPs |" in section(text, "Summary")
    assert "| news | 4.85 |" in section(text, "Tokenizer")
    assert "Test CPU" in section(text, "Environment")
    configuration = section(text, "Configuration")
    assert configuration.count("model.depth: 4") == 1 and "stage.name: grpo" in configuration
    assert "I am demo." in section(text, "Samples")
    numbers = section(text, "Numbers of each stage")
    assert "| params_total | 3,211,264 | 3,211,264 |" in numbers and "| c0ffeec0ff-dirty |" in numbers


def test_benchmarks_stand_in_the_order_of_papers_with_their_errors(tmp_path):
    add_stage(tmp_path, "d20", "pretrain", scores=False)
    tasks = {"humaneval": (0.08, 0.02), "spelling": (0.9, 0.01), "mmlu": (0.31, 0.004), "arc_easy": (0.4, 0.01)}
    folder = add_stage(tmp_path, "d20", "sft", scores=False)
    chat = {name: {"accuracy": share, "stderr": error, "n": 9} for name, (share, error) in tasks.items()}
    write_json(folder / "eval.json", {"chat": chat, "chatcore": 0.1234, "core": 0.2219})
    preferences = {"accuracy": 0.8, "accuracy_low": 0.7, "accuracy_high": 0.9, "margin": 2.0, "margin_stderr": 0.5}
    folder = add_stage(tmp_path, "d20", "reward", scores=False)
    write_json(folder / "eval.json", {"preferences": preferences | {"n": 4}})
    results = cells("\n" + section(build_report(tmp_path / "d20").read_text(), "Results"))
    names = [name for name in results if results[name]["sft"] != "-"]
    assert names[:5] == ["CORE", "ARC-Easy", "MMLU", "HumanEval", "choice"] and names[5:7] == ["spelling", "ChatCORE"]
    assert results["MMLU"] == {"pretrain": "-", "sft": "31.0 ± 0.4 %", "reward": "-"}
    assert results["pairs told apart"]["reward"] == "80.0 % (70.0 to 90.0)"
    assert results["margin of pairs"]["reward"] == "2 ± 0.5000"


def test_cost_and_code_stand_on_the_first_page(tmp_path):
    """The price is of the configuration; the state of the code is that of the run, not of the report."""
    code = {"branch": "try", "changed": 1, "files": 9, "lines": 1234, "characters": 40_000, "dependencies": 15}
    for stage, seconds in (("pretrain", 7200.0), ("sft", 360.0)):
        config = {"stage": {"name": stage}, "device_price": 3.0}
        facts = {"config": config, "seconds": seconds, "device_seconds": 8 * seconds, "code": code}
        add_stage(tmp_path, "demo", stage, **facts, version="0.1.0")
    text = build_report(tmp_path / "demo").read_text()
    summary = section(text, "Summary")
    assert "| cost | 50.40 dollars: 16.80 device-hours at 3.00 an hour |" in summary
    assert [row["dollars"] for row in cells("\n" + section(text, "Stages")).values()] == ["48.00", "2.40"]
    assert "| code | Fathom 0.1.0, branch try, commit c0ffeec0ff-dirty, 1 uncommitted change |" in summary
    assert "40,000 characters, 1,234 lines, 9 files, about 10.00K tokens, 15 dependencies |" in summary
    nowhere = {"commit": None, "code": code | {"branch": None, "changed": None}, "version": "0.1.0"}
    add_stage(tmp_path, "demo", "sft", **nowhere, config={"stage": {"name": "sft"}})
    summary = section(build_report(tmp_path / "demo").read_text(), "Summary")
    assert "| code | Fathom 0.1.0, no git; another for pretrain |" in summary
    assert "| cost | 48.00 dollars: 16 device-hours at 3.00 an hour; no price or duration: sft |" in summary


def test_a_run_of_an_older_release_has_a_first_page_too(full_run):
    summary = section(build_report(full_run).read_text(), "Summary")
    assert "device-hours not known; no price given" in summary and "size of the code" not in summary
    assert "| code | commit c0ffeec0ff-dirty |" in summary
    trainer = {"devices": 4, "num_nodes": 2}
    for hours, devices in ((0.1367, trainer), (0.0171, trainer | {"devices": "auto", "num_nodes": 1})):
        add_stage(full_run.parent, f"old{hours}", "sft", config={"stage": {"name": "sft"}, "trainer": devices})
        text = build_report(full_run.parent / f"old{hours}").read_text()
        assert f"| cost | {hours} device-hours; no price given" in section(text, "Summary")


def test_plots_show_the_numbers_of_the_tables(full_run, monkeypatch):
    """Every number at the end of a line is a cell of a table: smoothed, evaluated or last, in both."""
    from matplotlib.figure import Figure

    drawn = {}

    def draw_into_memory(path, title, height, draw):
        drawn[path.stem] = figure = Figure(figsize=(plots.WIDTH, height))
        draw(figure)
        path.touch()

    monkeypatch.setattr(plots, "_figure", draw_into_memory)
    (full_run / "grpo" / "eval.json").unlink()
    text = build_report(full_run).read_text()
    tables = cells("\n" + section(text, "Results")) | cells("\n" + section(text, "Training"))
    for name, row in (("loss", tables["loss"]), ("reward", tables["reward"])):
        panels = {ax.get_title(): ax.texts[0].get_text() for ax in drawn[name].axes if ax.texts}
        assert panels == {stage: cell for stage, cell in row.items() if cell != "-"} and panels
    bpb = {ax.get_title(): ax.texts[0].get_text() for ax in drawn["bpb"].axes if ax.texts}
    rows = [tables["bits per byte, text"], tables["bits per byte, chats"]]
    assert bpb == {stage: row[stage] for row in rows for stage in row if row[stage] != "-"} and len(bpb) == 4
    for name, measures in (("chat", TASKS), ("pass", ("pass@1", "pass@8"))):
        labels = sorted(label.get_text() for label in drawn[name].axes[0].texts)
        found = [cell for key in measures for cell in tables[key].values() if cell != "-"]
        assert labels == sorted(cell.split()[0] for cell in found) and labels


def test_a_sentence_explains_every_plot(full_run):
    add_stage(full_run.parent, "demo", "dpo", parent=str(full_run / "sft" / "model"))
    blocks = build_report(full_run).read_text().split("\n\n")
    plotted = [number for number, block in enumerate(blocks) if block.startswith("![")]
    assert len(plotted) == 6
    for number in plotted:
        assert re.match(r"[A-Z].{60,}[.]$", blocks[number + 1].replace("\n", " ")), blocks[number]
    assert all(plan.text.endswith(".") for plan in plans(["loss"], ["x"]))


def test_the_weights_that_were_handed_over_decide_where_a_curve_ends():
    rows = [{"step": step, "bpb": bpb, "loss": 1.0} for step, bpb in ((0, 3.0), (10, 1.0), (20, 2.0))]
    assert final_metrics({"rows": rows, "weights": {"step": 10}}) == {"bpb": (1.0, None), "loss": (1.0, None)}
    assert final_metrics({"rows": rows, "metrics": {"bpb": 2.0, "lr": 3.0}})["bpb"] == (2.0, None)


def test_columns_of_training_are_smoothed_and_held_out_ones_are_not():
    rows = [{"step": step, "loss": float(step % 2), "bpb": float(step)} for step in range(24)]
    assert curve(rows, "loss")[-1] == (23, pytest.approx(2 / 3)) and curve(rows, "bpb")[-1] == (23, 23.0)
    assert final_metrics({"rows": rows})["loss"][0] == pytest.approx(curve(rows, "loss")[-1][1])
    assert curve(rows[:19], "loss")[-1] == (18, 0.0)
    assert all(map(is_held_out, ("bpb_text", "chat/x", "core", "pass@4", "preference/margin")))
    assert not any(map(is_held_out, ("loss", "reward", "kl", "accuracy")))


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
    table = cells("\n" + text)
    found = {stage: {key: row[stage] for key, row in table.items()} for stage in table["steps"]}
    assert list(found) == ["pretrain", "midtrain", "sft", "dpo (orpo)", "grpo"]
    dpo = found["dpo (orpo)"]
    assert (dpo["wins by rule"], dpo["wins by judge, equal length"]) == ("75.0 % (+25.0)", "70.0 % (+20.0)")
    bits = dpo["bits per byte, chats"], dpo["bits per byte, text"]
    assert bits == ("0.6000 (+0.1000)", "1.5000 (-0.5000)") and dpo["choice"] == "-"
    assert found["grpo"]["choice"] == "81.2 % (+0.0)" and found["sft"]["choice"] == "81.2 %"
    assert found["pretrain"]["bits per byte, text"] == "0.7500" and found["pretrain"]["bits per byte, chats"] == "-"
    assert Image.open(full_run / "report" / "methods.png").width > 600


def test_a_run_without_methods_has_no_such_section(tmp_path):
    add_stage(tmp_path, "demo", "sft")
    assert "## Methods" not in build_report(tmp_path / "demo").read_text()


@pytest.mark.usefixtures("figures")
def test_figures_exist_where_the_report_links_them(full_run):
    text = build_report(full_run).read_text()
    links = re.findall(r"!\[.+?\]\((.+?)\)", text)
    names = [link.split("/")[1].removesuffix(".png") for link in links]
    assert names == ["chat", "methods", "loss", "bpb", "reward", "pass"]
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
    assert "| pretrain | interrupted |" in text and "| bits per byte, text | 0.8765 |" in text
    assert "report/loss.png" in text
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
    drawn = draw_curves(tmp_path, "one point", {"pretrain": {"rows": [{"step": 0, "loss": 3.0}]}})
    assert [one.path.name for one in drawn] == ["loss.png"]
    assert draw_curves(tmp_path / "none", "empty", {"pretrain": {"rows": []}}) == []
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("figures")
def test_figures_are_kept_on_request_and_drawn_where_missing(tmp_path):
    rows = {"pretrain": {"rows": [{"step": 0, "loss": 3.0, "bpb": 2.0}]}}
    draw_curves(tmp_path, "kept", rows)
    (tmp_path / "loss.png").write_bytes(b"kept")
    (tmp_path / "bpb.png").unlink()
    assert [one.path.name for one in draw_curves(tmp_path, "kept", rows, redraw=False)] == ["loss.png", "bpb.png"]
    assert (tmp_path / "loss.png").read_bytes() == b"kept" and (tmp_path / "bpb.png").stat().st_size > 1000
    draw_curves(tmp_path, "kept", rows)
    assert (tmp_path / "loss.png").stat().st_size > 1000


@pytest.mark.usefixtures("figures")
def test_two_programs_may_draw_one_figure_at_once(tmp_path, monkeypatch):
    path, save, others = tmp_path / "loss.png", Figure.savefig, ["another"]

    def saved(figure, *args, **options):
        save(figure, *args, **options)
        if others:
            with plots.drawing(path, others.pop(), (1, 1)):
                pass

    monkeypatch.setattr(Figure, "savefig", saved)
    with plots.drawing(path, "one", (1, 1)):
        pass
    assert path.read_bytes().startswith(b"\x89PNG") and [one.name for one in tmp_path.iterdir()] == ["loss.png"]


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
    table = markdown_table(["\\<b>"], [["\\<img src=x> \\| x"]]).splitlines()  # a backslash takes none of ours away
    assert (table[0], table[2]) == ("| \\\\\\<b> |", "| \\\\\\<img src=x> \\\\\\| x |")


def test_names_of_folders_and_problems_are_text(tmp_path):
    for name in ("<img src=x>", "\\<b>x"):
        config = {"seed": len(name)}
        write_manifest(tmp_path / "r" / name, {"stage": name, "config": config, "environment": {"cpu": name}})
        write_json(tmp_path / "r" / name / "eval.json", {"samples": [{"prompt": "a", "completion": "b"}]})
    (tmp_path / "r" / "<i>bad").mkdir()
    (tmp_path / "r" / "<i>bad" / "run.json").write_text("{broken")
    text = build_report(tmp_path / "r").read_text()
    assert "> **Problem:** " in text and "\\<i>bad" in text and "<summary>Only in &lt;img src=x&gt;" in text
    shown = MarkdownIt("commonmark").enable("table").render(text)
    assert "&lt;img src=x&gt;" in shown and not re.search("<(img|b|i)\\b", shown)
