"""Help, the check of the command line, Hydra, and tidy ends: shared by the three entry points.

An entry point is two lines: `run_app("train", "llm.stages.run_stage.run_stage")`. The function is imported only when a
job starts, so that `--help` and a mistake in the command line do not wait for torch.
"""

import contextlib
import math
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from llm.cli.compose import find_sources, parse, quote_raw, search_path, unwrap_names, whole_mixtures, without_groups
from llm.cli.help import help_text
from llm.cli.overrides import Command, check_overrides, no_value
from llm.cli.sweep import best_of_search, follow_sweep, job_title, separate_run, values_of
from llm.config.plugins import load_plugins, plugins_in
from llm.config.said import note_origin, note_settings
from llm.config.trust import trust_command
from llm.errors import UserError, is_out_of_memory, reason_of, system_problem
from llm.parallel.env import adopt_slurm, begin, end, heard_signals, is_launched, launched_rank, take_late
from llm.run.objective import NoObjective
from llm.utils.addresses import without_secrets
from llm.utils.environment import keep_private, tune_process
from llm.utils.imports import pause_collector, resume_collector
from llm.utils.light_torchmetrics import import_in_part
from llm.utils.registry import resolved
from llm.utils.source import check_packages
from llm.utils.streams import is_lost, keep_going, open_streams, without_reader

__all__ = ["JobFailed", "check_overrides", "run_app", "run_command"]

CODE = Path(__file__).resolve().parents[2]  # holds the package llm: jobs that a launcher starts import it too
INTERRUPTED = 130  # what shells report after Ctrl-C
USER_ERROR = 2
FAILED = 1
PATIENCE_SECONDS = 5  # of the other ranks, before they repeat what rank 0 had to say
MULTIRUN = ("-m", "--multirun")
Target = str | Callable[[Any], None]


class JobFailed(BaseException):
    """Carries a job's exception past Hydra, which would catch it and start the next job of the sweep."""

    def __init__(self, job: str, cause: Exception) -> None:
        super().__init__(job)
        self.job, self.cause = job, cause


def run_app(config_name: str, target: Target) -> NoReturn:
    """Run an entry point with the arguments in `sys.argv` and exit.

    `target` is a function that takes the composed configuration, or its dotted name. Exit status: 0, 2 after a
    `UserError` (one `error:` line), 130 after Ctrl-C, 1 after any other exception (with its traceback). A failing
    job ends a sweep, and the sweep says which one it was. A stop signal ends it by one line and status 128 + signal.
    """
    pause_collector()
    import_in_part()
    keep_private()
    open_streams()
    tune_process()
    try:
        with heard_signals():
            status = _run(config_name, target, sys.argv[1:])
        sys.stdout.flush()
        status = status or (FAILED if is_lost() else 0)
    except BrokenPipeError:  # as in `train.py --help | head`
        status = without_reader()
    except OSError as error:
        where = (
            f"{error.filename}: {reason_of(error, error.filename)}" if error.filename else f"output: {error.strerror}"
        )
        status = _complain(where)
    except SystemExit as stop:
        status = stop.code
    if is_launched():
        end(status or 0)
    sys.exit(status)


