"""Examples per second of the CORE evaluation, beside one example at a time and what the matrix products allow.

    python bench/core.py --bundle PATH [--per-task 100] [--depth 4] [--seq-len 2048] [--model FOLDER] [--vocab 8192]
                         [--batch-size 32] [--dtype auto]

Both forms judge the same examples, task by task in turn, and their verdicts are compared. One at a time is
tests/core_reference.py: every choice in full, all logits. The ceiling is the matrix products outside attention, of each
token once, at the measured matmul rate. Without --model the weights are random (but not zero), and the tokenizer is
trained on the bundle. On a busy machine look at the CPU seconds. Prints a line per task, a table and a line of JSON.
"""

import _bench  # isort: skip  (puts the project on the path)
import sys
import time
from pathlib import Path

import torch

from llm.checkpoint.model_folder import load_model_folder
from llm.cli.overrides import compose
from llm.eval.core import encode, evaluate_core_task, group
from llm.eval.core_bundle import CoreTask, load_bundle, prompts
from llm.model.config import num_params
from llm.model.gpt import GPT
from llm.scaling.rules import model_config
from llm.tokenizer.bpe import Tokenizer

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import core_reference  # noqa: E402


def model(args, tasks: list[CoreTask]) -> tuple[GPT, Tokenizer]:
    """Return network and tokenizer: those of --model, or random weights and a tokenizer trained on the bundle."""
    if args.model:
        net, tokenizer = load_model_folder(args.model)
    else:
        texts = [text for task in tasks for i in range(len(task.examples)) for text in prompts(task, i)]
        tokenizer = Tokenizer.train(texts, args.vocab)
        cfg = compose("train", [f"model=d{args.depth}", f"model.seq_len={args.seq_len}"])
        net = GPT(model_config(cfg.model, cfg.arch, tokenizer.vocab_size)).init_weights(0)
        with torch.no_grad():
            for name, weight in net.named_parameters():
                if "c_proj" in name or "lm_head" in name:
                    weight.normal_(0, 0.02 if "c_proj" in name else 0.2)  # losses that differ as trained ones do
    net.compute_dtype = args.dtype
    return net.to(_bench.DEVICE), tokenizer


def products(net: GPT, tokenizer: Tokenizer, task: CoreTask) -> int:
    """Return the FLOPs of the matrices of blocks and head, for every token that has to be computed."""
    groups = group(encode(task, tokenizer, range(len(task.examples)), net.config.seq_len))
    n_tokens = sum(one.shared + sum(len(row.ids) - one.shared - 1 for row in one.rows) for one in groups)
    n_answers = sum(len(row.ids) - row.start for one in groups for row in one.rows)
    return 2 * (num_params(net.config)["blocks"] * n_tokens + net.config.vocab_size * net.config.n_embd * n_answers)


def timed(run) -> tuple[object, float, float]:
    """Run a function; return (its result, seconds, CPU seconds)."""
    _bench.sync()
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    _bench.sync()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def measure(args) -> dict:
    """Return the examples per second of both forms and the number of verdicts that differ, for `args` as in `main`."""
    tasks = load_bundle(args.bundle, max_per_task=args.per_task)
    net, tokenizer = model(args, tasks)
    rate = _bench.matmul_rate(args.dtype, seconds=2.0)
    evaluate_core_task(net, tokenizer, tasks[0], args.batch_size)  # warm up
    ours, theirs, differing, flops = [0.0, 0.0], [0.0, 0.0], 0, 0
    for task in tasks:
        kind, count = task.kind, len(task.examples)
        entry = {"icl_task_type": kind, "num_fewshot": [task.n_shots], core_reference.DELIMITER: task.delimiter}
        plain, *b = timed(lambda t=task, e=entry: [one_by_one(net, tokenizer, e, t, i) for i in range(len(t.examples))])
        result, *a = timed(lambda t=task: evaluate_core_task(net, tokenizer, t, args.batch_size))
        differs = sum(record["correct"] != right for record, right in zip(result["records"], plain, strict=True))
        differing, flops = differing + differs, flops + products(net, tokenizer, task)
        ours, theirs = ([x + y for x, y in zip(*pair, strict=True)] for pair in ((ours, a), (theirs, b)))
        print(
            f"{task.name:32} {count:5} {count / b[0]:8.2f} /s  {count / a[0]:8.2f} /s  x {b[1] / a[1]:.2f}", flush=True
        )
    n = sum(len(task.examples) for task in tasks)
    return {key: getattr(args, key) for key in ("per_task", "depth", "seq_len", "batch_size", "dtype")} | {
        "examples": n,
        "verdicts_that_differ": differing,
        "one_by_one_per_s": n / theirs[0],
        "examples_per_s": n / ours[0],
        "times_faster": theirs[0] / ours[0],
        "times_faster_in_cpu_seconds": theirs[1] / ours[1],
        "examples_per_cpu_s": n / ours[1],
        "matmul_flops_per_s": rate,
        "ceiling_examples_per_s": n * rate / flops,
        "share_of_ceiling": flops / rate / ours[0],
    }


def main() -> None:
    """Measure on the bundle of the command line and print the results; without a bundle say that it is left out."""
    numbers = {"per-task": 100, "depth": 4, "seq-len": 2048, "vocab": 8192, "batch-size": 32}
    args = _bench.arguments(__doc__, numbers, bundle="", model="")
    if args.bundle:
        _bench.show(measure(args))
    else:
        print("left out: needs --bundle PATH, a folder or zip with the CORE tasks")


def one_by_one(net: GPT, tokenizer: Tokenizer, entry: dict, task: CoreTask, index: int) -> bool:
    """Return the reference's verdict on one example: True for a right answer."""
    return core_reference.judge(net, tokenizer, entry, task.pool, index)[0]


if __name__ == "__main__":
    main()
