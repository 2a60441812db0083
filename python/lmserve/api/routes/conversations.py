"""`/v1/conversations`: OpenAI's Conversations API, over sessions."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
from litestar import Request, Response, delete, get, post
from litestar.params import FromPath, JSONBody, QueryParameter

from lmserve.api.convert.response_items import known_items, messages_of, stored_items
from lmserve.api.convert.tools import Functions
from lmserve.api.convert.unsupported import Ignored
from lmserve.api.http.body import StrictJson
from lmserve.api.http.openapi import responses
from lmserve.api.http.serving import ready_for, serving_of, tenant_of
from lmserve.api.responses.outcome import end_tip
from lmserve.schemas.conversations import (
    ConversationDeleted,
    ConversationReply,
    CreateConversation,
    CreateItems,
    UpdateConversation,
)
from lmserve.schemas.response_reply import ItemList, StoredItem
from lmserve.schemas.responses import MAX_PAGE, InputItem

STATUSES: Final = (400, 401, 404, 503, 507)
BODY_STATUSES: Final = (400, 401, 404, 408, 409, 413, 503, 507)
TAGS: Final = ["OpenAI"]
ALL: Final = "/v1/conversations"
ID: Final = f"{ALL}/{{conversation_id:str}}"
ITEMS: Final = f"{ID}/items"
ITEM: Final = f"{ITEMS}/{{item_id:str}}"


@post(
    ALL,
    dto=StrictJson[CreateConversation],
    return_dto=None,
    status_code=200,
    operation_id="create_conversation",
    summary="Create a conversation that the server keeps",
    description=(
        "OpenAI's Conversations API. A request to `/v1/responses` continues it with `conversation`: "
        "the client sends only what is new, and the server computes only that."
    ),
    tags=TAGS,
    responses=responses(ConversationReply, *BODY_STATUSES),
)
async def create_conversation(data: JSONBody[CreateConversation], request: Request[Any, Any, Any]) -> Response[bytes]:
    """A new conversation."""
    (serving, tenant), ignored = ready_for(request), Ignored(ALL)
    items = _items_of(data.items or [], ignored)
    reply = await serving.conversations.create(tenant, data.metadata or {}, items)
    return Response(msgspec.json.encode(reply), media_type="application/json", headers=ignored.headers())


@get(
    ID,
    operation_id="get_conversation",
    summary="Read the metadata of a conversation",
    tags=TAGS,
    responses=responses(ConversationReply, *STATUSES),
)
async def get_conversation(conversation_id: FromPath[str], request: Request[Any, Any, Any]) -> ConversationReply:
    """The conversation without its items."""
    serving, tenant = ready_for(request)
    return await serving.conversations.get(tenant, conversation_id)


@post(
    ID,
    dto=StrictJson[UpdateConversation],
    return_dto=None,
    status_code=200,
    operation_id="update_conversation",
    summary="Change the metadata of a conversation",
    tags=TAGS,
    responses=responses(ConversationReply, *BODY_STATUSES),
)
async def update_conversation(
    data: JSONBody[UpdateConversation], conversation_id: FromPath[str], request: Request[Any, Any, Any]
) -> ConversationReply:
    """The conversation with other metadata."""
    serving, tenant = ready_for(request)
    return await serving.conversations.update(tenant, conversation_id, data.metadata or {})


@delete(
    ID,
    status_code=200,
    operation_id="delete_conversation",
    summary="Delete a conversation",
    description="The server deletes its items as well, but keeps stored responses.",
    tags=TAGS,
    responses=responses(ConversationDeleted, *BODY_STATUSES),
)
async def delete_conversation(conversation_id: FromPath[str], request: Request[Any, Any, Any]) -> ConversationDeleted:
    """The conversation is gone."""
    serving, tenant = serving_of(request), tenant_of(request)
    engine = serving.engine
    await end_tip(engine, tenant, await serving.conversations.delete(tenant, conversation_id))
    return ConversationDeleted(id=conversation_id)


@get(
    ITEMS,
    operation_id="list_conversation_items",
    summary="List the items of a conversation",
    tags=TAGS,
    responses=responses(ItemList, *STATUSES),
)
async def list_conversation_items(
    conversation_id: FromPath[str],
    request: Request[Any, Any, Any],
    limit: Annotated[
        int, QueryParameter(ge=1, le=MAX_PAGE, description="The largest number of items in one page.")
    ] = 20,
    order: Annotated[
        Literal["asc", "desc"], QueryParameter(description="desc: the newest first. asc: the oldest first.")
    ] = "desc",
    after: Annotated[
        str | None, QueryParameter(description="Only items that come after this one in the chosen order.")
    ] = None,
) -> ItemList:
    """A page of the items."""
    serving, tenant = ready_for(request)
    bodies, more = await serving.conversations.page(
        tenant, conversation_id, after=after, limit=limit, newest_first=order == "desc"
    )
    return _page([msgspec.json.decode(body, type=StoredItem) for body in bodies], more=more)


@post(
    ITEMS,
    dto=StrictJson[CreateItems],
    return_dto=None,
    status_code=200,
    operation_id="create_conversation_items",
    summary="Add items to a conversation",
    description="The model reads them before the next response.",
    tags=TAGS,
    responses=responses(ItemList, *BODY_STATUSES),
)
async def create_conversation_items(
    data: JSONBody[CreateItems], conversation_id: FromPath[str], request: Request[Any, Any, Any]
) -> Response[bytes]:
    """The items as they are kept."""
    (serving, tenant), ignored = ready_for(request), Ignored(ITEMS)
    items = _items_of(data.items, ignored)
    await serving.conversations.add(tenant, conversation_id, items)
    reply = msgspec.json.encode(_page(items, more=False))
    return Response(reply, media_type="application/json", headers=ignored.headers())


@get(
    ITEM,
    operation_id="get_conversation_item",
    summary="Read one item of a conversation",
    tags=TAGS,
    responses=responses(StoredItem, *STATUSES),
)
async def get_conversation_item(
    conversation_id: FromPath[str], item_id: FromPath[str], request: Request[Any, Any, Any]
) -> Response[bytes]:
    """The item."""
    serving, tenant = ready_for(request)
    body = await serving.conversations.item(tenant, conversation_id, item_id)
    return Response(body, media_type="application/json")


@delete(
    ITEM,
    status_code=200,
    operation_id="delete_conversation_item",
    summary="Delete one item of a conversation",
    description="The server discards the token ids of the conversation. The next response renders and computes "
    "the remaining items anew.",
    tags=TAGS,
    responses=responses(ConversationReply, *BODY_STATUSES),
)
async def delete_conversation_item(
    conversation_id: FromPath[str], item_id: FromPath[str], request: Request[Any, Any, Any]
) -> ConversationReply:
    """The conversation without it."""
    serving, tenant = serving_of(request), tenant_of(request)
    engine, conversations = serving.engine, serving.conversations
    await end_tip(engine, tenant, await conversations.delete_item(tenant, conversation_id, item_id))
    return await conversations.get(tenant, conversation_id)


def _items_of(given: Sequence[InputItem], ignored: Ignored) -> list[StoredItem]:
    """The items as they are kept. Raises LmserveError (400) for what the model cannot read."""
    known = known_items(given, ignored, "items")
    messages_of(known, Functions(), "items")
    return stored_items(known, secrets.token_hex(8))


def _page(items: Sequence[StoredItem], *, more: bool) -> ItemList:
    return ItemList(
        data=list(items),
        first_id=items[0].id if items else None,
        last_id=items[-1].id if items else None,
        has_more=more,
    )
