//! Sequences that follow a grammar, on their way through the engine's steps.

use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::guided::{MaskRow, Matcher, StepMasks};
use crate::panics::contain;

/// What keeps one choice to its grammar.
#[derive(Debug)]
pub(super) struct Guide {
    matcher: Arc<Mutex<Matcher>>,
    stop_tokens: Arc<[u32]>,
    min_tokens: usize,
}

impl Guide {
    pub(super) fn new(matcher: Matcher, stop_tokens: Arc<[u32]>, min_tokens: usize) -> Self {
        Self {
            matcher: Arc::new(Mutex::new(matcher)),
            stop_tokens,
            min_tokens,
        }
    }

    /// What the mask of a step's row needs; `tokens`: generated so far.
    pub(super) fn mask_row(&self, row: usize, tokens: usize) -> MaskRow {
        MaskRow::by_grammar(
            row,
            Arc::clone(&self.matcher),
            Arc::clone(&self.stop_tokens),
            tokens < self.min_tokens,
        )
    }

    /// Follows the token that a step chose for `row`. True: the text is complete.
    pub(super) fn follow(&self, token: u32, row: usize, masks: Option<&StepMasks>) -> Result<bool> {
        if let Some(error) = masks.and_then(|masks| masks.error(row)) {
            return Err(error);
        }
        let follow = || {
            let matcher = self.matcher.lock();
            matcher
                .unwrap_or_else(PoisonError::into_inner)
                .consume(token)
        };
        // The engine's thread serves all others, too.
        contain("a grammar", follow).flatten()
    }
}

/// Requests whose grammar failed in a step, each with the reason.
pub(super) type Failures = Vec<(u64, Error)>;
