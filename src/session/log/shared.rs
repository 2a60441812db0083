//! A session's changes as records that a store outside of the server keeps, so that another server can continue the session.

use super::record::Put;
use crate::session::ledger::SessionUsage;
use crate::session::state::{Commit, Outcome, Turn};

/// What a change made of a session: all of it, or the difference to the record before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredRecord {
    /// It says all of the session, and needs no record before it.
    pub whole: bool,
    /// The session's turns after the change.
    pub turns: u32,
    /// The session's tokens after the change.
    pub tokens: usize,
    /// What its turns have used.
    pub usage: SessionUsage,
    /// The body of a record of the session log.
    pub bytes: Vec<u8>,
}

impl Outcome {
    /// What a store has to keep; None: the session has ended. `whole`: even if a difference would do.
    pub fn record(&self, whole: bool) -> Option<StoredRecord> {
        let after = self.after.as_ref()?;
        let put = Put::between(self.before.as_ref().filter(|_| !whole), after);
        let mut bytes = Vec::new();
        put.write(&mut bytes);
        Some(StoredRecord {
            whole: put.is_whole(),
            turns: put.turns_after(),
            tokens: after.tokens.len(),
            usage: after.usage,
            bytes,
        })
    }
}

/// The session that the records make, the oldest first. None if they make none: the store is not trusted.
pub fn stored_session(records: impl IntoIterator<Item: AsRef<[u8]>>) -> Option<Commit> {
    let (mut tokens, mut turns): (Vec<u32>, Vec<Turn>) = (Vec::new(), Vec::new());
    let mut last = None;
    for record in records {
        let put = Put::parse(record.as_ref())?;
        if put.lost_turn > 0 || !put.fits(tokens.len(), &turns) {
            return None;
        }
        put.apply(&mut tokens, &mut turns);
        last = Some(put);
    }
    let put = last?;
    if turns.iter().any(|turn| turn.end() == turn.start) {
        return None;
    }
    Some(Commit {
        tokens,
        turns,
        seed: put.seed,
        system_tokens: put.system_tokens as usize,
        adapter: put.adapter,
        end: false,
        usage: put.usage,
        hold_ms: None,
        created_ms: Some(put.created_ms),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::SessionState;
    use crate::text::Tail;

    fn state(lengths: &[usize]) -> SessionState {
        let mut state = SessionState::new(5);
        let mut turns: Vec<Turn> = Vec::new();
        for &tokens in lengths {
            turns.push(Turn {
                start: turns.last().map_or(0, Turn::end),
                input_tokens: tokens - 1,
                output_tokens: 1,
                tail: Tail::Closed,
                logprobs: None,
                key: None,
            });
        }
        state.tokens = (0..lengths.iter().sum::<usize>() as u32).collect();
        state.turns = turns.into();
        state.usage = SessionUsage {
            prompt_tokens: 7,
            ..SessionUsage::default()
        };
        state
    }

    fn record(before: Option<&SessionState>, after: &SessionState, whole: bool) -> StoredRecord {
        let outcome = Outcome {
            before: before.cloned(),
            after: Some(after.clone()),
        };
        outcome.record(whole).unwrap()
    }

    #[test]
    fn records_make_the_session_again() {
        let states = [state(&[3]), state(&[3, 4]), state(&[3, 4, 2]), state(&[3])];
        let mut before = None;
        let mut records = Vec::new();
        for after in &states {
            records.push(record(before, after, false));
            before = Some(after);
        }
        assert!(records[0].whole && records[1..].iter().all(|record| !record.whole));
        for (count, after) in (1..).zip(&states) {
            let bytes = records[..count].iter().map(|record| &record.bytes[..]);
            let commit = stored_session(bytes).unwrap();
            assert_eq!(
                (commit.tokens, commit.turns),
                (after.tokens.to_vec(), after.turns.to_vec())
            );
            assert_eq!((commit.created_ms, commit.usage), (Some(5), after.usage));
        }
        let whole = record(Some(&states[1]), &states[2], true);
        assert!(whole.whole && whole.turns == 3 && whole.tokens == 9);
        assert!(stored_session([&whole.bytes[..]]).is_some());
    }

    #[test]
    fn what_is_no_session_is_refused() {
        let (first, second) = (state(&[3]), state(&[3, 4]));
        let whole = record(None, &first, false).bytes;
        let difference = record(Some(&first), &second, false).bytes;
        assert_eq!(stored_session([[0; 0]; 0]), None);
        assert_eq!(stored_session([&difference[..]]), None);
        assert_eq!(stored_session([&whole[..whole.len() - 1]]), None);
        let mut lost = first.clone();
        lost.lost_turn = 4;
        assert_eq!(
            stored_session([&record(None, &lost, false).bytes[..]]),
            None
        );
        let mut empty = first;
        empty.turns = [
            &empty.turns[..],
            &[Turn {
                start: 3,
                input_tokens: 0,
                output_tokens: 0,
                ..empty.turns[0].clone()
            }],
        ]
        .concat()
        .into();
        assert_eq!(
            stored_session([&record(None, &empty, false).bytes[..]]),
            None
        );
    }
}
