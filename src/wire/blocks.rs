//! An answer as a list of its parts in their order, for routes whose replies are such lists.

use std::ops::Range;

use super::answer::{AnswerFormat, AnswerParser, Piece, call_id};
use super::delta::TokenLogprob;
use super::head::Head;

/// A part of an answer.
#[derive(Debug)]
pub(super) enum Block {
    Reasoning(String),
    Text {
        text: String,
        /// Log-probabilities of its tokens, if requested.
        logprobs: Vec<TokenLogprob>,
    },
    Call {
        /// The call's index.
        call: usize,
        name: String,
        arguments: String,
    },
}

impl Block {
    pub(super) fn text(&self) -> &str {
        match self {
            Self::Reasoning(text) | Self::Text { text, .. } => text,
            Self::Call { arguments, .. } => arguments,
        }
    }

    pub(super) fn logprobs(&self) -> &[TokenLogprob] {
        match self {
            Self::Text { logprobs, .. } => logprobs,
            Self::Reasoning(_) | Self::Call { .. } => &[],
        }
    }

    fn grow(&mut self, more: &str) -> Range<usize> {
        let text = match self {
            Self::Reasoning(text) | Self::Text { text, .. } => text,
            Self::Call { arguments, .. } => arguments,
        };
        let before = text.len();
        text.push_str(more);
        before..text.len()
    }
}

/// A change of the list by new text. Blocks are identified by their index.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    Opened(usize),
    Grew {
        block: usize,
        /// The new part of the block's text, in bytes.
        text: Range<usize>,
        /// The new part of its log-probabilities.
        logprobs: Range<usize>,
    },
    /// Another block follows. The end of the answer closes the last block.
    Closed(usize),
}

/// The blocks of one answer.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    parser: Option<AnswerParser>,
    /// Whether call ids are short, as Mistral's templates require.
    short_ids: bool,
    list: Vec<Block>,
    calls: usize,
    /// Log-probabilities of tokens whose text waits.
    waiting: Vec<TokenLogprob>,
    reasoning_tokens: usize,
}

impl Blocks {
    pub(super) fn new(format: &AnswerFormat) -> Self {
        Self {
            parser: AnswerParser::new(format),
            short_ids: format.short_ids(),
            ..Self::default()
        }
    }

    pub(super) fn list(&self) -> &[Block] {
        &self.list
    }

    pub(super) const fn has_calls(&self) -> bool {
        self.calls > 0
    }

    /// Number of tokens of thoughts, their markers included.
    pub(super) const fn reasoning_tokens(&self) -> usize {
        self.reasoning_tokens
    }

    pub(super) fn call_id(&self, prefix: &str, head: &Head, call: usize) -> String {
        call_id(prefix, self.short_ids, &head.id, 0, call)
    }

    /// Adds new text and the log-probabilities of its tokens. `tokens` is the number of tokens so far.
    pub(super) fn push(
        &mut self,
        text: &str,
        logprobs: &mut Vec<TokenLogprob>,
        tokens: usize,
    ) -> Vec<Change> {
        self.read(text, logprobs, tokens, false)
    }

    /// Adds the last text. At least one block exists afterwards.
    pub(super) fn finish(
        &mut self,
        text: &str,
        logprobs: &mut Vec<TokenLogprob>,
        tokens: usize,
    ) -> Vec<Change> {
        let mut changes = self.read(text, logprobs, tokens, true);
        let speaks = matches!(self.list.last(), Some(Block::Text { .. }));
        if self.list.is_empty() || (speaks && !self.waiting.is_empty()) {
            self.say("", &mut changes);
        }
        changes
    }

    fn read(
        &mut self,
        text: &str,
        logprobs: &mut Vec<TokenLogprob>,
        tokens: usize,
        last: bool,
    ) -> Vec<Change> {
        self.waiting.append(logprobs);
        let mut changes = Vec::new();
        let Some(parser) = &mut self.parser else {
            if !text.is_empty() {
                self.say(text, &mut changes);
            }
            return changes;
        };
        let pieces = parser.push(text, last);
        let thinks = parser.thinks();
        if thinks {
            self.reasoning_tokens = tokens;
        }
        let speaks = pieces.iter().any(|p| matches!(p, Piece::Content(_)));
        if !speaks && (thinks || !pieces.is_empty()) {
            self.waiting.clear();
        }
        for piece in pieces {
            match piece {
                Piece::Content(text) => self.say(&text, &mut changes),
                Piece::Reasoning(text) => {
                    if !matches!(self.list.last(), Some(Block::Reasoning(_))) {
                        self.open(Block::Reasoning(String::new()), &mut changes);
                    }
                    self.grow(&text, &mut changes);
                }
                Piece::Call { index, name } => {
                    self.calls = index + 1;
                    let block = Block::Call {
                        call: index,
                        name,
                        arguments: String::new(),
                    };
                    self.open(block, &mut changes);
                }
                Piece::Arguments { text, .. } => self.grow(&text, &mut changes),
            }
        }
        changes
    }

