"""Stored responses in a file beside the session log, so that they outlive the server as their sessions do."""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Final
from zlib import crc32

import msgspec
from msgspec import Raw, Struct

from lmserve.errors import LmserveError
from lmserve.schemas.responses import StoredItem

logger = logging.getLogger("lmserve.http")

NAME: Final = "responses.log"
MAGIC: Final = b"lmresp1\n"  # the digit is the format's version
FRAME: Final = struct.Struct("<II")  # length and CRC-32 of the payload, which is JSON
MAX_RECORD: Final = 1 << 28
MIN_GARBAGE: Final = 1 << 20  # bytes out of date below which the file is not worth rewriting
MAX_STRANGERS: Final = 10_000  # responses of keys that the server does not know


class Kept(Struct, frozen=True, kw_only=True, tag="response"):
    """A response at its end. `tenant`: what the session log calls it, in hexadecimal digits."""

    tenant: str
    id: str
    instructions: str | None
    items: list[StoredItem]
    body: Raw


class Dropped(Struct, frozen=True, kw_only=True, tag="dropped"):
    """A response that is gone."""

    tenant: str
    id: str


decode = msgspec.json.Decoder(Kept | Dropped).decode


class ResponseLog:
    """The file. Its methods block, and belong to one thread at a time.

    A record that cannot be written is logged and not there: its response is gone with the server.
    """

    def __init__(self, folder: Path, tenants: Mapping[int, bytes], *, min_garbage: int = MIN_GARBAGE) -> None:
        """`folder`: the session log's, which belongs to this server. `tenants`: their names there by number."""
        self._path = folder / NAME
        self._names = {number: name.hex() for number, name in tenants.items()}
        self._min_garbage = min_garbage
        self._live: dict[tuple[str, str], tuple[int, int]] = {}  # offset and length of each record that counts
        self._live_bytes = 0
        self._length = 0
        self._file: BinaryIO | None = None

    def open(self) -> Iterator[tuple[int, Kept]]:
        """The responses of known tenants, the oldest first. Raises LmserveError for a file that is no such log."""
        self._file = self._open(self._path)
        begin = self._file.read(len(MAGIC))
        if not MAGIC.startswith(begin):
            message = f"{self._path} is no log of responses, or one of another version; move it away"
            raise LmserveError.new(400, "session_dir_unusable", message)
        if begin != MAGIC:
            self._file.truncate(0)
            self._file.write(MAGIC)
        self._length = len(MAGIC)
        kept: dict[tuple[str, str], Kept] = {}
        known = set(self._names.values())
        for size, record in self._records(self._file):
            key = (record.tenant, record.id)
            kept.pop(key, None)
            self._forget(key)
            if isinstance(record, Kept):
                self._count(key, size)
                if record.tenant in known:
                    kept[key] = record
            self._length += size
        torn = os.fstat(self._file.fileno()).st_size - self._length
        if torn:
            logger.warning("the log of responses ended within a record: %d bytes were cut off its end", torn)
            self._file.truncate(self._length)
        strangers = [key for key in self._live if key not in kept]
        for key in strangers[: max(len(strangers) - MAX_STRANGERS, 0)]:
            self._forget(key)
        numbers = {name: number for number, name in self._names.items()}
        return ((numbers[record.tenant], record) for record in kept.values())

    def append(
        self, tenant: int, response_id: str, instructions: str | None, items: list[StoredItem], body: bytes
    ) -> None:
        """Write a response down."""
        name = self._names[tenant]
        record = Kept(tenant=name, id=response_id, instructions=instructions, items=items, body=Raw(body))
        if size := self._write(record):
            self._forget((name, response_id))
            self._count((name, response_id), size)
            self._length += size
            self._rewrite_if_due()

    def drop(self, tenant: int, response_id: str) -> None:
        """Write down that a response is gone, if it was written down."""
        key = (self._names[tenant], response_id)
        if key in self._live and (size := self._write(Dropped(tenant=key[0], id=response_id))):
            self._forget(key)
            self._length += size
            self._rewrite_if_due()

    def sync(self) -> None:
        """Make what was written safe from the death of the machine."""
        if self._file is not None:
            try:
                os.fdatasync(self._file.fileno())
            except OSError:
                logger.exception("the log of responses could not be made safe")

    def close(self) -> None:
        """Make all safe. Nothing is written any more."""
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None

    @staticmethod
    def _open(path: Path) -> BinaryIO:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        return os.fdopen(descriptor, "r+b", buffering=0)

    @staticmethod
    def _records(file: BinaryIO) -> Iterator[tuple[int, Kept | Dropped]]:
        """Bytes and contents of each whole record."""
        with os.fdopen(os.dup(file.fileno()), "rb") as reader:
            reader.seek(len(MAGIC))
            while len(frame := reader.read(FRAME.size)) == FRAME.size:
                length, checksum = FRAME.unpack(frame)
                payload = reader.read(length) if length <= MAX_RECORD else b""
                if len(payload) < length or crc32(payload) != checksum:
                    return
                try:
                    yield FRAME.size + length, decode(payload)
                except msgspec.MsgspecError:
                    return

    def _count(self, key: tuple[str, str], size: int) -> None:
        """The record at the end counts."""
        self._live[key] = (self._length, size)
        self._live_bytes += size

    def _forget(self, key: tuple[str, str]) -> None:
        _, size = self._live.pop(key, (0, 0))
        self._live_bytes -= size

    def _write(self, record: Kept | Dropped) -> int:
        """Bytes of the record behind the end; 0: it could not be written."""
        payload = msgspec.json.encode(record)
        data = FRAME.pack(len(payload), crc32(payload)) + payload
        if self._file is None or len(payload) > MAX_RECORD:
            return 0
        try:
            _write_all(self._file, data)
        except OSError:
            logger.exception("a response could not be written down; it will be gone with the server")
            self._file.truncate(self._length)
            return 0
        return len(data)

    def _rewrite_if_due(self) -> None:
        if self._file is None or self._length - self._live_bytes < max(self._min_garbage, self._live_bytes):
            return
        new_path = self._path.with_suffix(".log.new")
        try:
            new_path.unlink(missing_ok=True)
            new = self._open(new_path)
            length, moved = len(MAGIC), {}
            _write_all(new, MAGIC)
            for key, (offset, size) in self._live.items():
                _write_all(new, os.pread(self._file.fileno(), size, offset))
                moved[key] = (length, size)
                length += size
            os.fsync(new.fileno())
            new_path.rename(self._path)
        except OSError:
            logger.exception("the log of responses could not be rewritten; it stays as it is")
            return
        self._file.close()
        self._file, self._live, self._length = new, moved, length


def _write_all(file: BinaryIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