def _run(config_name: str, target: Target, argv: list[str]) -> int:
    try:
        if "--help" in argv or "-h" in argv:
            if "all" in argv:  # also the keys of what plugins add
                load_plugins(plugins_in(argv))
            print(help_text(config_name, every_key="all" in argv))
            return 0
        keep_going()
        adopt_slurm()
        if is_launched():
            begin()
        check_packages()
        run_command(config_name, target, argv)
    except UserError as error:
        return _complain(str(error))
    except JobFailed as failure:
        return _report(failure)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def run_command(config_name: str, target: Target, argv: Sequence[str], *, in_process: bool = False) -> None:
    """Check the arguments `argv` of an entry point, compose, and call `target` for every job.

    in_process: refuse a launcher whose jobs run elsewhere. Raises UserError for a mistake in the arguments, and
    JobFailed for an exception in a job.
    """
    # Hydra's argparse takes -m before the overrides only.
    take_late()  # of a command before this one in the same process
    argv = [a for a in argv if a in MULTIRUN] + [a for a in argv if a not in MULTIRUN]
    load_plugins(plugins_in(argv))
    argv = quote_raw(config_name, argv)
    if "--shell-completion" in argv or "-sc" in argv:
        command = Command(*find_sources(config_name, argv), [])
    else:
        command = check_overrides(config_name, argv, is_launched=is_launched())
        argv = without_groups(config_name, whole_mixtures(config_name, command.argv, command.sources))
        command = replace(command, argv=argv)
    if command.launcher != "basic":
        if in_process:
            raise UserError(f"hydra/launcher={command.launcher} starts jobs elsewhere: give it to {config_name}.py")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CODE), os.environ.get("PYTHONPATH")]))
        print(f"hydra/launcher={command.launcher} starts the jobs; this command waits for all of them", flush=True)
    _hydra(config_name, command, _job(config_name, target, command))


def _complain(mistake: str) -> int:
    """Print the error line. Rank 0 speaks first: its launcher ends the others, which would repeat it, meanwhile."""
    if launched_rank() > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PATIENCE_SECONDS)
    print("error:", re.sub(r"\s*\n\s*", " ", without_secrets(mistake.strip())), file=sys.stderr)
    return USER_ERROR


def _report(failure: JobFailed) -> int:
    """Say what went wrong in a job and, in a sweep, which job it was."""
    sys.stdout.flush()
    where = f"{failure.job}; later jobs were not started" if failure.job else ""
    mistake = str(failure.cause) if isinstance(failure.cause, UserError) else system_problem(failure.cause)
    if mistake:
        if " stage=" in where and "set stage." in mistake:
            where += "; give a key stage.* to a command of this stage alone, and leave the stage out of the sweep"
        status = _complain(mistake + (f" [{where}]" if where else ""))
        if is_out_of_memory(failure.cause):
            end(status)  # without what libraries do at exit, which would fail too
        return status
    print(without_secrets("".join(traceback.format_exception(failure.cause))), end="", file=sys.stderr)
    if where:
        print(f"error: {where}", file=sys.stderr)
    return FAILED


def _hydra(config_name: str, command: Command, job: Callable[[Any], Any]) -> None:
    """Compose the configuration and call `job` with it, once or for every job of a sweep.

    Hydra's sweeper insists on writing its own configuration to a file; a temporary folder takes it. Processes started
    by a job find the folder in the environment and use the same one. Raises UserError where Hydra fails at a value of a
    key of its own.
    """
    import hydra

    from llm.config.schema import register

    folders, primary = command.sources.folders, command.sources.primary or config_name
    register(folders)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands on exceptions and prints none
    own = [arg for arg in command.argv if re.match(r"[+~]*hydra[./]", arg)]
    sys.argv[1:] = [*command.argv, *search_path(command.sources)]
    main = hydra.main(config_path=str(folders[0]), config_name=primary, version_base="1.3")(job)
    with contextlib.ExitStack() as stack:
        if not command.sweeps:
            stack.enter_context(_one_job())
        if "FATHOM_SWEEP_DIR" not in os.environ:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fathom_sweep_"))
            os.environ["FATHOM_SWEEP_DIR"] = folder
        try:
            main()
            if command.searches:
                print(best_of_search(os.environ["FATHOM_SWEEP_DIR"]), flush=True)
        except Exception as error:  # not of the job: JobFailed is none
            if isinstance(error, UserError) or not own:
                raise
            if command.searches and "No trials are completed" in str(error):
                raise UserError("every trial of this search failed; the lines above say why") from error
            raise UserError(f"{' '.join(own)}: Hydra cannot use this ({_root_of(error)}); leave it out") from error


@contextlib.contextmanager
def _one_job() -> Iterator[None]:
    """Spare Hydra a composition of its own to find out whether this is a sweep: the check has found that it is none."""
    from hydra._internal.hydra import Hydra

    find, Hydra.get_mode = Hydra.get_mode, lambda *args, **named: None
    try:
        yield
    finally:
        Hydra.get_mode = find


