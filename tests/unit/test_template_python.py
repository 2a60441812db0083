"""What templates call of Python and jinja2, against jinja2 itself."""

from __future__ import annotations

import pytest
from jinja2.exceptions import UndefinedError
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
    (
        "{% set d = {'items': 2} %}{{ d.items is callable }}{{ d['items'] }}{{ d.items.type is defined }}"
        "{{ d.items() | list | length }}{{ d.keys | default('x') is callable }}{{ d.type is defined }}"
    ),
    "{% set ns = namespace(items=[1, 2], values=3) %}{{ ns.items | length }}{{ ns.values }}",
    # Slices.
    *(
        "{% set x = " + value + " %}{{ x" + part + " | list | join('-') }}"
        for value in ("[1, 2, 3, 4, 5]", "'añb日c'", "'abcde'", "(1, 2, 3, 4, 5)", "[]", "range(5)")
        for part in (
            *("[1:]", "[:-1]", "[-2:]", "[1:3]", "[::2]", "[::-1]", "[3:0:-1]", "[-1:-4:-2]", "[9:]", "[-9:2]"),
            *("[:]", "[2:1]", "[1:9:3]", "[:2:-1]"),
        )
    ),
    # Operators.
    "{{ ([1, 2] + [3] + [])|join('-') }}{{ 'a' + 'b' }}{{ 1 + 2 }}{{ 1.5 + 2 }}{{ (1, 2) + (3,) }}",
    "{% set ns = namespace(x=[]) %}{% for i in range(50) %}{% set ns.x = ns.x + [i] %}{% endfor %}{{ ns.x[49] }}",
    "{{ ([1] * 3)|join }}{{ 'ab' * 2 }}{{ 3 * 4 }}",
    (
        "{{ 1 < 2 < 3 }}{{ 1 < 3 < 2 }}{{ 1 == 1 != 2 }}{{ 1 in [1] }}"
        "{{ 4 not in [1] }}{{ 'a' in 'bab' }}{{ 'a' in {'a': 1} }}"
    ),
    "{{ [1, [2]] == [1, [2]] }}{{ {'a': 1} == {'a': 1} }}{{ [1] != [2] }}{{ [1] < [2] }}",
    "{{ 1 ~ 'a' ~ 2.5 ~ true ~ none }}",
    "{{ {'a': 1, 'b': [2]}.b[0] }}{{ [[1, 2], [3]][0][-1] }}{{ 'abc'[1] }}{{ 'abc'[-1] }}",
    "{{ 'x' if [1] + [2] == [1, 2] else 'y' }}{{ ([] or [1]) + [2] }}{{ (none or 'a') + 'b' }}",
    "{{ ('a' if false else 'b') == ('b' or 'c') }}{{ {'b': 1}['b' if true else 'c'] }}",
    # Filters and tests.
    (
        "{{ [[1], [2, 3]] | sum(start=[]) | join('-') }}"
        "{{ [1, 2.5] | sum }}{{ [{'a': 1}, {'a': 2}] | sum(attribute='a') }}"
    ),
    "{{ [{'a': {'b': 'x'}}, {'a': {'b': 'y'}}] | join(', ', attribute='a.b') }}{{ [1, 'a'] | join(d='+') }}",
    (
        "{{ [3, 1, 2] | sort | join }}{{ ['b', 'a'] | unique | join }}"
        "{{ [1, 2, 3] | max }}{{ {'b': 1, 'a': 2} | dictsort }}"
    ),
    "{{ [1, 2, 3] | select('gt', 1) | list }}{{ ['a', ''] | select | list }}{{ [1, 2] | reject('eq', 1) | list }}",
    (
        "{{ [{'a': 1}, {'a': 2}] | selectattr('a', 'eq', 2) | map(attribute='a') | list }}"
        "{{ ['a'] | map('upper') | first }}"
    ),
    "{{ [1, 2, 3] | batch(2) | list }}{{ [1, 2, 3] | slice(2) | list }}{{ [1, 2] | reverse | list }}",
    "{{ 1 is eq(1) }}{{ 1 is ne(2) }}{{ 1 is in([1, 2]) }}{{ [1] is sequence }}{{ ([1] + [2]) is sequence }}",
    "{{ ', '.join(['a', 'b']) }}{{ '-'.join('abc') }}{{ 'a,b'.split(',') | join('+') }}{{ '{} {:>3}'.format(1, 2) }}",
    # Scopes, loops and macros.
    "{% macro f(a, b='x') %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}{{ f(1, 2) }}{{ f(*[5, 6]) }}{{ f(**{'a': 1}) }}",
    "{{ 'a b' | replace(*['a', 'c']) }}{{ 3 is divisibleby(*[3]) }}{{ [2, 1] | sort(**{'reverse': true}) | join }}",
    "{% macro f() %}<{{ caller() }}>{% endmacro %}{% call f() %}a{% endcall %}",
    "{% for a in [[1, [2]], [3]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}",
    "{% for a, b in {'x': 1, 'y': 2}.items() if b > 1 %}{{ a }}{{ b }}{% else %}none{% endfor %}",
    (
        "{% for a in [] %}{{ a }}{% else %}none{% endfor %}{% for a in [1, 2, 3] %}"
        "{% if a == 2 %}{% continue %}{% endif %}{{ a }}{% endfor %}"
    ),
    "{% for a in 'ab' %}{{ loop.cycle('x', 'y') }}{{ loop.changed(a) }}{{ loop.previtem }}{% endfor %}",
    (
        "{% set a, b = [1, 2] %}{{ a }}{{ b }}{% set x %}c{{ a }}"
        "{% endset %}{{ x }}{% filter upper %}d{{ x }}{% endfilter %}"
    ),
    "{% set ns = namespace(a=1) %}{% for i in range(3) %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}",
    # `%` formats a text, and is the remainder of a number.
    "{{ '%s' % 'x' }}{{ '%s-%d' % ('x', 3) }}{{ '%(a)s%(b)03d' % {'a': 'x', 'b': 3} }}{{ 'a' ~ '%d%%' % 50 }}",
    "{{ '%5.1f|%-4s|%x' % (1.25, 'a', 255) }}{{ '%s' % [1, 'a'] }}{{ '%s' % none }}{{ '%s%%' % 1.5 }}{{ '%s' % true }}",
    "{{ -7 % 3 }}{{ 7 % -3 }}{{ 7.5 % 2 }}{% for i in range(4) %}{{ loop.index0 % 2 == 0 }}{% endfor %}",
    # What is marked as safe makes texts safe that it is added to, and no others.
    """{{ '"<>&' | e }}{{ "'" | escape }}{{ 2.0 | e }}{{ [1, '<'] | e }}""",
    "{{ ('<' | e) | e }}{{ ('<' | e) | forceescape }}",
    "{{ '<' + ('<' | safe) }}{{ ('<' | e) + '<' }}{{ '<' + '<' }}{{ (3 | safe) + '<' }}",
    "{{ ('<' | safe) + ('>' | safe) + '<' }}",
    "{{ '<' ~ ('<' | safe) }}{{ ['<', 'a' | safe] | join('&') }}{{ ('a' | safe) | replace('a', '<') }}",
    "{{ (', ' | safe).join(['<', 1, 'b' | safe]) + '<' }}{{ ', '.join(['<', 'b' | safe]) + '<' }}",
    "{{ ('{} {}' | safe).format('<', 1) + '<' }}{{ ('%s %d' | safe) % ('<', 3) }}{{ ('a' | safe).upper() + '<' }}",
    "{% set ns = namespace(t='') %}{% for c in 'a<' %}{% set ns.t = ns.t + (c | e) %}{% endfor %}{{ ns.t + '<' }}",
    "{% macro f() %}<{% endmacro %}{{ f() + '<' }}{{ f() | e }}{{ 1 + 2 }}{{ [1] + [2] }}{{ (1,) + (2,) }}",
    "{% block a %}{{ [1] + [2] }}{% endblock %}{% with x = [1] + [2] %}{{ x | length }}{% endwith %}",
]


