"""`GET /metrics`: Prometheus' text format, as the core writes it."""

from __future__ import annotations

from typing import Any, Final

from litestar import Request, Response, get
from litestar.openapi.datastructures import ResponseSpec

from lmserve.api.http.openapi import responses
from lmserve.api.http.serving import serving_of, tenant_of
from lmserve.schemas.health import HealthReply

MEDIA_TYPE: Final = "text/plain; version=0.0.4"  # Litestar adds the charset


@get(
    "/metrics",
    operation_id="metrics",
    summary="Read counters, gauges and latencies for Prometheus",
    tags=["server"],
    responses=responses(HealthReply, 401, 503)
    | {200: ResponseSpec(str, media_type=MEDIA_TYPE, description="The text.", generate_examples=False)},
)
async def metrics(request: Request[Any, Any, Any]) -> Response[str]:
    """The whole server's, and of each key that the asking one may look at."""
    return Response(serving_of(request).metrics(tenant_of(request)), media_type=MEDIA_TYPE)