def _root_of(error: BaseException) -> str:
    """Return the first line of what an error came of, or its type."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {reason_of(error, error.filename)}"
    if raised := re.findall(r"^[\w.]+(?:Error|Exception)\b.*", str(error), re.M):  # in the trace of a submitted job
        return raised[-1]
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _job(config_name: str, target: Target, command: Command) -> Callable[[Any], Any]:
    """Return the function that Hydra calls: it imports and calls `target`, and names the job if it fails in a sweep.

    In a search a job that fails says why, counts as NaN, and the search goes on; other sweeps end there.
    """
    swept, searches, main_process = command.swept, command.searches, os.getpid()

    def job(cfg: Any) -> Any:
        title = ""
        if swept:
            number, lines = _place_in_sweep(swept)
            title = job_title(swept, lines, number)
            print(f"\n== {title}", flush=True)
        try:
            if (late := take_late()) is not None:
                print(f"not begun: {signal.Signals(late).name} came before; the same command goes on here", flush=True)
                raise SystemExit(128 + late)
            unwrap_names(cfg)
            note_settings(cfg, parse(_settings()))
            note_origin(cfg, config_name, _choices(), command.sources)
            trust_command(cfg)
            load_plugins(cfg.plugins)  # those that a YAML file names, too late for a schema of theirs
            if swept and "init_from" in cfg:
                separate_run(cfg, lines)
                follow_sweep(cfg, next((values_of(one) for one in swept if one.key_or_group == "stage"), []))
            function = _function(target)
            resume_collector()
            value = function(cfg)
        except (Exception, SystemExit) as error:
            if type(error).__name__ == "MissingMandatoryValue":
                error = UserError(no_value(error))
            if searches and not isinstance(error, SystemExit | NoObjective):
                _report(JobFailed("", error))
                print(f"{title}: failed, its objective is NaN", flush=True)
                if command.searches == "optuna":  # it cannot be told of a NaN, but takes a job that raises for one
                    raise UserError(f"{title}: failed") from None
                return math.nan
            if "SUBMITIT_FOLDER" in os.environ or os.getpid() != main_process:
                raise _in_one_line(title, error) from None
            if isinstance(error, SystemExit):
                raise
            raise JobFailed(title, error) from error
        if searches:
            print(f"{title}: {cfg.objective}={value:.6g}", flush=True)
        return value

    return job


def _function(target: Target) -> Callable[[Any], None]:
    """Import the function behind a dotted name; return a function as it is."""
    return resolved(target, "entry point")


def _in_one_line(title: str, error: BaseException) -> UserError:
    """Shorten an error to what the command that waits for a job elsewhere is told; the job's own log gets the rest."""
    if isinstance(error, SystemExit):
        return UserError(f"{title} was stopped (status {error.code}); the same command resumes")
    _report(JobFailed("", error))
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    if "SUBMITIT_FOLDER" in os.environ:
        import submitit

        title += f"; log: {submitit.JobEnvironment().paths.stderr}"
    return UserError(f"{text} [{title}]")


def _settings() -> list[str]:
    """Return the settings of the present job as the command line, or the sweep, gives them."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task)


def _choices() -> dict[str, Any]:
    """Return the options of the groups that the present job was composed of."""
    from hydra.core.hydra_config import HydraConfig

    return dict(HydraConfig.get().runtime.choices)


def _place_in_sweep(swept: Sequence[Any]) -> tuple[int, list[str]]:
    """The number of the present job and the values that the sweep gives it, as `key=value`."""
    from hydra.core.hydra_config import HydraConfig

    keys = {override.get_key_element() for override in swept}
    lines = [line for line in HydraConfig.get().overrides.task if line.partition("=")[0] in keys]
    lines = [re.sub(r"=\{name:'?(.*?)'?\}$", r"=\1", line) for line in lines]  # as `without_groups` wrapped them
    return HydraConfig.get().job.num, lines
