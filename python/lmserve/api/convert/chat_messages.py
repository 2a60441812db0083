"""Messages of a request as chat templates take them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec

from lmserve.api.convert.unsupported import refuse_unsupported
from lmserve.engine.submission import Messages
from lmserve.errors import LmserveError
from lmserve.schemas.chat import ChatMessage, ChatRequest, ContentPart
from lmserve.schemas.generate import Message
from lmserve.schemas.tokenize import TokenizeRequest
from lmserve.schemas.tools import ToolCall


def messages_input(messages: Sequence[Message | ChatMessage], **options: Any) -> Messages:
    """The core's input; `options`: its other fields. Raises LmserveError (400) for what no text template can take."""
    return Messages([_for_template(message, at) for at, message in enumerate(messages)], **options)


def conversation(
    messages: Sequence[ChatMessage], data: ChatRequest | TokenizeRequest, tools: list[Any] | None = None
) -> Messages:
    """The core's input: `messages`, and how `data` wants them rendered. Raises LmserveError (400)."""
    continued = bool(data.continue_final_message)
    if continued and data.add_generation_prompt:
        message = "continue_final_message and add_generation_prompt exclude each other, but both were given as true"
        raise LmserveError.invalid("continue_final_message", message)
    if continued and messages[-1].role != "assistant":
        message = f"continue_final_message needs an assistant's message at the end, but one of {messages[-1].role} is"
        raise LmserveError.invalid("continue_final_message", message)
    variables = data.chat_template_kwargs
    return messages_input(
        messages,
        tools=tools,
        template_kwargs={} if variables is None else msgspec.to_builtins(variables),
        continue_final_message=continued,
        add_generation_prompt=data.add_generation_prompt,
    )


def _for_template(message: Message | ChatMessage, at: int) -> dict[str, Any]:
    # OpenAI renamed the system role; templates know the old name.
    role = "system" if message.role == "developer" else message.role
    if isinstance(message, Message):
        return {"role": role, "content": message.content}
    refuse_unsupported(message, f"messages[{at}].")
    content = message.content
    if content is None:
        if not message.tool_calls:
            message_text = f"messages[{at}] must have a content: only an assistant's message with tool_calls has none"
            raise LmserveError.invalid(f"messages[{at}].content", message_text, "missing_field")
        content = ""
    if not isinstance(content, str):
        content = "".join(_text_of(part, f"messages[{at}].content[{place}]") for place, part in enumerate(content))
    rendered: dict[str, Any] = {"role": role, "content": content}
    if message.tool_calls:
        _check_role(message, "tool_calls", "assistant", at)
        rendered["tool_calls"] = [_call_for_template(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        _check_role(message, "tool_call_id", "tool", at)
        rendered["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        rendered["name"] = message.name
    if message.reasoning_content is not None:
        rendered["reasoning_content"] = message.reasoning_content
    return rendered


def _check_role(message: ChatMessage, field: str, role: str, at: int) -> None:
    if message.role != role:
        text = f"messages[{at}].{field} belongs into a message of {role}, but the role is {message.role}"
        raise LmserveError.invalid(f"messages[{at}].{field}", text)


def _call_for_template(call: ToolCall) -> dict[str, Any]:
    """Templates write arguments as JSON themselves, and want them as an object."""
    arguments: Any = call.function.arguments
    with suppress(msgspec.MsgspecError, RecursionError):
        arguments = msgspec.json.decode(arguments, type=dict[str, Any])
    return {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": arguments}}


def _text_of(part: ContentPart, param: str) -> str:
    if part.type != "text":
        message = f"{param}: the model is text-only and takes parts of type text, but {part.type!r} was given"
        raise LmserveError.invalid(f"{param}.type", message, "unsupported_content_type")
    if part.text is None:
        raise LmserveError.invalid(f"{param}.text", f"{param}: a part of type text must have a text", "missing_field")
    return part.text
