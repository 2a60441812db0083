"""Resolves MODEL of the command line to a path on this machine and the names under which it is served."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from lmserve.assets import ASSETS, MINILM, SMOLLM2, AssetError, Progress, cache_dir, fetch
from lmserve.errors import LmserveError
from lmserve.hub import cache
from lmserve.hub.download import download
from lmserve.hub.errors import HubError
from lmserve.hub.header import header_only
from lmserve.hub.names import HubName, UrlName, near_names, read_name, read_short_name
from lmserve.hub.repository import Hub, Quantization, RemoteFile, Repository, choose, quantizations
from lmserve.model import RunnerOptions, gguf_source, open_checkpoint, plan_memory
from lmserve.model.device import available_memory
from lmserve.model.generation_defaults import NONE, GenerationDefaults

# The name in the examples of LMDeploy's API: its clients reach the default model without a change.
LMDEPLOY_NAME: Final = "internlm-chat-7b"
ALIASES: Final[Mapping[str, tuple[str, ...]]] = {SMOLLM2.name: (LMDEPLOY_NAME,), MINILM.name: ()}
# SmolLM2's model card, whose GGUF file says nothing of it; the length of a reply is that of LMDeploy's server.
PUBLISHED: Final[Mapping[str, GenerationDefaults]] = {
    SMOLLM2.name: GenerationDefaults("its model card", temperature=0.2, top_p=0.9, max_tokens=512)
}
FOLDER_FILES: Final = (".json", ".safetensors", ".jinja", "tokenizer.model", ".txt")
# What a folder model may have below its folder: how an embedding model pools.
POOLING: Final = "_Pooling"
# Context that a model must have room for here to be the best: shorter ones are little use in a conversation.
USEFUL_CONTEXT: Final = 4096
# Formats that take the memory of two or four, and are no better than 8 bits where they were made from the same weights.
WIDE: Final = frozenset({"F32", "FP32", "F16", "FP16", "BF16"})

Tell = Callable[[str], None]


class SourceError(Exception):
    """There is no model where the command line says."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A GGUF file or a Hugging Face folder, and the names it is served under, the reported one first."""

    path: Path
    names: tuple[str, ...]
    published: GenerationDefaults = NONE  # what the publisher of a bundled model samples with
    is_whole: bool = True  # False: the path has headers alone, and for a moment


def find_model(model: str | None, progress: Progress | None = None, tell: Tell = lambda _: None) -> ModelSource:
    """What `model` names, in this order: nothing (the default model), a path, a bundled model's name, a short name
    (qwen3:4b), a name of the hub (owner/name, owner/name:Q4_K_M), a URL. What is not here is fetched.

    `tell` gets a line where something was chosen. Raises SourceError if it is none of these or cannot be fetched,
    LmserveError where what the hub has cannot be served.
    """
    if model is None:
        return _bundled(SMOLLM2.name, progress)
    path = Path(model).expanduser()
    if path.exists():
        return ModelSource(path, (_name_of(path),))
    name = _elsewhere(model)
    try:
        if isinstance(name, str):
            return _bundled(name, progress)
        if isinstance(name, UrlName):
            return ModelSource(_from_url(name, progress), (gguf_source.name_of(Path(name.file)),))
        return _from_hub(name, progress, tell)
    except HubError as error:
        raise SourceError(str(error)) from error


def weights_file(path: Path, where: str, quantize: str) -> Path | None:
    """The file of packed weights of the model at `path`; `where`: "auto", "off" (None) or a folder."""
    if where == "off":
        return None
    kind = "" if quantize == "auto" else f".{quantize}"
    if where == "auto":
        path = path.absolute()
        beside = path / f"weights{kind}.lmserve" if path.is_dir() else path.with_name(f"{path.name}{kind}.lmserve")
        # A folder of links is the hub's, whose tools remove what they have put there and nothing else.
        linked = path.is_symlink() or (path / "config.json").is_symlink()
        if beside.exists() or (not linked and os.access(beside.parent, os.W_OK)):
            return beside
    folder = _weights_folder() if where == "auto" else Path(where).expanduser()
    return folder / f"{_name_of_weights(path)}{kind}.lmserve"


def cached_weights(path: Path) -> list[Path]:
    """The files of packed weights of the model at `path` that lie in the cache folder."""
    return sorted(_weights_folder().glob(f"{glob.escape(_name_of_weights(path))}*.lmserve"))


