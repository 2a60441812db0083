//! Parses a text in quotation marks piece by piece, and outputs it escaped as in a JSON string.

use super::escape::{push_escaped, push_escaped_text};
use super::partial_suffix;

/// The parser of one text, after its opening mark.
#[derive(Debug)]
pub(super) struct Quoted {
    mark: &'static str,
    /// Whether a backslash escapes the next character, as in JSON and Python.
    escapes: bool,
    held: String,
}

impl Quoted {
    /// `mark` also closes the text. If it is a single character, a backslash escapes it within the text.
    pub(super) fn new(mark: &'static str) -> Self {
        Self {
            mark,
            escapes: mark.len() == 1,
            held: String::new(),
        }
    }

    /// Reads one character. Returns true if it ends the text.
    pub(super) fn push(&mut self, c: char, out: &mut String) -> bool {
        self.held.push(c);
        if self.escapes && self.held.starts_with('\\') {
            self.escape(out);
            return false;
        }
        if let Some(rest) = self.held.strip_suffix(self.mark) {
            push_escaped_text(out, rest);
            self.held.clear();
            return true;
        }
        let sure = self.held.len() - partial_suffix(&self.held, self.mark);
        let rest = self.held.split_off(sure);
        push_escaped_text(out, &self.held);
        self.held = rest;
        false
    }

    /// Outputs an escape sequence, once it is complete.
    fn escape(&mut self, out: &mut String) {
        let mut chars = self.held.chars().skip(1);
        let Some(kind) = chars.next() else { return };
        let digits: String = chars.collect();
        let wanted = match kind {
            'u' => 4,
            'x' => 2,
            _ => 0,
        };
        let broken = !digits.chars().all(|c| c.is_ascii_hexdigit());
        if !broken && digits.len() < wanted {
            return;
        }
        match kind {
            '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't' => out.extend(['\\', kind]),
            '\'' => out.push('\''),
            'u' if !broken => {
                out.push_str("\\u");
                out.push_str(&digits);
            }
            'x' if !broken => {
                out.push_str("\\u00");
                out.push_str(&digits);
            }
            // Python leaves unknown escape sequences unchanged.
            _ => {
                out.push_str("\\\\");
                push_escaped(out, kind);
                let digits = digits.replace(self.mark, "");
                push_escaped_text(out, &digits);
            }
        }
        self.held.clear();
    }

    /// Ends the output, because the answer has ended within the text.
    pub(super) fn flush(&mut self, out: &mut String) {
        push_escaped_text(out, &std::mem::take(&mut self.held));
    }
}
