"""lmserve: an LLM inference server whose conversations live on the server."""

from lmserve._core import VERSION as __version__
from lmserve.errors import LmserveError

__all__ = ["LmserveError", "__version__"]
