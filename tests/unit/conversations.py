"""Seeded conversations to render: odd words, system messages or none, tools and their calls, reasoning, broken ones."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

WORDS = [
    "Hi",
    "你好\uff0c世界 👋🏽",
    "<b>&amp; \"quoted\" 'single'</b>",
    "  padded \n",
    "line1\nline2\n\n",
    "",
    "{{ not a template }} {% x %} {# y #}",
    "a\\b\t\0\x7f é",
    "</think> <think>x</think> y",
    "[INST] <|im_end|> </s>",
]
CALL_ID = "abcdefghi"

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get <the> weather & 'more' für 你",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "City"},
                    "days": {"type": "integer", "default": 3, "enum": [1, 2, 3]},
                    "unit": {"type": ["string", "null"]},
                    "nested": {
                        "type": "object",
                        "properties": {"z": {"type": "array", "items": {"type": "number"}}, "a": {"type": "boolean"}},
                        "required": ["z"],
                    },
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}},
    },
    {
        "type": "function",
        "function": {
            "name": "half",
            "description": "Half of it",
            "parameters": {"type": "object", "properties": {"x": {"type": "number"}}},
            "return": {"type": "string", "description": "Half"},
        },
    },
]


@dataclass
class Conversation:
    """What one render is given."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    kwargs: dict[str, Any] = field(default_factory=dict)


def conversation(rng: random.Random) -> Conversation:
    """One conversation, sometimes of a kind that a template refuses."""
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        messages.append({"role": rng.choice(["system", "system", "developer"]), "content": rng.choice(WORDS)})
    for _ in range(rng.randint(0, 3)):
        parts = [{"type": "text", "text": rng.choice(WORDS)} for _ in range(2)]
        messages.append({"role": "user", "content": rng.choice(WORDS) if rng.random() < 0.9 else parts})
        if rng.random() < 0.85:
            messages += _answer(rng)
    if rng.random() < 0.03:
        messages.append(rng.choice([{"role": "weird", "content": "x"}, {"role": "user"}]))
    kwargs: dict[str, Any] = {}
    if rng.random() < 0.3:
        kwargs["enable_thinking"] = rng.random() < 0.5
    if rng.random() < 0.1:
        kwargs |= rng.choice([{"date_string": "1 Jan 2024"}, {"reasoning_effort": "low"}, {"thinking": True}])
    tools = TOOLS[: rng.randint(1, 3)] if rng.random() < 0.4 else None
    return Conversation(messages, tools, rng.random() < 0.5, kwargs)


def _answer(rng: random.Random) -> list[dict[str, Any]]:
    answer: dict[str, Any] = {"role": "assistant", "content": rng.choice(WORDS)}
    if rng.random() < 0.3:
        answer[rng.choice(["reasoning_content", "thinking", "reasoning"])] = rng.choice(WORDS)
    if rng.random() < 0.6:
        return [answer]
    arguments = {
        "city": rng.choice(WORDS),
        "days": rng.choice([1, 2.5, 1e20, 1e-7, -0.0, True, None]),
        "n": {"z": [1, 2], "a": {}},
    }
    given = arguments if rng.random() < 0.6 else json.dumps(arguments)
    call = {"id": CALL_ID, "type": "function", "function": {"name": "get_weather", "arguments": given}}
    answer["tool_calls"] = [call] * rng.choice([1, 1, 2])
    if rng.random() < 0.5:
        answer["content"] = rng.choice([None, ""])
    result = {"role": "tool", "name": "get_weather", "tool_call_id": CALL_ID}
    results = [{**result, "content": rng.choice(WORDS)} for _ in answer["tool_calls"]]
    last = [{"role": "assistant", "content": rng.choice(WORDS)}] if rng.random() < 0.7 else []
    return [answer, *results, *last]
