"""The log of stored responses, whatever happens to its file."""

from __future__ import annotations

from pathlib import Path

import pytest
from lmserve.api.responses.log import MAGIC, NAME, ResponseLog
from lmserve.errors import LmserveError
from lmserve.schemas.responses import StoredMessage, StoredPart

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
    damaged = bytearray(whole)
    damaged[first + 20] ^= 1
    file.write_bytes(damaged)
    assert [name for _, name, *_ in contents(tmp_path)] == ["a"]


def test_what_is_no_log_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"lmresp9\nsomething")
    with pytest.raises(LmserveError, match="no log of responses"):
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


def test_a_record_that_cannot_be_written_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = opened(tmp_path)
    put(log, 0, "a")
    whole = (tmp_path / NAME).read_bytes()

    def half_written(file: object, data: bytes) -> None:
        with (tmp_path / NAME).open("ab") as log_file:
            log_file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("lmserve.api.responses.log._write_all", half_written)
        put(log, 0, "b")
    assert "could not be written down" in caplog.text
    assert (tmp_path / NAME).read_bytes() == whole
    put(log, 0, "c")
    log.close()
    assert [name for _, name, *_ in contents(tmp_path)] == ["a", "c"]
