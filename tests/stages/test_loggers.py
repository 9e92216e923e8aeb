"""Loggers: each is trained with, and what it has stored is read back by its own library and compared with metrics.csv.

Those that `dev` does not install are skipped; to run them: pip install -e '.[mlflow,trackio,aim,comet]', in an
environment of their own, and pytest tests/stages/test_loggers.py.
"""

import csv
import importlib.util
import json
import re
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import MagicMock

import pytest
import yaml
from conftest import compose
from lightning.pytorch.loggers import Logger
from small_training import rows
from stages_by_conf import BPB, trained

from callbacks.loggers import TrackioLogger, log_table
from llm.errors import UserError
from llm.run.samples_file import read_samples
from llm.stages.loggers import PACKAGES, check_packages, placed
from llm.stages.own_parts import check_of_trainer

ANSWERS = [("two | 2", "plus\n<two> ünd"), ("is", "")]
SAMPLES = {"samples": {"_target_": "callbacks.samples.Samples", "every": 2}}


class Stored(NamedTuple):
    """Content of a logger: hyperparameters, metrics by step, the text of samples by step, the final table."""

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
    assert [(row["prompt"], row["answer"]) for row in found[:2]] == ANSWERS
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
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.finish()
    [path] = folder.glob("wandb/offline-run-*/run-*.wandb")
    config, metrics, tables = {}, {}, {}
    for data in records_of_wandb(path.read_bytes()):
        record = Record.FromString(data)
        items = [*record.run.config.update, *record.config.update]
        config.update({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
        row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if not row:
            continue
        step = int(row["trainer/global_step"])
        for name in ("samples", "final"):
            if table := row.get(name, {}).get("path") if isinstance(row.get(name), dict) else row.get(f"{name}.path"):
                tables.setdefault(name, {})[step] = (path.parent / "files" / table).read_text()
        metrics.setdefault(step, {}).update(row)
    assert path.parent.parent.parent == folder
    return Stored(config, metrics, tables["samples"], tables["final"][4])


def records_of_wandb(data: bytes):
    """Yield the records of a file in LevelDB's log format: blocks of 32 KiB, parts with 7 bytes in front."""
    at, record = 7, b""
    while at < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record, at = record + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # a whole record, the last part of one
            yield record
            record = b""


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
    from aim import Repo, Run
    from aim.sdk.sequences.text_sequence import Texts
    from aim.storage.context import Context

    repo = Repo(str(folder))
    [name] = repo.list_all_runs()
    run = Run(name, repo=repo)
    assert run.name == "run/pretrain"
    metrics: dict[int, dict] = {}
    for metric in run.metrics():
        for step, (value, *_) in metric.data.items():
            metrics.setdefault(int(step), {})[metric.name] = float(value)
    texts = {}
    for key in ("samples", "final"):
        sequence = Texts(key, Context({}), run)
        texts[key] = {int(step): value.data for step, (value, *_) in sequence.data.items()}
    return Stored(run["hparams"], metrics, texts["samples"], texts["final"][4])


def read_comet(folder: Path) -> Stored:
    [path] = folder.glob("*.zip")
    config, metrics, texts = {}, {}, {"samples": {}, "final": {}}
    with zipfile.ZipFile(path) as archive:
        for line in archive.read("messages.json").decode().splitlines():
            said = json.loads(line)["payload"]
            if param := said.get("param"):
                config[param["paramName"].replace("|", ".")] = param["paramValue"]
            if (metric := said.get("metric")) and metric["step"] is not None:
                metrics.setdefault(metric["step"], {})[metric["metricName"]] = metric["metricValue"]
            if said.get("upload_type") == "text-sample":
                step, name = said["additional_params"]["step"], said["metadata"]["name"]
                texts[name][step] = archive.read(said["file_path"]).decode()
    return Stored(config, metrics, texts["samples"], texts["final"][4])


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
    if name in MODULES and importlib.util.find_spec(MODULES[name]) is None:  # not imported: $TRACKIO_DIR is read then
        pytest.skip(f"needs the package {MODULES[name]}")
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


@pytest.mark.parametrize(("checkpoint", "resume"), [(False, "never"), (True, "allow")])
def test_trackio_goes_on_in_the_run_of_a_stage_that_is_resumed_only(tmp_path, monkeypatch, checkpoint, resume):
    asked = []
    package = SimpleNamespace(init=lambda *names, **options: asked.append(options["resume"]) or MagicMock())
    monkeypatch.setitem(sys.modules, "trackio", package)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    if checkpoint:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints/step_000002.ckpt").touch()
    logger = TrackioLogger("fathom", "run/pretrain", str(tmp_path), tmp_path)
    (tmp_path / "metrics.csv").write_text("step\n")  # every training begins it before its first row
    logger.log_metrics({"loss": 1.0}, 1)
    assert asked == [resume]


# ----- loggers of one's own, and what can be wrong


class Bare(Logger):
    """A logger of one's own without save_dir."""

    name, version = "bare", None

    def __init__(self, word="said"):
        super().__init__()
        self.word, self.told, self.rows, self.tables = word, [], [], []

    def log_hyperparams(self, params):
        self.told.append(params)

    def log_metrics(self, metrics, step):
        self.rows.append((step, metrics))


class Keeper(Bare):
    """A logger of one's own with a folder, tables, and a file that it opens at once."""

    name = "keeper"

    def __init__(self, save_dir, file="rows.txt"):
        super().__init__()
        self.path = Path(save_dir) / file
        self.path.write_text("begun")

    def log_table(self, key, columns, data, step):
        self.tables.append((key, step, columns, data))


def test_loggers_of_ones_own_get_all_of_it(config, tmp_path, monkeypatch):
    parts = {"bare": {"_target_": f"{__name__}.Bare", "word": "{run}/{stage} in {folder}"}}
    parts["keeper"] = {"_target_": f"{__name__}.Keeper"}
    trainer, built = train(config, tmp_path / "run" / "pretrain", parts, monkeypatch)
    kept = [{"prompt": prompt, "completion": answer} for prompt, answer in ANSWERS]
    assert read_samples(tmp_path / "run" / "pretrain") == [{"step": step, "samples": kept} for step in (2, 4)]
    bare, keeper = trainer.loggers[1:]
    for own in (bare, keeper):
        assert [one["seed"] for one in own.told] == [config.seed] and own.told[0]["derived"] == {"steps": 4}
        assert dict(own.told[0]) == dict(built.module.hparams)
        assert [step for step, _ in own.rows] == [0, 1, 2, 3, 4] and {"loss", "bpb"} <= set(own.rows[-1][1])
    assert bare.word == f"run/pretrain in {tmp_path / 'run' / 'pretrain'}"
    assert keeper.path == tmp_path / "run" / "pretrain" / "rows.txt"
    samples = [("samples", step, ["prompt", "answer"], [list(one) for one in ANSWERS]) for step in (2, 4)]
    assert keeper.tables[:2] == samples and keeper.tables[2][:3] == ("final", 4, ["metric", "value"])
    last = numbers(rows(tmp_path / "run" / "pretrain")[-1])
    assert dict(keeper.tables[2][3])["bpb"] == last["bpb"]


def test_no_final_table_where_a_signal_ended_the_sitting(config, tmp_path):
    from small_training import StopAt

    keeper = {"keeper": {"_target_": f"{__name__}.Keeper"}}
    cfg = config.copy()
    cfg.logger = keeper
    stop = {"stop": {"_target_": "small_training.StopAt", "step": 2}}
    trainer, _ = trained(cfg, tmp_path, 4, callbacks=stop)
    assert StopAt.__name__ in {type(one).__name__ for one in trainer.callbacks}
    assert trainer.global_step == 2 and trainer.loggers[1].tables == []


@pytest.mark.parametrize("name", sorted(set(MODULES)))
def test_a_missing_package_is_one_line_with_what_installs_it(name, monkeypatch):
    cfg = compose("train", f"logger={name}")
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(UserError, match=rf"logger.{name}: needs the package \w+: pip install -e '.\[{name}\]'"):
        check_packages(cfg)


@pytest.mark.parametrize(
    "part, problem",
    [
        ({"_target_": "lightning.pytorch.loggers.CsvLogger"}, "CsvLogger"),
        ({"_target_": "lightning.pytorch.loggers.CSVLogger", "flush": 3}, "flush=3: CSVLogger has no such argument"),
        ({"_target_": "callbacks.loggers.TrackioLogger"}, "missing a required argument: 'project'"),
        ({"project": "fathom"}, "must be a mapping, {_target_"),
        (None, "must be a mapping, {_target_"),
    ],
)
def test_a_wrong_logger_is_one_line_before_the_folder_is_touched(config, part, problem):
    cfg = config.copy()
    cfg.logger = {"mine": part}
    with pytest.raises(UserError, match=f"logger.mine.*{re.escape(problem)}"):
        check_of_trainer(cfg)


def test_a_folder_that_is_given_counts(config, tmp_path):
    cfg = config.copy()
    cfg.logger = {"csv": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "elsewhere"}}
    assert placed(cfg.logger.csv, tmp_path)["save_dir"] == "elsewhere"


def test_many_loggers_at_once():
    cfg = compose("train", "logger=[tensorboard,wandb,mlflow]")
    assert list(cfg.logger) == ["tensorboard", "wandb", "mlflow"]


def test_a_logger_that_keeps_no_tables_is_passed_over(tmp_path):
    bare, keeper = Bare(), Keeper(str(tmp_path))
    log_table([bare, keeper], "samples", ["prompt"], [["a"]], 1)
    assert not bare.tables and not bare.rows and len(keeper.tables) == 1
