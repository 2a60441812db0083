"""Reads whole files of a checkpoint, if they are regular files within a size limit."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, Final

from lmserve.model.errors import CheckpointError

# Each several times what the largest one that is known has.
MAX_CONFIG: Final = 16_000_000  # config.json, and the small files beside it
MAX_INDEX: Final = 64_000_000
MAX_TOKENIZER: Final = 100_000_000
MAX_TEMPLATE: Final = 1_000_000

KINDS: Final = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: Path) -> bool:
    """Whether there is a file. Raises CheckpointError for anything else in its place, and where it cannot be seen."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is {KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file")
    return True


def read_file(path: Path, most: int) -> bytes | None:
    """The bytes of a file, at most `most`; None where there is none. Raises CheckpointError."""
    if not check_regular(path):
        return None
    try:
        # What is there now may be a FIFO, whose other end is not waited for.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(most + 1) if size <= most else b""
    except OSError as error:
        raise _unreadable(path, error) from error
    if (size := max(size, len(data))) > most:
        raise CheckpointError(f"{path} must have at most {most} bytes, but has {size}")
    return data


def read_json(path: Path, most: int = MAX_CONFIG) -> Any:
    """The JSON value of a file, or None where there is none. Raises CheckpointError."""
    data = read_file(path, most)
    return None if data is None else parse_json(str(path), data)


def parse_json(what: str, data: bytes) -> Any:
    """A JSON value whose texts are all Unicode. `what`: for messages. Raises CheckpointError."""
    try:
        value = json.loads(data)
        if b"\\ud" in data.lower():
            # Half of a surrogate pair is a text to Python, and to nobody else.
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise CheckpointError(f"{what} is nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{what} is not JSON: {error}") from error
    return value


def read_object(path: Path, most: int = MAX_CONFIG) -> dict[str, Any]:
    """The JSON object of a file, empty where there is none. Raises CheckpointError for anything else."""
    value = read_json(path, most)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def read_template(path: Path) -> str | None:
    """A chat template, or None where there is none. Raises CheckpointError."""
    data = read_file(path, MAX_TEMPLATE)
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} must be UTF-8, but byte {error.start} is not") from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = error.strerror if isinstance(error, OSError) else error
    return CheckpointError(f"{path} cannot be read: {reason}")
