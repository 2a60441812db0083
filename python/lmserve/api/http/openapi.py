"""The OpenAPI document, from Litestar's operations and msgspec's schemas, and the page that shows it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from inspect import cleandoc
from pathlib import Path
from typing import Any, Final

import msgspec
from litestar import MediaType, Request, Response, get
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import OpenAPIMediaType, OpenAPIResponse, Operation, Reference, Schema
from litestar.openapi.spec.enums import OpenAPIType
from litestar.params import FromPath
from msgspec import Struct

from lmserve.api.convert.unsupported import UNSUPPORTED, WITHOUT_EFFECT
from lmserve.api.http.examples import EXAMPLES
from lmserve.api.http.examples.failures import ERROR_REPLIES, failure
from lmserve.api.http.examples.streams import STREAMS, Form, stream_of
from lmserve.api.http.middleware import PUBLIC
from lmserve.errors import LmserveError
from lmserve.schemas.bounds import MAX_SESSION_NUMBER
from lmserve.schemas.errors import ErrorReply
from lmserve.schemas.rules import FIELDS, RULES

# What the document describes: every request and reply has an example.
SCHEMAS: Final[tuple[type[Struct], ...]] = (*EXAMPLES, *ERROR_REPLIES)
# The reply that is no object: vectors.
BARE_LIST: Final = [[0.6, -0.8], [0.8, 0.6]]
SCHEMA_PATH: Final = "#/components/schemas/{name}"

ERRORS: Final = {
    400: "The request is invalid.",
    401: "The API key is missing or wrong.",
    403: "The server does not do this on request.",
    404: "The model, session or route does not exist.",
    408: "The body did not arrive in time.",
    409: "A turn of the session is running. See Retry-After.",
    413: "The body is too large.",
    429: "The queue is full or a quota is spent. See Retry-After.",
    503: "The model is being loaded, the server is stopping, or the session log cannot be written.",
    507: "The disk of the session log is full.",
}


def responses(reply: Any, *statuses: int, error: type[Struct] = ErrorReply) -> dict[int, ResponseSpec]:
    """What a handler replies: `reply`, a Struct or a union of some, and `error` with each of `statuses`."""
    specs = {status: ResponseSpec(error, description=ERRORS[status], generate_examples=False) for status in statuses}
    return {200: ResponseSpec(reply, description="The reply.", generate_examples=False), **specs}


def streams(form: Form, frame: type[Struct], description: str) -> type[Operation]:
    """An operation whose reply has a streamed form too, made of `frame`s."""
    media_type = STREAMS[form]

    @dataclass
    class StreamingOperation(Operation):
        """`Operation` with a second form of its 200."""

        def __post_init__(self) -> None:
            reply = (self.responses or {})["200"]
            if isinstance(reply, OpenAPIResponse) and reply.content is not None:
                text = f"{description} Each is a {frame.__name__}."
                schema = _event(frame, text) if form in ("events", "named events") else _text(text)
                reply.content[media_type] = OpenAPIMediaType(schema=schema, example=stream_of(EXAMPLES[frame][0], form))

    return StreamingOperation


def _text(description: str) -> Schema:
    return Schema(type=OpenAPIType.STRING, description=description)


def _event(frame: type[Struct], description: str) -> Schema:
    """One server-sent event, as readers of OpenAPI 3.1 take the schema of such a stream."""
    contents = [Reference(ref=SCHEMA_PATH.format(name=model.__name__)) for model in (frame, ErrorReply)]
    data = Schema(
        any_of=[
            Schema(const="[DONE]"),
            Schema(
                type=OpenAPIType.STRING,
                content_media_type="application/json",
                content_schema=Schema(any_of=contents),
            ),
        ]
    )
    return Schema(type=OpenAPIType.OBJECT, properties={"data": data}, required=["data"], description=description)


def document(operations: dict[str, Any]) -> bytes:
    """The whole document as JSON, from Litestar's own; the schemas are msgspec's, which are what is enforced."""
    _, schemas = msgspec.json.schema_components(SCHEMAS, ref_template=SCHEMA_PATH)
    for schema in schemas.values():
        # Releases of msgspec differ in whether they take the indent out of a docstring.
        if "description" in schema:
            schema["description"] = cleandoc(schema["description"])
    for model, examples in EXAMPLES.items():
        schemas[model.__name__]["examples"] = examples
    for model, fields in FIELDS.items():
        for name, schema in fields.items():
            schemas[model.__name__]["properties"][name] |= schema
    for model, rules in RULES.items():
        schemas[model.__name__]["allOf"] = rules
    for model, names in UNSUPPORTED.items():
        for name in names:
            schemas[model.__name__]["properties"][name]["enum"] = [None, *WITHOUT_EFFECT.get(name, ())]
    for path in operations["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", ()):
                _restore_integers(parameter["schema"])
            for status, reply in operation["responses"].items():
                if (media := reply["content"].get("application/json")) is not None:
                    _add_example(int(status), media)
    components = {**operations.get("components", {}), "schemas": schemas}
    return msgspec.json.encode({**operations, "paths": _in_order(operations["paths"]), "components": components})


def _in_order(paths: dict[str, Any]) -> dict[str, Any]:
    # Litestar has the paths of one handler in a set.
    def summary(path: str) -> str:
        return str(next(iter(paths[path].values()))["summary"])

    handlers: dict[str, int] = {}
    for path in paths:
        handlers.setdefault(summary(path), len(handlers))
    return {path: paths[path] for path in sorted(paths, key=lambda path: (handlers[summary(path)], path))}


def _add_example(status: int, media: dict[str, Any]) -> None:
    # Litestar would leave out the nulls.
    schema = media["schema"]
    if "$ref" not in schema and "oneOf" not in schema:
        media["example"] = BARE_LIST
        return
    ref = schema["$ref"] if "$ref" in schema else schema["oneOf"][0]["$ref"]
    model = next(model for model in SCHEMAS if ref == SCHEMA_PATH.format(name=model.__name__))
    media["example"] = EXAMPLES[model][0] if model in EXAMPLES else failure(status, model)


def _restore_integers(schema: dict[str, Any]) -> None:
    # Litestar writes all limits as floats, and the greatest session id is none.
    for name in ("minimum", "maximum"):
        limit = schema.get(name)
        if schema.get("type") == "integer" and isinstance(limit, float):
            schema[name] = MAX_SESSION_NUMBER if limit == float(MAX_SESSION_NUMBER) else int(limit)


# Neither the package nor Flask is ever imported: only its copy of Swagger UI (Apache-2.0) is of use here. It is a tenth
# of the size of other packages that have one.
SWAGGER_UI: Final = "flask_swagger_ui"

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


@get(["/openapi.json", "/docs/openapi.json"], opt={PUBLIC: True}, include_in_schema=False)
async def openapi_json(request: Request[Any, Any, Any]) -> Response[bytes]:
    """The OpenAPI document."""
    # Made when somebody asks: to make it at the start would delay every server by half a second.
    document = await asyncio.to_thread(request.app.state.openapi_json)
    return Response(document, media_type="application/json")


@get("/docs", opt={PUBLIC: True}, include_in_schema=False)
async def docs(request: Request[Any, Any, Any]) -> Response[str]:
    """The interactive documentation."""
    page = PAGE.format(root=escape(request.scope.get("root_path", "")))
    return Response(page, media_type=MediaType.HTML, headers={"Content-Security-Policy": CONTENT_SECURITY_POLICY})


@get("/docs/assets/{name:str}", opt={PUBLIC: True}, include_in_schema=False)
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
    content = Path(package.origin).with_name("dist").joinpath(name).read_bytes()
    return Response(content, media_type=ASSETS[name], headers=headers)
