"""What a session is made of: its turns as token ids, for other servers and for trainers."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from lmserve.schemas.bounds import MAX_TOKENS, NamedSession

VERSION: Final = 1
MAX_TURNS: Final = 1_000_000
MAX_BASE64: Final = 2**27

Count = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
# What is wrong with one is said where it is read.
Base64 = Annotated[
    str,
    Meta(
        max_length=MAX_BASE64, extra_json_schema={"pattern": "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}[A-Za-z0-9+/=]=)?$"}
    ),
]
Digest = Annotated[str, Meta(max_length=64, extra_json_schema={"pattern": "^[0-9a-f]{64}$"})]


class ExportedTurn(Struct, frozen=True, kw_only=True):
    """One committed turn."""

    input_tokens: Annotated[Count, Meta(description="Token ids that the turn brought in.")]
    output_tokens: Annotated[Count, Meta(description="Token ids that it generated and kept.")]
    open: Annotated[bool, Meta(description="It left the assistant's message open.")]
    logprobs: Annotated[
        Base64 | None,
        Meta(description="Of the output, where they were recorded: Base64 of 32-bit floats, little-endian."),
    ] = None


class SessionExport(Struct, frozen=True, kw_only=True):
    """A whole session, for another server of the same model. Unknown keys are ignored."""

    id: Annotated[NamedSession, Meta(description="The session, as it was called.", examples=[7])]
    object: Literal["session.export"] = "session.export"
    version: Annotated[int, Meta(ge=1, le=1, description="Of this form.")] = VERSION
    model: Annotated[str, Meta(max_length=512, description="The model's name, for people.")]
    fingerprint: Annotated[Digest, Meta(description="Of model, tokenizer and chat template.")]
    created: Annotated[int, Meta(ge=0, le=2**53, description="When it was exported, in seconds since 1970.")]
    seed: Annotated[
        Annotated[str, Meta(max_length=20, extra_json_schema={"pattern": "^(0|[1-9][0-9]{0,19})$"})],
        Meta(description="Of the session's sampling: an unsigned number of 64 bits, in decimal digits."),
    ]
    system_tokens: Annotated[Count, Meta(description="Leading tokens that are the system prompt.")] = 0
    turns: Annotated[list[ExportedTurn], Meta(min_length=1, max_length=MAX_TURNS)]
    tokens: Annotated[Base64, Meta(description="Token ids of all turns: Base64 of 32-bit integers, little-endian.")]
    checksum: Annotated[Digest, Meta(description="SHA-256 over the session; see docs/sessions.md.")]


class SessionCompletion(Struct, frozen=True, kw_only=True):
    """A turn as the model read and sampled it."""

    turn: Annotated[int, Meta(description="From 1.")]
    context_tokens: Annotated[int, Meta(description="Tokens of the turns before, which the model saw first.")]
    input_ids: list[int]
    output_ids: list[int]
    logprobs: Annotated[
        list[float] | None,
        Meta(description="Natural log-probability of each output id, before temperature; null where not recorded."),
    ]
    loss_mask: Annotated[list[int], Meta(description="For input and output ids: 1 where the id was sampled.")]


class SessionCompletions(Struct, frozen=True, kw_only=True):
    """The committed turns of a session, oldest first."""

    id: int | str
    object: Literal["session.completions"] = "session.completions"
    model: str
    fingerprint: Annotated[str, Meta(description="Of model, tokenizer and chat template.")]
    data: list[SessionCompletion]
    has_more: bool
