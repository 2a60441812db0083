//! Tracks whether an answer is within its thoughts.

use super::messages::MessageParser;
use super::reasoning::ThoughtParser;
use crate::text::formats::Thoughts;

/// Tracks whether an answer is within its thoughts, without keeping them.
#[derive(Debug)]
pub struct ThoughtFollower(Parser);

#[derive(Debug)]
enum Parser {
    Marks(ThoughtParser),
    Messages(MessageParser),
}

impl ThoughtFollower {
    /// Starts at the answer's beginning.
    pub fn new(thoughts: Thoughts) -> Self {
        Self(match thoughts.format.messages {
            Some(messages) => Parser::Messages(MessageParser::new(messages, None)),
            None => Parser::Marks(ThoughtParser::new(thoughts)),
        })
    }

    /// Whether the next text is a thought, or the marker that ends thoughts.
    pub fn within(&self) -> bool {
        match &self.0 {
            Parser::Marks(parser) => parser.within(),
            Parser::Messages(parser) => parser.thinks(),
        }
    }

    /// Reads more text.
    pub fn push(&mut self, text: &str) {
        match &mut self.0 {
            Parser::Marks(parser) => parser.push(text, &mut String::new(), &mut String::new()),
            Parser::Messages(parser) => parser.push(text, &mut Vec::new()),
        }
    }
}
