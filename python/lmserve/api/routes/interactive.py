"""`POST /v1/chat/interactive`: the newest form of LMDeploy's sessions, which LMDeploy has removed."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from litestar import Request, Response, post
from litestar.params import JSONBody

from lmserve.api.convert.chat_messages import messages_input
from lmserve.api.convert.nearest import refused
from lmserve.api.convert.parameters import given_or, seed_bits, session_ref, stop_strings
from lmserve.api.convert.session_ids import with_session
from lmserve.api.http.body import LenientJson
from lmserve.api.http.openapi import responses, streams
from lmserve.api.http.reply import EngineReply, StreamedReply
from lmserve.api.http.serving import serving_of, tenant_of
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.sessions import SessionId
from lmserve.engine.submission import SamplingParams, StopParams, Submission, Turn
from lmserve.errors import LmserveError
from lmserve.schemas.bounds import ANONYMOUS
from lmserve.schemas.interactive import InteractiveReply, InteractiveRequest

# The answer to requests that run no turn.
NO_TURN: Final = InteractiveReply(text="", tokens=0, input_tokens=0, history_tokens=0, finish_reason="stop")


@post(
    "/v1/chat/interactive",
    dto=LenientJson[InteractiveRequest],
    return_dto=None,
    status_code=200,
    operation_id="chat_interactive",
    summary="Generate in a session, for LMDeploy's clients",
    description=(
        "Runs one turn. With `interactive_mode`, its session is kept; `/generate` names the same "
        'session by the same id. To end a session: prompt "", request_output_len 0, interactive_mode '
        "false. To cancel its running turn: cancel. " + refused(InteractiveRequest.__struct_fields__)
    ),
    tags=["sessions"],
    operation_class=streams("lines", InteractiveReply, "Lines in LMDeploy's form."),
    responses=responses(InteractiveReply, 400, 401, 404, 408, 409, 413, 429, 503),
)
async def chat_interactive(data: JSONBody[InteractiveRequest], request: Request[Any, Any, Any]) -> Response[Any]:
    """One turn, or a verb on a session."""
    serving = serving_of(request)
    engine, tenant = serving.engine, tenant_of(request)
    data = with_session(data, "session_id", request)
    ends = not data.interactive_mode and data.request_output_len == 0 and not data.prompt
    # LMDeploy's first clients said stop.
    cancels = bool(data.cancel) or data.stop is True
    if cancels or ends:
        await _end_or_cancel(engine, tenant, data.session_id, cancels=cancels)
        return Response(msgspec.json.encode(NO_TURN), media_type="application/json")
    stream = engine.submit(submission(data, model=serving.names[0], tenant=tenant))
    # LMDeploy called its lines server-sent events, and its clients read them as lines.
    return StreamedReply(stream, media_type="text/event-stream") if data.stream else EngineReply(stream)


async def _end_or_cancel(engine: AsyncEngine, tenant: int, session_id: SessionId, *, cancels: bool) -> None:
    if session_id == ANONYMOUS:
        if cancels:
            message = "cancel needs the session_id of the session whose turn it cancels, but -1 was given"
            raise LmserveError.invalid("session_id", message)
        return
    if cancels:
        engine.cancel_session(tenant, session_id)
    else:
        await engine.end_session(tenant, session_id)


def submission(data: InteractiveRequest, *, model: str, tenant: int) -> Submission:
    """The turn as the core takes it. Raises LmserveError (400) for what cannot be honoured."""
    for name, what in (
        ("adapter_name", "adapters are chosen by the model of other routes"),
        ("image_url", "the model is text-only"),
    ):
        given = getattr(data, name)
        if given is not None:
            raise LmserveError.invalid(name, f"{name} must be null, for {what}", "unsupported_parameter")
    if isinstance(data.prompt, list) and not data.prompt:
        raise LmserveError.invalid("prompt", "prompt must have at least one message, but an empty list was given")
    limit, least = data.request_output_len, given_or(data.min_new_tokens, 0)
    if limit is not None and least > limit:
        message = f"min_new_tokens must be at most request_output_len, {limit}, but {least} was given"
        raise LmserveError.invalid("min_new_tokens", message)
    return Submission(
        route="interactive",
        model=model,
        input=Turn(data.prompt) if isinstance(data.prompt, str) else messages_input(data.prompt),
        stream=data.stream,
        session=session_ref(
            data.session_id, start=False, create=True, end=not data.interactive_mode, on_disconnect="rollback"
        ),
        # A session at its end was answered with what fits and the reason "length".
        on_overflow="truncate_output",
        tenant=tenant,
        sampling=SamplingParams(
            temperature=data.temperature,
            top_k=max(data.top_k, 0),
            top_p=data.top_p,
            min_p=data.min_p,
            repetition_penalty=data.repetition_penalty,
            # LMDeploy's clients send 0 for none.
            seed=seed_bits(data.seed or None),
        ),
        stopping=StopParams(
            max_tokens=limit,
            min_tokens=least,
            stop=stop_strings(data.stop),
            ignore_eos=data.ignore_eos,
            skip_special_tokens=given_or(data.skip_special_tokens, True),
        ),
    )
