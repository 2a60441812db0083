"""Keeps stored responses in a file beside the session log, so that they survive a restart as their sessions do."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from msgspec import Raw

from lmserve.api.responses.log_file import (
    MAGIC,
    MAX_RECORD,
    Damaged,
    Dropped,
    Kept,
    LogFile,
    Torn,
    framed,
    sync_folder,
)
from lmserve.engine.sessions import StorageFault
from lmserve.errors import LmserveError
from lmserve.schemas.response_reply import StoredItem

logger = logging.getLogger("lmserve.http")

NAME: Final = "responses.log"
MIN_GARBAGE: Final = 1 << 20  # bytes out of date below which the file is not worth rewriting
MAX_STRANGERS: Final = 10_000  # responses of keys that the server does not know
FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RESPONSE: Final = re.compile(rb'"id":"(resp_[0-9a-f]+)"')

Remembered = tuple[int, str, str | None, list[StoredItem], bytes]


class ResponseLog:
    """The file. Its methods block, and belong to one thread at a time.

    Where the disk fails, that is logged once for each kind of failure, and `heal` writes the file anew from memory.
    Until then what could not be written is gone if the server is.
    """

    def __init__(self, folder: Path, tenants: Mapping[int, bytes], *, min_garbage: int = MIN_GARBAGE) -> None:
        """`folder`: the session log's, which belongs to this server. `tenants`: their names there by number."""
        self._path = folder / NAME
        self._names = {number: name.hex() for number, name in tenants.items()}
        self._min_garbage = min_garbage
        self._live: dict[tuple[str, str], tuple[int, int]] = {}  # offset and length of each record that counts
        self._live_bytes = 0
        self._length = 0
        self._file: LogFile | None = None
        self._remember: Callable[[], Iterable[Remembered]] = tuple
        self.fault: StorageFault | None = None

    def open(self, remember: Callable[[], Iterable[Remembered]] = tuple) -> Iterator[tuple[int, Kept]]:
        """The responses of known tenants, the oldest first. Raises LmserveError for a file that is no such log.

        `remember`: the arguments of `append` for all that the server holds, asked for on the log's thread where the
        disk has lost something.
        """
        self._remember = remember
        try:
            file = LogFile(self._path)
            begin = file.part(range(len(MAGIC)))
            if not MAGIC.startswith(begin):
                file.close()
                raise _unusable(f"{self._path} is not a log of responses, or has another version; move it away")
            if begin != MAGIC:
                file.truncate(0)
                file.append(MAGIC)
                sync_folder(self._path.parent)
            self._file = file
            return self._read(file)
        except OSError as error:
            raise _unusable(f"{self._path} cannot be used: {error.strerror}") from error

    def _read(self, file: LogFile) -> Iterator[tuple[int, Kept]]:
        kept: dict[tuple[str, str], Kept] = {}
        known = set(self._names.values())
        damaged: list[range] = []
        torn: list[range] = []
        for found in file.records():
            if isinstance(found, Damaged):
                damaged.append(found.part)
                continue
            if isinstance(found, Torn):
                torn.append(found.part)
                continue
            key = (found.record.tenant, found.record.id)
            kept.pop(key, None)
            self._forget(key)
            if isinstance(found.record, Kept):
                self._count(key, found.offset, found.size)
                if found.record.tenant in known:
                    kept[key] = found.record
        self._length = torn[0].start if torn else file.size
        self._set_aside(file, damaged, torn)
        strangers = [key for key in self._live if key not in kept]
        for key in strangers[: max(len(strangers) - MAX_STRANGERS, 0)]:
            self._forget(key)
        numbers = {name: number for number, name in self._names.items()}
        return ((numbers[record.tenant], record) for record in kept.values())

    def _set_aside(self, file: LogFile, damaged: list[range], torn: list[range]) -> None:
        """Keep what is no whole record in a file of its own, and have a log without it."""
        if not damaged and not torn:
            return
        aside = file.keep([*damaged, *torn]).name
        if torn:
            file.truncate(self._length)
            message = "the log of responses ended within a record: %d bytes were cut off its end, and kept in %s"
            logger.warning(message, len(torn[0]), aside)
        for part in damaged:
            name = RESPONSE.search(file.part(part))
            what = "a record without a readable name" if name is None else name[1].decode()
            logger.error("the log of responses was damaged: %s is lost, and kept in %s", what, aside)
        if damaged:
            self._rewrite(self._copies(file, self._live))

    def append(
        self, tenant: int, response_id: str, instructions: str | None, items: list[StoredItem], body: bytes
    ) -> None:
        """Write a response down."""
        self._write(
            Kept(tenant=self._names[tenant], id=response_id, instructions=instructions, items=items, body=Raw(body))
        )

    def drop(self, tenant: int, response_id: str) -> None:
        """Write down that a response is gone, if it was written down."""
        if (self._names[tenant], response_id) in self._live:
            self._write(Dropped(tenant=self._names[tenant], id=response_id))

    def sync(self) -> None:
        """Make what was written safe from the death of the machine."""
        if self._file is None or self.fault is not None:
            return
        try:
            self._file.check_place()
            self._file.sync()
        except OSError as error:
            # The system may have forgotten what it could not write, and would call the next fsync a success.
            self._fail(error)
            self.heal()

    def heal(self) -> bool:
        """Where the disk failed: write the file anew from memory. False: it still fails."""
        if self._file is None or self.fault is None:
            return True
        known = set(self._names.values())
        strangers = {key: at for key, at in self._live.items() if key[0] not in known}
        try:
            records = [*self._copies(self._file, strangers)]
            for tenant, response_id, instructions, items, body in self._remember():
                name = self._names[tenant]
                kept = Kept(tenant=name, id=response_id, instructions=instructions, items=items, body=Raw(body))
                records.append(((name, response_id), framed(kept)))
            self._rewrite(records)
        except OSError as error:
            self._fail(error)
            return False
        self.fault = None
        logger.warning("the log of responses can be written again")
        return True

    def close(self) -> None:
        """Make all safe. Nothing is written any more."""
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None

    def _count(self, key: tuple[str, str], offset: int, size: int) -> None:
        self._live[key] = (offset, size)
        self._live_bytes += size

    def _forget(self, key: tuple[str, str]) -> None:
        _, size = self._live.pop(key, (0, 0))
        self._live_bytes -= size

    def _fail(self, error: OSError) -> None:
        code = "storage_full" if error.errno in FULL else "storage_failed"
        message = f"the log of responses cannot be written: {error.strerror}"
        if self.fault is None or self.fault.code != code:
            logger.error("%s; responses that are not in it are lost when the server stops", message)
        self.fault = StorageFault(code, message)

    def _write(self, record: Kept | Dropped) -> None:
        data = framed(record)
        if self._file is None or len(data) > MAX_RECORD:
            return
        # After a failure the file is written anew, and this record with it, if it is one that stays.
        if self.fault is not None:
            return
        try:
            self._file.append(data)
        except OSError as error:
            self._fail(error)
            self._file.truncate(self._length)
            self.heal()
            return
        key = (record.tenant, record.id)
        self._forget(key)
        if isinstance(record, Kept):
            self._count(key, self._length, len(data))
        self._length += len(data)
        if self._length - self._live_bytes >= max(self._min_garbage, self._live_bytes):
            try:
                self._rewrite(self._copies(self._file, self._live))
            except OSError as error:
                self._fail(error)

    @staticmethod
    def _copies(
        file: LogFile, live: Mapping[tuple[str, str], tuple[int, int]]
    ) -> Iterator[tuple[tuple[str, str], bytes]]:
        for key, (offset, size) in live.items():
            yield key, file.part(range(offset, offset + size))

    def _rewrite(self, records: Iterable[tuple[tuple[str, str], bytes]]) -> None:
        """Put a file with these records in the log's place. Raises OSError; the log is as it was."""
        folder = self._path.parent
        if self._file is not None and self._path.exists():
            self._file.check_place()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        new_path = self._path.with_suffix(".log.new")
        new_path.unlink(missing_ok=True)
        new = LogFile(new_path)
        try:
            length, live = len(MAGIC), {}
            new.append(MAGIC)
            for key, data in records:
                new.append(data)
                live[key] = (length, len(data))
                length += len(data)
            new.sync()
            new_path.rename(self._path)
        except BaseException:
            new.close()
            raise
        if self._file is not None:
            self._file.close()
        # The new file is in its place, whatever the disk says of the folder.
        new.moved(self._path)
        self._file, self._live, self._length = new, live, length
        self._live_bytes = length - len(MAGIC)
        sync_folder(folder)


def _unusable(message: str) -> LmserveError:
    return LmserveError.new(400, "session_dir_unusable", message)
