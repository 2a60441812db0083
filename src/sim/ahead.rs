//! Steps that are launched while the one before is being computed, as the engine's thread does it.

use super::check::Check;
use super::world::{World, text};
use crate::engine::{Executor, StepOutput};
use crate::error::Error;

/// What became of the launch of a step ahead; none if there was none to launch. Failed: whether by chance, whatever the step held.
pub(super) type Launched = Option<Result<(), bool>>;

impl World {
    /// Plans and launches the step after the one in flight, if there is one.
    pub(super) fn launch_ahead(&mut self, unruly: bool) -> Result<Launched, String> {
        if !self.model.goes_ahead() || self.core.plan_ahead().is_empty() {
            return Ok(None);
        }
        self.counters.steps += 1;
        if unruly && self.random.once_in(20) {
            // Two steps are computed without the one that left.
            self.hang_up()?;
        }
        if unruly && self.random.once_in(self.config.fault) {
            self.faults.failed_steps += 1;
            return Ok(Some(Err(true)));
        }
        let launched = self.model.launch(self.core.scheduler().step_ahead());
        Ok(Some(launched.map_err(|_: Error| false)))
    }

    /// The step before has failed: what was computed from it is nobody's.
    pub(super) fn drop_ahead(&mut self, ahead: Launched) -> Check {
        if ahead == Some(Ok(())) {
            let step = self.core.scheduler().step_ahead();
            text(self.model.collect(step, &mut StepOutput::default()))?;
        }
        Ok(())
    }

    /// The step before is recorded.
    pub(super) fn go_on(&mut self, ahead: Launched) -> Check {
        self.in_flight = ahead == Some(Ok(()));
        match ahead {
            Some(Err(by_chance)) => self.fail_step(by_chance),
            None | Some(Ok(())) => Ok(()),
        }
    }
}
