//! The steps of a runner on the CPU kernels, without Python: after a step has read all weights, nothing of the interpreter is in
//! the caches any more, and two calls into it took 85 us of a step of one token.

use pyo3::prelude::*;

use super::cpu_arrays::{CpuArrays, MaskWords};
use super::cpu_classes::{CpuModel, CpuProgram};
use crate::cpu::sample::LogitEdits;
use crate::error::Result;
use crate::sched::Step;

/// What `CpuRunner.native` gives: what its `launch` runs.
pub(super) struct CpuStep {
    model: Py<CpuModel>,
    program: Py<CpuProgram>,
    head: usize,
    arrays: Py<CpuArrays>,
}

impl CpuStep {
    /// That of a runner which has one.
    pub(super) fn of(runner: &Bound<'_, PyAny>) -> PyResult<Option<Self>> {
        let Some(native) = runner
            .getattr_opt("native")?
            .filter(|native| !native.is_none())
        else {
            return Ok(None);
        };
        let (model, program, head, arrays) = native.extract()?;
        Ok(Some(Self {
            model,
            program,
            head,
            arrays,
        }))
    }

    /// Copies a state, a block, or both out of the model's memory.
    pub(super) fn save(&self, (slot, block): (Option<u32>, Option<u32>)) -> Result<Vec<u8>> {
        self.model.get().save(slot, block)
    }

    /// Copies what [`Self::save`] gave into the model's memory.
    pub(super) fn load(
        &self,
        (slot, block): (Option<u32>, Option<u32>),
        bytes: &[u8],
    ) -> Result<()> {
        self.model.get().load(slot, block, bytes)
    }

    /// Runs a step that the runner's arrays hold.
    pub(super) fn run(&self, step: &Step) -> Result<()> {
        let edits = step.has_logit_edits().then(|| LogitEdits {
            bias_start: step.bias_start.clone(),
            bias_token: step.bias_token.clone(),
            bias_value: step.bias_value.clone(),
            seen_start: step.seen_start.clone(),
            seen_token: step.seen_token.clone(),
            seen_count: step.seen_count.clone(),
        });
        let masks = step.masks.as_ref().map(MaskWords::new);
        let sizes = (step.num_tokens(), step.num_sequences(), step.num_rows());
        self.model.get().step(
            self.program.get(),
            self.head,
            self.arrays.get(),
            sizes,
            edits.as_ref(),
            masks.as_ref(),
        )
    }
}
