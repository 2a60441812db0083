"""Everything that a request may hold is bounded where it is parsed, before anything is made of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from lmserve.api.http.openapi import SCHEMAS

REQUESTS = [schema for schema in SCHEMAS if schema.__name__.endswith("Request")]
_, COMPONENTS = msgspec.json.schema_components(REQUESTS)


def unbounded(schema: dict[str, Any], path: str) -> Iterator[str]:
    """Places in a schema at which a value of any size may stand."""
    if "$ref" in schema or "enum" in schema or "const" in schema:
        return  # looked at by itself
    for option in schema.get("anyOf", ()):
        yield from unbounded(option, path)
    kind = schema.get("type")
    limits = {
        "integer": ("minimum", "maximum"),
        "number": ("minimum", "maximum"),
        "string": ("maxLength",),
        "array": ("maxItems",),
    }.get(kind, ())
    for limit in limits:
        if limit not in schema:
            yield f"{path}: a {kind} without {limit}"
    if kind == "array":
        yield from unbounded(schema.get("items", {}), f"{path}[]")
    if kind == "object":
        if "properties" not in schema and "maxProperties" not in schema:
            yield f"{path}: an object without maxProperties"
        yield from unbounded(schema.get("additionalProperties") or {}, f"{path}.*")
        for name, value in schema.get("properties", {}).items():
            yield from unbounded(value, f"{path}.{name}")


def test_requests_are_found() -> None:
    names = {schema.__name__ for schema in REQUESTS}
    assert {"ChatRequest", "CompletionRequest", "ResponsesRequest", "MessagesRequest", "RerankRequest"} <= names


@pytest.mark.parametrize("name", sorted(COMPONENTS))
def test_every_value_is_bounded(name: str) -> None:
    assert list(unbounded(COMPONENTS[name], name)) == []


@pytest.mark.parametrize(
    ("schema", "found"),
    [
        ({"type": "integer", "minimum": 0}, "x: a integer without maximum"),
        ({"type": "string"}, "x: a string without maxLength"),
        ({"anyOf": [{"type": "null"}, {"type": "array", "items": {"type": "string"}, "maxItems": 3}]}, "x[]: a string"),
        ({"type": "object", "additionalProperties": {}}, "x: an object without"),
    ],
)
def test_what_is_not_bounded_is_found(schema: dict[str, Any], found: str) -> None:
    assert next(unbounded(schema, "x")).startswith(found)
