//! Follows the thoughts of an answer, without telling what they are.

use super::messages::MessageParser;
use super::reasoning::ThoughtParser;
use crate::text::formats::Thoughts;

/// Where an answer stands: within its thoughts, or not.
#[derive(Debug)]
pub struct ThoughtFollower(Parser);

#[derive(Debug)]
enum Parser {
    Marks(ThoughtParser),
    Messages(MessageParser),
}

impl ThoughtFollower {
    /// At the answer's beginning.
    pub fn new(thoughts: Thoughts) -> Self {
        Self(match thoughts.format.messages {
            Some(messages) => Parser::Messages(MessageParser::new(messages, None)),
            None => Parser::Marks(ThoughtParser::new(thoughts)),
        })
    }

    /// Whether what comes next is a thought, or the mark that ends it.
    pub fn within(&self) -> bool {
        match &self.0 {
            Parser::Marks(parser) => parser.within(),
            Parser::Messages(parser) => parser.thinks(),
        }
    }

    /// Goes on with `text`.
    pub fn push(&mut self, text: &str) {
        match &mut self.0 {
            Parser::Marks(parser) => parser.push(text, &mut String::new(), &mut String::new()),
            Parser::Messages(parser) => parser.push(text, &mut Vec::new()),
        }
    }
}
