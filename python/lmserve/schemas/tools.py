"""Functions that an answer may call, as OpenAI describes them."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from lmserve.schemas.bounds import Tag, Text
from lmserve.schemas.guided import JsonSchema

MAX_TOOLS = 128
MAX_CALLS = 1024

FunctionName = Annotated[str, Meta(min_length=1, max_length=128)]


class FunctionDefinition(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A function and the JSON schema of its parameters."""

    name: FunctionName
    description: Text | None = None
    parameters: Annotated[JsonSchema | None, Meta(description="Null: it has none.")] = None
    strict: Annotated[
        bool | None, Meta(description="true: a keyword of the schema that cannot be enforced is a 400.")
    ] = None


class Tool(Struct, frozen=True, forbid_unknown_fields=True):
    """A tool; the only kind is a function."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Struct, frozen=True, forbid_unknown_fields=True):
    """The name of a function."""

    name: FunctionName


class NamedToolChoice(Struct, frozen=True, forbid_unknown_fields=True):
    """The function that must be called."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice


class FlatTool(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A function, as `/v1/responses` describes it."""

    type: Literal["function"]
    name: FunctionName
    description: Text | None = None
    parameters: Annotated[JsonSchema | None, Meta(description="Null: it has none.")] = None
    strict: Annotated[
        bool | None, Meta(description="true: a keyword of the schema that cannot be enforced is a 400.")
    ] = None


class FlatToolChoice(Struct, frozen=True, forbid_unknown_fields=True):
    """The function that must be called, as `/v1/responses` names it."""

    type: Literal["function"]
    name: FunctionName


class CalledFunction(Struct, frozen=True, forbid_unknown_fields=True):
    """What was called. A model may write arguments that are no JSON."""

    name: FunctionName
    arguments: Annotated[Text, Meta(description="JSON.")]


class ToolCall(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A call of a function."""

    id: Tag
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Annotated[Annotated[int, Meta(ge=0, le=MAX_CALLS)] | None, Meta(description="Of no effect.")] = None


class FunctionDelta(Struct, frozen=True):
    """What is new in a call."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCallDelta(Struct, frozen=True):
    """A call that begins, or more of its arguments."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionDelta = FunctionDelta()
