//! Finds function calls in the text of an answer, as it comes.

use super::call::{Call, Progress, Said};
use super::value::{Step, Value};
use super::{Piece, partial_suffix};
use crate::text::ToolFormat;

const HERMES_OPEN: &str = "<tool_call>";
const HERMES_CLOSE: &str = "</tool_call>";
const PYTHON_TAG: &str = "<|python_tag|>";
const TOOL_CALLS: &str = "[TOOL_CALLS]";
const ARGS: &str = "[ARGS]";
const CALL_ID: &str = "[CALL_ID]";

#[derive(Debug)]
enum Mode {
    /// Nothing but white space has come yet.
    Begin,
    /// Words, up to the marker of a call.
    Words,
    /// A call's object; `close`: characters of the format's closing marker come after it.
    Object(Box<Call>),
    /// Behind a call: white space, and what stands between calls.
    Behind,
    /// Mistral: `name[ARGS]{...}`.
    Name(String),
    Arguments(Value),
}

/// The state within one answer.
#[derive(Debug)]
pub(super) struct ToolParser {
    format: ToolFormat,
    names: Vec<String>,
    mode: Mode,
    /// Read, and not yet known to be words or a marker.
    held: String,
    /// What the call that is read began with, should it turn out to be none.
    opening: String,
    calls: usize,
}

impl ToolParser {
    /// `names`: the functions that there are.
    pub(super) fn new(format: ToolFormat, names: Vec<String>) -> Self {
        Self {
            format,
            names,
            mode: Mode::Begin,
            held: String::new(),
            opening: String::new(),
            calls: 0,
        }
    }

    pub(super) fn push(&mut self, text: &str, out: &mut Vec<Piece>) {
        for c in text.chars() {
            self.push_char(c, out);
        }
    }

    /// The answer has ended.
    pub(super) fn flush(&mut self, out: &mut Vec<Piece>) {
        let held = std::mem::take(&mut self.held);
        let opening = std::mem::take(&mut self.opening);
        match std::mem::replace(&mut self.mode, Mode::Words) {
            Mode::Begin | Mode::Words => say(held, out),
            Mode::Behind => say(held.trim().to_owned(), out),
            Mode::Object(call) if !call.named() => say(held + &opening + &call.into_raw(), out),
            Mode::Name(name) => say(opening + &name, out),
            Mode::Object(_) | Mode::Arguments(_) => {}
        }
    }

