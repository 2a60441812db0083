"""lmserve: an LLM inference server that keeps conversations on the server."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from lmserve._core import VERSION

if TYPE_CHECKING:
    from lmserve.api_client import APIClient
    from lmserve.client import AsyncClient, Client
    from lmserve.engine.async_engine import AsyncEngine
    from lmserve.engine.llm import LLM
    from lmserve.engine.submission import SamplingParams, SessionRef, StopParams
    from lmserve.errors import LmserveError
    from lmserve.scheduler import Scheduler

__version__ = VERSION

__all__ = [
    "LLM",
    "APIClient",
    "AsyncClient",
    "AsyncEngine",
    "Client",
    "LmserveError",
    "SamplingParams",
    "Scheduler",
    "SessionRef",
    "StopParams",
    "__version__",
]

# Where each name is; imported when somebody asks for it, for a command needs few of them.
MODULES: Final = {
    "APIClient": "lmserve.api_client",
    "AsyncClient": "lmserve.client",
    "AsyncEngine": "lmserve.engine.async_engine",
    "Client": "lmserve.client",
    "LLM": "lmserve.engine.llm",
    "LmserveError": "lmserve.errors",
    "SamplingParams": "lmserve.engine.submission",
    "Scheduler": "lmserve.scheduler",
    "SessionRef": "lmserve.engine.submission",
    "StopParams": "lmserve.engine.submission",
}


def __getattr__(name: str) -> Any:
    module = MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(module), name)
