"""What is shown while a stage trains: a bar in a terminal, lines now and then elsewhere."""

import io
import os
import sys
from types import SimpleNamespace

import pytest
from small_training import fit, make_module

from callbacks import progress
from callbacks.progress import Progress, bar_line, clock, described
from llm.utils import terminal
from llm.utils.terminal import can_redraw, waiting

PARTS = ["loss 2.3456", "bpb 1.1234", "12,345 tok/s", "lr x1.000", "mfu 12.0%"]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def open_screen(monkeypatch):
    """Return a function that makes standard output a terminal of 80 columns and returns it."""

    def become() -> Terminal:
        for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", "80")
        stream = Terminal()
        monkeypatch.setattr(sys, "stdout", stream)
        return stream

    return become


def test_a_bar_shows_what_matters_first_in_a_narrow_terminal():
    line = bar_line(80, "pretrain", 1200, 4000, PARTS, "ETA 1:02:03")
    assert line == "pretrain ━━━───────── 1200/4000  loss 2.3456  bpb 1.1234  ETA 1:02:03"
    wide = bar_line(120, "pretrain", 1200, 4000, PARTS, "ETA 0:09")
    assert wide.startswith("pretrain " + "━" * 7 + "─" * 17) and "12,345 tok/s  lr x1.000" in wide


@pytest.mark.parametrize("width", [10, 20, 40, 80, 79, 110, 200])
def test_a_bar_is_never_wider_than_the_terminal(width):
    assert len(bar_line(width, "pretrain", 7, 9_999_999, PARTS, "ETA 100:00:00")) < width


def test_a_bar_is_full_at_the_end_and_has_plain_signs():
    assert bar_line(80, "sft", 8, 8, [], "0:07", "#-") == "sft ############ 8/8  0:07"
    assert bar_line(80, "sft", 0, 8, ["compiling"], "0:07", "#-") == "sft ------------ 0/8  compiling  0:07"


def test_times_on_a_clock():
    assert [clock(s) for s in (0, 7.4, 65, 3600, 36_125)] == ["0:00", "0:07", "1:05", "1:00:00", "10:02:05"]


def test_values_stand_in_one_order():
    assert described({"mfu": 0.5, "seconds": 3.0, "loss": 1.0}) == ["loss 1.0000", "mfu 50.0%"]
    assert described({"preference/accuracy": 0.75, "bpb": 1.0}) == ["bpb 1.0000", "preferred 75.0%"]


def test_in_a_terminal_there_is_one_bar_from_the_first_moment(tmp_path, open_screen):
    screen = open_screen()
    fit(tmp_path, extra=[Progress(1)])
    shown = screen.getvalue()
    assert "0/6" in shown and "starting" in shown and "6/6" in shown
    assert "pretrain step" not in shown  # no lines beside it
    last = shown.rpartition("\x1b[2K")[2]
    assert "━━━━━━━━━━━━ 6/6" in last and "ETA" not in last


def test_a_bar_says_what_training_waits_for():
    one = Progress(1)
    module = make_module()
    one.module, one.begun, one.first_step = module, None, 0
    assert one.doing() == "starting"
    one.begun = 1.0
    assert one.doing() == "first step"
    module.net.training_forward_blocks = module.net.forward_blocks
    assert one.doing() == "compiling"
    module.progress.doing = "evaluating"
    assert one.doing() == "evaluating"
    module.progress.doing, one.first_done = None, 2.0
    assert one.doing() is None


def test_the_first_step_does_not_count_in_the_time_that_is_left(monkeypatch):
    one, now = Progress(1), [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    budget = SimpleNamespace(seconds=float("inf"), spent=lambda: 0.0)
    one.module = SimpleNamespace(global_step=0, context=SimpleNamespace(total_steps=11), budget=budget)
    one.module.whole_steps = lambda first, last: last - first
    one.begun, one.first_step = 100.0, 0
    assert one.seconds_left() is None
    one.module.global_step, now[0] = 1, 160.0  # which has waited for the compiler
    one.first_done = now[0]
    assert one.seconds_left() == pytest.approx(600)
    one.module.global_step, now[0] = 3, 164.0
    assert one.seconds_left() == pytest.approx(8 * 2)
    budget.seconds = 5.0
    assert one.seconds_left() == 5.0


@pytest.mark.parametrize("how", ["pipe", "dumb", "key"])
def test_without_a_terminal_there_are_lines(tmp_path, monkeypatch, capsys, how):
    if how != "pipe":
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        monkeypatch.setenv("TERM", "dumb" if how == "dumb" else "xterm")
    fit(tmp_path, extra=[Progress(1, bar=how != "key")])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\r" not in out
    assert out.count("pretrain step ") == 6 and "pretrain step 6/6 | loss " in out


def test_a_long_training_has_about_a_hundred_lines(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    one, trainer = Progress(10), SimpleNamespace(is_global_zero=True)
    one.module = module = make_module(20_000)
    steps = iter(range(20_001))
    fake = SimpleNamespace(global_step=next(steps), context=module.context, step_log=module.step_log)
    fake.budget, fake.whole_steps = module.budget, module.whole_steps
    one.module = fake
    one.on_train_start(trainer, fake)
    for fake.global_step in steps:
        one.on_train_batch_end(trainer, fake, None, None, 0)
    lines = capsys.readouterr().out.splitlines()
    assert 90 <= len(lines) <= 110 and lines[0].startswith("pretrain step 10/20000")
    assert lines[-1].startswith("pretrain step 20000/20000")
    fake.global_step, one.last_line = 110, 100
    now[0] = one.last_time + 301  # silent for five minutes
    one.on_train_batch_end(trainer, fake, None, None, 0)
    assert capsys.readouterr().out.startswith("pretrain step 110/")


def test_other_processes_are_silent(capsys):
    one, trainer = Progress(1), SimpleNamespace(is_global_zero=False)
    module = SimpleNamespace(global_step=1, context=SimpleNamespace(total_steps=1), step_log=None)
    one.module = module
    one.on_train_batch_end(trainer, module, None, None, 0)
    assert capsys.readouterr().out == ""


def test_the_bar_ends_where_training_fails(tmp_path, open_screen):
    screen = open_screen()

    def data(step):
        raise OSError("the disk")

    shown = Progress(1)
    with pytest.raises(OSError, match="the disk"):
        fit(tmp_path, make=data, extra=[shown])
    assert shown.bar is None and screen.getvalue().endswith("\x1b[?25h")  # the cursor is back


def test_no_color_leaves_no_colours(tmp_path, open_screen, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    screen = open_screen()
    fit(tmp_path, extra=[Progress(1)])
    with waiting("preparing"):
        pass
    assert "\x1b[3" not in screen.getvalue().replace("\x1b[?25", "")


def test_waiting_shows_nothing_in_a_pipe(capsys, monkeypatch):
    with waiting("preparing"):
        print("a line")
    assert capsys.readouterr().out == "a line\n"
    assert not can_redraw()
    monkeypatch.setattr(terminal.sys, "stdout", None)  # pythonw
    assert not can_redraw()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_real_terminal_can_be_drawn_in(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    ends = os.openpty()
    with open(ends[1], "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert can_redraw()
    os.close(ends[0])
