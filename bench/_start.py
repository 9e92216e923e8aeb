"""Ends of the two processes that `bench/start.py` times, and the plain one of them: no Hydra, no Lightning.

    python bench/_start.py CONFIG MODEL

CONFIG: file of the resolved configuration. MODEL: folder of a tokenizer.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def tell(loss: float) -> None:
    """Print when the first step was done, the processor seconds by then (ended children's too) and its loss; exit."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(one.ru_utime + one.ru_stime for one in used)
    print(json.dumps({"at": time.time(), "cpu": cpu, "loss": loss}), flush=True)
    os._exit(0)


def first_step():
    """Return a callback of Lightning's that ends the process behind the first step."""
    import lightning as L

    class FirstStep(L.Callback):
        def on_train_batch_end(self, trainer, module, *args) -> None:
            tell(module.step_log.nats / module.step_log.trained)

    return FirstStep()


def plain(config: dict, model: Path) -> None:
    """Make network, data and optimizer of a resolved configuration as shortly as that can be done, and one step."""
    import torch

    from llm.data.documents import LocalDocuments
    from llm.data.embedded_documents import EmbeddedDocuments
    from llm.data.loader import StepLayout, TextSteps
    from llm.model.compile import compile_training
    from llm.model.gpt import GPT
    from llm.model.linear import resolve_compute_dtype
    from llm.optim.build import build_optimizer
    from llm.scaling.rules import model_config
    from llm.tokenizer.bpe import Tokenizer

    data, batch, stage, device = config["data"], config["batch"], config["stage"], torch.device("cpu")
    tokenizer, length = Tokenizer.load(model), config["model"]["seq_len"]
    net = GPT(model_config(config["model"], config["arch"], tokenizer.vocab_size)).init_weights(config["seed"])
    net.compute_dtype = resolve_compute_dtype("auto", device)
    net.set_attention("auto", device, fixed_shapes=True)
    if config["compile"]:
        compile_training(net)
    is_local = data["name"] == "local"
    text = LocalDocuments(data["path"]) if is_local else EmbeddedDocuments(data["size"], data["seed"])
    text.check()
    rows = batch["micro_batch_size"]
    layout = StepLayout(length, rows, batch["tokens_per_step"] // (rows * length))
    steps = iter(TextSteps(text, tokenizer, layout, split="train", buffer=stage["buffer"]))
    optimizer = build_optimizer(net, Keys(config["optim"]))
    step, losses = next(steps), []
    for micro in step["micro"]:
        loss = net(micro["inputs"], micro["targets"], reduction="sum") / step["n_trained"]
        loss.backward()
        losses.append(loss.item())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tell(sum(losses))


class Keys(dict):
    """Mapping whose keys are attributes too, as those of a configuration."""

    __getattr__ = dict.__getitem__


if __name__ == "__main__":
    plain(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
