"""Converts a request's constraint on its answer into the core's guide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from lmserve.engine.submission import Choice, Guide, JsonObject, JsonSchema, Lark, Regex
from lmserve.errors import LmserveError
from lmserve.schemas.guided import GuidedRequest, JsonObjectFormat, JsonSchemaFormat


def guide_of(data: GuidedRequest) -> tuple[Guide | None, str]:
    """The guide and the field that asks for it. Raises LmserveError (400) for more than one field, or no schema."""
    guides = list(_guides(data))
    if len(guides) > 1:
        names = " and ".join(param for param, _ in guides)
        message = f"only one field may set the format of the answer, but {names} were given"
        raise LmserveError.invalid(guides[1][0], message)
    if not guides:
        return None, "guide"
    param, guide = guides[0]
    return guide, param


def _guides(data: GuidedRequest) -> Iterator[tuple[str, Guide]]:
    match data.response_format:
        case JsonObjectFormat(schema=schema):
            yield "response_format", JsonObject() if schema is None else JsonSchema({"type": "object"} | schema)
        case JsonSchemaFormat(json_schema=named):
            guide = JsonObject() if named.schema is None else JsonSchema(named.schema, bool(named.strict))
            yield "response_format", guide
    outputs = data.structured_outputs
    for prefix, source in (("guided_", data), ("structured_outputs.", outputs)):
        if source is None:
            continue
        at = prefix if source is data else ""
        if (schema := getattr(source, f"{at}json")) is not None:
            yield f"{prefix}json", JsonSchema(_schema(schema, f"{prefix}json"), strict=True)
        if (pattern := getattr(source, f"{at}regex")) is not None:
            yield f"{prefix}regex", Regex(pattern)
        if (choices := getattr(source, f"{at}choice")) is not None:
            yield f"{prefix}choice", Choice(choices)
        if (grammar := getattr(source, f"{at}grammar")) is not None:
            yield f"{prefix}grammar", Lark(grammar)


def _schema(given: dict[str, Any] | bool | str, param: str) -> dict[str, Any] | bool:
    if not isinstance(given, str):
        return given
    try:
        return msgspec.json.decode(given, type=dict[str, Any] | bool)
    except (msgspec.MsgspecError, RecursionError) as error:
        message = f"{param} must be a JSON schema (an object), but its text cannot be read: {error}"
        raise LmserveError.invalid(param, message) from error
