"""The item that holds the summary of a compacted conversation."""

from __future__ import annotations

import base64
import binascii
from typing import Final

from lmserve.errors import LmserveError

# Names the form of what follows; the digit is its version. Its point is in no Base64.
FORM: Final = "lmserve1."
MAX_QUOTE: Final = 40


def sealed(summary: str) -> str:
    """A summary as its item holds it. It is no secret from the client, who gets the same text from the model."""
    return FORM + base64.urlsafe_b64encode(summary.encode()).decode()


def is_ours(content: str) -> bool:
    """Whether an lmserve server wrote it. Only its own server can read what another one writes."""
    return content.startswith(FORM)


def opened(content: str, param: str) -> str:
    """The summary in an item. Raises LmserveError (400) for what this server did not write."""
    form, found, text = content.partition(".")
    try:
        decoded = base64.b64decode(text, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        found = ""
    if form + found == FORM:
        return decoded
    given = repr(content[:MAX_QUOTE])
    message = f"{param} must be what /v1/responses/compact of this server returned, but {given} was given"
    raise LmserveError.invalid(param, message, "invalid_compaction")
