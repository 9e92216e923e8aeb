"""Parts of gpu_check: decoding, CORE, a training that is killed and goes on, the demo."""

import _bench  # isort: skip  (puts the project on the path)
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch

REPO = Path(__file__).resolve().parent.parent
WORDS = "the fox sees a red apple near some old house and four friends of hers eat it with bread".split()

# ---- Decoding -------------------------------------------------------------------------------------------------------


TARGETS = "batch_1_share_of_copy_rate >= 0.6, batch_64_over_batch_1 >= 20"


def decode(found, small: bool, compiles: bool = False) -> None:
    """Time a decode step of d20 at several batch sizes against the bytes that it must read, and trace some steps.

    compiles: torch compiles the steps before they are recorded. The first batch is timed without recordings too.
    """
    from generation import Numbers

    from llm.inference import slot_batch
    from llm.inference.engine import Engine

    depth, vocab, length, steps, sizes = (2, 300, 16, 8, (1, 4)) if small else (20, 32768, 512, 48, (1, 64, 256))
    if small and compiles:
        return found.note(left_out="a CPU compiles a step for a minute or two")
    recorded_steps_are_the_plain_ones(found, compiles)
    net = network(depth, vocab, torch.float32 if small else torch.bfloat16)
    rate = _bench.copy_rate()
    found.note(copy_bytes_per_s=rate, context=length, targets=TARGETS)
    engine = Engine(net, Numbers(), frozen=True, compiles=compiles)
    for size in sizes[:2] if compiles else sizes:
        time_steps(found, f"batch_{size}", engine, size, length, steps, rate, size == sizes[0])
    graphs = getattr(engine._batch, "graphs", None)
    if graphs is not None:
        found.note(recorded_sizes_of_d20=len(graphs.recorded), attention_of_d20=", ".join(graphs.ways) or "none")
        found.check("nothing_recorded_of_d20", float(not graphs.recorded), 0.0)
    rates = [found.values[f"batch_{size}_tok_per_s"] for size in sizes[:2]]
    found.note(**{f"batch_{sizes[1]}_over_batch_{sizes[0]}": rates[1] / rates[0]})
    if not compiles:
        slot_batch.is_used = lambda device: False  # this process ends with the part
        time_steps(found, "batch_1_plain", Engine(net, Numbers(), frozen=True), 1, length, steps, rate, False)


def network(depth: int, vocab: int, dtype: torch.dtype, *settings: str):
    """Return a modern network of random weights and 2,048 tokens of context that computes in a dtype."""
    from llm.cli.overrides import compose
    from llm.model.gpt import GPT
    from llm.scaling.rules import model_config

    cfg = compose("train", [f"model=d{depth}", "model.seq_len=2048", *settings])
    net = GPT(model_config(cfg.model, cfg.arch, vocab)).init_weights(0).to(_bench.DEVICE)
    net.compute_dtype = dtype
    return net


