"""Streams over HTTP beside the engine in a process of its own, and beside `transformers serve`.

    python bench/serve.py [--depth 4] [--vocab 8192] [--streams 32] [--tokens 128] [--repeats 3] [--transformers 1]

A model with random weights (arch=classic) is saved, and served by `serve.py`. Prompts differ, in every turn anew, and
have 43 to 220 tokens; each is continued by `tokens` tokens, greedily. Measured in turns: all prompts in one engine
without HTTP; all at once over HTTP as streams; some alone, one after the other; and `streams` clients that ask one
question after the other, each while the others read. With --transformers 1 the folder is also served by `transformers
serve` with continuous batching, or without where that fails. Prints a table and a last line of JSON.

Client, server and worker share the machine. The engine alone has it all: whatever HTTP costs is missing in
`http_share_of_engine`, the client too, which therefore keeps what comes and reads it when the clock has stopped.
`http_first_token_to_lone`: where all ask at once, the prompts must all be read, one after the other, by cores that a
lone request has for itself; it grows with `streams`, and docs/lab_notebook.md computes its floor. Users rarely ask in
the same millisecond: `steady_first_token_to_lone` is for a question that comes while all others are being answered.
"""

import _bench  # isort: skip  (puts the project on the path)
import argparse
import asyncio
import functools
import gc
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
import urllib.request
from pathlib import Path

import httptools

REPO = Path(__file__).resolve().parent.parent
MODEL = "bench/sft"
LONE = 8  # prompts that are asked alone, one after the other
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


def prompts_of(args: argparse.Namespace, seed: int) -> list[str]:
    """Return texts of 43 to 220 tokens, others for every seed: what a server has read it need not read again."""
    rng = random.Random(seed)
    return ["".join(rng.choices(LETTERS, k=2 * rng.randint(32, 160))) for _ in range(args.streams)]


