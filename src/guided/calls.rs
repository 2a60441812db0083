//! Generates the grammar of function calls from the description of their format.

use std::collections::HashMap;
use std::fmt::Write as _;

use llguidance::api::GrammarWithLexer;
use serde_json::{Map, Value, json};

use super::grammar::{escape, schema_grammar};
use super::loose::{LooseRules, NOTES, one_of, text_pattern};
use super::marks::{Marks, quoted};
use super::schema::Spacing;
use crate::error::{Error, Kind, Result};
use crate::request::Types;
use crate::text::formats::{Arguments, Shape, ToolFormat, pieces};

/// The calls that an answer must or may contain.
#[derive(Debug)]
pub struct Calls<'a> {
    /// How they are written.
    pub format: &'static ToolFormat,
    /// Each function's name, the schema of its parameters, and whether the schema is strict.
    pub functions: Vec<(&'a str, Option<&'a Value>, bool)>,
    /// Whether more than one call is allowed.
    pub several: bool,
}

/// The rules of calls, and the grammars that the rules refer to.
pub(super) struct CallRules<'a> {
    marks: &'a Marks<'a>,
    pub(super) rules: String,
    pub(super) grammars: Vec<GrammarWithLexer>,
}

impl<'a> CallRules<'a> {
    pub(super) const fn new(marks: &'a Marks<'a>) -> Self {
        Self {
            marks,
            rules: String::new(),
            grammars: Vec::new(),
        }
    }

    /// Writes the rule `calls` and those it uses: `call` with everything around it, and `body`.
    ///
    /// # Errors
    /// 400: a schema is strict, but this format cannot enforce it.
    pub(super) fn write(&mut self, calls: &Calls<'_>) -> Result<()> {
        let format = calls.format;
        let sequence = |text: &str| self.marks.sequence(text);
        let (open, close) = (
            sequence(&with_list(format, true)),
            sequence(&with_list(format, false)),
        );
        let more = more(calls, &sequence(format.between));
        let call = format!(
            "{} body {}",
            sequence(format.call_open),
            sequence(format.call_close)
        );
        let _ = writeln!(self.rules, "calls: {open} call{more} {close}\ncall: {call}");
        let bodies: Vec<String> = (0..calls.functions.len())
            .map(|at| format!("body_{at}"))
            .collect();
        let _ = writeln!(self.rules, "body: {}", bodies.join(" | "));
        for (at, &(name, parameters, strict)) in calls.functions.iter().enumerate() {
            self.body(format, at, name, parameters, strict)?;
        }
        Ok(())
    }

    /// Writes the rule `words`: words with or without calls. A call follows each marker of a call, and words contain nothing that
    /// would be parsed as a call.
    pub(super) fn write_words(&mut self, calls: &Calls<'_>) {
        let format = calls.format;
        let sequence = |text: &str| self.marks.sequence(text);
        let openings = format.openings();
        let first = pieces(format.open, format.tokens)
            .chain(pieces(format.call_open, format.tokens))
            .chain(openings.iter().copied())
            .next()
            .unwrap_or_default();
        let behind = |text: &str| sequence(text.split_once(first).map_or(text, |(_, rest)| rest));
        if format.bare {
            let also: Vec<String> = openings.iter().map(|mark| sequence(mark)).collect();
            let _ = writeln!(self.rules, "words: ({})? calls | rest", also.join(" | "));
        } else if pieces(format.open, format.tokens).next().is_some() {
            let opened = behind(&with_list(format, true));
            let more = more(calls, &sequence(format.between));
            let close = sequence(&with_list(format, false));
            let _ = writeln!(
                self.rules,
                "words: (opened {opened} call{more} {close})? rest"
            );
        } else {
            let before = match format.shapes.first() {
                Some(Shape::Named { before, .. }) if format.call_open.is_empty() => *before,
                _ => "",
            };
            // The name's prefix is the marker here, and the body writes it.
            let call = if before.is_empty() {
                format!(
                    "{} body {}",
                    behind(format.call_open),
                    sequence(format.call_close)
                )
            } else {
                format!("opened_body {}", sequence(format.call_close))
            };
            let times = if calls.several { "*" } else { "?" };
            let _ = writeln!(self.rules, "words: (opened {call}){times} rest");
            if !before.is_empty() {
                let bodies: Vec<String> = (0..calls.functions.len())
                    .map(|at| format!("named_{at}"))
                    .collect();
                let _ = writeln!(self.rules, "opened_body: {}", bodies.join(" | "));
            }
        }
        // A marker that is a single token cannot occur in text.
        let in_text = openings
            .iter()
            .filter(|mark| !self.marks.begins_special(mark));
        let no = |mark: &&str| format!(" & ~/(?s:.*{}.*)/", escape(mark));
        if !format.bare {
            let others: String = in_text
                .clone()
                .filter(|mark| **mark != first)
                .map(no)
                .collect();
            let rule = self
                .marks
                .up_to("opened", &format!("/(?s:.*)/{others}"), first);
            self.rules.push_str(&rule);
        }
        let mut without: String = in_text.map(no).collect();
        if format.bare {
            let begin = if format.list { "\\[" } else { "\\{" };
            let _ = write!(without, " & ~/(?s:[ \\t\\r\\n]*{begin}.*)/");
        }
        let _ = writeln!(self.rules, "rest: | REST\nREST: /(?s:.+)/{without}");
    }

