"""The WebSocket of `/v1/responses`."""

from __future__ import annotations

from typing import Any

from litestar import WebSocket, websocket
from litestar.exceptions import WebSocketDisconnect

from lmserve.api.convert.lanes import lane_of
from lmserve.api.convert.unsupported import Ignored
from lmserve.api.http.serving import serving_of, tenant_of
from lmserve.api.http.websocket import ACCOUNT, deny
from lmserve.api.responses.socket import ROUTE, ResponsesSocket
from lmserve.errors import LmserveError
from lmserve.schemas.responses import ResponsesRequest


@websocket("/v1/responses")
async def responses_socket(socket: WebSocket[Any, Any, Any]) -> None:
    """Messages of type response.create, each answered by the events of a response."""
    serving = serving_of(socket)
    try:
        serving.check_ready()
    except LmserveError as error:
        await deny(error, socket.scope, socket.send)
        return

    def lane(data: ResponsesRequest) -> str | None:
        return lane_of(socket, Ignored(ROUTE), data.prompt_cache_key, enabled=serving.agent_sessions)

    await socket.accept(headers={"x-request-id": socket.scope["state"]["request_id"]})
    talk = ResponsesSocket(serving, tenant_of(socket), lane, socket.send_text, socket.scope["state"][ACCOUNT])
    try:
        while True:
            await talk.receive((await socket.receive_text()).encode())
    except WebSocketDisconnect:
        pass
    finally:
        await talk.close()
