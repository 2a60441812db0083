"""`POST /v1/chat/completions`: OpenAI's chat completions, with sessions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

import msgspec
from litestar import Request, Response, post
from litestar.params import JSONBody

from lmserve.api.convert.chat_messages import conversation
from lmserve.api.convert.guided import guide_of
from lmserve.api.convert.lanes import lane_of
from lmserve.api.convert.parameters import (
    check_prompt_logprobs,
    given_or,
    output_limit,
    sampling_params,
    session_ref,
    stop_params,
    token_ids,
    usage_chunks,
)
from lmserve.api.convert.session_ids import with_session
from lmserve.api.convert.thinking import chat_thinking
from lmserve.api.convert.tools import chat_calling, custom_forms
from lmserve.api.convert.unsupported import Ignored, refuse_unsupported
from lmserve.api.http.body import StrictJson
from lmserve.api.http.openapi import responses, streams
from lmserve.api.http.reply import EngineReply, sse_reply
from lmserve.api.http.serving import Serving, model_of, serving_of, tenant_of
from lmserve.engine.submission import Messages, OnOverflow, SessionRef, Submission, Turn
from lmserve.errors import LmserveError
from lmserve.schemas.bounds import ANONYMOUS
from lmserve.schemas.chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatDelta,
    ChatMessage,
    ChatReply,
    ChatRequest,
    ChatUsage,
    ChunkChoice,
)
from lmserve.schemas.sampling import UNLIMITED


@post(
    "/v1/chat/completions",
    dto=StrictJson[ChatRequest],
    return_dto=None,
    status_code=200,
    operation_id="create_chat_completion",
    summary="Answer a conversation",
    description="OpenAI's chat completions. With `session_id`, the server keeps the conversation.",
    tags=["OpenAI"],
    operation_class=streams("events", ChatChunk, "Server-sent events. The last one is `[DONE]`."),
    responses=responses(ChatReply, 400, 401, 404, 408, 409, 413, 429, 503),
)
async def chat_completions(data: JSONBody[ChatRequest], request: Request[Any, Any, Any]) -> Response[Any]:
    """One answer, or `n`."""
    serving = serving_of(request)
    engine = serving.engine
    data = with_session(serving.with_model(data), "session_id", request)
    tenant = tenant_of(request)
    if data.stop is True:
        return _cancelled(data, serving, tenant)
    ignored = Ignored("/v1/chat/completions")
    lane = lane_of(request, ignored, data.prompt_cache_key, data.messages, enabled=serving.agent_sessions)
    stream = engine.submit(submission(data, ignored, serving, tenant=tenant, lane=lane))
    if data.stream:
        return sse_reply(stream, ignored.headers())
    return EngineReply(stream, headers=ignored.headers())


def submission(
    data: ChatRequest, ignored: Ignored, serving: Serving, *, tenant: int, lane: str | None = None
) -> Submission:
    """The request as the core takes it. Raises LmserveError (400) for what cannot be honoured.

    Hints that cannot be followed are added to `ignored`.
    """
    text = serving.engine.text
    refuse_unsupported(data)
    check_prompt_logprobs(data)
    ignored.hints_of(data)
    guide, guide_param = guide_of(data)
    thinking = chat_thinking(data, None if text is None else text.template, ignored)
    tools, choice = chat_calling(data, ignored)
    legacy = data.tools is None and data.functions is not None
    session = _session(data)
    return Submission(
        route="chat",
        reply_id=f"chatcmpl-{uuid.uuid4().hex}",
        model=model_of(data),
        created=int(time.time()),
        envelope={"system_fingerprint": serving.fingerprint},
        input=_input(data, tools, thinking.variables, ignored),
        stream=bool(data.stream),
        usage_chunks=usage_chunks(data),
        prompt_logprobs=data.prompt_logprobs,
        token_ids=token_ids(data),
        session=session,
        lane=lane if session is None else None,
        on_overflow=data.on_overflow or _on_overflow(data, session),
        n=given_or(data.n, 1),
        tenant=tenant,
        priority=given_or(data.priority, 0),
        sampling=sampling_params(data, logprobs=_logprobs(data)),
        stopping=stop_params(data, max_tokens=_max_tokens(data)),
        guide=guide,
        guide_param=guide_param,
        guided_whitespace=data.guided_whitespace,
        tool_choice=choice,
        # There is one function_call in an answer.
        parallel_tool_calls=given_or(data.parallel_tool_calls, True) and not legacy,
        call_forms=custom_forms(data),
        call_member="function_call" if legacy else "tool_calls",
        thinking_budget=thinking.budget,
    )


def _on_overflow(data: ChatRequest, session: SessionRef | None) -> OnOverflow:
    # Agents send a fixed number, whatever the context has left; a session would have no room for its next turn.
    unlimited = UNLIMITED in (data.max_tokens, data.max_completion_tokens)
    return "truncate_output" if session is None or unlimited else "error"


def _max_tokens(data: ChatRequest) -> int | None:
    # Both are upper bounds, so both hold.
    given = [
        output_limit(name, value)
        for name, value in (("max_tokens", data.max_tokens), ("max_completion_tokens", data.max_completion_tokens))
    ]
    return min((limit for limit in given if limit is not None), default=None)


def _session(data: ChatRequest) -> SessionRef | None:
    session_id = ANONYMOUS if data.session_id is None else data.session_id
    renew = bool(data.renew_session)
    if renew and session_id == ANONYMOUS:
        raise LmserveError.invalid("renew_session", "renew_session needs a session_id, but -1 or none was given")
    return session_ref(
        session_id,
        start=renew,
        create=True,
        end=False,
        on_disconnect=data.on_disconnect or "rollback",
        retention=data.retention,
    )


def _logprobs(data: ChatRequest) -> int | None:
    if data.top_logprobs is not None and not data.logprobs:
        raise LmserveError.invalid("top_logprobs", f"top_logprobs {data.top_logprobs} needs logprobs true")
    return given_or(data.top_logprobs, 0) if data.logprobs else None


def _input(
    data: ChatRequest, tools: list[Any] | None, variables: Mapping[str, Any], ignored: Ignored
) -> Turn | Messages:
    if not isinstance(data.messages, str):
        return conversation(data.messages, data, tools, variables, ignored)
    options = (data.chat_template_kwargs, data.continue_final_message, data.add_generation_prompt)
    if tools is None and not variables and all(option is None for option in options):
        return Turn(data.messages)
    return conversation([ChatMessage(role="user", content=data.messages)], data, tools, variables)


def _cancelled(data: ChatRequest, serving: Serving, tenant: int) -> Response[bytes]:
    """LMDeploy's stop: the session's running turn ends, and the reply has no words."""
    session_id = ANONYMOUS if data.session_id is None else data.session_id
    if session_id == ANONYMOUS:
        message = "stop true cancels a session's turn and needs its session_id, but -1 or none was given"
        raise LmserveError.invalid("session_id", message)
    serving.engine.cancel_session(tenant, session_id)
    reply_id, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
    if data.stream:
        choice = ChunkChoice(0, ChatDelta(role="assistant", content=""), "stop")
        chunk = ChatChunk(
            id=reply_id,
            object="chat.completion.chunk",
            created=created,
            model=model_of(data),
            system_fingerprint=serving.fingerprint,
            choices=[choice],
        )
        events = b"data: " + msgspec.json.encode(chunk) + b"\n\ndata: [DONE]\n\n"
        return Response(events, media_type="text/event-stream; charset=utf-8")
    reply = ChatReply(
        id=reply_id,
        object="chat.completion",
        created=created,
        model=model_of(data),
        system_fingerprint=serving.fingerprint,
        choices=[ChatChoice(0, AssistantMessage("assistant", ""), "stop")],
        usage=ChatUsage(0, 0, 0),
    )
    return Response(msgspec.json.encode(reply), media_type="application/json")
