"""Fields that chat completions and completions share, beside those of all routes that sample."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from lmserve.schemas.bounds import LogitBias, MinTokens, Penalty, Priority, StopTokenIds
from lmserve.schemas.guided import GuidedRequest


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """Options of a streamed reply."""

    include_usage: Annotated[bool | None, Meta(description="A chunk with the usage before the end.")] = None
    continuous_usage_stats: Annotated[
        bool | None, Meta(description="The usage so far in every chunk; needs include_usage.")
    ] = None
    include_obfuscation: Annotated[bool | None, Meta(description="Taken, and of no effect.")] = None


class CompletionSampling(GuidedRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields of chat completions and completions."""

    stream: Annotated[
        bool | None, Meta(description="Reply in server-sent events; those of several prompts or answers mix.")
    ] = None
    stream_options: StreamOptions | None = None
    n: Annotated[
        Annotated[int, Meta(ge=1, le=64)] | None, Meta(description="Independent answers to each prompt; null: 1.")
    ] = None
    presence_penalty: Annotated[Penalty | None, Meta(description="Off logits of tokens in the output; null: 0.")] = None
    frequency_penalty: Annotated[Penalty | None, Meta(description="The same, once per occurrence; null: 0.")] = None
    logit_bias: Annotated[LogitBias | None, Meta(description="Token id: what is added to its logit.")] = None
    prompt_logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=20)] | None,
        Meta(description="Report the log-probability of each token of the prompt, and of so many alternatives."),
    ] = None
    min_tokens: Annotated[MinTokens | None, Meta(description="No end or stop token before so many; null: 0.")] = None
    stop_token_ids: Annotated[
        StopTokenIds | None, Meta(description="Tokens that end the text, beside the model's own.")
    ] = None
    include_stop_str_in_output: Annotated[bool | None, Meta(description="Keep the stop string in the text.")] = None
    skip_special_tokens: Annotated[
        bool | None, Meta(description="Leave special tokens out of the text; null: true.")
    ] = None
    return_token_ids: Annotated[
        bool | None, Meta(description="Report the token ids of prompt and answer beside the text.")
    ] = None
    return_tokens_as_token_ids: Annotated[
        bool | None, Meta(description="In log-probabilities, write tokens as `token_id:7`, so that no two are alike.")
    ] = None
    priority: Annotated[Priority | None, Meta(description="Smaller runs first; null: 0.")] = None