def time_steps(found, name: str, engine, size: int, length: int, steps: int, rate: float, traces: bool) -> None:
    """Note the seconds of a step of `size` rows of `length` tokens, and their share of the rate (bytes per second)."""
    from _gpu_profile import traced

    from llm.inference.sampling import SamplingParams

    params = SamplingParams(temperature=0.0, max_new_tokens=2 * steps + size)
    for i, turn in enumerate(("warm", "timed", "traced") if traces else ("warm", "timed")):
        draw = torch.Generator().manual_seed(1000 * size + i)  # no prompt twice: the engine would know its keys
        prompts = torch.randint(1, engine.net.config.vocab_size, (size, length), generator=draw).tolist()
        with engine.stream(prompts, params) as stream:
            begin = time.perf_counter()
            next(stream)
            first = time.perf_counter() - begin
            while engine.stats()["waiting"]:  # prompts are read some at a time
                next(stream)
            for _ in range(steps // 2):
                next(stream)
            if turn == "traced":
                with traced() as trace:
                    next(stream)
                found.note(**{f"{name}_{key}": value for key, value in trace.summary(4).items()})
            begin = time.perf_counter()
            for _ in range(steps):
                next(stream)
            seconds = (time.perf_counter() - begin) / steps
        if turn == "timed":
            floor = bytes_of_a_step(engine.net.config, size, length + steps) / rate
            found.note(**{f"{name}_first_token_ms": 1000 * first, f"{name}_step_ms": 1000 * seconds})
            found.note(**{f"{name}_tok_per_s": size / seconds, f"{name}_floor_ms": 1000 * floor})
            found.note(**{f"{name}_share_of_copy_rate": floor / seconds})


@torch.inference_mode()
def recorded_steps_are_the_plain_ones(found, compiles: bool, starts: tuple[int, ...] = (0, 252, 508)) -> None:
    """Check recorded steps of three of four rows in fp32 against plain steps over a cache of their own.

    Four heads share the keys of two, which some kernels of a GPU lay out in another order.

    starts: tokens that the rows hold before some steps; each brings a size of its own, and the last ones a full window.
    """
    from llm.inference.step_graph import RECORD_AFTER, StepGraphs, plain_step

    net, draw = (
        network(2, 300, torch.float32, "model.head_dim=32", "model.n_kv_head=2").eval(),
        torch.Generator().manual_seed(0),
    )
    for weight in net.parameters():
        weight.copy_(0.05 * torch.randn(weight.shape, generator=draw))
    graphs, caches, error = StepGraphs(net, compiles), [net.new_cache(4, 1024) for _ in range(2)], 0.0
    for parts in zip(*(one.parts for one in caches), strict=True):
        for name in ("k", "v"):
            numbers = torch.randn(getattr(parts[0], name).shape, generator=draw)
            for part in parts:
                getattr(part, name).copy_(numbers)
    for start in starts:
        for step in range(RECORD_AFTER + 8):
            newest = torch.randint(0, 300, (3,), generator=draw)
            for one in caches:
                one.lengths[:3] = start + step
            logits = graphs.step(caches[0], newest), plain_step(net, caches[1], newest)
            error = max(error, float((logits[0] - logits[1]).abs().max() / logits[1].abs().max()))
    found.note(recorded_sizes=len(graphs.recorded), attention=", ".join(graphs.ways) or "none")
    found.check("recorded_and_plain_logits", error, 1e-3)
    found.check("sizes_not_recorded", float(len(starts) - len(graphs.recorded)), 0.0)


def bytes_of_a_step(config, batch: int, length: int, size: int = 2) -> float:
    """Return the bytes that a decode step must read: the matrices once, and of every row the keys and values in reach.

    `batch` rows of `length` tokens; `size`: bytes of a number.
    """
    from llm.model.config import num_params

    n = num_params(config)
    weights = n["blocks"] + n["head"]
    keys = sum(min(config.window(layer) or length, length) for layer in range(config.n_layer))
    return size * (weights + batch * keys * 2 * config.n_kv_head * config.head_dim)


# ---- CORE -----------------------------------------------------------------------------------------------------------


def core(found, small: bool) -> None:
    """Time CORE on a generated bundle and compare its verdicts with those of one example at a time."""
    import core as core_bench

    sizes = {"per_task": 4, "depth": 2, "seq_len": 256, "vocab": 320} if small else {"per_task": 64, "depth": 12}
    args = {"seq_len": 2048, "vocab": 1024, "batch_size": 32, "model": ""} | sizes
    with tempfile.TemporaryDirectory() as folder:
        write_bundle(Path(folder), args["per_task"])
        dtype = torch.float32 if small else torch.bfloat16
        result = core_bench.measure(SimpleNamespace(bundle=folder, dtype=dtype, **args))
    # In bf16 what is close may fall either way: the plain form rounds other sums.
    found.check("verdicts_that_differ", result.pop("verdicts_that_differ") / result["examples"], 0.0 if small else 0.1)
    found.note(**{key: str(value) if isinstance(value, torch.dtype) else value for key, value in result.items()})


def write_bundle(folder: Path, n: int) -> None:
    """Write a CORE bundle of three tasks, one of each kind, with `n` examples of made-up words."""
    import numpy as np

    def phrase(seed: int, length: int) -> str:
        return " ".join(np.random.default_rng(seed).choice(WORDS, length))

    rows = {"choice": [], "schema": [], "continue": []}
    for i in range(n):
        options = [phrase(10 * i + k, 3 + k) for k in range(4)]
        rows["choice"].append({"query": phrase(i, 30), "choices": options, "gold": i % 4})
        rows["schema"].append({"context_options": options[:2], "continuation": phrase(i, 6), "gold": i % 2})
        rows["continue"].append({"context": phrase(i, 60), "continuation": phrase(i + 1, 2)})
    kinds = {"choice": ("multiple_choice", 10), "schema": ("schema", 0), "continue": ("language_modeling", 10)}
    (folder / "eval_data").mkdir()
    entries = []
    for name, (kind, shots) in kinds.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows[name])
        (folder / f"eval_data/{name}.jsonl").write_text(lines)
        entries.append({"label": name, "dataset_uri": f"{name}.jsonl", "num_fewshot": [shots], "icl_task_type": kind})
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": entries}))  # JSON is YAML
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nchoice,25\nschema,50\ncontinue,0\n")


# ---- Trainings ------------------------------------------------------------------------------------------------------


