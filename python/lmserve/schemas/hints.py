"""Fields that are declared only so that they are known: hints that cannot be followed, and what is not supported."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Raw, UnsetType

# A hint tells how hard to think, what to cache, what to show or whom to bill: the tokens sampled do not depend on it.
NoEffect = Annotated[
    Raw | UnsetType, Meta(description="A hint that has no effect. The reply's header `x-lmserve-ignored` names it.")
]
# It would change the tokens sampled, so that leaving it out in silence would be wrong.
Unsupported = Annotated[
    Raw | UnsetType, Meta(description="Not supported. A value other than null is a 400, unless it asks for nothing.")
]
