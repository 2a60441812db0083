"""What templates call of Python and jinja2, against jinja2 itself."""

from __future__ import annotations

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lmserve._core import ChatTemplate

CASES = [
    r"{{ 'a\nb\n' | indent }}|",
    r"{{ 'a\n\nb\n' | indent(2, first=true) }}|",
    r"{{ 'a\n\nb\n' | indent(2, blank=true) }}|",
    r"{{ 'a\nb' | indent('> ', true) }}",
    r"{{ '' | indent(2, true) }}|",
    "{{ 'a=b=c'.partition('=')[2] }}{{ 'a=b=c'.rpartition('=')[0] }}",
    "{{ 'a'.partition('=')[0] }}{{ 'a'.rpartition('=')[2] }}",
    "{{ 'a b c'.rsplit(' ', 1)[0] }}|{{ 'a/b/c'.rsplit('/')[-1] }}|{{ 'a/b/c'.rsplit('/', 1) | length }}",
    "{{ 'abc'.removeprefix('a') }}{{ 'abc'.removesuffix('c') }}{{ 'abc'.removeprefix('x') }}",
    "{{ 'éabc'.index('c') }}{{ [1, 2, 3].index(2) }}",
    "{{ '7'.zfill(3) }}{{ '-7'.zfill(4) }}{{ '12345'.zfill(3) }}",
    "{% set d = {'a': 1}.copy() %}{{ d.a }}{{ [1, 2].copy()[1] }}",
    "{{ raise_exception is callable }}{{ 1 is callable }}{{ 'a' is callable }}{{ {} is callable }}",
    "{{ 'hello world foo bar' | truncate(11) }}|{{ 'hello world foo bar' | truncate(9, true, '..') }}",
    "{{ 'short' | truncate(9) }}|{{ 'hello world foo' | truncate(8, leeway=0) }}",
    "{% set j = joiner(', ') %}{{ j() }}a{{ j() }}b",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}",
    "{{ dict([('a', 1), ('b', 2)]).b }}{{ dict(a=1).a }}{{ dict({'a': 1}, b=2).b }}{{ dict() | length }}",
    "{{ 'a'.ljust(3) }}|{{ 'a'.rjust(3) }}|{{ 'abcd'.ljust(3) }}|",
    "{{ 'AbC'.casefold() }}{{ 'a b c' | wordcount }}",
]


@pytest.mark.parametrize("source", CASES)
def test_a_template_gives_what_jinja2_gives(source: str) -> None:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = str
    expected = environment.from_string(source).render(messages=[])
    assert ChatTemplate(source).render(b"[]", add_generation_prompt=False) == expected


@pytest.mark.parametrize("source", ["{{ 'abc'.index('z') }}", "{{ [1].index(2) }}", "{{ dict([1]) }}"])
def test_what_python_refuses_is_refused(source: str) -> None:
    with pytest.raises(Exception, match="the chat template cannot render"):
        ChatTemplate(source).render(b"[]")
