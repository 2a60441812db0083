"""`POST /v1/chat/completions`: OpenAI's chat completions, with sessions."""

from __future__ import annotations

import time
import uuid
from typing import Any

from litestar import Request, Response, post
from litestar.params import JSONBody

from lmserve.api.body import StrictJson
from lmserve.api.messages import messages_input
from lmserve.api.openapi import responses, streams
from lmserve.api.parameters import given_or, seed_bits, session_ref
from lmserve.api.reply import EngineReply
from lmserve.api.serving import serving_of, tenant_of
from lmserve.api.unsupported import refuse_unsupported
from lmserve.engine.submission import SamplingParams, SessionRef, StopParams, Submission, Turn
from lmserve.errors import LmserveError
from lmserve.schemas.bounds import ANONYMOUS
from lmserve.schemas.chat import ChatChunk, ChatReply, ChatRequest


@post(
    "/v1/chat/completions",
    dto=StrictJson[ChatRequest],
    return_dto=None,
    status_code=200,
    operation_id="create_chat_completion",
    summary="Answer a conversation",
    description="OpenAI's chat completions. With `session_id`, the conversation lives on the server.",
    tags=["OpenAI"],
    operation_class=streams("text/event-stream", ChatChunk, "Server-sent events, the last one `[DONE]`."),
    responses=responses(ChatReply, 400, 401, 404, 408, 409, 413, 429, 503),
)
async def chat_completions(data: JSONBody[ChatRequest], request: Request[Any, Any, Any]) -> Response[Any]:
    """One answer, or `n`."""
    serving = serving_of(request)
    engine = serving.engine
    serving.check_model(data.model)
    stream = engine.submit(submission(data, tenant=tenant_of(request)))
    if data.stream:
        return EngineReply(stream, media_type="text/event-stream; charset=utf-8", stream=True)
    return EngineReply(stream)


def submission(data: ChatRequest, *, tenant: int) -> Submission:
    """The request as the core takes it. Raises LmserveError (400) for what cannot be honoured."""
    refuse_unsupported(data)
    stream = bool(data.stream)
    if data.stream_options is not None and not stream:
        raise LmserveError.invalid("stream_options", "stream_options needs stream true")
    return Submission(
        route="chat",
        reply_id=f"chatcmpl-{uuid.uuid4().hex}",
        model=data.model,
        created=int(time.time()),
        input=Turn(data.messages) if isinstance(data.messages, str) else messages_input(data.messages),
        stream=stream,
        include_usage=bool(data.stream_options and data.stream_options.include_usage),
        session=_session(data),
        on_overflow=data.on_overflow or "error",
        n=given_or(data.n, 1),
        tenant=tenant,
        sampling=_sampling(data),
        stopping=StopParams(
            max_tokens=_max_tokens(data),
            stop=[data.stop] if isinstance(data.stop, str) else data.stop or [],
            ignore_eos=bool(data.ignore_eos),
        ),
    )


def _max_tokens(data: ChatRequest) -> int | None:
    if data.max_completion_tokens is None:
        return data.max_tokens
    if data.max_tokens not in (None, data.max_completion_tokens):
        given = f"{data.max_tokens} and {data.max_completion_tokens} were given"
        raise LmserveError.invalid("max_tokens", f"max_tokens and max_completion_tokens mean the same, but {given}")
    return data.max_completion_tokens


def _session(data: ChatRequest) -> SessionRef | None:
    session_id = given_or(data.session_id, ANONYMOUS)
    renew = bool(data.renew_session)
    if renew and session_id == ANONYMOUS:
        raise LmserveError.invalid("renew_session", "renew_session needs a session_id, but -1 or none was given")
    return session_ref(
        session_id,
        start=renew,
        create=True,
        end=False,
        on_disconnect=data.on_disconnect or "rollback",
    )


def _sampling(data: ChatRequest) -> SamplingParams:
    if data.top_logprobs is not None and not data.logprobs:
        raise LmserveError.invalid("top_logprobs", f"top_logprobs {data.top_logprobs} needs logprobs true")
    return SamplingParams(
        temperature=given_or(data.temperature, 1.0),
        top_k=max(given_or(data.top_k, 0), 0),
        top_p=given_or(data.top_p, 1.0),
        min_p=given_or(data.min_p, 0.0),
        repetition_penalty=given_or(data.repetition_penalty, 1.0),
        presence_penalty=given_or(data.presence_penalty, 0.0),
        frequency_penalty=given_or(data.frequency_penalty, 0.0),
        logit_bias=list(data.logit_bias.items()) if data.logit_bias else [],
        seed=seed_bits(data.seed),
        logprobs=given_or(data.top_logprobs, 0) if data.logprobs else None,
    )
