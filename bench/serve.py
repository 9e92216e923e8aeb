"""Streams over HTTP beside the engine in a process of its own, and beside `transformers serve`.

    python bench/serve.py [--depth 4] [--vocab 8192] [--streams 32] [--tokens 128] [--repeats 3] [--transformers 1]

A model with random weights (arch=classic) is saved, and served by `serve.py`. Prompts differ and have 32 to 160 tokens;
each is continued by `tokens` tokens, greedily. Measured in turns: all prompts in one engine without HTTP, all at once
over HTTP as streams, and one alone over HTTP. With --transformers 1 the folder is also served by `transformers serve`
with continuous batching, or without where that fails. Prints a table and a last line of JSON.
"""

import _bench  # isort: skip  (puts the project on the path)
import argparse
import asyncio
import itertools
import json
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

REPO = Path(__file__).resolve().parent.parent
LETTERS = [chr(code) for code in range(33, 127)]
SEQ_LEN = 512


def main() -> None:
    """Measure all ways in turns and print what they reach."""
    numbers = {"depth": 4, "vocab": 8192, "streams": 32, "tokens": 128, "repeats": 3, "transformers": 1}
    args = _bench.arguments(__doc__, numbers)
    with tempfile.TemporaryDirectory(prefix="fathom-bench-") as folder:
        model = save_model(Path(folder), args)
        result = measure(Path(folder), model, args)
        if args.transformers:
            result |= measure_transformers(model, args)
    if "transformers_tok_s" in result:
        result["ratio_to_transformers"] = result["http_tok_s"] / result["transformers_tok_s"]
        result["first_token_to_transformers"] = result["http_first_token_s"] / result["transformers_first_token_s"]
    _bench.show({name: str(value) if name == "dtype" else value for name, value in (vars(args) | result).items()})


def save_model(root: Path, args: argparse.Namespace) -> Path:
    """Save a model with random weights as the finished run `bench`; return its model folder."""
    from llm.checkpoint.model_folder import save_model_folder
    from llm.cli.overrides import compose
    from llm.model.gpt import GPT
    from llm.scaling.rules import model_config
    from llm.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer
    from llm.utils.files import write_json

    pairs = (f"{a}{b}".encode() for a, b in itertools.product(LETTERS, LETTERS))
    merges = itertools.islice(pairs, args.vocab - 256 - len(SPECIAL_TOKENS))
    tokenizer = Tokenizer([*(bytes([b]) for b in range(256)), *merges])
    cfg = compose("train", ["arch=classic", f"model=d{args.depth}", f"model.seq_len={SEQ_LEN}"])
    net = GPT(model_config(cfg.model, cfg.arch, tokenizer.vocab_size)).init_weights(0)
    stage = root / "bench" / "sft"
    save_model_folder(stage / "model", net, tokenizer)
    write_json(stage / "run.json", {"stage": "sft", "status": "finished", "parent": None, "metrics": {}})
    return stage / "model"


def prompts_of(args: argparse.Namespace) -> list[str]:
    """Return texts of 32 to 160 tokens."""
    rng = random.Random(0)
    return ["".join(rng.choices(LETTERS, k=2 * rng.randint(32, 160))) for _ in range(args.streams)]


