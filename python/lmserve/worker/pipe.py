"""Frames on a socket between two processes of one machine.

A frame is 4 bytes that no text begins with, its kind, the length of its body, the body's CRC-32, and the body. Whatever
is something else ends the connection; nothing in a frame is run.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import zlib
from enum import IntEnum
from typing import Final

from lmserve.worker.errors import PipeEndedError, PipeError

MAGIC: Final = b"\xf5lw\x01"
MAX_BODY: Final = 1 << 30
# Seconds to take a frame, and for the rest of one whose header has come: who sends it has all of it.
BODY_SECONDS: Final = 30.0
_HEADER: Final = struct.Struct("<4sIII")


class Kind(IntEnum):
    """What the body of a frame is."""

    START = 1  # `messages.Start`, to the process
    READY = 2  # `messages.Ready`, from it
    REFUSED = 3  # `messages.Refused`: it cannot load the model
    STEP = 4  # `StepPlan`, to it
    MASKS = 5  # bytes of the masks of the step before, to it
    OUTCOME = 6  # `StepOutcome`, from it
    EMBED = 7  # `messages.Texts`, to it
    VECTORS = 8  # `messages.Vectors`, from it
    FAILED = 9  # text: why the step or the texts could not be computed
    DONE = 10  # nothing: the adapter is changed; from ranks other than 0: the step or the texts are computed
    PART = 11  # nothing, from it: texts need more passes, for which it waits
    GO_ON = 12  # nothing, to it: compute the next pass; there may have been steps since the last one
    MODULE = 13  # `adapters.Module`, to it: of the adapter that the next ADAPTER names; not answered
    ADAPTER = 14  # `adapters.AdapterName`, to it: steps may have this adapter, or may not any more


class Pipe:
    """One end of the connection. Each direction is for one thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def fileno(self) -> int:
        """The descriptor that is readable when a frame begins or the connection ends."""
        return self._socket.fileno()

    def send(self, kind: Kind, body: bytes) -> None:
        """Send a frame. Raises PipeError if the other end is gone."""
        if len(body) > MAX_BODY:
            raise PipeError(f"a frame of {len(body)} bytes; the limit is {MAX_BODY}")
        header = _HEADER.pack(MAGIC, kind, len(body), zlib.crc32(body))
        try:
            self._socket.settimeout(BODY_SECONDS)
            self._socket.sendall(header)
            self._socket.sendall(body)
        except OSError as error:
            raise PipeError(f"it cannot be written to: {error.strerror or error}") from error

    def receive(self) -> tuple[Kind, bytes]:
        """Wait for the next frame. Raises PipeError for anything else, and at the end."""
        magic, kind, length, checksum = _HEADER.unpack(self._read(_HEADER.size, None))
        if magic != MAGIC or length > MAX_BODY or kind not in list(Kind):
            raise PipeError(f"it sent {magic!r}, kind {kind}, {length} bytes, which is no frame")
        body = self._read(length, BODY_SECONDS)
        if zlib.crc32(body) != checksum:
            raise PipeError(f"a frame of {length} bytes was damaged")
        return Kind(kind), body

    def expect(self, kind: Kind) -> bytes:
        """The body of the next frame, which must be of this kind. Raises PipeError for another one."""
        found, body = self.receive()
        if found != kind:
            raise PipeError(f"it sent {found.name} where {kind.name} was due")
        return body

    def end(self) -> None:
        """End the connection, also for a thread that waits for a frame. Idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _read(self, size: int, seconds: float | None) -> bytes:
        data = bytearray(size)
        view, done = memoryview(data), 0
        try:
            self._socket.settimeout(seconds)
            while done < size:
                count = self._socket.recv_into(view[done:])
                if not count:
                    raise PipeEndedError("its connection ended")
                done += count
        except TimeoutError as error:
            raise PipeError(f"it sent {done} bytes of {size} and stopped for {seconds:g} s") from error
        except OSError as error:
            raise PipeError(f"it cannot be read from: {error.strerror or error}") from error
        return bytes(data)
