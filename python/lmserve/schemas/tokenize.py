"""`POST /tokenize` and `/detokenize` in vLLM's shapes, `POST /v1/encode` in LMDeploy's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import Meta, Struct

from lmserve.schemas.bounds import MAX_MESSAGES, Tag, Text, TokenId
from lmserve.schemas.chat import ChatMessage, TemplateVariables

MAX_TOKEN_IDS = 1_048_576
MAX_INPUTS = 256

Model = Annotated[Tag | None, Meta(description="A served model; null: the one that is served.")]


class TokenizeRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A text, or a conversation. Null is the same as absent; an unknown key is an error."""

    model: Model = None
    prompt: Annotated[Text | None, Meta(description="A text; or give messages.", examples=["Hello world!"])] = None
    messages: Annotated[
        Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)] | None,
        Meta(description="A conversation, put through the chat template; or give a prompt."),
    ] = None
    add_special_tokens: Annotated[
        bool | None,
        Meta(description="Add the tokens that belong around a text; null: for a prompt, but not for messages."),
    ] = None
    return_token_strs: Annotated[bool | None, Meta(description="Report each token's text too.")] = None
    add_generation_prompt: Annotated[
        bool | None,
        Meta(description="Whether the template opens the answer; null: yes, unless a message is continued."),
    ] = None
    continue_final_message: Annotated[bool | None, Meta(description="Leave the last message open.")] = None
    chat_template_kwargs: Annotated[TemplateVariables | None, Meta(description="Variables for the chat template.")] = (
        None
    )


class TokenizeReply(Struct, frozen=True, kw_only=True):
    """Token ids of a text."""

    count: int
    max_model_len: Annotated[int, Meta(description="Tokens that the context holds.")]
    tokens: list[int]
    token_strs: Annotated[list[str] | None, Meta(description="Parts of a character are U+FFFD.")] = None


class DetokenizeRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Token ids. An unknown key is an error."""

    model: Model = None
    tokens: Annotated[list[TokenId], Meta(max_length=MAX_TOKEN_IDS, examples=[[72, 105]])]


class DetokenizeReply(Struct, frozen=True):
    """The text of token ids, special tokens written out."""

    prompt: str


class TokenizerInfoReply(Struct, frozen=True, kw_only=True):
    """What transformers' tokenizer_config.json would say."""

    tokenizer_class: Literal["PreTrainedTokenizerFast"] = "PreTrainedTokenizerFast"
    chat_template: Annotated[str | None, Meta(description="In Jinja; null: the model has none.")]
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    model_max_length: Annotated[int, Meta(description="Tokens that the context holds.")]


class EncodeRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Texts. An unknown key is an error."""

    model: Model = None
    input: Annotated[
        Text | Annotated[list[Text], Meta(min_length=1, max_length=MAX_INPUTS)],
        Meta(description=f"A text, or at most {MAX_INPUTS}.", examples=["Hello world!"]),
    ]
    do_preprocess: Annotated[bool, Meta(description="Put each text through the chat template, as a user's turn.")] = (
        False
    )
    add_bos: Annotated[
        bool, Meta(description="Add the tokens that belong around a text; a chat template writes its own.")
    ] = True


class EncodeReply(Struct, frozen=True):
    """Token ids and their number; a list of each, if a list was given."""

    input_ids: Sequence[int | list[int]]
    length: int | list[int]
