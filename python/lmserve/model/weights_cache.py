"""A file of packed weights: written when a model is loaded first, mapped by every later start of any process.

Packing changes the layout of every matrix, whatever the file's format, so a model's own file cannot be mapped in its
place. A packed file is another's, and a miss, unless it was made of the same files for the same version; see `key_of`.
"""

from __future__ import annotations

import fcntl
import glob
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import IO, Final

from lmserve._core import VERSION, CpuModel, packed_made_of
from lmserve.model.checkpoint import Checkpoint
from lmserve.model.device import available_memory
from lmserve.model.errors import OptionError
from lmserve.model.gguf_source import SHARD

logger = logging.getLogger("lmserve.model")

# Weights of fewer bytes are packed in less time than a file of them takes to be checked.
LEAST_BYTES: Final = 32 << 20
# Of each file of the model, what is compared byte for byte.
HEAD_BYTES: Final = 1 << 20
# What must be left of a disk: so many bytes, or this share of a smaller one.
SPARE_BYTES: Final = 8 << 30
SPARE_SHARE: Final = 0.05
PROGRESS_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class WeightsCache:
    """Where a model's packed weights are, or will be, and what they are made of."""

    path: Path
    key: str
    is_there: bool  # whole, by its table, and of this key
    mode: int  # who may read it: whoever may read the model
    maps: bool = False  # where it is written first: weights are mapped from it at once

    @contextmanager
    def used_by(self, core: CpuModel, weight_bytes: int) -> Iterator[Progress]:
        """Within this, `core` loads its weights from the file, or writes there what it packs.

        If the file cannot be used, this logs why, and packs the weights. weight_bytes: how many there will be.
        Raises OptionError where memory does not hold them and the file cannot be written.
        """
        if self._is_read_by(core):
            yield Progress(core, self.path, 0)
            core.end_packed(self.key)
            return
        with _part_of(self.path, weight_bytes) as part:
            if part is not None:
                core.write_packed(Path(part.name), self.maps)
            elif weight_bytes > (free := available_memory()):
                needs = f"weights of {weight_bytes >> 20} MiB fit only if they can be mapped from {self.path}"
                raise OptionError("weights_cache", f"{needs}: this process may still take {free >> 20} MiB")
            yield Progress(core, self.path, 0 if part is None else weight_bytes)
            if part is not None:
                _publish(core, self, part)

    def _is_read_by(self, core: CpuModel) -> bool:
        try:
            size = self.path.stat().st_size
        except OSError:
            return False
        # What memory cannot hold would be read from the disk twice.
        reason = core.read_packed(self.path, self.key, size <= available_memory())
        if reason is not None:
            logger.warning("the packed weights %s are not used: %s; they are packed anew", self.path, reason)
        return reason is None


class Progress:
    """Tells how far packing is."""

    def __init__(self, core: CpuModel, path: Path, total: int) -> None:
        """`total`: bytes that will be written; 0: none."""
        self._core = core
        self._path = path
        self._total = total
        self._told = time.monotonic()

    def kept(self) -> None:
        """A weight was written."""
        if self._total and time.monotonic() - self._told > PROGRESS_SECONDS:
            self._told = time.monotonic()
            done, total = (f"{size / (1 << 30):.1f}" for size in (self._core.packed_bytes, self._total))
            logger.info("packed %s of %s GiB of weights into %s", done, total, self._path)