def _weights_folder() -> Path:
    return cache_dir() / "weights"


def _name_of_weights(path: Path) -> str:
    return f"{path.name}-{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]}"


@contextmanager
def headers_of_model(model: str | None, progress: Progress | None, tell: Tell) -> Iterator[ModelSource]:
    """As `find_model`, but of a GGUF file on the hub that is not here only the header comes, and it stays not."""
    name = None if model is None or Path(model).expanduser().exists() else _elsewhere(model)
    if not isinstance(name, HubName) or _cached(name) is not None:
        yield find_model(model, progress, tell)
        return
    try:
        hub = Hub.configured()
        repository = hub.read(name.repository)
        known = quantizations(repository.files)
        if not known or (name.choice is None and _is_folder(repository)):
            yield find_model(model, progress, tell)
            return
        chosen = _chosen(hub, repository, name, known, tell)
        file = chosen.files[0]
        if len(chosen.files) > 1:
            raise SourceError(
                f"{name.repository} has {chosen.label} in {len(chosen.files)} files: run lmserve pull first"
            )
        url = hub.file_url(repository, file.path)
        with header_only(url, PurePosixPath(file.path).name, file.size, hub.headers) as path:
            yield ModelSource(path, _names(name, chosen.label), is_whole=False)
    except HubError as error:
        raise SourceError(str(error)) from error


def _elsewhere(model: str) -> HubName | UrlName | str:
    """What a name that is no path here means; a string is the name of a bundled model. Raises SourceError."""
    if model in ASSETS:
        return model
    from huggingface_hub import constants

    try:
        name = read_short_name(model) or read_name(model, constants.ENDPOINT)
    except HubError as error:
        raise SourceError(str(error)) from error
    if name is None:
        near = near_names(model)
        advice = f"; did you mean {' or '.join(near)}?" if near else ""
        raise SourceError(
            f"{model!r} is not a file or folder here, not a hub id (owner/name), and not one of the models "
            f"{', '.join(ASSETS)} or a short name (lmserve list --known){advice}"
        )
    return name


def _bundled(name: str, progress: Progress | None) -> ModelSource:
    try:
        return ModelSource(fetch(ASSETS[name], progress), (name, *ALIASES[name]), PUBLISHED.get(name, NONE))
    except AssetError as error:
        raise SourceError(str(error)) from error


def _name_of(path: Path) -> str:
    path = path.resolve()
    if path.is_dir():
        return path.name
    if path.suffix != ".gguf":
        raise SourceError(f"{path} is neither a GGUF file (*.gguf) nor a folder with config.json")
    return gguf_source.name_of(path)


def url_folder() -> Path:
    """Where the files of URLs are kept, each in a folder of its own."""
    return cache_dir() / "urls"


def _from_url(name: UrlName, progress: Progress | None) -> Path:
    folder = url_folder() / hashlib.sha256(name.url.encode()).hexdigest()[:16]
    path = folder / name.file
    download(name.url, path, digest=name.sha256, progress=_part_of(progress, 0, 0))
    return path


def _names(name: HubName, label: str | None) -> tuple[str, ...]:
    """What a model of the hub is served as: as it was called, and by its repository."""
    quantized = None if label is None else f"{name.repository}:{label}"
    called = name.short or (quantized if name.choice else name.repository)
    known = (called, name.repository, quantized)
    return tuple(dict.fromkeys(known_name for known_name in known if known_name))


def _cached(name: HubName) -> ModelSource | None:
    """What is here of it; None: not what was asked for. Where no choice was made, one that was made before holds."""
    repository = cache.cached(name.repository)
    if repository is None:
        return None
    known = repository.quantizations()
    if name.choice is None and repository.is_folder_model():
        return ModelSource(repository.snapshot, _names(name, None))
    if name.choice is not None:
        known = [q for q in known if name.choice.upper() == q.label.upper() or name.choice == q.files[0].path]
    if not known:
        return None
    latest = max(known, key=lambda q: (repository.snapshot / q.files[0].path).lstat().st_mtime)
    return ModelSource(repository.snapshot / latest.files[0].path, _names(name, latest.label))


