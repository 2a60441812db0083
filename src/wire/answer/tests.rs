//! What each format's texts say, and that they say the same wherever they are cut.

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::text::formats::{HERMES, THOUGHT_FORMATS, TOOL_FORMATS, Thinking};

/// What the pieces say together: reasoning, content, and each call's name and arguments.
type Whole = (String, String, Vec<(String, String)>);

fn join(pieces: Vec<Piece>) -> Whole {
    let (mut reasoning, mut content, mut calls) = (String::new(), String::new(), Vec::new());
    for piece in pieces {
        match piece {
            Piece::Reasoning(text) => reasoning += &text,
            Piece::Content(text) => content += &text,
            Piece::Call { index, name } => {
                assert_eq!(index, calls.len());
                calls.push((name, String::new()));
            }
            Piece::Arguments { index, text } => {
                assert_eq!(index + 1, calls.len());
                assert!(!text.is_empty());
                calls[index].1 += &text;
            }
        }
    }
    (reasoning, content, calls)
}

fn functions() -> Vec<Function> {
    let schema = json!({"type": "object", "properties": {
        "city": {"type": "string"}, "days": {"type": "integer"}, "deep": {"type": "object"}, "any": {},
    }});
    vec![
        Function::new("f", Some(&schema)),
        Function::new("get_weather", Some(&schema)),
    ]
}

fn tools(name: &str) -> &'static ToolFormat {
    ToolFormat::named(name).unwrap()
}

pub(super) fn format(
    tools: Option<&'static ToolFormat>,
    thinking: Option<Thoughts>,
) -> AnswerFormat {
    AnswerFormat {
        thinking,
        tools: tools.map(|format| (format, functions())),
        one_call: false,
    }
}

pub(super) fn parse(format: &AnswerFormat, chunks: &[&str]) -> Whole {
    let mut parser = AnswerParser::new(format).unwrap();
    let mut pieces: Vec<Piece> = chunks
        .iter()
        .flat_map(|chunk| parser.push(chunk, false))
        .collect();
    pieces.extend(parser.push("", true));
    join(pieces)
}

pub(super) fn calls(format_name: &str, text: &str) -> (String, Vec<(String, String)>) {
    let (_, content, calls) = parse(&format(Some(tools(format_name)), None), &[text]);
    (content, calls)
}

fn call(name: &str, arguments: &str) -> (String, String) {
    (name.to_owned(), arguments.to_owned())
}

