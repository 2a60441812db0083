"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's Messages API."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any, Final

import msgspec
from litestar import Request, Response, post
from litestar.params import JSONBody

from lmserve.api.convert.anthropic_messages import conversation
from lmserve.api.convert.lanes import lane_of
from lmserve.api.convert.parameters import top_k
from lmserve.api.convert.thinking import message_thinking
from lmserve.api.convert.tools import message_calling
from lmserve.api.convert.unsupported import Ignored, refuse_unsupported
from lmserve.api.http.body import StrictJson
from lmserve.api.http.openapi import responses, streams
from lmserve.api.http.reply import EngineReply, sse_reply
from lmserve.api.http.serving import model_of, serving_of, tenant_of
from lmserve.api.routes.tokenize import render_messages, size_of, text_of
from lmserve.engine.submission import JsonSchema, SamplingParams, StopParams, Submission
from lmserve.errors import LmserveError
from lmserve.schemas.anthropic import (
    CountTokensReply,
    CountTokensRequest,
    MessageErrorReply,
    MessageEvent,
    MessageReply,
    MessagesRequest,
    NoTool,
)

if TYPE_CHECKING:
    from lmserve._core import ChatTemplate

STATUSES: Final = (400, 401, 404, 408, 413, 429, 503)


@post(
    "/v1/messages",
    dto=StrictJson[MessagesRequest],
    return_dto=None,
    status_code=200,
    operation_id="create_message",
    summary="Answer a conversation, for Anthropic's clients",
    description="Anthropic's Messages API. The API key may be sent as `x-api-key`.",
    tags=["Anthropic"],
    operation_class=streams("named events", MessageEvent, "Server-sent events. The last one is `message_stop`."),
    responses=responses(MessageReply, *STATUSES, error=MessageErrorReply),
)
async def create_message(data: JSONBody[MessagesRequest], request: Request[Any, Any, Any]) -> Response[Any]:
    """One answer."""
    serving = serving_of(request)
    engine = serving.engine
    data, tenant = serving.with_model(data), tenant_of(request)
    ignored = Ignored("/v1/messages")
    template = None if engine.text is None else engine.text.template
    lane = lane_of(request, ignored, enabled=serving.agent_sessions)
    stream = engine.submit(submission(data, ignored, tenant=tenant, template=template, lane=lane))
    headers = ignored.headers()
    return sse_reply(stream, headers) if data.stream else EngineReply(stream, headers=headers)


@post(
    "/v1/messages/count_tokens",
    dto=StrictJson[CountTokensRequest],
    return_dto=None,
    status_code=200,
    operation_id="count_message_tokens",
    summary="Count the tokens of a conversation",
    description="Anthropic's route. Counts the tokens of the prompt that `/v1/messages` would build.",
    tags=["Anthropic"],
    responses=responses(CountTokensReply, *STATUSES, error=MessageErrorReply),
)
async def count_tokens(data: JSONBody[CountTokensRequest], request: Request[Any, Any, Any]) -> Response[bytes]:
    """How many tokens the model would see."""
    engine, text = text_of(request, data.model)
    refuse_unsupported(data)
    ignored = Ignored("/v1/messages/count_tokens")
    ignored.hints_of(data)
    messages = conversation(data, message_thinking(data, text.template, ignored), ignored)

    def work() -> bytes:
        rendered = render_messages(text, messages)
        ids = text.encode(rendered, context_length=engine.max_model_len, param="messages", rendered=True)
        return msgspec.json.encode(CountTokensReply(len(ids)))

    counted = await text.run(size_of(messages), work)
    return Response(counted, media_type="application/json", headers=ignored.headers())


def submission(
    data: MessagesRequest,
    ignored: Ignored,
    *,
    tenant: int,
    template: ChatTemplate | None,
    lane: str | None = None,
) -> Submission:
    """The request as the core takes it. Raises LmserveError (400) for what cannot be honoured.

    Hints that cannot be followed are added to `ignored`.
    """
    refuse_unsupported(data)
    ignored.hints_of(data)
    ignored.hints_of(data.output_config, "output_config.")
    guide, guide_param = _guide(data)
    thinking = message_thinking(data, template, ignored)
    _, choice = message_calling(data, ignored)
    single = not isinstance(data.tool_choice, NoTool | None) and bool(data.tool_choice.disable_parallel_tool_use)
    return Submission(
        route="messages",
        reply_id=f"msg_{uuid.uuid4().hex}",
        model=model_of(data),
        input=conversation(data, thinking, ignored),
        stream=bool(data.stream),
        lane=lane,
        on_overflow="truncate_output",
        guide=guide,
        guide_param=guide_param,
        tool_choice=choice,
        parallel_tool_calls=not single,
        thinking_budget=thinking.budget,
        tenant=tenant,
        sampling=SamplingParams(
            temperature=data.temperature,
            top_p=data.top_p,
            top_k=top_k(data.top_k),
        ),
        stopping=StopParams(max_tokens=data.max_tokens, stop=data.stop_sequences or []),
    )


def _guide(data: MessagesRequest) -> tuple[JsonSchema | None, str]:
    newer = None if data.output_config is None else data.output_config.format
    if newer is not None and data.output_format is not None:
        message = (
            "only one field may set the format of the answer, but output_config.format and output_format were given"
        )
        raise LmserveError.invalid("output_format", message)
    given = newer or data.output_format
    param = "output_format" if data.output_format is not None else "output_config.format"
    return None if given is None else JsonSchema(given.schema, strict=True), param
