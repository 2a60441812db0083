"""`/v1/batches`: OpenAI's Batch API."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from litestar import Request, Response, get, post
from litestar.params import FromPath, JSONBody, QueryParameter

from lmserve.api.convert.unsupported import Ignored
from lmserve.api.http.body import StrictJson
from lmserve.api.http.openapi import responses
from lmserve.api.http.serving import ready_for
from lmserve.schemas.batches import MAX_BATCH_PAGE, BatchList, BatchReply, CreateBatch

TAGS: Final = ["OpenAI"]
ALL: Final = "/v1/batches"
ID: Final = f"{ALL}/{{batch_id:str}}"


@post(
    ALL,
    dto=StrictJson[CreateBatch],
    return_dto=None,
    status_code=200,
    operation_id="create_batch",
    summary="Run the requests of a file as a batch",
    description=(
        "OpenAI's Batch API. The server runs the lines after all other requests, and continues after a "
        "restart. Each line is answered once. If the file has errors, the batch has the status "
        "`failed` and lists the errors by line."
    ),
    tags=TAGS,
    responses=responses(BatchReply, 400, 401, 404, 408, 413, 503, 507),
)
async def create_batch(data: JSONBody[CreateBatch], request: Request[Any, Any, Any]) -> Response[bytes]:
    """The batch as it begins."""
    (serving, tenant), ignored = ready_for(request), Ignored(ALL)
    ignored.hints_of(data)
    batch = await serving.batches.create(tenant, data)
    await serving.batch_runner.wake()
    return Response(msgspec.json.encode(batch), media_type="application/json", headers=ignored.headers())


@get(
    ALL,
    operation_id="list_batches",
    summary="List the batches",
    tags=TAGS,
    responses=responses(BatchList, 400, 401, 503),
)
async def list_batches(
    request: Request[Any, Any, Any],
    limit: Annotated[
        int, QueryParameter(ge=1, le=MAX_BATCH_PAGE, description="The largest number of batches in one page.")
    ] = 20,
    after: Annotated[str | None, QueryParameter(description="Only batches older than this one.")] = None,
) -> BatchList:
    """A page of the batches, the newest first."""
    serving, tenant = ready_for(request)
    found, more = await serving.batches.page(tenant, after=after, limit=limit)
    first, last = (found[0].id, found[-1].id) if found else (None, None)
    return BatchList(data=found, first_id=first, last_id=last, has_more=more)


@get(
    ID,
    operation_id="get_batch",
    summary="Read the progress of a batch",
    tags=TAGS,
    responses=responses(BatchReply, 400, 401, 404, 503),
)
async def get_batch(batch_id: FromPath[str], request: Request[Any, Any, Any]) -> BatchReply:
    """The batch as it stands."""
    serving, tenant = ready_for(request)
    return await serving.batches.get(tenant, batch_id)


@post(
    f"{ID}/cancel",
    status_code=200,
    operation_id="cancel_batch",
    summary="Cancel a batch",
    description="Answers that exist are kept in the output file. The other lines become errors.",
    tags=TAGS,
    responses=responses(BatchReply, 400, 401, 404, 408, 413, 503, 507),
)
async def cancel_batch(batch_id: FromPath[str], request: Request[Any, Any, Any]) -> BatchReply:
    """The batch, which is cancelling."""
    serving, tenant = ready_for(request)
    batch = await serving.batches.cancel(tenant, batch_id)
    await serving.batch_runner.wake()
    return batch
