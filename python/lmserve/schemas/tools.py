"""Functions that an answer may call, in OpenAI's form."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from lmserve.schemas.bounds import Tag, Text
from lmserve.schemas.guided import JsonSchema
from lmserve.schemas.hints import NoEffect

MAX_TOOLS = 128
MAX_CALLS = 1024

FunctionName = Annotated[str, Meta(min_length=1, max_length=128)]
# A call's arguments; what they hold is bounded by the body.
Arguments = Annotated[dict[str, Any], Meta(max_length=1024)]
Parameters = Annotated[JsonSchema | None, Meta(description="Null if the function has no parameters.")]
Strict = Annotated[
    bool | None, Meta(description="true: a keyword of the schema that the server cannot enforce is a 400.")
]
CustomFormat = Annotated[
    Raw | UnsetType, Meta(description="Has no effect: the server does not constrain the text to a grammar.")
]
KIND = "function or custom. A tool of any other type would have to be run by the server and is ignored."


class FunctionDefinition(Struct, frozen=True, kw_only=True):
    """A function and the JSON schema of its parameters. Other keys are ignored."""

    name: FunctionName
    description: Text | None = None
    parameters: Parameters = None
    strict: Strict = None


class CustomDefinition(Struct, frozen=True, kw_only=True):
    """A function that takes one text. Other keys are ignored."""

    name: FunctionName
    description: Text | None = None
    format: CustomFormat = UNSET


class Tool(Struct, frozen=True, kw_only=True):
    """A tool. Other keys are ignored."""

    type: Annotated[Tag, Meta(description=KIND)]
    function: Annotated[FunctionDefinition | None, Meta(description="For type function.")] = None
    custom: Annotated[CustomDefinition | None, Meta(description="For type custom.")] = None


class NamedFunction(Struct, frozen=True):
    """The name of a function."""

    name: FunctionName


class ToolName(Struct, frozen=True, kw_only=True):
    """Refers to a tool by its name. Other keys are ignored."""

    type: Annotated[Tag, Meta(description=KIND)]
    function: NamedFunction | None = None
    custom: NamedFunction | None = None


class AllowedTools(Struct, frozen=True, kw_only=True):
    """The tools that the model may call. The model is not shown the others."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolName], Meta(max_length=MAX_TOOLS)]


class NamedToolChoice(Struct, frozen=True, kw_only=True):
    """The function that the model must call, or the tools that it may call."""

    type: Annotated[
        Tag,
        Meta(
            description="function, custom or allowed_tools. A tool that the server would have to run has the effect of "
            "auto."
        ),
    ]
    function: NamedFunction | None = None
    custom: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice


class FlatTool(Struct, frozen=True, kw_only=True):
    """A function or a custom tool, as `/v1/responses` describes it. Other keys are ignored."""

    type: Annotated[Tag, Meta(description=KIND)]
    name: FunctionName | None = None
    description: Text | None = None
    parameters: Parameters = None
    strict: Strict = None
    format: CustomFormat = UNSET
    defer_loading: NoEffect = UNSET


class ResponseTool(FlatTool, frozen=True, kw_only=True):
    """A function, a custom tool, or a namespace of these. Other keys are ignored."""

    tools: Annotated[
        Annotated[list[FlatTool], Meta(max_length=MAX_TOOLS)] | None,
        Meta(description="For type namespace: its tools. Calls of them name the namespace."),
    ] = None


class FlatToolName(Struct, frozen=True, kw_only=True):
    """Refers to a tool by its name, in the form of `/v1/responses`. Other keys are ignored."""

    type: Annotated[Tag, Meta(description=KIND)]
    name: FunctionName | None = None
    namespace: FunctionName | None = None


class FlatToolChoice(FlatToolName, frozen=True, kw_only=True):
    """The tool that the model must call, or those that it may call (`allowed_tools`), as in `/v1/responses`."""

    mode: Annotated[Literal["auto", "required"] | None, Meta(description="For allowed_tools. Null: auto.")] = None
    tools: Annotated[
        Annotated[list[FlatToolName], Meta(max_length=MAX_TOOLS)] | None,
        Meta(description="For allowed_tools. The model is not shown the others."),
    ] = None


class CalledFunction(Struct, frozen=True):
    """A called function. The model may write arguments that are not valid JSON."""

    name: FunctionName
    arguments: Annotated[Text, Meta(description="The arguments as JSON text.")]


class CalledCustom(Struct, frozen=True):
    """A called custom tool and its text."""

    name: FunctionName
    input: Text


class ToolCall(Struct, tag_field="type", tag="function", frozen=True, kw_only=True):
    """A call of a function."""

    id: str
    function: CalledFunction


class CustomToolCall(Struct, tag_field="type", tag="custom", frozen=True, kw_only=True):
    """A call of a custom tool."""

    id: str
    custom: CalledCustom


class ReplayedFunction(Struct, frozen=True):
    """A called function. Other keys are ignored."""

    name: FunctionName
    arguments: Annotated[
        Text | Arguments | None, Meta(description="The arguments in JSON, as text or as an object.")
    ] = None


class ReplayedCustom(Struct, frozen=True):
    """A custom tool that was called, and the text that it was given. Other keys are ignored."""

    name: FunctionName
    input: Text


class ReplayedCall(Struct, frozen=True, kw_only=True):
    """A call of an earlier answer. Other keys are ignored."""

    id: Annotated[Tag | None, Meta(description="Null if the call has no id.")] = None
    type: Literal["function", "custom"] = "function"
    function: ReplayedFunction | None = None
    custom: ReplayedCustom | None = None


class FunctionDelta(Struct, frozen=True):
    """The new part of a call."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class CustomDelta(Struct, frozen=True):
    """The new part of a call of a custom tool. The text comes in one piece."""

    name: str | UnsetType = UNSET
    input: str | UnsetType = UNSET


class ToolCallDelta(Struct, frozen=True):
    """The beginning of a call, or more of its arguments."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function", "custom"] | UnsetType = UNSET
    function: FunctionDelta | UnsetType = UNSET
    custom: CustomDelta | UnsetType = UNSET
