//! Turns for the tests of what writes them.

use std::sync::{Arc, Mutex};

use super::turn_guard::{FinishedTurn, TurnGuard};
use crate::session::{Commit, SessionKey, SessionStore, SessionUsage, Start, Turn};
use crate::text::Tail;

/// A turn of one token that has finished, in a session that it creates or continues.
pub(super) fn turn(
    store: &Arc<Mutex<SessionStore>>,
    key: SessionKey,
    request: u64,
) -> FinishedTurn {
    let (lease, base) = TurnGuard::begin(store, key, request, Start::Create, 1).unwrap();
    let mut turns = base.turns;
    turns.push(Turn {
        start: base.history.len(),
        input_tokens: 1,
        output_tokens: 0,
        tail: Tail::Closed,
        logprobs: None,
        key: None,
    });
    lease.finish(Commit {
        tokens: [base.history, vec![9]].concat(),
        turns,
        seed: 0,
        system_tokens: 0,
        adapter: None,
        end: false,
        usage: SessionUsage::default(),
        hold_ms: None,
        created_ms: None,
    })
}
