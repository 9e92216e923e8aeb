"""The command line: mistakes are one line that helps, sweeps stop where they fail, nothing heavy is imported."""

import contextlib
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPO, run_cli
from processes import run, run_python

from llm.cli import overrides
from llm.cli.compose import quote_raw
from llm.cli.help import help_text
from llm.cli.options import CONF, Sources, nearest
from llm.cli.overrides import check_overrides, config_groups
from llm.cli.sweep import follow_sweep, separate_run
from llm.config.check import check_values
from llm.config.schema import VARIANTS, known_keys
from llm.errors import UserError
from llm.parallel.env import heard_signals

DEPTHS = [f"d{depth}" for depth in range(1, 65)]


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes

MISTAKES = [
    (["data=embedded", "data.preferences=${paths}"], ["data.preferences.runs=runs: must be a mapping"]),
    (["stage=pretrain", "modle=d4"], ["'modle'", "'model'", "--help"]),
    (["model=d5x"], ["model=d5x does not exist", "model=d5", "d64"]),
    (["model=d0"], ["model=d0 does not exist", "model=d1"]),
    (["model=20"], ["model=20 does not exist", "model=d20"]),
    (["stage=pretrain", "hydra.launcher=3"], ["hydra.launcher=3: choose one by name, hydra/launcher=<name>"]),
    (["stage=pretrain", "hydra.sweeper=5"], ["hydra.sweeper=5: choose one by name, hydra/sweeper=<name>"]),
    (["-m", "stage=pretrain,midtrain", "++hydra.sweeper=null"], ["++hydra.sweeper=null: choose one by name"]),
    (["stage=sfft"], ["stage=sft", "tokenizer"]),
    (["-m", "stage=tokenizer,pretrian"], ["stage=pretrian does not exist", "stage=pretrain"]),
    (["-m", "model=d2,d4", "stage=pretrain", "max_step=3"], ["'max_step'", "'max_steps'"]),
    (["depth=3"], ["'model.depth'"]),
    (["lr=3"], ["'optim."]),
    (["model.dpeth=3"], ["'model.depth'"]),
    (["modle.depth=3"], ["'model.depth'"]),
    (["zzyx=3"], ["unknown key 'zzyx' (list"]),
    (["+zzyx=3"], ["unknown key 'zzyx'"]),
    (["trainer.strategy=muon"], ["trainer.strategy is set by another key here: strategy"]),
    (["optim.seq_len=9"], ["unknown key 'optim.seq_len'; did you mean 'model.seq_len'?"]),
    (["+model.width=3"], ["cannot be added", "model"]),
    (["+seed=3"], ["leave out the '+'"]),
    (["+model=d4"], ["leave out the '+'"]),
    (["~callbacks.sample"], ["'callbacks.samples'"]),
    (["~model.depth"], ["cannot be left out"]),
    (["~optim"], ["~optim: something is needed here; choose one of adamw, muon_2025"]),
    (["++model=d4"], ["leave out the '+'"]),
    (["++model.dpeth=3"], ["'model.depth'"]),
    (["model@other=d4"], ["@"]),
    (["batch=4096"], ["batch.<key>=<value>"]),
    (["optim=null"], ["~optim: something is needed here; choose one of adamw, muon_2025"]),
    (["batch.tokens_per_step=many"], ["batch.tokens_per_step=many: expected a whole number"]),
    (["optim.matrix_lr=???"], ["optim.matrix_lr has no value: give it in the option's YAML file"]),
    (["batch.tokens_per_step=4e3"], ["expected a whole number or null (write 4000)"]),
    (["-m", "batch.tokens_per_step=4096,many"], ["batch.tokens_per_step=many: expected a whole number"]),
    (["-m", "batch.tokens_per_step=4096,0,8192"], ["batch.tokens_per_step=0: must be at least 1"]),
    (["resume=maybe"], ["expected true or false"]),
    (["seed=null"], ["seed=null: expected a whole number"]),
    (["max_steps=0"], ["max_steps=0: must be at least 1"]),
    (["max_steps=x"], ["expected a whole number or null"]),
    (["optim.betas=3"], ["expected a list of numbers"]),
    (["optim.momentum=1.5"], ["at most 1"]),
    (["optim.matrix_lr=0"], ["more than 0"]),
    (["precision.compute=fp8"], ["auto, fp32, bf16"]),
    (["run="], ["run=: must be a text that is not empty"]),
    (["optim=adamw", "optim.matrix_lr=0.1"], ["only optim=muon_adamw has this key, not optim=adamw"]),
    (["-m", "stage=tokenizer,pretrain", "stage.vocab_size=512"], ["only stage=tokenizer", "conf/experiment"]),
    (["stage=tokenizer", "stage.vocab_size=100"], ["at least 265"]),
    (["stage.name=sft"], ["stage=<option>"]),
    (["stage=tokenizer,pretrain"], ["-m"]),
    (["--model=d4"], ["no dashes"]),
    (["--max-steps", "3"], ["max_steps=<value>"]),
    (["model", "d4"], ["key=value"]),
    (["data.path=a{b"], ["quotes"]),
    (["data.mixture.sft.chioce=2"], ["data.mixture.sft.choice", "+data.mixture.sft.chioce"]),
    (["data.mixture.sft={chioce: 2}"], ["data.mixture.sft.choice"]),
    (["stage=grpo", "stage.reward_options.length.words=4"], ["write +stage.reward_options.length.words="]),
    (["+data.mixture.sft.poems=2"], ["no task 'poems'"]),
    (["data.rl=poems"], ["data.rl: there is no task 'poems'"]),
    (["data.tasks.choice.limit=x"], ["expected a whole number"]),
    (["data.tasks.choice.type=quiz"], ["multiple_choice, gsm8k"]),
    (["+data.tasks.poems.type=chat"], ["conf/data/"]),
]


