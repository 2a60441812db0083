"""`/v1/sessions`: list, show, fork, rewind, extend, cancel and end sessions."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Final

import msgspec
from litestar import Request, Response, delete, get, post
from litestar.params import JSONBody, PathParameter, QueryParameter

from lmserve.api.convert.chat_messages import messages_input
from lmserve.api.convert.parameters import output_limit, sampling_params, stop_params
from lmserve.api.convert.session_ids import named_session, session_id_of, session_in_path
from lmserve.api.convert.session_state import retention_of
from lmserve.api.http.body import StrictJson
from lmserve.api.http.openapi import responses, streams
from lmserve.api.http.reply import EngineReply, StreamedReply
from lmserve.api.http.serving import serving_of, tenant_of
from lmserve.engine.sessions import SessionId, SessionInfo
from lmserve.engine.stream import AsyncStream
from lmserve.engine.submission import Messages, SessionRef, StopParams, Submission, Turn
from lmserve.errors import LmserveError
from lmserve.schemas.bounds import ANONYMOUS, MAX_SESSION_CHARS, SESSION_PATTERN
from lmserve.schemas.generate import GenerateReply
from lmserve.schemas.sessions import (
    MAX_PAGE,
    Appended,
    AppendRequest,
    Cancelled,
    Deleted,
    ForkRequest,
    RewindRequest,
    SessionCard,
    SessionList,
    SessionTotals,
    SessionTurn,
    Transcript,
    TurnRequest,
)

TAGS: Final = ["sessions"]
ID: Final = "/v1/sessions/{session_id:str}"

SessionName = Annotated[
    str,
    PathParameter(
        description="The session's id.",
        # What is quoted twice is longer here than it is.
        schema_extra={
            "minLength": 1,
            "maxLength": MAX_SESSION_CHARS,
            "pattern": SESSION_PATTERN,
            "not": {"const": str(ANONYMOUS)},
        },
    ),
]


@get(
    "/v1/sessions",
    operation_id="list_sessions",
    summary="List the key's sessions",
    tags=TAGS,
    responses=responses(SessionList, 400, 401, 503),
)
async def list_sessions(
    request: Request[Any, Any, Any],
    limit: Annotated[
        int, QueryParameter(ge=1, le=MAX_PAGE, description="The largest number of sessions in one page.")
    ] = 100,
    after: Annotated[
        str | None,
        QueryParameter(
            description="Only sessions after this id. -1 or absent: the first page.",
            schema_extra={"minLength": 1, "maxLength": MAX_SESSION_CHARS, "pattern": SESSION_PATTERN},
        ),
    ] = None,
) -> SessionList:
    """A page, in order of the ids: numbers, then names."""
    engine, tenant = serving_of(request).engine, tenant_of(request)
    behind = None if after is None else session_id_of(after, "after")
    found = await asyncio.to_thread(engine.list_sessions, tenant, after=behind, limit=limit + 1)
    page = found[:limit]
    last_id = page[-1].id if page else None
    return SessionList(data=[card_of(info) for info in page], has_more=len(found) > limit, last_id=last_id)


@get(
    ID,
    operation_id="get_session",
    summary="Describe a session",
    tags=TAGS,
    responses=responses(SessionCard, 400, 401, 404, 503),
)
async def get_session(session_id: SessionName, request: Request[Any, Any, Any]) -> SessionCard:
    """Its size, its age, what of it is cached, and whether a turn runs."""
    engine, tenant, named = serving_of(request).engine, tenant_of(request), session_in_path(session_id)
    await engine.refresh_session(tenant, named)
    return card_of(engine.session_info(tenant, named))


@get(
    f"{ID}/transcript",
    operation_id="get_session_transcript",
    summary="Read a session's turns",
    tags=TAGS,
    responses=responses(Transcript, 400, 401, 404, 503),
)
async def get_transcript(
    session_id: SessionName,
    request: Request[Any, Any, Any],
    token_ids: Annotated[bool, QueryParameter(description="Include each turn's token ids.")] = False,
) -> Transcript:
    """What the model saw and gave, turn by turn."""
    named = session_in_path(session_id)
    turns = await serving_of(request).engine.session_transcript(tenant_of(request), named)
    if not token_ids:
        return Transcript(id=named, turns=[SessionTurn(input=t.input, output=t.output) for t in turns])
    return Transcript(
        id=named,
        turns=[
            SessionTurn(input=t.input, output=t.output, input_ids=t.input_ids, output_ids=t.output_ids) for t in turns
        ],
    )


@post(
    f"{ID}/fork",
    dto=StrictJson[ForkRequest],
    return_dto=None,
    status_code=200,
    operation_id="fork_session",
    summary="Fork a session at its last or an earlier turn",
    description="The new session shares the KV cache of the turns that both have in common. It takes no KV "
    "memory until it runs.",
    tags=TAGS,
    responses=responses(SessionCard, 400, 401, 404, 408, 409, 413, 503, 507),
)
async def fork_session(
    data: JSONBody[ForkRequest], session_id: SessionName, request: Request[Any, Any, Any]
) -> SessionCard:
    """The new session. A turn that runs in the old one is no part of it."""
    engine, tenant = serving_of(request).engine, tenant_of(request)
    new_id = named_session(data.session_id, "session_id")
    await engine.fork_session(tenant, session_in_path(session_id), new_id, data.turns)
    return card_of(engine.session_info(tenant, new_id))


@post(
    f"{ID}/rewind",
    dto=StrictJson[RewindRequest],
    return_dto=None,
    status_code=200,
    operation_id="rewind_session",
    summary="Go back to an earlier turn",
    tags=TAGS,
    responses=responses(SessionCard, 400, 401, 404, 408, 409, 413, 503, 507),
)
async def rewind_session(
    data: JSONBody[RewindRequest], session_id: SessionName, request: Request[Any, Any, Any]
) -> SessionCard:
    """The session after the turns that it keeps."""
    engine, tenant = serving_of(request).engine, tenant_of(request)
    named = session_in_path(session_id)
    await engine.rewind_session(tenant, named, data.turns)
    return card_of(engine.session_info(tenant, named))


@post(
    f"{ID}/append",
    dto=StrictJson[AppendRequest],
    return_dto=None,
    status_code=200,
    operation_id="append_to_session",
    summary="Append messages to a session's history",
    description="The server prefills them now, so that the next turn begins at once. No token is generated.",
    tags=TAGS,
    responses=responses(Appended, 400, 401, 404, 408, 409, 413, 429, 503, 507),
)
async def append_to_session(
    data: JSONBody[AppendRequest], session_id: SessionName, request: Request[Any, Any, Any]
) -> Response[Any]:
    """A turn without an answer."""
    prompt, named = data.prompt, session_in_path(session_id)
    submission = Submission(
        route="generate",
        input=Turn(prompt) if isinstance(prompt, str) else messages_input(prompt),
        session=SessionRef(id=named, create=data.create, on_disconnect=data.on_disconnect),
        on_overflow=data.on_overflow,
        stopping=StopParams(max_tokens=0),
        tenant=tenant_of(request),
    )
    return EngineReply(_Appending(named, serving_of(request).engine.submit(submission)))


@post(
    f"{ID}/turns",
    dto=StrictJson[TurnRequest],
    return_dto=None,
    status_code=200,
    operation_id="continue_session",
    summary="Run the session's next turn",
    description="Continues the session; no flag is needed. The reply has the form of `/generate`'s, whole or "
    "in frames.",
    tags=TAGS,
    operation_class=streams("frames", GenerateReply, "Frames, each followed by one NUL byte."),
    responses=responses(GenerateReply, 400, 401, 404, 408, 409, 413, 429, 503, 507),
)
async def continue_session(
    data: JSONBody[TurnRequest], session_id: SessionName, request: Request[Any, Any, Any]
) -> Response[Any]:
    """A turn of a session that lives, or that `create` begins."""
    serving = serving_of(request)
    session = SessionRef(
        id=session_in_path(session_id),
        create=bool(data.create),
        end=bool(data.end),
        on_disconnect=data.on_disconnect or "rollback",
        retention=retention_of(data.retention),
    )
    stream = serving.engine.submit(
        Submission(
            route="generate",
            model=serving.adapter_or_model(data.model),
            input=_turn(data),
            stream=bool(data.stream),
            session=session,
            on_overflow=data.on_overflow or "error",
            sampling=sampling_params(data, logprobs=None),
            stopping=stop_params(data, max_tokens=output_limit("max_tokens", data.max_tokens)),
            tenant=tenant_of(request),
        )
    )
    if data.stream:
        return StreamedReply(stream, media_type="application/octet-stream")
    return EngineReply(stream)


def _turn(data: TurnRequest) -> Turn | Messages:
    """What is new. Raises LmserveError (400) unless it is either a prompt or messages."""
    if (data.prompt is None) == (data.messages is None):
        given = "neither was" if data.prompt is None else "both were"
        raise LmserveError.invalid("prompt", f"a turn must have either prompt or messages, but {given} given")
    return messages_input(data.messages) if data.messages is not None else Turn(data.prompt or "")


@post(
    f"{ID}/cancel",
    status_code=200,
    operation_id="cancel_session",
    summary="Cancel a session's running turn",
    description="The tokens generated so far are kept, as with stop true of /generate.",
    tags=TAGS,
    responses=responses(Cancelled, 400, 401, 404, 408, 413, 503),
)
async def cancel_session(session_id: SessionName, request: Request[Any, Any, Any]) -> Cancelled:
    """Whether a turn ran."""
    engine, tenant = serving_of(request).engine, tenant_of(request)
    named = session_in_path(session_id)
    await engine.refresh_session(tenant, named)
    engine.session_info(tenant, named)
    return Cancelled(id=named, cancelled=engine.cancel_session(tenant, named))


@delete(
    ID,
    status_code=200,
    operation_id="delete_session",
    summary="End a session",
    tags=TAGS,
    responses=responses(Deleted, 400, 401, 404, 408, 409, 413, 503, 507),
)
async def delete_session(session_id: SessionName, request: Request[Any, Any, Any]) -> Deleted:
    """The session is gone, and its KV may be evicted. 409 while a turn runs: cancel it first."""
    engine, tenant = serving_of(request).engine, tenant_of(request)
    named = session_in_path(session_id)
    if not await engine.end_session(tenant, named):
        # Says whether it was evicted.
        engine.session_info(tenant, named)
        message = f"session {named} does not exist"
        raise LmserveError.new(404, "session_not_found", message, param="session_id")
    return Deleted(id=named)


class _Appending:
    """The core's reply to a turn without an answer, in this route's form."""

    def __init__(self, session_id: SessionId, stream: AsyncStream) -> None:
        self._session_id = session_id
        self._stream = stream

    async def body(self) -> bytes:
        reply = msgspec.json.decode(await self._stream.body(), type=GenerateReply)
        if isinstance(reply.usage, msgspec.UnsetType):
            raise TypeError("the core's last frame has a usage")
        return msgspec.json.encode(Appended(id=self._session_id, usage=reply.usage))

    def abort(self) -> None:
        self._stream.abort()


def card_of(info: SessionInfo) -> SessionCard:
    now_ms = time.time() * 1000
    return SessionCard(
        id=info.id,
        turns=info.turns,
        tokens=info.tokens,
        cached_tokens=msgspec.UNSET if info.cached_tokens is None else info.cached_tokens,
        busy=info.busy,
        read_only=info.lost_turn > 0,
        created=info.created_ms // 1000,
        age=_seconds(now_ms - info.created_ms),
        idle=_seconds(now_ms - info.used_ms),
        held=_seconds(info.hold_until_ms - now_ms),
        usage=SessionTotals(
            prompt_tokens=info.usage.prompt_tokens,
            cached_tokens=info.usage.cached_tokens,
            computed_tokens=info.usage.computed_tokens,
            generated_tokens=info.usage.generated_tokens,
            seconds=_seconds(info.usage.time_ms),
        ),
    )


def _seconds(milliseconds: float) -> float:
    # The clock may have been set back.
    return round(max(milliseconds, 0) / 1000, 3)
