"""Print and keep samples of the model's answers to fixed prompts."""

from callbacks.cadence import Periodic
from callbacks.loggers import log_table
from llm.eval.samples import NO_PROMPTS, draw_samples
from llm.inference.engine import Engine
from llm.parallel.strategy import full_model
from llm.tokenizer.chat_format import readable
from llm.utils.format import harmless


class Samples(Periodic):
    """Prints greedy completions of the stage's prompts, and gives them to all loggers: that of the stage keeps them."""

    doing = "drawing samples"

    def __init__(self, every: int, max_new_tokens: int = 48):
        super().__init__(every)
        self.max_new_tokens = max_new_tokens

    def names(self, module) -> tuple:
        return ()

    def on_train_start(self, trainer, module) -> None:
        if self.every and not module.context.prompts and trainer.is_global_zero:
            print(NO_PROMPTS, flush=True)
        super().on_train_start(trainer, module)

    def act(self, trainer, module, step) -> None:
        net = full_model(module.net)
        if not trainer.is_global_zero:
            return
        engine = Engine(net, module.context.tokenizer)
        samples = draw_samples(engine, module.context.prompts, self.max_new_tokens)
        texts = [(sample["prompt"], readable(sample["completion"])) for sample in samples]
        log_table(trainer.loggers, "samples", ["prompt", "answer"], texts, step)
        for prompt, answer in texts:
            print(harmless(f"  step {step} | {prompt} -> {answer}").replace("\n", " / "), flush=True)
        module.net.train()
