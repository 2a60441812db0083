//! Rules in Lark's syntax for arguments that are nearly JSON, generated from their schema.

use std::collections::HashMap;
use std::fmt::Write as _;

use llguidance::api::GrammarWithLexer;
use serde_json::{Map, Value, json};

use super::grammar::{escape, schema_grammar};
use super::marks::{Marks, quoted};
use super::schema::Spacing;
use crate::text::formats::Loose;

/// Keywords that restrict nothing.
pub(super) const NOTES: [&str; 12] = [
    "title",
    "description",
    "default",
    "examples",
    "$comment",
    "$schema",
    "$id",
    "$anchor",
    "$defs",
    "definitions",
    "readOnly",
    "deprecated",
];

/// Generates the rules for one function's arguments.
pub(super) struct LooseRules<'a> {
    pub(super) loose: &'static Loose,
    pub(super) marks: &'a Marks<'a>,
    /// The schema that `$ref` refers to.
    pub(super) root: &'a Value,
    /// The prefix of its rules' names.
    pub(super) prefix: String,
    pub(super) rules: String,
    pub(super) grammars: Vec<GrammarWithLexer>,
    /// Keywords that were ignored.
    pub(super) unsupported: Vec<String>,
    pub(super) references: HashMap<String, String>,
    pub(super) count: usize,
}

