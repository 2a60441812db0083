"""The formats of calls and thoughts that chat templates show, and what goes on after a call as they render it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from lmserve import _core
from lmserve.config import REASONING_PARSERS, TOOL_PARSERS
from lmserve.errors import LmserveError
from test_template import compiled

HERE = Path(__file__).parent
IDS = ["abcdefghi", "jklmnopqr"]
CALLS = [("get_weather", {"city": "Rome"}), ("now", {"zone": "UTC"})]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "City"}}, "required": ["city"]}
TOOLS = json.dumps(
    [
        {"type": "function", "function": {"name": name, "description": f"Does {name}", "parameters": PARAMETERS}}
        for name, _ in CALLS
    ]
).encode()

# Template, format of calls, format of thoughts, and what ends the last call.
SHOWN = [
    ("call_templates/command-r7b", "command", "command", "<|END_ACTION|>"),
    ("call_templates/deepseek-r1", "deepseek_v3", "think", "<\uff5ctool▁calls▁end\uff5c>"),
    ("call_templates/deepseek-v3.1", "hermes", "think", None),  # it does not show tools
    ("call_templates/deepseek-v3.2", "deepseek_v32", "think", "</\uff5cDSML\uff5cfunction_calls>"),
    ("call_templates/functionary-v3.1", "functionary_v31", None, "</function>"),
    ("call_templates/functionary-v3.2", "functionary_v32", None, '{"zone": "UTC"}'),
    ("call_templates/gemma-4", "gemma4", "gemma4", "<tool_call|>"),
    ("call_templates/glm-4.7", "glm47", "think", "</tool_call>"),
    ("call_templates/granite-4", "hermes", None, "</tool_call>"),
    ("call_templates/kimi-k2", "kimi_k2", None, "<|tool_calls_section_end|>"),
    ("call_templates/lfm2.5", "lfm2", "think", "<|tool_call_end|>"),
    ("call_templates/minimax-m1", "minimax_m1", None, "</tool_calls>"),
    ("call_templates/minimax-m2", "minimax_m2", "think", "</minimax:tool_call>"),
    ("call_templates/ministral-3", "mistral_args", "mistral", '{"zone": "UTC"}'),
    ("call_templates/qwen3.5", "qwen3_coder", "think", "</tool_call>"),
    ("templates/glm-4.6", "glm", "think", "</tool_call>"),
    ("templates/gpt-oss", "harmony", "harmony", None),  # one call in a message
    ("templates/granite-3.3", "granite", "think", None),  # it does not show calls
    ("templates/llama-3.1", "llama3", None, None),  # one call in a message
    ("templates/mistral-nemo", "mistral", None, "}]"),
    ("templates/phi-4-mini", "phi4", None, None),  # it shows the tools of its system message, and no calls
    ("templates/qwen2.5", "hermes", None, "</tool_call>"),
    ("templates/qwen3", "hermes", "think", "</tool_call>"),
    ("templates/qwen3-coder", "qwen3_coder", None, "</tool_call>"),
    ("templates/smollm2", "hermes", None, None),
]


def template_of(name: str) -> _core.ChatTemplate:
    return compiled((HERE / f"{name}.jinja").read_text())


@pytest.mark.parametrize(("name", "calls", "thoughts", "_"), SHOWN, ids=[shown[0] for shown in SHOWN])
def test_a_template_shows_its_formats(name: str, calls: str, thoughts: str | None, _: str | None) -> None:
    template = template_of(name)
    assert (template.tool_format, template.thought_format) == (calls, thoughts)


def conversation(count: int, *, as_text: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Up to the answer with `count` calls, and what these gave."""
    calls, results = [], []
    for call_id, (name, arguments) in list(zip(IDS, CALLS, strict=True))[-count:]:
        given = json.dumps(arguments) if as_text else arguments
        calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": given}})
        results.append({"role": "tool", "tool_call_id": call_id, "name": name, "content": f"result of {name}"})
    asked: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
    return [*asked, {"role": "assistant", "content": "", "tool_calls": calls}], results


