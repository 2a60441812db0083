//! Whether the engine is working, judged by signs of life.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::locks::lock;
use crate::error::{Error, Kind, Result};

/// Stands for a time while there is nothing to do.
const IDLE: u64 = u64::MAX;

/// What the engine's thread reports of itself.
#[derive(Debug)]
pub(super) struct Health {
    started: Instant,
    /// If work waits this long for a round, the engine counts as stalled.
    stall: Duration,
    /// Start of its last round, in milliseconds since the engine's start; [`IDLE`] while it has nothing to do.
    last_round: AtomicU64,
    down: Mutex<Option<String>>,
}

impl Health {
    pub(super) fn new(stall: Duration) -> Self {
        Self {
            started: Instant::now(),
            stall,
            last_round: AtomicU64::new(IDLE),
            down: Mutex::default(),
        }
    }

    /// No work is waiting.
    pub(super) fn idle(&self) {
        self.last_round.store(IDLE, Ordering::Release);
    }

    /// Work is waiting, and a round begins.
    pub(super) fn begin_round(&self) {
        let now = self.started.elapsed().as_millis() as u64;
        self.last_round.store(now, Ordering::Release);
    }

    /// The engine is down for good. The first reason is kept.
    pub(super) fn set_down(&self, why: &str) {
        lock(&self.down).get_or_insert_with(|| why.to_owned());
    }

    /// # Errors
    /// `engine_unavailable` (503) with the reason, if the engine is down.
    pub(super) fn check_up(&self) -> Result<()> {
        match &*lock(&self.down) {
            Some(why) => Err(engine_down(why)),
            None => Ok(()),
        }
    }

    /// How long work has waited for a round.
    pub(super) fn waited(&self) -> Duration {
        match self.last_round.load(Ordering::Acquire) {
            IDLE => Duration::ZERO,
            began => self
                .started
                .elapsed()
                .saturating_sub(Duration::from_millis(began)),
        }
    }

    /// # Errors
    /// As [`Self::check_up`]; `engine_stalled` (503) after too long without a round while work waits.
    pub(super) fn check(&self) -> Result<()> {
        self.check_up()?;
        let waited = self.waited();
        if waited.is_zero() || waited < self.stall {
            return Ok(());
        }
        let message = format!(
            "the engine has made no step for {} s while work waits; the limit is {} s",
            waited.as_secs(),
            self.stall.as_secs_f64()
        );
        Err(Error::new(Kind::Unavailable, "engine_stalled", message)
            .with_detail("stalled_seconds", waited.as_secs()))
    }
}

/// The error of requests that were running when the engine went down.
pub(super) fn engine_down(why: &str) -> Error {
    Error::new(
        Kind::Unavailable,
        "engine_unavailable",
        format!("the engine is down: {why}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_engine_is_well_and_one_that_stands_still_is_not() {
        let health = Health::new(Duration::ZERO);
        assert_eq!(health.check(), Ok(()));
        health.begin_round();
        let error = health.check().unwrap_err();
        assert_eq!((error.kind.status(), error.code), (503, "engine_stalled"));
        health.idle();
        assert_eq!(health.check(), Ok(()));
        let patient = Health::new(Duration::from_secs(3600));
        patient.begin_round();
        assert_eq!(patient.check(), Ok(()));
        patient.set_down("a thread ended");
        patient.set_down("it was stopped");
        let error = patient.check().unwrap_err();
        assert_eq!(error.message, "the engine is down: a thread ended");
        assert_eq!(error.code, "engine_unavailable");
    }
}
