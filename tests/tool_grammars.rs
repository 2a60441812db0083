//! Answers that must call: whatever a model says within the grammar is calls of the functions that there are, with
//! arguments that their schemas allow, and says the same to the parser wherever its text is cut.

use std::sync::LazyLock;

use lmserve::guided::{AnswerGrammar, Calls, Compiler, Spacing};
use lmserve::text::{Thinking, Tokenizer, ToolFormat};
use lmserve::wire::answer::{AnswerFormat, AnswerParser, Piece};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

const END: u32 = 256;
const FORMATS: [ToolFormat; 3] = [ToolFormat::Hermes, ToolFormat::Llama3, ToolFormat::Mistral];
/// From so many bytes on, a model ends what it may end.
const ENOUGH: usize = 60;
/// Longest answer, in bytes: what the schemas allow is shorter.
const LONGEST: usize = 2000;

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(byte_tokenizer);
static COMPILER: LazyLock<Compiler> =
    LazyLock::new(|| Compiler::new(&TOKENIZER, 257, &[END]).unwrap());
static PARAMETERS: LazyLock<Value> = LazyLock::new(|| {
    json!({
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 3}, "days": {"enum": [1, 2]}},
        "required": ["city", "days"],
        "additionalProperties": false,
    })
});

/// One token a byte, and one that ends an answer.
fn byte_tokenizer() -> Tokenizer {
    let printable = |byte: u8| matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut others = 0x100_u32..;
    let vocab: Map<String, Value> = (0..=255_u8)
        .map(|byte| {
            let c = if printable(byte) {
                char::from(byte)
            } else {
                others.next().and_then(char::from_u32).unwrap()
            };
            (c.to_string(), byte.into())
        })
        .collect();
    let decoder = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let end = json!({"id": END, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true});
    let description = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [end], "normalizer": null,
        "pre_tokenizer": decoder, "post_processor": null, "decoder": decoder,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    Tokenizer::from_json(description.to_string().as_bytes()).unwrap()
}

