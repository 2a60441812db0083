//! The way from the callers and the preparing pool to the engine's thread.

use std::sync::{Condvar, Mutex, PoisonError};

use super::admission::Admission;
use super::embed::EmbedJob;
use super::health::Health;
use super::locks::lock;
use super::prepare::Prepared;
use super::turn_guard::TurnGuard;
use crate::error::Error;
use crate::request::Submission;
use crate::sched::FinishReason;
use crate::wire::{Delta, Reply, Usage};

pub(super) enum Command {
    Run(Box<ReadyRequest>),
    Embed(Box<EmbedJob>),
    Abort(u64),
    Stop,
}

/// A request on its way to the engine's thread.
pub(super) struct Request {
    pub(super) submission: Submission,
    pub(super) seed: u64,
    // Dropped in this order: all is free again before the client hears of an error.
    pub(super) lease: Option<TurnGuard>,
    pub(super) open: Admission,
    pub(super) reply: Reply,
}

pub(super) struct ReadyRequest {
    pub(super) request: Request,
    pub(super) prepared: Prepared,
}

impl Request {
    /// Ends it with an error.
    pub(super) fn fail(self, error: Error) {
        let Self {
            lease,
            open,
            mut reply,
            ..
        } = self;
        // All is free again before the client hears of the error.
        drop(lease);
        drop(open);
        reply.fail(error);
    }

    /// Ends it before it began, as its client wishes.
    pub(super) fn abort(self) {
        let Self {
            submission,
            lease,
            open,
            mut reply,
            ..
        } = self;
        drop(lease);
        drop(open);
        for choice in 0..submission.n as usize {
            reply.finish(
                choice,
                Delta::default(),
                FinishReason::Abort,
                Usage::default(),
            );
        }
    }
}

#[derive(Debug, Default)]
struct Waiting {
    commands: Vec<Command>,
    /// The engine's thread is gone and nobody will look again.
    closed: bool,
}

/// The commands that wait for the engine's thread.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    waiting: Mutex<Waiting>,
    arrived: Condvar,
}

impl Command {
    /// Fails the request that the command brings.
    pub(super) fn reject(self, error: &Error) {
        match self {
            Self::Run(ready) => ready.request.fail(error.clone()),
            Self::Embed(job) => job.fail(error.clone()),
            Self::Abort(_) | Self::Stop => {}
        }
    }
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Run(_) => "Run",
            Self::Embed(_) => "Embed",
            Self::Abort(_) => "Abort",
            Self::Stop => "Stop",
        })
    }
}

impl Inbox {
    /// Hands a command to the engine's thread; gives it back where that is gone.
    pub(super) fn send(&self, command: Command) -> Result<(), Command> {
        let mut waiting = lock(&self.waiting);
        if waiting.closed {
            return Err(command);
        }
        waiting.commands.push(command);
        self.arrived.notify_one();
        Ok(())
    }

    /// Takes all commands; waits for one if `idle`, and tells `health` of the wait and of its end.
    pub(super) fn receive(&self, idle: bool, health: &Health) -> Vec<Command> {
        let mut waiting = lock(&self.waiting);
        while idle && waiting.commands.is_empty() {
            health.idle();
            waiting = self
                .arrived
                .wait(waiting)
                .unwrap_or_else(PoisonError::into_inner);
        }
        health.begin_round();
        std::mem::take(&mut waiting.commands)
    }

    /// Takes no more commands, and returns those that are left.
    pub(super) fn close(&self) -> Vec<Command> {
        let mut waiting = lock(&self.waiting);
        waiting.closed = true;
        std::mem::take(&mut waiting.commands)
    }
}
