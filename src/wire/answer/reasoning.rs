//! Separates thoughts, which stand between two markers, from the answer that follows them, piece by piece.

use super::partial_suffix;
use crate::text::formats::{Thinking, Thoughts};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Begin,
    /// White space after the opening marker.
    BeforeThoughts,
    Thoughts,
    /// White space after the closing marker.
    BeforeAnswer,
    Answer,
}

/// The parser of one answer.
#[derive(Debug)]
pub(super) struct ThoughtParser {
    open: &'static str,
    close: &'static str,
    mode: Mode,
    held: String,
}

impl ThoughtParser {
    /// Starts at the answer's beginning.
    pub(super) fn new(thoughts: Thoughts) -> Self {
        let mode = match thoughts.begin {
            Thinking::Open => Mode::BeforeThoughts,
            Thinking::Maybe => Mode::Begin,
        };
        Self {
            open: thoughts.format.open.trim(),
            close: thoughts.format.close.trim(),
            mode,
            held: String::new(),
        }
    }

    /// Whether the next text is a thought, or the marker that ends thoughts.
    pub(super) const fn within(&self) -> bool {
        matches!(self.mode, Mode::BeforeThoughts | Mode::Thoughts)
    }

    /// Whether the thoughts have begun and the answer has not.
    pub(super) const fn is_open(&self) -> bool {
        matches!(
            self.mode,
            Mode::BeforeThoughts | Mode::Thoughts | Mode::BeforeAnswer
        )
    }

    /// Reads `text`, and appends its parts to `thoughts` and `answer`.
    pub(super) fn push(&mut self, text: &str, thoughts: &mut String, answer: &mut String) {
        if self.mode == Mode::Answer {
            answer.push_str(text);
            return;
        }
        for c in text.chars() {
            self.push_char(c, thoughts, answer);
        }
    }

    fn push_char(&mut self, c: char, thoughts: &mut String, answer: &mut String) {
        match self.mode {
            Mode::Answer => answer.push(c),
            Mode::BeforeAnswer | Mode::BeforeThoughts if c.is_whitespace() => {}
            Mode::BeforeAnswer => {
                self.mode = Mode::Answer;
                answer.push(c);
            }
            Mode::Begin => {
                self.held.push(c);
                let begun = self.held.trim_start();
                if begun == self.open {
                    self.held.clear();
                    self.mode = Mode::BeforeThoughts;
                } else if !self.open.starts_with(begun) {
                    answer.push_str(&self.held);
                    self.held.clear();
                    self.mode = Mode::Answer;
                }
            }
            Mode::BeforeThoughts | Mode::Thoughts => {
                self.mode = Mode::Thoughts;
                self.held.push(c);
                if let Some(last) = self.held.strip_suffix(self.close) {
                    thoughts.push_str(last.trim_end());
                    self.held.clear();
                    self.mode = Mode::BeforeAnswer;
                    return;
                }
                // White space before the marker belongs to the marker.
                let kept = partial_suffix(&self.held, self.close);
                let sure = self.held[..self.held.len() - kept].trim_end().len();
                let rest = self.held.split_off(sure);
                thoughts.push_str(&self.held);
                self.held = rest;
            }
        }
    }

    /// Ends the answer.
    pub(super) fn flush(&mut self, thoughts: &mut String, answer: &mut String) {
        let held = std::mem::take(&mut self.held);
        match self.mode {
            Mode::Thoughts => thoughts.push_str(&held),
            _ => answer.push_str(&held),
        }
        self.mode = Mode::Answer;
    }
}
