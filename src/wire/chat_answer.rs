//! A chat's answer that is more than words, while it is taken apart.

use super::answer::{AnswerFormat, AnswerParser, Piece, call_id};
use super::head::Head;

/// One choice's answer while it is taken apart.
#[derive(Debug)]
pub(super) struct Answer {
    parser: AnswerParser,
    /// Mistral's templates want short ids.
    short_ids: bool,
    /// Thoughts are looked for.
    may_think: bool,
    reasoning_tokens: usize,
    pub(super) reasoning: String,
    pub(super) content: String,
    pub(super) calls: Vec<(String, String)>,
}

impl Answer {
    pub(super) fn new(format: &AnswerFormat) -> Option<Self> {
        Some(Self {
            parser: AnswerParser::new(format)?,
            short_ids: format.short_ids(),
            may_think: format.thinking.is_some(),
            reasoning_tokens: 0,
            reasoning: String::new(),
            content: String::new(),
            calls: Vec::new(),
        })
    }

    /// What new text says; it is kept too. `tokens`: how many there are so far.
    pub(super) fn push(&mut self, text: &str, tokens: usize, last: bool) -> Vec<Piece> {
        let pieces = self.parser.push(text, last);
        if self.parser.thinks() {
            self.reasoning_tokens = tokens;
        }
        for piece in &pieces {
            match piece {
                Piece::Reasoning(text) => self.reasoning.push_str(text),
                Piece::Content(text) => self.content.push_str(text),
                Piece::Call { name, .. } => self.calls.push((name.clone(), String::new())),
                Piece::Arguments { index, text } => self.calls[*index].1.push_str(text),
            }
        }
        pieces
    }

    pub(super) const fn has_calls(&self) -> bool {
        !self.calls.is_empty()
    }

    /// Tokens of thoughts, their markers included; none where there are no thoughts to look for.
    pub(super) fn reasoning_tokens(&self) -> Option<usize> {
        self.may_think.then_some(self.reasoning_tokens)
    }

    pub(super) fn call_id(&self, head: &Head, choice: usize, call: usize) -> String {
        call_id("call_", self.short_ids, &head.id, choice, call)
    }
}
