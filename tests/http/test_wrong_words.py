"""Each enum, union and required field of each route, wrong: the answer names field, what is allowed, and what was sent.

The wrong requests are made from the schemas, so that a new field is held to this, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from litestar.handlers import HTTPRouteHandler
from lmserve.app import API
from msgspec import inspect

from wire import error_of

Json = Any
WORDS = {
    inspect.IntType: "an integer",
    inspect.FloatType: "a number",
    inspect.StrType: "a string",
    inspect.ListType: "a list",
    inspect.StructType: "an object",
    inspect.DictType: "an object",
    inspect.NoneType: "null",
    inspect.BoolType: "true",
}
# Python's types that decode from each JSON value.
WRONG: list[tuple[Json, tuple[type[inspect.Type], ...]]] = [
    (True, (inspect.BoolType,)),
    ("nonsense", (inspect.StrType,)),
    (-0.5, (inspect.FloatType,)),
    ([], (inspect.ListType,)),
    ({"?": 1}, (inspect.StructType, inspect.DictType)),
]


def alternatives(node: inspect.Type) -> list[inspect.Type]:
    if isinstance(node, inspect.Metadata):
        return alternatives(node.type)
    if isinstance(node, inspect.UnionType):
        return [kind for part in node.types for kind in alternatives(part)]
    return [node]


def sample(node: inspect.Type) -> Json:
    """A small value that the type allows."""
    first = min(alternatives(node), key=lambda kind: isinstance(kind, inspect.NoneType))
    if isinstance(first, inspect.StructType):
        tagged = {first.tag_field: first.tag} if first.tag_field else {}
        return tagged | {field.encode_name: sample(field.type) for field in first.fields if field.required}
    if isinstance(first, inspect.LiteralType):
        return first.values[0]
    if isinstance(first, inspect.ListType):
        return [sample(first.item_type)] * (first.min_length or 0)
    if isinstance(first, inspect.StrType):
        return "x" * (first.min_length or 1)
    if isinstance(first, inspect.IntType | inspect.FloatType):
        return max(first.ge or 0, 0)
    if isinstance(first, inspect.BoolType):
        return False
    return {} if isinstance(first, inspect.DictType | inspect.AnyType) else None


@dataclass
class Place:
    """Somewhere in a request."""

    path: str
    types: list[inspect.Type]
    required: bool
    put: Callable[[Json], Json]
    """The whole request with a value there; ABSENT: with nothing there."""


ABSENT = object()


def places(
    node: inspect.Type, path: str, put: Callable[[Json], Json], within: tuple[type, ...] = ()
) -> Iterator[Place]:
    """Every place below `node`, which is put into a whole request by `put`."""
    for kind in alternatives(node):
        if isinstance(kind, inspect.ListType):
            item = kind.item_type
            fill = max(kind.min_length or 0, 1) - 1

            def put_item(value: Json, fill: int = fill, item: inspect.Type = item) -> Json:
                return put([value] + [sample(item)] * fill)

            yield Place(f"{path}[0]", alternatives(item), False, put_item)
            yield from places(item, f"{path}[0]", put_item, within)
        if not isinstance(kind, inspect.StructType) or kind.cls in within:
            continue
        base = sample(kind)
        named = [(field.encode_name, field.type, field.required) for field in kind.fields]
        if kind.tag_field is not None:
            tags = [other.tag for other in alternatives(node) if isinstance(other, inspect.StructType)]
            named.insert(0, (kind.tag_field, inspect.LiteralType(tuple(tags)), True))
        for name, below, required in named:

            def put_field(value: Json, base: Json = base, name: str = name) -> Json:
                rest = {key: given for key, given in base.items() if key != name}
                return put(rest if value is ABSENT else {name: value, **rest})

            where = f"{path}.{name}" if path else name
            yield Place(where, alternatives(below), required, put_field)
            yield from places(below, where, put_field, (*within, kind.cls))


def wrong_for(types: list[inspect.Type]) -> Iterator[Json]:
    """Values of JSON that none of the types allows."""
    if any(isinstance(kind, inspect.AnyType | inspect.RawType) for kind in types):
        return
    for value, allowed in WRONG:
        literals = [each for kind in types if isinstance(kind, inspect.LiteralType) for each in kind.values]
        if not any(isinstance(kind, allowed) for kind in types) and value not in literals:
            yield value
    if not any(isinstance(kind, inspect.NoneType) for kind in types):
        yield None


def routes() -> Iterator[tuple[str, inspect.Type]]:
    """Every path that takes a body, and the body's type."""
    for handler in API:
        if "POST" in handler.http_methods and (model := body_of(handler)) is not None:
            for path in sorted(handler.paths):
                yield path.replace("{session_id:str}", "7"), inspect.type_info(model)


