"""The OpenAPI document: Litestar's operations over msgspec's schemas; and the page that shows it, without internet."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import msgspec
from litestar import MediaType, Request, Response, get
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import OpenAPIMediaType, OpenAPIResponse, Operation, Schema
from litestar.openapi.spec.enums import OpenAPIType
from litestar.params import FromPath
from msgspec import Struct

from lmserve.errors import LmserveError
from lmserve.schemas.anthropic import (
    CountTokensReply,
    CountTokensRequest,
    MessageErrorReply,
    MessageEvent,
    MessageReply,
    MessagesRequest,
)
from lmserve.schemas.chat import ChatChunk, ChatReply, ChatRequest
from lmserve.schemas.completions import CompletionChunk, CompletionReply, CompletionRequest
from lmserve.schemas.embeddings import EmbeddingsReply, EmbeddingsRequest
from lmserve.schemas.errors import ErrorReply, GenerateErrorReply
from lmserve.schemas.generate import GenerateReply, GenerateRequest
from lmserve.schemas.health import HealthReply
from lmserve.schemas.interactive import InteractiveReply, InteractiveRequest
from lmserve.schemas.models import ModelCard, ModelList
from lmserve.schemas.responses import (
    ItemList,
    ResponseDeleted,
    ResponseEvent,
    ResponseReply,
    ResponsesRequest,
)
from lmserve.schemas.scoring import RerankReply, RerankRequest, ScoreReply, ScoreRequest
from lmserve.schemas.sessions import (
    Appended,
    AppendRequest,
    Cancelled,
    Deleted,
    ForkRequest,
    RewindRequest,
    SessionCard,
    SessionList,
    Transcript,
)
from lmserve.schemas.tokenize import (
    DetokenizeReply,
    DetokenizeRequest,
    EncodeReply,
    EncodeRequest,
    TokenizeReply,
    TokenizeRequest,
)
from lmserve.schemas.usage import UsageReply

SCHEMAS: Final[tuple[type[Struct], ...]] = (
    GenerateRequest,
    GenerateReply,
    ChatRequest,
    ChatReply,
    ChatChunk,
    CompletionRequest,
    CompletionReply,
    CompletionChunk,
    EmbeddingsRequest,
    EmbeddingsReply,
    ScoreRequest,
    ScoreReply,
    RerankRequest,
    RerankReply,
    ResponsesRequest,
    ResponseReply,
    ResponseEvent,
    ResponseDeleted,
    ItemList,
    MessagesRequest,
    MessageReply,
    MessageEvent,
    MessageErrorReply,
    CountTokensRequest,
    CountTokensReply,
    InteractiveRequest,
    InteractiveReply,
    TokenizeRequest,
    TokenizeReply,
    DetokenizeRequest,
    DetokenizeReply,
    EncodeRequest,
    EncodeReply,
    ModelList,
    ModelCard,
    SessionList,
    SessionCard,
    Transcript,
    ForkRequest,
    RewindRequest,
    AppendRequest,
    Appended,
    Cancelled,
    Deleted,
    UsageReply,
    HealthReply,
    ErrorReply,
    GenerateErrorReply,
)

ERRORS: Final = {
    400: "The request is invalid.",
    401: "There is no API key, or a wrong one.",
    404: "The model, session or route is not here.",
    408: "The body did not arrive in time.",
    409: "The session's turn is running; see Retry-After.",
    413: "The body is too large.",
    429: "The queue is full or a quota is spent; see Retry-After.",
    503: "The model is being loaded, or the server is stopping.",
}


def responses(reply: type[Struct], *statuses: int, error: type[Struct] = ErrorReply) -> dict[int, ResponseSpec]:
    """What a handler replies: `reply`, and `error` with each of `statuses`."""
    specs = {status: ResponseSpec(error, description=ERRORS[status], generate_examples=False) for status in statuses}
    return {200: ResponseSpec(reply, description="The reply.", generate_examples=False), **specs}


def streams(media_type: str, frame: type[Struct], description: str) -> type[Operation]:
    """An operation whose reply has a streamed form too, made of `frame`s."""

    @dataclass
    class StreamingOperation(Operation):
        """`Operation` with a second form of its 200."""

        def __post_init__(self) -> None:
            reply = (self.responses or {})["200"]
            if isinstance(reply, OpenAPIResponse) and reply.content is not None:
                text = f"{description} Each is a {frame.__name__}."
                schema = Schema(type=OpenAPIType.STRING, description=text)
                reply.content[media_type] = OpenAPIMediaType(schema=schema)

    return StreamingOperation


def document(operations: dict[str, Any]) -> bytes:
    """The whole document as JSON, from Litestar's own; the schemas are msgspec's, which are what is enforced."""
    _, schemas = msgspec.json.schema_components(SCHEMAS, ref_template="#/components/schemas/{name}")
    components = {**operations.get("components", {}), "schemas": schemas}
    return msgspec.json.encode({**operations, "components": components})


# The package is never imported: only its copy of Swagger UI (Apache-2.0) is of use here.
SWAGGER_UI: Final = "swagger_ui"

ASSETS: Final = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "favicon-32x32.png": "image/png",
}

PAGE: Final = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>lmserve</title>
<link rel="icon" type="image/png" href="{root}/docs/assets/favicon-32x32.png">
<link rel="stylesheet" href="{root}/docs/assets/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="{root}/docs/assets/swagger-ui-bundle.js"></script>
<script src="{root}/docs/assets/start.js"></script>
</body>
</html>
"""

# Without validatorUrl the page would ask a server of Swagger's about every document.
START: Final = """\
SwaggerUIBundle({
  url: new URL("../openapi.json", document.currentScript.src).href,
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
  tryItOutEnabled: true,
});
"""

# Holds the page to this server, whatever a script may ask for.
CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'"
)


@get(["/openapi.json", "/docs/openapi.json"], include_in_schema=False)
async def openapi_json(request: Request[Any, Any, Any]) -> Response[bytes]:
    """The OpenAPI document."""
    return Response(request.app.state.openapi_json, media_type="application/json")


@get("/docs", include_in_schema=False)
async def docs(request: Request[Any, Any, Any]) -> Response[str]:
    """The interactive documentation."""
    page = PAGE.format(root=escape(request.scope.get("root_path", "")))
    return Response(page, media_type=MediaType.HTML, headers={"Content-Security-Policy": CONTENT_SECURITY_POLICY})


@get("/docs/assets/{name:str}", include_in_schema=False)
async def docs_asset(name: FromPath[str]) -> Response[bytes]:
    """A file of the documentation page."""
    headers = {"Cache-Control": "max-age=86400"}
    if name == "start.js":
        return Response(START.encode(), media_type="text/javascript", headers=headers)
    if name not in ASSETS:
        raise LmserveError.new(404, "route_not_found", f"the documentation has no file {name!r}")
    package = find_spec(SWAGGER_UI)
    if package is None or package.origin is None:
        raise RuntimeError(f"the package {SWAGGER_UI}, a dependency of lmserve, is not installed")
    content = Path(package.origin).with_name("static").joinpath(name).read_bytes()
    return Response(content, media_type=ASSETS[name], headers=headers)
