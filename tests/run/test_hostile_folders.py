"""Run folders of somebody else, mutated at random: every loader answers or refuses in one line, and runs nothing.

FOLDERS of them go through the loaders in `make test`, twenty times as many where FATHOM_FUZZ=2000 is set. FATHOM_SEED
draws others.
"""

import contextlib
import copy
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest
from conftest import compose
from hostile import CODE, mutate
from omegaconf import OmegaConf
from small_training import fit

from llm.checkpoint.model_folder import load_model_folder, save_model_folder
from llm.checkpoint.resume import inspect, load_checkpoint, newest_checkpoint
from llm.config.check import check_task_names
from llm.data.sources import build_source
from llm.errors import UserError
from llm.eval.evaluate import same_data
from llm.eval.saved import saved_config, saved_keys
from llm.experiments import table
from llm.model.config import GPTConfig
from llm.model.gpt import GPT
from llm.report import report
from llm.run.config_diff import describe_differences, diff_configs
from llm.run.content import fingerprints
from llm.run.formats import BEST, ROLLBACKS, read_form, read_scores
from llm.run.samples_file import read_samples
from llm.run.stage_folder import RunDir, find_parent, find_stage, read_manifest, read_metrics
from llm.stages.job import identity
from llm.stages.parents import known_parents
from llm.stages.run_stage import is_finished, keep_old_defaults
from llm.stages.shape import shape_in
from llm.stages.trainer import needed
from llm.tokenizer.bpe import Tokenizer
from tasks.registry import used_tasks

