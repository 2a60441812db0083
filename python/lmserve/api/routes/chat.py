"""`POST /v1/chat/completions`: OpenAI's chat completions, with sessions."""

from __future__ import annotations

import time
import uuid
from typing import Any

from litestar import Request, Response, post
from litestar.params import JSONBody

from lmserve.api.convert.chat_messages import conversation
from lmserve.api.convert.guided import guide_of
from lmserve.api.convert.parameters import (
    check_prompt_logprobs,
    given_or,
    sampling_params,
    session_ref,
    stop_params,
    usage_chunks,
)
from lmserve.api.convert.tools import chat_calling
from lmserve.api.convert.unsupported import refuse_unsupported
from lmserve.api.http.body import StrictJson
from lmserve.api.http.openapi import responses, streams
from lmserve.api.http.reply import EngineReply, sse_reply
from lmserve.api.http.serving import serving_of, tenant_of
from lmserve.engine.submission import Messages, SessionRef, Submission, Turn
from lmserve.errors import LmserveError
from lmserve.schemas.bounds import ANONYMOUS
from lmserve.schemas.chat import ChatChunk, ChatMessage, ChatReply, ChatRequest


@post(
    "/v1/chat/completions",
    dto=StrictJson[ChatRequest],
    return_dto=None,
    status_code=200,
    operation_id="create_chat_completion",
    summary="Answer a conversation",
    description="OpenAI's chat completions. With `session_id`, the conversation lives on the server.",
    tags=["OpenAI"],
    operation_class=streams("events", ChatChunk, "Server-sent events, the last one `[DONE]`."),
    responses=responses(ChatReply, 400, 401, 404, 408, 409, 413, 429, 503),
)
async def chat_completions(data: JSONBody[ChatRequest], request: Request[Any, Any, Any]) -> Response[Any]:
    """One answer, or `n`."""
    serving = serving_of(request)
    engine = serving.engine
    data = serving.with_model(data)
    stream = engine.submit(submission(data, tenant=tenant_of(request), fingerprint=serving.fingerprint))
    if data.stream:
        return sse_reply(stream)
    return EngineReply(stream)


def submission(data: ChatRequest, *, tenant: int, fingerprint: str) -> Submission:
    """The request as the core takes it. Raises LmserveError (400) for what cannot be honoured."""
    refuse_unsupported(data)
    check_prompt_logprobs(data)
    guide, guide_param = guide_of(data)
    tools, choice = chat_calling(data)
    return Submission(
        route="chat",
        reply_id=f"chatcmpl-{uuid.uuid4().hex}",
        model=data.model,
        created=int(time.time()),
        envelope={"system_fingerprint": fingerprint},
        input=_input(data, tools),
        stream=bool(data.stream),
        usage_chunks=usage_chunks(data),
        prompt_logprobs=data.prompt_logprobs,
        session=_session(data),
        on_overflow=data.on_overflow or "error",
        n=given_or(data.n, 1),
        tenant=tenant,
        priority=given_or(data.priority, 0),
        sampling=sampling_params(data, logprobs=_logprobs(data)),
        stopping=stop_params(data, max_tokens=_max_tokens(data)),
        guide=guide,
        guide_param=guide_param,
        guided_whitespace=data.guided_whitespace,
        tool_choice=choice,
        parallel_tool_calls=given_or(data.parallel_tool_calls, True),
    )


def _max_tokens(data: ChatRequest) -> int | None:
    # Both are upper bounds, so both hold.
    return min((limit for limit in (data.max_tokens, data.max_completion_tokens) if limit is not None), default=None)


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


def _logprobs(data: ChatRequest) -> int | None:
    if data.top_logprobs is not None and not data.logprobs:
        raise LmserveError.invalid("top_logprobs", f"top_logprobs {data.top_logprobs} needs logprobs true")
    return given_or(data.top_logprobs, 0) if data.logprobs else None


def _input(data: ChatRequest, tools: list[Any] | None) -> Turn | Messages:
    if not isinstance(data.messages, str):
        return conversation(data.messages, data, tools)
    options = (data.chat_template_kwargs, data.continue_final_message, data.add_generation_prompt)
    if tools is None and all(option is None for option in options):
        return Turn(data.messages)
    return conversation([ChatMessage(role="user", content=data.messages)], data, tools)
