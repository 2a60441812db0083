//! The `tojson` filter as `transformers` defines it: Python's `json.dumps`, without the HTML escapes of Jinja's own.

use std::fmt::Write;

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, State, Value as Variable};

use super::fuel::{WRITTEN, check_bytes};
use super::python::number;
use crate::text::MARK;

/// Maximum indentation of a level, in characters.
const MAX_INDENT: usize = 64;
/// Maximum nesting.
const MAX_DEPTH: usize = 256;

/// `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`
#[expect(
    clippy::needless_pass_by_value,
    reason = "a minijinja filter takes its keyword arguments by value"
)]
pub(super) fn tojson(
    state: &State,
    value: &Variable,
    Rest(positional): Rest<Variable>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let option = |at: usize, name: &str| match positional.get(at) {
        Some(given) => Ok(given.clone()),
        None if kwargs.has(name) => kwargs.get::<Variable>(name),
        None => Ok(Variable::from(())),
    };
    let ensure_ascii = option(0, "ensure_ascii")?.is_true();
    let indent = indent_of(&option(1, "indent")?)?;
    let separators = separators_of(&option(2, "separators")?, indent.is_some())?;
    let sort_keys = option(3, "sort_keys")?.is_true();
    kwargs.assert_all_used()?;
    let mut writer = Writer {
        state,
        out: String::new(),
        ensure_ascii,
        indent,
        separators,
        sort_keys,
        depth: 0,
    };
    writer.value(value)?;
    state.consume_fuel((writer.out.len() / 64 * WRITTEN) as u64)?;
    Ok(writer.out)
}

fn indent_of(indent: &Variable) -> Result<Option<String>, Error> {
    if indent.is_none() {
        return Ok(None);
    }
    if let Some(text) = indent.as_str() {
        if text.len() > MAX_INDENT {
            let message = format!("tojson: indent has at most {MAX_INDENT} characters");
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
        return Ok(Some(text.to_owned()));
    }
    let width = i64::try_from(indent.clone())?;
    let width = usize::try_from(width.clamp(0, MAX_INDENT as i64)).unwrap_or_default();
    Ok(Some(" ".repeat(width)))
}

fn separators_of(separators: &Variable, indented: bool) -> Result<(String, String), Error> {
    if separators.is_none() {
        return Ok((
            if indented { "," } else { ", " }.to_owned(),
            ": ".to_owned(),
        ));
    }
    let pair: Vec<Variable> = separators.try_iter()?.collect();
    match pair.as_slice() {
        [item, key] if item.as_str().is_some() && key.as_str().is_some() => {
            Ok((item.to_string(), key.to_string()))
        }
        _ => Err(Error::new(
            ErrorKind::InvalidOperation,
            "tojson: separators are two strings",
        )),
    }
}

struct Writer<'a> {
    state: &'a State<'a, 'a>,
    out: String,
    ensure_ascii: bool,
    indent: Option<String>,
    /// The separators between items, and between a key and its value.
    separators: (String, String),
    sort_keys: bool,
    depth: usize,
}

impl Writer<'_> {
    fn value(&mut self, value: &Variable) -> Result<(), Error> {
        check_bytes(self.state, self.out.len().saturating_mul(WRITTEN))?;
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self
                .out
                .push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&json_number(value)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Variable> = value.try_iter()?.collect();
                self.container('[', ']', &items, Self::value)?;
            }
            ValueKind::Map => {
                let mut pairs = Vec::new();
                for key in value.try_iter()? {
                    pairs.push((key_text(&key)?, value.get_item(&key)?));
                }
                if self.sort_keys {
                    pairs.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                self.container('{', '}', &pairs, |writer, (key, value)| {
                    writer.string(key);
                    writer.out.push_str(&writer.separators.1.clone());
                    writer.value(value)
                })?;
            }
            kind => {
                let message = format!("tojson: a value of type {kind} has no JSON form");
                return Err(Error::new(ErrorKind::BadSerialization, message));
            }
        }
        Ok(())
    }

    fn container<T>(
        &mut self,
        open: char,
        close: char,
        items: &[T],
        write: impl Fn(&mut Self, &T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if self.depth == MAX_DEPTH {
            let message = format!("tojson: values are nested deeper than {MAX_DEPTH}");
            return Err(Error::new(ErrorKind::BadSerialization, message));
        }
        self.out.push(open);
        self.depth += 1;
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                self.out.push_str(&self.separators.0.clone());
            }
            self.new_line();
            write(self, item)?;
        }
        self.depth -= 1;
        if !items.is_empty() {
            self.new_line();
        }
        self.out.push(close);
        Ok(())
    }

    fn new_line(&mut self) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            for _ in 0..self.depth {
                self.out.push_str(indent);
            }
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{C}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && c != MARK && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.escape(*unit);
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }

    fn escape(&mut self, unit: u16) {
        // Writing to a String cannot fail.
        let _ = write!(self.out, "\\u{unit:04x}");
    }
}

fn key_text(key: &Variable) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.to_string()),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_owned()),
        ValueKind::Number => Ok(json_number(key)),
        kind => {
            let message = format!("tojson: a value of type {kind} is no key of a JSON object");
            Err(Error::new(ErrorKind::BadSerialization, message))
        }
    }
}

fn json_number(value: &Variable) -> String {
    match number(value).as_str() {
        "nan" => "NaN".to_owned(),
        "inf" => "Infinity".to_owned(),
        "-inf" => "-Infinity".to_owned(),
        finite => finite.to_owned(),
    }
}
