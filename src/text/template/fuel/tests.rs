//! Templates that would run forever, or exhaust memory or the stack. Each is stopped by its fuel, or refused.

use serde_json::{Map, Value, json};

use crate::error::{Kind, Result};
use crate::text::template::{ChatTemplate, Ending};

/// Enough fuel for every harmless template here.
const FUEL: u64 = 100_000;
/// Two lists of 2^60 numbers, composed of sixty lists.
const TWINS: &str = "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}\
    {% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}";
/// Lists of more than a million items, and texts of a megabyte.
const LARGE: &str = "{% set s = 'é' * 500000 %}{% set t = 'é' * 500000 %}";

fn render(source: &str) -> Result<String> {
    let template = ChatTemplate::with_fuel(source, &Map::new(), FUEL)?;
    let messages = [json!({"role": "user", "content": "Hello"})];
    template.render(&messages, None, Ending::Closed, &Map::new())
}

fn stopped(source: &str) -> String {
    let error = render(source).expect_err(source);
    assert_eq!(error.kind, Kind::Invalid, "{source}");
    error.message
}

fn runs_out(source: &str) {
    let message = stopped(source);
    assert!(message.contains("steps"), "{source}: {message}");
}

#[test]
fn lists_that_double() {
    let doubled = |what: &str| {
        let grow = format!(
            "{{% set ns = namespace(x=['a']) %}}{{% for i in range(40) %}}{{% set ns.x = {what} %}}{{% endfor %}}"
        );
        runs_out(&format!("{grow}{{{{ ns.x | length }}}}"));
    };
    for what in [
        "ns.x + ns.x",
        "ns.x * 2",
        "(ns.x | list) + (ns.x | list)",
        "[ns.x, ns.x] | sum(start=[])",
        "ns.x | chain(ns.x) | list",
        "ns.x + ns.x[::-1]",
        "(ns.x ~ ns.x) | list",
    ] {
        doubled(what);
    }
}

#[test]
fn lists_that_are_still_to_be_computed() {
    for source in [
        "{{ ([1] * 90000000) | length }}",
        "{% set x = ([1] * 90000000)[89999999:] %}",
        "{% for x in [1] * 90000000 %}{% break %}{% endfor %}",
        "{% for i in range(99999) %}{% for x in range(99999) %}{% break %}{% endfor %}{% endfor %}",
        "{% macro f(a) %}{{ a }}{% endmacro %}{{ f(*([1] * 90000000)) }}",
        "{% set a, b = [1] * 90000000 %}",
        "{{ [1] | batch(90000000, 0) | length }}",
        "{{ [1] | slice(90000000) | length }}",
        "{% for i in range(9999) %}{% if [1] * 999 %}{% endif %}{% endfor %}",
    ] {
        runs_out(source);
    }
}

