"""Examples in the OpenAPI document. Tests check each against its schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from msgspec import Struct

from lmserve.api.http.examples import answers, encoders, responses, server, sessions

EXAMPLES: Final[Mapping[type[Struct], tuple[Any, ...]]] = {
    **answers.EXAMPLES,
    **responses.EXAMPLES,
    **encoders.EXAMPLES,
    **sessions.EXAMPLES,
    **server.EXAMPLES,
}