@pytest.mark.parametrize("source", CASES)
def test_a_template_gives_what_jinja2_gives(source: str) -> None:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = str
    expected = environment.from_string(source).render(messages=[])
    assert ChatTemplate(source).render(b"[]", add_generation_prompt=False) == expected


REFUSED = [
    "{{ 'abc'.index('z') }}",
    "{{ [1].index(2) }}",
    "{{ dict([1]) }}",
    "{{ '%s %s' % 'a' }}",
    "{{ '%d' % 'a' }}",
    "{{ ('a' | safe) + 1 }}",
    "{% for x in messages.x.y %}a{% endfor %}",
    # None cannot be iterated over, as what is undefined can.
    "{% for x in none %}a{% else %}b{% endfor %}",
    "{% for x in none | default([]) %}a{% endfor %}",
    *(
        "{{ none | " + name + " }}"
        for name in ("list", "join", "sort", "sum", "unique | list", "batch(2) | list", "slice(2) | list", "max", "min")
    ),
    "{{ none | groupby('a') }}{{ none | first }}{{ none | last }}{{ none | length }}{{ none | items | list }}",
]


@pytest.mark.parametrize("source", REFUSED)
def test_what_python_refuses_is_refused(source: str) -> None:
    with pytest.raises((TypeError, ValueError, UndefinedError)):
        ImmutableSandboxedEnvironment().from_string(source).render(messages=[])
    with pytest.raises(Exception, match="the chat template cannot render"):
        ChatTemplate(source).render(b"[]")


def test_what_is_undefined_has_no_items() -> None:
    source = "{% for x in nothing %}a{% else %}b{% endfor %}{{ nothing | list }}{{ messages[0].x | default([], true) }}"
    assert ChatTemplate(source).render(b'[{"role": "user"}]', add_generation_prompt=False) == "b[][]"
