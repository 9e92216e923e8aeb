"""Accuracy on the chat tasks, and pass@k of the task that reinforcement learning trains on; all processes measure."""

from callbacks.cadence import Periodic
from llm.eval.task_scores import Draw, chat_core, draw_answers, evaluate_pass_at_k, evaluate_task
from llm.inference.engine import Engine
from llm.inference.sampling import SamplingParams
from llm.parallel.strategy import full_model


class ChatEval(Periodic):
    """Logs `chat/<task>`: greedy accuracy on held-out items of every task of `data.eval`; `chatcore` sums them up."""

    def __init__(self, every: int, max_per_task: int | None = None, max_new_tokens: int = 256):
        super().__init__(every)
        self.max_per_task, self.max_new_tokens = max_per_task, max_new_tokens

    def names(self, module) -> list[str]:
        return [f"chat/{name}" for name in module.context.eval_tasks] if self.every else []

    def act(self, trainer, module, step) -> None:
        engine = Engine(full_model(module.net), module.context.tokenizer)
        results = {
            name: evaluate_task(engine, task, self.max_per_task, self.max_new_tokens)
            for name, task in module.context.eval_tasks.items()
        }
        module.row.update({f"chat/{name}": result["accuracy"] for name, result in results.items()})
        if (overall := chat_core(results)) is not None:
            module.row["chatcore"] = overall
        module.net.train()


class PassAtK(Periodic):
    """Logs `pass@1` and `pass@k` on held-out questions, sampled by `draw` as the rollouts are."""

    def __init__(
        self,
        every: int,
        task,
        num_samples: int,
        max_items: int,
        params: SamplingParams,
        batch_size: int,
        draw: Draw = draw_answers,
    ):
        super().__init__(every, at_start=True)
        self.draw = draw
        self.task, self.num_samples, self.max_items, self.params = task, num_samples, max_items, params
        self.batch_size = batch_size  # questions decoded at a time

    def act(self, trainer, module, step) -> None:
        engine = Engine(full_model(module.net), module.context.tokenizer)
        more = {"max_items": self.max_items, "batch_size": self.batch_size, "draw": self.draw}
        scores = evaluate_pass_at_k(engine, self.task, self.num_samples, self.params, **more)
        module.row.update(scores)
        module.net.train()