#[test]
fn lists_that_hold_others_twice() {
    for what in [
        "{{ ns.x == ns.y }}",
        "{{ ns.x < ns.y }}",
        "{{ 1 < ns.x < ns.y }}",
        "{{ ns.x in [ns.y] }}",
        "{{ ns.x is in([ns.y]) }}",
        "{{ ns.x in 'abc' }}",
        "{{ ns.x is eq(ns.y) }}",
        "{{ [ns.x] | select('eq', ns.y) | list }}",
        "{{ [{'a': ns.x}] | selectattr('a', 'eq', ns.y) | list }}",
        "{{ [ns.x, ns.y] | unique | list | length }}",
        "{{ [ns.x, ns.y] | sort | length }}",
        "{{ [ns.x, ns.y] | max | length }}",
        "{{ [[ns.x, 1], [ns.y, 2]] | groupby(0) | list | length }}",
        "{{ {'a': ns.x, 'b': ns.y} | dictsort(by='value') | length }}",
        "{{ {ns.x: 1} | length }}",
        "{{ {'a': 1}[ns.x] }}",
        "{{ {'a': 1}.get(ns.x) }}",
        "{{ dict([[ns.x, 1]]) | length }}",
        "{{ [ns.x].index(ns.y) }}",
        "{{ [ns.x].count(ns.y) }}",
        "{% for z in [ns.x, ns.y] %}{{ loop.changed(z) }}{% endfor %}",
        "{{ ns.x }}",
        "{{ ns.x ~ '' }}",
        "{{ '' ~ ns.x }}",
        "{{ ns.x | string | length }}",
        "{{ ns.x | tojson | length }}",
        "{{ ns.x | tojson(indent=2) | length }}",
        "{{ ns.x | join }}",
        "{{ '-'.join(ns.x) }}",
        "{{ '%s' | format(ns.x) }}",
        "{{ '{}'.format(ns.x) }}",
        "{{ ns.x | upper }}",
        "{{ ns.x | escape }}",
        "{{ ns.x | trim }}",
        "{{ ns.x | replace('1', '2') }}",
        "{{ [ns.x] | map('upper') | list }}",
        "{{ [ns.x] | map('string') | list }}",
        "{% filter upper %}{{ ns.x }}{% endfilter %}",
        "{% set t %}{{ ns.x }}{% endset %}",
        "{% macro f(a) %}{{ a }}{% endmacro %}{{ f(ns.x) }}",
    ] {
        runs_out(&format!("{TWINS}{what}"));
    }
}

#[test]
fn texts_that_are_read_again_and_again() {
    for what in [
        "{% if s == t %}{% endif %}",
        "{% if s < t %}{% endif %}",
        "{% if s[-1:] %}{% endif %}",
        "{% if s[-1] %}{% endif %}",
        "{% if s[::-1] %}{% endif %}",
        "{% if s in t %}{% endif %}",
        "{% if {s: 1} %}{% endif %}",
        "{% if {'a': 1}[s] %}{% endif %}",
        "{% if s is eq(t) %}{% endif %}",
        "{% if s.startswith(t) %}{% endif %}",
        "{% if 'x'.join([s]) %}{% endif %}",
        "{% for c in s %}{% break %}{% endfor %}",
        "{% if s | length %}{% endif %}",
        "{% if s | first %}{% endif %}",
        "{% if s.find('x') %}{% endif %}",
        "{% if [s, t] | unique %}{% endif %}",
    ] {
        runs_out(&format!(
            "{LARGE}{{% for i in range(9999) %}}{what}{{% endfor %}}"
        ));
    }
}

#[test]
fn texts_that_would_not_fit() {
    for source in [
        "{{ ('a' * 1000000).replace('', 'b' * 1000000) | length }}",
        "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) | length }}",
        "{{ ('a' * 1000000) | join('b' * 1000000) | length }}",
        "{{ ('b' * 1000000).join('a' * 1000000) | length }}",
        "{{ ('\\n' * 1000000) | indent('b' * 1000000) | length }}",
        "{{ ('a ' * 2000000).split() | length }}",
        "{{ ('a ' * 2000000).split(' ') | length }}",
        "{{ ('a ' * 2000000) | split(' ') | list | length }}",
        "{{ ('a\\n' * 2000000).splitlines() | length }}",
        "{{ ('a\\n' * 2000000) | lines | list | length }}",
        "{{ [[1] * 100] * 9 | tojson(separators=('b' * 1000000, ':')) }}",
        "{{ '%99999999d' | format(1) }}",
        "{{ '%*d' | format(99999999, 1) }}",
    ] {
        stopped(source);
    }
    assert!(stopped("{{ '{:1000000000}'.format(1) }}").contains("at most 9999"));
    assert!(stopped("{{ [1] | tojson(indent='b' * 65) }}").contains("at most 64"));
    assert!(stopped("{{ ['a', 'b'] | sum(start='') }}").contains("can't sum strings"));
}

