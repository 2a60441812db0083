"""Converts the functions of a request into the core's terms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from lmserve.api.convert.unsupported import Ignored
from lmserve.engine.submission import AutoTools, CallForm, NamedTool, RequiredTools
from lmserve.errors import LmserveError
from lmserve.schemas.anthropic import AnyTool, CountTokensRequest, CustomTool, MessagesRequest, NoTool, OneTool
from lmserve.schemas.chat import ChatRequest
from lmserve.schemas.responses import ResponsesRequest
from lmserve.schemas.tools import (
    CustomDefinition,
    FlatTool,
    FlatToolChoice,
    FlatToolName,
    FunctionDefinition,
    NamedFunction,
    NamedToolChoice,
    ToolName,
)

Choice = Literal["none", "auto", "required"] | NamedTool
# The functions as chat templates show them, and whether the answer calls them; None: there is none that may be called.
Calling = tuple[list[Any] | None, AutoTools | RequiredTools | NamedTool | None]

# A custom tool is a function of one text.
CUSTOM_PARAMETERS: Final[Mapping[str, Any]] = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
KINDS: Final = ("function", "custom")


@dataclass(frozen=True)
class Functions:
    """The functions of a response, by the names that the model sees: how the reply reports calls of some, as given."""

    shown: dict[str, dict[str, Any]] = field(default_factory=dict)
    forms: dict[str, CallForm] = field(default_factory=dict)
    told: list[dict[str, Any]] = field(default_factory=list)
    left_out: bool = False


def chat_calling(data: ChatRequest, ignored: Ignored) -> Calling:
    """What a chat completion calls. Raises LmserveError (400) where there is nothing to call.

    Tools that the server would have to run are left out and added to `ignored`.
    """
    definitions: list[FunctionDefinition | CustomDefinition] = list(data.functions or ())
    left_out = False
    for at, tool in enumerate(data.tools or ()):
        if tool.type not in KINDS:
            ignored.add(f"tools.{tool.type}")
            left_out = True
            continue
        definition = tool.function if tool.type == "function" else tool.custom
        if definition is None:
            raise _missing(f"tools[{at}]", tool.type, tool.type)
        definitions.append(definition)
    tools = [_described(definition) for definition in definitions]
    asked = data.tool_choice
    if asked is None and data.function_call is not None:
        given = data.function_call
        return _calling(tools, NamedTool(given.name) if isinstance(given, NamedFunction) else given)
    if not isinstance(asked, NamedToolChoice):
        return _calling(tools, _possible(asked, tools, left_out=left_out))
    if asked.type == "allowed_tools":
        allowed = asked.allowed_tools
        if allowed is None:
            raise _missing("tool_choice", asked.type, "allowed_tools")
        names = [_name_in(each) for each in allowed.tools]
        return _calling(_only(tools, names), _possible(allowed.mode, tools, left_out=left_out))
    if asked.type not in KINDS:
        ignored.add("tool_choice")
        return _calling(tools, "auto")
    name = _name_in(asked)
    if name is None:
        raise _missing("tool_choice", asked.type, asked.type)
    return _calling(tools, NamedTool(name))


def custom_forms(data: ChatRequest) -> dict[str, CallForm]:
    """How a chat completion reports calls of custom tools."""
    return {
        tool.custom.name: CallForm(name=tool.custom.name, custom=True)
        for tool in data.tools or ()
        if tool.type == "custom" and tool.custom is not None
    }


def response_calling(data: ResponsesRequest, ignored: Ignored) -> tuple[Calling, Functions]:
    """What a response calls, and its functions; as `chat_calling`."""
    functions = response_functions(data, ignored)
    tools = list(functions.shown.values())
    asked = data.tool_choice
    if not isinstance(asked, FlatToolChoice):
        return _calling(tools, _possible(asked, tools, left_out=functions.left_out)), functions
    if asked.type == "allowed_tools":
        names = [_shown_name(each, functions) for each in asked.tools or ()]
        mode = _possible(asked.mode or "auto", tools, left_out=functions.left_out)
        return _calling(_only(tools, names), mode), functions
    if asked.type not in KINDS:
        ignored.add("tool_choice")
        return _calling(tools, "auto"), functions
    name = _shown_name(asked, functions)
    if name is None:
        raise _missing("tool_choice", asked.type, "name")
    return _calling(tools, NamedTool(name)), functions


def response_functions(data: ResponsesRequest, ignored: Ignored) -> Functions:
    """The functions of a response, those of namespaces among them. Raises LmserveError (400) for one without a name."""
    functions = Functions()
    left_out = False
    for at, tool in enumerate(data.tools or ()):
        place = f"tools[{at}]"
        for inner, each in enumerate(tool.tools or ()):
            if each.type in KINDS and each.name is None:
                raise _missing(f"{place}.tools[{inner}]", each.type, "name")
        if tool.type == "namespace":
            if tool.name is None:
                raise _missing(place, tool.type, "name")
            inside = []
            for inner, each in enumerate(tool.tools or ()):
                if _add(functions, each, f"{place}.tools[{inner}]", tool.name, ignored):
                    inside.append(_told(each))
            functions.told.append({"type": "namespace", "name": tool.name, "tools": inside})
        elif _add(functions, tool, place, None, ignored):
            functions.told.append(_told(tool))
        else:
            left_out = True
    return replace(functions, left_out=left_out)


def _told(tool: FlatTool) -> dict[str, Any]:
    if tool.type == "custom":
        return {"type": "custom", "name": tool.name, "description": tool.description}
    fields = ("type", "name", "description", "parameters", "strict")
    return {name: getattr(tool, name) for name in fields}


def _add(functions: Functions, tool: FlatTool, place: str, namespace: str | None, ignored: Ignored) -> bool:
    if tool.type not in KINDS:
        ignored.add(f"tools.{tool.type}")
        return False
    if tool.name is None:
        raise _missing(place, tool.type, "name")
    ignored.hints_of(tool, "tools.")
    shown = tool.name
    if namespace is not None and shown in functions.shown:
        shown = qualified(namespace, shown)
    if shown in functions.shown:
        message = f"functions must have different names, but {shown!r} was given twice"
        raise LmserveError.invalid("tools", message)
    described = _described(tool)
    described["function"]["name"] = shown
    functions.shown[shown] = described
    if namespace is not None or tool.type == "custom":
        functions.forms[shown] = CallForm(name=tool.name, namespace=namespace, custom=tool.type == "custom")
    return True


def qualified(namespace: str, name: str) -> str:
    """A function's name where another one has it too."""
    return f"{namespace}{name}" if namespace.endswith("_") else f"{namespace}__{name}"


