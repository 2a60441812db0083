"""Random JSON schemas, and texts that a grammar guides, for the tests of structured output."""

from __future__ import annotations

import random
from typing import Any

PATTERNS = ["^[a-z]{2,4}$", "^(yes|no|maybe)$", "^[0-9]{3}-[0-9]{2}$", "^a+b?$", "^[A-Z][a-z]*\\.$"]
NAMES = ["id", "name", "größe", "a b", 'say "hi"', "back\\slash", "tags", "日本"]
VALUES: list[Any] = [None, True, 0, -7, 2.5, "", "é\n", "x/y", [1, 2], {"k": []}]


class SchemaMaker:
    """Schemas that allow finite texts alone, as models that choose at random would otherwise never end them."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def make(self) -> dict[str, Any]:
        """A schema, sometimes with definitions that it refers to."""
        if self._random.random() < 0.2:
            definitions = {name: self._schema(1) for name in ("first", "second")}
            properties = {name: {"$ref": f"#/$defs/{self._random.choice(list(definitions))}"} for name in NAMES[:3]}
            return self._object(properties) | {"$defs": definitions}
        return self._schema(3)

    def _schema(self, depth: int) -> dict[str, Any]:
        kinds = [self._scalar, self._scalar, self._string, self._number, self._enum]
        if depth > 0:
            kinds += [self._properties, self._properties, self._array, self._any_of]
        return self._random.choice(kinds)(depth - 1)

    def _scalar(self, _: int) -> dict[str, Any]:
        return {"type": self._random.choice(["null", "boolean", "integer", ["boolean", "null"]])}

    def _string(self, _: int) -> dict[str, Any]:
        if self._random.random() < 0.3:
            return {"type": "string", "pattern": self._random.choice(PATTERNS[:3])}
        if self._random.random() < 0.3:
            return {"type": "string", "format": self._random.choice(["date", "time", "ipv4", "uuid"])}
        least = self._random.randrange(3)
        return {"type": "string", "minLength": least, "maxLength": least + self._random.randrange(6)}

    def _number(self, _: int) -> dict[str, Any]:
        low = self._random.randrange(-1000, 1000)
        high = low + self._random.randrange(1, 5000)
        kind = self._random.choice(["integer", "number"])
        bounds = ("exclusiveMinimum", "exclusiveMaximum") if self._random.random() < 0.3 else ("minimum", "maximum")
        return {"type": kind, bounds[0]: low, bounds[1]: high + 1}

    def _enum(self, _: int) -> dict[str, Any]:
        if self._random.random() < 0.3:
            return {"const": self._random.choice(VALUES)}
        return {"enum": self._random.sample(VALUES, self._random.randrange(1, 5))}

    def _array(self, depth: int) -> dict[str, Any]:
        least = self._random.randrange(3)
        schema = {"type": "array", "minItems": least, "maxItems": least + self._random.randrange(1, 3)}
        if self._random.random() < 0.3:
            schema["prefixItems"] = [self._schema(depth), self._schema(depth)]
        return schema | {"items": self._schema(depth)}

    def _any_of(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self._schema(depth) for _ in range(self._random.randrange(1, 4))]}

    def _properties(self, depth: int) -> dict[str, Any]:
        names = self._random.sample(NAMES, self._random.randrange(1, 5))
        return self._object({name: self._schema(depth) for name in names})

    def _object(self, properties: dict[str, Any]) -> dict[str, Any]:
        required = [name for name in properties if self._random.random() < 0.6]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