def ends_of(name: str) -> tuple[str | None, int]:
    ends = next(shown[3] for shown in SHOWN if shown[0] == name)
    return {"templates/gpt-oss": ("}", 1), "templates/llama-3.1": ("}}", 1)}.get(name, (ends, 2))


CALLING = [shown[0] for shown in SHOWN if ends_of(shown[0])[0] is not None]


@pytest.mark.parametrize("name", CALLING)
def test_tool_results_go_on_as_the_whole_conversation_is_rendered(name: str) -> None:
    template = template_of(name)
    end, count = ends_of(name)
    assert end is not None
    called, results = conversation(count, as_text="functionary-v3.2" in name)
    whole = template.render(json.dumps([*called, *results]).encode(), tools=TOOLS)
    # Behind the last call: what tools gave does not hold what ends one.
    at = whole.rindex(end, 0, whole.index("result of")) + len(end)
    names = [call["function"]["name"] for call in called[-1]["tool_calls"]]
    appended = template.render_continued(json.dumps(results).encode(), open_assistant=True, called=names, tools=TOOLS)
    assert whole[:at] + appended == whole
    assert "result of now" in appended


def test_tool_results_go_on_without_names() -> None:
    result = [{"role": "tool", "tool_call_id": "abcdefghi", "content": "22 degrees"}]
    for name in CALLING:
        text = template_of(name).render_continued(json.dumps(result).encode(), open_assistant=True, tools=TOOLS)
        assert "22 degrees" in text, name
        assert "XANSWER" not in text, name


def test_every_format_has_a_name_that_the_command_line_takes() -> None:
    for setting, names in (("tool_parser", TOOL_PARSERS), ("reasoning_parser", REASONING_PARSERS)):
        with pytest.raises(LmserveError) as caught:
            _core.ChatTemplate("", **{setting: "nothing"})  # type: ignore[arg-type]
        known = re.search("must be one of (.*), but", str(caught.value))
        assert known is not None
        assert known[1].split(", ") == list(names)


def test_phi_4_mini_gets_its_tools_in_the_system_message_and_calls_in_its_words() -> None:
    called, results = conversation(2, as_text=False)
    messages = json.dumps([{"role": "system", "content": "Be brief."}, *called, *results]).encode()
    text = template_of("templates/phi-4-mini").render_prompt(messages, tools=TOOLS)
    system, _, rest = text.partition("<|end|>")
    before, _, listed = system.removesuffix("<|/tool|>").partition("<|tool|>")
    assert before == "<|system|>Be brief."
    assert json.loads(listed) == [tool["function"] for tool in json.loads(TOOLS)]
    expected = json.dumps([{"name": name, "arguments": arguments} for name, arguments in CALLS])
    wrote = rest.partition("<|assistant|><|tool_call|>")[2].partition("<|/tool_call|>")[0]
    assert json.loads(wrote) == json.loads(expected)
    assert "<|tool_response|>result of now<|end|>" in rest
    assert rest.endswith("<|assistant|>")
    # Without a system message there is one for them.
    alone = template_of("templates/phi-4-mini").render_prompt(json.dumps(called[:1]).encode(), tools=TOOLS)
    assert alone.startswith("<|system|><|tool|>[{")


# Templates of which only what tells the format is here: too long, or not published as one.
PIECES = {
    "llama 4": ("{{- '<|python_start|>' }}{{- '<|python_end|>' }}{{ tools }}", "pythonic"),
    "llama 4 of vLLM": (
        "{{- 'Use exact format: [func_name1(param1=value1, func_name2(...)]' }}{{ tools }}",
        "pythonic",
    ),
    "deepseek v4": (
        "{%- set dsml_token = '\uff5cDSML\uff5c' -%}<{{ dsml_token }}tool_calls>{{ tools }}",
        "deepseek_v4",
    ),
    "phi 4 of llama.cpp": ("{{ '<|tool|>' + (tools | tojson) + '<|/tool|>' }}", "phi4"),
}


@pytest.mark.parametrize("name", PIECES)
def test_pieces_of_templates_show_their_formats(name: str) -> None:
    source, expected = PIECES[name]
    assert compiled(source).tool_format == expected