def message_calling(data: MessagesRequest | CountTokensRequest, ignored: Ignored) -> Calling:
    """What a message calls; as `chat_calling`."""
    tools: list[dict[str, Any]] = []
    left_out: set[str | None] = set()
    for at, tool in enumerate(data.tools or ()):
        if tool.type not in (None, "custom"):
            ignored.add(f"tools.{tool.type}")
            left_out.add(tool.name)
            continue
        ignored.hints_of(tool, "tools.")
        tools.append(_described(_definition(tool, f"tools[{at}]")))
    choice: Choice
    match data.tool_choice:
        case AnyTool():
            choice = _possible("required", tools, left_out=bool(left_out)) or "auto"
        case OneTool(name=name) if name in left_out:
            ignored.add("tool_choice")
            choice = "auto"
        case OneTool(name=name):
            choice = NamedTool(name)
        case NoTool():
            choice = "none"
        case _:
            choice = "auto"
    return _calling(tools, choice)


def _definition(tool: CustomTool, place: str) -> FunctionDefinition:
    for name in ("name", "input_schema"):
        if getattr(tool, name) is None:
            raise _missing(place, "custom", name)
    return FunctionDefinition(
        name=tool.name or "", description=tool.description, parameters=tool.input_schema, strict=tool.strict
    )


def _missing(place: str, kind: str, name: str) -> LmserveError:
    return LmserveError.invalid(f"{place}.{name}", f"{place} of type {kind} must have {name}", "missing_field")


def _possible(
    choice: Literal["none", "auto", "required"] | None, tools: Sequence[Any], *, left_out: bool
) -> Literal["none", "auto", "required"] | None:
    """Who must call a tool, of which none is left that could be called, may do without."""
    return "auto" if choice == "required" and left_out and not tools else choice


def _name_in(given: ToolName | NamedToolChoice) -> str | None:
    named = given.custom if given.type == "custom" else given.function
    return None if named is None else named.name


def _shown_name(given: FlatToolName, functions: Functions) -> str | None:
    if given.name is None:
        return None
    for shown, form in functions.forms.items():
        if form.name == given.name and given.namespace in (None, form.namespace):
            return shown
    return given.name


def _only(tools: Iterable[dict[str, Any]], names: Sequence[str | None]) -> list[dict[str, Any]]:
    return [tool for tool in tools if tool["function"]["name"] in names]


def _calling(tools: list[dict[str, Any]], choice: Choice | None) -> Calling:
    if not tools and choice not in (None, "none", "auto"):
        raise LmserveError.invalid("tool_choice", "tool_choice needs tools, but none were given")
    if not tools or choice == "none":
        return None, None
    if isinstance(choice, NamedTool):
        return tools, choice
    return tools, RequiredTools() if choice == "required" else AutoTools()


def _described(function: FunctionDefinition | CustomDefinition | FlatTool) -> dict[str, Any]:
    fields = ("name", "description", "parameters", "strict")
    described = {name: value for name in fields if (value := getattr(function, name, None)) is not None}
    if isinstance(function, CustomDefinition) or (isinstance(function, FlatTool) and function.type == "custom"):
        described["parameters"] = dict(CUSTOM_PARAMETERS)
    return {"type": "function", "function": described}