    const fn marker(&self) -> &'static str {
        match self.format {
            ToolFormat::Hermes => HERMES_OPEN,
            ToolFormat::Mistral => TOOL_CALLS,
            ToolFormat::Llama3 => PYTHON_TAG,
        }
    }

    fn push_char(&mut self, c: char, out: &mut Vec<Piece>) {
        match &mut self.mode {
            Mode::Begin => self.begin(c, out),
            Mode::Words => self.word(c, out),
            Mode::Object(_) => self.object(c, out),
            Mode::Behind => self.behind(c, out),
            Mode::Name(name) => {
                name.push(c);
                self.name(out);
            }
            Mode::Arguments(value) => match value.step(c) {
                Step::Behind => self.mode = Mode::Behind,
                step => {
                    if step == Step::Last {
                        self.mode = Mode::Behind;
                    }
                    self.argue(c.to_string(), out);
                }
            },
        }
    }

    fn begin(&mut self, c: char, out: &mut Vec<Piece>) {
        if c.is_whitespace() {
            self.held.push(c);
        } else if c == '{' && self.format == ToolFormat::Llama3 {
            // Only an answer that begins with an object may be a bare call.
            self.open(c, out);
        } else {
            self.mode = Mode::Words;
            self.word(c, out);
        }
    }

    fn word(&mut self, c: char, out: &mut Vec<Piece>) {
        let marker = self.marker();
        self.held.push(c);
        if self.held.ends_with(marker) {
            // White space before a call belongs to it.
            let words = self.held.len() - marker.len();
            self.held.truncate(words);
            let words = std::mem::take(&mut self.held);
            say(words.trim_end().to_owned(), out);
            marker.clone_into(&mut self.opening);
            self.mode = match self.format {
                ToolFormat::Mistral => Mode::Name(String::new()),
                _ => Mode::Object(Box::new(Call::new())),
            };
            return;
        }
        let kept = partial_suffix(&self.held, marker);
        let sure = self.held[..self.held.len() - kept].trim_end().len();
        let rest = self.held.split_off(sure);
        say(std::mem::replace(&mut self.held, rest), out);
    }

    /// Mistral's marker is followed by a list of objects, an object, or a name and its arguments.
    fn name(&mut self, out: &mut Vec<Piece>) {
        let Mode::Name(text) = &self.mode else {
            return;
        };
        let name = text.trim_start().to_owned();
        let begun = match name.as_str() {
            "[" => {
                self.opening.push_str(text);
                self.mode = Mode::Behind;
                return;
            }
            "{" => return self.open('{', out),
            name if name.ends_with('{') => "{",
            name if name.ends_with(ARGS) => "",
            _ => return,
        };
        let name = name.trim_end_matches(['{']).trim_end_matches(ARGS);
        let name = name.split(CALL_ID).next().unwrap_or_default().trim();
        self.announce(name.to_owned(), out);
        let mut value = Value::default();
        if begun == "{" {
            value.step('{');
            self.argue("{".to_owned(), out);
        }
        self.mode = Mode::Arguments(value);
    }

    fn open(&mut self, c: char, out: &mut Vec<Piece>) {
        self.mode = Mode::Object(Box::new(Call::new()));
        self.object(c, out);
    }

    fn object(&mut self, c: char, out: &mut Vec<Piece>) {
        let bare = self.format == ToolFormat::Llama3;
        let names = &self.names;
        let known = |name: &str| !bare || names.iter().any(|known| known == name);
        let Mode::Object(call) = &mut self.mode else {
            return;
        };
        let mut said = Vec::new();
        let progress = call.push(c, &known, &mut said);
        for said in said {
            match said {
                Said::Name(name) => self.announce(name, out),
                Said::Arguments(text) => self.argue(text, out),
            }
        }
        match progress {
            Progress::Open => {}
            Progress::Ended => self.mode = Mode::Behind,
            Progress::Left => {
                self.mode = Mode::Behind;
                self.behind(c, out);
            }
            Progress::NoCall => {
                let Mode::Object(call) = std::mem::replace(&mut self.mode, Mode::Words) else {
                    return;
                };
                let text = std::mem::take(&mut self.held)
                    + &std::mem::take(&mut self.opening)
                    + &call.into_raw();
                // Its last character may begin a marker.
                let last = text.char_indices().next_back().map_or(0, |(at, _)| at);
                say(text[..last].to_owned(), out);
                self.push(&text[last..], out);
            }
        }
    }

    fn behind(&mut self, c: char, out: &mut Vec<Piece>) {
        self.held.push(c);
        let held = self.held.trim_start();
        let between: &[&str] = match self.format {
            ToolFormat::Hermes => &[HERMES_CLOSE, HERMES_OPEN],
            ToolFormat::Llama3 => &[";", ",", "{"],
            ToolFormat::Mistral => &[",", "]", "{", TOOL_CALLS],
        };
        if let Some(&found) = between.iter().find(|&&text| text == held) {
            if found == "{" {
                self.held.clear();
                return self.open(c, out);
            }
            if found == self.marker() {
                self.opening = std::mem::take(&mut self.held);
                self.mode = match self.format {
                    ToolFormat::Mistral => Mode::Name(String::new()),
                    _ => Mode::Object(Box::new(Call::new())),
                };
            }
            self.held.clear();
        } else if !between.iter().any(|text| text.starts_with(held)) {
            let words = held.to_owned();
            self.held.clear();
            self.mode = Mode::Words;
            self.push(&words, out);
        }
    }

    fn announce(&mut self, name: String, out: &mut Vec<Piece>) {
        self.held.clear();
        self.opening.clear();
        out.push(Piece::Call {
            index: self.calls,
            name,
        });
        self.calls += 1;
    }

    fn argue(&self, text: String, out: &mut Vec<Piece>) {
        let index = self.calls - 1;
        if let Some(Piece::Arguments { text: said, .. }) = out.last_mut() {
            said.push_str(&text);
        } else {
            out.push(Piece::Arguments { index, text });
        }
    }
}

/// Adds words to the last piece, or as a new one.
pub(super) fn say(text: String, out: &mut Vec<Piece>) {
    if text.is_empty() {
        return;
    }
    if let Some(Piece::Content(said)) = out.last_mut() {
        said.push_str(&text);
    } else {
        out.push(Piece::Content(text));
    }
}
