//! Tests the parts of each format's texts, and that they do not depend on how the texts are cut.

use serde_json::json;

use super::*;
use crate::text::formats::{HERMES, THOUGHT_FORMATS, TOOL_FORMATS, Thinking};

mod calls;
mod cuts;
mod thoughts;

/// All parts of an answer: reasoning, content, and each call's name and arguments.
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

/// The same two calls as models of each format write them, after words if the format allows that.
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
