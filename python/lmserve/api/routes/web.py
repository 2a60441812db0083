"""`GET /`: the chat page and the view of the server, from the files of `lmserve.web`, without internet access."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Final

from litestar import MediaType, Response, get
from litestar.params import FromPath

from lmserve.api.http.middleware import PUBLIC
from lmserve.errors import LmserveError

MEDIA_TYPES: Final = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}

# Holds the page to this server, whatever a model's words may make of it.
CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@cache
def web_files() -> dict[str, bytes]:
    """The page's files by name."""
    folder = files("lmserve.web")
    return {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if file.name.rpartition(".")[2] in (*MEDIA_TYPES, "html")
    }


@get("/", opt={PUBLIC: True}, include_in_schema=False)
async def index() -> Response[bytes]:
    """The page. It holds no data, and needs no key."""
    headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY, "Referrer-Policy": "no-referrer"}
    return Response(web_files()["index.html"], media_type=MediaType.HTML, headers=headers)


@get("/web/{name:str}", opt={PUBLIC: True}, include_in_schema=False)
async def web_file(name: FromPath[str]) -> Response[bytes]:
    """A file of the page."""
    media_type = MEDIA_TYPES.get(name.rpartition(".")[2])
    if media_type is None or name not in web_files():
        raise LmserveError.new(404, "route_not_found", f"the page has no file {name!r}")
    return Response(web_files()[name], media_type=media_type, headers={"Cache-Control": "no-cache"})
