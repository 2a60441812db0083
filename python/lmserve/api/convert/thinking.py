"""Converts the reasoning fields of each API into template variables and a limit of thinking tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from lmserve.api.convert.unsupported import Ignored
from lmserve.schemas.anthropic import CountTokensRequest, MessagesRequest
from lmserve.schemas.chat import ChatRequest
from lmserve.schemas.responses import ResponsesRequest
from lmserve.schemas.thinking import Disabled, Effort, Enabled, Reasoning, ThinkingSwitch

if TYPE_CHECKING:
    from lmserve._core import ChatTemplate

# Variables of templates that turn thoughts on and off: Qwen3 and GLM 4.5; DeepSeek V3.1 and Granite 3.2.
SWITCHES: Final = ("enable_thinking", "thinking")
# gpt-oss's, and its words; a template that has others in quotes knows these too.
EFFORT: Final = "reasoning_effort"
# Most tokens of thoughts by effort, where a template has no word for it; above these there is no limit.
BUDGETS: Final = {"minimal": 512, "low": 2048, "medium": 8192, "high": 32_768}
NEAREST: Final = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}


@dataclass(frozen=True)
class Thinking:
    """The settings for the core."""

    variables: dict[str, Any] = field(default_factory=dict)
    budget: int | None = None


@dataclass(frozen=True)
class Asked:
    """What a field asks for; None: nothing."""

    param: str
    on: bool | None = None
    effort: Effort | None = None
    budget: int | None = None


def chat_thinking(data: ChatRequest, template: ChatTemplate | None, ignored: Ignored) -> Thinking:
    """Of a chat completion. What its template has no switch for is added to `ignored`."""
    asked = [
        _by_effort("reasoning_effort", data.reasoning_effort),
        Asked("thinking_budget", budget=data.thinking_budget),
        Asked("enable_thinking", on=data.enable_thinking),
        *_by_reasoning(data.reasoning, ignored),
        *_by_switch(data.thinking, ignored),
    ]
    return _thinking(asked, template, ignored)


def response_thinking(data: ResponsesRequest, template: ChatTemplate | None, ignored: Ignored) -> Thinking:
    """Of a response; as `chat_thinking`."""
    return _thinking(_by_reasoning(data.reasoning, ignored), template, ignored)


def message_thinking(
    data: MessagesRequest | CountTokensRequest, template: ChatTemplate | None, ignored: Ignored
) -> Thinking:
    """Of a message; as `chat_thinking`."""
    effort = None if data.output_config is None else data.output_config.effort
    asked = [_by_effort("output_config.effort", effort), *_by_switch(data.thinking, ignored)]
    return _thinking(asked, template, ignored)


def _by_effort(param: str, effort: Effort | None) -> Asked:
    return Asked(param, on=None if effort is None else effort != "none", effort=effort)


def _by_reasoning(reasoning: Reasoning | None, ignored: Ignored) -> list[Asked]:
    if reasoning is None:
        return []
    ignored.hints_of(reasoning, "reasoning.")
    return [
        _by_effort("reasoning.effort", reasoning.effort),
        Asked("reasoning.max_tokens", budget=reasoning.max_tokens),
        Asked("reasoning.enabled", on=reasoning.enabled),
    ]


def _by_switch(switch: ThinkingSwitch | None, ignored: Ignored) -> list[Asked]:
    if switch is None:
        return []
    ignored.hints_of(switch, "thinking.")
    budget = switch.budget_tokens if isinstance(switch, Enabled) else None
    return [Asked("thinking", on=not isinstance(switch, Disabled), budget=budget)]


def _thinking(given: Iterable[Asked], template: ChatTemplate | None, ignored: Ignored) -> Thinking:
    asked = [each for each in given if each.on is not None or each.budget is not None]
    if not asked:
        return Thinking()
    known = frozenset() if template is None else frozenset(template.variables)
    budget = min((each.budget for each in asked if each.budget is not None), default=None)
    if budget == 0 or any(each.on is False for each in asked):
        # Where the template has no switch, the end of the thoughts is forced at their beginning.
        variables: dict[str, Any] = {name: False for name in SWITCHES if name in known}
        return Thinking(variables | _effort("none", known, template), 0)
    variables = {}
    thinks = template is not None and template.thinks
    for each in asked:
        found: dict[str, Any] = {name: True for name in SWITCHES if each.on and name in known}
        if each.effort is not None:
            found |= _effort(each.effort, known, template)
        # Who always thinks follows an effort by its budget, and does so if merely told to think.
        if not found and not thinks:
            ignored.add(each.param)
        variables |= found
    if budget is None and thinks and EFFORT not in known:
        efforts = [each.effort for each in asked if each.effort is not None]
        budget = min((BUDGETS[effort] for effort in efforts if effort in BUDGETS), default=None)
    return Thinking(variables, budget)


def _effort(effort: Effort, known: frozenset[str], template: ChatTemplate | None) -> dict[str, Any]:
    if EFFORT not in known or template is None:
        return {}
    has_word = any(f"{quote}{effort}{quote}" in template.source for quote in "'\"")
    return {EFFORT: effort if has_word else NEAREST.get(effort, effort)}
