"""The notebooks in docs/notebooks: their code runs, they hold no outputs, the one for Colab goes on after a loss."""

import json
import shutil
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NAMES = ("generate_and_look_inside", "train_by_hand", "read_and_plot_runs", "colab")
STOP = "+callbacks.stop={_target_:small_training.StopAt,step:1,signum:2}"


def cells(name: str, kind: str = "code") -> list[str]:
    content = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


def run_here(name: str) -> dict:
    """Run the code of a notebook in this process, which has imported torch already; return its variables."""
    names: dict = {"__name__": name}
    for number, source in enumerate(cells(name), start=1):
        exec(compile(source, f"{name}, code cell {number}", "exec"), names)
    return names


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_runs):
    """Folder of all notebooks, with a finished tokenizer in runs/ and colab/runs/."""
    folder = tmp_path_factory.mktemp("notebooks")
    for runs in ("runs", "colab/runs"):
        shutil.copytree(tokenizer_runs, folder / runs)
    return folder


@pytest.fixture(autouse=True)
def small(folder, monkeypatch):
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("Agg")
    settings = {"EXPERIMENT": "tiny", "RUNS": folder / "runs", "STEPS": 2, "STAGES": "tokenizer,pretrain"}
    for name, value in settings.items():
        monkeypatch.setenv(f"FATHOM_{name}", str(value))
    yield
    pyplot.close("all")


def test_there_is_a_notebook_of_each_name():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_teaches_in_short_cells_and_holds_no_outputs(name):
    content = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert not [cell for cell in content["cells"] if cell.get("outputs") or cell.get("execution_count")]
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    assert cells(name, "markdown")[0].startswith("# ") and content["cells"][0]["cell_type"] == "markdown"
    assert len(cells(name, "markdown")) >= len(cells(name)) - 1
    links = [part.split(")")[0] for text in cells(name, "markdown") for part in text.split("](")[1:]]
    assert all((FOLDER / link.split("#")[0]).is_file() for link in links)


def test_generate_and_look_inside(capsys):
    names = run_here("generate_and_look_inside")
    inside = names["inside"]
    assert inside.tokens[0] == "<|bos|>" and "temperature 1.5" in capsys.readouterr().out
    assert len(names["best"]) == len(inside.stream) and names["bits"].mean() > 0


def test_train_by_hand():
    names = run_here("train_by_hand")
    assert abs(names["losses"][0] - 6.24) < 0.1 and names["losses"][-1] < names["losses"][0]
    assert names["trainer"].global_step == 2 and 0 < names["scores"]["bpb"] < 8


@pytest.mark.slow
def test_read_and_plot_runs():
    names = run_here("read_and_plot_runs")
    assert names["mine"]["steps"].tolist() == [2, 2, 2] and len(names["final"]) == 3
    assert names["scores"]["bpb"].value > 0


@pytest.mark.slow
def test_colab_goes_on_after_a_disconnect_that_loses_the_disk(folder, monkeypatch):
    """The run is stopped, its folder is lost, and the same cell finds the copy."""
    monkeypatch.setenv("FATHOM_WORK", str(folder / "colab"))
    monkeypatch.setenv("FATHOM_SETTINGS", f"max_steps=2 callbacks=none trainer=cpu {STOP}")
    assert len(cells("colab")) == 1
    assert run_here("colab")["stage"].status == "interrupted"
    shutil.rmtree(folder / "colab" / "runs")
    stage = run_here("colab")["stage"]
    assert stage.status == "finished" and list(stage.metrics().index) == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_in_a_kernel_of_its_own(name, folder, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("FATHOM_WORK", str(folder / "kernel"))
    monkeypatch.setenv("FATHOM_SETTINGS", "max_steps=2 trainer=cpu")
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [one for cell in notebook.cells if cell.cell_type == "code" for one in cell.outputs]
    assert outputs and not [one for one in outputs if one.output_type == "error"]
    if name != "colab":
        assert [one for one in outputs if one.output_type == "display_data" and "image/png" in one.data]
