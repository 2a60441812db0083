//! Threads that compute masks while the model runs.

use std::sync::Arc;
use std::thread::available_parallelism;

use super::pool::Pool;
use crate::error::Result;
use crate::guided::StepMasks;

/// Maximum number of threads. The thread that waits for the masks helps.
const MAX_THREADS: usize = 8;

/// Threads that wait for steps with masks.
pub(super) struct MaskingThreads {
    pool: Pool,
    threads: usize,
}

impl MaskingThreads {
    /// Starts half as many threads as the machine has cores, because the model needs cores too.
    pub(super) fn start() -> Result<Self> {
        let cores = available_parallelism().map_or(1, usize::from);
        let threads = (cores / 2).clamp(1, MAX_THREADS);
        let pool = Pool::start("lmserve-mask", threads)?;
        Ok(Self { pool, threads })
    }

    /// Begins to compute the masks of a step, and returns at once.
    pub(super) fn begin(&self, masks: &Arc<StepMasks>) {
        for _ in 0..self.threads.min(masks.rows().len()) {
            let masks = Arc::clone(masks);
            // If the threads are gone, the thread that waits for the masks computes them.
            let _ = self.pool.run(Box::new(move || masks.work()));
        }
    }
}

impl Drop for MaskingThreads {
    fn drop(&mut self) {
        self.pool.stop();
    }
}
