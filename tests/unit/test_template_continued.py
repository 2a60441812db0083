"""What new messages append to a live conversation: joined turn by turn, it is the render of the whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conversations import CALL_ID, TOOLS
from lmserve._core import ChatTemplate
from lmserve.errors import LmserveError
from test_template import SPECIAL, TEMPLATES, Conversation, compiled, messages_of, rendered

FOLDER = Path(__file__).parent / "templates"
# Templates that write a message the same way wherever it stands; the others rewrite what is past, as Qwen3 drops its
# reasoning.
STEADY = [
    "gemma-2",
    "internlm2",
    "llama-2",
    "llama-3.1",
    "mistral-nemo",
    "mistral-v0.1",
    "phi-3.5",
    "qwen2.5",
    "smollm2",
    "zephyr",
]
WITH_SYSTEM = sorted(set(STEADY) - {"gemma-2", "mistral-v0.1", "mistral-nemo"})
# What the model writes before an answer's words, as part of its answer.
LEAD = {"llama-2": " "}
WORDS = ["Hi <b>", "你好, 👋🏽", "a\nb", "It's 'quoted'", "{{ x }}", "last"]


def template_of(name: str) -> ChatTemplate:
    return compiled((FOLDER / f"{name}.jinja").read_text())


def continued(template: ChatTemplate, messages: list[dict[str, str]], *, open_assistant: bool, **options: bool) -> str:
    return template.render_continued(json.dumps(messages).encode(), open_assistant=open_assistant, **options)


def whole(template: ChatTemplate, messages: list[dict[str, str]], *, prompt: bool = True) -> str:
    return rendered(template, Conversation(messages, add_generation_prompt=prompt))


@pytest.mark.parametrize(
    ("name", "system"), [(name, None) for name in STEADY] + [(name, "Be <brief>.") for name in WITH_SYSTEM]
)
def test_turns_join_to_the_whole_conversation(name: str, system: str | None) -> None:
    template = template_of(name)
    lead = LEAD.get(name, "")
    first = len(messages_of("x", system=system))
    text = whole(template, messages_of(WORDS[0], system=system))
    for turn in range(1, len(WORDS)):
        words = [word for i in range(turn) for word in (WORDS[i], f"Answer {i}")]
        messages = messages_of(*words, WORDS[turn], system=system)
        assert messages[first]["role"] == "assistant"
        text += lead + f"Answer {turn - 1}"
        text += continued(template, [{"role": "user", "content": WORDS[turn]}], open_assistant=True)
        assert text == whole(template, messages)


@pytest.mark.parametrize("name", STEADY)
def test_a_closed_conversation_goes_on(name: str) -> None:
    template = template_of(name)
    turn = [{"role": "user", "content": "More"}]
    after_open = continued(template, turn, open_assistant=True)
    after_closed = continued(template, turn, open_assistant=False)
    assert after_open.endswith(after_closed)
    done = messages_of("Hi", "Hello")
    closed = whole(template, done, prompt=False)
    if name == "phi-3.5":
        # It ends a whole conversation, and no message, with this.
        closed = closed.removesuffix(SPECIAL["eos_token"])
    assert closed + after_closed == whole(template, done + turn)


@pytest.mark.parametrize("name", STEADY)
def test_closing_alone(name: str) -> None:
    template = template_of(name)
    closing = continued(template, [], open_assistant=True, add_generation_prompt=False)
    opened = whole(template, messages_of("Hi")) + LEAD.get(name, "") + "Hello"
    assert opened + closing == whole(template, messages_of("Hi", "Hello"), prompt=False)
    assert continued(template, [], open_assistant=False, add_generation_prompt=False) == ""


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_every_template_can_go_on(path: Path) -> None:
    template = compiled(path.read_text())
    text = continued(template, [{"role": "user", "content": "More <words>"}], open_assistant=True)
    assert text.count("More <words>") == 1
    assert "XANSWER" not in text
    assert "You are" not in text


def test_an_open_message_goes_on_within_a_live_conversation() -> None:
    messages = [{"role": "user", "content": "More"}, {"role": "assistant", "content": "It is "}]
    text = continued(template_of("smollm2"), messages, open_assistant=True, continue_final_message=True)
    assert text == "<|im_end|>\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\nIt is "


@pytest.mark.parametrize("name", ["llama-3.1", "mistral-nemo", "qwen2.5", "qwen3"])
def test_tool_results_go_on_after_the_call(name: str) -> None:
    messages = [{"role": "tool", "tool_call_id": CALL_ID, "name": "get_weather", "content": "22 degrees"}]
    text = template_of(name).render_continued(
        json.dumps(messages).encode(), open_assistant=True, tools=json.dumps(TOOLS[:1]).encode()
    )
    assert "22 degrees" in text
    assert "get_weather for" not in text


def test_what_a_template_refuses_is_refused() -> None:
    template = template_of("llama-2")
    with pytest.raises(LmserveError, match="alternate") as caught:
        continued(template, [{"role": "assistant", "content": "Hi"}], open_assistant=True)
    assert caught.value.status == 400


def test_a_template_without_answers_cannot_go_on() -> None:
    template = compiled("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(LmserveError, match="assistant") as caught:
        continued(template, [{"role": "user", "content": "Hi"}], open_assistant=True)
    assert caught.value.status == 400


PREFIXES = {
    "smollm2": "<|im_start|>system\nBe brief.<|im_end|>\n",
    "qwen2.5": "<|im_start|>system\nBe brief.<|im_end|>\n",
    "internlm2": "<s><|im_start|>system\nBe brief.<|im_end|>\n",
    "zephyr": "<|system|>\nBe brief.</s>\n",
    "phi-3.5": "<|system|>\nBe brief.<|end|>\n",
    "llama-2": None,
}


@pytest.mark.parametrize("name", PREFIXES)
def test_the_system_prefix_is_what_every_turn_follows(name: str) -> None:
    template = template_of(name)
    messages = messages_of("Hi", "Hello", system="Be brief.")
    prefix = template.system_prefix(json.dumps(messages).encode())
    assert prefix == PREFIXES[name]
    if prefix is not None:
        turn = [{"role": "user", "content": "More"}]
        dropped = prefix + continued(template, turn, open_assistant=False)
        assert dropped == whole(template, messages[:1] + turn)


def test_a_conversation_without_system_message_has_a_prefix_too() -> None:
    for name, prefix in {"llama-2": "", "internlm2": "<s>", "gemma-2": "<s>"}.items():
        assert template_of(name).system_prefix(json.dumps(messages_of("Hi")).encode()) == prefix
    default = template_of("smollm2").system_prefix(json.dumps(messages_of("Hi")).encode())
    assert default is not None
    assert default.startswith("<|im_start|>system\nYou are")
