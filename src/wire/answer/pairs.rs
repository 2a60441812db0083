//! Parses arguments that are written one by one between markers, as `<parameter=key>value</parameter>`. Reads them piece by piece,
//! and outputs a JSON object.

use super::escape::{push_escaped, push_escaped_text};
use super::fate::Fate;
use super::partial_suffix;
use crate::request::{Types, types_of};
use crate::text::formats::lines;

/// The markers around keys and values.
#[derive(Debug, Clone, Copy)]
pub(super) struct Marks {
    pub(super) key_open: &'static str,
    pub(super) key_close: &'static str,
    pub(super) value_close: &'static str,
    pub(super) typed: Option<&'static str>,
}

#[derive(Debug)]
enum Mode {
    /// Before a key or the end of the arguments.
    Between,
    Key,
    /// After a key, before the marker that opens its value.
    BeforeValue,
    /// A text, output as it comes.
    Text,
    /// Any other value, parsed once it is complete.
    Whole(Types),
}

/// The parser of one call's arguments.
#[derive(Debug)]
pub(super) struct Pairs {
    marks: Marks,
    parameters: Vec<(String, Types)>,
    mode: Mode,
    held: String,
    key: String,
    /// Whether a pair has been output.
    any: bool,
    /// Whether the line break before a value has been skipped.
    begun: bool,
}

impl Pairs {
    pub(super) const fn new(marks: Marks, parameters: Vec<(String, Types)>) -> Self {
        Self {
            marks,
            parameters,
            mode: Mode::Between,
            held: String::new(),
            key: String::new(),
            any: false,
            begun: false,
        }
    }

    pub(super) fn push(&mut self, c: char, out: &mut String) -> Fate {
        self.held.push(c);
        match self.mode {
            Mode::Between => return self.between(out),
            Mode::Key => {
                let Some(end) = lines(self.marks.key_close).next() else {
                    return Fate::Open;
                };
                if let Some(key) = self.held.strip_suffix(end) {
                    self.key = key.to_owned();
                    self.held.clear();
                    self.before_value(out);
                }
            }
            Mode::BeforeValue => {
                let opens = lines(self.marks.key_close).nth(1).unwrap_or_default();
                let held = self.held.trim_start();
                if held == opens {
                    self.held.clear();
                    self.begin_value(out);
                } else if !opens.starts_with(held) {
                    // The value's opening marker is missing. The text is taken as the value all the same.
                    let text = std::mem::take(&mut self.held);
                    self.begin_value(out);
                    for c in text.chars() {
                        if let fate @ (Fate::Ended | Fate::Left(_)) = self.push(c, out) {
                            return fate;
                        }
                    }
                }
            }
            Mode::Text | Mode::Whole(_) => self.value(out),
        }
        Fate::Open
    }

    fn between(&mut self, out: &mut String) -> Fate {
        let opens = self.marks.key_open.trim();
        let held = self.held.trim_start();
        if held.is_empty() {
            self.held.clear();
        } else if held == opens {
            self.held.clear();
            self.mode = Mode::Key;
        } else if !opens.starts_with(held) {
            self.close(out);
            return Fate::Left(std::mem::take(&mut self.held));
        }
        Fate::Open
    }

    fn before_value(&mut self, out: &mut String) {
        if lines(self.marks.key_close).nth(1).is_some() {
            self.mode = Mode::BeforeValue;
        } else {
            self.begin_value(out);
        }
    }

    fn begin_value(&mut self, out: &mut String) {
        let mut key = self.key.trim();
        let mut text = None;
        if let Some((name, kind)) = self.marks.typed.and_then(|typed| key.split_once(typed)) {
            key = name;
            text = Some(kind.trim() == "true");
        }
        let known = types_of(&self.parameters, key);
        self.mode = match text {
            Some(true) => Mode::Text,
            None if known.only_text() => Mode::Text,
            Some(false) | None => Mode::Whole(known),
        };
        out.push_str(if self.any { ", \"" } else { "{\"" });
        push_escaped_text(out, key);
        out.push_str("\": ");
        if matches!(self.mode, Mode::Text) {
            out.push('"');
        }
        self.any = true;
        self.begun = false;
    }

    fn value(&mut self, out: &mut String) {
        if !self.begun {
            self.begun = true;
            // The line break after the key belongs to the format.
            if self.marks.key_close.ends_with('\n') && self.held == "\n" {
                self.held.clear();
                return;
            }
        }
        let own_line = self.marks.value_close.starts_with('\n');
        let end = self.marks.value_close.trim();
        if let Some(value) = self.held.strip_suffix(end) {
            let value = if own_line {
                value.strip_suffix('\n').unwrap_or(value)
            } else {
                value
            };
            if let Mode::Whole(types) = self.mode {
                out.push_str(&types.json(value));
            } else {
                push_escaped_text(out, value);
                out.push('"');
            }
            self.held.clear();
            self.mode = Mode::Between;
        } else if matches!(self.mode, Mode::Text) {
            let kept = partial_suffix(&self.held, end);
            let mut sure = self.held.len() - kept;
            if own_line && self.held[..sure].ends_with('\n') {
                sure -= 1;
            }
            let rest = self.held.split_off(sure);
            for c in self.held.chars() {
                push_escaped(out, c);
            }
            self.held = rest;
        }
    }

    fn close(&self, out: &mut String) {
        out.push_str(if self.any { "}" } else { "{}" });
    }

    /// Ends the output, because the answer has ended within the arguments. What is known is output, and an incomplete value stays
    /// open.
    pub(super) fn flush(&mut self, out: &mut String) {
        match self.mode {
            Mode::Between | Mode::Key | Mode::BeforeValue => self.close(out),
            Mode::Text => push_escaped_text(out, &self.held),
            Mode::Whole(_) => out.push_str(&self.held),
        }
        self.held.clear();
    }
}
