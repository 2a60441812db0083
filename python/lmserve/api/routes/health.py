"""`GET /health`, `/health/ready` and `/health/live`, for load balancers and orchestrators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from litestar import Request, get

from lmserve.api.http.middleware import PUBLIC
from lmserve.api.http.openapi import responses
from lmserve.api.http.serving import Serving, serving_of
from lmserve.schemas.health import HealthFault, HealthReply


def _operation_id(_handler: object, _method: object, path: Sequence[object]) -> str:
    return "_".join(map(str, path))


@get(
    ["/health", "/health/ready"],
    opt={PUBLIC: True},
    operation_id=_operation_id,
    summary="Check whether the server takes requests",
    description="200 once the model is loaded. 503 with the reason if the model is still being loaded, if the "
    "server is stopping, if the engine is dead, or if it has made no step for 5 s while work "
    "waits. The status is `degraded` while the log of sessions or of stored responses cannot be "
    "written; the server then serves everything else. Needs no API key.",
    tags=["server"],
    security=[{}],
    responses=responses(HealthReply, 503),
)
async def health(request: Request[Any, Any, Any]) -> HealthReply:
    """Raises LmserveError (503) while no request would be served."""
    return health_of(serving_of(request))


def health_of(serving: Serving) -> HealthReply:
    """How the server is. Raises LmserveError (503) while no request would be served."""
    serving.check_ready()
    faults = [HealthFault(fault.code, fault.message) for fault in serving.storage_faults()]
    return HealthReply("degraded", faults) if faults else HealthReply()


@get(
    "/health/live",
    opt={PUBLIC: True},
    operation_id="health_live",
    summary="Check whether the process needs a restart",
    description="503 if only a new process helps: the engine is dead, or has made no step for 60 s while work "
    "waits. 200 otherwise, also while the model is being loaded and while the server is stopping. "
    "Needs no API key.",
    tags=["server"],
    security=[{}],
    responses=responses(HealthReply, 503),
)
async def live(request: Request[Any, Any, Any]) -> HealthReply:
    """Raises LmserveError (503) where the server must be started again."""
    serving_of(request).check_alive()
    return HealthReply()