def find_cache(
    checkpoint: Checkpoint, path: str | None, quantize: str | None, weight_bytes: int
) -> WeightsCache | None:
    """The cache at `path` of a checkpoint's weights; None: there is none, and none should or can be written."""
    if path is None or weight_bytes < LEAST_BYTES:
        return None
    try:
        key = key_of(checkpoint, quantize)
        mode = _files_of(checkpoint)[0].stat().st_mode & 0o444
        file = Path(path)
        is_there = packed_made_of(file) == key
        if not is_there and not _has_room(file, weight_bytes):
            return None
    except OSError as error:
        logger.warning("packed weights are not kept in %s: %s", path, error.strerror or error)
        return None
    # Where memory holds the packed weights only once, each is mapped from the file once it is packed.
    return WeightsCache(file, key, is_there, mode, maps=weight_bytes > available_memory() // 2)


def key_of(checkpoint: Checkpoint, quantize: str | None) -> str:
    """What packed weights are made of: this version, the rounding, and each file's size, time and first megabyte.

    A change beyond that which keeps size and time is not noticed. Raises OSError.
    """
    files = []
    for file in _files_of(checkpoint):
        status = file.stat()
        with file.open("rb") as opened:
            head = sha256(opened.read(HEAD_BYTES)).hexdigest()
        files.append([file.name, status.st_size, status.st_mtime_ns, head])
    return json.dumps({"version": VERSION, "quantize": quantize, "files": files})


def _files_of(checkpoint: Checkpoint) -> list[Path]:
    path = checkpoint.path
    if path.is_file():
        match = SHARD.fullmatch(path.name)
        return [path] if match is None else sorted(path.parent.glob(f"{glob.escape(match[1])}-*-of-{match[3]}.gguf"))
    return sorted(file for file in path.iterdir() if file.suffix in (".json", ".safetensors"))


def _has_room(path: Path, weight_bytes: int) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    disk = shutil.disk_usage(path.parent)
    spare = min(SPARE_BYTES, int(disk.total * SPARE_SHARE))
    if disk.free - weight_bytes < spare:
        needed, free = (f"{size / (1 << 30):.1f} GiB" for size in (weight_bytes + spare, disk.free))
        logger.info("packed weights are not kept: that needs %s free in %s, which has %s", needed, path.parent, free)
        return False
    return True


@contextmanager
def _part_of(path: Path, weight_bytes: int) -> Iterator[IO[bytes] | None]:
    """An empty file beside `path` to become it; None: another process is writing it, or it cannot be written.

    It is locked: what a process that was killed left is taken by the next one, and so there is never more than one.
    """
    part = None
    try:
        if _has_room(path, weight_bytes):
            part = _locked(path.with_name(f"{path.name}.part"))
    except OSError as error:
        logger.warning("packed weights are not kept in %s: %s", path, error.strerror or error)
    try:
        yield part
    except BaseException:
        if part is not None:
            Path(part.name).unlink(missing_ok=True)
            part.close()
        raise


def _locked(path: Path) -> IO[bytes] | None:
    file = open(path, "ab", opener=partial(os.open, mode=0o600))  # noqa: SIM115 - the caller's
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between opening and locking, its last owner may have given it its final name.
        if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            os.truncate(file.fileno(), 0)
            return file
    except BlockingIOError:
        logger.info("another process writes %s", path)
    except OSError:
        file.close()
        raise
    file.close()
    return None


def _publish(core: CpuModel, cache: WeightsCache, part: IO[bytes]) -> None:
    """Complete the file here, and give it its name once it is on the disk, which another thread waits for."""
    try:
        size = core.end_packed(cache.key)
    except OSError as error:
        _give_up(cache, part, error)
        return

    def name() -> None:
        try:
            # Nobody writes it any more: it may be mapped by others as soon as it has its name.
            os.fchmod(part.fileno(), cache.mode)
            os.fsync(part.fileno())
            Path(part.name).replace(cache.path)
        except OSError as error:
            _give_up(cache, part, error)
            return
        part.close()
        logger.info("packed weights: %.1f MiB in %s, for later starts", (size or 0) / (1 << 20), cache.path)

    threading.Thread(target=name, name="keep-weights", daemon=True).start()


def _give_up(cache: WeightsCache, part: IO[bytes], error: OSError) -> None:
    logger.warning("packed weights could not be kept in %s: %s", cache.path, error.strerror or error)
    with part, suppress(OSError):
        Path(part.name).unlink(missing_ok=True)