def _from_hub(name: HubName, progress: Progress | None, tell: Tell) -> ModelSource:
    """The model in huggingface_hub's own cache, downloaded first where it is not there."""
    if (here := _cached(name)) is not None:
        return here
    hub = Hub.configured()
    repository = hub.read(name.repository)
    known = quantizations(repository.files)
    if name.choice is None and (_is_folder(repository) or not known):
        files = [file for file in repository.files if _of_folder(file.path)]
        if not any(file.path.endswith(".safetensors") for file in files):
            raise HubError(f"{name.repository} has neither GGUF nor safetensors files")
        _fetch(hub, repository, files, progress)
        found = cache.cached(name.repository)
        assert found is not None
        return ModelSource(found.snapshot, _names(name, None))
    chosen = _chosen(hub, repository, name, known, tell)
    path = _fetch(hub, repository, chosen.files, progress)
    return ModelSource(path, _names(name, chosen.label))


def _is_folder(repository: Repository) -> bool:
    paths = {file.path for file in repository.files}
    return "config.json" in paths and any("/" not in path and path.endswith(".safetensors") for path in paths)


def _of_folder(path: str) -> bool:
    """Whether a file is part of a model in safetensors files."""
    folder, _, name = path.rpartition("/")
    wanted = name.endswith(FOLDER_FILES) and not name.startswith("consolidated")
    return wanted and (not folder or folder.endswith(POOLING))


def _fetch(hub: Hub, repository: Repository, files: Sequence[RemoteFile], progress: Progress | None) -> Path:
    """Download what of `files` is not here. Returns where the first one is."""
    total, before = sum(file.size for file in files), 0
    for file in files:
        blob = cache.blob_path(repository.name, file.digest)
        if not blob.exists():
            download(
                hub.file_url(repository, file.path),
                blob,
                size=file.size,
                digest=file.digest,
                headers=hub.headers,
                progress=_part_of(progress, before, total),
            )
        before += file.size
    # What came with an earlier commit, and is the same in this one, stays visible.
    for file in repository.files:
        if cache.blob_path(repository.name, file.digest).exists():
            cache.place(repository.name, repository.commit, file)
    cache.set_main(repository.name, repository.commit)
    if progress is not None:
        progress(total, total)
    return cache.repository_folder(repository.name) / "snapshots" / repository.commit / files[0].path


def _part_of(progress: Progress | None, before: int, total: int) -> Callable[[int], None]:
    """The progress of one file, of which `before` bytes of others are there, and `total` in all."""
    return lambda here: None if progress is None else progress(before + here, total)


def _chosen(hub: Hub, repository: Repository, name: HubName, known: Sequence[Quantization], tell: Tell) -> Quantization:
    """The quantization that was asked for, or the largest that this machine has memory for."""
    if name.choice is not None:
        return choose(name.choice, known, name.repository)
    if len(known) == 1:
        return known[0]
    narrow = [q for q in known if q.label not in WIDE] or list(known)
    free = available_memory()
    for quantization in reversed(narrow):
        context = _context(hub, repository, quantization, free)
        if context:
            tell(
                f"{name.repository} has {', '.join(q.label for q in known)}. lmserve takes "
                f"{quantization.label}, the largest that fits into memory, with a context of {context} tokens. "
                f"To take another one, name it: {name.repository}:{known[0].label}"
            )
            return quantization
    smallest = narrow[0]
    raise HubError(
        f"no file of {name.repository} fits into memory: the smallest, {smallest.label}, has "
        f"{smallest.size} bytes, but {free} are free. To take it anyway, name it: "
        f"{name.repository}:{smallest.label}"
    )


def _context(hub: Hub, repository: Repository, quantization: Quantization, free: int) -> int:
    """Tokens of context that there is room for here beside a model's weights; 0: too few, or none."""
    if quantization.size > free:
        return 0
    file = quantization.files[0]
    url = hub.file_url(repository, file.path)
    if len(quantization.files) > 1:
        # Its tensors are listed in each part: reckon with its size, and a quarter beside it.
        return USEFUL_CONTEXT if quantization.size * 5 // 4 <= free else 0
    with header_only(url, PurePosixPath(file.path).name, file.size, hub.headers) as path:
        checkpoint = open_checkpoint(path)
        try:
            context = plan_memory(checkpoint, RunnerOptions()).max_model_len
        except LmserveError:
            return 0
    return context if context >= min(USEFUL_CONTEXT, checkpoint.max_model_len) else 0
