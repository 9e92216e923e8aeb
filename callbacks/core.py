"""The CORE metric of a bundle's tasks during pretraining; all processes measure."""

from callbacks.cadence import Periodic
from llm.eval.core import core_metric, evaluate_core_task
from llm.eval.core_bundle import load_bundle
from llm.eval.metrics import numbers
from llm.parallel.strategy import full_model


class CoreEval(Periodic):
    """Logs `core`, and `core/<task>`, the centred accuracies that it is the mean of. Never acts without a bundle."""

    def __init__(self, every: int, bundle: str | None = None, max_per_task: int | None = None):
        super().__init__(0 if bundle is None else every)
        self.tasks = load_bundle(bundle, max_per_task=max_per_task) if self.every else []

    def names(self, module) -> list[str]:
        return ["core", *(f"core/{task.name}" for task in self.tasks)] if self.tasks else []

    def act(self, trainer, module, step) -> None:
        net, tokenizer = full_model(module.net), module.context.tokenizer
        metric = core_metric(self.tasks)
        for task in self.tasks:
            evaluate_core_task(net, tokenizer, task, metric=metric)
        found = numbers(metric)
        del found["core_stderr"]
        module.row.update(found)
