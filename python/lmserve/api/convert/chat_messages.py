"""Converts messages of a request into messages for chat templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any, Final

import msgspec

from lmserve.api.convert.preamble import stable
from lmserve.api.convert.unsupported import Ignored, left_out
from lmserve.engine.submission import Messages
from lmserve.errors import LmserveError
from lmserve.schemas.chat import ChatMessage, ChatRequest, ContentPart
from lmserve.schemas.generate import Message
from lmserve.schemas.tokenize import TokenizeRequest
from lmserve.schemas.tools import ReplayedCall, ReplayedCustom, ReplayedFunction

TEXT_PARTS: Final = ("text", "input_text", "output_text")
READ: Final = (*TEXT_PARTS, "refusal")
# Names of the one argument of custom tools, and of calls that came without an id.
CUSTOM_ARGUMENT: Final = "input"
UNNAMED_CALL: Final = "call"


def messages_input(
    messages: Sequence[Message | ChatMessage], ignored: Ignored | None = None, **options: Any
) -> Messages:
    """The core's input; `options`: its other fields. Raises LmserveError (400) for what no text template can take.

    `ignored`: what is left out of the results of tools is added to it.
    """
    return Messages([_for_template(message, at, ignored) for at, message in enumerate(messages)], **options)


def conversation(
    messages: Sequence[ChatMessage],
    data: ChatRequest | TokenizeRequest,
    tools: list[Any] | None = None,
    variables: Mapping[str, Any] = MappingProxyType({}),
    ignored: Ignored | None = None,
) -> Messages:
    """The core's input: `messages`, and how `data` wants them rendered. Raises LmserveError (400).

    `variables`: of the template; those that `data` names itself are before them. `ignored`: of an agent's request.
    """
    continued = bool(data.continue_final_message)
    if continued and data.add_generation_prompt:
        message = "continue_final_message and add_generation_prompt cannot both be true"
        raise LmserveError.invalid("continue_final_message", message)
    if continued and messages[-1].role != "assistant":
        message = (
            "continue_final_message needs an assistant's message at the end, but the last message has the "
            f"role {messages[-1].role}"
        )
        raise LmserveError.invalid("continue_final_message", message)
    named = data.chat_template_kwargs
    found = messages_input(
        messages,
        ignored,
        tools=tools,
        template_kwargs=dict(variables) | ({} if named is None else msgspec.to_builtins(named)),
        continue_final_message=continued,
        add_generation_prompt=data.add_generation_prompt,
    )
    first = found.messages[0]
    if ignored is not None and first["role"] == "system":
        first["content"] = stable(first["content"], ignored)
    return found


def _for_template(message: Message | ChatMessage, at: int, ignored: Ignored | None) -> dict[str, Any]:
    # OpenAI renamed the system role, and that of functions; templates know one name of each.
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    if isinstance(message, Message):
        return {"role": role, "content": message.content}
    content = message.content
    if content is None:
        content = message.refusal or ""
    if not isinstance(content, str):
        if role == "tool" and ignored is not None:
            for part in content:
                if part.type not in READ:
                    ignored.add(f"messages.tool.{part.type}")
        parts = [_text_of(part, f"messages[{at}].content[{place}]", role) for place, part in enumerate(content)]
        content = "".join(parts)
    rendered: dict[str, Any] = {"role": role, "content": content}
    calls = [
        _call_for_template(call, f"messages[{at}].tool_calls[{place}]")
        for place, call in enumerate(message.tool_calls or ())
    ]
    if message.function_call is not None:
        calls.append(_called(UNNAMED_CALL, message.function_call))
    if calls:
        _check_role(message, "tool_calls" if message.tool_calls else "function_call", "assistant", at)
        rendered["tool_calls"] = calls
    if message.tool_call_id is not None:
        _check_role(message, "tool_call_id", "tool", at)
        rendered["tool_call_id"] = message.tool_call_id
    if message.role == "function":
        rendered.setdefault("tool_call_id", UNNAMED_CALL)
    if message.name is not None:
        rendered["name"] = message.name
    thoughts = message.reasoning_content if message.reasoning_content is not None else message.reasoning
    if thoughts is not None:
        rendered["reasoning_content"] = thoughts
    return rendered


def _check_role(message: ChatMessage, field: str, role: str, at: int) -> None:
    if message.role != role:
        text = f"messages[{at}].{field} is only allowed in a message of {role}, but the role is {message.role}"
        raise LmserveError.invalid(f"messages[{at}].{field}", text)


def _call_for_template(call: ReplayedCall, param: str) -> dict[str, Any]:
    called = call.function if call.type == "function" else call.custom
    if called is None:
        message = f"{param}: a call of type {call.type} must have {call.type}"
        raise LmserveError.invalid(f"{param}.{call.type}", message, "missing_field")
    return _called(call.id or UNNAMED_CALL, called)


def _called(call_id: str, called: ReplayedFunction | ReplayedCustom) -> dict[str, Any]:
    if isinstance(called, ReplayedCustom):
        arguments: Any = {CUSTOM_ARGUMENT: called.input}
    else:
        arguments = arguments_of(called.arguments)
    return {"id": call_id, "type": "function", "function": {"name": called.name, "arguments": arguments}}


def arguments_of(given: str | dict[str, Any] | None) -> Any:
    """Templates write arguments as JSON themselves, and want them as an object. A text that is none stays one."""
    if not isinstance(given, str):
        return given or {}
    arguments: Any = given
    with suppress(msgspec.MsgspecError, RecursionError):
        arguments = msgspec.json.decode(given, type=dict[str, Any])
    return arguments


def _text_of(part: ContentPart, param: str, role: str) -> str:
    if part.type == "refusal":
        return part.refusal or ""
    if part.type not in TEXT_PARTS and role == "tool":
        return left_out(part.type)
    if part.type not in TEXT_PARTS:
        message = f"{param}: the model is text-only and takes parts of type text, but {part.type!r} was given"
        raise LmserveError.invalid(f"{param}.type", message, "unsupported_content_type")
    if part.text is None:
        raise LmserveError.invalid(f"{param}.text", f"{param}: a part of type text must have a text", "missing_field")
    return part.text