fn grammar(format: ToolFormat, names: &[&'static str], several: bool) -> AnswerGrammar<'static> {
    let schema = |name: &str| (name == "get_weather").then(|| &*PARAMETERS);
    AnswerGrammar {
        thinking: Some(Thinking::Maybe),
        guide: None,
        spacing: Spacing::Compact,
        calls: Some(Calls {
            format,
            functions: names
                .iter()
                .map(|&name| (name, schema(name), true))
                .collect(),
            several,
        }),
        words: false,
    }
}

/// What comes next to end `bytes`: the rest of the mark that closes thoughts, or the answer's end.
fn close(bytes: &[u8]) -> Option<u32> {
    let mark = b"</think>";
    if bytes.starts_with(b"<think>") && !bytes.windows(mark.len()).any(|window| window == mark) {
        let begun = (0..mark.len())
            .rev()
            .find(|&length| bytes.ends_with(&mark[..length]))?;
        return Some(mark[begun].into());
    }
    Some(END)
}

/// What a model says that would say anything: `luck` chooses among the tokens that are allowed.
fn said(grammar: &AnswerGrammar<'_>, luck: &[u16]) -> String {
    let grammar = grammar.grammar(Some(&TOKENIZER)).unwrap();
    let (mut matcher, _) = COMPILER.compile(&grammar).unwrap();
    let mut bytes = Vec::new();
    for at in 0..LONGEST {
        let mask = matcher.mask(&[END], &[], false).unwrap();
        let allowed: Vec<u32> = (0..257)
            .filter(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1)
            .collect();
        let chance = (luck[at % luck.len()] as usize + at * 31) / 3;
        // Mistral's calls are a list, which ends before the answer does.
        let token = close(&bytes)
            .into_iter()
            .chain([b']'.into()])
            .find(|token| at >= ENOUGH && allowed.contains(token))
            .unwrap_or(allowed[chance % allowed.len()]);
        if token == END {
            break;
        }
        bytes.push(token as u8);
        if matcher.consume(token).unwrap() {
            break;
        }
    }
    assert!(bytes.len() < LONGEST, "the answer ends by itself");
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Thoughts, words, and each call's name and arguments.
fn parse(format: ToolFormat, chunks: &[&str]) -> (String, String, Vec<(String, String)>) {
    let names = ["get_weather", "now"].map(str::to_owned).to_vec();
    let mut parser = AnswerParser::new(&AnswerFormat {
        thinking: Some(Thinking::Maybe),
        tools: Some((format, names)),
        one_call: false,
    })
    .unwrap();
    let mut whole = (String::new(), String::new(), Vec::new());
    let last = parser_pieces(&mut parser, chunks);
    for piece in last {
        match piece {
            Piece::Reasoning(text) => whole.0 += &text,
            Piece::Content(text) => whole.1 += &text,
            Piece::Call { name, .. } => whole.2.push((name, String::new())),
            Piece::Arguments { index, text } => whole.2[index].1 += &text,
        }
    }
    whole
}

fn parser_pieces(parser: &mut AnswerParser, chunks: &[&str]) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = chunks
        .iter()
        .flat_map(|chunk| parser.push(chunk, false))
        .collect();
    pieces.extend(parser.push("", true));
    pieces
}

fn arguments_are_allowed(name: &str, arguments: &str) -> bool {
    let Ok(Value::Object(object)) = serde_json::from_str(arguments) else {
        return false;
    };
    if name == "now" {
        return object.is_empty();
    }
    let city = object.get("city").and_then(Value::as_str);
    object.len() == 2
        && city.is_some_and(|city| city.chars().count() <= 3)
        && [json!(1), json!(2)].contains(&object["days"])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whoever_must_call_calls(
        format in 0..3_usize,
        only in any::<bool>(),
        several in any::<bool>(),
        luck in prop::collection::vec(any::<u16>(), 1..64),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let format = FORMATS[format];
        let names: &[&'static str] = if only { &["get_weather"] } else { &["get_weather", "now"] };
        let text = said(&grammar(format, names, several && !only), &luck);
        let (thoughts, words, calls) = parse(format, &[&text]);
        prop_assert_eq!(&words, "", "{}", text);
        prop_assert!(!calls.is_empty(), "{}", text);
        prop_assert!(calls.len() == 1 || (several && !only), "{}", text);
        for (name, arguments) in &calls {
            prop_assert!(names.contains(&name.as_str()) && arguments_are_allowed(name, arguments), "{}", text);
        }
        let borders: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
        let mut at: Vec<usize> = cuts.iter().map(|cut| *cut.get(&borders)).chain([0, text.len()]).collect();
        at.sort_unstable();
        let chunks: Vec<&str> = at.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
        prop_assert_eq!(parse(format, &chunks), (thoughts, words, calls));
    }
}

/// Words that lead a model into a call, or nearly.
const LEADS: [&str; 9] = [
    "",
    "Well, ",
    "{",
    " <tool_call",
    "<tool_call>",
    "So: <tool_call>",
    "[TOOL_CALLS]",
    "a [TOOL_CALLS]",
    "<|python_tag|>",
];

/// What a model says after `lead`, as far as the grammar allows that.
fn said_after(grammar: &AnswerGrammar<'_>, lead: &str, luck: &[u16]) -> String {
    let (mut matcher, _) = COMPILER
        .compile(&grammar.grammar(Some(&TOKENIZER)).unwrap())
        .unwrap();
    let mut bytes = Vec::new();
    for at in 0..LONGEST {
        let mask = matcher.mask(&[END], &[], false).unwrap();
        let allowed = |id: u32| mask[id as usize / 32] >> (id % 32) & 1 == 1;
        let any: Vec<u32> = (0..257).filter(|&id| allowed(id)).collect();
        let chance = (luck[at % luck.len()] as usize + at * 31) / 3;
        let led = lead.as_bytes().get(at).map(|&byte| u32::from(byte));
        let token = led
            .filter(|&token| allowed(token))
            .or_else(|| {
                let mut ends = [END, b']'.into()].into_iter();
                ends.find(|&end| at >= ENOUGH && allowed(end))
            })
            .unwrap_or(any[chance % any.len()]);
        if token == END {
            return String::from_utf8_lossy(&bytes).into_owned();
        }
        bytes.push(token as u8);
        if matcher.consume(token).unwrap() {
            return String::from_utf8_lossy(&bytes).into_owned();
        }
    }
    panic!("the answer ends by itself");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn whoever_may_call_calls_what_there_is(
        format in 0..3_usize,
        several in any::<bool>(),
        lead in 0..LEADS.len(),
        luck in prop::collection::vec(any::<u16>(), 1..64),
    ) {
        let format = FORMATS[format];
        let grammar = AnswerGrammar {
            thinking: None,
            words: true,
            ..grammar(format, &["get_weather", "now"], several)
        };
        let text = said_after(&grammar, LEADS[lead], &luck);
        let (_, words, calls) = parse(format, &[&text]);
        let mark = match format {
            ToolFormat::Hermes => "<tool_call>",
            ToolFormat::Llama3 => "<|python_tag|>",
            ToolFormat::Mistral => "[TOOL_CALLS]",
        };
        prop_assert!(!words.contains(mark), "{}", text);
        prop_assert!(calls.len() <= 1 || several, "{}", text);
        for (name, arguments) in &calls {
            prop_assert!(arguments_are_allowed(name, arguments), "{}", text);
        }
    }
}

#[test]
fn words_and_calls_take_turns() {
    let allowed = [
        (ToolFormat::Hermes, "Hello."),
        (
            ToolFormat::Hermes,
            "I ask.\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>",
        ),
        (
            ToolFormat::Hermes,
            "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n\
             </tool_call> Done.",
        ),
        (ToolFormat::Llama3, "Hello {}."),
        (
            ToolFormat::Llama3,
            "{\"name\": \"now\", \"parameters\": {}}",
        ),
        (
            ToolFormat::Llama3,
            "<|python_tag|>{\"name\": \"now\", \"parameters\": {}}",
        ),
        (
            ToolFormat::Mistral,
            "I ask.[TOOL_CALLS][{\"name\": \"now\", \"arguments\": {}}]",
        ),
    ];
    let refused = [
        (
            ToolFormat::Hermes,
            "I ask. <tool_call>\n{\"name\": \"nobody\"",
        ),
        (ToolFormat::Hermes, "<tool_call> "),
        (
            ToolFormat::Hermes,
            "<tool_call>\n{\"name\": \"now\", \"arguments\": {\"a\"",
        ),
        (ToolFormat::Llama3, "{\"name\": \"nobody\""),
        (ToolFormat::Llama3, " {"),
        (ToolFormat::Mistral, "[TOOL_CALLS]now"),
    ];
    let consumes = |format, text: &str| {
        let grammar = AnswerGrammar {
            thinking: None,
            words: true,
            ..grammar(format, &["get_weather", "now"], true)
        };
        let (mut matcher, _) = COMPILER
            .compile(&grammar.grammar(Some(&TOKENIZER)).unwrap())
            .unwrap();
        text.bytes()
            .all(|byte| matcher.consume(byte.into()).is_ok())
            .then(|| matcher.mask(&[END], &[], false).unwrap()[8] & 1 == 1)
    };
    for (format, text) in allowed {
        assert_eq!(consumes(format, text), Some(true), "{format:?} {text}");
    }
    for (format, text) in refused {
        assert_eq!(consumes(format, text), None, "{format:?} {text}");
    }
}

#[test]
fn each_format_is_written_as_its_models_write_it() {
    let expected = [
        "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>",
        "{\"name\": \"now\", \"parameters\": {}}",
        "[TOOL_CALLS][{\"name\": \"now\", \"arguments\": {}}]",
    ];
    for (format, expected) in FORMATS.into_iter().zip(expected) {
        let grammar = grammar(format, &["now"], false)
            .grammar(Some(&TOKENIZER))
            .unwrap();
        let (mut matcher, _) = COMPILER.compile(&grammar).unwrap();
        for byte in expected.bytes() {
            matcher.consume(byte.into()).unwrap();
        }
        let mask = matcher.mask(&[END], &[], false).unwrap();
        let allowed: Vec<u32> = (0..257)
            .filter(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1)
            .collect();
        assert_eq!(allowed, [END], "nothing follows {expected}");
        for other in [
            "Hello",
            "{\"name\": \"nobody\"",
            "<tool_call>\n{\"name\": \"x",
            "[TOOL_CALLS][]",
        ] {
            let (mut matcher, _) = COMPILER.compile(&grammar).unwrap();
            assert!(
                other
                    .bytes()
                    .any(|byte| matcher.consume(byte.into()).is_err()),
                "{other}"
            );
        }
    }
}