#[test]
fn nesting_without_end() {
    let nested = |what: &str| {
        let source = format!(
            "{{% set ns = namespace(x=[1]) %}}{{% for i in range(2000) %}}{what}{{% endfor %}}{{{{ ns.x }}}}"
        );
        let message = stopped(&source);
        assert!(
            message.contains("deeper than 200 levels") || message.contains("cycler takes"),
            "{what}: {message}"
        );
    };
    for what in [
        "{% set ns.x = [ns.x] %}",
        "{% set ns.x = (ns.x,) %}",
        "{% set ns.x = {'a': ns.x} %}",
        "{% set ns.x = {(ns.x,): 1} %}",
        "{% set ns.x = dict(a=ns.x) %}",
        "{% set ns.x = [ns.x] | list %}",
        "{% set ns.x = [] + [ns.x] %}",
        "{% set ns.x = [ns.x] * 2 %}",
        "{% set ns.x = [ns.x] | batch(1) | list %}",
        "{% set ns.x = [ns.x] | zip([1]) | list %}",
        "{% set ns.x = [ns.x][:] %}",
        "{% set ns.x = {'a': ns.x}.items() %}",
        "{% set ns.x = cycler(ns.x) %}",
    ] {
        nested(what);
    }
    // Lists of the maximum depth can be written, compared and dropped.
    let source = "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(199) %}{% set ns.x = [ns.x] %}\
        {% set ns.y = [ns.y] %}{% endfor %}{{ ns.x == ns.y }}{{ ns.x }}{{ ns.x | tojson }}";
    let text = render(source).unwrap();
    assert_eq!(text.len(), "true".len() + 2 * (200 * 2 + 1), "{text}");
    let written_out = "{% set x = [1] %}".to_owned() + &"{% set x = [x] %}".repeat(300);
    assert!(stopped(&written_out).contains("deeper than 200 levels"));
}

#[test]
fn what_holds_itself() {
    for what in [
        "{% set ns.x = ns %}",
        "{% set ns.x = [ns] %}",
        "{% set ns.x = {'a': ns} %}",
        "{% set ns.x = dict(a=ns) %}",
        "{% set ns.x = (ns,) %}",
        "{% for i in [1] %}{% set ns.x = loop %}{% endfor %}",
        "{% for i in [1] %}{% set ns.x = [loop] %}{% endfor %}",
    ] {
        let source = format!("{{% set ns = namespace() %}}{what}{{{{ ns.x }}}}");
        assert!(stopped(&source).contains("can be no part of"), "{what}");
    }
    for what in ["{{ ns }}", "{{ ns ~ '' }}", "{{ ns | string }}"] {
        let source = format!("{{% set ns = namespace(a=1) %}}{what}");
        assert!(stopped(&source).contains("cannot be written"), "{what}");
    }
}

#[test]
fn other_templates_are_not_there() {
    for source in [
        "{% include 'chat' %}",
        "{% extends 'chat' %}",
        "{% import 'chat' as chat %}",
        "{% from 'chat' import x %}",
    ] {
        let error = ChatTemplate::new(source, &Map::new()).unwrap_err();
        assert_eq!(error.code, "invalid_template");
    }
    let error = ChatTemplate::new("{{ debug() }}", &Map::new())
        .and_then(|template| template.render(&[], None, Ending::Closed, &Map::new()));
    assert!(error.is_err());
}

#[test]
fn a_list_grows_with_a_long_conversation() {
    let source = "{% set ns = namespace(x=[]) %}{% for m in messages %}{% set ns.x = ns.x + [m] %}{% endfor %}\
        {% for m in ns.x %}{{ m.content }}{% endfor %}{{ ns.x | length }}";
    let template = ChatTemplate::new(source, &Map::new()).unwrap();
    let messages: Vec<Value> = (0..5000)
        .map(|at| json!({"role": "user", "content": [{"type": "text", "text": at.to_string()}]}))
        .collect();
    let text = template
        .render(&messages, None, Ending::Closed, &Map::new())
        .unwrap();
    assert!(text.ends_with("5000"));
}