def measure(root: Path, model: Path, args: argparse.Namespace) -> dict[str, float]:
    """Return tokens per second and times to the first token of engine and server, which take turns."""
    from llm.inference.engine import Engine
    from llm.inference.sampling import SamplingParams
    from llm.serving.chat import load_chat_model

    loaded = load_chat_model(model.parent)
    engine = Engine(loaded.engine.net, loaded.engine.tokenizer, max_rows=args.streams, frozen=True)
    prompts = prompts_of(args)
    ids = [engine.tokenizer.encode_prompt(prompt) for prompt in prompts]
    params = SamplingParams(temperature=0.0, max_new_tokens=args.tokens, ignore_eos=True, use_tools=False)
    found: dict[str, list] = {"engine": [], "all": [], "lone": []}
    options = ["run=bench", f"paths.runs={root}", "port=0", "ui=api", f"api.rows={args.streams}", "api.log=none"]
    with subprocess.Popen(
        [sys.executable, str(REPO / "serve.py"), *options], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            lines = iter(server.stdout.readline, "")
            url = next(match[1] for line in lines if (match := re.search(r"API at (http://\S+)/v1", line)))
            for turn in range(args.repeats + 1):
                seconds = _bench.seconds_of(lambda: engine.generate(ids, params))
                every = asyncio.run(streams(url, "bench/sft", prompts, args.tokens, {"ignore_eos": True}))
                lone = asyncio.run(streams(url, "bench/sft", prompts[:1], args.tokens, {"ignore_eos": True}))
                if turn:  # the first is a warm-up
                    found["engine"].append(args.streams * args.tokens / seconds)
                    found["all"].append(every)
                    found["lone"].append(lone)
        finally:
            server.terminate()
            server.communicate()  # it says that it has ended
    rate = _bench.median(found["engine"])
    http, first = (_bench.median([one[i] for one in found["all"]]) for i in (0, 1))
    lone, lone_first = (_bench.median([one[i] for one in found["lone"]]) for i in (0, 1))
    return {
        "engine_tok_s": rate,
        "http_tok_s": http,
        "http_share_of_engine": http / rate,
        "http_first_token_s": first,
        "lone_tok_s": lone,
        "lone_first_token_s": lone_first,
        "first_token_to_lone": first / lone_first,
    }


def measure_transformers(model: Path, args: argparse.Namespace) -> dict[str, float | str]:
    """Return what `transformers serve` reaches with the folder; what was wrong where it does not run."""
    program = shutil.which("transformers", path=str(Path(sys.executable).parent)) or shutil.which("transformers")
    if program is None:
        return {"transformers": "not installed"}
    problem = ""
    for more in (["--continuous-batching"], []):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [program, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", *more]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            try:
                url = f"http://127.0.0.1:{port}"
                wait(url, server)
                # It ends answers where the model does, which random weights do not; max_tokens ends them.
                rates = [asyncio.run(streams(url, str(model), prompts_of(args), args.tokens, {})) for _ in range(2)]
                mode = "continuous batching" if more else "default"
                return {
                    "transformers": mode,
                    "transformers_tok_s": rates[1][0],
                    "transformers_first_token_s": rates[1][1],
                }
            except (httpx.HTTPError, RuntimeError, ValueError, KeyError) as error:
                problem = repr(error)[:200]
            finally:
                server.terminate()
    return {"transformers": problem}


def wait(url: str, server: subprocess.Popen) -> None:
    """Wait until a server answers. Raises RuntimeError where it ends instead."""
    for _ in range(600):
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}")
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise RuntimeError("the server never answered")


async def streams(url: str, model: str, prompts: list[str], tokens: int, more: dict) -> tuple[float, float]:
    """Ask for the continuation of all prompts at once; return tokens per second and the mean time to the first."""
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        start = time.perf_counter()
        found = await asyncio.gather(*(stream(client, model, prompt, tokens, more) for prompt in prompts))
        seconds = time.perf_counter() - start
    return sum(n for n, _ in found) / seconds, sum(first for _, first in found) / len(found)


async def stream(client: httpx.AsyncClient, model: str, prompt: str, tokens: int, more: dict) -> tuple[int, float]:
    """Read one stream; return its number of tokens and the seconds to its first text.

    Of a server that does not tell how many tokens it used, chunks are counted, or characters in pairs if they are more.
    """
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, **more}
    begun, first, chunks, n_chars, used = time.perf_counter(), None, 0, 0, None
    if more:
        body["stream_options"] = {"include_usage": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            used = (chunk.get("usage") or {}).get("completion_tokens", used)
            if any(choice.get("text") for choice in chunk.get("choices", ())):
                first = first or time.perf_counter() - begun
                chunks += 1
                n_chars += sum(len(choice["text"]) for choice in chunk["choices"])
    if first is None:
        raise ValueError("a stream without text")
    return used or max(chunks, n_chars // 2), first


if __name__ == "__main__":
    main()
