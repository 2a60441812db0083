"""`GET /`: a page that says what answers here, and where to go on."""

from __future__ import annotations

from html import escape
from typing import Any, Final

from litestar import MediaType, Request, Response, get

from lmserve.api.http.middleware import PUBLIC
from lmserve.api.http.serving import serving_of

PAGE: Final = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>lmserve</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 40rem; margin: 3rem auto; padding: 0 1rem }}
</style>
</head>
<body>
<main>
<h1>lmserve</h1>
<p>An LLM inference server whose conversations live on the server. It serves {models}.{keys}</p>
<ul>
<li><a href="{root}/docs">API documentation</a>: try each route in the browser</li>
<li><a href="{root}/openapi.json">OpenAPI document</a></li>
<li><a href="{root}/v1/models">Models</a></li>
<li><a href="{root}/health">Health</a> and <a href="{root}/metrics">metrics</a></li>
</ul>
</main>
</body>
</html>
"""
KEYS: Final = " Its API needs a key: send it as <code>Authorization: Bearer KEY</code>."
CONTENT_SECURITY_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"


@get("/", opt={PUBLIC: True}, include_in_schema=False)
async def index(request: Request[Any, Any, Any]) -> Response[str]:
    """The page. It holds no data, and needs no key."""
    serving = serving_of(request)
    page = PAGE.format(
        root=escape(request.scope.get("root_path", "")),
        models=f"<b>{escape(serving.names[0])}</b>",
        keys=KEYS if serving.keys else "",
    )
    return Response(page, media_type=MediaType.HTML, headers={"Content-Security-Policy": CONTENT_SECURITY_POLICY})
