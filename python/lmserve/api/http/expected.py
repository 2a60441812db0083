"""Describes in words what a request's type allows at some place, for the error message that refuses a value there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, Final

import msgspec
from msgspec import inspect

# Names of the types of JSON, in the order in which a sentence has them.
WORDS: Final[tuple[tuple[tuple[type[inspect.Type], ...], str], ...]] = (
    ((inspect.BoolType,), "true"),
    ((inspect.BoolType,), "false"),
    ((inspect.IntType,), "an integer"),
    ((inspect.FloatType,), "a number"),
    ((inspect.StrType,), "a string"),
    ((inspect.ListType, inspect.TupleType, inspect.VarTupleType, inspect.SetType), "a list"),
    ((inspect.StructType, inspect.DictType), "an object"),
    ((inspect.NoneType,), "null"),
)

NAMED: Final = re.compile(r"`(\w+)`")
NAMES: Final = {"int": "an integer", "float": "a number", "str": "a string", "array": "a list", "object": "an object"}


def expected(model: object, steps: Sequence[str | int], value: Any) -> str | None:
    """What may stand in `model` at `steps`, such as `one of auto, none, or an object`. None: nothing can be said.

    `value`: the whole request as plain objects, which tells where a union goes on.
    """
    found = _at(model, steps, value)
    return None if not found else _in_words(found)


def in_words(text: str) -> str:
    """msgspec's words for a type and its limits, such as `Expected `int` >= 1`, in those of JSON."""
    return NAMED.sub(lambda match: NAMES.get(match[1], match[0]), text)


def _at(model: object, steps: Sequence[str | int], value: Any) -> list[inspect.Type] | None:
    found = list(_alternatives(_type_info(model)))
    for step in steps:
        found = list(_below(found, step, value))
        value = _part(value, step)
    return found or None


@cache
def _type_info(model: object) -> inspect.Type:
    return inspect.type_info(model)


def _alternatives(node: inspect.Type) -> Iterator[inspect.Type]:
    """The types of a union, without what only describes them."""
    if isinstance(node, inspect.Metadata):
        yield from _alternatives(node.type)
    elif isinstance(node, inspect.UnionType):
        for kind in node.types:
            yield from _alternatives(kind)
    else:
        yield node


def _below(found: Iterable[inspect.Type], step: str | int, value: Any) -> Iterator[inspect.Type]:
    objects = [node for node in found if isinstance(node, inspect.StructType)]
    named = [node for node in objects if _has_tag_of(node, value)]
    for node in found:
        if isinstance(step, int):
            if isinstance(node, inspect.ListType | inspect.VarTupleType):
                yield from _alternatives(node.item_type)
        elif isinstance(node, inspect.DictType):
            yield from _alternatives(node.value_type)
        elif isinstance(node, inspect.StructType):
            if step == node.tag_field:
                yield inspect.LiteralType((node.tag,))
            elif node in named or not named:
                for field in node.fields:
                    if field.encode_name == step:
                        yield from _alternatives(field.type)


def _has_tag_of(node: inspect.StructType, value: Any) -> bool:
    return node.tag_field is not None and isinstance(value, dict) and value.get(node.tag_field) == node.tag


def _part(value: Any, step: str | int) -> Any:
    try:
        return value[step]
    except (LookupError, TypeError):
        return None


def _in_words(found: Sequence[inspect.Type]) -> str | None:
    words = []
    choices = [choice for node in found if isinstance(node, inspect.LiteralType) for choice in node.values]
    if choices:
        listed = ", ".join(choice if isinstance(choice, str) and choice else _json(choice) for choice in choices)
        words.append(listed if len(choices) == 1 else f"one of {listed}")
    words += [word for kinds, word in WORDS if any(isinstance(node, kinds) for node in found)]
    if "a number" in words and "an integer" in words:
        words.remove("an integer")
    if not words:
        return None
    *most, last = words
    # A list ends with a comma before what follows it.
    comma = "," if len(choices) > 1 else ""
    return f"{', '.join(most)}{comma} or {last}" if most else last


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
