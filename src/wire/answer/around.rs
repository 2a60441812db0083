//! Removes the markers that some models write around the words of an answer.

use super::partial_suffix;

/// The state within one answer.
#[derive(Debug)]
pub(super) struct Around {
    marks: &'static [&'static str],
    held: String,
}

impl Around {
    pub(super) const fn new(marks: &'static [&'static str]) -> Self {
        Self {
            marks,
            held: String::new(),
        }
    }

    /// Returns the part of the held text and `text` that cannot be a marker. `last`: no more text will come.
    pub(super) fn push(&mut self, text: String, last: bool) -> String {
        if self.marks.is_empty() {
            return text;
        }
        let mut words = String::new();
        for c in text.chars() {
            self.held.push(c);
            if let Some(mark) = self.marks.iter().find(|mark| self.held.ends_with(**mark)) {
                words.push_str(&self.held[..self.held.len() - mark.len()]);
                self.held.clear();
                continue;
            }
            let kept = self
                .marks
                .iter()
                .map(|mark| partial_suffix(&self.held, mark));
            let sure = self.held.len() - kept.max().unwrap_or(0);
            words.extend(self.held.drain(..sure));
        }
        if last {
            words.push_str(&std::mem::take(&mut self.held));
        }
        words
    }
}
