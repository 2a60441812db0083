//! A chat's answer with thoughts or calls, while it is parsed.

use super::answer::{AnswerFormat, AnswerParser, Piece, call_id};
use super::custom::is_custom;
use super::head::Head;

/// One choice's answer while it is parsed.
#[derive(Debug)]
pub(super) struct Answer {
    parser: AnswerParser,
    /// Whether call ids are short, as Mistral's templates require.
    short_ids: bool,
    /// Whether the answer may have thoughts.
    may_think: bool,
    reasoning_tokens: usize,
    pub(super) reasoning: String,
    pub(super) content: String,
    pub(super) calls: Vec<(String, String)>,
    /// Whether the last call is to a custom tool whose text has not been output. It is known once the arguments are complete.
    untold: bool,
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
            untold: false,
        })
    }

    /// Parses new text, and keeps the result. The arguments of a custom tool come in one piece. `tokens` is the number of tokens so
    /// far.
    pub(super) fn push(
        &mut self,
        head: &Head,
        text: &str,
        tokens: usize,
        last: bool,
    ) -> Vec<Piece> {
        let parsed = self.parser.push(text, last);
        if self.parser.thinks() {
            self.reasoning_tokens = tokens;
        }
        let mut pieces = Vec::with_capacity(parsed.len());
        for piece in parsed {
            match &piece {
                Piece::Arguments { index, text } => {
                    self.calls[*index].1.push_str(text);
                    if self.untold {
                        continue;
                    }
                }
                other => {
                    self.tell_custom(&mut pieces);
                    match other {
                        Piece::Reasoning(text) => self.reasoning.push_str(text),
                        Piece::Content(text) => self.content.push_str(text),
                        Piece::Call { name, .. } => {
                            self.calls.push((name.clone(), String::new()));
                            self.untold = is_custom(head, name);
                        }
                        Piece::Arguments { .. } => {}
                    }
                }
            }
            pieces.push(piece);
        }
        if last {
            self.tell_custom(&mut pieces);
        }
        pieces
    }

    fn tell_custom(&mut self, pieces: &mut Vec<Piece>) {
        if let Some((_, arguments)) = self.calls.last()
            && std::mem::take(&mut self.untold)
        {
            pieces.push(Piece::Arguments {
                index: self.calls.len() - 1,
                text: arguments.clone(),
            });
        }
    }

    pub(super) const fn has_calls(&self) -> bool {
        !self.calls.is_empty()
    }

    /// Number of tokens of thoughts, their markers included. None if the answer cannot have thoughts.
    pub(super) fn reasoning_tokens(&self) -> Option<usize> {
        self.may_think.then_some(self.reasoning_tokens)
    }

    pub(super) fn call_id(&self, head: &Head, choice: usize, call: usize) -> String {
        call_id("call_", self.short_ids, &head.id, choice, call)
    }
}
