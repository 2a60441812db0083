"""Keys on the command line: out of what `ps` shows."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

# The kernel's own list: proc_pid_stat(5), field 48.
ARG_START: Final = 48


def hide(secrets: Iterable[str]) -> None:
    """Overwrite each secret in this process's command line, as everybody on the machine can read it.

    It is said where that cannot be done: anywhere but on Linux.
    """
    secrets = [secret for secret in secrets if secret]
    if secrets and not _hidden(secrets):
        advice = "give it in LMSERVE_API_KEY or with --api-key-file instead"
        print(f"lmserve: warning: the list of processes shows the API key: {advice}", file=sys.stderr)


def _hidden(secrets: Iterable[str]) -> bool:
    try:
        line = Path("/proc/self/cmdline").read_bytes()
        start = int(Path("/proc/self/stat").read_text("utf-8").rpartition(")")[2].split()[ARG_START - 3])
    except (OSError, ValueError, IndexError):
        return False
    if start == 0 or ctypes.string_at(start, len(line)) != line:
        return False
    for secret in secrets:
        word = secret.encode()
        at = line.find(word)
        while at >= 0:
            ctypes.memset(start + at, ord("*"), len(word))
            at = line.find(word, at + len(word))
    left = Path("/proc/self/cmdline").read_bytes()
    return not any(secret.encode() in left for secret in secrets)
