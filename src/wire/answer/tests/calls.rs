//! Tests calls as models write them: values, words around calls, and text that is not a call.

use super::*;

#[test]
fn values_are_what_the_schema_of_their_function_says() {
    let text = "<tool_call>\n<function=f>\n<parameter=city>\n5\n</parameter>\n<parameter=deep>\n{\"a\": [true]}\n</parameter>\n\
        <parameter=any>\nif a < b:\n    return \"</param\"\n\n</parameter>\n<parameter=days>\nmany\n</parameter>\n</function>\n</tool_call>";
    let arguments = "{\"city\": \"5\", \"deep\": {\"a\": [true]}, \"any\": \"if a < b:\\n    return \\\"</param\\\"\\n\", \"days\": \"many\"}";
    assert_eq!(calls("qwen3_coder", text).1, [call("f", arguments)]);
    let text = "<|tool_call>call:f{any:[1,{a:<|\"|>x<|\"|>,b:true},null],city:Rome,days:<|\"|>3<|\"|>,deep:{}}<tool_call|>";
    let arguments = "{\"any\": [1, {\"a\": \"x\", \"b\": true}, null], \"city\": \"Rome\", \"days\": \"3\", \"deep\": {}}";
    assert_eq!(calls("gemma4", text).1, [call("f", arguments)]);
    let text = "[f('Rome', 3, any=[True, None, ('a', -1.5e3)], deep={'k': {}})]";
    let arguments = "{\"city\": \"Rome\", \"days\": 3, \"any\": [true, null, [\"a\", -1.5e3]], \"deep\": {\"k\": {}}}";
    assert_eq!(calls("pythonic", text).1, [call("f", arguments)]);
    let text = "[f(city='it\\'s \\x41\\u00e9\\q\\n')]";
    let arguments = "{\"city\": \"it's \\u0041\\u00e9\\\\q\\n\"}";
    assert_eq!(calls("pythonic", text).1, [call("f", arguments)]);
}

#[test]
fn hermes_calls_are_found_among_words() {
    let text = "Let me see. \n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"}\\\"\", \"b\": [1, {}]}}\n</tool_call>\n\
        <tool_call>{\"arguments\": {\"x\": 1}, \"name\": \"g\"}</tool_call>\nDone.";
    let expected = vec![
        call("f", "{\"a\": \"}\\\"\", \"b\": [1, {}]}"),
        call("g", "{\"x\": 1}"),
    ];
    assert_eq!(
        calls("hermes", text),
        ("Let me see.Done.".to_owned(), expected)
    );
}

#[test]
fn of_several_calls_only_the_first_is_told_where_one_is_asked_for() {
    let text = "So.<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}}</tool_call>\n\
        <tool_call>{\"name\": \"get_weather\", \"arguments\": {}}</tool_call>";
    let format = AnswerFormat {
        one_call: true,
        ..format(Some(&HERMES), None)
    };
    let (_, content, calls) = parse(&format, &[text]);
    assert_eq!(content, "So.");
    assert_eq!(calls, [call("f", "{\"a\": 1}")]);
}