/// The same two calls as the models of each format write them, after words where that is possible.
pub(super) const WRITTEN: [(&str, &str); 23] = [
    (
        "hermes",
        "So.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"city\": \"Rome, \\\"é\\\"\", \"days\": 3}}\n</tool_call>\n\
         <tool_call>\n{\"name\": \"get_weather\", \"arguments\": {}}\n</tool_call>",
    ),
    (
        "llama3",
        "<|python_tag|>{\"name\": \"f\", \"parameters\": {\"city\": \"Rome, \\\"é\\\"\", \"days\": 3}}; \
         {\"name\": \"get_weather\", \"parameters\": {}}",
    ),
    (
        "pythonic",
        "[f(city=\"Rome, \\\"é\\\"\", days=3), get_weather()]",
    ),
    (
        "lfm2",
        "So.<|tool_call_start|>[f(city='Rome, \"é\"', days=3), get_weather()]<|tool_call_end|>",
    ),
    (
        "mistral",
        "So.[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"city\": \"Rome, \\\"é\\\"\", \"days\": 3}}, \
         {\"name\": \"get_weather\", \"arguments\": {}}]",
    ),
    (
        "mistral_args",
        "So.[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{\"city\": \"Rome, \\\"é\\\"\", \"days\": 3}[TOOL_CALLS]get_weather[ARGS]{}",
    ),
    (
        "granite",
        "So.<|tool_call|>[{\"name\": \"f\", \"arguments\": {\"city\": \"Rome, \\\"é\\\"\", \"days\": 3}}, \
         {\"name\": \"get_weather\", \"arguments\": {}}]",
    ),
    (
        "phi4",
        "So.functools[{\"name\": \"f\", \"arguments\": {\"city\": \"Rome, \\\"é\\\"\", \"days\": 3}}, \
         {\"name\": \"get_weather\", \"arguments\": {}}]",
    ),
    (
        "qwen3_coder",
        "So.\n<tool_call>\n<function=f>\n<parameter=city>\nRome, \"é\"\n</parameter>\n<parameter=days>\n3\n</parameter>\n\
         </function>\n</tool_call>\n<tool_call>\n<function=get_weather>\n</function>\n</tool_call>",
    ),
    (
        "glm",
        "So.\n<tool_call>f\n<arg_key>city</arg_key>\n<arg_value>Rome, \"é\"</arg_value>\n<arg_key>days</arg_key>\n\
         <arg_value>3</arg_value>\n</tool_call>\n<tool_call>get_weather\n</tool_call>",
    ),
    (
        "glm47",
        "So.<tool_call>f<arg_key>city</arg_key><arg_value>Rome, \"é\"</arg_value><arg_key>days</arg_key>\
         <arg_value>3</arg_value></tool_call><tool_call>get_weather</tool_call>",
    ),
    (
        "minimax_m2",
        "So.\n<minimax:tool_call>\n<invoke name=\"f\">\n<parameter name=\"city\">Rome, \"é\"</parameter>\n\
         <parameter name=\"days\">3</parameter>\n</invoke>\n<invoke name=\"get_weather\">\n</invoke>\n</minimax:tool_call>",
    ),
    (
        "minimax_m1",
        "So.\n<tool_calls>\n{\"name\": \"f\", \"arguments\": {\"city\": \"Rome, \\\"é\\\"\", \"days\": 3}}\n\
         {\"name\": \"get_weather\", \"arguments\": {}}\n</tool_calls>",
    ),
    (
        "deepseek_v3",
        "So.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{\"city\": \"Rome, \\\"é\\\"\", \"days\": 3}\n```\
         <｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    (
        "deepseek_v31",
        "So.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"city\": \"Rome, \\\"é\\\"\", \"days\": 3}<｜tool▁call▁end｜>\
         <｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    (
        "deepseek_v32",
        "So.\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"f\">\n<｜DSML｜parameter name=\"city\" string=\"true\">Rome, \"é\"\
         </｜DSML｜parameter>\n<｜DSML｜parameter name=\"days\" string=\"false\">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n\
         <｜DSML｜invoke name=\"get_weather\">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>",
    ),
    (
        "deepseek_v4",
        "So.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n<｜DSML｜parameter name=\"city\" string=\"true\">Rome, \"é\"\
         </｜DSML｜parameter>\n<｜DSML｜parameter name=\"days\" string=\"false\">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n\
         <｜DSML｜invoke name=\"get_weather\">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
    ),
    (
        "command",
        "So.<|START_ACTION|>[\n    {\"tool_call_id\": \"0\", \"tool_name\": \"f\", \"parameters\": {\"city\": \"Rome, \\\"é\\\"\", \
         \"days\": 3}},\n    {\"tool_call_id\": \"1\", \"tool_name\": \"get_weather\", \"parameters\": {}}\n]<|END_ACTION|>",
    ),
    (
        "kimi_k2",
        "So.<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>\
         {\"city\": \"Rome, \\\"é\\\"\", \"days\": 3}<|tool_call_end|><|tool_call_begin|>functions.get_weather:1\
         <|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
    ),
    (
        "gemma4",
        "So.<|tool_call>call:f{city:<|\"|>Rome, \"é\"<|\"|>,days:3}<tool_call|><|tool_call>call:get_weather{}<tool_call|>",
    ),
    (
        "functionary_v31",
        "So.<function=f>{\"city\": \"Rome, \\\"é\\\"\", \"days\": 3}</function><function=get_weather>{}</function>",
    ),
    (
        "functionary_v32",
        "all\nSo.>>>f\n{\"city\": \"Rome, \\\"é\\\"\", \"days\": 3}>>>get_weather\n{}",
    ),
    (
        "harmony",
        "<|channel|>commentary<|message|>So.<|end|><|start|>assistant<|channel|>commentary to=functions.f \
         <|constrain|>json<|message|>{\"city\": \"Rome, \\\"é\\\"\", \"days\": 3}<|call|><|start|>assistant to=functions.get_weather\
         <|channel|>commentary json<|message|>{}<|call|>",
    ),
];

#[test]
fn each_format_is_read_as_its_models_write_it() {
    let expected = vec![
        call("f", "{\"city\": \"Rome, \\\"é\\\"\", \"days\": 3}"),
        call("get_weather", "{}"),
    ];
    for format in TOOL_FORMATS {
        let text = WRITTEN
            .iter()
            .find(|(name, _)| *name == format.name)
            .unwrap()
            .1;
        let words = if text.contains("So.") { "So." } else { "" };
        assert_eq!(
            calls(format.name, text),
            (words.to_owned(), expected.clone()),
            "{}",
            format.name
        );
    }
}

#[test]
fn each_format_is_read_the_same_wherever_its_text_is_cut() {
    for format in TOOL_FORMATS {
        let text = WRITTEN
            .iter()
            .find(|(name, _)| *name == format.name)
            .unwrap()
            .1;
        let read = self::format(Some(format), None);
        let whole = parse(&read, &[text]);
        for (cut, _) in text.char_indices() {
            assert_eq!(
                parse(&read, &[&text[..cut], &text[cut..]]),
                whole,
                "{} cut at {cut}",
                format.name
            );
        }
        let each: Vec<String> = text.chars().map(String::from).collect();
        let each: Vec<&str> = each.iter().map(String::as_str).collect();
        assert_eq!(parse(&read, &each), whole, "{}", format.name);
    }
}

