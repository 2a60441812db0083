"""Begins a response's turn, in its conversation if it names one."""

from __future__ import annotations

from lmserve.api.convert.unsupported import Ignored
from lmserve.api.http.serving import Serving
from lmserve.api.responses.outcome import RecordedResponse
from lmserve.api.responses.store import StoredResponse
from lmserve.api.responses.turn import ResponseTurn, conversation_id
from lmserve.errors import LmserveError
from lmserve.schemas.responses import ResponsesRequest


async def begin(
    data: ResponsesRequest, ignored: Ignored, serving: Serving, tenant: int, lane: str | None
) -> RecordedResponse | StoredResponse:
    """The reply; a StoredResponse: it runs in the background. Raises LmserveError if it is refused at once."""
    named = conversation_id(data)
    if named is None:
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


def is_gone(error: LmserveError) -> bool:
    """Whether the session that a conversation would go on from cannot be gone on from."""
    return error.status == 404 or error.code == "session_damaged"
