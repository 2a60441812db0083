"""Items of the Responses API: from a request's input to messages of a chat template, and to what is kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec

from lmserve.errors import LmserveError
from lmserve.schemas.responses import (
    InputItem,
    InputPart,
    OutputCall,
    OutputReasoning,
    ReasoningText,
    StoredItem,
    StoredMessage,
    StoredOutput,
    StoredPart,
)

TEXT_PARTS: Final = ("input_text", "output_text", "text")
REASONING_PARTS: Final = ("reasoning_text",)
NEEDED: Final = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
}


def check_items(items: Sequence[InputItem]) -> None:
    """Raises LmserveError (400) for what no text template can take."""
    for at, item in enumerate(items):
        kind = item.type or "message"
        if kind not in NEEDED:
            message = f"input[{at}]: items of type {', '.join(NEEDED)} are taken, but {item.type!r} was given"
            raise LmserveError.invalid(f"input[{at}].type", message, "unsupported_parameter")
        for field in NEEDED[kind]:
            if getattr(item, field) is None:
                message = f"input[{at}]: a {kind} must have {field}"
                raise LmserveError.invalid(f"input[{at}].{field}", message, "missing_field")


def messages_of(items: Sequence[InputItem]) -> list[dict[str, Any]]:
    """What checked `items` stand for in a chat template. Raises LmserveError (400) for parts that are no text."""
    messages: list[dict[str, Any]] = []
    thoughts = ""
    for at, item in enumerate(items):
        match item.type or "message":
            case "reasoning":
                thoughts += _text_of(item.content or "", f"input[{at}].content", REASONING_PARTS)
                continue
            case "function_call_output":
                output = _text_of(item.output or "", f"input[{at}].output")
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
            case "function_call":
                # Calls of one answer are one message with its words.
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""})
                messages[-1].setdefault("tool_calls", []).append(_call(item))
            case _:
                role = "system" if item.role == "developer" else item.role
                text = _text_of(item.content or "", f"input[{at}].content")
                messages.append({"role": role, "content": text})
        if thoughts and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("reasoning_content", thoughts)
        thoughts = ""
    return messages


def stored_items(items: Sequence[InputItem], unique: str) -> list[StoredItem]:
    """What is kept of `items`, which were checked; `unique` makes their ids so."""
    return [_stored(item, f"{unique}_{at}") for at, item in enumerate(items)]


def _stored(item: InputItem, unique: str) -> StoredItem:
    match item.type or "message":
        case "reasoning":
            text = _text_of(item.content or "", "", REASONING_PARTS)
            content = [ReasoningText(text=text)] if text else []
            return OutputReasoning(id=f"rs_{unique}", status="completed", content=content)
        case "function_call_output":
            return StoredOutput(id=f"fco_{unique}", call_id=item.call_id or "", output=_text_of(item.output or "", ""))
        case "function_call":
            return OutputCall(
                id=f"fc_{unique}",
                status="completed",
                call_id=item.call_id or "",
                name=item.name or "",
                arguments=item.arguments or "",
            )
        case _:
            text = _text_of(item.content or "", "")
            part = StoredPart(type="input_text", text=text)
            if item.role == "assistant":
                part = StoredPart(type="output_text", text=text, annotations=[])
            return StoredMessage(id=f"msg_{unique}", role=item.role or "user", content=[part])


def _call(item: InputItem) -> dict[str, Any]:
    """Templates write arguments as JSON themselves, and want them as an object."""
    arguments: Any = item.arguments
    with suppress(msgspec.MsgspecError, RecursionError):
        arguments = msgspec.json.decode(item.arguments or "", type=dict[str, Any])
    return {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": arguments}}


def _text_of(content: str | Sequence[InputPart], param: str, kinds: Sequence[str] = TEXT_PARTS) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for at, part in enumerate(content):
        if part.type not in kinds:
            message = f"the model is text-only and takes parts of type {kinds[0]} here, but {part.type!r} was given"
            raise LmserveError.invalid(f"{param}[{at}].type", f"{param}[{at}]: {message}", "unsupported_content_type")
        if part.text is None:
            message = f"{param}[{at}]: a part of type {part.type} must have a text"
            raise LmserveError.invalid(f"{param}[{at}].text", message, "missing_field")
        texts.append(part.text)
    return "".join(texts)
