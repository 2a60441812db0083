"""Fields that only chat completions and completions share."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from lmserve.schemas.bounds import LogitBias, MinTokens, Penalty, Priority, StopTokenIds
from lmserve.schemas.guided import GuidedRequest


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """Options of a streamed reply."""

    include_usage: Annotated[
        bool | None, Meta(description="Send a chunk with the usage before the end of the stream.")
    ] = None
    continuous_usage_stats: Annotated[
        bool | None, Meta(description="Send the usage so far in every chunk. Needs include_usage.")
    ] = None
    include_obfuscation: Annotated[bool | None, Meta(description="Accepted, but has no effect.")] = None


class CompletionSampling(GuidedRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields of chat completions and completions."""

    stream: Annotated[
        bool | None,
        Meta(description="Reply in server-sent events. Events of different prompts or answers are interleaved."),
    ] = None
    stream_options: StreamOptions | None = None
    n: Annotated[
        Annotated[int, Meta(ge=1, le=64)] | None,
        Meta(description="The number of independent answers to each prompt. Null: 1."),
    ] = None
    presence_penalty: Annotated[
        Penalty | None, Meta(description="Subtracted from the logit of every token that occurs in the output. Null: 0.")
    ] = None
    frequency_penalty: Annotated[
        Penalty | None,
        Meta(description="Subtracted from the logit of a token for each time it occurs in the output. Null: 0."),
    ] = None
    logit_bias: Annotated[LogitBias | None, Meta(description="Maps token ids to what is added to their logits.")] = None
    prompt_logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=20)] | None,
        Meta(description="Report the log-probability of each prompt token and of this many alternatives to it."),
    ] = None
    min_tokens: Annotated[
        MinTokens | None, Meta(description="Do not sample an end or stop token before this many tokens. Null: 0.")
    ] = None
    stop_token_ids: Annotated[
        StopTokenIds | None, Meta(description="Tokens that end the text, in addition to the model's end tokens.")
    ] = None
    include_stop_str_in_output: Annotated[bool | None, Meta(description="Include the stop string in the text.")] = None
    skip_special_tokens: Annotated[
        bool | None, Meta(description="Leave special tokens out of the text. Null: true.")
    ] = None
    return_token_ids: Annotated[
        bool | None, Meta(description="Report the token ids of the prompt and the answer in addition to the text.")
    ] = None
    return_tokens_as_token_ids: Annotated[
        bool | None,
        Meta(
            description="In log-probabilities, write each token as `token_id:7`, so that every token has a unique name."
        ),
    ] = None
    priority: Annotated[Priority | None, Meta(description="Requests with a smaller number run first. Null: 0.")] = None
