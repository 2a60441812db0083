"""From the functions of a request to the core's terms."""

from __future__ import annotations

from typing import Any

import msgspec

from lmserve.engine.submission import AutoTools, NamedTool, RequiredTools
from lmserve.errors import LmserveError
from lmserve.schemas.chat import ChatRequest
from lmserve.schemas.tools import NamedToolChoice


def tool_choice(data: ChatRequest) -> AutoTools | RequiredTools | NamedTool | None:
    """Whether the answer calls functions; None: it does not. Raises LmserveError (400) where there is none to call."""
    choice = data.tool_choice
    if not data.tools:
        if choice in (None, "none", "auto"):
            return None
        raise LmserveError.invalid("tool_choice", "tool_choice needs tools, but none were given")
    if isinstance(choice, NamedToolChoice):
        return NamedTool(choice.function.name)
    return {None: AutoTools(), "auto": AutoTools(), "required": RequiredTools(), "none": None}[choice]


def tools_for_template(data: ChatRequest) -> list[Any] | None:
    """The functions as chat templates show them; None: there are none, or none may be called."""
    if not data.tools or data.tool_choice == "none":
        return None
    tools: list[Any] = msgspec.to_builtins(data.tools)
    for tool in tools:
        function = tool["function"]
        for field in ("description", "parameters", "strict"):
            if function[field] is None:
                del function[field]
    return tools
