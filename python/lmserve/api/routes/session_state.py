"""`/v1/sessions`: the token ids of a session for training, its export and import, and how long its cache is kept."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Final

import msgspec
from litestar import Request, Response, get, post
from litestar.params import JSONBody, QueryParameter

from lmserve.api.convert.session_ids import named_session, session_in_path
from lmserve.api.convert.session_state import completions, exported, imported, retention_of
from lmserve.api.http.body import StrictJson
from lmserve.api.http.openapi import responses
from lmserve.api.http.serving import serving_of, tenant_of
from lmserve.api.routes.sessions import ID, TAGS, SessionName, card_of
from lmserve.engine.submission import Hold
from lmserve.schemas.bounds import MAX_SESSION_CHARS, SESSION_PATTERN
from lmserve.schemas.retention import Retention
from lmserve.schemas.session_state import SessionCompletions, SessionExport
from lmserve.schemas.sessions import MAX_PAGE, SessionCard

IMPORT: Final = "/v1/sessions/import"


@get(
    f"{ID}/completions",
    operation_id="list_session_completions",
    summary="List the token ids that the model read and sampled in a session",
    description="Returns the token ids of each turn, and the log-probabilities of the sampled ones if the turn "
    "asked for them.",
    tags=TAGS,
    responses=responses(SessionCompletions, 400, 401, 404, 409, 503),
)
async def list_session_completions(
    session_id: SessionName,
    request: Request[Any, Any, Any],
    limit: Annotated[
        int, QueryParameter(ge=1, le=MAX_PAGE, description="The largest number of turns in one page.")
    ] = 100,
    after: Annotated[int, QueryParameter(ge=0, le=2**31 - 1, description="Only turns after this one.")] = 0,
) -> Response[bytes]:
    """A page of the turns."""
    serving, named = serving_of(request), session_in_path(session_id)
    engine, tenant = serving.engine, tenant_of(request)

    def work() -> bytes:
        state = engine.export_session(tenant, named)
        model, fingerprint = serving.session_model(state.adapter)
        turns = list(completions(state))
        page = turns[after : after + limit]
        more = after + limit < len(turns)
        reply = SessionCompletions(id=named, model=model, fingerprint=fingerprint, data=page, has_more=more)
        return msgspec.json.encode(reply)

    return Response(await asyncio.to_thread(work), media_type="application/json")


@get(
    f"{ID}/export",
    operation_id="export_session",
    summary="Export a session to another server",
    description="Returns the whole session as of its last committed turn, with a checksum. A server of the "
    "same model can import it.",
    tags=TAGS,
    responses=responses(SessionExport, 400, 401, 404, 409, 503),
)
async def export_session(session_id: SessionName, request: Request[Any, Any, Any]) -> Response[bytes]:
    """The session, which stays as it is."""
    serving, named = serving_of(request), session_in_path(session_id)
    engine, tenant = serving.engine, tenant_of(request)

    def work() -> bytes:
        state = engine.export_session(tenant, named)
        model, fingerprint = serving.session_model(state.adapter)
        return msgspec.json.encode(exported(named, state, model=model, fingerprint=fingerprint))

    return Response(await asyncio.to_thread(work), media_type="application/json")


@post(
    IMPORT,
    dto=StrictJson[SessionExport],
    return_dto=None,
    status_code=200,
    operation_id="import_session",
    summary="Import a session from another server",
    description="Takes the reply of `export`. The server refuses a session of another model. The session's "
    "next turn computes what is not in the KV cache.",
    tags=TAGS,
    responses=responses(SessionCard, 400, 401, 404, 408, 409, 413, 503, 507),
)
async def import_session(
    data: JSONBody[SessionExport],
    request: Request[Any, Any, Any],
    session_id: Annotated[
        str | None,
        QueryParameter(
            description="The id of the imported session. Absent: its id in the export. No live session may have this "
            "id.",
            schema_extra={"minLength": 1, "maxLength": MAX_SESSION_CHARS, "pattern": SESSION_PATTERN},
        ),
    ] = None,
) -> SessionCard:
    """The session, as if its turns had been here."""
    serving = serving_of(request)
    engine, tenant = serving.engine, tenant_of(request)
    named = named_session(data.id if session_id is None else session_id, "session_id")
    adapter = serving.session_adapter(data.fingerprint)
    model, fingerprint = serving.session_model(adapter)

    def work() -> None:
        state = imported(data, model=model, fingerprint=fingerprint)
        engine.import_session(tenant, named, state._replace(adapter=adapter))

    await asyncio.to_thread(work)
    return card_of(engine.session_info(tenant, named))


@post(
    f"{ID}/retention",
    dto=StrictJson[Retention],
    return_dto=None,
    status_code=200,
    operation_id="retain_session",
    summary="Set how long a session will be needed",
    description=(
        "A hint. The server evicts a held session and its KV cache after all others. With drop, the "
        "server frees the session's KV cache at once, and the next turn computes it again."
    ),
    tags=TAGS,
    responses=responses(SessionCard, 400, 401, 404, 408, 413, 503),
)
async def retain_session(
    data: JSONBody[Retention], session_id: SessionName, request: Request[Any, Any, Any]
) -> SessionCard:
    """The session as it is then."""
    engine, tenant, named = serving_of(request).engine, tenant_of(request), session_in_path(session_id)
    retention = retention_of(data, "retention")
    await engine.refresh_session(tenant, named)
    match retention:
        case Hold(ms):
            engine.hold_session(tenant, named, ms)
        case _:
            await engine.give_up_session(tenant, named)
    return card_of(engine.session_info(tenant, named))
