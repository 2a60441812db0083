"""`GET /health`."""

from __future__ import annotations

from typing import Any

from litestar import Request, get

from lmserve.api.http.middleware import PUBLIC
from lmserve.api.http.openapi import responses
from lmserve.api.http.serving import serving_of
from lmserve.schemas.health import HealthReply


@get(
    "/health",
    opt={PUBLIC: True},
    operation_id="health",
    summary="Whether requests are taken",
    description="200 once the model is loaded, 503 before that and while the server stops. Needs no API key.",
    tags=["server"],
    security=[{}],
    responses=responses(HealthReply, 503),
)
async def health(request: Request[Any, Any, Any]) -> HealthReply:
    """Raises LmserveError (503) while there is no engine to serve with."""
    _ = serving_of(request).engine
    return HealthReply()
