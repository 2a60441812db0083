"""The reasoning fields of each API."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import UNSET, Meta, Struct

from lmserve.schemas.hints import NoEffect
from lmserve.schemas.sampling import ThinkingBudget

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


EFFORT: Final = (
    "How much the model thinks. none: not at all. Null: the template decides. If the template has "
    "no variable for it, the number of thinking tokens is limited: 512 for minimal, 2048 for low, "
    "8192 for medium, 32768 for high."
)


class Reasoning(Struct, frozen=True, kw_only=True):
    """How much the model thinks. Other keys are ignored."""

    effort: Annotated[Effort | None, Meta(description=EFFORT)] = None
    max_tokens: Annotated[ThinkingBudget | None, Meta(description="Maximum number of thinking tokens.")] = None
    enabled: Annotated[bool | None, Meta(description="false has the effect of effort none.")] = None
    summary: NoEffect = UNSET
    generate_summary: NoEffect = UNSET
    exclude: NoEffect = UNSET


class Adaptive(Struct, tag_field="type", tag="adaptive", frozen=True):
    """The model decides how much it thinks."""

    display: NoEffect = UNSET


class Enabled(Struct, tag_field="type", tag="enabled", frozen=True):
    """The model thinks, up to a number of tokens."""

    budget_tokens: Annotated[
        ThinkingBudget | None,
        Meta(
            description="Maximum number of thinking tokens. The server then forces the end of the thoughts. Null: no "
            "limit."
        ),
    ] = None
    display: NoEffect = UNSET


class Disabled(Struct, tag_field="type", tag="disabled", frozen=True):
    """The model is told not to think."""

    display: NoEffect = UNSET


ThinkingSwitch = Adaptive | Enabled | Disabled
