"""Chat templates against jinja2 as transformers sets it up: published ones, and the ways in which Jinja is Python."""

from __future__ import annotations

import datetime as dt
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
from conversations import WORDS, Conversation, conversation
from lmserve._core import ChatTemplate
from lmserve.errors import LmserveError
from transformers.utils.chat_template_utils import render_jinja_template

TEMPLATES = sorted((Path(__file__).parent / "templates").glob("*.jinja"))
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def compiled(source: str) -> ChatTemplate:
    return ChatTemplate(source, json.dumps(SPECIAL).encode())


def rendered(template: ChatTemplate, chat: Conversation, **options: bool) -> str:
    return template.render(
        json.dumps(chat.messages).encode(),
        tools=None if chat.tools is None else json.dumps(chat.tools).encode(),
        add_generation_prompt=chat.add_generation_prompt,
        kwargs=json.dumps(chat.kwargs).encode(),
        **options,
    )


def by_jinja2(source: str, chat: Conversation, **options: bool) -> str:
    texts, _ = render_jinja_template(
        [chat.messages],
        tools=chat.tools,
        chat_template=source,
        add_generation_prompt=chat.add_generation_prompt,
        **options,
        **{**SPECIAL, **chat.kwargs},
    )
    return texts[0]


def outcome(render: Callable[..., str], *arguments: Any) -> tuple[str | None, Exception | None]:
    """What a render gives, or how it fails."""
    try:
        return render(*arguments), None
    except Exception as error:  # noqa: BLE001 - compared with the other's
        return None, error


def messages_of(*words: str, system: str | None = None) -> list[dict[str, Any]]:
    roles = ["user", "assistant"] * len(words)
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": role, "content": content} for role, content in zip(roles, words, strict=False)]


def test_there_are_enough_families() -> None:
    assert len(TEMPLATES) >= 12


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_published_templates_render_as_by_jinja2(path: Path) -> None:
    source = path.read_text()
    template = compiled(source)
    rng = random.Random(1)
    equal = 0
    for _ in range(400):
        chat = conversation(rng)
        expected, refusal = outcome(by_jinja2, source, chat)
        text, error = outcome(rendered, template, chat)
        if expected is not None:
            assert text == expected
            equal += 1
        elif type(refusal) is jinja2.TemplateError:
            assert str(error) == str(refusal)
            assert isinstance(error, LmserveError)
        else:
            # Such as None + str: the template was not written for these messages, and may do with them what it can.
            assert text is not None or isinstance(error, LmserveError)
    assert equal > 40


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_an_open_message_ends_as_in_transformers(path: Path) -> None:
    source = path.read_text()
    template = compiled(source)
    for words in WORDS:
        if not words.strip() or "think" in words:
            continue
        chat = Conversation(messages_of("Hi", words), add_generation_prompt=False)
        expected = by_jinja2(source, chat, continue_final_message=True)
        assert rendered(template, chat, continue_final_message=True) == expected


# Expressions and blocks on their own, with "=====" between them.
SNIPPETS = (Path(__file__).parent / "templates" / "snippets.txt").read_text().split("\n=====\n")


@pytest.mark.parametrize("source", SNIPPETS, ids=range(len(SNIPPETS)))
def test_jinja_is_python_in_the_same_ways(source: str) -> None:
    chat = Conversation(messages_of("Hi", "Hello", "Bye"))
    expected, refusal = outcome(by_jinja2, source, chat)
    text, error = outcome(rendered, compiled(source), chat)
    assert text == expected
    assert str(error) == str(refusal)


