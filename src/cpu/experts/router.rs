//! A layer's router: its matrix, and the choice by the logits.

use super::choice::{ExpertNumbers, Router};
use crate::cpu::linear::Linear;
use crate::cpu::memory::SharedSlice;
use crate::cpu::pool::Team;
use crate::error::{Error, Result};

/// The router of a layer, loaded.
pub(in crate::cpu) struct RouterWeight {
    /// Computes the logits. Its weights are floats, whatever the other weights are.
    pub(in crate::cpu) linear: Linear,
    router: Router,
    numbers: ExpertNumbers,
    factor: f32,
    pub(in crate::cpu) top_k: usize,
}

impl RouterWeight {
    /// # Errors
    /// `invalid_value` for a choice that so many experts do not leave.
    pub(in crate::cpu) fn new(
        linear: Linear,
        router: Router,
        numbers: ExpertNumbers,
        factor: f32,
        top_k: usize,
    ) -> Result<Self> {
        let experts = linear.out_features();
        let (groups, open) = match router {
            Router::CorrectedSigmoid {
                groups, top_groups, ..
            }
            | Router::GroupedSoftmax { groups, top_groups } => (groups, top_groups),
            _ => (1, 1),
        };
        let fits = |numbers: &[f32]| numbers.is_empty() || numbers.len() == experts;
        let whole = groups > 0 && experts.is_multiple_of(groups) && (1..=groups).contains(&open);
        let enough = whole && top_k >= 1 && top_k <= experts / groups * open;
        if !enough || !fits(&numbers.correction) || !fits(&numbers.scale) {
            return Err(Error::invalid(
                "router",
                format!(
                    "a choice of {top_k} of {experts} experts, in {open} of {groups} groups, must leave enough, and have as many numbers as experts"
                ),
            ));
        }
        Ok(Self {
            linear,
            router,
            numbers,
            factor,
            top_k,
        })
    }

    pub(in crate::cpu) fn bytes(&self) -> usize {
        let numbers = self.numbers.correction.len() + self.numbers.scale.len();
        self.linear.bytes() + numbers * size_of::<f32>()
    }

    /// Writes the logits of `rows` rows of `x`, and the choice that follows from them to `out` `[rows, 2 * top_k]`: the numbers of
    /// the experts, then their weights. Every thread of the team calls it; it ends with a barrier.
    ///
    /// # Safety
    /// Until it returns on all threads, nobody may write `x`, and nobody else touch `logits` or `out`.
    pub(in crate::cpu) unsafe fn route(
        &self,
        team: &Team,
        (x, rows): (SharedSlice<f32>, usize),
        logits: SharedSlice<f32>,
        out: SharedSlice<f32>,
        scratch: SharedSlice<u8>,
    ) {
        let (experts, width) = (self.linear.out_features(), 2 * self.top_k);
        // SAFETY: the caller's promise.
        unsafe { self.linear.forward(team, x, rows, logits, scratch) };
        team.for_chunks(rows, rows.div_ceil(4 * team.size()), |range| {
            for row in range {
                // SAFETY: each row is one thread's.
                let (logits, out) = unsafe {
                    (
                        logits.get_mut(row * experts..(row + 1) * experts),
                        out.get_mut(row * width..(row + 1) * width),
                    )
                };
                self.router.route(logits, &self.numbers, self.factor, out);
            }
        });
    }
}