    fn body(
        &mut self,
        format: &'static ToolFormat,
        at: usize,
        name: &str,
        parameters: Option<&Value>,
        strict: bool,
    ) -> Result<()> {
        let schema = parameters_of(parameters);
        let (before, named) = match format.shapes.first() {
            Some(Shape::Named {
                before,
                number,
                after,
                arguments,
                ..
            }) => {
                let mut named = quoted(name);
                if let Some(number) = number {
                    let _ = write!(named, " {} /[0-9]{{1,3}}/", quoted(number));
                }
                let arguments = self.arguments(arguments, at, name, &schema, strict)?;
                let after = self.marks.sequence(after);
                (
                    self.marks.sequence(before),
                    format!("{named} {after} {arguments}"),
                )
            }
            Some(Shape::Object {
                number,
                name: key,
                arguments,
            }) => {
                let numbered = number.map_or_else(
                    || quoted("{"),
                    |number| {
                        format!(
                            "{} /[0-9]{{1,3}}/ {}",
                            quoted(&format!("{{\"{number}\": \"")),
                            quoted("\", ")
                        )
                    },
                );
                let before = format!("\"{key}\": {}, \"{arguments}\": ", json!(name));
                let arguments = self.json(&format!("args_{at}"), &schema, strict);
                (
                    String::new(),
                    format!("{numbered} {} {arguments} \"}}\"", quoted(&before)),
                )
            }
            None => (String::new(), quoted(name)),
        };
        let _ = writeln!(
            self.rules,
            "body_{at}: {before} named_{at}\nnamed_{at}: {named}"
        );
        Ok(())
    }

    fn json(&mut self, name: &str, schema: &Value, strict: bool) -> String {
        let mut grammar = schema_grammar(schema, strict, Spacing::Spaced);
        grammar.name = Some(name.to_owned());
        self.grammars.push(grammar);
        format!("@{name}")
    }

    fn arguments(
        &mut self,
        arguments: &'static Arguments,
        at: usize,
        name: &str,
        schema: &Value,
        strict: bool,
    ) -> Result<String> {
        let (rule, unsupported) = match arguments {
            Arguments::Json => (self.json(&format!("args_{at}"), schema, strict), Vec::new()),
            Arguments::Loose(loose) => {
                let mut rules = LooseRules {
                    loose,
                    marks: self.marks,
                    root: schema,
                    prefix: format!("args_{at}"),
                    rules: String::new(),
                    grammars: Vec::new(),
                    unsupported: Vec::new(),
                    references: HashMap::new(),
                    count: 0,
                };
                let rule = rules.arguments(schema);
                self.rules.push_str(&rules.rules);
                self.grammars.append(&mut rules.grammars);
                (rule, rules.unsupported)
            }
            Arguments::Pairs { .. } => self.pairs(arguments, at, schema, strict),
        };
        match unsupported.first().filter(|_| strict) {
            None => Ok(rule),
            Some(keyword) => {
                let message = format!(
                    "tools cannot be compiled: {keyword} in the parameters of {name} cannot be enforced in the \
                     format in which this model calls functions; leave out either it or strict"
                );
                Err(Error::new(Kind::Invalid, "invalid_grammar", message).with_param("tools"))
            }
        }
    }

    /// Arguments one by one, in the schema's order: all required ones, and any of the others.
    fn pairs(
        &mut self,
        arguments: &'static Arguments,
        at: usize,
        schema: &Value,
        strict: bool,
    ) -> (String, Vec<String>) {
        let empty = Map::new();
        let object = schema.as_object().unwrap_or(&empty);
        let known = ["type", "properties", "required", "additionalProperties"];
        let mut unsupported: Vec<String> = odd_keys(object, &known);
        let properties = object.get("properties").and_then(Value::as_object);
        let Some(properties) = properties.filter(|properties| !properties.is_empty()) else {
            if object.get("additionalProperties") == Some(&Value::Bool(false)) {
                return (String::new(), unsupported);
            }
            let name = format!("pair_{at}");
            let key = "/[A-Za-z_][A-Za-z0-9_.\\-]{0,63}/";
            self.pair(
                arguments,
                &name,
                key,
                &Value::Bool(true),
                schema,
                strict,
                &mut unsupported,
            );
            return (format!("{name}*"), unsupported);
        };
        let required: Vec<&str> = object
            .get("required")
            .and_then(Value::as_array)
            .map(|names| names.iter().filter_map(Value::as_str).collect())
            .unwrap_or_default();
        let mut sequence = Vec::new();
        for (place, (key, property)) in properties.iter().enumerate() {
            if *property == Value::Bool(false) {
                continue;
            }
            let name = format!("pair_{at}_{place}");
            self.pair(
                arguments,
                &name,
                &quoted(key),
                property,
                schema,
                strict,
                &mut unsupported,
            );
            let optional = if required.contains(&key.as_str()) {
                ""
            } else {
                "?"
            };
            sequence.push(format!("{name}{optional}"));
        }
        (sequence.join(" "), unsupported)
    }

