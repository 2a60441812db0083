"""Replies that are made of the core's vectors: scores, and vectors in smaller forms."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from lmserve.api.http.reply import rewritten
from lmserve.engine.stream import AsyncStream
from lmserve.schemas.embeddings import EmbeddingsReply, EmbeddingsUsage, VectorForm

Vectors = NDArray[np.float32]

LARGEST: Final = 127
# What lies between numbers of 8 bits with a sign and those without.
HALF: Final = 128


class VectorsReply:
    """A reply that `make` makes of the core's vectors [n, size], which were asked for in base64."""

    def __init__(self, stream: AsyncStream, make: Callable[[Vectors, EmbeddingsUsage], Struct | list[Any]]) -> None:
        self._stream = stream
        self._make = make

    async def body(self) -> bytes:
        body = await self._stream.body()
        return await rewritten([body], lambda: self._made(body))

    def _made(self, body: bytes) -> bytes:
        embeddings = msgspec.json.decode(body, type=EmbeddingsReply)
        rows = [base64.b64decode(str(item.embedding)) for item in embeddings.data]
        vectors = np.frombuffer(b"".join(rows), "<f4").reshape(len(rows), -1)
        return msgspec.json.encode(self._make(vectors, embeddings.usage))

    def abort(self) -> None:
        self._stream.abort()


def in_form(vectors: Vectors, form: VectorForm) -> list[Any]:
    """Vectors [n, size] as numbers or texts of a reply.

    int8: each vector times what makes its largest number 127, so that cosines stay; uint8: 128 more. binary: bit 7 of
    the first number is the sign of the first component (1: positive), less 128; ubinary: the same without that.
    """
    values: NDArray[Any] = vectors
    if form == "base64":
        return [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
    if form in ("int8", "uint8"):
        largest = np.maximum(np.abs(vectors).max(-1, keepdims=True), np.finfo(np.float32).tiny)
        values = np.rint(vectors / largest * LARGEST).astype(np.int32) + (HALF if form == "uint8" else 0)
    elif form in ("binary", "ubinary"):
        values = np.packbits(vectors > 0, axis=-1).astype(np.int32) - (HALF if form == "binary" else 0)
    rows: list[Any] = values.tolist()
    return rows
