"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's Messages API."""

from __future__ import annotations

import uuid
from typing import Any, Final

import msgspec
from litestar import Request, Response, post
from litestar.params import JSONBody

from lmserve.api.body import StrictJson
from lmserve.api.openapi import responses, streams
from lmserve.api.parameters import given_or
from lmserve.api.reply import EngineReply, sse_reply
from lmserve.api.serving import serving_of, tenant_of
from lmserve.api.tokenize import MESSAGE_SIZE, render_messages, text_of
from lmserve.api.unsupported import refuse_unsupported
from lmserve.engine.submission import JsonSchema, Messages, SamplingParams, StopParams, Submission
from lmserve.errors import LmserveError
from lmserve.schemas.anthropic import (
    Content,
    CountTokensReply,
    CountTokensRequest,
    MessageErrorReply,
    MessageEvent,
    MessageReply,
    MessagesRequest,
)

STATUSES: Final = (400, 401, 404, 408, 413, 429, 503)
TURN_BREAK: Final = "\n\n"  # between messages of one role


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
    serving.check_model(data.model)
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
    _, text = text_of(request, data.model)
    refuse_unsupported(data)
    messages = conversation(data)

    def work() -> bytes:
        ids = text.tokenizer.encode(render_messages(text, messages), add_special=False)
        return msgspec.json.encode(CountTokensReply(len(ids)))

    size = sum(MESSAGE_SIZE + len(message["content"]) for message in messages.messages)
    return Response(await text.run(size, work), media_type="application/json")


def submission(data: MessagesRequest, *, tenant: int) -> Submission:
    """The request as the core takes it. Raises LmserveError (400) for what cannot be honoured."""
    refuse_unsupported(data)
    schema = None
    if data.output_config is not None:
        refuse_unsupported(data.output_config, "output_config.")
        schema = None if data.output_config.format is None else data.output_config.format.schema
    return Submission(
        route="messages",
        reply_id=f"msg_{uuid.uuid4().hex}",
        model=data.model,
        input=conversation(data),
        stream=bool(data.stream),
        guide=None if schema is None else JsonSchema(schema, strict=True),
        guide_param="output_config.format",
        tenant=tenant,
        sampling=SamplingParams(
            temperature=given_or(data.temperature, 1.0),
            top_p=given_or(data.top_p, 1.0),
            top_k=max(given_or(data.top_k, 0), 0),
        ),
        stopping=StopParams(max_tokens=data.max_tokens, stop=data.stop_sequences or []),
    )


def conversation(data: MessagesRequest | CountTokensRequest) -> Messages:
    """The system prompt and the turns. Raises LmserveError (400) for what no text template can take."""
    turns: list[dict[str, Any]] = []
    if data.system is not None:
        turns.append({"role": "system", "content": _text_of(data.system, "system")})
    for at, message in enumerate(data.messages):
        content = _text_of(message.content, f"messages[{at}].content")
        if turns and turns[-1]["role"] == message.role:
            turns[-1]["content"] += TURN_BREAK + content
        else:
            turns.append({"role": message.role, "content": content})
    return Messages(turns, continue_final_message=data.messages[-1].role == "assistant")


def _text_of(content: Content, param: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for at, block in enumerate(content):
        if block.type != "text":
            message = f"the model is text-only and takes blocks of type text, but {block.type!r} was given"
            raise LmserveError.invalid(f"{param}[{at}].type", f"{param}[{at}]: {message}", "unsupported_content_type")
        if block.text is None:
            message = f"{param}[{at}]: a block of type text must have a text"
            raise LmserveError.invalid(f"{param}[{at}].text", message, "missing_field")
        texts.append(block.text)
    return "".join(texts)
