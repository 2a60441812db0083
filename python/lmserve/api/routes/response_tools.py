"""`/v1/responses/input_tokens` and `/v1/responses/compact`: count the tokens of a conversation, and compact it."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from litestar import Request, Response, post
from litestar.params import JSONBody

from lmserve.api.convert.parameters import output_limit
from lmserve.api.convert.response_items import known_items, stored_items
from lmserve.api.convert.unsupported import Ignored, refuse_unsupported
from lmserve.api.http.body import StrictJson
from lmserve.api.http.openapi import responses
from lmserve.api.http.reply import EngineReply
from lmserve.api.http.serving import ready_for, serving_of, tenant_of
from lmserve.api.responses.begin import is_gone
from lmserve.api.responses.compaction import SUMMARY_TOKENS, Compaction, question
from lmserve.api.responses.store import new_response_id
from lmserve.api.responses.turn import ResponseTurn, conversation_id
from lmserve.api.routes.tokenize import text_of
from lmserve.errors import LmserveError
from lmserve.schemas.compaction import CompactReply, CompactRequest, InputTokensReply, InputTokensRequest
from lmserve.schemas.response_reply import StoredMessage
from lmserve.schemas.responses import InputItem, ResponsesRequest

STATUSES: Final = (400, 401, 404, 408, 409, 413, 429, 503)
TAGS: Final = ["OpenAI"]


@post(
    "/v1/responses/input_tokens",
    dto=StrictJson[InputTokensRequest],
    return_dto=None,
    status_code=200,
    operation_id="count_response_input_tokens",
    summary="Count the tokens of a request",
    description="Counts the tokens of the prompt that `/v1/responses` would build, including the conversation "
    "before it. The model does not run.",
    tags=TAGS,
    responses=responses(InputTokensReply, *STATUSES),
)
async def count_input_tokens(data: JSONBody[InputTokensRequest], request: Request[Any, Any, Any]) -> Response[bytes]:
    """How many tokens the model would see."""
    serving, (_, text) = serving_of(request), text_of(request, data.model)
    refuse_unsupported(data)
    ignored = Ignored("/v1/responses/input_tokens")
    ignored.hints_of(data)
    asked = ResponsesRequest(
        model=data.model,
        input=data.input,
        previous_response_id=data.previous_response_id,
        conversation=data.conversation,
        instructions=data.instructions,
        tools=data.tools,
        tool_choice=data.tool_choice,
        parallel_tool_calls=data.parallel_tool_calls,
        text=data.text,
        reasoning=data.reasoning,
        truncation=data.truncation,
        store=False,
    )
    asked, tenant, named = serving.with_model(asked), tenant_of(request), conversation_id(asked)
    standing = None if named is None else await serving.conversations.standing(tenant, named)
    turn = ResponseTurn(asked, ignored, serving, tenant, None, standing)
    try:
        counted = await text.run(turn.size, turn.count_tokens)
    except LmserveError as error:
        if named is None or standing is None or standing.tip is None or not is_gone(error):
            raise
        standing = await serving.conversations.standing(tenant, named, anew=True)
        turn = ResponseTurn(asked, ignored, serving, tenant, None, standing)
        counted = await text.run(turn.size, turn.count_tokens)
    reply = msgspec.json.encode(InputTokensReply(input_tokens=counted))
    return Response(reply, media_type="application/json", headers=ignored.headers())


@post(
    "/v1/responses/compact",
    dto=StrictJson[CompactRequest],
    return_dto=None,
    status_code=200,
    operation_id="compact_response",
    summary="Compact a conversation",
    description=(
        "The model summarizes the conversation. Send the reply's `output` as the input of the next "
        "request: it holds the user's messages and the summary. The server stores nothing."
    ),
    tags=TAGS,
    responses=responses(CompactReply, *STATUSES),
)
async def compact_response(data: JSONBody[CompactRequest], request: Request[Any, Any, Any]) -> Response[Any]:
    """The user's messages, and a summary of all that was said."""
    serving, tenant = ready_for(request)
    if data.input is None and data.previous_response_id is None:
        raise LmserveError.invalid(
            "input", "input or previous_response_id must be given, but neither was", "missing_field"
        )
    refuse_unsupported(data)
    ignored = Ignored("/v1/responses/compact")
    ignored.hints_of(data)
    given = [InputItem(role="user", content=data.input)] if isinstance(data.input, str) else (data.input or [])
    asked = ResponsesRequest(
        model=data.model,
        input=[*given, question()],
        previous_response_id=data.previous_response_id,
        instructions=data.instructions,
        max_output_tokens=output_limit("max_output_tokens", data.max_output_tokens) or SUMMARY_TOKENS,
        store=False,
    )
    turn = ResponseTurn(serving.with_model(asked), ignored, serving, tenant, None)
    said = stored_items(known_items(given, ignored), new_response_id().removeprefix("resp_"))
    before = serving.responses.conversation(tenant, data.previous_response_id)
    users = [item for item in (*before, *said) if isinstance(item, StoredMessage) and item.role == "user"]
    return EngineReply(Compaction(turn.start(), users), headers=ignored.headers())