def value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(9 if depth < 4 else 7)
    if kind < 2:
        return rng.choice([*WORDS, "\u2028 \ud7ff \U0010ffff \x1f \x80 /"])
    if kind < 6:
        floats = [0.0, -0.0, 1.5, 1e16, 1e15, 123456789.125, 1e-4, 1e-5, 5e-324, 1.7976931348623157e308, 0.1 + 0.2]
        floats.append(rng.random() * 10.0 ** rng.randint(-30, 30))
        return rng.choice([rng.randrange(-(2**63), 2**64), rng.choice(floats)])
    if kind == 6:
        return rng.choice([None, True, False])
    items = [value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    return items if kind == 7 else {rng.choice([*WORDS, "b", "a"]): item for item in items}


JSON_ARGUMENTS = [
    "",
    "indent=2",
    "indent=0",
    "ensure_ascii=True",
    "sort_keys=true, indent=4",
    "separators=(',', ':')",
    "True, 1",
    "indent='\t'",
]


@pytest.mark.parametrize("arguments", JSON_ARGUMENTS)
def test_json_is_written_as_python_writes_it(arguments: str) -> None:
    source = "{{ x | tojson(" + arguments + ") }}"
    template = compiled(source)
    rng = random.Random(2)
    for _ in range(400):
        chat = Conversation([], kwargs={"x": value(rng)})
        assert rendered(template, chat) == by_jinja2(source, chat)


def test_numbers_are_printed_as_python_prints_them() -> None:
    rng = random.Random(3)
    source = "{{ x }} {{ x | string }}"
    template = compiled(source)
    for _ in range(3000):
        number = rng.choice([rng.uniform(-1, 1) * 10.0 ** rng.randint(-20, 20), rng.getrandbits(63)])
        chat = Conversation([], kwargs={"x": number})
        assert rendered(template, chat) == by_jinja2(source, chat)


def test_dates_are_formatted_as_python_formats_them() -> None:
    formats = "%d %b %Y|%A %B %j %U %y|%% %z%Z|%-d|%I %p|%G-W%V-%u|é %m"
    template = compiled("{{ strftime_now(x) }}")
    before = dt.datetime.now().strftime(formats)  # noqa: DTZ005 - local time, as in transformers
    text = rendered(template, Conversation([], kwargs={"x": formats}))
    after = dt.datetime.now().strftime(formats)  # noqa: DTZ005
    assert text in (before, after)


LONG = [
    "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{{ 'x' * 10000000000 }}",
    "{{ range(10000000000) | list }}",
    "{{ ('%' ~ '1000000000' ~ 'd') | format(1) }}",
    "{{ 'a' | center(10000000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ ('%1000000000s' | safe) % '<' }}",
    "{{ ('<' | safe).join(range(10000000000)) }}",
    "{% set ns = namespace(x='&' | e) %}{% for i in range(64) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='&' * 100000) %}{% for i in range(9999) %}{% set ns.x = ns.x | forceescape %}{% endfor %}",
    "{{ [1] * 10000000000 }}",
    "{{ 2 ** 10000000000 }}",
]


@pytest.mark.parametrize("source", LONG, ids=range(len(LONG)))
def test_templates_without_end_are_stopped(source: str) -> None:
    with pytest.raises(LmserveError) as caught:
        rendered(compiled(source), Conversation([]))
    assert caught.value.status == 400


def test_long_conversations_are_rendered() -> None:
    for path in TEMPLATES:
        words = [f"message {i} " + "word " * 100 for i in range(401)]
        text = rendered(compiled(path.read_text()), Conversation(messages_of(*words)))
        assert "message 400 word" in text


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ 'x' ", "{% for x in y %}", "{{ x | no_such_filter }}", "{% endif %}"]
)
def test_templates_that_are_none_are_refused(source: str) -> None:
    with pytest.raises(LmserveError) as caught:
        rendered(compiled(source), Conversation([]))
    assert caught.value.status == 400


@pytest.mark.parametrize("messages", [b"", b"{}", b"[1, 2", b'"x"', b"\xff", b"[" * 10_000, b'[{"content": NaN}]'])
def test_messages_that_are_no_json_are_refused(messages: bytes) -> None:
    with pytest.raises(LmserveError) as caught:
        compiled("{{ messages }}").render(messages)
    assert caught.value.status == 400


ODD = [1, "x", None, [], {"role": 1}, {"role": "user", "content": {}}, {"content": "x"}, {}]


@pytest.mark.parametrize("message", ODD)
def test_odd_messages_never_crash(message: Any) -> None:
    for path in TEMPLATES:
        text, error = outcome(rendered, compiled(path.read_text()), Conversation([message]))
        assert text is not None or isinstance(error, LmserveError)
