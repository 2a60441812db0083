//! Holds an answer's thoughts to their budget: counts their tokens and, where it is used up, forces the mark that ends them.
//! What comes after is sampled as ever.

use std::sync::Arc;

use crate::error::Result;
use crate::guided::MaskRow;
use crate::request::Submission;
use crate::text::Tokenizer;
use crate::text::formats::Thoughts;
use crate::wire::answer::ThoughtParser;

/// How long an answer may think.
#[derive(Debug, Clone)]
pub struct ThoughtLimit {
    budget: usize,
    thinking: Thoughts,
    /// The tokens of the mark that ends thoughts.
    end: Arc<[u32]>,
    vocab_size: usize,
}

impl ThoughtLimit {
    /// The limit of a request whose answer may begin with thoughts (`thinking`) and that has one.
    ///
    /// # Errors
    /// Those of the tokenizer.
    pub(super) fn of(
        submission: &Submission,
        thinking: Option<Thoughts>,
        tokenizer: Option<&Tokenizer>,
        vocab_size: usize,
    ) -> Result<Option<Self>> {
        let (Some(budget), Some(thinking), Some(tokenizer)) =
            (submission.thinking_budget, thinking, tokenizer)
        else {
            return Ok(None);
        };
        // Where thoughts are messages of their own, no one mark ends them.
        if thinking.format.messages.is_some() {
            return Ok(None);
        }
        let mark = thinking.format.close.trim();
        let end = match tokenizer.token_to_id(mark) {
            Some(id) => vec![id],
            None => tokenizer.encode_continued(mark)?,
        };
        Ok(Some(Self {
            budget: budget as usize,
            thinking,
            end: end.into(),
            vocab_size,
        }))
    }

    /// What follows one answer from its beginning.
    pub(super) fn begin(&self) -> ThoughtBudget {
        ThoughtBudget {
            limit: self.clone(),
            parser: ThoughtParser::new(self.thinking),
            thought: 0,
            forced: None,
        }
    }
}

/// One answer's thoughts while it is generated.
#[derive(Debug)]
pub(super) struct ThoughtBudget {
    limit: ThoughtLimit,
    parser: ThoughtParser,
    /// Tokens of thoughts so far.
    thought: usize,
    /// Tokens of the mark that have come, once it is forced.
    forced: Option<usize>,
}

impl ThoughtBudget {
    /// The mask of a step's row, where only one token may come next.
    pub(super) fn mask_row(&self, row: usize) -> Option<MaskRow> {
        let at = match self.forced {
            Some(at) => at,
            None if self.parser.within() && self.thought >= self.limit.budget => 0,
            None => return None,
        };
        let token = *self.limit.end.get(at)?;
        Some(MaskRow::only(row, token, self.limit.vocab_size))
    }

    /// Books a token and the text that it completed.
    pub(super) fn follow(&mut self, text: &str) {
        if let Some(at) = &mut self.forced {
            *at += 1;
            return;
        }
        let within = self.parser.within();
        if within && self.thought >= self.limit.budget {
            self.forced = Some(1);
            return;
        }
        let (mut thoughts, mut answer) = (String::new(), String::new());
        self.parser.push(text, &mut thoughts, &mut answer);
        if within && self.parser.within() {
            self.thought += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::formats::{THINK, Thinking};

    fn limit(budget: usize, begin: Thinking) -> ThoughtLimit {
        ThoughtLimit {
            budget,
            thinking: Thoughts {
                format: &THINK,
                begin,
            },
            end: vec![7, 8].into(),
            vocab_size: 64,
        }
    }

    /// The tokens that were forced, each as its place among all, while `pieces` are said where nothing is.
    fn forced(limit: &ThoughtLimit, pieces: &[&str]) -> Vec<(usize, u32)> {
        let mut budget = limit.begin();
        let (mut found, mut said) = (Vec::new(), pieces.iter());
        for at in 0.. {
            if let Some(row) = budget.mask_row(0) {
                let token = row.forced().unwrap();
                found.push((at, token));
                budget.follow(if token == 7 { "</th" } else { "ink>" });
            } else if let Some(piece) = said.next() {
                budget.follow(piece);
            } else {
                break;
            }
        }
        found
    }

    #[test]
    fn the_end_is_forced_after_exactly_the_budget() {
        let pieces = ["a", "b", "c", "d"];
        for budget in 0..4 {
            let expected = [(budget, 7), (budget + 1, 8)];
            assert_eq!(forced(&limit(budget, Thinking::Open), &pieces), expected);
        }
        assert_eq!(forced(&limit(5, Thinking::Open), &pieces), []);
    }

    #[test]
    fn the_mark_that_begins_thoughts_is_not_one_of_them() {
        let pieces = ["<thi", "nk>", "a", "b", "c"];
        let expected = [(4, 7), (5, 8)];
        assert_eq!(forced(&limit(2, Thinking::Maybe), &pieces), expected);
        assert_eq!(
            forced(&limit(0, Thinking::Maybe), &pieces[..2]),
            [(2, 7), (3, 8)]
        );
    }

    #[test]
    fn nothing_is_forced_where_thoughts_end_by_themselves_or_never_begin() {
        let ends = ["a", "</think>", "x", "y", "z", "<think>", "x", "y", "z"];
        assert_eq!(forced(&limit(2, Thinking::Open), &ends), []);
        let answers = ["x", "<think>", "y", "z"];
        assert_eq!(forced(&limit(0, Thinking::Maybe), &answers), []);
    }
}
