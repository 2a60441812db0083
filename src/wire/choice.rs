//! The state of one choice of a reply.

use super::blocks::Blocks;
use super::chat_answer::Answer;
use super::delta::TokenLogprob;
use super::head::Head;
use super::said::{Reads, Said};
use crate::sched::FinishReason;

/// The state of one choice: what waits to be written, and what a whole reply keeps.
#[derive(Debug, Default)]
pub(super) struct Choice {
    /// All text, in whole replies that are not lists of blocks. Otherwise empty.
    pub(super) text: String,
    pub(super) tokens: usize,
    /// Those that are not written yet (streams), or all (whole replies).
    pub(super) logprobs: Vec<TokenLogprob>,
    pub(super) prompt_logprobs: Vec<TokenLogprob>,
    /// Those that are not written yet (streams), or all (whole replies).
    pub(super) token_ids: Vec<u32>,
    /// Whether a chunk of it was written (streams).
    pub(super) begun: bool,
    /// Number of characters of the tokens that were written before `logprobs` (streams).
    pub(super) text_offset: usize,
    pub(super) finish: Option<FinishReason>,
    pub(super) stop_string: Option<String>,
    /// Text that waits to be written: its last character is incomplete, or the reader is behind.
    pub(super) waiting: String,
    /// Approximate size of the waiting text on the wire, with its log-probabilities (streams).
    pub(super) waiting_bytes: usize,
    /// The parser of a chat's answer, if it has parts.
    pub(super) answer: Option<Answer>,
    /// All text with its log-probabilities, if the reply is a list of blocks.
    pub(super) blocks: Blocks,
}

impl Choice {
    /// Parses the waiting text. `last`: no more text will come.
    pub(super) fn read(&mut self, head: &Head, reads: Reads, last: bool) -> Said {
        let text = std::mem::take(&mut self.waiting);
        if reads == Reads::Blocks {
            let (blocks, tokens) = (&mut self.blocks, self.tokens);
            return Said::Changes(if last {
                blocks.finish(&text, &mut self.logprobs, tokens)
            } else {
                blocks.push(&text, &mut self.logprobs, tokens)
            });
        }
        match &mut self.answer {
            Some(answer) => Said::Pieces(answer.push(head, &text, self.tokens, last)),
            None => Said::Text(text),
        }
    }
}
