//! What lies below the model's memory, as Python says it.

use std::collections::HashMap;
use std::path::PathBuf;

use pyo3::prelude::*;

use crate::engine::TierConfig;
use crate::error::Error;
use crate::tier::StoreLimits;

/// `lmserve.engine.tiers.Tiers`.
#[derive(FromPyObject)]
pub(super) struct GivenTiers {
    host_blocks: u64,
    host_states: u64,
    folder: Option<PathBuf>,
    disk: u64,
    flag: String,
    fingerprint: Vec<u8>,
    tenants: HashMap<u32, [u8; 32]>,
}

impl GivenTiers {
    /// The tiers of a runner.
    ///
    /// # Errors
    /// `invalid_value` for a runner whose memory cannot be copied.
    pub(super) fn config(self, runner: &Bound<'_, PyAny>) -> PyResult<TierConfig> {
        let Some(sizes) = runner.getattr_opt("copy_sizes")? else {
            let message = "this runner's memory cannot be copied to tiers below it";
            return Err(Error::invalid("tiers", message).into());
        };
        let (block_bytes, state_bytes) = sizes.extract()?;
        Ok(TierConfig {
            limits: StoreLimits {
                host_blocks: self.host_blocks,
                host_states: self.host_states,
                disk: self.disk,
            },
            disk: self.folder.map(|folder| (folder, self.flag)),
            fingerprint: self.fingerprint,
            tenants: self.tenants.into_iter().collect(),
            block_bytes,
            state_bytes,
        })
    }
}
