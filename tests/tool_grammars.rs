//! Answers that must call: whatever a model says within the grammar is calls of the functions that there are, with
//! arguments that their schemas allow, and says the same to the parser wherever its text is cut.

use std::sync::LazyLock;

use lmserve::guided::{AnswerGrammar, Calls, Compiler, Spacing};
use lmserve::request::Function;
use lmserve::text::formats::{TOOL_FORMATS, Thinking, Thoughts, ToolFormat};
use lmserve::text::{Detokenizer, Tokenizer};
use lmserve::wire::answer::{AnswerFormat, AnswerParser, Piece};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

const END: u32 = 256;
/// From so many bytes on, a model ends what it may end.
const ENOUGH: usize = 60;
/// Longest answer, in bytes: what the schemas allow is shorter.
const LONGEST: usize = 8000;

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

fn format_named(name: &str) -> &'static ToolFormat {
    ToolFormat::named(name).unwrap()
}

/// Messages have headers in the place of marks around thoughts.
fn thoughts(format: &ToolFormat) -> Option<Thoughts> {
    let plain = format.messages.is_none();
    plain.then(|| Thoughts::think(Thinking::Maybe))
}

fn grammar(
    format: &'static ToolFormat,
    names: &[&'static str],
    several: bool,
) -> AnswerGrammar<'static> {
    let schema = |name: &str| (name == "get_weather").then(|| &*PARAMETERS);
    AnswerGrammar {
        thinking: thoughts(format),
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

/// Where calls together end before the answer does, what leads there and not to a further call: the end of a list, of a tag,
/// of a `section` or of `calls`, or a tag in the place of a new line.
const CLOSING: [u32; 4] = [b']' as u32, b'/' as u32, b's' as u32, b'<' as u32];

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
    let grammar = grammar.grammar(Some(&TOKENIZER)).unwrap().unwrap();
    let (mut matcher, _) = COMPILER.compile(&grammar).unwrap();
    let mut bytes = Vec::new();
    for at in 0..LONGEST {
        let mask = matcher.mask(&[END], &[], false).unwrap();
        let allowed: Vec<u32> = (0..257)
            .filter(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1)
            .collect();
        let chance = (luck[at % luck.len()] as usize + at * 31) / 3;
        let token = close(&bytes)
            .into_iter()
            .chain(CLOSING)
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
fn parse(format: &'static ToolFormat, chunks: &[&str]) -> (String, String, Vec<(String, String)>) {
    let functions = vec![
        Function::new("get_weather", Some(&PARAMETERS)),
        Function::new("now", None),
    ];
    let mut parser = AnswerParser::new(&AnswerFormat {
        thinking: thoughts(format),
        tools: Some((format, functions)),
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
        format in 0..TOOL_FORMATS.len(),
        only in any::<bool>(),
        several in any::<bool>(),
        luck in prop::collection::vec(any::<u16>(), 1..64),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let format = TOOL_FORMATS[format];
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
fn leads() -> Vec<String> {
    let mut leads = ["", "Well, ", "{", "[", "So: <tool_call>", "a [TOOL_CALLS]"]
        .map(str::to_owned)
        .to_vec();
    for format in TOOL_FORMATS {
        for opening in format.openings() {
            leads.push(opening.to_owned());
            leads.push(format!(" {}", &opening[..opening.len() - 1]));
        }
    }
    leads
}

/// What a model says after `lead`, as far as the grammar allows that.
fn said_after(grammar: &AnswerGrammar<'_>, lead: &str, luck: &[u16]) -> String {
    let (mut matcher, _) = COMPILER
        .compile(&grammar.grammar(Some(&TOKENIZER)).unwrap().unwrap())
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
                let mut ends = [END].into_iter().chain(CLOSING);
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
        format in 0..TOOL_FORMATS.len(),
        several in any::<bool>(),
        lead in any::<prop::sample::Index>(),
        luck in prop::collection::vec(any::<u16>(), 1..64),
    ) {
        let format = TOOL_FORMATS[format];
        prop_assume!(format.messages.is_none());
        let grammar = AnswerGrammar {
            thinking: None,
            words: true,
            ..grammar(format, &["get_weather", "now"], several)
        };
        let leads = leads();
        let text = said_after(&grammar, lead.get::<String>(&leads), &luck);
        let (_, words, calls) = parse(format, &[&text]);
        for mark in format.openings() {
            prop_assert!(!words.contains(mark), "{}", text);
        }
        prop_assert!(calls.len() <= 1 || several, "{}", text);
        for (name, arguments) in &calls {
            prop_assert!(arguments_are_allowed(name, arguments), "{}", text);
        }
    }
}

#[test]
fn words_and_calls_take_turns() {
    let allowed = [
        ("hermes", "Hello."),
        (
            "hermes",
            "I ask.\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>",
        ),
        (
            "hermes",
            "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n\
             </tool_call> Done.",
        ),
        ("llama3", "Hello {}."),
        ("llama3", "{\"name\": \"now\", \"parameters\": {}}"),
        (
            "llama3",
            "<|python_tag|>{\"name\": \"now\", \"parameters\": {}}",
        ),
        (
            "mistral",
            "I ask.[TOOL_CALLS][{\"name\": \"now\", \"arguments\": {}}]",
        ),
    ];
    let refused = [
        ("hermes", "I ask. <tool_call>\n{\"name\": \"nobody\""),
        ("hermes", "<tool_call> "),
        (
            "hermes",
            "<tool_call>\n{\"name\": \"now\", \"arguments\": {\"a\"",
        ),
        ("llama3", "{\"name\": \"nobody\""),
        ("llama3", " {"),
        ("mistral", "[TOOL_CALLS]now"),
    ];
    let consumes = |format, text: &str| {
        let grammar = AnswerGrammar {
            thinking: None,
            words: true,
            ..grammar(format_named(format), &["get_weather", "now"], true)
        };
        let (mut matcher, _) = COMPILER
            .compile(&grammar.grammar(Some(&TOKENIZER)).unwrap().unwrap())
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

const CALL: &str = "{\"city\": \"é <\", \"days\": 2}";

/// One call as each format's models write it.
fn written(format: &str) -> String {
    match format {
        "hermes" => format!("<tool_call>\n{{\"name\": \"get_weather\", \"arguments\": {CALL}}}\n</tool_call>"),
        "llama3" => format!("{{\"name\": \"get_weather\", \"parameters\": {CALL}}}"),
        "pythonic" => "[get_weather(city=\"é <\", days=2)]".to_owned(),
        "lfm2" => "<|tool_call_start|>[get_weather(city=\"é <\", days=2)]<|tool_call_end|>".to_owned(),
        "mistral" => format!("[TOOL_CALLS][{{\"name\": \"get_weather\", \"arguments\": {CALL}}}]"),
        "mistral_args" => format!("[TOOL_CALLS]get_weather[ARGS]{CALL}"),
        "granite" => format!("<|tool_call|>[{{\"name\": \"get_weather\", \"arguments\": {CALL}}}]"),
        "phi4" => format!("<|tool_call|>[{{\"name\": \"get_weather\", \"arguments\": {CALL}}}]<|/tool_call|>"),
        "qwen3_coder" => "<tool_call>\n<function=get_weather>\n<parameter=city>\né <\n</parameter>\n\
            <parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
            .to_owned(),
        "glm" => "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>é <</arg_value>\n<arg_key>days</arg_key>\n\
            <arg_value>2</arg_value>\n</tool_call>"
            .to_owned(),
        "glm47" => "<tool_call>get_weather<arg_key>city</arg_key><arg_value>é <</arg_value><arg_key>days</arg_key>\
            <arg_value>2</arg_value></tool_call>"
            .to_owned(),
        "minimax_m2" => "<minimax:tool_call>\n<invoke name=\"get_weather\">\n<parameter name=\"city\">é <</parameter>\n\
            <parameter name=\"days\">2</parameter>\n</invoke>\n</minimax:tool_call>"
            .to_owned(),
        "minimax_m1" => format!("<tool_calls>\n{{\"name\": \"get_weather\", \"arguments\": {CALL}}}\n</tool_calls>"),
        "deepseek_v3" => format!(
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{CALL}\n```\
             <｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        ),
        "deepseek_v31" => format!(
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{CALL}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        ),
        "deepseek_v32" => "<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"get_weather\">\n\
            <｜DSML｜parameter name=\"city\" string=\"true\">é <</｜DSML｜parameter>\n\
            <｜DSML｜parameter name=\"days\" string=\"false\">2</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>"
            .to_owned(),
        "deepseek_v4" => written("deepseek_v32").replace("function_calls", "tool_calls"),
        "command" => format!(
            "<|START_ACTION|>[\n    {{\"tool_call_id\": \"0\", \"tool_name\": \"get_weather\", \"parameters\": {CALL}}}\n]<|END_ACTION|>"
        ),
        "kimi_k2" => format!(
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{CALL}\
             <|tool_call_end|><|tool_calls_section_end|>"
        ),
        "gemma4" => "<|tool_call>call:get_weather{city:<|\"|>é <<|\"|>,days:2}<tool_call|>".to_owned(),
        "functionary_v31" => format!("<function=get_weather>{CALL}</function>"),
        "functionary_v32" => format!("get_weather\n{CALL}"),
        "harmony" => format!("<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{CALL}"),
        _ => panic!("{format} has no example"),
    }
}

#[test]
fn each_format_is_written_as_its_models_write_it() {
    for format in TOOL_FORMATS {
        let expected = written(format.name);
        let grammar = grammar(format, &["get_weather"], false)
            .grammar(Some(&TOKENIZER))
            .unwrap()
            .unwrap();
        let (mut matcher, _) = COMPILER.compile(&grammar).unwrap();
        for (at, byte) in expected.bytes().enumerate() {
            let said = String::from_utf8_lossy(&expected.as_bytes()[..=at]);
            assert!(
                matcher.consume(byte.into()).is_ok(),
                "{} may not say {said}",
                format.name
            );
        }
        let mask = matcher.mask(&[END], &[], false).unwrap();
        let allowed: Vec<u32> = (0..257)
            .filter(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1)
            .collect();
        assert_eq!(allowed, [END], "nothing follows {expected}");
        let calls = vec![("get_weather".to_owned(), CALL.to_owned())];
        assert_eq!(
            parse(format, &[&expected]),
            (String::new(), String::new(), calls),
            "{}",
            format.name
        );
        let unknown = expected.replace("get_weather", "nobody");
        for other in ["Hello", &unknown] {
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

/// Richer parameters than those above: each must come back as a value that the schema allows.
fn rich() -> Value {
    json!({
        "type": "object",
        "properties": {
            "text": {"type": "string", "minLength": 1, "maxLength": 4},
            "word": {"enum": ["a b", "c"]},
            "maybe": {"type": ["string", "null"], "maxLength": 2},
            "flags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
            "inner": {"type": "object", "properties": {"n": {"type": "number", "minimum": 1, "maximum": 3},
                "t": {"type": "string", "maxLength": 2}}, "required": ["n"], "additionalProperties": false},
            "node": {"$ref": "#/$defs/node"},
        },
        "required": ["text", "flags"],
        "additionalProperties": false,
        "$defs": {"node": {"type": "integer", "minimum": 0, "maximum": 9}},
    })
}

fn is_rich(object: &Map<String, Value>) -> bool {
    let short = |value: &Value, most| {
        value
            .as_str()
            .is_some_and(|text| text.chars().count() <= most)
    };
    object.iter().all(|(key, value)| match key.as_str() {
        "text" => short(value, 4) && value != "",
        "word" => value == "a b" || value == "c",
        // A word that is not a text is what its schema allows as well.
        "maybe" => value.is_null() || value.is_string(),
        "flags" => value.as_array().is_some_and(|flags| {
            (1..=2).contains(&flags.len()) && flags.iter().all(Value::is_boolean)
        }),
        "inner" => {
            let number = value["n"]
                .as_f64()
                .is_some_and(|n| (1.0..=3.0).contains(&n));
            number && value.get("t").is_none_or(|text| short(text, 2))
        }
        "node" => value.as_u64().is_some_and(|n| n < 10),
        _ => false,
    }) && object.contains_key("text")
        && object.contains_key("flags")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn arguments_of_every_kind_are_what_their_schema_allows(
        format in 0..TOOL_FORMATS.len(),
        luck in prop::collection::vec(any::<u16>(), 1..64),
        sizes in prop::collection::vec(1..9_usize, 1..12),
    ) {
        let format = TOOL_FORMATS[format];
        let schema = rich();
        let grammar = AnswerGrammar {
            thinking: None,
            calls: Some(Calls { format, functions: vec![("f", Some(&schema), true)], several: false }),
            ..AnswerGrammar::default()
        };
        let text = said(&grammar, &luck);
        let answer = AnswerFormat {
            thinking: None,
            tools: Some((format, vec![Function::new("f", Some(&schema))])),
            one_call: false,
        };
        let whole = AnswerParser::new(&answer).unwrap().push(&text, true);
        let (mut name, mut arguments) = (String::new(), String::new());
        for piece in &whole {
            match piece {
                Piece::Call { name: called, .. } => name.clone_from(called),
                Piece::Arguments { text, .. } => arguments += text,
                _ => prop_assert!(false, "{} says {:?} in {}", format.name, piece, text),
            }
        }
        let parsed: Result<Map<String, Value>, _> = serde_json::from_str(&arguments);
        prop_assert!(name == "f" && parsed.is_ok_and(|object| is_rich(&object)), "{} {} {}", format.name, text, arguments);
        // The same from tokens that part characters, some at a time.
        let (mut detokenizer, mut parser) = (Detokenizer::new(false), AnswerParser::new(&answer).unwrap());
        let (mut streamed, mut waiting) = (String::new(), String::new());
        let mut count = 0;
        for (at, byte) in text.bytes().enumerate() {
            waiting += detokenizer.push(&TOKENIZER, byte.into());
            count += 1;
            if count >= sizes[at % sizes.len()] {
                count = 0;
                for piece in parser.push(&std::mem::take(&mut waiting), false) {
                    if let Piece::Arguments { text, .. } = piece {
                        streamed += &text;
                    }
                }
            }
        }
        waiting += &detokenizer.flush(&TOKENIZER);
        for piece in parser.push(&waiting, true) {
            if let Piece::Arguments { text, .. } = piece {
                streamed += &text;
            }
        }
        prop_assert_eq!(streamed, arguments);
    }
}
