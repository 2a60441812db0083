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

    input_tokens: Annotated[Count, Meta(description="Number of token ids of the turn's input.")]
    output_tokens: Annotated[Count, Meta(description="Number of generated token ids that the turn kept.")]
    open: Annotated[bool, Meta(description="True if the turn left the assistant's message open.")]
    logprobs: Annotated[
        Base64 | None,
        Meta(
            description="Log-probabilities of the output, if they were recorded: Base64 of little-endian 32-bit floats."
        ),
    ] = None


class SessionExport(Struct, frozen=True, kw_only=True):
    """A whole session, to be imported by a server of the same model. Unknown keys are ignored."""

    id: Annotated[NamedSession, Meta(description="The session's id on the server that exported it.", examples=[7])]
    object: Literal["session.export"] = "session.export"
    version: Annotated[int, Meta(ge=1, le=1, description="Version of this format.")] = VERSION
    model: Annotated[
        str, Meta(max_length=512, description="The model's name, for human readers. The server does not compare it.")
    ]
    fingerprint: Annotated[Digest, Meta(description="Fingerprint of the model, the tokenizer and the chat template.")]
    created: Annotated[int, Meta(ge=0, le=2**53, description="Time of the export, in seconds since 1970.")]
    seed: Annotated[
        Annotated[str, Meta(max_length=20, extra_json_schema={"pattern": "^(0|[1-9][0-9]{0,19})$"})],
        Meta(description="Seed of the session's sampling: an unsigned 64-bit number in decimal digits."),
    ]
    system_tokens: Annotated[Count, Meta(description="Number of leading tokens that are the system prompt.")] = 0
    turns: Annotated[list[ExportedTurn], Meta(min_length=1, max_length=MAX_TURNS)]
    tokens: Annotated[Base64, Meta(description="Token ids of all turns: Base64 of little-endian 32-bit integers.")]
    checksum: Annotated[
        Digest, Meta(description="SHA-256 of the session. docs/sessions.md describes how it is computed.")
    ]


class SessionCompletion(Struct, frozen=True, kw_only=True):
    """The token ids that the model read and sampled in one turn."""

    turn: Annotated[int, Meta(description="Counted from 1.")]
    context_tokens: Annotated[
        int, Meta(description="Tokens of the earlier turns, which come before this turn's input.")
    ]
    input_ids: list[int]
    output_ids: list[int]
    logprobs: Annotated[
        list[float] | None,
        Meta(
            description="Natural log-probability of each output id, before temperature is applied. Null if it was not "
            "recorded."
        ),
    ]
    loss_mask: Annotated[
        list[int], Meta(description="For each input and output id: 1 if the model sampled it, else 0.")
    ]


class SessionCompletions(Struct, frozen=True, kw_only=True):
    """The committed turns of a session, the oldest first."""

    id: int | str
    object: Literal["session.completions"] = "session.completions"
    model: str
    fingerprint: Annotated[str, Meta(description="Fingerprint of the model, the tokenizer and the chat template.")]
    data: list[SessionCompletion]
    has_more: bool