def start(folder: str, *words: str) -> subprocess.Popen:
    """Start train.py with its runs in `folder` and its output in a log beside them."""
    command = [sys.executable, str(REPO / "train.py"), *words, f"paths.runs={folder}"]
    log = open(Path(folder) / f"{time.monotonic_ns()}.log", "w")  # noqa: SIM115  (the process holds it)
    started = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=REPO, env=os.environ)
    started.log = log.name
    return started


def finish(started: subprocess.Popen) -> str:
    """Wait for a train.py from `start` and return its output; raises RuntimeError with the last line if it failed."""
    code, words = started.wait(), Path(started.log).read_text(errors="replace")
    if code != 0:
        raise RuntimeError(f"train.py ended with {code}: {words.strip().splitlines()[-1:]}")
    return words


def pretraining(run: str, small: bool) -> tuple[str, ...]:
    """Return the words for train.py that pretrain a small network, with four checkpoints or more."""
    every, steps = (6, 96) if small else (40, 200)  # more checkpoints than a busy machine misses
    words = ["experiment=tiny", "stage=pretrain", f"run={run}", "init_from=tiny/tokenizer", f"save_every={every}"]
    words += [f"max_steps={steps}", "stage.eval_every=0", "stage.sample_every=0"]
    if not small:
        words += ["model=d4", "model.seq_len=512", "batch.tokens_per_step=8192", "batch.micro_batch_size=8"]
    return tuple(words)


def killed_and_continued(folder: str, small: bool) -> str:
    """Kill the run `killed` at its first checkpoint and start it again; return the output of the second start."""
    words, checkpoints = pretraining("killed", small), Path(folder) / "killed/pretrain/checkpoints"
    started = start(folder, *words)
    while started.poll() is None and not list(checkpoints.glob("step_*.ckpt")):
        time.sleep(0.002)
    if started.poll() is None:
        started.send_signal(signal.SIGKILL)
    started.wait()
    return finish(start(folder, *words))


def resume(found, small: bool) -> None:
    """Kill a training at its first checkpoint, start it again, and compare the weights bit for bit with a straight run.

    Two straight runs are compared as well: where they differ, nothing can resume exactly.
    """
    with tempfile.TemporaryDirectory() as folder:
        finish(start(folder, "experiment=tiny", "stage=tokenizer"))
        with ThreadPoolExecutor(3) as pool:
            straight = [
                pool.submit(lambda run=run: finish(start(folder, *pretraining(run, small)))) for run in ("one", "two")
            ]
            said = pool.submit(killed_and_continued, folder, small).result()
            for name, begin in (("how", "device "), ("resumed", "resuming")):
                found.note(**{name: next((line for line in said.splitlines() if line.startswith(begin)), "no")})
            for one in straight:
                one.result()
        between, after = (differing(folder, "one", other) for other in ("two", "killed"))
    found.note(straight_runs_differ_by=between, killed_run_differs_by=after)
    if between == 0:
        found.check("killed_and_straight", after, 0.0)
    else:  # how far is a matter of chance, but of the same kind
        found.check("killed_and_straight_as_two_straight_runs", after, 10 * between)
    if found.values["resumed"] == "no":
        raise RuntimeError("the training ended before it could be killed")


def differing(folder: str, a: str, b: str) -> float:
    """Return |difference of two runs' weights| / |weights|; 0.0 means equal bit for bit."""
    from safetensors.torch import load_file

    one, two = (load_file(Path(folder) / run / "pretrain/model/model.safetensors") for run in (a, b))
    if all(torch.equal(one[name], two[name]) for name in one):
        return 0.0
    squares = [((one[name] - two[name]).double().square().sum(), one[name].double().square().sum()) for name in one]
    apart, norm = (sum(values).item() for values in zip(*squares, strict=True))
    return (apart / norm) ** 0.5


def demo(found, small: bool) -> None:
    """Run all five stages of the demo, shortened; note the seconds of each."""
    stages = "tokenizer,pretrain,midtrain,sft,grpo"
    steps = ("experiment=tiny",) if small else ("experiment=demo", "max_steps=12")
    with tempfile.TemporaryDirectory() as folder:
        words = finish(start(folder, "-m", *steps, f"stage={stages}", "run=demo"))
        for name in stages.split(","):
            manifest = json.loads((Path(folder) / f"demo/{name}/run.json").read_text())
            found.check(f"{name}_finished", float(manifest["status"] != "finished"), 0.0)
            found.note(**{f"{name}_s": manifest["seconds"]})
        found.note(first_steps=[line for line in words.splitlines() if line.startswith("first step")])
        found.check("report", float(not (Path(folder) / "demo/report.md").exists()), 0.0)