impl LooseRules<'_> {
    fn name(&mut self) -> String {
        self.count += 1;
        format!("{}_{}", self.prefix, self.count)
    }

    /// The arguments of a call: an object in the brackets of this format.
    pub(super) fn arguments(&mut self, schema: &Value) -> String {
        let (open, close) = (self.loose.open, self.loose.close);
        self.object(schema, open, close, self.loose.equals)
    }

    fn note(&mut self, object: &Map<String, Value>, known: &[&str]) {
        let odd = object
            .keys()
            .filter(|key| !known.contains(&key.as_str()) && !NOTES.contains(&key.as_str()));
        self.unsupported.extend(odd.cloned());
    }

    fn value(&mut self, schema: &Value) -> String {
        let Some(object) = schema.as_object() else {
            return self.any();
        };
        if let Some(Value::String(reference)) = object.get("$ref") {
            return self.reference(reference);
        }
        if let Some(Value::Array(values)) = object.get("enum") {
            let values: Vec<String> = values.iter().map(|value| self.literal(value)).collect();
            return format!("({})", values.join(" | "));
        }
        if let Some(value) = object.get("const") {
            return self.literal(value);
        }
        for union in ["anyOf", "oneOf"] {
            if let Some(Value::Array(schemas)) = object.get(union) {
                let each: Vec<String> = schemas.iter().map(|schema| self.value(schema)).collect();
                return format!("({})", each.join(" | "));
            }
        }
        if let Some(Value::Array(schemas)) = object.get("allOf")
            && let [one] = schemas.as_slice()
        {
            return self.value(one);
        }
        let kinds: Vec<&str> = match object.get("type") {
            Some(Value::String(kind)) => vec![kind],
            Some(Value::Array(kinds)) => kinds.iter().filter_map(Value::as_str).collect(),
            _ if object.contains_key("properties") => vec!["object"],
            _ if object.contains_key("items") => vec!["array"],
            _ => {
                self.note(object, &[]);
                return self.any();
            }
        };
        let each: Vec<String> = kinds
            .iter()
            .map(|kind| self.typed(kind, object, schema))
            .collect();
        format!("({})", each.join(" | "))
    }

    fn typed(&mut self, kind: &str, object: &Map<String, Value>, schema: &Value) -> String {
        match kind {
            "string" => self.text(object),
            "integer" | "number" => {
                let mut schema = object.clone();
                schema.insert("type".to_owned(), kind.into());
                self.json(&Value::Object(schema))
            }
            "boolean" => format!("({} | {})", self.word(true), self.word(false)),
            "null" => quoted(if self.loose.python { "None" } else { "null" }),
            "array" => self.array(object),
            "object" => self.object(schema, '{', '}', ':'),
            _ => self.any(),
        }
    }

    fn word(&self, truth: bool) -> String {
        quoted(match (truth, self.loose.python) {
            (true, true) => "True",
            (false, true) => "False",
            (true, false) => "true",
            (false, false) => "false",
        })
    }

    /// A part that is plain JSON in this format too.
    fn json(&mut self, schema: &Value) -> String {
        let name = self.name();
        let mut grammar = schema_grammar(schema, false, Spacing::Spaced);
        grammar.name = Some(name.clone());
        self.grammars.push(grammar);
        format!("@{name}")
    }

    fn text(&mut self, object: &Map<String, Value>) -> String {
        if self.loose.quote.len() == 1 {
            let mut schema = object.clone();
            schema.insert("type".to_owned(), "string".into());
            return self.json(&Value::Object(schema));
        }
        self.note(object, &["type", "pattern", "minLength", "maxLength"]);
        let (open, pattern) = (self.marks.sequence(self.loose.quote), text_pattern(object));
        let name = self.name();
        let rule = self
            .marks
            .up_to(&name, &format!("/{pattern}/"), self.loose.quote);
        self.rules.push_str(&rule);
        format!("{open} {name}")
    }

    fn literal(&self, value: &Value) -> String {
        self.marks.sequence(&self.written(value))
    }

    fn written(&self, value: &Value) -> String {
        let loose = self.loose;
        match value {
            Value::String(text) if loose.quote.len() == 1 => Value::from(text.as_str()).to_string(),
            Value::String(text) => format!("{0}{text}{0}", loose.quote),
            Value::Bool(_) | Value::Null if loose.python => match value {
                Value::Null => "None".to_owned(),
                _ if *value == Value::Bool(true) => "True".to_owned(),
                _ => "False".to_owned(),
            },
            Value::Array(items) => {
                let items: Vec<String> = items.iter().map(|item| self.written(item)).collect();
                format!("[{}]", items.join(loose.comma))
            }
            Value::Object(object) => {
                let members: Vec<String> = object
                    .iter()
                    .map(|(key, value)| format!("{}{}", self.key(key), self.written(value)))
                    .collect();
                format!("{{{}}}", members.join(loose.comma))
            }
            _ => value.to_string(),
        }
    }

    /// A key of an object within a value, with what follows the key.
    fn key(&self, key: &str) -> String {
        if self.loose.python {
            format!("{}: ", Value::from(key))
        } else {
            format!("{key}:")
        }
    }

    fn reference(&mut self, reference: &str) -> String {
        if let Some(name) = self.references.get(reference) {
            return name.clone();
        }
        let target = reference
            .strip_prefix('#')
            .and_then(|at| self.root.pointer(at));
        let Some(target) = target.cloned() else {
            self.unsupported.push(format!("$ref {reference}"));
            return self.any();
        };
        let name = self.name();
        self.references.insert(reference.to_owned(), name.clone());
        let value = self.value(&target);
        let _ = writeln!(self.rules, "{name}: {value}");
        name
    }

    fn array(&mut self, object: &Map<String, Value>) -> String {
        self.note(object, &["type", "items", "minItems", "maxItems"]);
        let item = match object.get("items") {
            Some(items) => self.value(items),
            None => self.any(),
        };
        let count = |key: &str| object.get(key).and_then(Value::as_u64);
        let (least, most) = (count("minItems").unwrap_or(0), count("maxItems"));
        if most == Some(0) {
            return quoted("[]");
        }
        let comma = quoted(self.loose.comma);
        let more = match most {
            Some(most) => format!("{{{},{}}}", least.saturating_sub(1), most - 1),
            None if least > 1 => format!("{{{},}}", least - 1),
            None => "*".to_owned(),
        };
        let items = format!("{item} ({comma} {item}){more}");
        let optional = if least == 0 { "?" } else { "" };
        format!("\"[\" ({items}){optional} \"]\"")
    }

    fn object(&mut self, schema: &Value, open: char, close: char, equals: char) -> String {
        let empty = Map::new();
        let object = schema.as_object().unwrap_or(&empty);
        self.note(
            object,
            &["type", "properties", "required", "additionalProperties"],
        );
        let (open, close) = (quoted(&open.to_string()), quoted(&close.to_string()));
        let properties = object.get("properties").and_then(Value::as_object);
        let outer = equals == self.loose.equals && open != "\"{\"" || self.loose.equals == ':';
        let Some(properties) = properties.filter(|properties| !properties.is_empty()) else {
            if object.get("additionalProperties") == Some(&Value::Bool(false)) || object.is_empty()
            {
                return format!("{open} {close}");
            }
            let any = self.any();
            let key = format!(
                "/[A-Za-z_][A-Za-z0-9_]{{0,63}}/ {}",
                quoted(&equals.to_string())
            );
            let key = if self.loose.python && equals == ':' {
                format!(
                    "\"\\\"\" /[A-Za-z_][A-Za-z0-9_]{{0,63}}/ {}",
                    quoted("\": ")
                )
            } else {
                key
            };
            let comma = quoted(self.loose.comma);
            return format!("{open} ({key} {any} ({comma} {key} {any})*)? {close}");
        };
        let mut members: Vec<(&String, &Value)> = properties.iter().collect();
        if self.loose.sorted {
            members.sort_by_key(|(name, _)| name.to_lowercase());
        }
        let required: Vec<&str> = object
            .get("required")
            .and_then(Value::as_array)
            .map(|names| names.iter().filter_map(Value::as_str).collect())
            .unwrap_or_default();
        let mut written = Vec::new();
        for (name, schema) in members {
            if *schema == Value::Bool(false) {
                continue;
            }
            let key = if outer && self.loose.equals == equals {
                format!("{name}{equals}")
            } else {
                self.key(name)
            };
            let value = self.value(schema);
            written.push((
                format!("{} {value}", quoted(&key)),
                required.contains(&name.as_str()),
            ));
        }
        let members = self.members(&written);
        format!("{open} {members} {close}")
    }

    /// Members in their order, with commas between those that are present.
    fn members(&mut self, members: &[(String, bool)]) -> String {
        let comma = quoted(self.loose.comma);
        let (mut first, mut more) = ("\"\"".to_owned(), "\"\"".to_owned());
        for (member, required) in members.iter().rev() {
            let behind = self.name();
            let _ = writeln!(self.rules, "{behind}: {more}");
            let begin = self.name();
            if *required {
                let _ = writeln!(self.rules, "{begin}: {member} {behind}");
                more = format!("{comma} {member} {behind}");
            } else {
                let _ = writeln!(self.rules, "{begin}: {member} {behind} | {first}");
                more = format!("({comma} {member})? {behind}");
            }
            first = begin;
        }
        first
    }

    /// A value of any type.
    fn any(&mut self) -> String {
        let reference = "any".to_owned();
        if let Some(name) = self.references.get(&reference) {
            return name.clone();
        }
        let name = self.name();
        self.references.insert(reference, name.clone());
        let kinds = ["string", "number", "boolean", "null"];
        let scalars: Vec<String> = kinds
            .iter()
            .map(|kind| self.typed(kind, &Map::new(), &Value::Null))
            .collect();
        let comma = quoted(self.loose.comma);
        let object = self.object(&json!({"type": "object"}), '{', '}', ':');
        let _ = writeln!(
            self.rules,
            "{name}: {} | \"[\" ({name} ({comma} {name})*)? \"]\" | {object}",
            scalars.join(" | ")
        );
        name
    }
}

