"""Items of the Responses API: from a request's input to messages of a chat template, and to what is kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from lmserve.api.convert.chat_messages import CUSTOM_ARGUMENT, arguments_of
from lmserve.api.convert.compaction import is_ours, opened
from lmserve.api.convert.tools import Functions, qualified
from lmserve.api.convert.unsupported import Ignored, left_out
from lmserve.errors import LmserveError
from lmserve.schemas.response_reply import (
    CompactionItem,
    OutputCall,
    OutputCustomCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    ReasoningText,
    StoredCustomOutput,
    StoredItem,
    StoredMessage,
    StoredOutput,
    StoredPart,
)
from lmserve.schemas.responses import InputItem, InputPart

TEXT_PARTS: Final = ("input_text", "output_text", "text")
REASONING_PARTS: Final = ("reasoning_text", "text")
OUTPUTS: Final = ("function_call_output", "custom_tool_call_output")
NEEDED: Final = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "custom_tool_call": ("call_id", "name", "input"),
    "custom_tool_call_output": ("call_id", "output"),
    "reasoning": (),
    "compaction": ("encrypted_content",),
}
# What the model reads before a summary of what was said.
SUMMED_UP: Final = "Summary of our conversation so far:\n\n"


def known_items(items: Sequence[InputItem], ignored: Ignored, param: str = "input") -> list[InputItem]:
    """Those that the model can be shown; the others, what a server's own tools did and summaries that only another
    server can read, are added to `ignored`.

    Raises LmserveError (400) for an item that lacks a field.
    """
    known = []
    for at, item in enumerate(items):
        kind = _kind(item)
        for field, content in (("content", item.content), ("output", item.output)):
            if content is not None and not isinstance(content, str):
                _check_parts(content, f"{param}[{at}].{field}")
        if kind not in NEEDED:
            ignored.add(f"{param}.{kind}")
            continue
        for field in NEEDED[kind]:
            if getattr(item, field) is None:
                message = f"{param}[{at}]: a {kind} must have {field}"
                raise LmserveError.invalid(f"{param}[{at}].{field}", message, "missing_field")
        if kind == "compaction" and not is_ours(item.encrypted_content or ""):
            ignored.add(f"{param}.compaction")
            continue
        known.append(item)
        if kind in OUTPUTS and not isinstance(item.output, str):
            for part in item.output or ():
                if part.type not in (*TEXT_PARTS, "refusal"):
                    ignored.add(f"{param}.{kind}.{part.type}")
    return known


def _check_parts(parts: Sequence[InputPart], param: str) -> None:
    for at, part in enumerate(parts):
        if part.type in (*TEXT_PARTS, *REASONING_PARTS) and part.text is None:
            message = f"{param}[{at}]: a part of type {part.type} must have a text"
            raise LmserveError.invalid(f"{param}[{at}].text", message, "missing_field")


def messages_of(items: Sequence[InputItem], functions: Functions, param: str = "input") -> list[dict[str, Any]]:
    """What known `items` stand for in a chat template. Raises LmserveError (400) for parts that are no text."""
    messages: list[dict[str, Any]] = []
    thoughts = ""
    for at, item in enumerate(items):
        match _kind(item):
            case "reasoning":
                thoughts += _text_of(item.content or "", f"{param}[{at}].content", REASONING_PARTS)
                continue
            case "compaction":
                summary = opened(item.encrypted_content or "", f"{param}[{at}].encrypted_content")
                messages.append({"role": "user", "content": SUMMED_UP + summary})
            case "function_call_output" | "custom_tool_call_output":
                output = _given_by(item, f"{param}[{at}].output")
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
            case "function_call" | "custom_tool_call":
                # Calls of one answer are one message with its words.
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""})
                messages[-1].setdefault("tool_calls", []).append(_call(item, functions))
            case _:
                role = "system" if item.role == "developer" else item.role
                text = _text_of(item.content or "", f"{param}[{at}].content")
                messages.append({"role": role, "content": text})
        if thoughts and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("reasoning_content", thoughts)
        thoughts = ""
    return messages


def answered_items(output: Sequence[OutputItem]) -> list[StoredItem]:
    """What is kept of an answer in a conversation."""
    return [_answered(item) for item in output]


def _answered(item: OutputItem) -> StoredItem:
    if not isinstance(item, OutputMessage):
        return item
    parts = [StoredPart(type="output_text", text=part.text, annotations=[]) for part in item.content]
    return StoredMessage(id=item.id, role="assistant", status=item.status, content=parts)


def stored_items(items: Sequence[InputItem], unique: str) -> list[StoredItem]:
    """What is kept of `items`, which are known; `unique` makes their ids so."""
    return [_stored(item, f"{unique}_{at}") for at, item in enumerate(items)]


def _stored(item: InputItem, unique: str) -> StoredItem:
    match _kind(item):
        case "reasoning":
            text = _text_of(item.content or "", "", REASONING_PARTS)
            content = [ReasoningText(text=text)] if text else []
            return OutputReasoning(id=f"rs_{unique}", status="completed", content=content)
        case "compaction":
            return CompactionItem(id=f"cmp_{unique}", encrypted_content=item.encrypted_content or "")
        case "function_call_output":
            return StoredOutput(id=f"fco_{unique}", call_id=item.call_id or "", output=_given_by(item))
        case "custom_tool_call_output":
            return StoredCustomOutput(id=f"ctco_{unique}", call_id=item.call_id or "", output=_given_by(item))
        case "function_call":
            return OutputCall(
                id=f"fc_{unique}",
                status="completed",
                call_id=item.call_id or "",
                name=item.name or "",
                namespace=msgspec.UNSET if item.namespace is None else item.namespace,
                arguments=_written(item.arguments),
            )
        case "custom_tool_call":
            return OutputCustomCall(
                id=f"ctc_{unique}",
                status="completed",
                call_id=item.call_id or "",
                name=item.name or "",
                input=item.input or "",
            )
        case _:
            text = _text_of(item.content or "", "")
            part = StoredPart(type="input_text", text=text)
            if item.role == "assistant":
                part = StoredPart(type="output_text", text=text, annotations=[])
            return StoredMessage(id=f"msg_{unique}", role=item.role or "user", content=[part])


def _kind(item: InputItem) -> str:
    return "message" if item.type is None else item.type


def _written(arguments: str | dict[str, Any] | None) -> str:
    return arguments if isinstance(arguments, str) else msgspec.json.encode(arguments or {}).decode()


def _call(item: InputItem, functions: Functions) -> dict[str, Any]:
    name = item.name or ""
    if item.namespace is not None and (full := qualified(item.namespace, name)) in functions.shown:
        name = full
    custom = item.type == "custom_tool_call"
    arguments = {CUSTOM_ARGUMENT: item.input} if custom else arguments_of(item.arguments)
    return {"id": item.call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _given_by(item: InputItem, param: str = "output") -> str:
    """What a tool gave; a note stands for what is no text. Raises LmserveError (400) for a text that is missing."""
    given = item.output or ""
    if isinstance(given, str):
        return given
    noted = [
        part if part.type in (*TEXT_PARTS, "refusal") else InputPart(type="text", text=left_out(part.type))
        for part in given
    ]
    return _text_of(noted, param)


def _text_of(content: str | Sequence[InputPart], param: str, kinds: Sequence[str] = TEXT_PARTS) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for at, part in enumerate(content):
        if part.type == "refusal":
            texts.append(part.refusal or "")
            continue
        if part.type not in kinds:
            message = f"the model is text-only and takes parts of type {kinds[0]} here, but {part.type!r} was given"
            raise LmserveError.invalid(f"{param}[{at}].type", f"{param}[{at}]: {message}", "unsupported_content_type")
        if part.text is None:
            message = f"{param}[{at}]: a part of type {part.type} must have a text"
            raise LmserveError.invalid(f"{param}[{at}].text", message, "missing_field")
        texts.append(part.text)
    return "".join(texts)
