"""The cache on this machine, in huggingface_hub's layout: lists and removes models.

`models--owner--name/` has `blobs/` named by checksum, `snapshots/COMMIT/` with links to them, and `refs/main`, which
names a commit.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lmserve.hub.repository import Quantization, RemoteFile, quantizations


@dataclass(frozen=True, slots=True)
class CachedRepository:
    """What of a repository is here: the commit that `main` was when it was last asked for, and its files."""

    name: str
    folder: Path
    snapshot: Path

    def files(self) -> list[RemoteFile]:
        """The files that are here, whole."""
        found = []
        for path in sorted(self.snapshot.rglob("*")):
            # A link to what is no longer there is no file.
            if path.is_file():
                blob = path.resolve()
                inside = path.relative_to(self.snapshot).as_posix()
                found.append(RemoteFile(inside, blob.stat().st_size, blob.name))
        return found

    def quantizations(self) -> list[Quantization]:
        """The models in GGUF files that are here with all their parts, the smallest first."""
        return [q for q in quantizations(self.files()) if len(q.files) == _parts(q.files[0].path)]

    def is_folder_model(self) -> bool:
        """Whether it is a model in safetensors files that are all here."""
        if not (self.snapshot / "config.json").is_file():
            return False
        try:
            index = json.loads((self.snapshot / "model.safetensors.index.json").read_bytes())
            parts = [self.snapshot / str(part) for part in index["weight_map"].values()]
        except FileNotFoundError:
            parts = list(self.snapshot.glob("*.safetensors"))
        except (ValueError, LookupError, TypeError, AttributeError):
            return False
        return bool(parts) and all(part.is_file() for part in parts)


def cache_folder() -> Path:
    """Where huggingface_hub keeps what comes from the hub: HF_HUB_CACHE, or hub/ in HF_HOME."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def repository_folder(name: str) -> Path:
    return cache_folder() / f"models--{name.replace('/', '--')}"


def cached(name: str) -> CachedRepository | None:
    """What of a repository is here; None: nothing."""
    return _opened(repository_folder(name), name)


def all_cached() -> Iterator[CachedRepository]:
    """Every repository of a model that is here, by name."""
    for folder in sorted(cache_folder().glob("models--*--*")):
        name = folder.name.removeprefix("models--").replace("--", "/", 1)
        if (found := _opened(folder, name)) is not None:
            yield found


def _opened(folder: Path, name: str) -> CachedRepository | None:
    try:
        commit = (folder / "refs" / "main").read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    snapshot = folder / "snapshots" / commit
    return CachedRepository(name, folder, snapshot) if commit and snapshot.is_dir() else None


def blob_path(name: str, digest: str) -> Path:
    """Where the bytes of a file are, or will be."""
    return repository_folder(name) / "blobs" / digest


def place(name: str, commit: str, file: RemoteFile) -> Path:
    """Let the snapshot of `commit` have a file whose bytes are here. Returns its path."""
    blob, path = blob_path(name, file.digest), repository_folder(name) / "snapshots" / commit / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with contextlib.suppress(FileExistsError):
            # Another process was first.
            path.unlink(missing_ok=True)
            path.symlink_to(os.path.relpath(blob, path.parent))
    return path


def set_main(name: str, commit: str) -> None:
    """`commit` is what `main` is now."""
    refs = repository_folder(name) / "refs"
    refs.mkdir(parents=True, exist_ok=True)
    # Of its own: another process may write at the same time.
    descriptor, partial = tempfile.mkstemp(prefix="main.", dir=refs)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(commit)
    Path(partial).chmod(0o644)
    Path(partial).rename(refs / "main")


def remove(repository: CachedRepository, quantization: Quantization | None = None) -> int:
    """Take a repository, or one of its quantizations, out of the cache. Returns the bytes that are free by that."""
    before = _blob_bytes(repository.folder)
    if quantization is None:
        shutil.rmtree(repository.folder)
        return before
    gone = {file.digest for file in quantization.files}
    for link in (repository.folder / "snapshots").rglob("*.gguf"):
        if link.resolve().name in gone:
            link.unlink()
    for digest in gone:
        for blob in (repository.folder / "blobs").glob(f"{digest}*"):
            blob.unlink()
    if not repository.quantizations() and not repository.is_folder_model():
        shutil.rmtree(repository.folder)
        return before
    return before - _blob_bytes(repository.folder)


def _blob_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "blobs").glob("*") if path.is_file())


def _parts(path: str) -> int:
    """How many files a model has, of which `path` is the first."""
    stem = path.removesuffix(".gguf")
    count = stem.rpartition("-of-")[2] if "-of-" in stem else ""
    return int(count) if count.isdecimal() else 1
