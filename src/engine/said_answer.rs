//! Repeats an answer that a session has already: its tokens replace those that would be sampled.

use std::sync::Arc;

use crate::guided::MaskRow;

/// The output of a committed turn.
#[derive(Debug, Clone)]
pub struct SaidAnswer {
    tokens: Arc<[u32]>,
    vocab_size: usize,
}

impl SaidAnswer {
    pub(super) fn new(tokens: Vec<u32>, vocab_size: usize) -> Self {
        Self {
            tokens: tokens.into(),
            vocab_size,
        }
    }

    /// The mask of a step's row. `at`: number of tokens repeated so far. After the last one, `end` ends an answer that would go on.
    pub(super) fn mask_row(&self, row: usize, at: usize, end: Option<u32>) -> Option<MaskRow> {
        let token = self.tokens.get(at).copied().or(end)?;
        Some(MaskRow::only(row, token, self.vocab_size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_token_is_forced_and_then_the_end() {
        let said = SaidAnswer::new(vec![5, 6], 64);
        let forced = |at, end| said.mask_row(0, at, end).and_then(|row| row.forced());
        assert_eq!(
            [0, 1, 2, 3].map(|at| forced(at, Some(9))),
            [5, 6, 9, 9].map(Some)
        );
        assert_eq!(forced(2, None), None);
    }
}