#[test]
fn what_is_no_call_stays_text() {
    for (name, texts) in [
        (
            "hermes",
            vec![
                "plain <tool> words ",
                "<tool_call>\nnot json\n</tool_call>",
                "<tool_call></tool_call>",
                "<tool_call>{\"nam\": 1}</tool_call>",
                "<tool_call>{\"name\": \"f",
                "<tool_cal",
                "{\"name\": \"f\", \"arguments\": {}}",
                "",
            ],
        ),
        (
            "llama3",
            vec![
                "{\"answer\": 42}",
                " {\"name\": \"nobody\", \"parameters\": {}}",
                "See {\"name\": \"f\", \"parameters\": {}}",
                "[1, 2]",
            ],
        ),
        (
            "pythonic",
            vec![
                "[1, 2]",
                "[nobody(a=1)]",
                "See [f()]",
                "[f, g]",
                "[Note] Hello",
            ],
        ),
        (
            "mistral",
            vec![
                "[TOOL_CALLS]",
                "[TOOL",
                "a[TOOL_CALLS]name",
                "[TOOL_CALLS][]",
                "[TOOL_CALLS]two words{}",
            ],
        ),
        ("phi4", vec!["use functools.cache", "functools[1]"]),
        (
            "glm",
            vec![
                "<tool_call>two words</tool_call>",
                "<tool_call></tool_call>",
                "a < b <tool",
            ],
        ),
        (
            "qwen3_coder",
            vec![
                "<function=f",
                "<tool_call>\n<other>",
                "<tool_call>f</tool_call>",
            ],
        ),
        (
            "gemma4",
            vec!["<|tool_call>call:f", "<|tool_call>cat", "<|tool"],
        ),
        (
            "deepseek_v3",
            vec![
                "<｜tool▁calls▁begin｜>f",
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>other<｜tool▁sep｜>f",
            ],
        ),
        ("functionary_v32", vec!["Hello there", ">>>nobody\nx"]),
        ("harmony", vec!["Hello there", "a <|channel"]),
    ] {
        for text in texts {
            assert_eq!(calls(name, text), (text.to_owned(), vec![]), "{name}");
        }
    }
}

#[test]
fn a_call_that_was_begun_is_kept_however_it_ends() {
    let cut = calls(
        "hermes",
        "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": [1,",
    );
    assert_eq!(cut, (String::new(), vec![call("f", "{\"a\": [1,")]));
    let unclosed = "<tool_call>{\"name\": \"f\", \"arguments\": {}</tool_call><tool_call>{\"name\": \"g\"}</tool_call>";
    assert_eq!(
        calls("hermes", unclosed),
        (String::new(), vec![call("f", "{}"), call("g", "{}")])
    );
    let without_end = "<tool_call>\n<function=f>\n<parameter=city>\nRome\n</parameter>\n";
    assert_eq!(
        calls("qwen3_coder", without_end).1,
        [call("f", "{\"city\": \"Rome\"}")]
    );
    let without_begin =
        "<function=f>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call> Done.";
    assert_eq!(
        calls("qwen3_coder", without_begin),
        ("Done.".to_owned(), vec![call("f", "{\"city\": \"Rome\"}")])
    );
    assert_eq!(
        calls("pythonic", " [f("),
        (String::new(), vec![call("f", "{")])
    );
    let words = calls("mistral_args", "[TOOL_CALLS]f[ARGS]words");
    assert_eq!(words, ("words".to_owned(), vec![call("f", "{}")]));
    let odd = calls(
        "glm",
        "<tool_call>f\n<arg_key>city</arg_key>Rome</arg_value></tool_call>!",
    );
    assert_eq!(
        odd,
        ("!".to_owned(), vec![call("f", "{\"city\": \"Rome\"}")])
    );
}

#[test]
fn arguments_written_as_a_text_are_taken_out_of_it() {
    let text = "<tool_call>{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": 1}\"}</tool_call>";
    assert_eq!(
        calls("hermes", text),
        (String::new(), vec![call("f", "{\"a\": 1}")])
    );
}

#[test]
fn llama_3_calls_are_bare_or_tagged() {
    let bare = "{\"name\": \"f\", \"parameters\": {\"a\": 1}}; {\"type\": \"function\", \"name\": \"get_weather\", \"parameters\": {}}";
    let expected = vec![call("f", "{\"a\": 1}"), call("get_weather", "{}")];
    assert_eq!(calls("llama3", bare), (String::new(), expected));
}

#[test]
fn both_forms_of_mistral_are_read_whichever_its_template_shows() {
    let expected = vec![call("f", "{\"a\": [1]}"), call("g", "{}")];
    let list = "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"a\": [1]}}, {\"name\": \"g\", \"arguments\": {}}]";
    let named = "[TOOL_CALLS]f[ARGS]{\"a\": [1]}[TOOL_CALLS]g{}";
    assert_eq!(calls("mistral", list), (String::new(), expected.clone()));
    assert_eq!(calls("mistral", named), (String::new(), expected.clone()));
    assert_eq!(calls("mistral_args", named), (String::new(), expected));
}
