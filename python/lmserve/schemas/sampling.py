"""The fields that say how tokens are chosen and when they end, once for all of OpenAI's routes."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from lmserve.schemas.bounds import (
    MAX_TOKENS,
    MinP,
    RepetitionPenalty,
    Seed,
    StopStrings,
    Temperature,
    TopK,
    TopP,
)

UNLIMITED = -1  # as null, for clients that send a number in any case
# Most tokens to generate. 0 is within the bounds, and refused by the handler.
OutputLimit = Annotated[int, Meta(ge=UNLIMITED, le=MAX_TOKENS)] | None
ThinkingBudget = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]


class SamplingRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields of chat completions, completions and responses."""

    temperature: Annotated[Temperature | None, Meta(description="0 is greedy; null: the model's own, or 1.")] = None
    top_p: Annotated[
        TopP | None, Meta(description="Only the likeliest tokens that add up to this; null: the model's own, or 1.")
    ] = None
    top_k: Annotated[
        TopK | None, Meta(description="Only the k likeliest tokens; 0 or -1: all; null: the model's own, or all.")
    ] = None
    min_p: Annotated[MinP | None, Meta(description="Only tokens this likely, relative to the likeliest.")] = None
    repetition_penalty: Annotated[
        RepetitionPenalty | None,
        Meta(description="Makes tokens of prompt and output less likely; null: the model's own, or 1, off."),
    ] = None
    seed: Annotated[Seed | None, Meta(description="The same seed gives the same tokens; null: random.")] = None
    stop: Annotated[
        bool | StopStrings | None,
        Meta(
            description="Strings that end the text and are not part of it. LMDeploy's false: none; its true, in a "
            "session of a chat: cancel the running turn."
        ),
    ] = None
    ignore_eos: Annotated[bool | None, Meta(description="Never stop at an end token.")] = None
