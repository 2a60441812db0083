"""lmserve: an LLM inference server whose conversations live on the server."""

from lmserve._core import VERSION
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.llm import LLM
from lmserve.engine.submission import SamplingParams, SessionRef, StopParams
from lmserve.errors import LmserveError
from lmserve.scheduler import Scheduler

__version__ = VERSION

__all__ = [
    "LLM",
    "AsyncEngine",
    "LmserveError",
    "SamplingParams",
    "Scheduler",
    "SessionRef",
    "StopParams",
    "__version__",
]
