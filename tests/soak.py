"""Soak of the server: many clients for minutes, with cancels, bad requests and slow readers among them.

    python tests/soak.py [--seconds 600] [--clients 64] [--seed 0] [--workers 1]

A model that knows a few answers by heart is served by `serve.py`, so every greedy answer can be checked. Prints a table
and a last line of JSON, and exits with 1 where an answer was wrong, a request got no proper status, a row was never
freed, or the memory of server and workers grew by more than 2 % after the first quarter of the time.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # many small matrices are fastest on one thread

import processes  # noqa: E402
from serving_run import ServerProcess, make_run  # noqa: E402

MODEL = "tiny/sft"
KNOWN = {
    "Who are you?": "I am Fathom, a small language model. Ask me **anything**!",
    "Greet me.": "Grüße! 你好 😀",
    "Ava has 12 apples. She buys 7 more. How many?": "Ava has 12 + 7 = 19 apples.\n#### 19",
    "List two.": "- one\n- two\n\n`a*b*c` and 2*3*4 <b>",
}
SONG = "la " * 300
BAD = (
    ({"temperature": 9}, 400),
    ({"model": "gpt-4o"}, 404),
    ({"messages": []}, 400),
    ({"messages": [{"role": "user", "content": "x" * 8001}]}, 400),
    ({"logit_bias": {"99999": 1}}, 400),
    ({"structured_outputs": {"regex": "("}}, 400),
    ({"unknown": 1}, 400),
)
GROWTH = 0.02  # of memory
WARM_SHARE = 0.25  # of the time, before memory is compared


class Soak:
    """Clients of one server and what happened to them: `counts` of outcomes, `problems` in words."""

    def __init__(self, url: str, seed: int):
        self.url, self.rng, self.counts, self.problems = url, random.Random(seed), Counter(), []

    async def client(self, end: float) -> None:
        """Send requests of random kinds until the time is over."""
        kinds = (self.whole, self.streamed, self.cancelled, self.bad, self.slow, self.form)
        async with httpx.AsyncClient(base_url=self.url, timeout=600) as http:
            while time.monotonic() < end:
                (kind,) = self.rng.choices(kinds, weights=(30, 30, 15, 10, 10, 5))
                try:
                    await kind(http)
                except httpx.HTTPError as error:
                    self.problems.append(f"{kind.__name__}: {error!r}")

    def request(self, **change) -> tuple[dict, str]:
        """Return a request and the answer that it must get."""
        if self.rng.random() < 0.5:
            question, answer = self.rng.choice(list(KNOWN.items()))
            more = {}
        else:
            n = self.rng.randint(1, 300)
            question, answer, more = "Sing.", SONG[:n], {"max_tokens": n}
        body = {"model": MODEL, "messages": [{"role": "user", "content": question}], "temperature": 0}
        return body | more | change, answer

    def note(self, name: str, is_good: bool, told: str) -> None:
        """Count an outcome, and keep what was wrong with it."""
        self.counts[name if is_good else f"{name}: wrong"] += 1
        if not is_good:
            self.problems.append(f"{name}: {told[:300]}")

    async def busy(self, response: httpx.Response) -> bool:
        """Return True for a server that refuses because its queue is full, after the time that it names."""
        if response.status_code != 429:
            return False
        self.counts["429"] += 1
        await asyncio.sleep(min(float(response.headers["retry-after"]), 2.0))
        return True

    async def whole(self, http: httpx.AsyncClient) -> None:
        """Ask for a whole answer."""
        body, answer = self.request()
        response = await http.post("/v1/chat/completions", json=body)
        if not await self.busy(response):
            is_good = response.status_code == 200
            is_good = is_good and response.json()["choices"][0]["message"]["content"] == answer
            self.note("whole", is_good, f"{answer!r} != {response.text}")

    async def streamed(self, http: httpx.AsyncClient, pause: float = 0.0, cancel_after: int | None = None) -> None:
        """Ask for a stream and read it, slowly or not to its end where so told."""
        body, answer = self.request(stream=True)
        name = "slow" if pause else "stream" if cancel_after is None else "cancelled"
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                if not await self.busy(response):
                    self.note(name, False, response.text)
                return
            text, is_done = "", False
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    is_done = True
                elif line.startswith("data: "):
                    chunk = json.loads(line.removeprefix("data: "))
                    text += "".join(c["delta"].get("content") or "" for c in chunk.get("choices", ()))
                    await asyncio.sleep(pause)
                    if cancel_after is not None and len(text) >= cancel_after:
                        break
        is_good = answer.startswith(text) if cancel_after is not None else is_done and text == answer
        self.note(name, is_good, f"{answer!r} != {text!r}")

    async def cancelled(self, http: httpx.AsyncClient) -> None:
        """Go in the middle of a stream."""
        await self.streamed(http, cancel_after=self.rng.randint(0, 60))

    async def slow(self, http: httpx.AsyncClient) -> None:
        """Read a stream with pauses."""
        await self.streamed(http, pause=self.rng.choice((0.05, 0.2)))

    async def bad(self, http: httpx.AsyncClient) -> None:
        """Send a request that is to be refused."""
        change, status = self.rng.choice(BAD)
        response = await http.post("/v1/chat/completions", json=self.request(**change)[0])
        if not await self.busy(response):
            self.note("bad", response.status_code == status and "error" in response.json(), response.text)

    async def form(self, http: httpx.AsyncClient) -> None:
        """Ask for a JSON object."""
        body, _ = self.request(response_format={"type": "json_object"}, temperature=1.5, max_tokens=60)
        response = await http.post("/v1/chat/completions", json=body)
        if not await self.busy(response):
            try:
                is_good = isinstance(json.loads(response.json()["choices"][0]["message"]["content"]), dict)
            except (ValueError, KeyError):
                is_good = False
            self.note("form", is_good, response.text)


async def soak(url: str, pid: int, args: argparse.Namespace) -> dict:
    """Let all clients run; return what was found."""
    found, begun = Soak(url, args.seed), time.monotonic()
    end, memory = begun + args.seconds, []
    clients = [asyncio.create_task(found.client(end)) for _ in range(args.clients)]
    while time.monotonic() < end:
        await asyncio.sleep(min(5.0, args.seconds / 20))
        if time.monotonic() - begun > WARM_SHARE * args.seconds:
            memory.append(sum(map(resident, [pid, *processes.offspring_of(pid)])))
    await asyncio.gather(*clients)
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        for _ in range(200):  # the engines' numbers come once a second
            stats = (await http.get("/stats")).json()
            left = stats["requests"] + sum(
                w["engine"].get("rows", 0) + w["engine"].get("waiting", 0) for w in stats["workers"]
            )
            if not left:
                break
            await asyncio.sleep(0.1)
    return {
        "seconds": args.seconds,
        "clients": args.clients,
        "requests": sum(found.counts.values()),
        **found.counts,
        "rows_left": left,
        "restarts": sum(worker["restarts"] for worker in stats["workers"]),
        "mib_after_warmup": memory[0],
        "mib_at_end": memory[-1],
        "growth": max(memory[len(memory) // 2 :]) / max(memory[: len(memory) // 2]) - 1,
        "problems": found.problems,
    }


def resident(pid: int) -> float:
    """Return the MiB of memory that a process holds (Linux)."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> int:
    """Serve, soak, tell; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"seconds": 600, "clients": 64, "seed": 0, "workers": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fathom-soak-") as folder:
        make_run(Path(folder))
        options = ("ui=api", "api.log=none", "api.queue=24", f"workers={args.workers}", "max_new_tokens=200")
        with ServerProcess(Path(folder), *options) as server:
            found = asyncio.run(soak(server.url, server.process.pid, args))
    problems = found.pop("problems")
    for name, value in found.items():
        print(f"{name:24} {value}")
    for problem in problems[:20]:
        print(problem)
    failed = bool(problems) or found["rows_left"] > 0 or found["restarts"] > 0 or found["growth"] > GROWTH
    print(json.dumps(found | {"problems": len(problems), "failed": failed}))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