/// A regular expression for a text that its schema allows.
pub(super) fn text_pattern(object: &Map<String, Value>) -> String {
    let count = |key: &str| object.get(key).and_then(Value::as_u64);
    if let Some(pattern) = object.get("pattern").and_then(Value::as_str) {
        let begins = pattern.starts_with('^');
        let ends = pattern.ends_with('$') && !pattern.ends_with("\\$");
        let inner = pattern.strip_prefix('^').unwrap_or(pattern);
        let inner = if ends {
            &inner[..inner.len() - 1]
        } else {
            inner
        };
        let inner = llguidance::regex_to_lark(inner, "dw");
        let any = |closed: bool| if closed { "" } else { "(?s:.*)" };
        return format!("{}({inner}){}", any(begins), any(ends));
    }
    match (count("minLength"), count("maxLength")) {
        (None, None) => "(?s:.*)".to_owned(),
        (least, Some(most)) => format!("(?s:.{{{},{most}}})", least.unwrap_or(0)),
        (Some(least), None) => format!("(?s:.{{{least},}})"),
    }
}

/// A regular expression that matches any of `texts`.
pub(super) fn one_of(texts: &[&str]) -> String {
    let escaped: Vec<String> = texts
        .iter()
        .map(|text| escape(text).replace('\n', "\\n"))
        .collect();
    format!("({})", escaped.join("|"))
}
