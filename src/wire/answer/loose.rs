//! Parses arguments that are nearly JSON (keys without quotes, other quotation marks, Python's constants) piece by piece, and
//! outputs JSON.

use super::escape::push_escaped_text;
use super::fate::Fate;
use super::quoted::Quoted;
use crate::request::{Types, types_of};
use crate::text::formats::Loose;

#[derive(Debug)]
enum Mode {
    Start,
    /// Before a key, or within a key without quotes.
    Key,
    QuotedKey(Quoted),
    /// After a key in quotes.
    AfterKey,
    /// Before a value.
    Value,
    /// Within a value without quotes.
    Bare,
    Text(Quoted),
    /// After a value.
    After,
}

/// An object or a list that is open.
#[derive(Debug)]
struct Frame {
    object: bool,
    any: bool,
}

/// The parser of one call's arguments.
#[derive(Debug)]
pub(super) struct LooseValue {
    loose: &'static Loose,
    parameters: Vec<(String, Types)>,
    frames: Vec<Frame>,
    mode: Mode,
    held: String,
    /// A key in quotes, escaped as in a JSON string.
    key: String,
    /// The types that the value may have.
    types: Types,
    /// Number of arguments without a name so far.
    unnamed: usize,
}

impl LooseValue {
    pub(super) const fn new(loose: &'static Loose, parameters: Vec<(String, Types)>) -> Self {
        Self {
            loose,
            parameters,
            frames: Vec::new(),
            mode: Mode::Start,
            held: String::new(),
            key: String::new(),
            types: Types::ANY,
            unnamed: 0,
        }
    }

    pub(super) fn push(&mut self, c: char, out: &mut String) -> Fate {
        match &mut self.mode {
            Mode::Start | Mode::AfterKey if c.is_whitespace() => {}
            Mode::Start if c == self.loose.open => {
                self.frames.push(Frame {
                    object: true,
                    any: false,
                });
                self.mode = Mode::Key;
            }
            Mode::Start => {
                out.push_str("{}");
                return Fate::Left(c.to_string());
            }
            Mode::Key => return self.key(c, out),
            Mode::QuotedKey(quoted) => {
                if quoted.push(c, &mut self.key) {
                    self.mode = Mode::AfterKey;
                }
            }
            Mode::AfterKey => {
                let key = std::mem::take(&mut self.key);
                if c == ',' || self.closes(c) {
                    self.name_unnamed(out);
                    out.push('"');
                    out.push_str(&key);
                    out.push('"');
                    self.mode = Mode::After;
                    return self.after(c, out);
                }
                self.say_key(&key, out);
                if c != self.equals() {
                    return self.value(c, out);
                }
            }
            Mode::Value => return self.value(c, out),
            Mode::Bare => {
                if c == ',' || self.closes(c) {
                    self.say_bare(out);
                    return self.after(c, out);
                }
                self.held.push(c);
            }
            Mode::Text(quoted) => {
                if quoted.push(c, out) {
                    out.push('"');
                    self.mode = Mode::After;
                }
            }
            Mode::After => return self.after(c, out),
        }
        Fate::Open
    }

    fn key(&mut self, c: char, out: &mut String) -> Fate {
        if self.held.is_empty() {
            match c {
                _ if c.is_whitespace() || c == ',' => return Fate::Open,
                _ if self.closes(c) => return self.close(out),
                '{' | '[' => {
                    self.name_unnamed(out);
                    return self.value(c, out);
                }
                _ => {}
            }
        }
        self.held.push(c);
        if let Some(mark) = self.quote(&self.held) {
            self.held.clear();
            self.mode = Mode::QuotedKey(Quoted::new(mark));
        } else if c == self.equals() {
            let held = std::mem::take(&mut self.held);
            let name = held.strip_suffix(c).unwrap_or(&held).trim();
            let mut key = String::new();
            push_escaped_text(&mut key, name);
            self.say_key(&key, out);
        } else if c == ',' || self.closes(c) {
            self.held.pop();
            self.name_unnamed(out);
            self.say_bare(out);
            return self.after(c, out);
        }
        Fate::Open
    }

