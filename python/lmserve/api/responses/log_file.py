"""An append-only file of framed JSON records: written only while it is in its place, read on after damaged records."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final
from zlib import crc32

import msgspec
from msgspec import Raw, Struct

from lmserve.schemas.response_reply import StoredItem

MAGIC: Final = b"lmresp1\n"  # the digit is the format's version
FRAME: Final = struct.Struct("<II")  # length and CRC-32 of the payload, which is JSON
MAX_RECORD: Final = 1 << 28
# How every payload begins. A frame's length has a byte below 0x20 before it, which no JSON text has: what a record
# quotes is never taken for a record.
BEGIN: Final = b'{"type":"'
COPY: Final = 1 << 20


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


class Whole(Struct, frozen=True):
    """A record, and where it is."""

    offset: int
    size: int
    record: Kept | Dropped


class Damaged(Struct, frozen=True):
    """Bytes that are no whole record, before others that are one, or as many as a record says it has."""

    part: range


class Torn(Struct, frozen=True):
    """A record at the end that was written in part."""

    part: range


_decode = msgspec.json.Decoder(Kept | Dropped).decode


def framed(record: Kept | Dropped) -> bytes:
    payload = msgspec.json.encode(record)
    return FRAME.pack(len(payload), crc32(payload)) + payload


class LogFile:
    """A regular file, open to append to it. Methods raise OSError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Not to wait for the other end of a FIFO.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
        self._file = os.open(path, flags, 0o600)
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            os.close(self._file)
            raise OSError(errno.EINVAL, "it is not a regular file; move it away")

    @property
    def size(self) -> int:
        return os.fstat(self._file).st_size

    def append(self, data: bytes) -> None:
        """What is written to a file that has lost its name is gone with the process: that fails, too."""
        self.check_place()
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._file, rest) :]

    def check_place(self) -> None:
        try:
            there = self._path.stat()
        except FileNotFoundError as error:
            raise OSError(errno.ENOENT, f"{self._path} was deleted or moved away") from error
        if not os.path.samestat(there, os.fstat(self._file)):
            raise OSError(errno.EEXIST, f"{self._path} is another file now; move it away")

    def moved(self, path: Path) -> None:
        """The file has another name now."""
        self._path = path

    def part(self, part: range) -> bytes:
        return os.pread(self._file, len(part), part.start)

    def truncate(self, length: int) -> None:
        os.ftruncate(self._file, length)

    def sync(self) -> None:
        os.fdatasync(self._file)

    def close(self) -> None:
        os.close(self._file)

    def records(self) -> Iterator[Whole | Damaged | Torn]:
        """All records after the magic, in order."""
        if self.size <= len(MAGIC):
            return
        with mmap.mmap(self._file, 0, access=mmap.ACCESS_READ) as data:
            at = len(MAGIC)
            while at < len(data):
                if (whole := _whole(data, at)) is not None:
                    yield whole
                    at += whole.size
                    continue
                begin, at = at, _next_whole(data, at)
                length, _ = FRAME.unpack(data[begin : begin + FRAME.size].ljust(FRAME.size, b"\xff"))
                complete = begin + FRAME.size + length <= len(data)
                part = range(begin, at)
                yield Damaged(part) if at < len(data) or complete else Torn(part)

    def keep(self, parts: Sequence[range]) -> Path:
        """Copy parts to a file of their own beside this one, which is safe when this returns."""
        checksum = 0
        for part in parts:
            for chunk in self._chunks(part):
                checksum = crc32(chunk, checksum)
        kept = self._path.with_name(f"{self._path.name}.damaged-{checksum:08x}")
        new = kept.with_name(f"{self._path.name}.damaged.new")
        if not kept.exists():
            new.unlink(missing_ok=True)
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                for part in parts:
                    file.writelines(self._chunks(part))
                file.flush()
                os.fsync(file.fileno())
            new.rename(kept)
        sync_folder(kept.parent)
        return kept

    def _chunks(self, part: range) -> Iterator[bytes]:
        for at in range(part.start, part.stop, COPY):
            yield self.part(range(at, min(at + COPY, part.stop)))


def _whole(data: mmap.mmap, at: int) -> Whole | None:
    frame = data[at : at + FRAME.size]
    if len(frame) < FRAME.size:
        return None
    length, checksum = FRAME.unpack(frame)
    payload = data[at + FRAME.size : at + FRAME.size + length] if length <= MAX_RECORD else b""
    if len(payload) < length or crc32(payload) != checksum:
        return None
    try:
        return Whole(at, FRAME.size + length, _decode(payload))
    except msgspec.MsgspecError:
        return None


def _next_whole(data: mmap.mmap, at: int) -> int:
    """Offset of the next record after `at`; the end of the data if there is none."""
    found = data.find(BEGIN, at + FRAME.size + 1)
    while found >= 0:
        if _whole(data, found - FRAME.size) is not None:
            return found - FRAME.size
        found = data.find(BEGIN, found + 1)
    return len(data)


def sync_folder(folder: Path) -> None:
    """Make the names of a folder's files safe from the death of the machine."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
