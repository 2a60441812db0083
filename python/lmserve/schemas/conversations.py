"""`/v1/conversations`: OpenAI's Conversations API."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from lmserve.schemas.responses import ConversationId, InputItem, Metadata

MAX_NEW_ITEMS: Final = 20

NewItems = Annotated[list[InputItem], Meta(max_length=MAX_NEW_ITEMS)]


class CreateConversation(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first items of the conversation. Null is the same as absent; an unknown key is an error."""

    items: Annotated[NewItems | None, Meta(description="Items as in the input of /v1/responses.")] = None
    metadata: Annotated[Metadata | None, Meta(description="Stored with the conversation.")] = None


class UpdateConversation(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The conversation's new metadata. An unknown key is an error."""

    metadata: Annotated[Metadata | None, Meta(description="Replaces the metadata. Null removes it.")]


class CreateItems(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Items to append to the conversation. An unknown key is an error."""

    items: Annotated[
        list[InputItem],
        Meta(min_length=1, max_length=MAX_NEW_ITEMS, description="Items as in the input of /v1/responses."),
    ]


class ConversationReply(Struct, frozen=True, kw_only=True):
    """A conversation; `created_at` is in seconds since 1970."""

    id: ConversationId
    object: Literal["conversation"] = "conversation"
    created_at: int
    metadata: Metadata


class ConversationDeleted(Struct, frozen=True, kw_only=True):
    """The conversation and its items are deleted. Its stored responses are kept."""

    id: ConversationId
    object: Literal["conversation.deleted"] = "conversation.deleted"
    deleted: Literal[True] = True
