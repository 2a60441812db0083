"""`POST /generate`: LMDeploy's session API."""

from __future__ import annotations

from typing import Any, Final

from litestar import Request, Response, post
from litestar.params import JSONBody
from msgspec import UNSET

from lmserve.api.convert.chat_messages import messages_input
from lmserve.api.convert.nearest import refused
from lmserve.api.convert.parameters import seed_bits, session_ref
from lmserve.api.convert.session_ids import with_session
from lmserve.api.http.body import LenientJson
from lmserve.api.http.openapi import responses, streams
from lmserve.api.http.reply import EngineReply, StreamedReply
from lmserve.api.http.serving import serving_of, tenant_of
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.submission import SamplingParams, StopParams, Submission, Turn
from lmserve.errors import LmserveError
from lmserve.schemas.bounds import ANONYMOUS
from lmserve.schemas.errors import GenerateErrorReply
from lmserve.schemas.generate import GenerateReply, GenerateRequest

# The answer to requests that run no turn, as the core writes it.
NO_TURN: Final = (
    b'{"text": "", "tokens": 0, "finish_reason": "stop", "usage": '
    b'{"prompt_tokens": 0, "history_tokens": 0, "cached_tokens": 0, "completion_tokens": 0}}'
)


@post(
    "/generate",
    dto=LenientJson[GenerateRequest],
    return_dto=None,
    status_code=200,
    operation_id="generate",
    summary="Generate in a session on the server",
    description=(
        "Runs one turn of a session. With `stream`, each frame is a JSON object in ASCII followed by "
        'one NUL byte. To end a session: prompt "", request_output_len 0, sequence_start false, '
        "sequence_end true. To cancel its running turn: stop true. To prefill a session without "
        "generating: a list as prompt, request_output_len 0. " + refused(GenerateRequest.__struct_fields__)
    ),
    tags=["sessions"],
    operation_class=streams("frames", GenerateReply, "Frames, each followed by one NUL byte."),
    responses=responses(GenerateReply, 400, 401, 404, 408, 409, 413, 429, 503, 507, error=GenerateErrorReply),
)
async def generate(data: JSONBody[GenerateRequest], request: Request[Any, Any, Any]) -> Response[Any]:
    """One turn, or a verb on a session."""
    serving = serving_of(request)
    engine, tenant = serving.engine, tenant_of(request)
    data = with_session(data, "instance_id", request)
    if data.stop or (data.sequence_end and data.request_output_len == 0 and not data.prompt):
        await _end_or_cancel(engine, tenant, data)
        if data.stream:
            return Response(NO_TURN + b"\0", media_type="application/octet-stream")
        return Response(NO_TURN, media_type="application/json")
    stream = engine.submit(submission(data, model=serving.adapter_or_model(data.model), tenant=tenant))
    if data.stream:
        return StreamedReply(stream, media_type="application/octet-stream")
    return EngineReply(stream)


async def _end_or_cancel(engine: AsyncEngine, tenant: int, data: GenerateRequest) -> None:
    if data.instance_id == ANONYMOUS:
        if data.stop:
            message = "stop cancels a session's turn and needs its instance_id, but -1 was given"
            raise LmserveError.invalid("instance_id", message)
        return
    if data.sequence_end:
        await engine.end_session(tenant, data.instance_id, cancel=data.stop)
    else:
        engine.cancel_session(tenant, data.instance_id)


def submission(data: GenerateRequest, *, model: str, tenant: int) -> Submission:
    """The turn as the core takes it. Raises LmserveError (400) for what is no turn."""
    if isinstance(data.prompt, list) and not data.prompt:
        raise LmserveError.invalid("prompt", "prompt must have at least one message, but an empty list was given")
    return Submission(
        route="generate",
        model=model,
        input=Turn(data.prompt) if isinstance(data.prompt, str) else messages_input(data.prompt),
        stream=data.stream,
        session=session_ref(
            data.instance_id,
            start=data.sequence_start is not False,
            by_default=data.sequence_start is UNSET,
            create=False,
            end=data.sequence_end,
            on_disconnect=data.on_disconnect,
            retention=data.retention,
        ),
        on_overflow=data.on_overflow,
        tenant=tenant,
        sampling=SamplingParams(
            temperature=data.temperature,
            top_k=max(data.top_k, 0),
            top_p=data.top_p,
            min_p=data.min_p,
            repetition_penalty=data.repetition_penalty,
            seed=seed_bits(data.seed),
        ),
        stopping=StopParams(max_tokens=data.request_output_len, stop=data.stop_words or [], ignore_eos=data.ignore_eos),
    )
