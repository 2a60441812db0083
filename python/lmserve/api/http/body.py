"""Parses request bodies: strict JSON into msgspec Structs, with errors that say what, the limit, and what was given."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar, TypeVar

import msgspec
from litestar.dto import AbstractDTO, DTOConfig
from litestar.openapi.spec import Reference, Schema
from litestar.typing import FieldDefinition

from lmserve.api.convert.nearest import advice, looks_like_sampling
from lmserve.api.http.expected import expected, in_words
from lmserve.errors import LmserveError

T = TypeVar("T")

# Longest quotation of what was given, in characters.
MAX_QUOTE = 80
# A larger body is not parsed a second time, neither to quote from it nor to find its integers.
MAX_QUOTED_BODY = 262_144
# What a body holds besides text costs the event loop up to a hundred times what its bytes cost. It is counted where the
# body is larger than COUNTED, by brackets and commas, those within texts included: to tell them apart costs as much.
COUNTED = 65_536
MAX_BRACKETS = 250_000
MAX_COMMAS = 2_000_000
# From here on a float may stand for several integers.
EXACT = 2.0**53

PLACE = re.compile(r"^(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$(?P<path>[^`]*)`)?$", re.DOTALL)
GOT = re.compile(r", got `[^`]*`$")
KIND = re.compile(r"Expected `[^`]*`(, got `[^`]*`)?")  # without a limit, which only msgspec knows
UNNAMED = "[...]"  # for a key of an object whose keys are free
STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]")
NAMED_FIELD = re.compile(r"(?:missing required|contains unknown) field `([^`]*)`")


class StrictJson(AbstractDTO[T]):
    """Decodes a body into its Struct without any coercion: "0.5" is not a number, but 2.0 is an integer.

    Litestar's own path converts laxly, and answers some bodies with a 500.
    """

    config = DTOConfig()
    _decoders: ClassVar[dict[type, msgspec.json.Decoder[Any]]] = {}

    @classmethod
    def create_for_field_definition(cls, field_definition: FieldDefinition, *_args: Any, **_kwargs: Any) -> None:
        """Build the decoder once; no transfer model is needed."""
        cls._decoders.setdefault(field_definition.annotation, msgspec.json.Decoder(field_definition.annotation))

    @classmethod
    def create_openapi_schema(
        cls, field_definition: FieldDefinition, handler_id: str, schema_creator: Any
    ) -> Reference | Schema:
        """The Struct's own schema."""
        del handler_id
        schema: Reference | Schema = schema_creator.for_field_definition(field_definition)
        return schema

    def decode_bytes(self, value: bytes) -> Any:
        """The body as `model_type`. Raises LmserveError (400)."""
        self._check_content_type()
        return decode_json(value, self._decoders[self.model_type])

    def _check_content_type(self) -> None:
        headers = self.asgi_connection.headers
        given = headers.get("content-type")
        if given is None:
            # A web page can send a body without a type to any address, and asks no one; it cannot leave out its origin.
            if "origin" not in headers:
                return
            given = "none"
        media_type = given.partition(";")[0].strip().lower()
        if media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json")):
            return
        message = f"Content-Type must be application/json, but {given[:MAX_QUOTE]} was given"
        raise LmserveError.invalid(None, message, "invalid_content_type")


def empty_body() -> LmserveError:
    """400 for a request without the body that it needs."""
    return LmserveError.invalid(None, "the body must be a JSON object, but it is empty", "invalid_json")


class LenientJson(StrictJson[T]):
    """As `StrictJson`, for LMDeploy's routes: unknown keys are ignored, but for those that look like sampling."""

    def decode_bytes(self, value: bytes) -> Any:
        """The body as `model_type`. Raises LmserveError (400)."""
        decoded = super().decode_bytes(value)
        fields = type(decoded).__struct_fields__
        for name in msgspec.json.decode(value, type=dict[str, msgspec.Raw]):
            if name not in fields and looks_like_sampling(name, fields):
                message = f"unknown field `{name}` would change the text, and is not supported{advice(name, fields)}"
                raise LmserveError.invalid(name, message, "unknown_field")
        return decoded


