//! The matcher of a choice that follows a grammar.

use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::guided::{MaskRow, Matcher, StepMasks};
use crate::panics::contain;

/// Keeps one choice to its grammar.
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

    /// What is needed to compute the mask of a step's row. `tokens`: number of tokens generated so far.
    pub(super) fn mask_row(&self, row: usize, tokens: usize) -> MaskRow {
        MaskRow::by_grammar(
            row,
            Arc::clone(&self.matcher),
            Arc::clone(&self.stop_tokens),
            tokens < self.min_tokens,
        )
    }

    /// Advances by the token that a step sampled for `row`. Returns true if the text is complete.
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
        // The engine's thread also serves all other requests.
        contain("a grammar", follow).flatten()
    }
}

/// Requests whose grammar failed in a step, with the reasons.
pub(super) type Failures = Vec<(u64, Error)>;
