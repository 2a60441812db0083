"""Lists and removes the models in the cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lmserve.assets import ASSETS, cache_dir
from lmserve.hub import cache
from lmserve.hub.names import HubName, UrlName, read_name, read_short_name
from lmserve.model import gguf_source
from lmserve.source import cached_weights, url_folder


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model in one of the caches. `names`: what it is called, the full name first. `size` in bytes."""

    names: tuple[str, ...]
    path: Path
    size: int
    changed: float  # when it came, in seconds since 1970
    remove: Callable[[], int]  # returns the bytes that it took


def stored_models() -> list[StoredModel]:
    """Every model in the caches: bundled ones, those of the hub, those of URLs."""
    return [*_bundled(), *_of_hub(), *_of_urls()]


def find_stored(name: str) -> list[StoredModel]:
    """The stored models that `name` means: all quantizations of a repository where it names none."""
    from huggingface_hub import constants

    called = read_short_name(name) or read_name(name, constants.ENDPOINT)
    if isinstance(called, HubName):
        full = called.repository if called.choice is None else f"{called.repository}:{called.choice}"
        return [
            model
            for model in stored_models()
            if model.names[0].lower() == full.lower() or model.names[-1].lower() == full.lower()
        ]
    if isinstance(called, UrlName):
        name = gguf_source.name_of(Path(called.file))
    return [model for model in stored_models() if (called if isinstance(called, str) else name) in model.names]


def _bundled() -> Iterator[StoredModel]:
    for asset in ASSETS.values():
        home = cache_dir() / f"{asset.name}-{asset.version}"
        if home.is_dir():
            yield StoredModel((asset.name,), home / asset.entry, _size(home), home.stat().st_mtime, _folder(home))


def _of_hub() -> Iterator[StoredModel]:
    for repository in cache.all_cached():
        for quantization in repository.quantizations():
            path = repository.snapshot / quantization.files[0].path
            names = (f"{repository.name}:{quantization.label}", repository.name)
            weights = cached_weights(path)
            remove = _with_weights(partial(cache.remove, repository, quantization), weights)
            size = quantization.size + _total(weights)
            yield StoredModel(names, path, size, path.lstat().st_mtime, remove)
        if repository.is_folder_model():
            weights = cached_weights(repository.snapshot)
            size = sum(file.size for file in repository.files() if not file.path.endswith(".gguf")) + _total(weights)
            changed = repository.snapshot.stat().st_mtime
            remove = _with_weights(partial(cache.remove, repository), weights)
            yield StoredModel((repository.name,), repository.snapshot, size, changed, remove)


def _of_urls() -> Iterator[StoredModel]:
    for path in sorted(url_folder().glob("*/*.gguf")):
        status = path.stat()
        yield StoredModel((gguf_source.name_of(path),), path, status.st_size, status.st_mtime, _folder(path.parent))


def _folder(folder: Path) -> Callable[[], int]:
    def remove() -> int:
        size = _size(folder)
        shutil.rmtree(folder)
        return size

    return remove


def _with_weights(remove: Callable[[], int], weights: list[Path]) -> Callable[[], int]:
    """`remove`, and the packed weights, which are of use to nobody without the model."""

    def both() -> int:
        size = _total(weights)
        for path in weights:
            path.unlink(missing_ok=True)
        return remove() + size

    return both


def _total(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())


def _size(folder: Path) -> int:
    return _total(list(folder.rglob("*")))
