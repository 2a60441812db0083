"""The responses of `/v1/responses` that the server keeps: what each was asked and what came of it.

The tokens of a stored response are a session of the core, and its id says which. A client names sessions by numbers
from 0 on, so those below are free for it.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import msgspec

from lmserve.errors import LmserveError
from lmserve.schemas.responses import StoredItem

MAX_RESPONSES: Final = 10_000
MAX_BYTES: Final = 268_435_456  # of the texts that are kept

ID_BITS: Final = 62
RESPONSE_ID: Final = re.compile("resp_([0-3][0-9a-f]{15})")
FIRST_SESSION: Final = -2


def new_response_id() -> str:
    """An id that nobody can guess."""
    return f"resp_{secrets.randbits(ID_BITS):016x}"


def session_of(response_id: str, param: str = "response_id") -> int:
    """The session that holds a response's tokens. Raises LmserveError (404) for what is no response's id."""
    match = RESPONSE_ID.fullmatch(response_id)
    if match is None:
        raise no_response(response_id, param)
    return FIRST_SESSION - int(match[1], 16)


def no_response(response_id: str, param: str = "response_id") -> LmserveError:
    code = "previous_response_not_found" if param == "previous_response_id" else "response_not_found"
    message = f"there is no stored response {response_id!r}; it was never stored, was deleted, or had to make room"
    return LmserveError.new(404, code, message, param=param)


class StoredResponse:
    """A response, from when it begins to run."""

    def __init__(self, *, instructions: str | None, items: Sequence[StoredItem], body: bytes) -> None:
        """`instructions`: those in force in the conversation. `body`: the response's JSON as it stands."""
        self.instructions = instructions
        self.items = items
        self.body = body
        self.ended = asyncio.Event()
        self._fixed_size = len(msgspec.json.encode(items)) + len(instructions or "")

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        return self._fixed_size + len(self.body)


class ResponseStore:
    """Stored responses by tenant and id, within a number and a size: the longest unused go first."""

    def __init__(self, *, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._responses: OrderedDict[tuple[int, str], StoredResponse] = OrderedDict()
        self._bytes = 0

    def begin(self, tenant: int, response_id: str, response: StoredResponse) -> None:
        """Keep a response that begins to run."""
        self._responses[tenant, response_id] = response
        self._bytes += response.size
        self._make_room()

    def end(self, tenant: int, response_id: str, body: bytes | None) -> None:
        """Its outcome; None: there is none, and it is not kept."""
        response = self._responses.get((tenant, response_id))
        if response is None:
            return
        if body is None:
            self.drop(tenant, response_id)
        else:
            self._bytes += len(body) - len(response.body)
            response.body = body
            self._make_room()
        response.ended.set()

    def get(self, tenant: int, response_id: str) -> StoredResponse | None:
        """The response, which thereby counts as used."""
        response = self._responses.get((tenant, response_id))
        if response is not None:
            self._responses.move_to_end((tenant, response_id))
        return response

    def drop(self, tenant: int, response_id: str) -> bool:
        """Forget it. False: there was none."""
        response = self._responses.pop((tenant, response_id), None)
        if response is None:
            return False
        self._bytes -= response.size
        response.ended.set()
        return True

    def _make_room(self) -> None:
        while len(self._responses) > self._max_responses or (
            self._bytes > self._max_bytes and len(self._responses) > 1
        ):
            self.drop(*next(iter(self._responses)))
