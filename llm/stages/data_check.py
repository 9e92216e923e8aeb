"""Looks at the data of a stage before anything else of it: before parents are sought and processes are launched.

Only what is cheap is looked at: whether paths and task files are there, and whether there is anything to train on. The
stage itself reads every row once, before it loads or builds a network.
"""

from omegaconf import OmegaConf

from llm.config.said import names_key
from llm.config.stages import CHAT_KINDS, Stage
from llm.errors import UserError

# Keys of the group `data` with defaults of every source of text, and the sources that do not read them.
UNREAD = {"column": ("embedded", "tokens", "mixture", "custom"), "val_size": ("tokens", "mixture", "custom")}


def check_data(cfg, row: Stage) -> None:
    """Raise UserError with key and value for data of the stage that is not there."""
    for name in [name for name, sources in UNREAD.items() if row.reads_text and cfg.data.name in sources]:
        if names_key(cfg, f"data.{name}") and cfg.data[name] is not None:
            way = f"give data.sources.<name>.{name}" if cfg.data.name == "mixture" else "leave it out"
            raise UserError(f"data.{name}={cfg.data[name]} is not read by data={cfg.data.name}; {way}")
    if row.reads_text and cfg.data.name in ("local", "tokens"):
        from llm.data.sources import build_source, is_remote

        if not (cfg.dry_run and is_remote(cfg.data)):
            build_source(cfg.data, cfg.paths.data)
    if row.kind not in CHAT_KINDS or cfg.dry_run:  # a dry run does without what it cannot find
        return
    from tasks.registry import all_specs, local_files

    check_sizes(cfg)
    trained, held_out = read_tasks(cfg, row)
    local_files(all_specs(cfg.data), trained, "train")
    local_files(all_specs(cfg.data), held_out, "test")


def read_tasks(cfg, row: Stage) -> tuple[list[str], list[str]]:
    """Return the tasks, or sources of preferences, that a stage trains on and those that it holds rows out of.

    Raises UserError where it needs one and the configuration names none.
    """
    from tasks.registry import held_out_weights

    if row.kind == "preference":
        trained = preferred(cfg)
        held_out = trained
    elif row.kind == "rl":
        trained, held_out = rewarded(cfg, row)
    else:
        trained = trained_tasks(cfg, row)
        held_out = [name for name, repeats in held_out_weights(cfg.data, row.mixture_key).items() if repeats]
    if OmegaConf.select(cfg, "stage.chat_every"):
        chosen = OmegaConf.select(cfg, "stage.chat_tasks")
        held_out = [*held_out, *(cfg.data.eval if chosen is None else chosen)]
    return trained, held_out


def check_sizes(cfg) -> None:
    """Raise UserError where the command gives a size to a task whose rows are not drawn: those of files are all read.

    An option of `data` may give one to a task that is generated until `source` is changed.
    """
    from tasks.registry import GENERATED, all_specs, place, task_class

    for task, spec in all_specs(cfg.data).items():
        where = place(task, spec or {})
        for name in [name for name in ("size", "test_size") if names_key(cfg, f"{where}.{name}")]:
            if spec.get(name) is None or spec.source in GENERATED or task_class(spec, where).reads == "words":
                continue
            raise UserError(
                f"{where}.{name}={spec[name]}: only generated rows and lists of words read it, not "
                f"source={spec.source}; {where}.limit takes the first rows"
            )


def trained_tasks(cfg, row: Stage) -> list[str]:
    """Return the tasks that a chat stage trains on. Raises UserError where there are none."""
    key = f"data.mixture.{row.mixture_key}"
    if not cfg.data.tasks:
        raise UserError(
            f"data.tasks is empty: stage={row.name} trains on conversations; describe a task in the data option or the "
            f"experiment (docs/data.md) and name it in {key}"
        )
    names = [name for name, repeats in (cfg.data.mixture.get(row.mixture_key) or {}).items() if repeats]
    if not names:
        raise UserError(f"{key} names no task with repeats above 0: nothing to train on")
    return names


def preferred(cfg) -> list[str]:
    """Return the sources of preferences that a stage trains on. Raises UserError where there are none."""
    chosen = cfg.stage.preferences
    names = list(cfg.data.preferences) if chosen is None else list(chosen)
    if not names:
        raise UserError(
            f"data.preferences is empty: stage={cfg.stage.name} trains on preferences; describe a source in a file of "
            "conf/data/ or conf/experiment/, as under Preferences in docs/data.md"
        )
    return names


def rewarded(cfg, row: Stage) -> tuple[list[str], list[str]]:
    """Return the tasks of which `row` reads training and held-out rows; UserError where no task can be rewarded."""
    name = OmegaConf.select(cfg, "stage.task") or cfg.data.rl
    if not cfg.data.tasks and name not in cfg.data.preferences:
        raise UserError(
            f"data.tasks is empty: stage={row.name} rewards answers to a task; describe one in a data option or "
            "the experiment (docs/data.md) and name it in data.rl"
        )
    rehearsed = [task for task, repeats in (cfg.data.mixture.get(row.mixture_key) or {}).items() if repeats]
    names, offline = [name] if name else [], OmegaConf.select(cfg, "stage.source") == "data"
    return names + (rehearsed if offline or OmegaConf.select(cfg, "stage.rehearsal") else []), names
