"""`POST /tokenize` and `/detokenize` in vLLM's shapes, `POST /v1/encode` in LMDeploy's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import Meta, Struct

from lmserve.schemas.bounds import MAX_MESSAGES, Tag, Text, TokenId
from lmserve.schemas.chat import ChatMessage, TemplateVariables

MAX_TOKEN_IDS = 1_048_576
MAX_INPUTS = 256

Model = Annotated[Tag | None, Meta(description="The name of a served model. Null: the model that is served.")]


class TokenizeRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A text, or a conversation. Null is the same as absent; an unknown key is an error."""

    model: Model = None
    prompt: Annotated[
        Text | None, Meta(description="A text. Give either this or messages.", examples=["Hello world!"])
    ] = None
    messages: Annotated[
        Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)] | None,
        Meta(description="A conversation, which is rendered with the chat template. Give either this or a prompt."),
    ] = None
    add_special_tokens: Annotated[
        bool | None,
        Meta(
            description="Add the special tokens that begin and end a text. Null: add them to a prompt, but not to "
            "messages."
        ),
    ] = None
    return_token_strs: Annotated[bool | None, Meta(description="Report the text of each token as well.")] = None
    add_generation_prompt: Annotated[
        bool | None,
        Meta(
            description="Whether the template opens the assistant's answer. Null: yes, unless a message is continued."
        ),
    ] = None
    continue_final_message: Annotated[
        bool | None, Meta(description="Leave the last message open, so that it can be continued.")
    ] = None
    chat_template_kwargs: Annotated[TemplateVariables | None, Meta(description="Variables for the chat template.")] = (
        None
    )


class TokenizeReply(Struct, frozen=True, kw_only=True):
    """Token ids of a text."""

    count: int
    max_model_len: Annotated[int, Meta(description="Maximum number of tokens in the context.")]
    tokens: list[int]
    token_strs: Annotated[
        list[str] | None,
        Meta(description="The text of each token. A token that is only part of a character is U+FFFD."),
    ] = None


class DetokenizeRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Token ids. An unknown key is an error."""

    model: Model = None
    tokens: Annotated[list[TokenId], Meta(max_length=MAX_TOKEN_IDS, examples=[[72, 105]])]


class DetokenizeReply(Struct, frozen=True):
    """The text of token ids, including special tokens."""

    prompt: str


class TokenizerInfoReply(Struct, frozen=True, kw_only=True):
    """The keys of transformers' tokenizer_config.json."""

    tokenizer_class: Literal["PreTrainedTokenizerFast"] = "PreTrainedTokenizerFast"
    chat_template: Annotated[str | None, Meta(description="A Jinja template. Null if the model has none.")]
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    model_max_length: Annotated[int, Meta(description="Maximum number of tokens in the context.")]


class EncodeRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Texts. An unknown key is an error."""

    model: Model = None
    input: Annotated[
        Text | Annotated[list[Text], Meta(min_length=1, max_length=MAX_INPUTS)],
        Meta(description=f"A text, or a list of at most {MAX_INPUTS} texts.", examples=["Hello world!"]),
    ]
    do_preprocess: Annotated[bool, Meta(description="Render each text with the chat template as a user turn.")] = False
    add_bos: Annotated[
        bool, Meta(description="Add the special tokens that begin and end a text. A chat template writes its own.")
    ] = True


class EncodeReply(Struct, frozen=True):
    """The token ids and their number. If the input was a list, both are lists."""

    input_ids: Sequence[int | list[int]]
    length: int | list[int]
