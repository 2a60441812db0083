//! A lane's turn while it runs. It collects what the client gets, until the turn is added to the lane.

use std::sync::{Arc, Mutex};

use super::locks::lock;
use crate::session::{LaneKey, LaneTurn, Lanes, NewTurn, Setting, ToldAnswer};
use crate::text::Tail;
use crate::wire::answer::{AnswerFormat, AnswerParser, Piece};

/// A turn of a lane while it runs. Dropping it leaves the lane as it is.
#[derive(Debug)]
pub struct OpenLaneTurn {
    pub(super) lanes: Arc<Mutex<Lanes>>,
    pub(super) key: LaneKey,
    pub(super) setting: Arc<Setting>,
    /// The turns before it.
    pub(super) turns: Vec<Arc<LaneTurn>>,
    /// Number of tokens of the turns before it.
    pub(super) history_tokens: usize,
    /// The messages that it adds.
    pub(super) messages: Vec<Box<str>>,
    /// How its answer is parsed.
    pub(super) format: AnswerFormat,
    /// The answer so far.
    pub(super) text: String,
}

impl OpenLaneTurn {
    /// Adds text of the answer, as the client gets it.
    pub(super) fn say(&mut self, text: &str) {
        self.text.push_str(text);
    }

    /// Ends the turn. `tokens` are those of all turns; the first `prompt_tokens` of them are the prompt.
    pub(super) fn finish(self, tokens: &[u32], prompt_tokens: usize, tail: Tail) {
        let new = NewTurn {
            messages: self.messages,
            answer: told(&self.format, self.text),
            tokens: tokens[self.history_tokens..].to_vec(),
            input_tokens: prompt_tokens - self.history_tokens,
            tail,
        };
        lock(&self.lanes).commit(&self.key, self.setting, self.turns, new);
    }
}

/// An answer's text as the client got it.
fn told(format: &AnswerFormat, text: String) -> ToldAnswer {
    let mut answer = ToldAnswer::default();
    let Some(mut parser) = AnswerParser::new(format) else {
        answer.content = text;
        return answer;
    };
    for piece in parser.push(&text, true) {
        match piece {
            Piece::Reasoning(text) => answer.reasoning.push_str(&text),
            Piece::Content(text) => answer.content.push_str(&text),
            Piece::Call { name, .. } => answer.calls.push((name, String::new())),
            Piece::Arguments { index, text } => {
                if let Some((_, arguments)) = answer.calls.get_mut(index) {
                    arguments.push_str(&text);
                }
            }
        }
    }
    answer
}
