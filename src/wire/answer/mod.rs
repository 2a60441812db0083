//! Splits an answer's text into thoughts, words and function calls. The parsers are state machines that read the text in pieces, so
//! a stream and a whole reply have the same parts, however the text is cut.

mod arguments;
mod around;
mod call;
#[cfg(test)]
mod chunkings;
mod escape;
mod fate;
mod follower;
mod loose;
mod messages;
mod pairs;
mod quoted;
mod reasoning;
#[cfg(test)]
mod tests;
mod tools;
mod value;

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::request::Function;
use crate::text::formats::{Thoughts, ToolFormat};
use around::Around;
pub use follower::ThoughtFollower;
use messages::MessageParser;
use reasoning::ThoughtParser;
use tools::{ToolParser, say};

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Thoughts.
    Reasoning(String),
    /// Words.
    Content(String),
    /// A call of a function begins.
    Call {
        /// The call's index in the answer.
        index: usize,
        /// The function's name.
        name: String,
    },
    /// The next part of a call's arguments, as JSON.
    Arguments {
        /// The call's index in the answer.
        index: usize,
        /// New text.
        text: String,
    },
}

/// What to parse in an answer.
#[derive(Debug, Clone, Default)]
pub struct AnswerFormat {
    /// Absent: the answer has no thoughts.
    pub thinking: Option<Thoughts>,
    /// Absent: the answer has no calls.
    pub tools: Option<(&'static ToolFormat, Vec<Function>)>,
    /// Whether calls after the first are dropped.
    pub one_call: bool,
}

impl AnswerFormat {
    /// Whether call ids have nine characters.
    pub fn short_ids(&self) -> bool {
        matches!(self.tools, Some((format, _)) if format.short_ids)
    }
}

/// The parser of one answer's text.
#[derive(Debug)]
pub struct AnswerParser {
    parts: Parts,
    one_call: bool,
    thinks: bool,
}

#[derive(Debug)]
enum Parts {
    /// Each part has a header.
    Messages(MessageParser),
    /// Thoughts, then words and calls.
    Plain {
        thoughts: Option<ThoughtParser>,
        around: Around,
        tools: Option<ToolParser>,
    },
}

impl AnswerParser {
    /// Starts at the answer's beginning. `None` if there is nothing to parse.
    pub fn new(format: &AnswerFormat) -> Option<Self> {
        if format.thinking.is_none() && format.tools.is_none() {
            return None;
        }
        let tools = format.tools.clone();
        let of_tools = tools.as_ref().and_then(|(format, _)| format.messages);
        let of_thoughts = format
            .thinking
            .and_then(|thoughts| thoughts.format.messages);
        let parts = if let Some(messages) = of_tools.or(of_thoughts) {
            let functions = tools.filter(|(format, _)| format.messages.is_some());
            Parts::Messages(MessageParser::new(
                messages,
                functions.map(|(_, functions)| functions),
            ))
        } else {
            Parts::Plain {
                thoughts: format.thinking.map(ThoughtParser::new),
                around: Around::new(
                    format
                        .thinking
                        .map_or(&[], |thoughts| thoughts.format.around),
                ),
                tools: tools.map(|(format, functions)| ToolParser::new(format, functions)),
            }
        };
        Some(Self {
            parts,
            one_call: format.one_call,
            thinks: false,
        })
    }

    /// Whether the text so far ends within thoughts or their markers. Text that only the end of the answer completed does not
    /// count.
    pub const fn thinks(&self) -> bool {
        self.thinks
    }

    /// Parses new text. Some of it may have to wait for more. `last`: no more text will come.
    pub fn push(&mut self, text: &str, last: bool) -> Vec<Piece> {
        let mut pieces = Vec::new();
        match &mut self.parts {
            Parts::Messages(messages) => {
                messages.push(text, &mut pieces);
                self.thinks = messages.thinks();
                if last {
                    messages.flush(&mut pieces);
                }
            }
            Parts::Plain {
                thoughts,
                around,
                tools,
            } => {
                let (mut reasoning, mut answer) = (String::new(), String::new());
                match thoughts {
                    None => answer.push_str(text),
                    Some(thoughts) => {
                        thoughts.push(text, &mut reasoning, &mut answer);
                        self.thinks = thoughts.is_open();
                        if last {
                            thoughts.flush(&mut reasoning, &mut answer);
                        }
                    }
                }
                if !reasoning.is_empty() {
                    pieces.push(Piece::Reasoning(reasoning));
                }
                let answer = around.push(answer, last);
                match tools {
                    None => say(answer, &mut pieces),
                    Some(tools) => {
                        tools.push(&answer, &mut pieces);
                        if last {
                            tools.flush(&mut pieces);
                        }
                    }
                }
            }
        }
        if self.one_call {
            pieces.retain(|piece| {
                !matches!(piece, Piece::Call { index, .. } | Piece::Arguments { index, .. } if *index > 0)
            });
        }
        pieces
    }
}

/// The id of a call. It depends only on the reply, the choice and the call. `short`: nine characters, as Mistral's templates
/// require.
pub fn call_id(prefix: &str, short: bool, reply: &str, choice: usize, call: usize) -> String {
    let mut hasher = DefaultHasher::new();
    (reply, choice, call).hash(&mut hasher);
    let id = format!("{:016x}", hasher.finish());
    if short {
        id[..9].to_owned()
    } else {
        format!("{prefix}{id}")
    }
}

/// Length in bytes of the longest proper prefix of `marker` with which `text` ends.
fn partial_suffix(text: &str, marker: &str) -> usize {
    let longest = marker.len().saturating_sub(1).min(text.len());
    let ends = |&len: &usize| text.as_bytes().ends_with(&marker.as_bytes()[..len]);
    (1..=longest).rev().find(ends).unwrap_or(0)
}
