"""Reads the header of a GGUF file on the hub: enough to plan its memory before gigabytes of weights are downloaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from lmserve._core import GgufFile
from lmserve.errors import LmserveError
from lmserve.hub.download import beginning
from lmserve.hub.errors import HubError

# The vocabulary is most of a header; few have more than the first.
SIZES: Final = (8 << 20, 32 << 20, 128 << 20)


@contextmanager
def header_only(url: str, name: str, size: int, headers: Mapping[str, str]) -> Iterator[Path]:
    """A file that has the header of the GGUF file at `url`, and its `size`, but takes no more room than the header.

    Raises HubError if it cannot be had, LmserveError if it is no GGUF file.
    """
    with TemporaryDirectory(prefix="lmserve-header-") as folder:
        path = Path(folder, name)
        for count in SIZES:
            part = beginning(url, min(count, size), headers)
            path.write_bytes(part)
            with path.open("r+b") as file:
                file.truncate(size)
            try:
                # Behind what came there are zeros, which may look like a header, too.
                whole = GgufFile(path).data_offset <= len(part)
            except LmserveError:
                if len(part) == size or count == SIZES[-1]:
                    raise
                whole = False
            if whole:
                yield path
                return
        raise HubError(f"the header of {url} has more than {SIZES[-1]} bytes")