    fn say(&mut self, text: &str, changes: &mut Vec<Change>) {
        if !matches!(self.list.last(), Some(Block::Text { .. })) {
            let block = Block::Text {
                text: String::new(),
                logprobs: Vec::new(),
            };
            self.open(block, changes);
        }
        self.grow(text, changes);
    }

    fn open(&mut self, block: Block, changes: &mut Vec<Change>) {
        if let Some(last) = self.list.len().checked_sub(1) {
            changes.push(Change::Closed(last));
        }
        changes.push(Change::Opened(self.list.len()));
        self.list.push(block);
    }

    fn grow(&mut self, more: &str, changes: &mut Vec<Change>) {
        let Some(place) = self.list.len().checked_sub(1) else {
            return;
        };
        let block = &mut self.list[place];
        let text = block.grow(more);
        let before = block.logprobs().len();
        if let Block::Text { logprobs, .. } = block {
            logprobs.append(&mut self.waiting);
        }
        let logprobs = before..block.logprobs().len();
        if !text.is_empty() || !logprobs.is_empty() {
            changes.push(Change::Grew {
                block: place,
                text,
                logprobs,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Function;
    use crate::text::formats::{HERMES, Thinking, Thoughts, ToolFormat};

    fn logprob(token: u32) -> TokenLogprob {
        TokenLogprob::new(token, b"x".to_vec(), Some(-1.0), Vec::new())
    }

    fn blocks(thinking: Option<Thoughts>, tools: Option<&'static ToolFormat>) -> Blocks {
        Blocks::new(&AnswerFormat {
            thinking,
            tools: tools.map(|format| (format, vec![Function::new("f", None)])),
            one_call: false,
        })
    }

    #[test]
    fn each_part_opens_when_it_begins_and_closes_when_another_does() {
        let mut blocks = blocks(Some(Thoughts::think(Thinking::Maybe)), Some(&HERMES));
        let mut changes = Vec::new();
        let text =
            "<think>Hm.</think>Yes.<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
        for (at, c) in text.char_indices() {
            changes.extend(blocks.push(&c.to_string(), &mut vec![logprob(at as u32)], at + 1));
        }
        changes.extend(blocks.finish("", &mut Vec::new(), text.len()));
        let borders: Vec<&Change> = changes
            .iter()
            .filter(|change| !matches!(change, Change::Grew { .. }))
            .collect();
        assert_eq!(
            borders,
            [
                &Change::Opened(0),
                &Change::Closed(0),
                &Change::Opened(1),
                &Change::Closed(1),
                &Change::Opened(2)
            ]
        );
        let texts: Vec<&str> = blocks.list().iter().map(Block::text).collect();
        assert_eq!(texts, ["Hm.", "Yes.", "{}"]);
        assert!(blocks.has_calls());
        assert_eq!(blocks.reasoning_tokens(), "<think>Hm.</think>".len());
        // Tokens of thoughts and calls do not belong to the text.
        let tokens: Vec<u32> = blocks.list()[1]
            .logprobs()
            .iter()
            .map(|l| l.token)
            .collect();
        let first = "<think>Hm.</think>".len() as u32;
        assert_eq!(tokens, (first..first + 4).collect::<Vec<_>>());
    }

    #[test]
    fn an_answer_of_nothing_is_an_empty_text() {
        for tools in [None, Some(&HERMES)] {
            let mut blocks = blocks(None, tools);
            assert_eq!(blocks.finish("", &mut Vec::new(), 1), [Change::Opened(0)]);
            assert_eq!(blocks.list()[0].text(), "");
        }
    }

    #[test]
    fn log_probabilities_of_tokens_without_text_come_at_the_end() {
        let mut blocks = blocks(None, None);
        blocks.push("a", &mut vec![logprob(1)], 1);
        let change = Change::Grew {
            block: 0,
            text: 1..1,
            logprobs: 1..2,
        };
        assert_eq!(blocks.finish("", &mut vec![logprob(2)], 2), [change]);
    }
}
