"""Begins a response's turn, in its conversation if it names one."""

from __future__ import annotations

from typing import Final

import msgspec

from lmserve.api.convert.unsupported import Ignored
from lmserve.api.http.serving import Serving
from lmserve.api.responses.outcome import RecordedResponse
from lmserve.api.responses.store import StoredResponse, new_response_id
from lmserve.api.responses.turn import ResponseTurn, conversation_id
from lmserve.engine.async_engine import turn_key
from lmserve.errors import LmserveError
from lmserve.schemas.responses import ResponsesRequest

ANSWERED: Final = ("completed", "incomplete")


class _Ended(msgspec.Struct):
    """How a response ended."""

    status: str


async def begin(
    data: ResponsesRequest, ignored: Ignored, serving: Serving, tenant: int, lane: str | None
) -> RecordedResponse | StoredResponse:
    """The reply; a StoredResponse: it runs in the background. Raises LmserveError if it is refused at once."""
    named = conversation_id(data)
    if named is None:
        if (kept := _answered_before(serving, tenant)) is not None:
            return kept
        turn = ResponseTurn(data, ignored, serving, tenant, lane)
        return turn.run_in_background() if data.background else turn.start()
    open_turn = await serving.conversations.begin(tenant, named)
    try:
        while True:
            turn = ResponseTurn(data, ignored, serving, tenant, lane, open_turn.standing)
            try:
                return turn.run_in_background(open_turn) if data.background else turn.start(open_turn)
            except LmserveError as error:
                if open_turn.standing.tip is None or not is_gone(error):
                    raise
            await open_turn.begin_anew()
    except BaseException:
        open_turn.release()
        raise


def _answered_before(serving: Serving, tenant: int) -> StoredResponse | None:
    """The stored response of a turn that has a name, once it is there."""
    key = turn_key.get()
    kept = None if key is None else serving.responses.get(tenant, new_response_id(key))
    if kept is None or not kept.ended.is_set():
        return None
    return kept if msgspec.json.decode(kept.body, type=_Ended).status in ANSWERED else None


def is_gone(error: LmserveError) -> bool:
    """Whether the session that a conversation would go on from cannot be gone on from."""
    return error.status == 404 or error.code == "session_damaged"
