"""lmserve: an LLM inference server whose conversations live on the server."""

from lmserve._core import VERSION
from lmserve.errors import LmserveError

__version__ = VERSION

__all__ = ["LmserveError", "__version__"]