def decode_json(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """The body as the decoder's type. Raises LmserveError (400)."""
    if not body:
        raise empty_body()
    try:
        if not body.isascii():
            # The decoder does not look into strings that it skips.
            body.decode()
        if len(body) > COUNTED:
            _check_parts(body)
            return _without_collection(lambda: decoder.decode(body))
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        if (exact := _with_integers(body)) is not None:
            with suppress(msgspec.ValidationError):
                return decoder.decode(exact)
        raise _invalid_value(str(error), body, decoder.type) from error
    except UnicodeDecodeError as error:
        message = f"the body must be UTF-8, but byte {error.start} of {_excerpt(error.object)} is not"
        raise LmserveError.invalid(None, message, "invalid_json") from error
    except msgspec.DecodeError as error:
        message = f"the body must be a JSON object, but {_excerpt(body)} was given: {error}"
        raise LmserveError.invalid(None, message, "invalid_json") from error
    except RecursionError as error:
        message = f"the body is nested too deeply; the limit is about {sys.getrecursionlimit()} levels"
        raise LmserveError.invalid(None, message, "invalid_json") from error


def _check_parts(body: bytes) -> None:
    for what, limit, count in (
        ("lists and objects", MAX_BRACKETS, body.count(b"[") + body.count(b"{")),
        ("values", MAX_COMMAS, body.count(b",")),
    ):
        if count > limit:
            signs = "opening brackets" if limit == MAX_BRACKETS else "commas"
            message = f"the body may have at most {limit} {what}, counted by its {signs}, but it has {count}"
            raise LmserveError.invalid(None, message, "too_many_values")


def _without_collection(work: Callable[[], T]) -> T:
    """What `work` returns: the garbage collector would look again and again at all that it has made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        return work()
    finally:
        if enabled:
            gc.enable()


def _with_integers(body: bytes) -> bytes | None:
    """The body with 512.0 written as 512, which JSON Schema calls an integer too; None where that cannot be said."""
    if len(body) > MAX_QUOTED_BODY:
        return None
    try:
        return msgspec.json.encode(_integral(msgspec.json.decode(body)))
    except (msgspec.MsgspecError, RecursionError, OverflowError):
        return None


def _integral(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT:
        return int(value)
    if isinstance(value, list):
        return [_integral(item) for item in value]
    if isinstance(value, dict):
        return {key: _integral(item) for key, item in value.items()}
    return value


def _excerpt(body: bytes) -> str:
    text = body[: MAX_QUOTE + 1].decode(errors="replace")
    return text if len(text) <= MAX_QUOTE else f"{text[:MAX_QUOTE]}..."


def _invalid_value(message: str, body: bytes, model: object) -> LmserveError:
    match = PLACE.match(message)
    what, path = (match["what"], match["path"] or "") if match else (message, "")
    # The values of an object with free keys have no place of their own.
    path, unnamed, _ = path.partition(UNNAMED)
    steps = [name or int(index) for name, index in STEP.findall(path)]
    param = path.removeprefix(".")
    value = _decoded(body)
    if named := NAMED_FIELD.search(what):
        param = f"{param}.{named[1]}" if param else named[1]
        if "missing" in what:
            allowed = expected(model, [*steps, named[1]], value)
            return LmserveError.invalid(
                param, f"{param}: expected {allowed or 'a value'}, but it is missing", "missing_field"
            )
        place = f" in {path.removeprefix('.')}" if path else ""
        end = "" if path else advice(named[1], getattr(model, "__struct_fields__", ()))
        return LmserveError.invalid(param, f"{_lower(what)}{place}{end}", "unknown_field")
    if KIND.fullmatch(what) or what.startswith(("Invalid enum value", "Invalid value")):
        allowed = None if unnamed or (match and match["key"]) else expected(model, steps, value)
        what = f"expected {allowed}" if allowed else GOT.sub("", what)
    if unnamed or (match and match["key"]):
        what = f"{what} as {'value' if unnamed else 'key'}"
    given = _given(value, steps)
    return LmserveError.invalid(
        param or None, f"{param or 'the body'}: {_lower(in_words(what))}, but {given} was given"
    )


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _decoded(body: bytes) -> Any:
    """The body as plain objects; UNSET if it is too large, or has a worse error after the first one."""
    if len(body) > MAX_QUOTED_BODY:
        return msgspec.UNSET
    try:
        return msgspec.json.decode(body)
    except (msgspec.MsgspecError, RecursionError, OverflowError):
        # A second key of that name, a number of a thousand digits.
        return msgspec.UNSET


def _given(value: Any, steps: list[str | int]) -> str:
    """The JSON at `steps`, cut short."""
    try:
        for step in steps:
            value = value[step]
        return "another value" if value is msgspec.UNSET else _excerpt(msgspec.json.encode(value))
    except (LookupError, TypeError, RecursionError):
        return "another value"
