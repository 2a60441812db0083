//! The queue from the callers and the preparing pool to the engine's thread.

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
    /// A tier has finished a read, or can take writes again.
    Look,
    Stop,
}

/// A request on its way to the engine's thread.
pub(super) struct Request {
    pub(super) submission: Submission,
    pub(super) seed: u64,
    // Dropped in this order, so that everything is free before the client gets an error.
    pub(super) lease: Option<TurnGuard>,
    pub(super) open: Admission,
    pub(super) reply: Reply,
}

pub(super) struct ReadyRequest {
    pub(super) request: Request,
    pub(super) prepared: Prepared,
}

impl Request {
    /// Ends it with this error.
    pub(super) fn fail(self, error: Error) {
        let Self {
            lease,
            open,
            mut reply,
            ..
        } = self;
        // Everything is free before the client gets the error.
        drop(lease);
        drop(open);
        reply.fail(error);
    }

    /// Ends it before it has begun, because its client has aborted it.
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
    /// The engine's thread has ended and will not read the inbox again.
    closed: bool,
}

/// The commands that wait for the engine's thread.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    waiting: Mutex<Waiting>,
    arrived: Condvar,
}

impl Command {
    /// Fails the request of this command.
    pub(super) fn reject(self, error: &Error) {
        match self {
            Self::Run(ready) => ready.request.fail(error.clone()),
            Self::Embed(job) => job.fail(error.clone()),
            Self::Abort(_) | Self::Look | Self::Stop => {}
        }
    }
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Run(_) => "Run",
            Self::Embed(_) => "Embed",
            Self::Abort(_) => "Abort",
            Self::Look => "Look",
            Self::Stop => "Stop",
        })
    }
}

impl Inbox {
    /// Passes a command to the engine's thread. Returns the command if that thread has ended.
    pub(super) fn send(&self, command: Command) -> Result<(), Command> {
        let mut waiting = lock(&self.waiting);
        if waiting.closed {
            return Err(command);
        }
        waiting.commands.push(command);
        self.arrived.notify_one();
        Ok(())
    }

    /// Takes all commands. If `idle`, waits for one, and reports the beginning and end of the wait to `health`.
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

    /// Closes the inbox, and returns the commands that are left.
    pub(super) fn close(&self) -> Vec<Command> {
        let mut waiting = lock(&self.waiting);
        waiting.closed = true;
        std::mem::take(&mut waiting.commands)
    }
}
