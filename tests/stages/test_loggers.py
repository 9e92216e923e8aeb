"""Loggers: each is trained with, and what it has stored is read back by its own library and compared with metrics.csv.

Those that `dev` does not install are skipped; to run them: pip install -e '.[mlflow,trackio,aim,comet]', in an
environment of their own, and pytest tests/stages/test_loggers.py.
"""

import csv
import json
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from conftest import compose
from small_training import rows
from stages_by_conf import BPB, trained

from llm.stages.loggers import PACKAGES

ANSWERS = [("two | 2", "plus\n<two> ünd"), ("is", "")]
SAMPLES = {"samples": {"_target_": "callbacks.samples.Samples", "every": 2}}


class Stored(NamedTuple):
    """What a logger kept: hyperparameters, metrics by step, the text of samples by step, the final table."""

    hparams: dict
    metrics: dict[int, dict[str, float]]
    samples: dict[int, str]
    final: str


@pytest.fixture(scope="module")
def config():
    words = ("experiment=tiny", "stage=pretrain", "log_every=1", "trainer=cpu", "callbacks=none")
    return compose("train", *words)


def train(config, folder, parts, monkeypatch, total=4):
    """Train in the folder <run>/pretrain with loggers, evaluations and samples; return trainer and stage."""
    drawn = [{"prompt": prompt, "completion": answer} for prompt, answer in ANSWERS]
    monkeypatch.setattr("callbacks.samples.draw_samples", lambda *args: drawn)
    monkeypatch.setattr("callbacks.samples.Engine", lambda *args: None)
    cfg = config.copy()
    cfg.logger = parts
    folder.mkdir(parents=True, exist_ok=True)
    return trained(cfg, folder, total, callbacks={"bpb": BPB} | SAMPLES)


# ----- readers


