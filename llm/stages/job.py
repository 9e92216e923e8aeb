"""`Job`: one stage of one run while it is worked on, with its run.json and what is printed about it."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from llm.config.said import origin_of
from llm.config.stages import Stage
from llm.parallel.env import launched_rank
from llm.parallel.launch import processes
from llm.run.content import fingerprints
from llm.run.formats import FORMAT
from llm.run.lock import waiting_lock
from llm.run.stage_folder import SCORE_FILES, RunDir, read_manifest, write_manifest
from llm.utils.addresses import public
from llm.utils.environment import code_facts, code_version, environment
from llm.utils.files import plain, write_atomic

# What a checkpoint repeats of its stage's run.json, to be known by itself.
ORIGIN = ("format", "stage", "parent", "parent_id", "further", "parents", "config", "commit", "version")


@dataclass
class Job:
    """Task of a stage's runner: configuration, row of the table, run, and the model/ folders it starts from."""

    cfg: DictConfig
    row: Stage
    run: RunDir
    config: dict  # the resolved configuration
    parent: Path | None
    further: dict[str, Path] = field(default_factory=dict)  # by key of `Stage.other_parents`
    manifest: dict = field(init=False)
    at_end: Callable[[], None] | None = None  # what is left to do behind the report

    def __post_init__(self):
        self.manifest = {
            "stage": self.row.name,
            "status": "running",
            "parent": None if self.parent is None else str(self.parent),
            "parent_id": identity(self.parent),
            "format": FORMAT,
            "parents": {key: fingerprints(path, self.has_adapter) for key, path in self.models.items()},
            "config": self.config,
            **code_version(),
            "code": code_facts(),
            "environment": environment(),
            "started": now(),
        }
        if (origin := origin_of(self.cfg)) is not None:
            groups = [name for name in origin.choices if "@" not in name and name.partition("/")[0] != "hydra"]
            self.manifest["options"] = {name: plain(origin.choices[name]) for name in groups}
        if self.further:
            self.manifest["further"] = {key: [str(path), identity(path)] for key, path in self.further.items()}

    @property
    def has_adapter(self) -> bool:
        """Return whether the stage trains an adapter: its checkpoints are worth nothing beside another base."""
        return bool((self.config["model"].get("lora") or {}).get("rank"))

    @property
    def models(self) -> dict[str, Path]:
        """Return the model/ folders that the stage starts from, by the key that names them."""
        return ({} if self.parent is None else {"init_from": self.parent}) | self.further

    @property
    def origin(self) -> dict:
        """Return what checkpoints say of the training that saved them: keys of run.json as plain values, no secrets."""
        return public(plain({key: self.manifest[key] for key in ORIGIN if key in self.manifest}))

    @property
    def stage_dir(self) -> Path:
        return self.run.path / self.row.name

    @property
    def title(self) -> str:
        return f"{self.run.name}/{self.row.name}"

    def begin(self) -> None:
        """Remove what was there if overwrite=true, and let run.json say `running`: the last act before work starts."""
        if self.cfg.overwrite and self.stage_dir.exists():
            place = self.stage_dir.resolve()  # a link to another disk stays
            shutil.rmtree(place)
            place.mkdir()
        if "horizons" in self.manifest:  # a finished stage is lengthened
            set_scores_aside(self.stage_dir, self.manifest["horizons"][-1])
        old = read_manifest(self.stage_dir) or {}
        names = ("started", "seconds", "device_seconds", "horizons")
        kept = {key: old[key] for key in names if old.get(key) is not None}
        write_manifest(self.stage_dir, self.manifest | kept)
        self.manifest |= {key: kept[key] for key in kept if not key.endswith("seconds")}
        write_atomic(self.stage_dir / "config.yaml", OmegaConf.to_yaml(public(self.config)))

    def finish(self, results: dict, seconds: float) -> int | None:
        """Write run.json after `seconds` of work; returns the signal that stopped the stage, None if it is finished."""
        old, more = read_manifest(self.stage_dir) or {}, {"seconds": seconds}
        if "device_seconds" in old or not old.get("seconds"):  # not where an older release counted the first part
            more["device_seconds"] = seconds * processes(self.cfg)
        self.manifest |= {key: (old.get(key) or 0.0) + number for key, number in more.items()} | results
        if self.manifest["status"] != "running":
            write_manifest(self.stage_dir, self.manifest)
            return self.manifest["signal"]
        if "horizons" in self.manifest:  # a lengthened stage: the steps of each time that it was finished
            set_scores_aside(self.stage_dir, self.manifest["horizons"][-1])  # of model/ as it was until now
            self.manifest["horizons"] = [*self.manifest["horizons"], self.manifest["steps"]]
        own = {"fingerprints": fingerprints(self.stage_dir / "model") | {"data": data_fingerprint(self.config)}}
        write_manifest(self.stage_dir, self.manifest | own | {"status": "finished", "finished": now()})
        return None


def set_scores_aside(stage_dir: Path, steps: int) -> None:
    """Move the scores of weights of `steps` steps, which go, into a folder of their own, so that nobody reads them."""
    with waiting_lock(stage_dir / ".eval.json.lock"):  # an evaluation may be writing
        found = [name for name in SCORE_FILES if (stage_dir / name).exists()]
        folder = stage_dir / f"scores_of_step_{steps}"
        while found and folder.exists():  # some were measured after the first ones had been set aside
            folder = folder.with_name(f"{folder.name}_more")
        for name in found:
            folder.mkdir(exist_ok=True)
            (stage_dir / name).rename(folder / name)
    if found:
        print(f"scores of the weights of step {steps} are set aside: {folder}", flush=True)


def shows_bar(cfg) -> bool:
    """Return whether this process may draw a bar, or what stands in its place before training."""
    return cfg.trainer.enable_progress_bar and "progress" in cfg.callbacks and launched_rank() == 0


def identity(model: Path | None) -> str | None:
    """Return when the stage of a model/ folder was finished, to tell two trainings apart; None without run.json."""
    manifest = None if model is None else read_manifest(model.parent)
    return None if manifest is None else manifest.get("finished")


def data_fingerprint(config: dict) -> str:
    """Return a SHA-256 over the selection of data in a resolved configuration."""
    return hashlib.sha256(json.dumps(plain(public(config.get("data"))), sort_keys=True).encode()).hexdigest()


def now() -> str:
    """Return the time in UTC to the microsecond, in ISO format."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def show_config(cfg) -> None:
    """Print the resolved configuration, which config.yaml keeps too, without what may be secret in addresses."""
    print(OmegaConf.to_yaml(public(OmegaConf.to_container(cfg, resolve=True))), flush=True)


def show_derived(derived: dict) -> None:
    """Print the derived numbers, which run.json keeps too."""
    print("derived:")
    for key, value in derived.items():
        text = value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.7g}"
        print(f"  {key}: {text}")
    print(flush=True)
