"""Routes that say how the server is: models, health, numbers."""

from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from llm.serving.api.service import Service, service_of

router = APIRouter()
open_router = APIRouter()  # answers without a key: load balancers have none


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """List the models."""
    return {"object": "list", "data": [_model(one) for one in service_of(request).models()]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, Any]:
    """Describe a model."""
    return _model(service_of(request).named(name))


def _model(service: Service) -> dict[str, Any]:
    own = {"context_window": service.seq_len, "description": service.facts()["summary"]}
    if service.adapter is not None:
        own["parent"] = service.pool.facts["name"]
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "fathom", **own}


@open_router.head("/health", include_in_schema=False)  # as some monitors ask
@open_router.get("/health")
async def health(request: Request) -> Response:
    """Say whether requests are answered: 200, or 503 while the server drains or no worker is ready."""
    pool = service_of(request).pool
    ready = sum(worker.is_ready for worker in pool.workers)
    status = "draining" if pool.is_draining else "ok" if ready else "starting"
    told = {"status": status, "ready": status == "ok", "num_gpus": len(pool.workers), "available_workers": ready}
    headers = {} if status == "ok" else {"Retry-After": "5"}
    return JSONResponse(told, 200 if status == "ok" else 503, headers)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Return Prometheus' metrics."""
    return Response(request.app.state.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/stats")
async def stats(request: Request) -> dict[str, Any]:
    """Return what the workers are at."""
    pool = service_of(request).pool
    workers = [
        {
            "gpu_id": worker.index,
            "device": worker.device,
            "ready": worker.is_ready,
            "restarts": worker.restarts,
            "requests": len(worker.jobs),
            "engine": worker.stats,
        }
        for worker in pool.workers
    ]
    busy = sum(bool(worker.jobs) for worker in pool.workers)
    available = sum(worker.is_ready for worker in pool.workers)
    return {
        "total_workers": len(workers),
        "available_workers": available,
        "busy_workers": busy,
        "requests": pool.outstanding,
        "workers": workers,
    }
