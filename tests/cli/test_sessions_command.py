"""`lmserve sessions`: logs of both versions of the format, whole and damaged."""

from __future__ import annotations

import struct
from pathlib import Path
from zlib import crc32

import pytest
from lmserve import _core
from lmserve.cli import main
from lmserve.engine.sessions import SessionLog


def first_version(sessions: int) -> bytearray:
    """A log of the first version with sessions of one turn."""

    def framed(payload: bytes) -> bytes:
        return struct.pack("<II", len(payload), crc32(payload)) + payload

    log = bytearray(b"lmsess1\n") + framed(b"H" + bytes(32) + b"toy") + framed(b"T" + bytes(32))
    for number in range(sessions):
        put = struct.pack("<IqQQQIIIIIIB", 0, number, 5, 1, 1, 0, 0, 0, 1, 2, 10, 0)
        log += framed(b"P" + put + struct.pack("<12I", *range(12)))
    return log


def test_one_bit_of_two_hundred_sessions_costs_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = first_version(200)
    log[2000] ^= 1
    (tmp_path / "sessions.log").write_bytes(log)
    assert main(["sessions", "check", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "199 sessions of 199 turns" in said
    assert "is lost" in said
    assert (tmp_path / "sessions.log").read_bytes() == log
    assert main(["sessions", "repair", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    (kept,) = tmp_path.glob("sessions.log.damaged-*")
    assert kept.name in said
    assert kept.read_bytes() in bytes(log)
    assert main(["sessions", "check", str(tmp_path)]) == 0
    assert "199 sessions of 199 turns and 2388 tokens" in capsys.readouterr().out


def test_what_cannot_be_looked_at_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sessions", "check", str(tmp_path)]) == 1
    assert f"there is no sessions.log in {tmp_path}" in capsys.readouterr().err
    settings = SessionLog(folder=str(tmp_path), fingerprint=bytes(32), model="toy", tenants={0: bytes(32)})
    log = _core.OpenSessionLog(settings)
    assert main(["sessions", "repair", str(tmp_path)]) == 1
    assert "is in use by another running server" in capsys.readouterr().err
    del log
    assert main(["sessions", "check", str(tmp_path)]) == 0
    assert "nothing is lost" in capsys.readouterr().out
    (tmp_path / "sessions.log").write_bytes(b"something else" * 100)
    assert main(["sessions", "repair", str(tmp_path)]) == 1
    assert "does not begin like a session log" in capsys.readouterr().err
    assert (tmp_path / "sessions.log").read_bytes() == b"something else" * 100
