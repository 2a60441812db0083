"""What a person calls a model that is not a file here: `owner/name`, `hf.co/owner/name:Q4_K_M`, `qwen3:4b`, a URL."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from lmserve.hub.errors import HubError

REPOSITORY: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TABLE: Final = Path(__file__).with_name("short_names.toml")
SHORT_HOST: Final = "hf.co"
# Of a file's page or its bytes, below a repository's address.
FILE_PATH: Final = re.compile(r"(?:resolve|blob)/([^/]+)/(.+)")


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository of the hub. `choice`: which of its GGUF files, by quantization or by path; None: the best."""

    repository: str
    choice: str | None = None
    short: str | None = None  # the short name that it was called by


@dataclass(frozen=True, slots=True)
class UrlName:
    """A GGUF file at a URL. `sha256`: its checksum, where the URL names one."""

    url: str
    sha256: str | None = None

    @property
    def file(self) -> str:
        """The name of the file."""
        return unquote(urlsplit(self.url).path.rpartition("/")[2])


def read_name(text: str, endpoint: str) -> HubName | UrlName | None:
    """What `text` names; None: it has no form of a name. `endpoint`: the hub's own URL.

    Raises HubError for a URL that names no GGUF file.
    """
    if "://" in text:
        return _read_url(text, endpoint)
    text = text.removeprefix(f"{SHORT_HOST}/")
    repository, _, choice = text.partition(":")
    if REPOSITORY.fullmatch(repository) and not repository.endswith(".gguf"):
        return HubName(repository, choice or None)
    return None


def read_short_name(text: str, table: Mapping[str, Mapping[str, str]] | None = None) -> HubName | str | None:
    """What a short name stands for: a repository, or the name of a bundled model. None: there is no such name.

    Raises HubError for a size that the table does not have.
    """
    name, _, rest = text.lower().partition(":")
    sizes = (short_names() if table is None else table).get(name)
    if sizes is None:
        return None
    size, choice = _size(rest, sizes)
    if size not in sizes or size == "default":
        known = ", ".join(key for key in sizes if key != "default")
        raise HubError(f"{name} is known in the sizes {known}, but {rest!r} was given")
    target = sizes[size]
    return HubName(target, choice, f"{name}:{size}") if "/" in target else target


def _size(rest: str, sizes: Mapping[str, str]) -> tuple[str, str | None]:
    """The size and the quantization in what follows a short name: `4b`, `4b:Q8_0`, `4b-q8_0`, or nothing."""
    if not rest or rest == "latest":
        return sizes["default"], None
    if rest in sizes:
        return rest, None
    size, _, choice = rest.partition(":")
    if not choice:
        # Its sizes may have dashes of their own.
        size = max((key for key in sizes if rest.startswith(f"{key}-")), key=len, default=rest)
        choice = rest.removeprefix(f"{size}-") if size != rest else ""
    return size, choice or None


def served_name(text: str) -> str:
    """The name that a server gives the model that `text` names: `qwen3:4b` for `qwen3`. `text` where it has no form."""
    short = read_short_name(text)
    if isinstance(short, str):
        return short
    if short is not None:
        return short.short or text
    return text.removeprefix("https://").removeprefix(f"{SHORT_HOST}/")


def short_names() -> dict[str, dict[str, str]]:
    """The table of short names."""
    return tomllib.loads(TABLE.read_text("utf-8"))


def near_names(text: str) -> list[str]:
    """Short names that are almost `text`."""
    return get_close_matches(text.lower().partition(":")[0], short_names(), 3, 0.75)


def _read_url(text: str, endpoint: str) -> HubName | UrlName:
    address, _, fragment = text.partition("#")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise HubError(f"a model's URL begins with http:// or https://, but {text!r} was given")
    below = parts.path.strip("/")
    if parts.hostname == SHORT_HOST or address.startswith(f"{endpoint}/"):
        if parts.hostname != SHORT_HOST:
            below = address.removeprefix(f"{endpoint}/").partition("?")[0].strip("/")
        owner, _, rest = below.partition("/")
        name, _, path = rest.partition("/")
        name, _, choice = name.partition(":")
        if REPOSITORY.fullmatch(f"{owner}/{name}"):
            file = FILE_PATH.fullmatch(path)
            return HubName(f"{owner}/{name}", unquote(file[2]) if file else choice or None)
    if not parts.path.endswith(".gguf"):
        raise HubError(f"a model's URL ends in .gguf, but {text!r} was given")
    sha256 = fragment.removeprefix("sha256=").lower() if fragment.startswith("sha256=") else None
    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise HubError(f"#sha256= is followed by 64 hexadecimal digits, but {text!r} was given")
    return UrlName(address, sha256)
