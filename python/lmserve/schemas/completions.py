"""`POST /v1/completions`: OpenAI's text completions, and the additions of other servers to them."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from lmserve.schemas.bounds import (
    MAX_TOKENS,
    LogitBias,
    MinP,
    MinTokens,
    Penalty,
    Priority,
    RepetitionPenalty,
    RequestedModel,
    Seed,
    SessionId,
    StopStrings,
    StopTokenIds,
    Temperature,
    Text,
    TokenId,
    TopK,
    TopP,
)
from lmserve.schemas.chat import (
    ChatUsage,
    FinishReason,
    NoEffect,
    PromptLogprobs,
    StreamOptions,
    SystemFingerprint,
    Unsupported,
)
from lmserve.schemas.guided import GuidedRequest

MAX_PROMPTS = 256
MAX_PROMPT_TOKENS = 1_048_576
# Choices of all prompts.
MAX_CHOICES = 1024
# Tokens generated where max_tokens is absent.
DEFAULT_MAX_TOKENS = 16

PromptTokens = Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_PROMPT_TOKENS)]


class CompletionRequest(GuidedRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A text completion. Null is the same as absent; an unknown key is an error."""

    model: RequestedModel = ""
    prompt: Annotated[
        Text | Annotated[list[Text | TokenId | PromptTokens], Meta(min_length=1, max_length=MAX_PROMPT_TOKENS)],
        Meta(
            description=f"A text, a list of texts, a list of token ids, or a list of such lists; {MAX_PROMPTS} prompts "
            "at most. No chat template is applied.",
            examples=["Once upon a time"],
        ),
    ]
    stream: Annotated[bool | None, Meta(description="Reply in server-sent events; those of several prompts mix.")] = (
        None
    )
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[
        Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None,
        Meta(description=f"Most tokens to generate; null: {DEFAULT_MAX_TOKENS}."),
    ] = None
    temperature: Annotated[Temperature | None, Meta(description="0 is greedy; null: the model's own, or 1.")] = None
    top_p: Annotated[
        TopP | None, Meta(description="Only the likeliest tokens that add up to this; null: the model's own, or 1.")
    ] = None
    n: Annotated[
        Annotated[int, Meta(ge=1, le=64)] | None, Meta(description="Independent answers to each prompt; null: 1.")
    ] = None
    best_of: Annotated[
        Annotated[int, Meta(ge=1, le=64)] | None,
        Meta(description="Generate so many, reply with the n of the highest log-probability a token; null: n."),
    ] = None
    stop: Annotated[StopStrings | None, Meta(description="Strings that end the text and are not part of it.")] = None
    seed: Annotated[Seed | None, Meta(description="The same seed gives the same tokens; null: random.")] = None
    presence_penalty: Annotated[Penalty | None, Meta(description="Off logits of tokens in the output; null: 0.")] = None
    frequency_penalty: Annotated[Penalty | None, Meta(description="The same, once per occurrence; null: 0.")] = None
    logit_bias: Annotated[LogitBias | None, Meta(description="Token id: what is added to its logit.")] = None
    logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=20)] | None,
        Meta(description="Report the log-probability of each token and of so many alternatives; null: none."),
    ] = None
    echo: Annotated[bool | None, Meta(description="Put the prompt before the text, and before the logprobs.")] = None
    prompt_logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=20)] | None,
        Meta(description="Report the log-probability of each token of the prompt, and of so many alternatives."),
    ] = None

    top_k: Annotated[
        TopK | None, Meta(description="Only the k likeliest tokens; 0 or -1: all; null: the model's own, or all.")
    ] = None
    min_p: Annotated[MinP | None, Meta(description="Only tokens this likely, relative to the likeliest.")] = None
    repetition_penalty: Annotated[
        RepetitionPenalty | None,
        Meta(description="Makes tokens of prompt and output less likely; null: the model's own, or 1, off."),
    ] = None
    ignore_eos: Annotated[bool | None, Meta(description="Never stop at an end token.")] = None
    min_tokens: Annotated[MinTokens | None, Meta(description="No end or stop token before so many; null: 0.")] = None
    stop_token_ids: Annotated[
        StopTokenIds | None, Meta(description="Tokens that end the text, beside the model's own.")
    ] = None
    include_stop_str_in_output: Annotated[bool | None, Meta(description="Keep the stop string in the text.")] = None
    skip_special_tokens: Annotated[
        bool | None, Meta(description="Leave special tokens out of the text; null: true.")
    ] = None
    priority: Annotated[Priority | None, Meta(description="Smaller runs first; null: 0.")] = None

    kwargs: Unsupported = UNSET
    suffix: Unsupported = UNSET

    metadata: NoEffect = UNSET
    session_id: Annotated[SessionId | None, Meta(description="Taken, and of no effect: no history is kept.")] = None
    user: NoEffect = UNSET


class CompletionLogprobs(Struct, frozen=True):
    """Natural log-probabilities of a choice: one entry a token in each list, null for the first of an echoed prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Struct, frozen=True):
    """One text. Those of prompt i have the indices from `i * n` on."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


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
    """What is new in one text of a streamed completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class CompletionChunk(Struct, frozen=True, kw_only=True):
    """The `data` of one server-sent event; the last event's is `[DONE]`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: SystemFingerprint = UNSET
    choices: list[CompletionChunkChoice]
    usage: ChatUsage | UnsetType | None = UNSET
