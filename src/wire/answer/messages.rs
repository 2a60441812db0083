//! Parses answers whose parts are messages with headers, as gpt-oss writes them. The header tells whether a part is a thought, text
//! or a call.

use super::tools::{argue, say};
use super::{Piece, partial_suffix};
use crate::request::Function;
use crate::text::formats::Messages;

/// Maximum length of a header, in bytes. Longer text is words.
const MAX_HEADER: usize = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Thoughts,
    Words,
    Call { begun: bool },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Header,
    Body(Kind),
}

/// The parser of one answer.
#[derive(Debug)]
pub(super) struct MessageParser {
    format: &'static Messages,
    /// Absent: there are no calls to find.
    functions: Option<Vec<Function>>,
    mode: Mode,
    held: String,
    calls: usize,
}

impl MessageParser {
    pub(super) const fn new(format: &'static Messages, functions: Option<Vec<Function>>) -> Self {
        Self {
            format,
            functions,
            mode: Mode::Header,
            held: String::new(),
            calls: 0,
        }
    }

    pub(super) fn thinks(&self) -> bool {
        self.mode == Mode::Body(Kind::Thoughts)
    }

    pub(super) fn push(&mut self, text: &str, out: &mut Vec<Piece>) {
        for c in text.chars() {
            self.held.push(c);
            match self.mode {
                Mode::Header => self.header(out),
                Mode::Body(kind) => self.body(kind, out),
            }
        }
    }

    /// Ends the answer.
    pub(super) fn flush(&mut self, out: &mut Vec<Piece>) {
        let held = std::mem::take(&mut self.held);
        match self.mode {
            // An incomplete header has no output.
            Mode::Header if self.is_begun(&held) => {}
            Mode::Header => say(held, out),
            Mode::Body(kind) => {
                let (held, kind) = self.tell(&held, kind, out);
                Self::tell_rest(&held, kind, out);
                self.end(kind, out);
            }
        }
    }

    fn is_begun(&self, header: &str) -> bool {
        let mut marks = self.format.headers.iter();
        let begun = header.trim_start();
        !self.format.headers.is_empty()
            && (begun.starts_with(self.format.start) || marks.any(|mark| begun.starts_with(mark)))
    }

    fn header(&mut self, out: &mut Vec<Piece>) {
        let format = self.format;
        if self.held.ends_with(format.body) {
            let held = std::mem::take(&mut self.held);
            if let Some(kind) = self.kind(&held[..held.len() - format.body.len()], out) {
                self.mode = Mode::Body(kind);
            } else {
                self.held = held;
                self.words(out);
            }
            return;
        }
        let begun = self.held.trim_start();
        let headers = format.headers.iter().chain([&format.start]);
        let known = format.headers.is_empty()
            || begun.is_empty()
            || headers
                .into_iter()
                .any(|mark| mark.starts_with(begun) || begun.starts_with(mark));
        if !known || self.held.len() > MAX_HEADER {
            self.words(out);
        }
    }

    /// Outputs text that looked like a header as words.
    fn words(&mut self, out: &mut Vec<Piece>) {
        let held = std::mem::take(&mut self.held);
        self.mode = Mode::Body(Kind::Words);
        // After its first character, the text may contain another header.
        let first = held.chars().next().map_or(0, char::len_utf8);
        say(held[..first].to_owned(), out);
        self.push(&held[first..], out);
    }

    /// The kind of a message with this header; `None` if it is not a header. Outputs the beginning of a call.
    fn kind(&mut self, header: &str, out: &mut Vec<Piece>) -> Option<Kind> {
        let format = self.format;
        let known = |name: &str| {
            self.functions
                .as_ref()
                .is_some_and(|functions| functions.iter().any(|function| function.name == name))
        };
        let bare = header.trim_start().trim_start_matches(format.start).trim();
        let name = if format.to.is_empty() {
            if bare == format.words {
                return Some(Kind::Words);
            }
            bare.strip_suffix('\n').unwrap_or(bare)
        } else {
            let ends = |c: char| c.is_whitespace() || c == '<';
            let after = header.split_once(format.to).map(|(_, after)| after);
            after
                .and_then(|after| after.split(ends).next())
                .unwrap_or_default()
        };
        let given = self.functions.is_some() && !name.is_empty();
        if given && (known(name) || !format.to.is_empty()) {
            out.push(Piece::Call {
                index: self.calls,
                name: name.to_owned(),
            });
            self.calls += 1;
            return Some(Kind::Call { begun: false });
        }
        if format.to.is_empty() {
            return None;
        }
        if format
            .thoughts
            .is_some_and(|thoughts| header.contains(thoughts))
        {
            return Some(Kind::Thoughts);
        }
        Some(Kind::Words)
    }

    fn body(&mut self, kind: Kind, out: &mut Vec<Piece>) {
        let format = self.format;
        let ends = || format.ends.iter().chain([&format.start]).copied();
        if let Some(mark) = ends().find(|mark| self.held.ends_with(mark)) {
            let before = self.held[..self.held.len() - mark.len()].to_owned();
            let (rest, kind) = self.tell(&before, kind, out);
            Self::tell_rest(&rest, kind, out);
            self.end(kind, out);
            self.held.clear();
            if mark == format.start {
                self.held.push_str(mark);
            }
            self.mode = Mode::Header;
            return;
        }
        let kept = ends()
            .map(|mark| partial_suffix(&self.held, mark))
            .max()
            .unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - kept);
        let sure = std::mem::take(&mut self.held);
        let (held, kind) = self.tell(&sure, kind, out);
        self.held = held + &rest;
        self.mode = Mode::Body(kind);
    }

    /// Outputs a piece of a body, and returns the text that must wait: white space around arguments is dropped.
    fn tell(&self, text: &str, kind: Kind, out: &mut Vec<Piece>) -> (String, Kind) {
        let Kind::Call { begun } = kind else {
            Self::tell_rest(text, kind, out);
            return (String::new(), kind);
        };
        let text = if begun { text } else { text.trim_start() };
        let sure = text.trim_end().len();
        if sure == 0 {
            return (
                if begun {
                    text.to_owned()
                } else {
                    String::new()
                },
                kind,
            );
        }
        argue(self.calls - 1, text[..sure].to_owned(), out);
        (text[sure..].to_owned(), Kind::Call { begun: true })
    }

    fn tell_rest(text: &str, kind: Kind, out: &mut Vec<Piece>) {
        if text.is_empty() {
            return;
        }
        match kind {
            Kind::Words => say(text.to_owned(), out),
            Kind::Thoughts => match out.last_mut() {
                Some(Piece::Reasoning(said)) => said.push_str(text),
                _ => out.push(Piece::Reasoning(text.to_owned())),
            },
            Kind::Call { .. } => {}
        }
    }

    fn end(&self, kind: Kind, out: &mut Vec<Piece>) {
        if kind == (Kind::Call { begun: false }) {
            argue(self.calls - 1, "{}".to_owned(), out);
        }
    }
}