def read_csv(folder: Path) -> Stored:
    home = folder / "lightning_logs" / "version_0"
    with (home / "metrics.csv").open(newline="") as file:
        metrics = {int(row.pop("step")): numbers(row) for row in csv.DictReader(file)}
    with (home / "samples.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [(row["prompt"], row["answer"]) for row in found[:2]] == [(p, a.replace("\n", "\n")) for p, a in ANSWERS]
    samples = {int(row["step"]): " ".join(map(str, found)) for row in found}
    return Stored(hparams_yaml(home), metrics, samples, (home / "final.csv").read_text())


def read_tensorboard(folder: Path) -> Stored:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    home = folder / "tensorboard"
    events = EventAccumulator(str(home), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    metrics: dict[int, dict] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            metrics.setdefault(event.step, {})[tag] = event.value
    texts = {
        tag: {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"{tag}/text_summary")}
        for tag in ("samples", "final")
    }
    assert events.summary_metadata["_hparams_/session_start_info"].plugin_data.plugin_name == "hparams"
    return Stored(hparams_yaml(home), metrics, texts["samples"], texts["final"][4])


def read_wandb(folder: Path) -> Stored:
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    [path] = folder.glob("wandb/offline-run-*/run-*.wandb")
    store, config, metrics, tables = DataStore(), {}, {}, {}
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        record = Record.FromString(data)
        items = [*record.run.config.update, *record.config.update]
        config.update({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
        row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if not row:
            continue
        step = int(row["trainer/global_step"])
        for name in ("samples", "final"):
            if table := row.pop(name, None):
                tables.setdefault(name, {})[step] = (path.parent / "files" / table["path"]).read_text()
        metrics.setdefault(step, {}).update(row)
    assert path.parent.parent.parent == folder
    return Stored(config, metrics, tables["samples"], tables["final"][4])


def read_mlflow(folder: Path) -> Stored:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("fathom").experiment_id
    [run] = client.search_runs([experiment])
    assert run.info.run_name == "run/pretrain" and run.info.status == "FINISHED"
    metrics: dict[int, dict] = {}
    for name in run.data.metrics:
        for one in client.get_metric_history(run.info.run_id, name):
            metrics.setdefault(one.step, {})[name] = one.value
    tables = {name: client.load_table(experiment, f"{name}.json", [run.info.run_id]) for name in ("samples", "final")}
    assert list(folder.glob("mlartifacts/*/artifacts/samples.json"))
    samples = {step: str(part.to_dict("records")) for step, part in tables["samples"].groupby("step")}
    return Stored(run.data.params, metrics, samples, str(tables["final"].to_dict("records")))


def read_trackio(folder: Path) -> Stored:
    from trackio.sqlite_storage import SQLiteStorage

    assert list((folder.parents[1] / "trackio").glob("fathom.db"))
    metrics, tables = {}, {"samples": {}, "final": {}}
    for row in SQLiteStorage.get_logs("fathom", "run/pretrain"):
        for name in tables:
            if name in row:
                tables[name][row["step"]] = str(row[name]["_value"])
        numeric = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
        metrics.setdefault(row["step"], {}).update(numeric)
    config = SQLiteStorage.get_run_config("fathom", "run/pretrain")
    return Stored(config, metrics, tables["samples"], tables["final"][4])


def read_aim(folder: Path) -> Stored:
    from aim import Repo

    [run] = Repo(str(folder)).iter_runs()
    assert run.name == "run/pretrain"
    metrics: dict[int, dict] = {}
    for metric in run.metrics():
        steps, (values, *_) = metric.values.sparse_numpy()
        for step, value in zip(steps, values, strict=True):
            metrics.setdefault(int(step), {})[metric.name] = float(value)
    texts = {"samples": {}, "final": {}}
    for sequence in run.get_text_sequences() if hasattr(run, "get_text_sequences") else texts_of_aim(run):
        steps, (values, *_) = sequence.values.sparse_list()
        texts[sequence.name].update({step: value.data for step, value in zip(steps, values, strict=True)})
    return Stored(run["hparams"], metrics, texts["samples"], texts["final"][4])


def texts_of_aim(run):
    from aim.sdk.objects.text import Texts
    from aim.storage.context import Context

    return [run.get_text_sequence(name, Context({})) for name in ("samples", "final")] or [Texts]


def read_comet(folder: Path) -> Stored:
    [path] = folder.glob("*.zip")
    with zipfile.ZipFile(path) as archive:
        messages = [json.loads(line) for line in archive.read("messages.json").decode().splitlines()]
    raise AssertionError(json.dumps(messages)[:6000])


READERS = {
    "csv": (read_csv, {"csv": {"_target_": "lightning.pytorch.loggers.CSVLogger"}}),
    "tensorboard": (read_tensorboard, None),
    "wandb": (read_wandb, None),
    "mlflow": (read_mlflow, None),
    "trackio": (read_trackio, None),
    "aim": (read_aim, None),
    "comet": (read_comet, None),
}
MODULES = {extra: module for module, extra in PACKAGES.values()}
QUICK = ("csv", "tensorboard")


def numbers(row: dict[str, str]) -> dict[str, float]:
    return {name: float(cell) for name, cell in row.items() if cell}


def hparams_yaml(home: Path) -> dict:
    return yaml.safe_load((home / "hparams.yaml").read_text())


def flat(tree: dict, above="") -> dict[str, str]:
    """{path of keys, with one sign between: value as text}"""
    found = {}
    for key, value in tree.items():
        name = f"{above}/{key}" if above else re.sub(r"[./]", "/", str(key))
        found |= flat(value, name) if isinstance(value, dict) and value else {name: str(value)}
    return found


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in READERS]
)
def test_what_a_logger_stores_is_what_metrics_csv_holds(config, tmp_path, monkeypatch, name):
    if name in MODULES:
        pytest.importorskip(MODULES[name])
    read, parts = READERS[name]
    folder = tmp_path / "run" / "pretrain"
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(config, folder, parts or compose("train", f"logger={name}").logger, monkeypatch)
    stored, logged = read(folder), rows(folder)
    told = flat(stored.hparams)
    assert told["seed"] == str(config.seed) and told["derived/steps"] == "4" and told["model/depth"] == "2"
    assert [row["step"] for row in logged] == ["0", "1", "2", "3", "4"]
    for row in logged:
        step, expected = int(row.pop("step")), numbers(row)
        for column, value in expected.items():
            assert stored.metrics[step][column] == pytest.approx(value, rel=1e-5, abs=1e-7), (step, column)
    assert set(stored.samples) >= {2, 4}
    assert all("two" in text and "ünd" in json_text(text) for text in stored.samples.values())
    assert "bpb" in stored.final and "lr" in stored.final
    assert f"{float(logged[-1]['bpb']):.4f}"[:-1] in stored.final


def json_text(text: str) -> str:
    return text.encode().decode("unicode_escape") if "\\u" in text else text
