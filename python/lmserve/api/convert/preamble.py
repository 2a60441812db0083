"""Lines that agents put at the beginning of their system prompt and that differ in each request.

The prefix cache compares from the first token on, so one such line makes every request compute its whole prompt.
"""

from __future__ import annotations

import re
from typing import Final

from lmserve.api.convert.unsupported import Ignored

# Claude Code: version, entry point and a hash of the request, for Anthropic's billing. The model has no use for it.
BILLING: Final = re.compile(r"x-anthropic-billing-header:[^\n]*(?:\n+|$)")
# The time of day of the request.
CLOCK: Final = re.compile(
    r"(?:the )?(?:current|today's|present) (?:date|time|date and time|date/time|datetime|timestamp)(?: is)?\b[^\n]*"
    r"\d{1,2}:\d\d[^\n]*(?:\n+|$)",
    re.IGNORECASE,
)


def stable(system: str, ignored: Ignored) -> str:
    """The prompt without a billing line, which `ignored` names, and with a line of the clock at its end."""
    if (billing := BILLING.match(system)) is not None:
        ignored.add("x-anthropic-billing-header")
        system = system[billing.end() :]
    clock = CLOCK.match(system)
    if clock is None or clock.end() == len(system):
        return system
    return f"{system[clock.end() :].rstrip()}\n\n{clock[0].strip()}"
