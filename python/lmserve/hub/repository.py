"""What a repository of the hub has: its files with sizes and checksums, and its GGUF files by quantization."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final
from urllib.parse import quote

from lmserve.hub.errors import HubError

DIGEST: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
# The end of a file's name that says how its weights are kept: Q4_K_M, IQ3_XXS, UD-Q4_K_XL, MXFP4, BF16.
QUANT: Final = re.compile(
    r"(?<![A-Za-z0-9])((?:UD-)?(?:I?Q|TQ)\d(?:_[A-Z0-9]+)*|MXFP4(?:_MOE)?|NVFP4|BF16|F?P?16|F?P?32)(?![A-Za-z0-9])",
    re.IGNORECASE,
)
SHARD: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})")
# GGUF files that are no language model: those of an image encoder, and what quantizing was guided by.
OTHER_FILES: Final = re.compile(r"mmproj|imatrix", re.IGNORECASE)
# Seconds to connect, to read, to write, and to wait for a free connection.
TIMEOUT: Final = (10.0, 30.0, 30.0, 30.0)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository. `digest`: 64 hexadecimal digits are its SHA-256, 40 are git's SHA-1 of it."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository as it is now."""

    name: str
    commit: str
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True, slots=True)
class Quantization:
    """A whole model in GGUF files: one, or the parts of it in order."""

    label: str  # such as Q4_K_M; the file's own name where it says none
    files: tuple[RemoteFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True)
class Hub:
    """Where the hub is, and who asks."""

    endpoint: str
    headers: Mapping[str, str]
    offline: bool

    @classmethod
    def configured(cls) -> Hub:
        """The hub of huggingface_hub's settings: HF_ENDPOINT, HF_TOKEN or a login, HF_HUB_OFFLINE."""
        from huggingface_hub import constants, get_token

        token = get_token()
        headers = {"User-Agent": "lmserve"} | ({"Authorization": f"Bearer {token}"} if token else {})
        return cls(constants.ENDPOINT.rstrip("/"), headers, bool(constants.HF_HUB_OFFLINE))

    def file_url(self, repository: Repository, path: str) -> str:
        """Where a file's bytes are."""
        return f"{self.endpoint}/{repository.name}/resolve/{repository.commit}/{quote(path)}"

    def read(self, name: str) -> Repository:
        """What a repository has. Raises HubError where that cannot be known."""
        if self.offline:
            raise HubError(f"{name} is not in the hub's cache here, and HF_HUB_OFFLINE says not to ask the hub")
        # Imported late: it takes a fifth of a server's start, and who has the model asks for nothing.
        import httpx

        url = f"{self.endpoint}/api/models/{name}"
        try:
            reply = httpx.get(
                url, params={"blobs": "true"}, headers=self.headers, timeout=TIMEOUT, follow_redirects=True
            )
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise HubError(
                f"{name} is not in the hub's cache here, and the hub cannot be reached: {reason}."
                " Give a GGUF file or a Hugging Face folder instead"
            ) from error
        if reply.status_code in (401, 403, 404):
            raise HubError(
                f"the hub has no model {name}, or it needs a login (hf auth login): HTTP {reply.status_code}"
            )
        if reply.status_code != 200:
            raise HubError(f"the hub cannot say what {name} has: HTTP {reply.status_code}")
        try:
            return _repository(name, reply.json())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HubError(f"the hub's answer about {name} cannot be read: {error}") from error


def _repository(name: str, reply: Mapping[str, Any]) -> Repository:
    commit = reply["sha"]
    if not DIGEST.fullmatch(commit):
        raise ValueError(f"{commit!r} is not a commit")
    files = []
    for sibling in reply["siblings"]:
        path = str(sibling["rfilename"])
        inside = PurePosixPath(path)
        # What it says becomes paths here.
        if inside.is_absolute() or ".." in inside.parts or "\\" in path or "\0" in path:
            raise ValueError(f"{path!r} is not a path in a repository")
        large = sibling.get("lfs") or {}
        digest, size = large.get("sha256") or sibling.get("blobId"), large.get("size", sibling.get("size"))
        if isinstance(digest, str) and DIGEST.fullmatch(digest) and isinstance(size, int) and size >= 0:
            files.append(RemoteFile(path, size, digest))
    return Repository(name, commit, tuple(files))


def label_of(path: str) -> str:
    """The quantization that a file's name, or else its folder's, tells; its own name where it tells none."""
    stem = PurePosixPath(path).name.removesuffix(".gguf")
    shard = SHARD.fullmatch(stem)
    stem = shard[1] if shard else stem
    for text in (stem, *reversed(PurePosixPath(path).parent.parts)):
        if found := QUANT.findall(text):
            return str(found[-1]).upper()
    return stem


def quantizations(files: Iterable[RemoteFile]) -> list[Quantization]:
    """The models among the GGUF files, the smallest first."""
    whole: dict[tuple[str, str], list[RemoteFile]] = {}
    for file in sorted(files, key=lambda file: file.path):
        if file.path.endswith(".gguf") and not OTHER_FILES.search(PurePosixPath(file.path).name):
            shard = SHARD.fullmatch(file.path.removesuffix(".gguf"))
            whole.setdefault((label_of(file.path), shard[1] if shard else file.path), []).append(file)
    return sorted((Quantization(label, tuple(parts)) for (label, _), parts in whole.items()), key=lambda q: q.size)


def choose(choice: str, known: Sequence[Quantization], repository: str) -> Quantization:
    """The one that `choice` names: by its label in any case, or by the path of a file. Raises HubError."""
    matching = [q for q in known if choice.upper() == q.label.upper() or choice in [file.path for file in q.files]]
    if len(matching) == 1:
        return matching[0]
    if matching:
        paths = ", ".join(f"{repository}:{q.files[0].path}" for q in matching)
        raise HubError(f"{repository} has {choice} more than once; name one of: {paths}")
    labels = ", ".join(dict.fromkeys(q.label for q in known)) or "no GGUF file"
    raise HubError(f"{repository} has {labels}, but {choice} was requested")