@pytest.mark.parametrize("argv,expected", MISTAKES, ids=[" ".join(argv) for argv, _ in MISTAKES])
def test_a_mistake_is_one_line_that_helps(argv, expected):
    with pytest.raises(UserError) as caught:
        check_overrides("train", argv)
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    "config_name,argv,expected",
    [
        ("evaluate", ["eval=[bpb,chatt]"], "eval=chat?"),
        ("evaluate", ["data.path=x"], "choose data=<option> first (climbmix, custom, embedded, "),
        (
            "evaluate",
            ["+data.tasks.x.type=chat"],
            "choose data=<option> first (climbmix, custom, embedded, ",
        ),
        ("evaluate", ["optim=adamw"], "unknown key 'optim'"),
        ("evaluate", ["eval.max_per_taks=4"], "'eval.max_per_task'"),
        ("serve", ["ui=web"], "one of gradio, api, cli"),
        ("serve", ["port=99999"], "at most 65535"),
        ("serve", ["temprature=1"], "'temperature'"),
    ],
)
def test_mistakes_with_the_other_entry_points(config_name, argv, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        check_overrides(config_name, argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["+callbacks.mine._target_=my.Callback", "+callbacks.mine.every=3"],
        ["~callbacks.samples"],
        ["callbacks.bpb.every=5"],
        ["optim.betas=[0.5,0.6]", "optim.betas.0=0.1"],
        ["optim={weight_decay: 0.2}"],
        ["hydra.verbose=true"],
        ["-m", "stage=tokenizer,pretrain", "model=d2,d4"],
        ["--cfg", "job", "data.tasks.choice.limit=3"],
        ["+data.tasks.choice.options.distractors=0.5"],
        ["model.n_kv_head=1", "stage.target_flops=1e18", "trainer.devices=1", "optim.weight_decay=1"],
    ],
    ids=" ".join,
)
def test_what_is_right_passes(argv):
    check_overrides("train", argv)


@pytest.mark.parametrize(
    "text,file",
    [("max_step: 3", "experiment/bad.yaml"), ("batch: {tokens_per_step: many}", "experiment/bad.yaml")],
)
def test_a_mistake_in_a_file_names_the_file_and_the_key(tmp_path, text, file):
    (tmp_path / "experiment").mkdir()
    (tmp_path / file).write_text(f"# @package _global_\n{text}\n")
    with pytest.raises(UserError) as caught:
        overrides.compose("train", ["experiment=bad"], Sources((CONF, tmp_path)))
    message = str(caught.value)
    assert "\n" not in message
    assert file in message and text.split(":")[0] in message
    assert "max_steps" in message or "Integer" in message


def test_bounds_are_those_of_the_schema():
    cfg = overrides.compose("train", ["model.seq_len=4"])
    with pytest.raises(UserError, match="model.seq_len=4: must be at least 8"):
        check_values(cfg)


