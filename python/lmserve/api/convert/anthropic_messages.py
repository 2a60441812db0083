"""Messages of Anthropic's API as chat templates take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from lmserve.api.convert.tools import message_calling
from lmserve.engine.submission import Messages
from lmserve.errors import LmserveError
from lmserve.schemas.anthropic import (
    ContentBlock,
    CountTokensRequest,
    Disabled,
    InputMessage,
    MessagesRequest,
    TextPart,
)

TURN_BREAK: Final = "\n\n"  # between messages of one role
PLAIN: Final = {"role", "content"}
FIELDS: Final = {
    "text": ("text",),
    "thinking": ("thinking",),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id",),
}
# What a message of each role may hold.
BLOCKS: Final = {"user": ("text", "tool_result"), "assistant": ("text", "thinking", "tool_use")}


def conversation(data: MessagesRequest | CountTokensRequest) -> Messages:
    """The system prompt and the turns. Raises LmserveError (400) for what no text template can take."""
    turns: list[dict[str, Any]] = []
    if data.system is not None:
        turns.append({"role": "system", "content": _text_of(data.system, "system")})
    for at, message in enumerate(data.messages):
        for turn in _turns_of(message, f"messages[{at}].content"):
            last = turns[-1] if turns else {}
            if last.get("role") == turn["role"] and last.keys() == turn.keys() == PLAIN:
                last["content"] += TURN_BREAK + turn["content"]
            else:
                turns.append(turn)
    tools, _ = message_calling(data)
    return Messages(
        turns,
        tools=tools,
        continue_final_message=turns[-1]["role"] == "assistant" and "tool_calls" not in turns[-1],
        template_kwargs=_variables(data),
    )


def _variables(data: MessagesRequest | CountTokensRequest) -> dict[str, Any]:
    if data.thinking is None:
        return {}
    thinks = not isinstance(data.thinking, Disabled)
    return {"enable_thinking": thinks, "thinking": thinks}


def _turns_of(message: InputMessage, param: str) -> list[dict[str, Any]]:
    """The user's words come after what the tools gave, as the roles of templates are separate turns."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    blocks = [
        (block, f"{param}[{at}]") for at, block in enumerate(message.content) if _check(block, message.role, param, at)
    ]
    text = "".join(block.text or "" for block, _ in blocks)
    if message.role == "user":
        results = [_result(block, place) for block, place in blocks if block.type == "tool_result"]
        said = any(block.type == "text" for block, _ in blocks)
        return [*results, {"role": "user", "content": text}] if said or not results else results
    turn: dict[str, Any] = {"role": "assistant", "content": text}
    if calls := [_call(block) for block, _ in blocks if block.type == "tool_use"]:
        turn["tool_calls"] = calls
    if thoughts := "".join(block.thinking or "" for block, _ in blocks):
        turn["reasoning_content"] = thoughts
    return [turn]


def _check(block: ContentBlock, role: str, param: str, at: int) -> bool:
    if block.type not in BLOCKS[role]:
        allowed = ", ".join(BLOCKS[role])
        message = f"the model is text-only, and {role} messages hold blocks of {allowed}, but {block.type!r} was given"
        raise LmserveError.invalid(f"{param}[{at}].type", f"{param}[{at}]: {message}", "unsupported_content_type")
    for field in FIELDS[block.type]:
        if getattr(block, field) is None:
            message = f"{param}[{at}]: a block of type {block.type} must have {field}"
            raise LmserveError.invalid(f"{param}[{at}].{field}", message, "missing_field")
    return True


def _call(block: ContentBlock) -> dict[str, Any]:
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}


def _result(block: ContentBlock, param: str) -> dict[str, Any]:
    text = "" if block.content is None else _text_of(block.content, f"{param}.content")
    return {
        "role": "tool",
        "tool_call_id": block.tool_use_id,
        "content": f"Error: {text}" if block.is_error else text,
    }


def _text_of(content: str | Sequence[TextPart], param: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for at, part in enumerate(content):
        if part.type != "text":
            message = f"the model is text-only and takes blocks of type text, but {part.type!r} was given"
            raise LmserveError.invalid(f"{param}[{at}].type", f"{param}[{at}]: {message}", "unsupported_content_type")
        if part.text is None:
            message = f"{param}[{at}]: a block of type text must have a text"
            raise LmserveError.invalid(f"{param}[{at}].text", message, "missing_field")
        texts.append(part.text)
    return "".join(texts)
