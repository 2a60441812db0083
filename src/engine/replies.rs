//! Tells clients what becomes of their requests.

use std::collections::HashMap;
use std::sync::Arc;

use super::admission::Admission;
use super::clock::now_ms;
use super::events::{Abort, Events};
use super::log_writer::{Done, LogSender};
use super::metrics::Outcome;
use super::shared::Shared;
use super::turn_guard::FinishedTurn;
use crate::error::{Error, Result};
use crate::sched::FinishReason;
use crate::wire::{Delta, Reply, Usage};

/// The replies of the requests that the core knows.
#[derive(Debug)]
pub(super) struct Replies {
    pub(super) shared: Arc<Shared>,
    pub(super) open: HashMap<u64, (Reply, Admission)>,
    /// Writes finished turns before their replies end.
    pub(super) log: Option<LogSender>,
}

impl Events for Replies {
    fn delta(&mut self, request: u64, choice: usize, delta: Delta) {
        if let Some((reply, _)) = self.open.get_mut(&request)
            && !reply.push(choice, delta)
        {
            self.shared.abort(request, Abort::Disconnect);
        }
    }

    fn finish(
        &mut self,
        request: u64,
        choice: usize,
        delta: Delta,
        reason: FinishReason,
        usage: Usage,
        turn: Option<FinishedTurn>,
    ) {
        if let Some((_, open)) = self.open.get_mut(&request) {
            open.count(choice, usage);
        }
        if let Some(mut turn) = turn {
            if let Some((_, open)) = self.open.get(&request) {
                turn.commit.usage.time_ms = open.age().as_millis() as u64;
            }
            if let Some(log) = &self.log
                && let Some((mut reply, open)) = self.open.remove(&request)
            {
                // A session's request has one choice, and ends with it.
                let shared = Arc::clone(&self.shared);
                let done = Done::new(move |written: Result<()>| {
                    let outcome = written.as_ref().map_or(Outcome::Error, |()| reason.into());
                    shared.admissions.latencies().end(open.age(), outcome);
                    drop(open);
                    match written {
                        Ok(()) => drop(reply.finish(choice, delta, reason, usage)),
                        Err(error) => reply.fail(error),
                    }
                });
                return log.send(turn, done);
            }
            turn.commit(now_ms());
        }
        let Some((reply, _)) = self.open.get_mut(&request) else {
            return;
        };
        if !reply.ends_with(choice) {
            reply.finish(choice, delta, reason, usage);
        } else if let Some((mut reply, open)) = self.open.remove(&request) {
            self.shared
                .admissions
                .latencies()
                .end(open.age(), reason.into());
            // What it took of its tenant's allowance is free again before its client hears of the end.
            drop(open);
            reply.finish(choice, delta, reason, usage);
        }
    }

    fn fail(&mut self, request: u64, error: &Error, usage: Usage) {
        if let Some((mut reply, mut open)) = self.open.remove(&request) {
            open.count(0, usage);
            self.shared
                .admissions
                .latencies()
                .end(open.age(), Outcome::Error);
            drop(open);
            reply.fail(error.clone());
        }
    }

    fn first_token(&mut self, request: u64, choice: usize) {
        if choice == 0
            && let Some((_, open)) = self.open.get_mut(&request)
        {
            open.sampled();
            self.shared.admissions.latencies().first_token(open.age());
        }
    }

    fn next_token(&mut self, request: u64, choice: usize) {
        if choice == 0
            && let Some((_, open)) = self.open.get_mut(&request)
            && let Some(time) = open.sampled()
        {
            self.shared.admissions.latencies().next_token(time);
        }
    }
}
