"""What several examples have."""

from __future__ import annotations

from typing import Final

MODEL: Final = "SmolLM2-135M-Instruct"
CREATED: Final = 1767225600
ASKED: Final = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
TURN_USAGE: Final = {"prompt_tokens": 31, "history_tokens": 18, "cached_tokens": 16, "completion_tokens": 4}
CITY: Final = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 30}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Final = {"name": "get_weather", "description": "The weather in a city.", "parameters": CITY}
