"""docs/troubleshooting.md: every code that a reply can have is there, with its status; the lines are the server's."""

from __future__ import annotations

import ast
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from lmserve.cli import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
STATUS = {
    "Invalid": "400",
    "NotFound": "404",
    "Conflict": "409",
    "Busy": "429",
    "Unavailable": "503",
    "StorageFull": "507",
    "Internal": "500",
}
# Codes that are chosen before the error is made, or that have a name.
CHOSEN = {
    "session_expired": "404",
    "session_lost": "404",
    "storage_full": "507",
    "storage_failed": "503",
    "response_not_found": "404",
    "previous_response_not_found": "404",
    "worker_unavailable": "503",
    "invalid_adapter": "400",
}
# Codes whose status is another one in each place, and those that end a stream or a start.
ANYWHERE = {"invalid_request", "not_lmserve", "reader_too_slow"}
AT_START = re.compile(r"session_(dir|log)_\w+|kv_disk_\w+|invalid_(session_log|checkpoint)")


def rust_codes() -> Iterator[tuple[str, str]]:
    for file in (ROOT / "src").rglob("*.rs"):
        code = file.read_text("utf-8").partition("#[cfg(test)]\nmod tests")[0]
        for kind, name in re.findall(r"Kind::(\w+),\s*\"([a-z_]+)\"", code):
            if kind in STATUS:
                yield name, STATUS[kind]


def python_codes() -> Iterator[tuple[str, str]]:
    for file in (ROOT / "python" / "lmserve").rglob("*.py"):
        if file.name == "examples.py":
            continue
        for call in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(call, ast.Call) or not ast.unparse(call.func).startswith("LmserveError."):
                continue
            made = ast.unparse(call.func).rpartition(".")[2]
            place = {"new": 1, "invalid": 2}[made]
            code = call.args[place] if len(call.args) > place else None
            if isinstance(code, ast.Constant):
                yield code.value, ast.unparse(call.args[0]) if made == "new" else "400"


CODES = sorted({*rust_codes(), *python_codes(), *CHOSEN.items(), ("invalid_value", "400")})
ROWS = re.findall(r"^\| (\d{3}) \| (.*?) \|", PAGE, re.MULTILINE)


def test_the_codes_are_found() -> None:
    names = {code for code, _ in CODES}
    assert names >= {"context_length_exceeded", "session_busy", "queue_full", "loading", "invalid_api_key"}
    source = "".join(file.read_text("utf-8") for file in [*(ROOT / "src").rglob("*.rs")])
    source += "".join(file.read_text("utf-8") for file in (ROOT / "python" / "lmserve").rglob("*.py"))
    assert all(f'"{code}"' in source for code in CHOSEN)


@pytest.mark.parametrize(("code", "status"), CODES, ids=[f"{code}-{status}" for code, status in CODES])
def test_a_code_is_explained(code: str, status: str) -> None:
    if code in ANYWHERE or AT_START.fullmatch(code):
        assert f"`{code}`" in PAGE
    else:
        assert any(status == number and f"`{code}`" in codes for number, codes in ROWS), f"{status} {code}"


def test_no_code_is_invented() -> None:
    known = {code for code, _ in CODES}
    for _, codes in ROWS:
        assert set(re.findall(r"`([a-z_]+)`", codes)) <= known


def lines() -> list[str]:
    """What the first table says of messages: the parts between `...` of each."""
    table = PAGE[PAGE.index("| The line says") : PAGE.index("In Python, a model")]
    cells = re.findall(r"^\| (.*?) \|", table, re.MULTILINE)[1:]
    return [line for cell in cells for line in re.findall(r"`([^`]+)`", cell)]


def explained(message: str) -> bool:
    return any(all(part in message for part in line.split("...")) for line in lines())


def test_the_lines_of_a_start_that_fails(
    tmp_path: Path, smollm2_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.gguf").write_bytes(b"version https://git-lfs")
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "keys").write_text("# none\n")
    (tmp_path / "cert.pem").write_text("x")
    (tmp_path / "lmserve.toml").write_text("prot = 1\n")
    cert = str(tmp_path / "cert.pem")
    commands = [
        ["nothing-here"],
        [str(tmp_path / "x.gguf")],
        [str(tmp_path / "x.txt")],
        ["--api-key-file", str(tmp_path / "keys")],
        ["--tls-cert", cert, "--tls-key", cert],
        ["--config", str(tmp_path / "lmserve.toml")],
        ["-ngl", "99"],
        [str(smollm2_gguf), "--kv-memory", "1000000GiB"],
        [str(smollm2_gguf), "--port", "0", "--session-dir", str(tmp_path / "x.txt")],
    ]
    for command in commands:
        assert main(["serve", *command]) in (1, 2)
        message = capsys.readouterr().err
        assert message.startswith("lmserve: error: ")
        assert explained(message), message
    assert not explained("lmserve: error: something else")


def test_a_port_that_is_in_use(smollm2_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(smollm2_gguf), "--port", str(port)]) == 1
    assert explained(capsys.readouterr().err.replace(str(port), "23333"))
