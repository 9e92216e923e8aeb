"""Leads from text and chats of one's own to a first run in four steps: check, tokenizer, size and time, start.

Each step is a form of the Train tab with `experiment=own`, so that its mistakes are those of the command line, and its
jobs go through the queue.
"""

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

from llm.errors import UserError
from llm.experiments.queue_store import OPEN, Job
from llm.experiments.worker import log_of
from llm.panel import jobs
from llm.panel.form import Form, problems_of
from llm.panel.markup import Markup, block, page, section, table, text
from llm.panel.own_files import folder_of
from llm.panel.runs_view import curves, progress
from llm.panel.state import Panel
from llm.run.stage_folder import read_manifest
from llm.utils.source import command

CHECK, TOKENIZER, PRETRAIN, SFT = "check", "tokenizer", "pretrain", "sft"  # stages of this way, in order
VOCABULARIES = ("512", "1024", "2048", "4096", "8192", "16384", "32768")
BYTES_PER_ENTRY = 500  # of text, from which a vocabulary is proposed: its rare entries still occur some times
DEPTHS = ("d2", "d4", "d6", "d8", "d10", "d12")
KEYS = {  # field of `Plan`: the key that its value goes to
    "name": "run",
    "texts": "data.path",
    "chats": "data.tasks.chat.train",
    "vocabulary": "stage.vocab_size",
    "context": "model.seq_len",
    "steps": "max_steps",
    "tokens": "batch.tokens_per_step",
    "seed": "seed",
}


@dataclass(frozen=True)
class Plan:
    """Fields that a newcomer filled in, as text; an empty field takes the default. model: an option of its group."""

    name: str = ""
    texts: str = ""
    chats: str = ""
    vocabulary: str = ""
    model: str = ""
    context: str = ""
    steps: str = ""
    tokens: str = ""
    seed: str = ""

    @classmethod
    def of(cls, *fields: str | None) -> "Plan":
        """Return a plan of the texts in the fields of a page."""
        return cls(*((content or "").strip() for content in fields))


def form_of(plan: Plan, stage: str) -> Form:
    """Return the form of a stage: check, tokenizer, pretrain or sft."""
    used = {
        CHECK: ("texts", "chats"),
        TOKENIZER: ("texts", "vocabulary", "seed"),
        PRETRAIN: ("texts", "context", "steps", "tokens", "seed"),
        SFT: ("texts", "chats", "context", "seed"),
    }[stage]
    given = {field: content for field, content in asdict(plan).items() if field in ("name", *used) and content}
    values = {KEYS[field]: content for field, content in given.items()}
    if stage == CHECK:
        parts = {"text": plan.texts, "tasks": plan.chats}
        values["stage.parts"] = f"[{','.join(part for part, content in parts.items() if content)}]"
    if stage == SFT:
        values["init_from"] = f"{plan.name}/pretrain"
    groups = {"experiment": "own", "stage": stage} | ({"model": plan.model} if plan.model else {})
    return Form(groups, values)


def stages_of(plan: Plan) -> list[str]:
    """Return the stages that are trained after the tokenizer: sft where there are chats."""
    return [PRETRAIN, *([SFT] if plan.chats else [])]


def mistakes(panel: Panel, plan: Plan) -> tuple[dict[str, str], str]:
    """Return what is wrong by field, in the words of the command line, and what belongs to no field."""
    found: dict[str, str] = {}
    other = ""
    if not plan.name:
        found["name"] = "give the run a name, as in letters"
    else:
        try:
            folder_of(panel, plan.name, "text")
        except UserError as error:
            found["name"] = str(error)
    if not plan.texts:
        found["texts"] = "send files of text, or name a folder or file with text"
    if found:
        return found, other
    fields = {key: field for field, key in KEYS.items()}
    for stage in (TOKENIZER, *stages_of(plan)):
        by_key, general = problems_of(form_of(plan, stage), panel.folders)
        for key, message in by_key.items():
            if key in fields:
                found.setdefault(fields[key], message)
            else:
                general = general or message
        other = other or general
    for field in ("texts", "chats"):
        if field not in found and (path := getattr(plan, field)) and not Path(path).expanduser().exists():
            found[field] = f"{KEYS[field]}={path}: there is no such file or folder"
    return found, other


def check_all(panel: Panel, plan: Plan) -> None:
    """Raise UserError for the first mistake in a plan."""
    by_field, other = mistakes(panel, plan)
    for message in (*by_field.values(), *filter(None, [other])):
        raise UserError(message)


def size_of(path: str) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    place = Path(path).expanduser()
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files if file.is_file())


def proposed(size: int) -> str:
    """Return the vocabulary that is proposed for a text of `size` bytes."""
    fitting = [one for one in VOCABULARIES if int(one) * BYTES_PER_ENTRY <= size]
    return fitting[-1] if fitting else VOCABULARIES[0]


def check_data(panel: Panel, plan: Plan) -> str:
    """Return what stage=check says of the data. Raises UserError for a mistake in the plan."""
    check_all(panel, plan)
    return jobs.try_out(panel, form_of(plan, CHECK), CHECK)


def expected(panel: Panel, plan: Plan) -> str:
    """Return what a dry run of pretrain says. Raises UserError for a mistake, and without a tokenizer."""
    check_all(panel, plan)
    if state_of(panel, plan.name, TOKENIZER) != "finished":
        raise UserError("the tokenizer is not trained yet: do step 2 first, and wait for its end")
    return jobs.dry_run(panel, form_of(plan, PRETRAIN))