    fn value(&mut self, c: char, out: &mut String) -> Fate {
        let object = self.frames.last().is_some_and(|frame| frame.object);
        if self.held.is_empty() {
            if c.is_whitespace() {
                return Fate::Open;
            }
            if !object && self.closes(c) {
                return self.close(out);
            }
            self.begin_item(out);
            let begins = match c {
                '{' => Some(true),
                '[' => Some(false),
                '(' if self.loose.python => Some(false),
                _ => None,
            };
            if let Some(object) = begins {
                self.frames.push(Frame { object, any: false });
                self.mode = if object { Mode::Key } else { Mode::Value };
                return Fate::Open;
            }
            if c == ',' || self.closes(c) {
                out.push_str("null");
                return self.after(c, out);
            }
        }
        self.held.push(c);
        if let Some(mark) = self.quote(&self.held) {
            self.held.clear();
            out.push('"');
            self.mode = Mode::Text(Quoted::new(mark));
        } else if !self.loose.quote.starts_with(self.held.as_str()) {
            self.mode = Mode::Bare;
            // A delimiter may follow what looked like the beginning of a quotation mark.
            if self.held.len() > c.len_utf8() && (c == ',' || self.closes(c)) {
                self.held.pop();
                self.say_bare(out);
                return self.after(c, out);
            }
        }
        Fate::Open
    }

    fn after(&mut self, c: char, out: &mut String) -> Fate {
        self.mode = Mode::After;
        if c.is_whitespace() {
            return Fate::Open;
        }
        if self.closes(c) {
            return self.close(out);
        }
        let object = self.frames.last().is_some_and(|frame| frame.object);
        self.mode = if object { Mode::Key } else { Mode::Value };
        match c {
            ',' => Fate::Open,
            // The comma is missing.
            _ => self.push(c, out),
        }
    }

    /// Whether a character ends the innermost object or list, or one around it.
    fn closes(&self, c: char) -> bool {
        matches!(c, '}' | ']') || (c == ')' && self.loose.python)
    }

    /// The character between a key and its value.
    fn equals(&self) -> char {
        if self.frames.len() == 1 {
            self.loose.equals
        } else {
            ':'
        }
    }

    /// The quotation mark that `text` is, if it is one.
    fn quote(&self, text: &str) -> Option<&'static str> {
        let mut quotes = [self.loose.quote, "\"", "'"].into_iter();
        quotes.find(|&quote| quote == text)
    }

    fn close(&mut self, out: &mut String) -> Fate {
        let Some(frame) = self.frames.pop() else {
            return Fate::Ended;
        };
        if frame.object {
            out.push_str(if frame.any { "}" } else { "{}" });
        } else {
            out.push_str(if frame.any { "]" } else { "[]" });
        }
        self.mode = Mode::After;
        if self.frames.is_empty() {
            Fate::Ended
        } else {
            Fate::Open
        }
    }

    /// Writes the separator before an item of a list.
    fn begin_item(&mut self, out: &mut String) {
        if let Some(frame) = self.frames.last_mut().filter(|frame| !frame.object) {
            out.push_str(if frame.any { ", " } else { "[" });
            frame.any = true;
            self.types = Types::ANY;
        }
    }

    /// `key` is escaped as in a JSON string.
    fn say_key(&mut self, key: &str, out: &mut String) {
        let outermost = self.frames.len() == 1;
        if let Some(frame) = self.frames.last_mut() {
            out.push_str(if frame.any { ", \"" } else { "{\"" });
            frame.any = true;
        }
        out.push_str(key);
        out.push_str("\": ");
        self.types = if outermost {
            types_of(&self.parameters, key)
        } else {
            Types::ANY
        };
        self.mode = Mode::Value;
    }

    /// Gives an argument without a name the name of the parameter at its position.
    fn name_unnamed(&mut self, out: &mut String) {
        let place = self.unnamed;
        self.unnamed += 1;
        let name = match self.parameters.get(place) {
            Some((name, _)) if self.frames.len() == 1 => name.clone(),
            _ => format!("arg{place}"),
        };
        let mut key = String::new();
        push_escaped_text(&mut key, &name);
        self.say_key(&key, out);
    }

    fn say_bare(&mut self, out: &mut String) {
        let held = std::mem::take(&mut self.held);
        out.push_str(&self.types.json(held.trim()));
    }

    /// Ends the output, because the answer has ended within the arguments. What is open stays open.
    pub(super) fn flush(&mut self, out: &mut String) {
        match &mut self.mode {
            Mode::Start => out.push_str("{}"),
            Mode::Key | Mode::QuotedKey(_) | Mode::AfterKey
                if self.frames.iter().all(|frame| !frame.any) =>
            {
                out.push('{');
            }
            Mode::Text(quoted) => quoted.flush(out),
            Mode::Bare => out.push_str(&self.held),
            _ => {}
        }
        self.held.clear();
    }
}
