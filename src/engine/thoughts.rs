//! Limits the thoughts of an answer: counts their tokens and, at the limit, forces the marker that ends them. What follows is
//! sampled as usual.

use std::sync::Arc;

use crate::error::Result;
use crate::guided::MaskRow;
use crate::request::Submission;
use crate::text::Tokenizer;
use crate::text::formats::Thoughts;
use crate::wire::answer::ThoughtFollower;

/// The limit of an answer's thoughts.
#[derive(Debug, Clone)]
pub struct ThoughtLimit {
    budget: usize,
    thinking: Thoughts,
    /// The tokens that end thoughts: one list for each end.
    ends: Arc<[Vec<u32>]>,
    vocab_size: usize,
}

impl ThoughtLimit {
    /// The limit of a request, if it has one and its answer may begin with thoughts (`thinking`).
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
        let tokens = |mark: &str| match tokenizer.token_to_id(mark) {
            Some(id) => Ok(vec![id]),
            None => tokenizer.encode_continued(mark),
        };
        let format = thinking.format;
        let ends = match format.messages.and_then(|messages| messages.ends.first()) {
            // A call may follow a thought. Another thought ends with the header of the answer's words.
            Some(end) => vec![
                tokens(end)?,
                tokens(&format!("{}{}", format.close, format.answer))?,
            ],
            None => vec![tokens(format.close.trim())?],
        };
        Ok(Some(Self {
            budget: budget as usize,
            thinking,
            ends: ends.into(),
            vocab_size,
        }))
    }

    /// The budget of one answer.
    pub(super) fn begin(&self) -> ThoughtBudget {
        ThoughtBudget {
            limit: self.clone(),
            follower: ThoughtFollower::new(self.thinking),
            thought: 0,
            ended: 0,
            forced: 0,
        }
    }
}

/// One answer's thoughts while it is generated.
#[derive(Debug)]
pub(super) struct ThoughtBudget {
    limit: ThoughtLimit,
    follower: ThoughtFollower,
    /// Number of tokens of thoughts so far.
    thought: usize,
    /// How often an end was forced.
    ended: usize,
    /// Number of tokens of the current end that were forced.
    forced: usize,
}

impl ThoughtBudget {
    /// The token that must come next, if one is forced.
    fn next(&self) -> Option<u32> {
        let begins = self.follower.within() && self.thought >= self.limit.budget;
        let end = self.limit.ends.get(self.ended)?;
        (begins || self.forced > 0).then(|| end.get(self.forced).copied())?
    }

    /// The mask of a step's row, if a token is forced.
    pub(super) fn mask_row(&self, row: usize) -> Option<MaskRow> {
        let token = self.next()?;
        Some(MaskRow::only(row, token, self.limit.vocab_size))
    }

    /// Counts a token, with the text that it completed.
    pub(super) fn follow(&mut self, text: &str) {
        let (within, forced) = (self.follower.within(), self.next().is_some());
        self.follower.push(text);
        if forced {
            self.forced += 1;
            if self.forced == self.limit.ends[self.ended].len() {
                self.forced = 0;
                self.ended += 1;
            }
        } else if within && self.follower.within() {
            self.thought += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::formats::{THINK, Thinking, ThoughtFormat};

    fn limit(budget: usize, begin: Thinking) -> ThoughtLimit {
        ThoughtLimit {
            budget,
            thinking: Thoughts {
                format: &THINK,
                begin,
            },
            ends: [vec![7, 8]].into(),
            vocab_size: 64,
        }
    }

    /// The forced tokens with their positions, where `pieces` are the texts of the tokens that are not forced.
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

    #[test]
    fn a_second_thought_of_a_harmony_answer_ends_with_the_header_of_its_words() {
        let format = ThoughtFormat::named("harmony").unwrap();
        let begin = Thinking::Maybe;
        let limit = ThoughtLimit {
            budget: 2,
            thinking: Thoughts { format, begin },
            ends: [vec![7], vec![7, 8, 9]].into(),
            vocab_size: 64,
        };
        let header = ["<|channel|>", "analysis", "<|message|>"];
        let mut budget = limit.begin();
        let say = |budget: &mut ThoughtBudget, texts: &[&str]| {
            for text in texts {
                assert_eq!(budget.next(), None, "{text}");
                budget.follow(text);
            }
        };
        say(&mut budget, &header);
        say(&mut budget, &["a", "b"]);
        assert_eq!(budget.next(), Some(7));
        budget.follow("<|end|>");
        say(&mut budget, &["<|start|>", "assistant"]);
        say(&mut budget, &header);
        for (token, text) in [
            (7, "<|end|>"),
            (8, "<|start|>assistant"),
            (9, "<|channel|>final<|message|>"),
        ] {
            assert_eq!(budget.next(), Some(token));
            budget.follow(text);
        }
        say(&mut budget, &["x", "y", "<|end|>", "<|start|>"]);
    }
}