def start_tokenizer(panel: Panel, plan: Plan) -> list[int]:
    """Put the tokenizer into the queue. Returns the numbers of the jobs. Raises UserError for a mistake."""
    return _start(panel, plan, [TOKENIZER])


def start(panel: Panel, plan: Plan) -> list[int]:
    """Put what is to be trained into the queue, also the tokenizer where none was. Returns the numbers of the jobs.

    Raises UserError for a mistake, and where one of the stages waits or runs already.
    """
    has_tokenizer = state_of(panel, plan.name, TOKENIZER) == "finished" or TOKENIZER in _open(panel, plan.name)
    return _start(panel, plan, [*([] if has_tokenizer else [TOKENIZER]), *stages_of(plan)])


def _start(panel: Panel, plan: Plan, stages: list[str]) -> list[int]:
    check_all(panel, plan)
    for stage, number in _open(panel, plan.name).items():
        if stage in stages:
            raise UserError(f"{plan.name}/{stage} is in the queue already, as job {number}")
    return [number for stage in stages for number in jobs.start(panel, form_of(plan, stage))]


def _open(panel: Panel, name: str) -> dict[str, int]:
    """Return the stages of a run that jobs are still to write, with the numbers of these."""
    return {Path(job.folder or "").name: job.id for job in jobs_of_run(panel, name) if job.state in OPEN}


def state_of(panel: Panel, name: str, stage: str) -> str | None:
    """Return the state of a stage; None before it began."""
    try:
        return panel.index.row(f"{name}/{stage}")["status"]
    except UserError:
        return None


def jobs_of_run(panel: Panel, name: str) -> list[Job]:
    """Return the jobs that write stages of a run, oldest first."""
    if not name or not panel.queue_file.is_file():
        return []
    folder = (panel.runs / name).resolve()
    return [job for job in panel.queue.jobs() if job.folder and Path(job.folder).parent == folder]


def stamp(panel: Panel, name: str) -> tuple:
    """Return what changes whenever `watched` would show something else."""
    last = _last(jobs_of_run(panel, name))
    return (name, *jobs.stamp(panel, last.id if last else None))


def _last(found: list[Job]) -> Job | None:
    """Return the job that runs, else the last one that has begun, else the first one."""
    begun = [job for job in found if job.started]
    return next((job for job in found if job.state == "running"), begun[-1] if begun else next(iter(found), None))


def watched(panel: Panel, name: str) -> str:
    """Return state, curves and log of the jobs of a run, and what may be done with what is finished."""
    found = jobs_of_run(panel, name)
    if not found:
        return ""
    lines = [[job.id, Path(job.folder or "").name, job.state, job.message] for job in found]
    last = _last(found)
    row = jobs.row_of(panel, last) if last else None
    log = jobs.tail_of(log_of(panel.queue, last)) if last else ""
    try:
        charts = section("Curves", curves(panel.columns, row, most=4)) if row else ""
    except UserError:
        charts = ""  # of a file that is being written anew
    return page(
        f"<h3>{text(name)}</h3>",
        table(["job", "stage", "state", "message"], lines, (0,), "jobs of this run"),
        progress(row) if row else "",
        charts,
        section("Log", block(log, "log")) if log else "",
        section("And then", afterwards(panel, name)),
    )


def vocabulary_of(panel: Panel, name: str) -> int | None:
    """Return the size of the vocabulary of a finished tokenizer; None without one."""
    if not name or state_of(panel, name, TOKENIZER) != "finished":
        return None
    return ((read_manifest(panel.runs / name / TOKENIZER) or {}).get("derived") or {}).get("vocab_size")


def tokenizer_facts(panel: Panel, name: str) -> str:
    """Return what a finished tokenizer makes of its text; "" without one."""
    if (size := vocabulary_of(panel, name)) is None:
        return ""
    metrics = (read_manifest(panel.runs / name / TOKENIZER) or {}).get("metrics") or {}
    per = metrics.get("bytes_per_token_val") or metrics.get("bytes_per_token_train")
    held_out = f"; {per:.2f} bytes of held-out text per token" if isinstance(per, float) else ""
    return page(f"<p><b>{text(f'The tokenizer is ready: vocabulary of {size:,}{held_out}')}</b></p>")


def afterwards(panel: Panel, name: str) -> str:
    """Return the commands for the last stage of a run that is finished: chat, evaluate, export; "" without one."""
    finished = [stage for stage in (PRETRAIN, SFT) if state_of(panel, name, stage) == "finished"]
    if not finished:
        return ""
    words = [f"run={name}", f"stage={finished[-1]}", *panel.places]
    parts = "eval=[bpb,samples]" if finished[-1] == PRETRAIN else "eval=[chat,samples]"
    lines = [
        ["chat and API", _code(f"{command('serve')} {shlex.join(words)}")],
        ["evaluate", _code(f"{command('evaluate')} {shlex.join([*words, parts])}")],
        ["export for transformers", _code(f"{command('export')} {shlex.join([*words, 'to=hf'])}")],
    ]
    return table(["", "command"], lines, name="what may be done next")


def _code(line: str) -> Markup:
    return Markup(f"<code>{text(line)}</code>")
