"""`GET /v1/usage`: what the requesting key has used, and what it may still use."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request, get

from lmserve.api.http.openapi import responses
from lmserve.api.http.serving import serving_of, tenant_of
from lmserve.schemas.usage import UsageReply


@get(
    "/v1/usage",
    operation_id="usage",
    summary="Show what this key has used",
    description="Counters since the server's start, for the requesting key only. If the server has no keys, "
    "for all requests.",
    tags=["server"],
    responses=responses(UsageReply, 401, 503),
)
async def usage(request: Request[Any, Any, Any]) -> UsageReply:
    """The asking key's account."""
    serving, tenant = serving_of(request), tenant_of(request)
    account = serving.engine.usage(tenant)
    named = {"key": serving.keys.name_of(tenant), "since": serving.created}
    return msgspec.convert(named | account, UsageReply)
