"""The sampling fields that both of LMDeploy's routes have, with its defaults of August 2023."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from lmserve.schemas.bounds import MinP, RepetitionPenalty, Seed, Temperature, TopK, TopP


class LmdeploySampling(Struct, frozen=True, kw_only=True):
    """The sampling fields of /generate and /v1/chat/interactive."""

    top_p: Annotated[
        TopP, Meta(description="Sample only from the most likely tokens whose probabilities add up to this.")
    ] = 0.8
    top_k: Annotated[TopK, Meta(description="Sample only from the k most likely tokens. 0 or -1: from all tokens.")] = (
        40
    )
    temperature: Annotated[Temperature, Meta(description="0 is greedy.")] = 0.8
    repetition_penalty: Annotated[
        RepetitionPenalty,
        Meta(description="Makes tokens that occur in the prompt or the output less likely. 1 is off."),
    ] = 1.0
    ignore_eos: Annotated[bool, Meta(description="Do not stop at an end token.")] = False
    seed: Annotated[
        Seed | None, Meta(description="The same request with the same seed gets the same tokens. Null: a random seed.")
    ] = None
    min_p: Annotated[
        MinP,
        Meta(
            description="Sample only from tokens whose probability is at least this fraction of the most likely "
            "token's."
        ),
    ] = 0.0