def test_nearest():
    assert nearest("modle", ["model", "mode_x"]) == "model"
    assert nearest("d5x", DEPTHS, floor=0) == "d5"
    assert nearest("d21", ["d2", "d20", "d22"]) in ("d20", "d22")
    assert nearest("lr", ["logger", "optim.matrix_lr"]) == "optim.matrix_lr"
    assert nearest("zzz", ["model", "stage"]) is None
    assert nearest("x", []) is None


PROMPTS = [
    "What's 3*(4+5)?",
    "a, b and c",
    "it's \\'quoted\\'",
    "ends in \\",
    "x=1 {y} [z] $w ~",
    "\"both\" 'kinds'",
    "5",
    "${seed}",
    "\\${seed} and '${x}'",
    "two\nlines",
    "\\\\",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_taken_as_it_is(prompt):
    (line,) = quote_raw("serve", [f"prompt={prompt}"])
    check_overrides("serve", [line])
    assert overrides.compose("serve", [line]).prompt == prompt


# ---------------------------------------------------------------------------------------------------------------------
# Sweeps


def finish(root: Path, run: str, stage: str) -> None:
    """A stage that counts as finished: its run.json says so and model/ exists."""
    (root / run / stage / "model").mkdir(parents=True)
    (root / run / stage / "run.json").write_text('{"status": "finished"}')


@pytest.mark.parametrize(
    "given,lines,run,init_from",
    [
        (["experiment=demo"], ["stage=pretrain"], "demo", None),
        (["experiment=demo", "model=d2"], ["model=d2"], "demo-d2", "demo/tokenizer"),
        (["experiment=demo"], ["optim.matrix_lr=0.1", "model=d4"], "demo-matrix_lr=0.1-d4", "demo/tokenizer"),
        (["experiment=demo", "init_from=x"], ["seed=1"], "demo-seed=1", "x"),
        (["experiment=demo", "stage=sft"], ["seed=1"], "demo-seed=1", None),
        (["experiment=demo", "run=b"], ["run=b", "seed=1"], "b", None),
        (["model=d4"], ["model=d4"], None, None),
        (["model=d4"], ["model=d4", "seed=7"], "d4-seed=7", None),
    ],
)
def test_a_sweep_over_settings_has_one_run_each(tmp_path, given, lines, run, init_from):
    finish(tmp_path, "demo", "tokenizer")
    cfg = overrides.compose("train", [f"paths.runs={tmp_path}", *given])
    separate_run(cfg, lines)
    assert (cfg.run, cfg.init_from) == (run, init_from)


def test_a_sweep_prefers_the_parent_in_its_own_run(tmp_path):
    finish(tmp_path, "demo", "tokenizer")
    finish(tmp_path, "demo-d2", "tokenizer")
    cfg = overrides.compose("train", [f"paths.runs={tmp_path}", "experiment=demo", "model=d2"])
    separate_run(cfg, ["model=d2"])
    assert (cfg.run, cfg.init_from) == ("demo-d2", None)


@pytest.mark.parametrize(
    "stages,stage,init_from",
    [
        ("tokenizer,pretrain,sft", "sft", "demo/pretrain"),
        ("tokenizer,pretrain,midtrain,sft", "sft", None),
        ("tokenizer,pretrain,sft,dpo", "dpo", None),
        ("tokenizer,pretrain,sft", "tokenizer", None),
        ("sft,dpo", "sft", "there/pretrain"),
    ],
)
def test_a_stage_of_a_sweep_follows_what_the_sweep_trains(tmp_path, stages, stage, init_from):
    finish(tmp_path, "there", "pretrain")
    run = (init_from or "demo").partition("/")[0]
    cfg = overrides.compose("train", [f"paths.runs={tmp_path}", "experiment=demo", f"stage={stage}", f"run={run}"])
    follow_sweep(cfg, stages.split(","))
    assert cfg.init_from == init_from


def test_a_sweep_without_a_parent_ends_in_its_first_job(tmp_path):
    cfg = overrides.compose("train", [f"paths.runs={tmp_path}", "experiment=demo", "stage=tokenizer"])
    with pytest.raises(
        UserError, match="stage=tokenizer,pretrain,dpo: dpo starts from sft, which neither comes before"
    ):
        follow_sweep(cfg, ["tokenizer", "pretrain", "dpo"])
    cfg.init_from = "x"
    follow_sweep(cfg, ["tokenizer", "pretrain", "dpo"])
    assert cfg.init_from == "x"


@pytest.mark.parametrize(
    "line", ["data.preferences.mine={}", "+data.preferences.mine={}", "data.preferences.mine.train=a"]
)
def test_a_new_source_of_preferences_is_described_in_a_file(line):
    with pytest.raises(UserError, match="describe a new source of preferences in a file") as caught:
        check_overrides("train", ["experiment=own", "stage=dpo", line])
    assert "write +data" not in str(caught.value)


TARGET = """
from llm.errors import UserError

def go(cfg):
    print("ran", cfg.stage.name, cfg.max_steps, flush=True)
    if cfg.stage.name == "midtrain":
        raise {raised}
"""


@pytest.fixture
def entry(tmp_path):
    """Writes an entry point whose stage midtrain raises an exception; returns a function that runs it in tmp_path."""

    def run(raised: str, *args: str):
        (tmp_path / "code").mkdir()
        (tmp_path / "work").mkdir()
        (tmp_path / "code/target.py").write_text(TARGET.format(raised=raised))
        (tmp_path / "code/app.py").write_text("from llm.cli.app import run_app\nrun_app('train', 'target.go')\n")
        return run_cli(str(tmp_path / "code/app.py"), *args, cwd=tmp_path / "work", PYTHONPATH=str(REPO))

    return run


SWEEP = ["-m", "experiment=demo", "stage=pretrain,midtrain,sft", "max_steps=9"]


@pytest.mark.parametrize(
    "raised,code,last",
    [
        (
            "UserError('data.path=x: no such folder')",
            2,
            "error: data.path=x: no such folder [job 2 of 3: stage=",
        ),
        (
            "UserError('set stage.lr_frac=0.5')",
            2,
            "error: set stage.lr_frac=0.5 [job 2 of 3: stage=midtrain; later jobs were not started; give a key stage.*",
        ),
        ("KeyboardInterrupt", 130, "interrupted"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("MemoryError()", 2, "error: out of memory (MemoryError): make room"),
                ("PermissionError(13, 'Permission denied', '/x')", 2, "error: /x: no permission [job 2 of 3: stage="),
                ("RuntimeError('broken')", 1, "error: job 2 of 3: stage=midtrain; later jobs were not started"),
            )
        ),
    ],
)
def test_a_sweep_ends_at_the_first_job_that_fails(entry, tmp_path, raised, code, last):
    result = entry(raised, *SWEEP)
    assert result.returncode == code, result.stderr
    assert re.findall(r"ran .*", result.stdout) == ["ran pretrain 9", "ran midtrain 9"]
    assert result.stderr.splitlines()[-1].startswith(last)
    assert ("Traceback" in result.stderr) == (code == 1)
    assert ("raise RuntimeError" in result.stderr) == (code == 1)
    assert not list((tmp_path / "work").iterdir()), "Hydra left files"


