//! The grammar of a whole answer: thoughts first, then what a client asks for, or calls of functions.

use llguidance::api::GrammarWithLexer;
use serde_json::{Value, json};

use super::grammar::{Grammar, schema_grammar};
use crate::request::Guide;
use crate::text::{Thinking, Tokenizer, ToolFormat};

/// Calls that an answer must, or may, consist of.
#[derive(Debug)]
pub struct Calls<'a> {
    /// How they are written.
    pub format: ToolFormat,
    /// Name, schema of the parameters, and whether that is strict.
    pub functions: Vec<(&'a str, Option<&'a Value>, bool)>,
    /// Whether there may be more than one.
    pub several: bool,
}

/// What an answer is made of.
#[derive(Debug, Default)]
pub struct AnswerGrammar<'a> {
    /// Thoughts before all else.
    pub thinking: Option<Thinking>,
    /// What the answer must be, and the client's field that asks for it.
    pub guide: Option<(&'a Guide, &'a str)>,
    /// Calls in the place of an answer.
    pub calls: Option<Calls<'a>>,
}

impl AnswerGrammar<'_> {
    /// The grammar; none where nothing is asked for. `tokenizer` says which markers are tokens of their own.
    pub fn grammar(&self, tokenizer: Option<&Tokenizer>) -> Option<Grammar> {
        if self.calls.is_none() && self.thinking.is_none() {
            return self.guide.map(|(guide, param)| Grammar::of(guide, param));
        }
        let marker = |text: &str| {
            let special = tokenizer.and_then(|tokenizer| {
                let id = tokenizer.token_to_id(text)?;
                tokenizer.is_special(id).then_some(id)
            });
            special.map_or_else(|| quoted(text), |id| format!("<[{id}]>"))
        };
        let mut grammars = Vec::new();
        let mut rules = Vec::new();
        let mut answers = Vec::new();
        if let Some((guide, _)) = self.guide {
            grammars.push(named("answer", Grammar::single(guide)));
            answers.push("@answer");
        }
        if let Some(calls) = &self.calls {
            calls.write(&mut rules, &mut grammars, &marker);
            answers.push("calls");
        }
        if answers.is_empty() {
            return None;
        }
        let thoughts = match self.thinking {
            None => String::new(),
            Some(Thinking::Open) => "thoughts".to_owned(),
            Some(Thinking::Maybe) => format!("({} thoughts)?", marker("<think>")),
        };
        if self.thinking.is_some() {
            rules.push(match marker("</think>") {
                text if text.starts_with('"') => {
                    format!("thoughts: inner gap\ninner[suffix={text}]: /(?s:.*)/\n")
                }
                token => format!("thoughts: /(?s:.*)/ {token} gap\n"),
            });
            rules.push("gap: | /\\n{1,2}/\n".to_owned());
        }
        let start = format!(
            "start: {thoughts} answer\nanswer: {}\n{}",
            answers.join(" | "),
            rules.concat()
        );
        grammars.insert(0, GrammarWithLexer::from_lark(start));
        let param = self.guide.map_or("tools", |(_, param)| param);
        Some(Grammar::from_parts(grammars, param))
    }
}

impl Calls<'_> {
    fn write(
        &self,
        rules: &mut Vec<String>,
        grammars: &mut Vec<GrammarWithLexer>,
        marker: &impl Fn(&str) -> String,
    ) {
        let more = |between: &str, item: &str| {
            if self.several {
                format!(" ({between} {item})*")
            } else {
                String::new()
            }
        };
        rules.push(match self.format {
            ToolFormat::Hermes => format!(
                "calls: call{}\ncall: {} \"\\n\" body \"\\n\" {}\n",
                more("\"\\n\"", "call"),
                marker("<tool_call>"),
                marker("</tool_call>"),
            ),
            ToolFormat::Llama3 => format!("calls: body{}\n", more("\"; \"", "body")),
            ToolFormat::Mistral => format!(
                "calls: {} \"[\" body{} \"]\"\n",
                marker("[TOOL_CALLS]"),
                more("\", \"", "body")
            ),
        });
        let arguments = match self.format {
            ToolFormat::Llama3 => "parameters",
            ToolFormat::Hermes | ToolFormat::Mistral => "arguments",
        };
        let bodies: Vec<String> = (0..self.functions.len())
            .map(|at| format!("body_{at}"))
            .collect();
        rules.push(format!("body: {}\n", bodies.join(" | ")));
        for (at, (name, parameters, strict)) in self.functions.iter().enumerate() {
            let before = format!("{{\"name\": {}, \"{arguments}\": ", json!(name));
            rules.push(format!(
                "body_{at}: {} @args_{at} \"}}\"\n",
                quoted(&before)
            ));
            let mut schema = parameters
                .cloned()
                .unwrap_or_else(|| json!({"properties": {}, "additionalProperties": false}));
            if let Some(object) = schema.as_object_mut() {
                object.insert("type".to_owned(), "object".into());
            }
            grammars.push(named(
                &format!("args_{at}"),
                schema_grammar(&schema, *strict),
            ));
        }
    }
}

fn named(name: &str, mut grammar: GrammarWithLexer) -> GrammarWithLexer {
    grammar.name = Some(name.to_owned());
    grammar
}

/// A text in Lark's syntax.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}