    #[allow(clippy::too_many_arguments)]
    fn pair(
        &mut self,
        arguments: &'static Arguments,
        name: &str,
        key: &str,
        property: &Value,
        root: &Value,
        strict: bool,
        unsupported: &mut Vec<String>,
    ) {
        let Arguments::Pairs {
            key_open,
            key_close,
            value_close,
            typed,
        } = arguments
        else {
            return;
        };
        let types = Types::of(property, root);
        let sequence = |text: &str| self.marks.sequence(text);
        let (open, close) = (sequence(key_open), sequence(key_close));
        let attribute = |text: bool| match typed {
            Some(typed) => sequence(&format!("{typed}{text}")),
            None => String::new(),
        };
        let mut written = Vec::new();
        // If the text does not show a value's type, a value of any type is written without quotes.
        if types.may_be_text() {
            let value = format!("{name}_text");
            let pattern = Self::text_of(property, types, unsupported);
            let rule = self
                .marks
                .up_to(&value, &format!("/{pattern}/"), value_close);
            self.rules.push_str(&rule);
            written.push(format!("{open} {key} {} {close} {value}", attribute(true)));
        }
        if !types.may_be_text() || (typed.is_some() && !types.only_text()) {
            let value = self.json(&format!("{name}_json"), &within(property, root), strict);
            let end = self.marks.sequence(value_close);
            written.push(format!(
                "{open} {key} {} {close} {value} {end}",
                attribute(false)
            ));
        }
        let _ = writeln!(self.rules, "{name}: {}", written.join(" | "));
    }

    fn text_of(property: &Value, types: Types, unsupported: &mut Vec<String>) -> String {
        let Some(object) = property.as_object() else {
            return "(?s:.*)".to_owned();
        };
        if let Some(Value::Array(values)) = object.get("enum") {
            let texts: Vec<String> = values.iter().map(bare).collect();
            return one_of(&texts.iter().map(String::as_str).collect::<Vec<_>>());
        }
        if let Some(value) = object.get("const") {
            return one_of(&[&bare(value)]);
        }
        let Some(words) = types.words().filter(|_| object.contains_key("type")) else {
            // If anything else is allowed, the pattern of a text covers it.
            return "(?s:.*)".to_owned();
        };
        let known = ["type", "pattern", "minLength", "maxLength"];
        unsupported.extend(odd_keys(object, &known));
        let text = text_pattern(object);
        if words.is_empty() {
            text
        } else {
            format!("({text}|{})", words.join("|"))
        }
    }
}

fn odd_keys(object: &Map<String, Value>, known: &[&str]) -> Vec<String> {
    let odd = object
        .keys()
        .filter(|key| !known.contains(&key.as_str()) && !NOTES.contains(&key.as_str()));
    odd.cloned().collect()
}

/// A value as it is written between markers.
fn bare(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        _ => value.to_string(),
    }
}

/// `property` as a schema of its own, with the definitions that it may refer to.
fn within(property: &Value, root: &Value) -> Value {
    let mut property = property.clone();
    if let Some(object) = property.as_object_mut() {
        for definitions in ["$defs", "definitions"] {
            if let Some(schemas) = root.get(definitions) {
                object.entry(definitions).or_insert_with(|| schemas.clone());
            }
        }
    }
    property
}

/// The parameters of a function. A function without a schema has none.
fn parameters_of(parameters: Option<&Value>) -> Value {
    let mut schema = parameters
        .cloned()
        .unwrap_or_else(|| json!({"properties": {}, "additionalProperties": false}));
    if let Some(object) = schema.as_object_mut() {
        object.insert("type".to_owned(), "object".into());
    }
    schema
}

/// The text that begins or ends the whole list of calls.
fn with_list(format: &ToolFormat, open: bool) -> String {
    let bracket = |text| if format.list { text } else { "" };
    if open {
        format!("{}{}", format.open, bracket("["))
    } else {
        format!("{}{}", bracket("]"), format.close)
    }
}

fn more(calls: &Calls<'_>, between: &str) -> String {
    // In a format of messages without a separator, only the last message can be a call.
    let single = calls.format.messages.is_some() && between.is_empty();
    if calls.several && !single {
        format!(" ({between} call)*")
    } else {
        String::new()
    }
}
