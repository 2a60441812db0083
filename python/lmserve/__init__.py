"""lmserve: an LLM inference server whose conversations live on the server."""

from lmserve._core import VERSION
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.llm import LLM
from lmserve.errors import LmserveError

__version__ = VERSION

__all__ = ["LLM", "AsyncEngine", "LmserveError", "__version__"]