FOLDERS = int(os.environ.get("FATHOM_FUZZ", 100))
SEED = int(os.environ.get("FATHOM_SEED", 16))
HANG = 10  # seconds
GROWTH = 1 << 20  # KiB of memory that no folder may take
SCORES = {
    "bpb": 2.0,
    "chat": {"choice": {"accuracy": 0.5, "n": 4, "stderr": 0.1, "subjects": {"a": {"accuracy": 0.5, "n": 1}}}},
    "samples": [{"prompt": "a", "completion": "b"}],
    "scored": {"bpb": {"data": "embedded", "source": "a", "tokens": 5, "fingerprint": "f", "text": "t"}},
    "other_data": {"local": {"bpb": 1.0, "scored": {"bpb": {"data": "local", "source": "b", "tokens": 5}}}},
}
DATA = {"unit": "documents", "read": {"documents": 3, "read": 9, "trained": 9}, "skipped": {"empty": 1}}
ROWS = "step,loss,bpb\n1,2.0,\n2,1.5,2.5\n"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Two finished stages of a run as training and evaluation leave them, with checkpoints; and what the last needs."""
    run, needs = tmp_path_factory.mktemp("hostile") / "demo", None
    tokenizer = Tokenizer([bytes([b]) for b in range(256)])
    for seed, stage in enumerate(("pretrain", "sft")):
        folder = run / stage
        needs = needed(fit(folder, save_every=3)[0])
        save_model_folder(folder / "model", GPT(GPTConfig(1, 1, 1, 16, 16, 8, 265)).init_weights(seed), tokenizer)
        parents = {"init_from": fingerprints(run / "pretrain" / "model")} if seed else {}
        config = OmegaConf.to_container(compose("train", "experiment=tiny", f"stage={stage}"), resolve=True)
        record = {"stage": stage, "status": "finished", "parent": None, "config": config, "steps": 4, "seconds": 1.0}
        record |= {"metrics": {"loss": 1.0, "pass@4": 0.5}, "fingerprints": fingerprints(folder / "model")}
        record |= {"finished": "2026", "data": DATA, "derived": {"steps": 6, "packing": "crop"}, "parents": parents}
        record |= {"parent": str(run / "pretrain" / "model"), "parent_id": "2026"} if seed else {}
        record |= {"weights": {"step": 6}, "horizons": [4], "environment": {"gpus": [{"name": "a", "memory_gb": 80}]}}
        (folder / "run.json").write_text(json.dumps(record))
        (folder / "eval.json").write_text(json.dumps(SCORES))
        (folder / "metrics.csv").write_text(ROWS)
        (folder / "samples.jsonl").write_text('{"step": 3, "samples": [{"prompt": "a", "completion": "b"}]}\n')
        (folder / "rollbacks.json").write_text('{"count": 1, "left_out": {"3": 1}}')
        (folder / "best").mkdir()
        (folder / "best" / "best.json").write_text('{"step": 3, "bpb": 2.0}')
    return run, needs


@lru_cache(1)
def composed():
    """Return the configuration of a start of the last stage."""
    return compose("train", "experiment=tiny", "stage=sft", "run=demo")


def resumed(folder: Path) -> None:
    """Do what a start of the stage does with its run.json before anything is built."""
    cfg, run = copy.deepcopy(composed()), RunDir(folder.parent.parent, "demo")
    manifest = run.manifest("sft")
    keep_old_defaults(cfg, manifest)
    is_finished(run, "sft", OmegaConf.to_container(cfg, resolve=True), cfg)
    known_parents(manifest or {})
    if (manifest or {}).get("config"):
        describe_differences(diff_configs(manifest["config"], OmegaConf.to_container(cfg, resolve=True)))


def evaluated(folder: Path) -> None:
    """Do what an evaluation does with the saved data before a model is loaded."""
    saved = OmegaConf.create(saved_config(folder, str(folder)), flags={"allow_objects": False})
    with saved_keys(folder):
        check_task_names(saved.data)
        used_tasks(saved.data)
        same_data(saved.data, saved.data, True)
        build_source(saved.data, str(folder))


def loaders(needs) -> dict:
    """Return everything that reads a part of a stage folder, by name."""
    return {
        "read_manifest": read_manifest,
        "read_scores": read_scores,
        "read_metrics": read_metrics,
        "read_samples": read_samples,
        "notes": lambda folder: (
            read_form(folder / "rollbacks.json", ROLLBACKS),
            read_form(folder / "best/best.json", BEST),
        ),
        "report": lambda folder: report.build_report(folder.parent, redraw=False),
        "table": lambda folder: table.as_text(table.grouped(table.read_rows(folder.parent.parent)), diff=True),
        "find_stage": lambda folder: find_stage(folder.parent.parent, "demo"),
        "find_parent": lambda folder: find_parent(folder.parent.parent, "other", "sft", "demo/sft"),
        "stages": lambda folder: RunDir(folder.parent.parent, "demo").finished(),
        "resumed": resumed,
        "evaluated": evaluated,
        "shape_in": lambda folder: shape_in(folder / "model"),
        "fingerprints": lambda folder: (fingerprints(folder / "model"), identity(folder / "model")),
        "load_model_folder": lambda folder: load_model_folder(folder / "model"),
        "unverified": lambda folder: load_model_folder(folder / "model", verify=False),
        "newest_checkpoint": lambda folder: newest_checkpoint(folder / "checkpoints"),
        "fitting_checkpoint": lambda folder: newest_checkpoint(folder / "checkpoints", needs.misfit),
        "inspect": lambda folder: inspect(folder.parent),
    }


@pytest.fixture
def guarded(monkeypatch, tmp_path):
    """Note every attempt to reach the network or to run a program, and an import of code that a folder names."""
    tried = []
    for owner, name in ((socket.socket, "connect"), (socket, "getaddrinfo"), (os, "system"), (os, "execv")):
        monkeypatch.setattr(owner, name, lambda *args, name=name, **kwargs: tried.append(name))
    monkeypatch.setattr(report, "_draw", lambda *args: ([], []))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{CODE}.py").write_text("raise SystemExit('code of a saved run was imported')\n")
    return tried


class Hang(BaseException):
    """Raised by the alarm clock: no `except Exception` of a loader keeps it."""


def ring(*_):
    raise Hang


def test_the_loaders_take_a_sound_folder(sound, guarded):
    run, needs = sound
    for load in loaders(needs).values():
        load(run / "sft")
    assert not guarded and load_checkpoint(run / "sft/checkpoints/step_000006.ckpt")


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2, 3))])
def test_mutated_folders_are_read_or_refused_in_one_line(sound, tmp_path, guarded, capsys, part):
    run, needs = sound
    outcomes: Counter = Counter()
    wrong = []
    signal.signal(signal.SIGALRM, ring)
    for number in range(part, FOLDERS, 4):
        draw = random.Random(f"{SEED} {number}")
        folder = tmp_path / str(number) / "demo" / "sft"
        shutil.copytree(run, folder.parent)
        done = [mutate(folder, draw) for _ in range(draw.choice((1, 1, 1, 2, 3)))]
        seen = set()
        for name, load in loaders(needs).items():
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            signal.alarm(HANG * 6)  # by the clock, on a busy machine; by the processor below
            start = time.process_time()
            try:
                load(folder)
                kind = "read"
            except UserError as error:
                short = "\n" not in str(error).strip() and len(str(error)) < 1500
                kind = "refused in one line" if short else "refused in many lines"
            except Hang:
                kind = "hang"
            except BaseException as error:  # noqa: BLE001  any of them is a finding
                place = error.__traceback__
                while place.tb_next:
                    place = place.tb_next
                kind = (
                    f"{type(error).__name__} {Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno} {error}"
                )
            signal.alarm(0)
            kind = "hang" if time.process_time() - start > HANG else kind
            kind = "memory" if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory > GROWTH else kind
            kind = f"network or a program: {guarded}" if guarded else kind
            guarded.clear()
            seen.add(kind)
            if kind not in ("read", "refused in one line"):
                wrong.append(f"folder {number}, {done}, {name}: {kind[:300]}")
                with capsys.disabled():
                    print(f"\n{wrong[-1][:600]}", file=sys.stderr, flush=True)
        outcomes["refused in one line by a loader" if "refused in one line" in seen else "read by all"] += 1
        capsys.readouterr()
        with contextlib.suppress(OSError):
            shutil.rmtree(tmp_path / str(number))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with capsys.disabled():
        print(f"\nseed {SEED}, part {part}: {dict(outcomes)}, wrong {len(wrong)}", file=sys.stderr)
    assert not wrong, "\n".join(wrong[:40])
    assert len(outcomes) == 2 or FOLDERS < 100
    assert CODE not in sys.modules
