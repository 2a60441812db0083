"""How hard to think, in the words of each API."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import UNSET, Meta, Struct

from lmserve.schemas.hints import NoEffect
from lmserve.schemas.sampling import ThinkingBudget

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


EFFORT: Final = (
    "How hard to think; none: no thoughts; null: as the template likes. Where the template has no word for it, "
    "thoughts have at most 512 tokens with minimal, 2048 with low, 8192 with medium, and 32768 with high."
)


class Reasoning(Struct, frozen=True, kw_only=True):
    """How hard to think. Other keys are ignored."""

    effort: Annotated[Effort | None, Meta(description=EFFORT)] = None
    max_tokens: Annotated[ThinkingBudget | None, Meta(description="Most tokens of thoughts.")] = None
    enabled: Annotated[bool | None, Meta(description="false: as effort none.")] = None
    summary: NoEffect = UNSET
    generate_summary: NoEffect = UNSET
    exclude: NoEffect = UNSET


class Adaptive(Struct, tag_field="type", tag="adaptive", frozen=True):
    """The model thinks as much as it likes."""

    display: NoEffect = UNSET


class Enabled(Struct, tag_field="type", tag="enabled", frozen=True):
    """The model thinks, for so many tokens at most."""

    budget_tokens: Annotated[
        ThinkingBudget | None, Meta(description="Then the end of the thoughts is forced. Null: no limit.")
    ] = None
    display: NoEffect = UNSET


class Disabled(Struct, tag_field="type", tag="disabled", frozen=True):
    """The model is told not to think."""

    display: NoEffect = UNSET


ThinkingSwitch = Adaptive | Enabled | Disabled
