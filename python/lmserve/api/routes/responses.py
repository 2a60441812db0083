"""`/v1/responses`: OpenAI's Responses API."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from litestar import Request, Response, delete, get, post
from litestar.params import FromPath, JSONBody, QueryParameter

from lmserve.api.convert.lanes import lane_of
from lmserve.api.convert.unsupported import Ignored
from lmserve.api.http.body import StrictJson
from lmserve.api.http.openapi import responses, streams
from lmserve.api.http.reply import EngineReply, sse_reply
from lmserve.api.http.serving import ready_for, serving_of, tenant_of
from lmserve.api.responses.begin import begin
from lmserve.api.responses.store import (
    StoredResponse,
    no_response,
    session_of,
)
from lmserve.errors import LmserveError
from lmserve.schemas.response_reply import ItemList, ResponseDeleted, ResponseEvent, ResponseReply
from lmserve.schemas.responses import MAX_PAGE, ResponsesRequest

STATUSES: Final = (400, 401, 404, 408, 409, 413, 429, 503, 507)
TAGS: Final = ["OpenAI"]
ID: Final = "/v1/responses/{response_id:str}"


@post(
    "/v1/responses",
    dto=StrictJson[ResponsesRequest],
    return_dto=None,
    status_code=200,
    operation_id="create_response",
    summary="Answer, and store the conversation",
    description=(
        "OpenAI's Responses API. The server stores a response token for token. `previous_response_id` "
        "continues from it, any number of times, and computes only what is not in the KV cache. The "
        "same path accepts a WebSocket, for messages of type `response.create`."
    ),
    tags=TAGS,
    operation_class=streams("named events", ResponseEvent, "Server-sent events. The last one has the response."),
    responses=responses(ResponseReply, *STATUSES),
)
async def create_response(data: JSONBody[ResponsesRequest], request: Request[Any, Any, Any]) -> Response[Any]:
    """One answer."""
    serving = serving_of(request)
    data = serving.with_model(data)
    ignored = Ignored("/v1/responses")
    lane = lane_of(request, ignored, data.prompt_cache_key, enabled=serving.agent_sessions)
    begun = await begin(data, ignored, serving, tenant_of(request), lane)
    headers = ignored.headers()
    if isinstance(begun, StoredResponse):
        await serving.responses.settled()
        if begun.events is not None:
            return sse_reply(begun.events.follow(), headers)
        return Response(begun.body, media_type="application/json", headers=headers)
    return sse_reply(begun, headers) if data.stream else EngineReply(begun, headers=headers)


@get(
    ID,
    operation_id="get_response",
    summary="Read a stored response",
    description="A background response that was streamed can be streamed again while the server keeps its events.",
    tags=TAGS,
    operation_class=streams(
        "named events", ResponseEvent, "Server-sent events: those that were sent already, then new ones as they come."
    ),
    responses=responses(ResponseReply, 400, 401, 404, 503),
)
async def get_response(
    response_id: FromPath[str],
    request: Request[Any, Any, Any],
    stream: Annotated[
        bool, QueryParameter(description="Stream the response's events instead of returning its present state.")
    ] = False,
    starting_after: Annotated[
        int | None,
        QueryParameter(ge=-1, le=2**31 - 1, description="With stream: only the events after this sequence_number."),
    ] = None,
) -> Response[Any]:
    """As it stands: one that runs is in progress."""
    stored = _stored(request, response_id)
    if not stream:
        if starting_after is not None:
            message = f"starting_after {starting_after} needs stream true, but it was false"
            raise LmserveError.invalid("starting_after", message)
        return Response(stored.body, media_type="application/json")
    if stored.events is None:
        message = (
            "the server does not have the events of this response: it keeps them for a while, and only for "
            "a request with background and stream; leave stream out"
        )
        raise LmserveError.invalid("stream", message, "events_not_kept")
    return sse_reply(stored.events.follow(-1 if starting_after is None else starting_after))


@get(
    f"{ID}/input_items",
    operation_id="list_response_input_items",
    summary="List the input items of a stored response",
    tags=TAGS,
    responses=responses(ItemList, 400, 401, 404, 503),
)
async def list_input_items(
    response_id: FromPath[str],
    request: Request[Any, Any, Any],
    limit: Annotated[
        int, QueryParameter(ge=1, le=MAX_PAGE, description="The largest number of items in one page.")
    ] = 20,
    order: Annotated[
        Literal["asc", "desc"], QueryParameter(description="desc: the newest first. asc: the oldest first.")
    ] = "desc",
    after: Annotated[
        str | None, QueryParameter(description="Only items that come after this one in the chosen order.")
    ] = None,
) -> ItemList:
    """A page of this response's input, without the conversation before it."""
    items = list(_stored(request, response_id).items)
    if order == "desc":
        items.reverse()
    if after is not None:
        places = [at for at, item in enumerate(items) if item.id == after]
        if not places:
            raise LmserveError.invalid("after", f"after must be an item of the response, but {after[:64]!r} was given")
        items = items[places[0] + 1 :]
    page = items[:limit]
    return ItemList(
        data=page,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=len(items) > limit,
    )


@post(
    f"{ID}/cancel",
    status_code=200,
    operation_id="cancel_response",
    summary="Cancel a running response",
    description="The text generated so far is kept.",
    tags=TAGS,
    responses=responses(ResponseReply, 400, 401, 404, 408, 413, 503),
)
async def cancel_response(response_id: FromPath[str], request: Request[Any, Any, Any]) -> Response[bytes]:
    """The response at its end."""
    stored = _stored(request, response_id)
    if not stored.ended.is_set():
        serving_of(request).engine.cancel_session(tenant_of(request), session_of(response_id))
        await stored.ended.wait()
        await serving_of(request).responses.settled()
    status = msgspec.json.decode(stored.body, type=ResponseReply).status
    if status not in ("cancelled", "in_progress"):
        message = f"only a running response can be cancelled, but {response_id!r} is {status}"
        raise LmserveError.invalid("response_id", message, "response_ended")
    return Response(stored.body, media_type="application/json")


@delete(
    ID,
    status_code=200,
    operation_id="delete_response",
    summary="Delete a stored response",
    description="Responses that continue from it are kept.",
    tags=TAGS,
    responses=responses(ResponseDeleted, 400, 401, 404, 408, 413, 503),
)
async def delete_response(response_id: FromPath[str], request: Request[Any, Any, Any]) -> ResponseDeleted:
    """The response is gone; one that runs is cancelled."""
    serving, tenant = serving_of(request), tenant_of(request)
    known = await serving.engine.end_session(tenant, session_of(response_id), cancel=True)
    if not serving.responses.drop(tenant, response_id) and not known:
        raise no_response(response_id)
    await serving.responses.settled()
    return ResponseDeleted(id=response_id)


def _stored(request: Request[Any, Any, Any], response_id: str) -> StoredResponse:
    serving, tenant = ready_for(request)
    session_of(response_id)
    stored = serving.responses.get(tenant, response_id)
    if stored is None:
        raise no_response(response_id)
    return stored