#[test]
fn a_call_that_is_cut_off_loses_no_word_of_its_text() {
    for format in TOOL_FORMATS {
        let text = WRITTEN
            .iter()
            .find(|(name, _)| *name == format.name)
            .unwrap()
            .1;
        for (cut, _) in text.char_indices() {
            let (_, content, calls) = parse(&self::format(Some(format), None), &[&text[..cut]]);
            let said: Vec<String> = calls
                .into_iter()
                .map(|(name, arguments)| name + &arguments)
                .collect();
            let said = said.concat();
            if text[..cut].contains("Rom") {
                assert!(
                    (content + &said).contains("Rom") || format.name == "lfm2",
                    "{} cut at {cut}",
                    format.name
                );
            }
        }
    }
}

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

#[test]
fn thoughts_are_told_from_the_answer() {
    let think = |begin, text: &str| {
        let (reasoning, content, _) = parse(&format(None, Some(Thoughts::think(begin))), &[text]);
        (reasoning, content)
    };
    let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    let text = "<think>\nHm. <b>\n</think>\n\nYes. <think>no</think>";
    assert_eq!(
        think(Thinking::Maybe, text),
        pair("Hm. <b>", "Yes. <think>no</think>")
    );
    assert_eq!(
        think(Thinking::Open, "\nHm.\n</think>\nYes."),
        pair("Hm.", "Yes.")
    );
    assert_eq!(think(Thinking::Open, "Hm. </thi"), pair("Hm. </thi", ""));
    assert_eq!(think(Thinking::Maybe, " <thin"), pair("", " <thin"));
    assert_eq!(
        think(Thinking::Maybe, "Yes.</think>"),
        pair("", "Yes.</think>")
    );
    assert_eq!(think(Thinking::Maybe, "<think></think>"), pair("", ""));
}

#[test]
fn thoughts_are_read_in_each_format() {
    for (name, text) in [
        ("think", "<think>\nHm.\n</think>\n\nYes."),
        ("mistral", "[THINK]Hm.[/THINK]Yes."),
        ("gemma4", "<|channel>thought\nHm.<channel|>Yes."),
        ("seed", "<seed:think>Hm.</seed:think>Yes."),
        (
            "command",
            "<|START_THINKING|>Hm.<|END_THINKING|><|START_RESPONSE|>Yes.<|END_RESPONSE|>",
        ),
        (
            "harmony",
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
        ),
    ] {
        let thinking = THOUGHT_FORMATS
            .into_iter()
            .find(|format| format.name == name)
            .map(|format| Thoughts {
                format,
                begin: Thinking::Maybe,
            });
        assert!(thinking.is_some());
        let format = format(None, thinking);
        assert_eq!(
            parse(&format, &[text]),
            ("Hm.".to_owned(), "Yes.".to_owned(), vec![]),
            "{name}"
        );
    }
}

/// Marks, and beginnings and ends of marks, of all formats.
fn parts() -> Vec<String> {
    let mut parts: Vec<String> = [
        "{",
        "}",
        "[",
        "]",
        "(",
        ")",
        "\"",
        "'",
        "\\",
        "=",
        ":",
        ",",
        ";",
        "\n",
        " ",
        "é😀",
        "1",
        "true",
        "words",
        "f",
        "city",
        "\"name\": ",
        "\"arguments\": ",
        "\"f\"",
        "{\"name\": \"f\", \"arguments\": {\"a\": 1}}",
        "f(city='a')",
        ">>>",
        "all\n",
    ]
    .map(str::to_owned)
    .to_vec();
    for format in TOOL_FORMATS {
        let texts = [
            format.open,
            format.close,
            format.call_open,
            format.call_close,
        ]
        .map(str::to_owned);
        parts.extend(texts.into_iter().filter(|text| !text.is_empty()));
        parts.extend(format.tokens.iter().map(|&token| token.to_owned()));
    }
    for (_, text) in WRITTEN {
        let middle = text
            .char_indices()
            .nth(text.chars().count() / 2)
            .map_or(0, |(at, _)| at);
        parts.extend([text[..middle].to_owned(), text[middle..].to_owned()]);
    }
    for format in THOUGHT_FORMATS {
        parts.extend([format.open.to_owned(), format.close.to_owned()]);
    }
    parts
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn a_stream_says_the_same_wherever_it_is_cut(
        chosen in prop::collection::vec(any::<prop::sample::Index>(), 0..14),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        tools in 0..=TOOL_FORMATS.len(),
        thinking in 0..=2 * THOUGHT_FORMATS.len(),
    ) {
        let parts = parts();
        let text: String = chosen.iter().map(|at| at.get(&parts).as_str()).collect();
        let tools = TOOL_FORMATS.get(tools).copied();
        let thinking = THOUGHT_FORMATS.get(thinking / 2).map(|&format| Thoughts {
            format,
            begin: [Thinking::Maybe, Thinking::Open][thinking % 2],
        });
        prop_assume!(tools.is_some() || thinking.is_some());
        let format = format(tools, thinking);
        let borders: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
        let mut at: Vec<usize> = cuts.iter().map(|cut| *cut.get(&borders)).chain([0, text.len()]).collect();
        at.sort_unstable();
        let chunks: Vec<&str> = at.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
        prop_assert_eq!(parse(&format, &chunks), parse(&format, &[&text]));
    }
}
