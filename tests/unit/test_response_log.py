"""The log of stored responses, whatever happens to its file."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lmserve.api.responses.log import NAME, ResponseLog
from lmserve.api.responses.log_file import MAGIC
from lmserve.errors import LmserveError
from lmserve.schemas.response_reply import StoredItem, StoredMessage, StoredPart

ADA, BOB = bytes(32), b"\1" * 32
ITEMS = [StoredMessage(id="msg_1", role="user", content=[StoredPart(type="input_text", text="é")])]


def opened(folder: Path, *, min_garbage: int = 1 << 20, tenants: dict[int, bytes] | None = None) -> ResponseLog:
    log = ResponseLog(folder, tenants or {0: ADA, 1: BOB}, min_garbage=min_garbage)
    assert list(log.open()) == []
    return log


def contents(folder: Path, tenants: dict[int, bytes] | None = None) -> list[tuple[int, str, str | None, bytes]]:
    log = ResponseLog(folder, tenants or {0: ADA, 1: BOB})
    found = [(tenant, kept.id, kept.instructions, bytes(kept.body)) for tenant, kept in log.open()]
    log.close()
    return found


def put(log: ResponseLog, tenant: int, name: str, body: bytes = b'{"id": 1}', instructions: str | None = None) -> None:
    log.append(tenant, name, instructions, list(ITEMS), body)


def test_what_was_kept_last_is_there_again(tmp_path: Path) -> None:
    log = opened(tmp_path)
    put(log, 0, "a", b'{"text":  "\xc3\xa9"}', "Be brief.")
    put(log, 1, "a")
    put(log, 0, "b")
    put(log, 0, "a", b"[]")
    log.drop(0, "b")
    log.drop(0, "never")
    log.close()
    assert contents(tmp_path) == [(1, "a", None, b'{"id": 1}'), (0, "a", None, b"[]")]
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600


def test_items_are_there_again(tmp_path: Path) -> None:
    log = opened(tmp_path)
    put(log, 0, "a")
    log.close()
    ((_, kept),) = ResponseLog(tmp_path, {0: ADA}).open()
    assert kept.items == ITEMS


def test_an_end_that_was_written_in_part_is_cut_off(tmp_path: Path) -> None:
    log = opened(tmp_path)
    put(log, 0, "a")
    put(log, 0, "b")
    log.close()
    file = tmp_path / NAME
    whole = file.read_bytes()
    first = len(MAGIC) + 8 + int.from_bytes(whole[8:12], "little")
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert [name for _, name, *_ in contents(tmp_path)] == (["a"] if length >= first else [])
        assert file.read_bytes() == (whole[:first] if length >= first else MAGIC)
    kept = {path.read_bytes() for path in tmp_path.glob("*.damaged-*")}
    assert kept == {whole[first:length] for length in range(first + 1, len(whole))} | {
        whole[len(MAGIC) : length] for length in range(len(MAGIC) + 1, first)
    }


def test_a_flipped_bit_costs_one_response(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = opened(tmp_path)
    names = [f"resp_{number:016x}" for number in range(5)]
    for name in names:
        # A body that looks like the beginning of a record.
        put(log, 0, name, b'{"type":"response","id":"x"}')
    log.close()
    file = tmp_path / NAME
    whole = file.read_bytes()
    size = (len(whole) - len(MAGIC)) // 5
    for position in range(len(MAGIC), len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        caplog.clear()
        lost = names[(position - len(MAGIC)) // size]
        # A flip can make another record of the one it hits: the same response with another text is none of them.
        assert [name for _, name, *_ in contents(tmp_path)] == [name for name in names if name != lost], position
        assert "was damaged" in caplog.text or "ended within a record" in caplog.text
        assert [name for _, name, *_ in contents(tmp_path)] == [name for name in names if name != lost]
        assert MAGIC + b"".join(path.read_bytes() for path in tmp_path.glob("*.damaged-*")) != MAGIC
        for path in tmp_path.glob("*.damaged-*"):
            path.unlink()


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / NAME)
    with pytest.raises(LmserveError, match="not a regular file"):
        ResponseLog(tmp_path, {0: ADA}).open()
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).mkdir()
    with pytest.raises(LmserveError, match="cannot be used"):
        ResponseLog(tmp_path, {0: ADA}).open()


def test_what_is_no_log_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"lmresp9\nsomething")
    with pytest.raises(LmserveError, match="not a log of responses"):
        list(ResponseLog(tmp_path, {0: ADA}).open())
    assert (tmp_path / NAME).read_bytes() == b"lmresp9\nsomething"


def test_it_is_rewritten_once_most_of_it_is_out_of_date(tmp_path: Path) -> None:
    log = opened(tmp_path, min_garbage=1000)
    put(log, 1, "other")
    for _ in range(200):
        put(log, 0, "a", b'"' + b"x" * 100 + b'"')
    put(log, 0, "b")
    log.close()
    assert (tmp_path / NAME).stat().st_size < 4000
    assert [name for _, name, *_ in contents(tmp_path)] == ["other", "a", "b"]


def test_responses_of_unknown_keys_stay(tmp_path: Path) -> None:
    log = opened(tmp_path)
    put(log, 0, "a")
    put(log, 1, "b")
    log.close()
    log = ResponseLog(tmp_path, {0: ADA}, min_garbage=1000)
    assert [kept.id for _, kept in log.open()] == ["a"]
    for _ in range(100):
        put(log, 0, "a")
    log.close()
    assert [(tenant, name) for tenant, name, *_ in contents(tmp_path, {3: BOB})] == [(3, "b")]


class Disk:
    """Fails when it is told to, on the calls that it is told of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing: dict[str, int] = {}  # errno by call
        self.calls: list[str] = []
        for name in ("write", "fdatasync", "fsync"):
            monkeypatch.setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(descriptor: int, *arguments: Any) -> Any:
            self.calls.append(name)
            if code := self.failing.get(name):
                if name == "write":
                    call(descriptor, arguments[0][: len(arguments[0]) // 2])
                raise OSError(code, os.strerror(code))
            return call(descriptor, *arguments)

        return wrapped


def remembering(*responses: tuple[int, str]) -> list[tuple[int, str, str | None, list[StoredItem], bytes]]:
    return [(tenant, name, None, list(ITEMS), b'{"id": 1}') for tenant, name in responses]


def test_a_full_disk_is_told_once_and_all_is_there_when_it_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = ResponseLog(tmp_path, {0: ADA, 1: BOB})
    held = [(0, "a")]
    list(log.open(lambda: remembering(*held)))
    put(log, 0, "a")
    whole = (tmp_path / NAME).read_bytes()
    disk = Disk(monkeypatch)
    disk.failing["write"] = errno.ENOSPC
    for name in ("b", "c"):
        held.append((0, name))
        put(log, 0, name)
        assert not log.heal()
    assert log.fault is not None
    assert log.fault.code == "storage_full"
    assert caplog.text.count("cannot be written") == 1
    assert (tmp_path / NAME).read_bytes() == whole
    disk.failing.clear()
    assert log.heal()
    assert log.fault is None
    put(log, 0, "d")
    log.close()
    assert [name for _, name, *_ in contents(tmp_path)] == ["a", "b", "c", "d"]


def test_after_a_failed_fsync_the_file_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = ResponseLog(tmp_path, {0: ADA, 1: BOB})
    list(log.open(lambda: remembering((0, "a"))))
    put(log, 0, "a")
    inode = (tmp_path / NAME).stat().st_ino
    disk = Disk(monkeypatch)
    disk.failing["fdatasync"] = errno.EIO
    log.sync()
    assert log.fault is not None
    assert log.fault.code == "storage_failed"
    disk.failing.clear()
    assert log.heal()
    assert (tmp_path / NAME).stat().st_ino != inode
    # The file, and then the folder, which has its name.
    assert disk.calls[-2:] == ["fdatasync", "fsync"]
    log.close()
    assert [name for _, name, *_ in contents(tmp_path)] == ["a"]


def test_a_folder_that_is_deleted_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "sessions"
    folder.mkdir()
    held = [(0, "a")]
    log = ResponseLog(folder, {0: ADA, 1: BOB})
    list(log.open(lambda: remembering(*held)))
    put(log, 0, "a")
    shutil.rmtree(folder)
    held.append((0, "b"))
    put(log, 0, "b")
    assert log.fault is None
    assert "was deleted" in caplog.text
    assert [name for _, name, *_ in contents(folder)] == ["a", "b"]
    (folder / NAME).unlink()
    (folder / NAME).write_bytes(b"another's")
    put(log, 0, "c")
    assert log.fault is not None
    assert not log.heal()
    assert (folder / NAME).read_bytes() == b"another's"
    log.close()
