//! Worlds one after another until enough steps were made. In each, first everything goes wrong (safety), then nothing does,
//! and all that was admitted must end (liveness).

use std::sync::Arc;

use super::check::Check;
use super::random::Random;
use super::report::{Counters, Faults, Report};
use super::vocabulary::{matchers, template, tokenizer};
use super::world::World;
use crate::error::{Error, Result};

/// Steps of a world while things go wrong.
const SAFETY_STEPS: usize = 2000;
/// Most steps in which what is open must end then.
const LIVENESS_STEPS: usize = 20_000;

fn live(world: &mut World) -> Check {
    for _ in 0..SAFETY_STEPS {
        world.step(true)?;
    }
    for _ in 0..LIVENESS_STEPS {
        if world.is_done() {
            world.note_life();
            return world.check_rest();
        }
        world.step(false)?;
    }
    let open: Vec<&u64> = world.ledger.open.keys().collect();
    Err(format!(
        "after {LIVENESS_STEPS} quiet steps {open:?} are still open"
    ))
}

/// Simulates at least `steps` steps that compute something. Equal seeds give equal reports.
///
/// # Errors
/// `internal_error` that names the broken promise and the seed of the world in which it broke.
pub fn simulate(seed: u64, steps: u64) -> Result<Report> {
    let tokenizer = Arc::new(tokenizer()?);
    let template = Arc::new(template()?);
    let matchers = Arc::from(matchers(&tokenizer)?);
    let mut seeds = Random::new(seed);
    let mut report = Report {
        worlds: 0,
        counters: Counters::default(),
        faults: Faults::default(),
        digest: 0xcbf2_9ce4_8422_2325,
    };
    while report.counters.steps < steps {
        let seed = if report.worlds == 0 {
            seed
        } else {
            seeds.next()
        };
        let violated = |tick: u64, what: String| {
            Error::internal(format!(
                "step {tick} of the world with seed {seed}: {what}; repeat with --seed {seed} --steps 1"
            ))
        };
        let mut world = World::new(seed, report.digest, &tokenizer, &template, &matchers)
            .map_err(|what| violated(0, what))?;
        live(&mut world).map_err(|what| violated(world.tick, what))?;
        report.worlds += 1;
        report.counters += world.counters;
        report.faults += world.faults;
        report.digest = world.replies.digest;
    }
    Ok(report)
}
