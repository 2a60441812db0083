"""Compacts a conversation: the model summarizes it, and the summary replaces the conversation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import msgspec

from lmserve.api.convert.compaction import sealed
from lmserve.api.responses.outcome import RecordedResponse
from lmserve.errors import LmserveError
from lmserve.schemas.compaction import CompactReply
from lmserve.schemas.response_reply import CompactionItem, OutputMessage, ResponseReply, StoredMessage
from lmserve.schemas.responses import InputItem

ASK: Final = (
    "Sum up our conversation so far, so that it can go on from your summary alone. Keep what I want, what was decided, "
    "names, numbers, paths and code that matter, what tools gave, and what is still to be done. Write the summary only."
)
SUMMARY_TOKENS: Final = 1024  # where the request does not say how many


def question() -> InputItem:
    """What asks the model for the summary."""
    return InputItem(role="user", content=ASK)


class Compaction:
    """A `WholeBody`: the reply once the model has written the summary."""

    def __init__(self, recorded: RecordedResponse, said: Sequence[StoredMessage]) -> None:
        """`recorded`: the answer to `question`. `said`: the user's messages, which stay as they are."""
        self._recorded = recorded
        self._said = said

    async def body(self) -> bytes:
        """As `RecordedResponse.body`. Raises LmserveError (400) where the model wrote no summary."""
        response = msgspec.json.decode(await self._recorded.body(), type=ResponseReply)
        texts = [part.text for item in response.output if isinstance(item, OutputMessage) for part in item.content]
        summary = "".join(texts).strip()
        if not summary or response.usage is None:
            raise LmserveError.invalid(
                "input", "the model wrote no summary; try again, or continue without one", "no_summary"
            )
        unique = response.id.removeprefix("resp_")
        item = CompactionItem(id=f"cmp_{unique}", encrypted_content=sealed(summary))
        reply = CompactReply(
            id=response.id, created_at=int(time.time()), output=[*self._said, item], usage=response.usage
        )
        return msgspec.json.encode(reply)

    def abort(self) -> None:
        """As `RecordedResponse.abort`."""
        self._recorded.abort()
