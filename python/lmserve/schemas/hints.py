"""Fields that are only declared so that they are known: hints without effect, and unsupported fields."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Raw, UnsetType

# A hint says how much to think, what to cache, what to show or whom to bill. Sampled tokens do not depend on it.
NoEffect = Annotated[
    Raw | UnsetType, Meta(description="A hint that has no effect. The reply's header `x-lmserve-ignored` names it.")
]
# It would change the sampled tokens, so it must not be ignored silently.
Unsupported = Annotated[
    Raw | UnsetType, Meta(description="Not supported. A value other than null is a 400, unless it asks for nothing.")
]