def measure(root: Path, model: Path, args: argparse.Namespace) -> dict[str, float]:
    """Return tokens per second and times to the first token of engine and server, which take turns."""
    from llm.inference.engine import Engine
    from llm.inference.sampling import SamplingParams
    from llm.serving.chat import load_chat_model

    loaded = load_chat_model(model.parent)
    engine = Engine(loaded.engine.net, loaded.engine.tokenizer, max_rows=args.streams, frozen=True)
    params = SamplingParams(temperature=0.0, max_new_tokens=args.tokens, ignore_eos=True, use_tools=False)
    found: list[dict[str, float]] = []
    options = ["run=bench", f"paths.runs={root}", "port=0", "ui=api", f"api.rows={args.streams}", "api.log=none"]
    with subprocess.Popen(
        [sys.executable, str(REPO / "serve.py"), *options], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            gc.freeze()  # or looking for garbage among torch's objects would cost the client more than its work
            lines = iter(server.stdout.readline, "")
            url = next(match[1] for line in lines if (match := re.search(r"API at (http://\S+)/v1", line)))
            for turn in range(args.repeats + 1):
                prompts = prompts_of(args, 3 * turn)
                ids = [engine.tokenizer.encode_prompt(prompt) for prompt in prompts]
                seconds = _bench.seconds_of(functools.partial(engine.generate, ids, params))
                one = {"engine_tok_s": args.streams * args.tokens / seconds}
                one |= asyncio.run(over_http(url, turn, args))
                if turn:  # the first is a warm-up
                    found.append(one)
        finally:
            server.terminate()
            server.communicate()  # it says that it has ended
    result = {name: _bench.median([one[name] for one in found]) for name in found[0]}
    result["http_share_of_engine"] = result["http_tok_s"] / result["engine_tok_s"]
    for name in ("http", "steady"):
        result[f"{name}_first_token_to_lone"] = result[f"{name}_first_token_s"] / result["lone_first_token_s"]
    return result


async def over_http(url: str, turn: int, args: argparse.Namespace) -> dict[str, float]:
    """Return what streams reach that begin together, one after the other, and while others are under way."""
    together, alone, spread = (prompts_of(args, 3 * turn + i) for i in range(3))
    more = {"ignore_eos": True}
    rate, first = await streams(url, MODEL, together, args.tokens, more)
    lone = [await streams(url, MODEL, [prompt], args.tokens, more) for prompt in alone[:LONE]]
    lone_rate, lone_first = (sum(values) / len(lone) for values in zip(*lone, strict=True))
    steady_first = await steady(url, MODEL, spread, args.tokens, more)
    return {
        "http_tok_s": rate,
        "lone_tok_s": lone_rate,
        "lone_first_token_s": lone_first,
        "http_first_token_s": first,
        "steady_first_token_s": steady_first,
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
                rates = [asyncio.run(streams(url, str(model), prompts_of(args, i), args.tokens, {})) for i in range(2)]
                mode = "continuous batching" if more else "default"
                return {
                    "transformers": mode,
                    "transformers_tok_s": rates[1][0],
                    "transformers_first_token_s": rates[1][1],
                }
            except (OSError, RuntimeError, ValueError, KeyError) as error:
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
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError("the server never answered")


class Answer(asyncio.Protocol):
    """Answer to one request on a connection of its own: the pieces of its body, and when each came.

    It does nothing else while the clock runs: whatever the client computes, the server beside it cannot.
    """

    def __init__(self, request: bytes, begun: float, ended: asyncio.Future):
        self.request, self.begun, self.ended, self.now = request, begun, ended, begun
        self.parser, self.pieces = httptools.HttpResponseParser(self), []

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Send the request."""
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """Take what came."""
        self.now = time.perf_counter()
        self.parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the body."""
        self.pieces.append((self.now, body))

    def on_message_complete(self) -> None:
        """Note that the answer is whole."""
        self.ended.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        """Let whoever waits know that no more will come."""
        if not self.ended.done():
            self.ended.set_exception(error or ConnectionError("the server closed the connection within an answer"))

    def read(self) -> tuple[int, float]:
        """Return the number of tokens and the seconds to the first text, once the stream has ended.

        Of a server that does not tell how many tokens it used, chunks are counted, or characters in pairs if they are
        more. Raises ValueError for an error and for an answer without text.
        """
        if self.parser.get_status_code() != 200:
            raise ValueError(b"".join(body for _, body in self.pieces).decode()[:200])
        first, chunks, n_chars, used, rest = None, 0, 0, None, b""
        for now, body in self.pieces:
            *lines, rest = (rest + body).split(b"\n")
            for line in lines:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line.removeprefix(b"data: "))
                used = (chunk.get("usage") or {}).get("completion_tokens", used)
                if text := "".join(choice.get("text") or "" for choice in chunk.get("choices", ())):
                    first = first or now - self.begun
                    chunks, n_chars = chunks + 1, n_chars + len(text)
        if first is None:
            raise ValueError("a stream without text")
        return used or max(chunks, n_chars // 2), first


async def stream(url: str, model: str, prompt: str, tokens: int, more: dict) -> Answer:
    """Read one stream to its end."""
    begun, (host, port) = time.perf_counter(), url.removeprefix("http://").split(":")
    asked = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, **more}
    if more:
        asked["stream_options"] = {"include_usage": True}
    body, loop = json.dumps(asked).encode(), asyncio.get_running_loop()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    request, ended = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body, loop.create_future()
    transport, answer = await loop.create_connection(lambda: Answer(request, begun, ended), host, int(port))
    try:
        async with asyncio.timeout(600):
            await ended
    finally:
        transport.close()
    return answer


async def streams(url: str, model: str, prompts: list[str], tokens: int, more: dict) -> tuple[float, float]:
    """Ask for the continuation of all prompts at once; return tokens per second and the mean time to the first."""
    start = time.perf_counter()
    answers = await asyncio.gather(*(stream(url, model, prompt, tokens, more) for prompt in prompts))
    seconds = time.perf_counter() - start
    found = [answer.read() for answer in answers]
    return sum(n for n, _ in found) / seconds, sum(first for _, first in found) / len(found)


async def steady(url: str, model: str, prompts: list[str], tokens: int, more: dict) -> float:
    """Let one client per prompt ask three questions, one after the other; return the mean time to the first token.

    Answers have half to one and a half times `tokens`, so that clients ask at times of their own while the others
    read theirs. Counted is the second question: at the first all begin together, behind it some clients have gone.
    """
    rng, answers = random.Random(0), []
    lengths = [[rng.randint(tokens // 2, 3 * tokens // 2) for _ in range(3)] for _ in prompts]

    async def client(prompt: str, lengths: list[int]) -> None:
        for turn, n in enumerate(lengths):
            other = prompt[2 * turn :] + prompt[: 2 * turn]  # of equal length
            answer = await stream(url, model, other, n, more)
            if turn == 1:
                answers.append(answer)

    await asyncio.gather(*map(client, prompts, lengths))
    return sum(answer.read()[1] for answer in answers) / len(answers)


if __name__ == "__main__":
    main()
