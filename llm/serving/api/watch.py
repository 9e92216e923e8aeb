"""Numbers and log of requests: Prometheus metrics, and a line of JSON for each request without what was said in it."""

import json
import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from llm.serving.api.service import Service
from llm.serving.pool import Batch, Pool

WATCHED = ("/v1/", "/chat/completions")  # beginnings of the paths of the API
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
LOG = logging.getLogger("fathom.requests")


class Metrics:
    """Prometheus metrics of one server."""

    def __init__(self, pool: Pool):
        self.registry = CollectorRegistry()
        own = {"namespace": "fathom", "registry": self.registry}
        self.requests = Counter("requests", "Requests answered", ("path", "status"), **own)
        self.seconds = Histogram("request_seconds", "Seconds until a request was over", buckets=SECONDS, **own)
        self.first_token = Histogram("first_token_seconds", "Seconds until the first token", buckets=SECONDS, **own)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", **own)
        self.cached_tokens = Counter("cached_tokens", "Tokens of prompts that were found in a cache", **own)
        self.generated_tokens = Counter("generated_tokens", "Tokens of answers", **own)
        self.registry.register(_Gauges(pool))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text form."""
        return generate_latest(self.registry)


class _Gauges:
    """Collector of what the workers are at, read when somebody asks."""

    def __init__(self, pool: Pool):
        self.pool = pool

    def describe(self) -> list[Metric]:
        """Return nothing: the metrics depend on the engine."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield a gauge for each number that a worker reports."""
        numbers: dict[str, dict[str, float]] = {}
        for worker in self.pool.workers:
            told = {"ready": int(worker.is_ready), "restarts": worker.restarts, "requests": len(worker.jobs)}
            told |= {f"engine_{name}": value for name, value in worker.stats.items() if isinstance(value, int | float)}
            for name, value in told.items():
                numbers.setdefault(name, {})[str(worker.index)] = value
        for name, values in numbers.items():
            gauge = GaugeMetricFamily(
                f"fathom_worker_{name}", f"{name} of each worker".replace("_", " "), labels=["worker"]
            )
            for worker, value in values.items():
                gauge.add_metric([worker], value)
            yield gauge


class Watch:
    """ASGI middleware that counts and logs the requests of the API. log: none, requests or text."""

    def __init__(self, app: Any, service: Service, metrics: Metrics, log: str):
        self.app, self.service, self.metrics, self.log = app, service, metrics, log

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Let the application answer, and note how it did."""
        if scope["type"] != "http" or not scope["path"].startswith(WATCHED):
            await self.app(scope, receive, send)
            return
        begun, status = time.monotonic(), 500

        async def noting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            self._note(scope, status, time.monotonic() - begun)

    def _note(self, scope: Any, status: int, seconds: float) -> None:
        batch: Batch | None = scope.get("state", {}).get("batch")
        path = getattr(scope.get("route"), "path", "other")
        self.metrics.requests.labels(path, str(status)).inc()
        self.metrics.seconds.observe(seconds)
        told: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "method": scope["method"],
            "path": path,
            "status": status,
            "seconds": round(seconds, 4),
        }
        if batch is not None:
            told |= self._of_batch(batch)
        if self.log != "none":
            LOG.info(json.dumps(told, ensure_ascii=False))

    def _of_batch(self, batch: Batch) -> dict[str, Any]:
        """Count the tokens of a batch and return what the log says of it."""
        jobs = batch.jobs
        firsts = [job.first - job.begun for job in jobs if job.first is not None]
        prompts = {id(job.prompt): job for job in jobs}.values()
        told: dict[str, Any] = {
            "worker": jobs[0].worker.index,
            "prompt_tokens": sum(len(job.prompt) for job in prompts),
            "cached_tokens": sum(job.cached for job in prompts),
            "generated_tokens": sum(len(job.ids) for job in jobs),
            "first_token_seconds": round(min(firsts), 4) if firsts else None,
            "ends": [job.finish_reason or (job.error.code if job.error else None) for job in jobs],
        }
        for name in ("prompt_tokens", "cached_tokens", "generated_tokens"):
            getattr(self.metrics, name).inc(told[name])
        if firsts:
            self.metrics.first_token.observe(min(firsts))
        if self.log == "text":
            decode = self.service.tokenizer.decode
            told |= {"prompts": [decode(job.prompt) for job in prompts], "answers": [decode(job.ids) for job in jobs]}
        return told


def log_to_stderr() -> None:
    """Write the log of requests to stderr, a line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOG.handlers, LOG.propagate = [handler], False
    LOG.setLevel(logging.INFO)
