//! One choice of a reply, as far as it has come.

use super::blocks::Blocks;
use super::chat_answer::Answer;
use super::delta::TokenLogprob;
use super::head::Head;
use super::said::{Reads, Said};
use crate::sched::FinishReason;

/// One choice of a reply: what waits to be written, and what a whole reply keeps.
#[derive(Debug, Default)]
pub(super) struct Choice {
    /// All text (whole replies that are no list of parts), or nothing.
    pub(super) text: String,
    pub(super) tokens: usize,
    /// Not yet written (streams), or all (whole replies).
    pub(super) logprobs: Vec<TokenLogprob>,
    pub(super) prompt_logprobs: Vec<TokenLogprob>,
    /// Not yet written (streams), or all (whole replies).
    pub(super) token_ids: Vec<u32>,
    /// Something of it was written (streams).
    pub(super) begun: bool,
    /// Characters of the tokens that were written before `logprobs` (streams).
    pub(super) text_offset: usize,
    pub(super) finish: Option<FinishReason>,
    pub(super) stop_string: Option<String>,
    /// Text that waits to be written: for characters to be complete, or for a reader that is behind.
    pub(super) waiting: String,
    /// About what it takes on the wire, with its log-probabilities (streams).
    pub(super) waiting_bytes: usize,
    /// Where a chat's answer is taken apart.
    pub(super) answer: Option<Answer>,
    /// Where the reply is a list of parts: all text and its log-probabilities.
    pub(super) blocks: Blocks,
}

impl Choice {
    /// Parses the waiting text. `last`: there will be no more.
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