def test_a_single_job_fails_without_job_names(entry, tmp_path):
    result = entry("UserError('x')", "stage=midtrain")
    assert (result.returncode, result.stderr) == (2, "error: x\n")
    assert not list((tmp_path / "work").iterdir())


under_nohup = pytest.mark.skipif(
    signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, reason="pytest runs under nohup, which what it starts inherits"
)


@pytest.mark.parametrize(
    "signum",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGHUP, marks=[under_nohup, pytest.mark.slow]),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
    ],
    ids=lambda signum: signum.name,
)
def test_a_stop_signal_where_nothing_is_to_be_saved_is_one_line(entry, tmp_path, signum):
    result = entry(f"__import__('signal').raise_signal({int(signum)})", *SWEEP)
    assert (result.returncode, result.stderr) == (128 + signum, f"interrupted by {signum.name}\n")
    assert re.findall(r"ran .*", result.stdout) == ["ran pretrain 9", "ran midtrain 9"], "a later job began"
    assert not list((tmp_path / "work").iterdir())


def test_signals_are_as_before_after_a_command_and_a_forked_child_ends_by_them():
    """A child that would raise instead would run what its parent has left to do."""
    before = signal.getsignal(signal.SIGTERM)
    with heard_signals():
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    "value,said",
    [
        ("hydra.job.chdir=foo", "'foo' is not a valid bool"),
        ("hydra.run.dir=/proc/x", "/proc/x: no such file or folder"),
        ("hydra.run.dir=${oc.env:NOPE_X}", "Environment variable 'NOPE_X' not found"),
        ("++hydra.job_logging.root.level=NOPE", "Unknown level: 'NOPE'"),
    ],
)
def test_a_wrong_value_of_a_key_of_hydra_is_one_line(entry, value, said):
    result = entry("UserError('x')", "stage=pretrain", value)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {value.partition('=')[0]}") and said in result.stderr
    assert result.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# The entry points as processes


