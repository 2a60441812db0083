"""Unsupported parameters: refused if they would change the output, otherwise accepted and named in the reply."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from msgspec import Raw, Struct

from lmserve.errors import LmserveError
from lmserve.schemas.anthropic import CountTokensRequest, CustomTool, MessagesRequest, OutputConfig
from lmserve.schemas.batches import CreateBatch
from lmserve.schemas.chat import ChatRequest
from lmserve.schemas.compaction import CompactRequest, InputTokensRequest
from lmserve.schemas.completions import CompletionRequest
from lmserve.schemas.responses import ResponsesRequest, TextConfig
from lmserve.schemas.thinking import Adaptive, Disabled, Enabled, Reasoning
from lmserve.schemas.tools import FlatTool, ResponseTool

# Names the hints of a request that were taken and could not be followed.
HEADER: Final = "x-lmserve-ignored"
# What the log has said of hints. The names are this package's own, but for those of tools.
MAX_LOGGED: Final = 1000
NAME: Final = re.compile(r"[A-Za-z0-9_.\-\[\]]{1,80}")

# Values that ask for nothing. An SDK may send them unasked.
WITHOUT_EFFECT: Final[Mapping[str, tuple[Any, ...]]] = {
    # LMDeploy's own client sends it.
    "kwargs": ({},),
    "mcp_servers": ([],),
    "modalities": (["text"],),
    "suffix": ("",),
}
# Hints that ask for what is done in any case.
FOLLOWED: Final[Mapping[str, tuple[Any, ...]]] = {
    "betas": ([],),
    "context_management": ([], {}, {"edits": []}),
    "defer_loading": (False,),
    "input_examples": ([],),
    "metadata": ({},),
    "service_tier": ("auto", "default", "standard_only"),
    "store": (False,),
    "stream_options": ({},),
    "verbosity": ("medium",),
}

REASONS: Final = {
    "suffix": "suffix is not supported: the served models cannot write a text between prompt and suffix; leave it out",
}

REQUESTS: Final = (
    ChatRequest,
    CompletionRequest,
    MessagesRequest,
    CountTokensRequest,
    ResponsesRequest,
    InputTokensRequest,
    CompactRequest,
    CreateBatch,
)
PARTS: Final = (OutputConfig, TextConfig, Reasoning, Adaptive, Enabled, Disabled, CustomTool, FlatTool, ResponseTool)


def _declared(model: type[Struct], kind: str) -> tuple[str, ...]:
    """The fields of a model, those of its bases first, that are annotated with `kind`."""
    bases = [base for base in reversed(model.__mro__) if issubclass(base, Struct) and base is not Struct]
    return tuple(name for base in bases for name, given in base.__annotations__.items() if given == kind)


UNSUPPORTED: Final[Mapping[type[Struct], tuple[str, ...]]] = {
    model: _declared(model, "Unsupported") for model in REQUESTS
}
HINTS: Final[Mapping[type[Struct], tuple[str, ...]]] = {
    model: _declared(model, "NoEffect") for model in (*REQUESTS, *PARTS)
}

logger = logging.getLogger("lmserve.http")
_logged: set[tuple[str, str]] = set()


def refuse_unsupported(struct: Struct) -> None:
    """Raises LmserveError (400) for the first unsupported parameter that would change the output."""
    for name in UNSUPPORTED[type(struct)]:
        value = getattr(struct, name)
        if isinstance(value, Raw) and not _is_one_of(value, WITHOUT_EFFECT.get(name, ())):
            message = REASONS.get(name, f"{name} is not supported by this server; leave it out")
            raise LmserveError.invalid(name, message, "unsupported_parameter")


def left_out(kind: str) -> str:
    """Stands for a part of a tool's result that the model cannot read."""
    return f"[{kind} left out: this model reads text only]"


class Ignored:
    """The hints of one request that were taken and are not followed, each once."""

    def __init__(self, route: str) -> None:
        """`route`: for the log."""
        self._route = route
        self._names: dict[str, None] = {}

    def add(self, name: str) -> None:
        """A name that is no header's text is cut to its beginning."""
        found = NAME.match(name)
        if found:
            self._names.setdefault(found[0])

    def hints_of(self, struct: Struct | None, prefix: str = "") -> None:
        """Adds the fields of `struct` that have no effect and ask for something."""
        for name in () if struct is None else HINTS[type(struct)]:
            value = getattr(struct, name)
            if isinstance(value, Raw) and not _is_one_of(value, FOLLOWED.get(name, ())):
                self.add(f"{prefix}{name}")

    def headers(self) -> dict[str, str]:
        """The reply's header, where there is something to name; the log names each once for a route."""
        new = [name for name in self._names if (self._route, name) not in _logged]
        if new and len(_logged) < MAX_LOGGED:
            _logged.update((self._route, name) for name in new)
            logger.info("%s: accepted and ignored: %s (logged once)", self._route, ", ".join(new))
        return {HEADER: ", ".join(self._names)} if self._names else {}


def _is_one_of(raw: Raw, values: tuple[Any, ...]) -> bool:
    """Whether it is null, or one of `values`."""
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        return False
    return value is None or value in values
