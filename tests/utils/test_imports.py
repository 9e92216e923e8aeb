"""Quick imports: the garbage collector waits, and torchmetrics comes in part until more of it is asked for."""

import gc
import shutil
import sys

import pytest
from conftest import thaw
from processes import run

from llm.utils import imports

LIGHT = """
import sys
from llm.utils.light_torchmetrics import import_in_part
import_in_part()
import lightning.pytorch, torchmetrics
from torchmetrics import Metric, MetricCollection
print(*({"scipy.signal", "matplotlib.pyplot", "transformers", "torchmetrics.text"} & set(sys.modules)) or ["none"])
"""
# What asks for more than the two classes, each in a process of its own.
FURTHER = {
    "a metric of the package": "print(issubclass(torchmetrics.Accuracy, Metric))",
    "a submodule": "import torchmetrics.aggregation as part; print(issubclass(part.MeanMetric, Metric))",
    "a name of the module for plots": "from torchmetrics.utilities.plot import plot_curve; print(callable(plot_curve))",
    "all names": "from torchmetrics import *; print(MeanMetric is torchmetrics.MeanMetric)",
    "a plot": """
from llm.eval.metrics import BitsPerByte
import torch
import matplotlib; matplotlib.use("agg")
metric = BitsPerByte(torch.ones(4))
metric.update(torch.ones(2), torch.tensor([1, 2]))  # 1 / ln 2
print(abs(metric._plot()[1].lines[0].get_ydata().item() - 1.442695) < 1e-5)
""",
    "a name that is not there": "print(not hasattr(torchmetrics, 'Nothing') and hasattr(torchmetrics, 'Accuracy'))",
    "its version": "import importlib.metadata as m; print(torchmetrics.__version__ == m.version('torchmetrics'))",
}


ALWAYS = ("a metric of the package", "a plot")  # the others take seconds each, for `make test-full`


@pytest.mark.parametrize(
    "more",
    [pytest.param(more, id=name, marks=() if name in ALWAYS else pytest.mark.slow) for name, more in FURTHER.items()],
)
def test_torchmetrics_comes_in_part_and_whole_when_more_is_asked_for(more):
    assert run(sys.executable, "-c", LIGHT + more).stdout.split() == ["none", "True"]


def test_torchmetrics_that_is_imported_already_stays_as_it_is():
    import torchmetrics

    from llm.utils.light_torchmetrics import Finder, import_in_part

    import_in_part()
    assert not any(isinstance(finder, Finder) for finder in sys.meta_path)
    assert torchmetrics.Accuracy


@pytest.fixture
def collector():
    """Put the collector back as it was."""
    was_on, frozen = gc.isenabled(), gc.get_freeze_count()
    yield
    (gc.enable if was_on else gc.disable)()
    if not frozen:
        thaw()


def test_the_collector_is_off_from_pause_to_resume_and_then_leaves_out_what_is_there(collector):
    gc.enable()
    imports.pause_collector()
    assert not gc.isenabled()
    kept = [[] for _ in range(1000)]
    before = gc.get_freeze_count()
    imports.resume_collector()
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(kept)
    frozen = gc.get_freeze_count()
    kept += [[] for _ in range(1000)]
    imports.resume_collector()  # what is garbage in a later job of a sweep must go
    assert gc.get_freeze_count() <= frozen  # fewer where something of before has gone meanwhile


def test_the_collector_is_off_while_importing_and_then_as_it_was(collector):
    for was_on in (True, False):
        (gc.enable if was_on else gc.disable)()
        with pytest.raises(ImportError), imports.importing():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() is was_on


def test_importing_leaves_the_objects_of_a_notebook_in_the_collectors_sight(collector):
    gc.enable()
    thaw()
    with imports.importing():
        kept = [[] for _ in range(1000)]
    assert gc.get_freeze_count() == 0
    gc.freeze()  # as in a process that has resumed after its imports
    with imports.importing():
        kept += [[] for _ in range(1000)]
    frozen = gc.get_freeze_count()
    thaw()
    assert frozen >= 2000


FIRST_STEP = """
import os, sys
from llm.cli.app import run_app
def go(cfg):
    from callbacks.stopwatch import Stopwatch
    from llm.stages.run_stage import run_stage
    def done(*args):
        heavy = ("datasets", "gradio", "matplotlib", "pandas", "scipy", "torchmetrics.text", "transformers")
        print("first step", *(name for name in heavy if name in sys.modules), flush=True)
        os._exit(0)
    Stopwatch.on_train_batch_end = done
    run_stage(cfg)
run_app("train", go)
"""


def test_nothing_heavy_that_training_does_without_is_imported_before_its_first_step(tokenizer_runs, tmp_path):
    shutil.copytree(tokenizer_runs, tmp_path / "runs")
    settings = ["experiment=tiny", "stage=pretrain", f"paths.runs={tmp_path / 'runs'}"]
    assert run(sys.executable, "-c", FIRST_STEP, *settings).stdout.splitlines()[-1] == "first step"
