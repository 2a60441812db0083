"""Converts messages of Anthropic's API into messages for chat templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from lmserve.api.convert.preamble import stable
from lmserve.api.convert.thinking import Thinking
from lmserve.api.convert.tools import message_calling
from lmserve.api.convert.unsupported import Ignored, left_out
from lmserve.engine.submission import Messages
from lmserve.errors import LmserveError
from lmserve.schemas.anthropic import (
    LEFT_OUT,
    ContentBlock,
    CountTokensRequest,
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
BLOCKS: Final = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "tool_use"),
    "system": ("text",),
}
SERVER_RESULT: Final = "_tool_result"


def conversation(data: MessagesRequest | CountTokensRequest, thinking: Thinking, ignored: Ignored) -> Messages:
    """The system prompt and the turns. Raises LmserveError (400) for what no text template can take."""
    turns: list[dict[str, Any]] = []
    if data.system is not None:
        turns.append({"role": "system", "content": stable(_system_of(data.system), ignored)})
    for at, message in enumerate(data.messages):
        for turn in _turns_of(message, f"messages[{at}].content", ignored):
            last = turns[-1] if turns else {}
            if last.get("role") == turn["role"] and last.keys() == turn.keys() == PLAIN:
                last["content"] += TURN_BREAK + turn["content"]
            else:
                turns.append(turn)
    tools, _ = message_calling(data, ignored)
    return Messages(
        turns,
        tools=tools,
        continue_final_message=turns[-1]["role"] == "assistant" and "tool_calls" not in turns[-1],
        template_kwargs=thinking.variables,
    )


def _system_of(system: str | Sequence[TextPart]) -> str:
    if isinstance(system, str):
        return system
    # A part that is cut must not stick to the next one: agents send one paragraph a part.
    first, *rest = system or [TextPart(type="text", text="")]
    if rest and first.type == "text" and first.text and first.text.startswith("x-anthropic-billing-header:"):
        return f"{first.text}\n{_text_of(rest, 'system')}"
    return _text_of(system, "system")


def _turns_of(message: InputMessage, param: str, ignored: Ignored) -> list[dict[str, Any]]:
    """The user's words come after what the tools gave, as the roles of templates are separate turns."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    blocks = [
        (block, f"{param}[{at}]")
        for at, block in enumerate(message.content)
        if _is_taken(block, message.role, f"{param}[{at}]", ignored)
    ]
    text = "".join(block.text or "" for block, _ in blocks)
    if message.role == "system":
        return [{"role": "system", "content": text}]
    if message.role == "user":
        results = [_result(block, place, ignored) for block, place in blocks if block.type == "tool_result"]
        said = any(block.type == "text" for block, _ in blocks)
        return [*results, {"role": "user", "content": text}] if said or not results else results
    turn: dict[str, Any] = {"role": "assistant", "content": text}
    if calls := [_call(block) for block, _ in blocks if block.type == "tool_use"]:
        turn["tool_calls"] = calls
    if thoughts := "".join(block.thinking or "" for block, _ in blocks):
        turn["reasoning_content"] = thoughts
    return [turn]


def _is_taken(block: ContentBlock, role: str, place: str, ignored: Ignored) -> bool:
    """False: it is left out. Raises LmserveError (400) for what a message of `role` cannot hold."""
    if block.type not in BLOCKS[role]:
        if block.type in LEFT_OUT or block.type.endswith(SERVER_RESULT):
            ignored.add(f"messages.{block.type}")
            return False
        allowed = ", ".join(BLOCKS[role])
        message = (
            f"the model is text-only: {role} messages may have blocks of type {allowed}, but {block.type!r} was given"
        )
        raise LmserveError.invalid(f"{place}.type", f"{place}: {message}", "unsupported_content_type")
    for field in FIELDS[block.type]:
        if getattr(block, field) is None:
            message = f"{place}: a block of type {block.type} must have {field}"
            raise LmserveError.invalid(f"{place}.{field}", message, "missing_field")
    return True


def _call(block: ContentBlock) -> dict[str, Any]:
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}


def _result(block: ContentBlock, param: str, ignored: Ignored) -> dict[str, Any]:
    if isinstance(block.content, dict):
        message = f"{param}: the content of a tool_result is a text or a list of parts, but an object was given"
        raise LmserveError.invalid(f"{param}.content", message)
    text = "" if block.content is None else _text_of(block.content, f"{param}.content", ignored)
    return {
        "role": "tool",
        "tool_call_id": block.tool_use_id,
        "content": f"Error: {text}" if block.is_error else text,
    }


def _text_of(content: str | Sequence[TextPart], param: str, ignored: Ignored | None = None) -> str:
    """The names of tools that were found stand in lines of their own.

    `ignored`: of a tool's result, in whose text a note stands for what is no text. Raises LmserveError (400).
    """
    if isinstance(content, str):
        return content
    texts = []
    for at, part in enumerate(content):
        if part.type == "tool_reference":
            texts.append(f"{part.tool_name or ''}\n")
            continue
        if part.type != "text" and ignored is not None:
            ignored.add(f"messages.tool_result.{part.type}")
            texts.append(left_out(part.type))
            continue
        if part.type != "text":
            message = f"the model is text-only and takes blocks of type text, but {part.type!r} was given"
            raise LmserveError.invalid(f"{param}[{at}].type", f"{param}[{at}]: {message}", "unsupported_content_type")
        if part.text is None:
            message = f"{param}[{at}]: a block of type text must have a text"
            raise LmserveError.invalid(f"{param}[{at}].text", message, "missing_field")
        texts.append(part.text)
    return "".join(texts)
