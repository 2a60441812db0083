"""lmserve: an LLM inference server whose conversations live on the server."""

from typing import TYPE_CHECKING, Any

from lmserve._core import VERSION
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.llm import LLM
from lmserve.engine.submission import SamplingParams, SessionRef, StopParams
from lmserve.errors import LmserveError
from lmserve.scheduler import Scheduler

if TYPE_CHECKING:
    from lmserve.api_client import APIClient
    from lmserve.client import AsyncClient, Client

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


def __getattr__(name: str) -> Any:
    """The clients, and httpx with them, only for whoever asks for one."""
    if name in ("Client", "AsyncClient"):
        from lmserve import client

        return getattr(client, name)
    if name == "APIClient":
        from lmserve.api_client import APIClient

        return APIClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
