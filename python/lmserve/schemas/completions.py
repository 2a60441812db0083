"""`POST /v1/completions`: OpenAI's text completions, and the additions of other servers to them."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from lmserve.schemas.bounds import RequestedModel, SessionId, Text, TokenId
from lmserve.schemas.chat import ChatUsage, FinishReason, PromptLogprobs, SystemFingerprint, TokenIdList
from lmserve.schemas.completion_sampling import CompletionSampling
from lmserve.schemas.hints import NoEffect, Unsupported
from lmserve.schemas.sampling import OutputLimit

MAX_PROMPTS = 256
MAX_PROMPT_TOKENS = 1_048_576
# Choices of all prompts.
MAX_CHOICES = 1024
# Tokens generated where max_tokens is absent.
DEFAULT_MAX_TOKENS = 16

PromptTokens = Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_PROMPT_TOKENS)]


class CompletionRequest(CompletionSampling, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A text completion. Null is the same as absent; an unknown key is an error."""

    model: RequestedModel = ""
    prompt: Annotated[
        Text | Annotated[list[Text | TokenId | PromptTokens], Meta(min_length=1, max_length=MAX_PROMPT_TOKENS)],
        Meta(
            description=f"A text, a list of texts, a list of token ids, or a list of such lists. At most {MAX_PROMPTS} "
            "prompts. No chat template is applied.",
            examples=["Once upon a time"],
        ),
    ]
    max_tokens: Annotated[
        OutputLimit,
        Meta(
            description=f"Maximum number of tokens to generate. Null: {DEFAULT_MAX_TOKENS}. -1, or a number that is "
            "too large: as many as fit into the context."
        ),
    ] = None
    best_of: Annotated[
        Annotated[int, Meta(ge=1, le=64)] | None,
        Meta(
            description="Generate this many texts and reply with the n that have the highest mean log-probability per "
            "token. Null: n."
        ),
    ] = None
    logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=20)] | None,
        Meta(
            description="Report the log-probability of each token and of this many alternatives to it. Null: report "
            "none."
        ),
    ] = None
    echo: Annotated[
        bool | None, Meta(description="Put the prompt before the text, and its tokens before the logprobs.")
    ] = None

    kwargs: Unsupported = UNSET
    suffix: Unsupported = UNSET

    metadata: NoEffect = UNSET
    prompt_cache_key: NoEffect = UNSET
    safety_identifier: NoEffect = UNSET
    service_tier: NoEffect = UNSET
    session_id: Annotated[
        SessionId | None, Meta(description="Accepted, but has no effect: this route keeps no history.")
    ] = None
    store: NoEffect = UNSET
    user: NoEffect = UNSET


class CompletionLogprobs(Struct, frozen=True):
    """Natural log-probabilities of a choice. Each list has one entry per token, null for the first of an echo."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Struct, frozen=True):
    """One text. The texts of prompt i have the indices from `i * n` on."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: TokenIdList = UNSET
    token_ids: TokenIdList = UNSET


class CompletionReply(Struct, frozen=True, kw_only=True):
    """A text completion; `created` is in seconds since 1970."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: SystemFingerprint = UNSET
    choices: list[CompletionChoice]
    usage: ChatUsage


class CompletionChunkChoice(Struct, frozen=True):
    """The new part of one text of a streamed completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    prompt_token_ids: TokenIdList = UNSET
    token_ids: TokenIdList = UNSET


class CompletionChunk(Struct, frozen=True, kw_only=True):
    """The `data` of one server-sent event. The last event's `data` is `[DONE]`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: SystemFingerprint = UNSET
    choices: list[CompletionChunkChoice]
    usage: ChatUsage | UnsetType | None = UNSET
