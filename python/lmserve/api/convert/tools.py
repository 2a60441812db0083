"""From the functions of a request to the core's terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lmserve.engine.submission import AutoTools, NamedTool, RequiredTools
from lmserve.errors import LmserveError
from lmserve.schemas.anthropic import AnyTool, CountTokensRequest, MessagesRequest, NoTool, OneTool
from lmserve.schemas.chat import ChatRequest
from lmserve.schemas.responses import ResponsesRequest
from lmserve.schemas.tools import FlatTool, FlatToolChoice, FunctionDefinition, NamedToolChoice

Choice = Literal["none", "auto", "required"] | NamedTool
# The functions as chat templates show them, and whether the answer calls them; None: there is none that may be called.
Calling = tuple[list[Any] | None, AutoTools | RequiredTools | NamedTool | None]


def chat_calling(data: ChatRequest) -> Calling:
    """What a chat completion calls. Raises LmserveError (400) where there is nothing to call."""
    asked = data.tool_choice
    choice = NamedTool(asked.function.name) if isinstance(asked, NamedToolChoice) else asked
    return _calling([tool.function for tool in data.tools or ()], choice)


def response_calling(data: ResponsesRequest) -> Calling:
    """What a response calls. Raises LmserveError (400) where there is nothing to call."""
    asked = data.tool_choice
    choice = NamedTool(asked.name) if isinstance(asked, FlatToolChoice) else asked
    return _calling(data.tools or (), choice)


def message_calling(data: MessagesRequest | CountTokensRequest) -> Calling:
    """What a message calls. Raises LmserveError (400) where there is nothing to call."""
    functions = [
        FunctionDefinition(
            name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
        )
        for tool in data.tools or ()
    ]
    choice: Choice
    match data.tool_choice:
        case AnyTool():
            choice = "required"
        case OneTool(name=name):
            choice = NamedTool(name)
        case NoTool():
            choice = "none"
        case _:
            choice = "auto"
    return _calling(functions, choice)


def _calling(functions: Sequence[FunctionDefinition | FlatTool], choice: Choice | None) -> Calling:
    if not functions and choice not in (None, "none", "auto"):
        raise LmserveError.invalid("tool_choice", "tool_choice needs tools, but none were given")
    if not functions or choice == "none":
        return None, None
    tools = [{"type": "function", "function": _described(function)} for function in functions]
    if isinstance(choice, NamedTool):
        return tools, choice
    return tools, RequiredTools() if choice == "required" else AutoTools()


def _described(function: FunctionDefinition | FlatTool) -> dict[str, Any]:
    fields = ("name", "description", "parameters", "strict")
    return {field: value for field in fields if (value := getattr(function, field)) is not None}
