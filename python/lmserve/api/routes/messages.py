"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's Messages API."""

from __future__ import annotations

import uuid
from typing import Any, Final

import msgspec
from litestar import Request, Response, post
from litestar.params import JSONBody

from lmserve.api.convert.anthropic_messages import conversation
from lmserve.api.convert.parameters import top_k
from lmserve.api.convert.tools import message_calling
from lmserve.api.convert.unsupported import refuse_unsupported
from lmserve.api.http.body import StrictJson
from lmserve.api.http.openapi import responses, streams
from lmserve.api.http.reply import EngineReply, sse_reply
from lmserve.api.http.serving import serving_of, tenant_of
from lmserve.api.routes.tokenize import render_messages, size_of, text_of
from lmserve.engine.submission import JsonSchema, SamplingParams, StopParams, Submission
from lmserve.schemas.anthropic import (
    CountTokensReply,
    CountTokensRequest,
    MessageErrorReply,
    MessageEvent,
    MessageReply,
    MessagesRequest,
    NoTool,
)

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
    operation_class=streams("named events", MessageEvent, "Server-sent events, the last one `message_stop`."),
    responses=responses(MessageReply, *STATUSES, error=MessageErrorReply),
)
async def create_message(data: JSONBody[MessagesRequest], request: Request[Any, Any, Any]) -> Response[Any]:
    """One answer."""
    serving = serving_of(request)
    engine = serving.engine
    data = serving.with_model(data)
    stream = engine.submit(submission(data, tenant=tenant_of(request)))
    return sse_reply(stream) if data.stream else EngineReply(stream)


@post(
    "/v1/messages/count_tokens",
    dto=StrictJson[CountTokensRequest],
    return_dto=None,
    status_code=200,
    operation_id="count_message_tokens",
    summary="Count the tokens of a conversation",
    description="Anthropic's route: what the prompt of `/v1/messages` would have.",
    tags=["Anthropic"],
    responses=responses(CountTokensReply, *STATUSES, error=MessageErrorReply),
)
async def count_tokens(data: JSONBody[CountTokensRequest], request: Request[Any, Any, Any]) -> Response[bytes]:
    """How many tokens the model would see."""
    engine, text = text_of(request, data.model)
    refuse_unsupported(data)
    messages = conversation(data)

    def work() -> bytes:
        ids = text.encode(render_messages(text, messages), context_length=engine.max_model_len, param="messages")
        return msgspec.json.encode(CountTokensReply(len(ids)))

    return Response(await text.run(size_of(messages), work), media_type="application/json")


def submission(data: MessagesRequest, *, tenant: int) -> Submission:
    """The request as the core takes it. Raises LmserveError (400) for what cannot be honoured."""
    refuse_unsupported(data)
    schema = None
    if data.output_config is not None:
        refuse_unsupported(data.output_config, "output_config.")
        schema = None if data.output_config.format is None else data.output_config.format.schema
    _, choice = message_calling(data)
    single = not isinstance(data.tool_choice, NoTool | None) and bool(data.tool_choice.disable_parallel_tool_use)
    return Submission(
        route="messages",
        reply_id=f"msg_{uuid.uuid4().hex}",
        model=data.model,
        input=conversation(data),
        stream=bool(data.stream),
        guide=None if schema is None else JsonSchema(schema, strict=True),
        guide_param="output_config.format",
        tool_choice=choice,
        parallel_tool_calls=not single,
        tenant=tenant,
        sampling=SamplingParams(
            temperature=data.temperature,
            top_p=data.top_p,
            top_k=top_k(data.top_k),
        ),
        stopping=StopParams(max_tokens=data.max_tokens, stop=data.stop_sequences or []),
    )
