//! The grammar of a whole answer: thoughts first, then what a client asks for, or calls of functions.

use llguidance::api::GrammarWithLexer;
use serde_json::{Value, json};

use super::grammar::{Grammar, escape, schema_grammar};
use super::schema::Spacing;
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
    /// White space in the JSON that `guide` asks for.
    pub spacing: Spacing,
    /// Calls in the place of an answer.
    pub calls: Option<Calls<'a>>,
    /// Whether there may be words instead of calls, or beside them.
    pub words: bool,
}

impl AnswerGrammar<'_> {
    /// The grammar; none where nothing is asked for. `tokenizer` says which markers are tokens of their own.
    pub fn grammar(&self, tokenizer: Option<&Tokenizer>) -> Option<Grammar> {
        if self.calls.is_none() && self.thinking.is_none() {
            return self
                .guide
                .map(|(guide, param)| Grammar::of(guide, param, self.spacing));
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
            grammars.push(named("answer", Grammar::single(guide, self.spacing)));
            answers.push("@answer");
        }
        if let Some(calls) = &self.calls {
            calls.write(&mut rules, &mut grammars, &marker);
            answers.push("calls");
            if self.words {
                calls.write_words(&mut rules, &marker);
                answers = vec!["words"];
            }
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
        let mark = marker(self.mark());
        rules.push(match self.format {
            ToolFormat::Hermes => format!(
                "calls: {mark} called{}\ncalled: \"\\n\" body \"\\n\" {}\n",
                more("\"\\n\"", &format!("{mark} called")),
                marker("</tool_call>"),
            ),
            ToolFormat::Llama3 => {
                format!("calls: called\ncalled: body{}\n", more("\"; \"", "body"))
            }
            ToolFormat::Mistral => format!(
                "calls: {mark} called\ncalled: \"[\" body{} \"]\"\n",
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
                schema_grammar(&schema, *strict, Spacing::Spaced),
            ));
        }
    }
}

impl Calls<'_> {
    /// What a call begins with; in Llama 3's format, may begin with.
    const fn mark(&self) -> &'static str {
        match self.format {
            ToolFormat::Hermes => "<tool_call>",
            ToolFormat::Llama3 => "<|python_tag|>",
            ToolFormat::Mistral => "[TOOL_CALLS]",
        }
    }

    /// Words with or without calls: what follows a call's mark is a call, and nothing that is read as one is words.
    fn write_words(&self, rules: &mut Vec<String>, marker: &impl Fn(&str) -> String) {
        let mark = marker(self.mark());
        rules.push(match self.format {
            ToolFormat::Hermes if self.several => "words: (opened called)* rest\n".to_owned(),
            ToolFormat::Hermes => "words: (opened called)? rest\n".to_owned(),
            ToolFormat::Llama3 => format!("words: {mark}? called | rest\n"),
            ToolFormat::Mistral => "words: opened called | rest\n".to_owned(),
        });
        // A token of its own is in no text.
        let is_text = mark.starts_with('"');
        if self.format != ToolFormat::Llama3 {
            rules.push(if is_text {
                format!("opened[suffix={mark}]: /(?s:.*)/\n")
            } else {
                format!("opened: /(?s:.*)/ {mark}\n")
            });
        }
        let without_mark = if is_text {
            format!(" & ~/(?s:.*{}.*)/", escape(self.mark()))
        } else {
            String::new()
        };
        let without_object = match self.format {
            ToolFormat::Llama3 => " & ~/(?s:[ \\t\\r\\n]*\\{.*)/",
            ToolFormat::Hermes | ToolFormat::Mistral => "",
        };
        rules.push(format!(
            "rest: | REST\nREST: /(?s:.+)/{without_mark}{without_object}\n"
        ));
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
