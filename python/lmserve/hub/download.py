"""Downloads a file: continues an interrupted download, verifies it, and names the file only when it is whole."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from lmserve.hub.errors import HubError

if TYPE_CHECKING:
    import httpx

Progress = Callable[[int], None]  # bytes of the file that are there

CHUNK: Final = 1 << 20
# Seconds to connect, to read, to write, and to wait for a free connection.
TIMEOUT: Final = (10.0, 60.0, 60.0, 60.0)
# Tries in a row that bring nothing; a try that brings bytes begins the count anew.
FRUITLESS_TRIES: Final = 5
PAUSE_SECONDS: Final = 0.5
AGAIN: Final = frozenset({408, 429, 500, 502, 503, 504})


def download(
    url: str,
    target: Path,
    *,
    size: int | None = None,
    digest: str | None = None,
    headers: Mapping[str, str] | None = None,
    progress: Progress = lambda _: None,
) -> None:
    """Put what is at `url` at `target`, where nothing is yet. Raises HubError; what came so far is kept then.

    `size`: of the file in bytes. `digest`: its SHA-256, or git's SHA-1 of it, in hexadecimal. Two processes that ask at
    once download once.
    """
    partial = target.with_name(f"{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f"{target.name}.lock")):
            if not target.exists():
                _check_room(target, partial, size)
                _fill(url, partial, size, headers or {}, progress)
                _verify(partial, url, size, digest)
                partial.rename(target)
                _tag(partial).unlink(missing_ok=True)
        # Whoever waits for the lock finds the file.
        target.with_name(f"{target.name}.lock").unlink(missing_ok=True)
    except OSError as error:
        raise HubError(f"{target.name} cannot be kept in {target.parent}: {error.strerror or error}") from error


def _check_room(target: Path, partial: Path, size: int | None) -> None:
    """A full disk also harms other programs, so the error is raised before the first byte."""
    free = shutil.disk_usage(target.parent).free
    missing = 0 if size is None else size - (partial.stat().st_size if partial.exists() else 0)
    if missing > free:
        raise HubError(
            f"{target.parent} has {free} bytes free, but {missing} more are needed; "
            "LMSERVE_CACHE and HF_HOME choose another folder"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fill(url: str, partial: Path, size: int | None, headers: Mapping[str, str], progress: Progress) -> None:
    # Imported late: it takes a fifth of a server's start, and who has the model downloads nothing.
    import httpx

    fruitless = 0
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        if size is not None and before == size:
            return
        try:
            _continue(url, partial, before, headers, progress)
        except (httpx.TransportError, _TryAgainError) as error:
            here = partial.stat().st_size if partial.exists() else 0
            fruitless = 0 if here > before else fruitless + 1
            if fruitless >= FRUITLESS_TRIES:
                reason = str(error) or type(error).__name__
                if here == 0:
                    raise HubError(f"{url} cannot be reached: {reason}") from error
                raise HubError(
                    f"the download of {url} stopped after {here} bytes: {reason}. The next attempt continues from there"
                ) from error
            time.sleep(PAUSE_SECONDS * fruitless)
            continue
        return


class _TryAgainError(Exception):
    """The server may answer a later request."""


def _continue(url: str, partial: Path, have: int, headers: Mapping[str, str], progress: Progress) -> None:
    """One request for what is missing, up to the end of what it brings."""
    import httpx

    tag = _tag(partial)
    asked = {**headers, "Accept-Encoding": "identity"}
    if have:
        asked["Range"] = f"bytes={have}-"
        if tag.exists():
            # Another file by now: then the whole of it comes.
            asked["If-Range"] = tag.read_text("utf-8")
    with httpx.stream("GET", url, headers=asked, timeout=TIMEOUT, follow_redirects=True) as reply:
        if reply.status_code == 416 and have:
            partial.unlink()
            raise _TryAgainError("the server does not have the requested range")
        if reply.status_code in AGAIN:
            raise _TryAgainError(f"HTTP {reply.status_code}")
        if reply.status_code not in (200, 206):
            raise HubError(f"{url} answered HTTP {reply.status_code}")
        if (entity := reply.headers.get("ETag", "")).startswith('"'):
            tag.write_text(entity, "utf-8")
        resumed = reply.status_code == 206 and have > 0
        with partial.open("ab" if resumed else "wb") as file:
            _write(reply, file, have if resumed else 0, progress)


def _write(reply: httpx.Response, file: IO[bytes], written: int, progress: Progress) -> None:
    progress(written)
    try:
        # Not in pieces of a size: of the last one before a connection breaks nothing would be kept.
        for chunk in reply.iter_bytes():
            file.write(chunk)
            written += len(chunk)
            progress(written)
    finally:
        file.flush()
    os.fsync(file.fileno())


def _tag(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.etag")


def _verify(partial: Path, url: str, size: int | None, digest: str | None) -> None:
    came = partial.stat().st_size
    if size is not None and came != size:
        partial.unlink()
        raise HubError(f"{url} is damaged: {size} bytes expected, but {came} came")
    if digest is None:
        return
    found = digest_of(partial, digest)
    if found != digest:
        partial.unlink()
        raise HubError(f"{url} is damaged: checksum {digest} expected, but {found} came")


def digest_of(path: Path, like: str) -> str:
    """The checksum of a file, of the kind of `like`: SHA-256, or git's SHA-1 of a blob."""
    with path.open("rb") as file:
        if len(like) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        blob = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
        while chunk := file.read(CHUNK):
            blob.update(chunk)
        return blob.hexdigest()


def beginning(url: str, count: int, headers: Mapping[str, str]) -> bytes:
    """The first `count` bytes of what is at `url`, or all of it. Raises HubError."""
    import httpx

    asked = {**headers, "Accept-Encoding": "identity", "Range": f"bytes=0-{count - 1}"}
    came = bytearray()
    try:
        with httpx.stream("GET", url, headers=asked, timeout=TIMEOUT, follow_redirects=True) as reply:
            if reply.status_code not in (200, 206):
                raise HubError(f"{url} answered HTTP {reply.status_code}")
            for chunk in reply.iter_bytes():
                came += chunk
                # A server that knows no ranges sends all of it.
                if len(came) >= count:
                    break
    except httpx.HTTPError as error:
        raise HubError(f"{url} cannot be read: {str(error) or type(error).__name__}") from error
    return bytes(came[:count])