def body_of(handler: HTTPRouteHandler) -> Any:
    data = handler.parsed_fn_signature.parameters.get("data")
    return None if data is None else data.annotation


ROUTES = dict(routes())


def test_every_route_with_a_body_is_found() -> None:
    assert ROUTES.keys() >= {
        "/generate",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/sessions/7/fork",
    }
    assert len(ROUTES) >= 18


def allowed_words(types: list[inspect.Type]) -> list[str]:
    choices = [value for kind in types if isinstance(kind, inspect.LiteralType) for value in kind.values]
    words = [choice if isinstance(choice, str) else json.dumps(choice) for choice in choices]
    kinds = {type(kind) for kind in types}
    if inspect.FloatType in kinds:
        kinds -= {inspect.IntType}
    return words + [WORDS[kind] for kind in kinds if kind in WORDS]


@pytest.mark.parametrize("route", ROUTES)
def test_the_sentence_says_field_allowed_and_given(scripted_client: httpx.Client, route: str) -> None:
    checked = 0
    for place in places(ROUTES[route], "", lambda body: body):
        words = allowed_words(place.types)
        for value in [*wrong_for(place.types), *([ABSENT] if place.required else [])]:
            body = place.put(value)
            error = error_of(scripted_client.post(route, json=body), 400)
            message = error["message"]
            given = "it is missing" if value is ABSENT else f"{json.dumps(value, separators=(',', ':'))} was given"
            assert error["param"] == place.path, (body, message)
            assert message.startswith(f"{place.path}: expected "), (body, message)
            assert message.endswith(f", but {given}"), (body, message)
            between = message.removeprefix(f"{place.path}: expected ").removesuffix(f", but {given}")
            assert sorted(
                between.replace(", or ", ", ").replace(" or ", ", ").removeprefix("one of ").split(", ")
            ) == sorted(words + ["false"] * any(isinstance(kind, inspect.BoolType) for kind in place.types)), (
                body,
                message,
            )
            checked += 1
    assert checked >= 3


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("given", [b"", b"5", b"[]", b"null", b'"x"'])
def test_a_body_that_is_no_object(scripted_client: httpx.Client, route: str, given: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    message = error_of(scripted_client.post(route, content=given, headers=headers), 400)["message"]
    assert "the body" in message
    assert "an object" in message or "a JSON object" in message
    assert (given.decode() or "is empty") in message


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/v1/sessions?limit=x", "limit: expected an integer, but 'x' was given"),
        ("/v1/sessions?limit=0", "limit: expected an integer >= 1, but '0' was given"),
        ("/v1/sessions/7/transcript?token_ids=maybe", "token_ids: expected true or false, but 'maybe' was given"),
        ("/v1/responses/resp_1/input_items?order=up", "order: expected one of asc, desc, but 'up' was given"),
    ],
)
def test_parameters_of_the_path_and_the_query(scripted_client: httpx.Client, path: str, message: str) -> None:
    assert error_of(scripted_client.get(path), 400)["message"] == message