# Runs an entry point and tells on the last line of stderr which heavy modules that has imported.
IMPORTS = """
import runpy, sys
heavy = ("torch", "lightning", "numpy", "gradio", "matplotlib", "datasets", "transformers", "pyarrow")
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print([name for name in heavy if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("script", ["train", "evaluate", "serve"])
def test_help_lists_groups_and_main_keys_and_imports_nothing_heavy(script):
    result = run_python(IMPORTS, f"{script}.py", "--help")
    assert result.returncode == 0 and result.stderr == "[]\n"
    for group in config_groups(script):
        assert re.search(rf"^ +{group} ", result.stdout, re.MULTILINE), group
    for name, spec in known_keys(script).items():
        if spec.metadata.get("main"):
            assert f"{name} " in result.stdout


def test_full_help_lists_every_key():
    text = help_text("train", every_key=True)
    for stage in VARIANTS["stage"]:
        for name in overrides.compose("train", [f"stage={stage}"]).stage:
            assert name == "name" or f"stage.{name} " in text, name


POINTS_ELSEWHERE = re.compile(
    r"\b(its|their|them|those(?! of)|these|likewise|such an|that evaluation|of it|the same|as data\.)\b"
)


@pytest.mark.parametrize("script", ["train", "evaluate", "serve"])
def test_every_help_line_stands_alone(script):
    """A line is read alone, after a search: words that point to the line before it say nothing then."""
    for name, spec in known_keys(script).items():
        text = spec.metadata.get("help")
        if text is None:
            continue
        assert len(text) > 5 and text[0] not in "([" and not text.endswith("."), name
        assert not (found := POINTS_ELSEWHERE.search(text)), f"{name}: {text!r} points elsewhere ({found[0]})"


@pytest.mark.parametrize("argument,expected", [("modle=d4", "'model'"), ("model=d5x", "model=d5")])
def test_a_mistake_is_said_before_anything_heavy_is_imported(argument, expected):
    result = run_python(IMPORTS, "train.py", "experiment=demo", "stage=pretrain", argument)
    assert result.returncode == 2 and not result.stdout
    mistake, imported = result.stderr.splitlines()
    assert expected in mistake and imported == "[]"


def test_the_sweep_flag_may_come_last():
    result = run_cli("train.py", "stage=tokenizer,pretrian", "-m")
    assert result.returncode == 2
    assert "did you mean stage=pretrain?" in result.stderr


def test_a_sweep_over_stages_explains_a_key_that_the_first_one_lacks():
    result = run_cli("train.py", "-m", "stage=midtrain,sft", "stage.chat_every=0")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: stage.chat_every=0: not every option of stage has this key")


def test_the_check_imports_nothing_heavy():
    code = "import sys; from llm.cli.app import check_overrides; check_overrides('train', sys.argv[1:])"
    names = "print([m for m in ('torch', 'lightning', 'numpy', 'gradio', 'matplotlib') if m in sys.modules])"
    result = run_python(f"{code}; {names}", "experiment=demo", "stage=sft")
    assert result.stdout.strip() == "[]", result.stderr


def test_works_from_any_folder_and_shows_the_config(tmp_path):
    result = run_cli("train.py", "experiment=demo", "stage=sft", "seed=7", "--cfg", "job", "--resolve", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    shown = yaml.safe_load(result.stdout)
    assert (shown["seed"], shown["model"]["depth"], shown["callbacks"]["bpb"]["every"]) == (7, 4, 50)
    assert not list(tmp_path.iterdir())


def test_a_closed_pipe_is_no_error():
    result = run("sh", "-c", f"{sys.executable} train.py --help all | head -n 1")
    assert not result.stderr and result.stdout.count("\n") == 1
